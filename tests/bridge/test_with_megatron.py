"""The bridge against real Megatron-Core: it loads what the command writes, and the command reads what it writes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.convert_cli import main
from finebridge.storage.safetensors_io import Checkpoint
from transformers import AutoModelForCausalLM

from .oracle import load_with_megatron, needs_megatron, save_with_megatron
from .test_oracle import canonical_of, same

pytestmark = [needs_megatron, pytest.mark.distributed]
Models = Callable[[str], Path]
Sizes = dict[str, int]


def model_in(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def convert(source: Path, target: Path, *words: str) -> None:
    assert main(["--load", str(source), "--save", str(target), *words]) == 0


DIST: dict[str, Sizes] = {
    "llama": {"tp": 2}, "qwen2_tied": {"pp": 2}, "qwen3": {"pp": 2, "vpp": 2}, "qwen3_moe": {"ep": 2},
    "qwen3_moe_mixed": {"tp": 2, "pp": 2}, "seed_oss": {}, "deepseek_v2": {"tp": 2, "ep": 2, "etp": 1}, "deepseek_v3": {"pp": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", DIST)
def test_megatron_loads_our_torch_dist(name: str, hf_models: Models, tmp_path: Path) -> None:
    base = hf_models(name)
    convert(base, tmp_path / "ours", "--to", "mcore", "--ckpt_format", "torch_dist")
    model = model_in(base)
    config = model.config.to_dict() | {"num_nextn_predict_layers": 0}
    same(load_with_megatron(config, tmp_path / "ours" / "release", rows=72, **DIST[name]), canonical_of(model))


TORCH: dict[str, Sizes] = {
    "llama_tied": {"tp": 2, "pp": 2}, "qwen2": {"pp": 2, "vpp": 2}, "qwen3_moe": {"ep": 2}, "deepseek_v2": {"tp": 2, "ep": 2},
    "deepseek_v3": {"pp": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", TORCH)
def test_megatron_loads_our_torch(name: str, hf_models: Models, tmp_path: Path) -> None:
    base, sizes = hf_models(name), TORCH[name]
    words = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    if "tp" in sizes and "ep" in sizes:
        words += ["--etp", str(sizes["tp"])]  # Megatron's default
    convert(base, tmp_path / "ours", "--to", "mcore", "--ckpt_format", "torch", "--dialect", "mcore-local", *words)
    model = model_in(base)
    config = model.config.to_dict() | {"num_nextn_predict_layers": 0}
    got = load_with_megatron(config, tmp_path / "ours" / "release", form="torch", rows=128 * sizes.get("tp", 1), **sizes)
    same(got, canonical_of(model))


THEIRS = [
    ("llama_tied", "torch", {"tp": 2, "pp": 2}), ("qwen2", "torch", {"pp": 2, "vpp": 2}), ("qwen3_moe", "torch", {"ep": 2}),
    ("deepseek_v3", "torch", {"tp": 2}), ("qwen2_tied", "torch_dist", {"pp": 2}), ("qwen3_moe", "torch_dist", {"ep": 2}),
    ("qwen3_moe_mixed", "torch_dist", {"tp": 2}), ("deepseek_v2", "torch_dist", {"tp": 2}),
]  # fmt: skip


@pytest.mark.parametrize(("name", "form", "sizes"), THEIRS)
@pytest.mark.parametrize("dialect", ["mcore", "mcore-local"])
def test_the_bridge_reads_what_megatron_wrote(
    name: str, form: str, sizes: Sizes, dialect: str, hf_models: Models, tmp_path: Path
) -> None:
    if form == "torch" and dialect == "mcore":
        pytest.skip("without Transformer Engine torch files are of the local spec")
    base = hf_models(name)
    model = model_in(base)
    config = model.config.to_dict() | {"num_nextn_predict_layers": 0}
    iteration = tmp_path / "theirs" / "iter_0000001"
    save_with_megatron(config, canonical_of(model), iteration, form=form, rows=256, dialect=dialect, **sizes)
    (tmp_path / "theirs" / "latest_checkpointed_iteration.txt").write_text("1")
    convert(tmp_path / "theirs", tmp_path / "back", "--to", "hf", "--hf_config", str(base))
    with Checkpoint(base) as first, Checkpoint(tmp_path / "back") as second:
        assert set(first) == set(second)
        for key in first:
            assert torch.equal(first.get(key), second.get(key)), key
