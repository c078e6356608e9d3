"""LoRA on experts, fused or in a list, under ZeRO-2 and ZeRO-3: trained, whole on disk, loaded again by PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.lora import add_lora
from finebridge.train.model_arguments import ModelArguments
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


def test_adapters_are_whole_and_load_again(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path, zero: Callable[..., Path],
    history: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    """Two ranks under ZeRO-2, then ZeRO-3: equal losses, nothing empty, and PEFT loads every tensor."""
    base = models("hunyuan_v1_moe")
    words: list[object] = []
    for stage in (2, 3):
        words += [
            "+++", "--model_name_or_path", base, "--train_data_file", train_file, "--output_dir", tmp_path / str(stage),
            "--max_steps", 3, "--logging_steps", 1, "--learning_rate", 1e-2, "--per_device_train_batch_size", 2,
            "--disable_tqdm", "true", "--prepared_data_dir", tmp_path / "prepared", "--use_lora", "true", "--lora_rank", 4,
            "--lora_experts", "true", "--deepspeed", zero(stage),
        ]  # fmt: skip
    done = ranks.run(words[1:], tmp_path / "log", ranks=2, entry="sft_many:main").check()
    assert done.text.count("LoRA on experts: experts.down_proj, experts.gate_up_proj") == 2
    losses = [[entry["loss"] for entry in history(tmp_path / stage)] for stage in "23"]
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)
    assert losses[0][-1] < losses[0][0]
    for stage in "23":
        check_adapter(base, tmp_path / stage / "checkpoint-3")


def check_adapter(base: Path, folder: Path) -> None:
    adapter = load_file(folder / "adapter_model.safetensors")
    assert sum("experts" in name for name in adapter) == 8
    assert all(tensor.abs().sum() > 0 for tensor in adapter.values())
    plain = AutoModelForCausalLM.from_pretrained(base)
    ids = torch.arange(12)[None]
    before = plain(input_ids=ids).logits
    live = PeftModel.from_pretrained(plain, folder)
    loaded = {name: value for name, value in live.named_parameters() if "lora_" in name}
    assert len(loaded) == len(adapter)
    for name, value in adapter.items():
        assert value.equal(loaded[name.replace(".weight", ".default.weight")])
    assert (live(input_ids=ids).logits - before).abs().max() > 1e-4
