"""LoRA on experts, fused or in a list, under ZeRO-2 and ZeRO-3: trained, whole on disk, loaded again by PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from finebridge.train.arguments import ModelArguments
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.lora import add_lora
from finebridge.train.moe import leaf_summary, make_leaf_modules
from peft import PeftModel
from rank_runner import RankRunner
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

pytestmark = pytest.mark.distributed
Models = Callable[[str], Path]


def arguments(**flags: Any) -> ModelArguments:
    flags = {"use_lora": True, "lora_rank": 2, "lora_experts": True, **flags}
    return ModelArguments(config_name="x", tokenizer_name_or_path=str(Path(__file__).parent), **flags)


def test_fused_experts_get_an_adapter_and_blocks_stay_leaf_modules() -> None:
    said: list[str] = []
    model = add_lora(tiny("qwen3_moe"), arguments(), said.append)
    assert said == ["LoRA on experts: experts.down_proj, experts.gate_up_proj"]
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert sum("experts" in name for name in trained) == 8  # two layers, two parameters, A and B
    make_leaf_modules(model, None, said.append)
    assert leaf_summary(model) == "2 x Qwen3MoeSparseMoeBlock"


def test_what_cannot_be_is_refused() -> None:
    with pytest.raises(ArgumentsError, match="--lora_experts: this model has no mixture-of-experts block"):
        add_lora(tiny("llama"), arguments())
    with pytest.raises(ArgumentsError, match=r"--lora_dropout 0.1: PEFT has no dropout for fused experts"):
        add_lora(tiny("mixtral"), arguments(lora_dropout=0.1))
    with pytest.raises(ArgumentsError, match="--lora_experts needs --use_lora"):
        arguments(use_lora=False)


@pytest.mark.parametrize("stage", [2, 3])
def test_adapter_is_whole_and_loads_again(
    stage: int, ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path, zero: Callable[..., Path],
    history: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    base = models("hunyuan_v1_moe")
    argv = [
        "--model_name_or_path", base, "--train_data_file", train_file, "--output_dir", tmp_path, "--max_steps", 3,
        "--logging_steps", 1, "--learning_rate", 1e-2, "--per_device_train_batch_size", 2, "--disable_tqdm", "true",
        "--use_lora", "true", "--lora_experts", "true", "--lora_rank", 4, "--deepspeed", zero(stage),
        "--gradient_checkpointing", "true",
    ]  # fmt: skip
    done = ranks.run(argv, tmp_path / "log", ranks=2).check()
    assert "LoRA on experts: experts.down_proj, experts.gate_up_proj" in done.text
    losses = [entry["loss"] for entry in history(tmp_path)]
    assert losses[-1] < losses[0]
    adapter = load_file(tmp_path / "checkpoint-3" / "adapter_model.safetensors")
    experts = {name: tensor for name, tensor in adapter.items() if "experts" in name}
    assert len(experts) == 8
    assert all(tensor.numel() for tensor in adapter.values())
    assert all(tensor.abs().sum() > 0 for tensor in adapter.values())
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(12)[None]
    before = plain(input_ids=ids).logits
    live = PeftModel.from_pretrained(plain, tmp_path / "checkpoint-3")
    loaded = {name: value for name, value in live.named_parameters() if "lora_" in name}
    assert len(loaded) == len(adapter)
    for name, value in adapter.items():
        assert value.equal(loaded[name.replace(".weight", ".default.weight")])
    assert (live(input_ids=ids).logits - before).abs().max() > 1e-4
