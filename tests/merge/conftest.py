"""A tiny real base and adapters that PEFT itself made and saved."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.storage.safetensors_io import Checkpoint
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

MakeAdapter = Callable[..., Path]
IDS = torch.arange(24).reshape(2, 12)


def save_base(
    folder: Path, *, dtype: torch.dtype = torch.float32, tied: bool = False, biased: bool = False, shards: str = "5GB"
) -> Path:
    """A Qwen3 of two layers with random weights, the same for every dtype up to rounding."""
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, num_hidden_layers=2, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, vocab_size=64, tie_word_embeddings=tied, attention_bias=biased,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.data.normal_(0, 0.1)
    model.to(dtype).save_pretrained(folder, max_shard_size=shards)
    return folder


def load(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=IDS).logits


def peft_logits(base: Path, adapter: Path) -> torch.Tensor:
    """The truth: PEFT's own adapter on the base, in fp32."""
    return logits(PeftModel.from_pretrained(load(base), adapter).eval())


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    """Every tensor of a checkpoint folder by name."""
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.get(name).clone() for name in checkpoint}


def arguments(base: Path, adapter: Path, output: Path, *more: str) -> list[str]:
    names = {"--base_model_path": base, "--adapter_model_path": adapter, "--output_path": output}
    return [str(word) for pair in names.items() for word in pair] + list(more)


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_base(tmp_path_factory.mktemp("merge") / "base")


@pytest.fixture(scope="session")
def make_adapter(tmp_path_factory: pytest.TempPathFactory, base: Path) -> MakeAdapter:
    """An adapter of PEFT's for ``base`` (or another one), every trained tensor moved away from its start."""

    def make(on: Path = base, *, save_embedding_layers: bool | str = "auto", **settings: Any) -> Path:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ["q_proj", "v_proj", "down_proj"]} | settings
        torch.manual_seed(1)
        model = get_peft_model(load(on), LoraConfig(task_type="CAUSAL_LM", **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data += 0.3 * torch.randn_like(parameter)
        folder = tmp_path_factory.mktemp("adapter")
        model.save_pretrained(folder, save_embedding_layers=save_embedding_layers)
        return folder

    return make


@pytest.fixture(scope="session")
def adapter(make_adapter: MakeAdapter) -> Path:
    return make_adapter()


@pytest.fixture
def edited(tmp_path: Path, adapter: Path) -> Callable[..., Path]:
    """A copy of the plain adapter whose tensors a function has changed in place, and settings replaced."""

    def edit(change: Callable[[dict[str, torch.Tensor]], object] = lambda _: None, **settings: Any) -> Path:
        folder = tmp_path / "edited"
        folder.mkdir()
        tensors = load_file(adapter / "adapter_model.safetensors")
        change(tensors)
        save_file(tensors, folder / "adapter_model.safetensors")
        config = json.loads((adapter / "adapter_config.json").read_text()) | settings
        (folder / "adapter_config.json").write_text(json.dumps(config))
        return folder

    return edit
