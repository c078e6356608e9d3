"""What a merge costs: finebridge's beside PEFT's and beside a plain copy of the same bytes.

    python benchmarks/merge_speed.py [--large] [--rounds N] [--out FOLDER]

Qwen3-like models with random bf16 weights of about 0.5, 1.5 and, with ``--large``, 8 GB, and an adapter of rank 16 on all
linear modules. The ways: a copy of the base's folder, the same with every file flushed to the device, ``finebridge merge``
(which hashes, flushes and proves what it writes), and PEFT's ``merge_and_unload`` with ``save_pretrained``. ``compare.py``
tells how they are measured; medians of the rounds are added to ``merge_speed.csv``, a ratio is to the row of that way.
"""

import sys
from pathlib import Path
from typing import Any

import compare
from compare import Way


def prepare(name: str, folder: Path) -> None:
    """Write base and adapter."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict

    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    live: Any = get_peft_model(compare.build(name, folder), lora)
    live.peft_config["default"].save_pretrained(folder / "adapter")
    factors = get_peft_model_state_dict(live, save_embedding_layers=False)
    compare.save_random(factors, torch.float32, folder / "adapter" / "adapter_model.safetensors")


def finebridge(folder: Path) -> None:
    """The user's command, with its defaults."""
    from finebridge.merge.merge_lora import main

    words = {"--base_model_path": "base", "--adapter_model_path": "adapter", "--output_path": "out"}
    paths = [word for flag, name in words.items() for word in (flag, str(folder / name))]
    if code := main([*paths, "--save_dtype", "bf16"]):
        sys.exit(code)


def peft(folder: Path) -> None:
    """PEFT's own way, as its documentation shows it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, folder / "adapter").merge_and_unload().save_pretrained(folder / "out")


WAYS = {
    **compare.COPIES,
    "finebridge": Way(finebridge, ["torch", "safetensors", "finebridge.merge.merge_lora", "finebridge.merge.stream"]),
    "peft": Way(peft, ["torch", "peft", "transformers.models.qwen3.modeling_qwen3"]),
}


if __name__ == "__main__":
    compare.run(
        Path(__file__).with_suffix(".csv"), WAYS, prepare, beside=[*compare.COPIES, "peft"], models=["0.5GB", "1.5GB"]
    )
