"""The bridge against real Megatron-Core: it loads what the command writes, and the command reads what it writes."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.convert_cli import main
from finebridge.storage.safetensors_io import Checkpoint
from torch import Tensor
from transformers import AutoModelForCausalLM

from .conftest import thinned
from .ling import Ling
from .oracle import load_with_megatron, needs_megatron, save_with_megatron
from .test_oracle import assert_same, canonical_of, with_further_layers

pytestmark = [needs_megatron, pytest.mark.distributed]
Models = Callable[[str], Path]
Sizes = dict[str, int]


def model_in(folder: Path) -> Any:
    if "bailing" in (folder / "config.json").read_text():
        return Ling.from_pretrained(folder)
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def without_further(model: Any) -> dict[str, Any]:
    """The config of what the model holds: transformers does not load layers that predict further tokens."""
    held = any(name.endswith("eh_proj.weight") for name in model.state_dict())
    return model.config.to_dict() | ({} if held else {"num_nextn_predict_layers": 0})


def convert(source: Path, target: Path, *words: str) -> None:
    words = (*words, "--allow_patched_attention")  # what is not needed does no harm
    assert main(["--load", str(source), "--save", str(target), *words]) == 0


DIST: dict[str, Sizes] = {
    "llama": {"tp": 2}, "qwen2_tied": {"pp": 2}, "qwen3": {"pp": 2, "vpp": 2}, "qwen3_moe": {"ep": 2},
    "qwen3_moe_mixed": {"tp": 2, "pp": 2}, "seed_oss": {}, "deepseek_v2": {"tp": 2, "ep": 2, "etp": 1}, "deepseek_v3": {"pp": 2},
    "glm4_moe": {"tp": 2}, "hy_v3": {"ep": 2}, "glm5": {"pp": 2},
    "deepseek_v32": {"tp": 2}, "qwen3_next": {"tp": 2, "pp": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", thinned(DIST, ["qwen2_tied", "qwen3_moe", "qwen3_moe_mixed", "deepseek_v3"]))
def test_megatron_loads_our_torch_dist(name: str, hf_models: Models, tmp_path: Path) -> None:
    base = hf_models(name)
    convert(base, tmp_path / "ours", "--to", "mcore", "--ckpt_format", "torch_dist")
    model = model_in(base)
    assert_same(
        load_with_megatron(without_further(model), tmp_path / "ours" / "release", rows=72, **DIST[name]),
        canonical_of(model),
    )


TORCH: dict[str, Sizes] = {
    "llama_tied": {"tp": 2, "pp": 2}, "qwen2": {"pp": 2, "vpp": 2}, "qwen3_moe": {"tp": 2, "ep": 2, "etp": 1},
    "deepseek_v2": {"tp": 2, "ep": 2, "etp": 2},
    "ling": {"tp": 2, "ep": 2, "etp": 2},
    "deepseek_v3": {"pp": 2}, "qwen3_next": {"tp": 2, "pp": 2}, "hunyuan_v1_moe": {"tp": 2},
}  # fmt: skip


@pytest.mark.parametrize("name", thinned(TORCH, ["qwen2", "deepseek_v2"]))
def test_megatron_loads_our_torch(name: str, hf_models: Models, tmp_path: Path) -> None:
    base, sizes = hf_models(name), TORCH[name]
    words = [word for key, value in sizes.items() for word in (f"--{key}", str(value))]
    convert(base, tmp_path / "ours", "--to", "mcore", "--ckpt_format", "torch", "--dialect", "mcore-local", *words)
    model, rows = model_in(base), 128 * sizes.get("tp", 1)
    assert_same(
        load_with_megatron(without_further(model), tmp_path / "ours" / "release", form="torch", rows=rows, **sizes),
        canonical_of(model),
    )


THEIRS: list[tuple[str, str, Sizes]] = [
    ("llama_tied", "torch", {"tp": 2, "pp": 2}), ("qwen2", "torch", {"pp": 2, "vpp": 2}), ("qwen3_moe", "torch", {"ep": 2}),
    ("deepseek_v3", "torch", {"tp": 2, "ep": 2, "etp": 1}), ("qwen2_tied", "torch_dist mcore", {"pp": 2}),
    ("qwen3_moe", "torch_dist mcore", {"ep": 2}), ("qwen3_moe_mixed", "torch_dist mcore-local", {"tp": 2}),
    ("deepseek_v2", "torch_dist mcore-local", {"tp": 2}), ("deepseek_v32", "torch", {"tp": 2}),
    ("hunyuan_v1_dense", "torch_dist mcore", {"pp": 2}), ("qwen3_next", "torch", {"tp": 2}),
    ("qwen3_next", "torch_dist mcore", {"tp": 2}),
]  # fmt: skip


def save_run(config: Any, canonical: Mapping[str, Tensor], run: Path, **more: Any) -> None:
    """A folder of a run: one iteration and the tracker."""
    save_with_megatron(config, canonical, run / "iter_0000001", rows=256, **more)
    (run / "latest_checkpointed_iteration.txt").write_text("1")


@pytest.mark.parametrize(("name", "form", "sizes"), thinned(THEIRS, [THEIRS[0], THEIRS[3], THEIRS[5], THEIRS[7]]))
def test_the_bridge_reads_what_megatron_wrote(
    name: str, form: str, sizes: Sizes, hf_models: Models, tmp_path: Path
) -> None:
    base = hf_models(name)
    model = model_in(base)
    kind, _, dialect = form.partition(" ")
    save_run(without_further(model), canonical_of(model), tmp_path / "theirs", form=kind, dialect=dialect, **sizes)
    convert(tmp_path / "theirs", tmp_path / "back", "--to", "hf", "--hf_config", str(base))
    with Checkpoint(base) as first, Checkpoint(tmp_path / "back") as second:
        assert set(first) == set(second)
        for key in first:
            assert torch.equal(first.get(key), second.get(key)), key


FURTHER_FORMS = [("deepseek_v3", "torch"), ("deepseek_v3", "torch_dist"), ("qwen3_next", "torch_dist")]


@pytest.mark.parametrize(("name", "form"), thinned(FURTHER_FORMS, FURTHER_FORMS[1:]))
def test_layers_that_predict_further_tokens(name: str, form: str, hf_models: Models, tmp_path: Path) -> None:
    """Written by Megatron-Core, to Hugging Face and back, loaded by Megatron-Core: all of it is there."""
    model = model_in(hf_models(name))
    canonical = with_further_layers(canonical_of(model))
    model.config.num_nextn_predict_layers = 1
    save_run(model.config, canonical, tmp_path / "theirs", form=form, pp=2)
    model.config.save_pretrained(tmp_path / "config")
    convert(tmp_path / "theirs", tmp_path / "hf", "--to", "hf", "--hf_config", str(tmp_path / "config"))
    words = ["--to", "mcore", "--ckpt_format", form, *(["--dialect", "mcore-local"] if form == "torch" else [])]
    convert(tmp_path / "hf", tmp_path / "ours", *words)
    assert_same(load_with_megatron(model.config, tmp_path / "ours" / "release", form=form, rows=128), canonical)
