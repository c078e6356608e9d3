"""Hugging Face folders as canonical tensors and back: bit for bit, and nothing is taken that is not the model."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.convert import Target, plan
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.families import families, family_of
from finebridge.bridge.hf import HFCheckpoint, write_hf
from finebridge.bridge.source import open_source
from finebridge.storage.safetensors_io import Checkpoint, Spec
from safetensors.torch import save_file

from .conftest import FURTHER, MODELS, add_further, thinned

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


@pytest.mark.parametrize("name", FURTHER)
def test_further_layers_with_their_copies(name: str, hf_models: Models, tmp_path: Path) -> None:
    """The makers' own files: a layer more, and in some of them the embedding and the head again."""
    folder = edited(hf_models(name), tmp_path, lambda values: add_further(name, values))
    assert_same(tensors(folder), written(folder, tmp_path / "out"))
    checkpoint, _ = open_hf(folder)
    assert "mtp.layers.0.transformer_layer.mlp.experts.local_experts.3.linear_fc2.weight" in checkpoint.shapes
    if not FURTHER[name][1]:
        return
    other = edited(folder, tmp_path, lambda t: t["model.layers.4.embed_tokens.weight"].add_(1), "other")
    with pytest.raises(
        BridgeError, match=r"embed_tokens\.weight should repeat model\.embed_tokens\.weight, but differs"
    ):
        written(other, tmp_path / "none")


