"""LoRA across the bridge: the same adapter comes back by its bits, the merged model is the one of ``finebridge merge``."""

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.family import Row
from finebridge.bridge.lora import NAMES, Pair, to_hf, to_mcore
from finebridge.bridge.mapping import QKV, Copy, Gated
from finebridge.finetune.cli import main
from finebridge.merge.merge_lora import merge
from hypothesis import given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

Models = Callable[[str], Path]
Adapters = Callable[..., Path]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("llama", {"target_modules": DENSE}),
    "query and value": ("qwen2", {"target_modules": ["q_proj", "v_proj"]}),
    "some layers": ("qwen3_tied", {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1, 2]}),
    "ranks": ("qwen3", {"target_modules": DENSE, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 4}}),
    "experts": ("qwen3_moe", {"target_modules": ATTENTION, "target_parameters": STACKS}),
    "experts, one way": ("qwen3_moe_mixed", {"target_modules": ["o_proj"], "target_parameters": STACKS[1:]}),
    "latent attention": ("deepseek_v3", {"target_modules": LATENT}),
}  # fmt: skip


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


def tensors(folder: Path, name: str = "adapter_model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def adapters(hf_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Adapters as PEFT saves them, with random factors, by the model's name and PEFT's settings."""
    made: dict[str, Path] = {}

    def get(model: str, **changes: Any) -> Path:
        key = json.dumps([model, changes])
        if key not in made:
            base = AutoModelForCausalLM.from_pretrained(hf_models(model))
            config = {"r": 4, "lora_alpha": 8, "target_modules": DENSE, "task_type": "CAUSAL_LM"} | changes
            torch.manual_seed(1)
            peft = get_peft_model(base, LoraConfig(**config))
            peft.base_model.config._name_or_path = str(hf_models(model))
            for name, value in peft.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(value, std=0.1)
            made[key] = tmp_path_factory.mktemp("adapter")
            peft.save_pretrained(made[key])
        return made[key]

    return get


@pytest.mark.parametrize("layout", ["--ckpt_format torch --tp 2 --pp 2", "--ckpt_format torch_dist"])
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_comes_back(
    case: str, layout: str, adapters: Adapters, hf_models: Models, tmp_path: Path
) -> None:
    model, changes = CASES[case]
    adapter = adapters(model, **changes)
    assert run("--to", "mcore", "--load", adapter, "--save", tmp_path / "mcore", *layout.split()) == 0
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "back") == 0
    assert_same(tensors(adapter), tensors(tmp_path / "back"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf_models(model)), place)(ids).logits
            for place in (adapter, tmp_path / "back")
        )
    assert torch.equal(one, other), "ranks and scales of the config"
