"""Hugging Face folders as canonical tensors and back: bit for bit, and nothing is taken that is not the model."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.families import families, family_of
from finebridge.bridge.hf import HFCheckpoint, write_hf
from finebridge.storage.safetensors_io import Checkpoint, Spec
from safetensors.torch import save_file

from .conftest import MODELS, thinned

Models = Callable[[str], Path]


def open_hf(folder: Path, **changes: Any) -> tuple[HFCheckpoint, Any]:
    config = json.loads((folder / "config.json").read_text()) | changes
    family = family_of(config)
    return HFCheckpoint(folder, config, family), family


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.get(name).clone() for name in checkpoint}


def written(folder: Path, out: Path) -> dict[str, torch.Tensor]:
    """What the folder is when it went through the canonical model."""
    checkpoint, family = open_hf(folder)
    out.mkdir()
    with checkpoint:
        checkpoint.check_copies()
        specs = {name: Spec(name, checkpoint.dtypes[name], shape) for name, shape in checkpoint.shapes.items()}
        rows, copies = list(family.rows(checkpoint.config)), family.copies(checkpoint.config)
        write_hf(out, rows, copies, specs, checkpoint.get, max_bytes=20_000)
    return tensors(out)


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype
        assert torch.equal(value, other[name]), name


@pytest.mark.parametrize("name", thinned(MODELS, ["qwen2_tied", "seed_oss", "qwen3_moe", "deepseek_v3"]))
def test_there_and_back(name: str, hf_models: Models, tmp_path: Path) -> None:
    before = tensors(hf_models(name))
    assert_same(before, written(hf_models(name), tmp_path / "out"))
    assert len(list((tmp_path / "out").glob("*.safetensors"))) > 1


def edited(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, torch.Tensor]], object], name: str = "edited"
) -> Path:
    values = tensors(folder)
    change(values)
    target = tmp_path / name
    target.mkdir()
    shutil.copy(folder / "config.json", target)
    save_file({key: value.contiguous() for key, value in values.items()}, target / "model.safetensors")
    return target


def test_further_layers_with_their_copies(hf_models: Models, tmp_path: Path) -> None:
    """DeepSeek V3's own files: a layer more, and in it the embedding and the head again."""

    def add(values: dict[str, torch.Tensor]) -> None:
        last, further = "model.layers.3.", "model.layers.4."
        values |= {further + key.removeprefix(last): value + 1 for key, value in values.items() if key.startswith(last)}
        values |= {f"{further}{key}.weight": torch.randn(32) for key in ("enorm", "hnorm", "shared_head.norm")}
        values[f"{further}eh_proj.weight"] = torch.randn(32, 64)
        values[f"{further}embed_tokens.weight"] = values["model.embed_tokens.weight"].clone()
        values[f"{further}shared_head.head.weight"] = values["lm_head.weight"].clone()

    folder = edited(hf_models("deepseek_v3"), tmp_path, add)
    assert_same(tensors(folder), written(folder, tmp_path / "out"))
    checkpoint, _ = open_hf(folder)
    assert "mtp.layers.0.transformer_layer.mlp.experts.local_experts.3.linear_fc2.weight" in checkpoint.shapes
    other = edited(folder, tmp_path, lambda t: t["model.layers.4.embed_tokens.weight"].add_(1), "other")
    with pytest.raises(
        BridgeError, match=r"embed_tokens\.weight should repeat model\.embed_tokens\.weight, but differs"
    ):
        written(other, tmp_path / "none")


def test_fused_experts_are_read_one_by_one(hf_models: Models, tmp_path: Path) -> None:
    def fuse(values: dict[str, torch.Tensor]) -> None:
        for layer in range(4):
            place = f"model.layers.{layer}.mlp.experts"
            parts = {
                kind: torch.stack([values.pop(f"{place}.{expert}.{kind}.weight") for expert in range(4)])
                for kind in ("gate_proj", "up_proj", "down_proj")
            }
            values[f"{place}.gate_up_proj"] = torch.cat([parts["gate_proj"], parts["up_proj"]], dim=1)
            values[f"{place}.down_proj"] = parts["down_proj"]

    folder = edited(hf_models("qwen3_moe"), tmp_path, fuse)
    assert_same(tensors(hf_models("qwen3_moe")), written(folder, tmp_path / "out"))


def test_block_scaled_fp8_comes_out_in_bf16(hf_models: Models, tmp_path: Path) -> None:
    name = "model.layers.0.mlp.down_proj.weight"
    wanted: dict[str, torch.Tensor] = {}

    def quantise(values: dict[str, torch.Tensor]) -> None:
        values |= {key: value.bfloat16() for key, value in values.items()}
        scales = torch.rand(1, 1) + 0.5
        small = (values[name].float() / scales).to(torch.float8_e4m3fn)
        wanted[name] = (small.float() * scales).bfloat16()
        values[name], values[f"{name}_scale_inv"] = small, scales

    folder = edited(hf_models("qwen3"), tmp_path, quantise)
    out = written(folder, tmp_path / "out")
    assert torch.equal(out[name], wanted[name])
    assert f"{name}_scale_inv" not in out