def fuse(values: dict[str, torch.Tensor]) -> None:
    """The experts of every layer in one tensor a kind."""
    for place in sorted({key.partition("experts.0.")[0] for key in values if ".mlp.experts.0." in key}):
        parts = {
            kind: torch.stack([values.pop(f"{place}experts.{expert}.{kind}_proj.weight") for expert in range(4)])
            for kind in ("gate", "up", "down")
        }
        values[f"{place}experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        values[f"{place}experts.down_proj"] = parts["down"]


@pytest.mark.parametrize("name", ["qwen3_moe", "glm4_moe"])
def test_fused_experts_are_read_one_by_one(name: str, hf_models: Models, tmp_path: Path) -> None:
    folder = edited(hf_models(name), tmp_path, fuse)
    assert_same(tensors(hf_models(name)), written(folder, tmp_path / "out"))


def test_experts_stored_twice_are_refused(hf_models: Models, tmp_path: Path) -> None:
    kept: dict[str, torch.Tensor] = {}

    def both(values: dict[str, torch.Tensor]) -> None:
        name = "model.layers.2.mlp.experts.1.up_proj.weight"
        kept[name] = values[name].clone()
        fuse(values)
        values |= kept

    folder = edited(hf_models("qwen3_moe"), tmp_path, both)
    with pytest.raises(BridgeError, match=r"is model\.layers\.2\.mlp\.experts\.1\.up_proj\.weight, which .* is too"):
        open_hf(folder)


def test_another_spelling_of_the_same_model(hf_models: Models, tmp_path: Path) -> None:
    """Hy3 as Tencent's own tool writes it: names of transformers' modules, experts together."""
    names = {
        "mlp.router.gate.": "mlp.gate.", "mlp.expert_bias": "mlp.e_score_correction_bias",
        "mlp.shared_mlp.": "mlp.shared_experts.",
    }  # fmt: skip

    def respell(values: dict[str, torch.Tensor]) -> None:
        add_further("hy_v3", values)
        fuse(values)
        for name in list(values):
            for ours, theirs in names.items():
                if ours in name:
                    values[name.replace(ours, theirs)] = values.pop(name)

    usual = edited(hf_models("hy_v3"), tmp_path, lambda values: add_further("hy_v3", values), "usual")
    folder = edited(hf_models("hy_v3"), tmp_path, respell)
    assert_same(tensors(usual), written(folder, tmp_path / "out"))


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


def one_of_each(values: dict[str, torch.Tensor]) -> list[str]:
    """Tensors outside of layers, of the first and the last one; of its experts one: others have the same lines."""
    last = max(int(key.split(".")[2]) for key in values if ".layers." in key)
    repeated = re.compile(rf"\.layers\.{last}\.(embed_tokens|shared_head\.head)\.|\.experts\.[^3]\.")
    inside = (".layers.0.", f".layers.{last}.")
    return [
        key for key in values if (".layers." not in key or any(x in key for x in inside)) and not repeated.search(key)
    ]  # fmt: skip


QUICK = {"ling", "hy_v3"}
SWEEP = [pytest.param(name, marks=() if name in QUICK else pytest.mark.slow) for name in MODELS]


@pytest.mark.parametrize("name", SWEEP)
def test_every_tensor_that_is_missing_or_misshapen_is_refused(name: str, hf_models: Models, tmp_path: Path) -> None:
    values = tensors(hf_models(name))
    if name in FURTHER:
        add_further(name, values)
    shutil.copy(hf_models(name) / "config.json", tmp_path)

    def planned(changed: dict[str, torch.Tensor]) -> None:
        save_file(changed, tmp_path / "model.safetensors")
        source = open_source(tmp_path)
        with source.tensors:
            plan(source, Target("torch_dist", allow_patched_attention=True))

    planned(values)
    tried = one_of_each(values)
    assert len(tried) >= 20
    for key in tried:
        value = values.pop(key)
        with pytest.raises(BridgeError, match=re.escape(f"1 tensors are missing, the first is {key}")):
            planned(values)
        for smaller in (value[1:], value[..., 1:])[: value.ndim]:
            with pytest.raises(BridgeError, match=re.escape(key.rpartition(".")[0])):
                planned({**values, key: smaller.contiguous()})
        values[key] = value


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


def test_a_tied_head_under_another_name_of_the_embedding(hf_models: Models, tmp_path: Path) -> None:
    def tie(values: dict[str, torch.Tensor]) -> None:
        values["lm_head.weight"] = values["model.word_embeddings.weight"].clone()

    folder = edited(hf_models("ling"), tmp_path, tie)
    checkpoint, _ = open_hf(folder, tie_word_embeddings=True)
    assert "output_layer.weight" not in checkpoint.shapes
    checkpoint.check_copies()
    other = edited(folder, tmp_path, lambda t: t["lm_head.weight"].add_(1), "other")
    with pytest.raises(BridgeError, match=r"lm_head\.weight should repeat model\.word_embeddings\.weight"):
        open_hf(other, tie_word_embeddings=True)[0].check_copies()


def test_families_are_found_by_config_or_name() -> None:
    assert {"llama", "qwen2", "qwen3", "qwen3-moe", "seed-oss", "deepseek"} <= families().keys()
    assert family_of({"model_type": "mistral"}).name == "llama"
    assert family_of({}, "qwen3-moe").name == "qwen3-moe"
    with pytest.raises(BridgeError, match=r"model_type 'bert' has no table yet; those that have are .*qwen2"):
        family_of({"model_type": "bert"})
    with pytest.raises(BridgeError, match="--model_type_hf nothing: families are .*deepseek"):
        family_of({}, "nothing")


# MindSpeed-LLM's --model-type-hf: those of its all-in-one trainer, then later names of the same families.
MINDSPEED = {
    "qwen3": "qwen3", "qwen3-moe": "qwen3_moe", "deepseek3": "deepseek_v3", "glm45-moe": "glm4_moe",
    "bailing_mini": "bailing_moe", "seed-oss": "seed_oss", "magistral": "mistral", "deepseek2-lite": "deepseek_v2",
    "deepseek2": "deepseek_v2", "glm45": "glm4_moe", "glm45-air": "glm4_moe", "llama2": "llama", "qwen25": "qwen2",
    "HYV3": "hy_v3", "deepseek32": "deepseek_v32", "qwen3-next": "qwen3_next", "hunyuan": "hunyuan",
}  # fmt: skip


@pytest.mark.parametrize("name", MINDSPEED)
def test_names_of_mindspeed_are_names_of_families(name: str) -> None:
    config = {"model_type": MINDSPEED[name]}
    assert family_of(config, name).name == family_of(config).name


@pytest.mark.parametrize(
    ("config", "name", "said"),
    [
        ({}, "glm4", "--model_type_hf glm4: families are .*; the nearest is glm45"),
        ({}, "qwen-3", "the nearest is qwen3"),
        ({"model_type": "bailing_hybrid"}, None, "has no table yet; .*; the nearest is bailing_moe"),
        ({"model_type": "hy_v3"}, "glm45", "--model_type_hf glm45: config.json has model_type hy_v3, family hy_v3"),
        ({}, None, "model_type None has no table"),
    ],
)
def test_a_name_without_a_family_is_refused(config: dict[str, Any], name: str | None, said: str) -> None:
    with pytest.raises(BridgeError, match=said):
        family_of(config, name)


def test_no_name_is_that_of_two_families() -> None:
    names = [name for family in families().values() for name in {family.name, *family.aliases, *family.model_types}]
    assert len(names) == len(set(names))


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