NAME = "model.layers.2.self_attn.k_proj.weight"
FAULTS: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "dropped": (lambda t: t.pop(NAME), f"1 tensors are missing, the first is {NAME}"),
    "renamed": (lambda t: t.update({f"{NAME}x": t.pop(NAME)}), f"1 tensors are missing, the first is {NAME}"),
    "one more": (lambda t: t.update({"model.layers.9.mlp.x": torch.ones(2)}), r"1 tensors are in no table.*layers\.9\.mlp\.x"),
    "a bias more": (lambda t: t.update({NAME.replace("weight", "bias"): torch.ones(32)}), "1 tensors are in no table"),
    "another shape": (lambda t: t.update({NAME: t[NAME][:-1]}), "31 rows where 32 are expected"),
    "no number": (lambda t: t[NAME].view(-1)[3:4].fill_(float("nan")), f"{NAME} holds values that are not finite"),
    "no limit": (lambda t: t[NAME].view(-1)[3:4].fill_(float("inf")), f"{NAME} holds values that are not finite"),
    "another dtype": (lambda t: t.update({NAME: t[NAME].bfloat16()}), "become one tensor, but have the types"),
    "fewer words": (lambda t: t.update({"model.embed_tokens.weight": torch.ones(69, 32)}), "69 rows, .* says vocab_size 70"),
}  # fmt: skip


@pytest.mark.parametrize("name", FAULTS)
def test_what_is_not_the_model_is_refused(name: str, hf_models: Models, tmp_path: Path) -> None:
    change, message = FAULTS[name]
    folder = edited(hf_models("qwen3"), tmp_path, change)
    with pytest.raises(BridgeError, match=message):
        written(folder, tmp_path / "out")


def test_computed_buffers_are_left_out_and_told(hf_models: Models, tmp_path: Path) -> None:
    buffer = "model.layers.0.self_attn.rotary_emb.inv_freq"
    folder = edited(hf_models("llama"), tmp_path, lambda t: t.update({buffer: torch.ones(4)}))
    checkpoint, _ = open_hf(folder)
    assert checkpoint.said == [f"1 computed buffers are left out, the first is {buffer}"]


def test_a_tied_head_that_is_stored_too_must_be_the_embedding(hf_models: Models, tmp_path: Path) -> None:
    head = tensors(hf_models("qwen3_tied"))["model.embed_tokens.weight"]
    folder = edited(hf_models("qwen3_tied"), tmp_path, lambda t: t.update({"lm_head.weight": head.clone()}))
    assert "output_layer.weight" not in open_hf(folder)[0].shapes
    other = edited(hf_models("qwen3_tied"), tmp_path, lambda t: t.update({"lm_head.weight": head + 1}), "other")
    with pytest.raises(
        BridgeError, match=r"lm_head\.weight should repeat model\.embed_tokens\.weight, but differs from it"
    ):
        open_hf(other)[0].check_copies()


def test_families_are_found_by_config_or_name() -> None:
    assert {"llama", "qwen2", "qwen3", "qwen3-moe", "seed-oss", "deepseek"} <= families().keys()
    assert family_of({"model_type": "mistral"}).name == "llama"
    assert family_of({}, "qwen3-moe").name == "qwen3-moe"
    with pytest.raises(BridgeError, match=r"model_type 'bert' has no table yet; those that have are .*qwen2"):
        family_of({"model_type": "bert"})
    with pytest.raises(BridgeError, match="--model_type_hf nothing: families are deepseek"):
        family_of({}, "nothing")


def test_a_table_is_short() -> None:
    folder = Path(__import__("finebridge").__file__).parent / "bridge" / "families"
    lengths = {
        path.name: len(path.read_text().splitlines()) for path in folder.glob("*.py") if path.name != "__init__.py"
    }
    assert lengths
    assert max(lengths.values()) <= 80, lengths


def test_the_plan_of_a_very_large_model_is_quick_to_make() -> None:
    config = {
        "model_type": "deepseek_v3", "num_hidden_layers": 61, "first_k_dense_replace": 3, "n_routed_experts": 256,
        "n_shared_experts": 1, "q_lora_rank": 1536, "vocab_size": 129280, "num_nextn_predict_layers": 1, "hidden_size": 7168,
        "num_attention_heads": 128,
    }  # fmt: skip
    rows = list(family_of(config).rows(config))
    assert len(rows) == len({row.mcore for row in rows})
    assert sum("local_experts" in row.mcore for row in rows) == 59 * 256 * 2
