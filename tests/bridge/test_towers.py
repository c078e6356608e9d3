"""Models with a vision tower: the language model is converted, the tower carried bit for bit."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.dist_records import read_metadata
from finebridge.bridge.family import of_text
from finebridge.bridge.parallel import is_carried
from finebridge.bridge.source import open_source
from finebridge.bridge.torch_format import FILE
from finebridge.finetune.cli import main
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForImageTextToText, set_seed

from .conftest import SMALL
from .oracle import megatron_logits, needs_megatron

Models = Callable[[str], Path]
TEXT = {key: value for key, value in SMALL.items() if not key.endswith("_token_id")}
ROPE = {"rope_type": "default", "rope_theta": 10000.0}
MODELS: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "qwen2_5_vl": (
        "qwen2_5_vl", {"rope_parameters": {**ROPE, "mrope_section": [1, 1, 2]}, "bos_token_id": 1, "eos_token_id": 2},
        {"depth": 2, "hidden_size": 16, "intermediate_size": 24, "num_heads": 2, "out_hidden_size": 32, "patch_size": 4},
    ),
    "mistral3": (
        "mistral3", {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
        {"model_type": "pixtral", "num_hidden_layers": 2, "hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2},
    ),
}  # fmt: skip


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.fixture(scope="module")
def towers(tmp_path_factory: pytest.TempPathFactory) -> Models:
    """Saved models with a vision tower by name; ``+tied`` and ``+untied`` say of the embeddings what they are."""
    folder = tmp_path_factory.mktemp("towers")

    def get(name: str) -> Path:
        if not (folder / name).exists():
            base, _, tied = name.partition("+")
            kind, text, vision = MODELS[base]
            set_seed(0)
            config = AutoConfig.for_model(
                kind, text_config={**TEXT, **text}, vision_config=vision, tie_word_embeddings=tied == "tied"
            )
            model = AutoModelForImageTextToText.from_config(config)
            with torch.no_grad():
                for value in model.parameters():
                    value.copy_(0.3 * torch.randn_like(value))
            model.save_pretrained(folder / name)
        return folder / name

    return get


def assert_same(one: Path, other: Path) -> None:
    before, after = (load_file(place / "model.safetensors") for place in (one, other))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("qwen2_5_vl+untied", ""),
        ("qwen2_5_vl+tied", "--ckpt_format torch --tp 2 --pp 2 --vpp 2"),
        ("mistral3+tied", "--dialect mcore-local"),
        ("mistral3+untied", "--ckpt_format torch --tp 2 --pp 2 --dialect mcore-local"),
    ],
)
def test_there_and_back(name: str, words: str, towers: Models, tmp_path: Path) -> None:
    base = towers(name)
    assert run("--to", "mcore", "--load", base, "--save", tmp_path / "mcore", *words.split()) == 0
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "hf") == 0
    assert_same(base, tmp_path / "hf")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config == json.loads((base / "config.json").read_text())
    assert run("verify", base, tmp_path / "mcore") == 0


@pytest.mark.slow
@pytest.mark.parametrize("tied", ["tied", "untied"])
@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("dialect", ["mcore", "mcore-local"])
def test_every_form(name: str, tied: str, dialect: str, towers: Models, tmp_path: Path) -> None:
    base = towers(f"{name}+{tied}")
    forms = ["", *(f"--ckpt_format torch {layout}" for layout in ("", "--tp 2", "--pp 4", "--tp 2 --pp 2 --vpp 2"))]
    for number, words in enumerate(forms):
        mcore, hf = tmp_path / f"mcore{number}", tmp_path / f"hf{number}"
        assert run("--to", "mcore", "--load", base, "--save", mcore, "--dialect", dialect, *words.split()) == 0
        assert run("--to", "hf", "--load", mcore, "--save", hf) == 0
        assert_same(base, hf)


def test_the_names_are_those_of_megatron_bridge(towers: Models, tmp_path: Path) -> None:
    """Its ``qwen25_vl_bridge.py``: ``language_model.`` before what stock Megatron-Core has, ``visual.`` on every rank whole."""
    base = towers("qwen2_5_vl+untied")
    assert run("--to", "mcore", "--load", base, "--save", tmp_path / "dist") == 0
    table = read_metadata(tmp_path / "dist/release", lambda _: True)
    visual = {name for name in load_file(base / "model.safetensors") if name.startswith("visual.")}
    language = {key for key in table.tensors if key.startswith("language_model.")}
    assert set(table.tensors) == visual | language
    assert "language_model.decoder.layers.self_attention.linear_qkv.layer_norm_weight" in language
    assert "language_model.output_layer.weight" in language
    assert all(key.startswith("language_model.") for key in table.objects)
    words = ["--ckpt_format", "torch", "--tp", "2", "--pp", "2"]
    assert run("--to", "mcore", "--load", base, "--save", tmp_path / "torch", *words) == 0
    for tp in (0, 1):
        first, last = (
            torch.load(tmp_path / f"torch/release/mp_rank_0{tp}_00{pp}" / FILE, weights_only=False) for pp in (0, 1)
        )
        assert visual <= set(first["model"])
        assert all(key in visual or key.startswith("language_model.") for key in first["model"])
        assert all(key.startswith("language_model.") for key in last["model"])
        assert (first["args"].position_embedding_type, first["args"].mrope_section) == ("mrope", [1, 1, 2])


@needs_megatron
@pytest.mark.parametrize(("name", "kind"), [("qwen2_5_vl+tied", "qwen2"), ("mistral3+untied", "mistral")])
def test_the_language_model_computes_the_same_on_text(name: str, kind: str, towers: Models) -> None:
    """Without images all three positions of a token are the same, so that stock Megatron-Core can be asked."""
    ids = torch.arange(10, 30)[None]
    with torch.no_grad():
        logits = AutoModelForImageTextToText.from_pretrained(towers(name)).eval()(input_ids=ids).logits
    with (source := open_source(towers(name))).tensors as tensors:
        canonical = {key: tensors.get(key) for key in tensors.shapes if not is_carried(key)}
    config = {**of_text(source.config), "model_type": kind}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 10000.0}
    assert torch.allclose(megatron_logits(config, canonical, ids), logits, atol=1e-5)


def test_names_of_other_releases_are_read(towers: Models, tmp_path: Path) -> None:
    """Some releases of transformers saved the names of its modules."""
    for name, renames in [
        ("qwen2_5_vl+untied", {"model.": "model.language_model.", "visual.": "model.visual."}),
        (
            "mistral3+untied",
            {"language_model.model.": "model.language_model.", "language_model.lm_head.": "lm_head.",
             "vision_tower.": "model.vision_tower.", "multi_modal": "model.multi_modal"},
        ),
    ]:  # fmt: skip
        folder = tmp_path / name
        shutil.copytree(towers(name), folder)
        renamed: dict[str, torch.Tensor] = {}
        for key, value in load_file(folder / "model.safetensors").items():
            old = next((old for old in renames if key.startswith(old)), "")
            renamed[renames.get(old, "") + key.removeprefix(old)] = value
        save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
        assert run("verify", folder, towers(name)) == 0


def test_every_tensor_of_a_tower_counts(towers: Models, tmp_path: Path) -> None:
    for name in ("qwen2_5_vl+untied", "mistral3+untied"):
        folder = tmp_path / name
        shutil.copytree(towers(name), folder)
        values = load_file(folder / "model.safetensors")
        carried = [key for key in values if key.startswith(("visual.", "vision_tower.", "multi_modal_projector."))]
        assert len(carried) > 20
        for key in carried:
            for other in ({}, {f"{key}x": values[key]}):
                save_file(
                    {**{one: value for one, value in values.items() if one != key}, **other},
                    folder / "model.safetensors",
                )
                with pytest.raises(ValueError, match=f"1 tensors are missing, the first is {key}$"):
                    open_source(folder)


def test_the_tower_of_another_training_is_refused(
    towers: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pai-Megatron-Patch has one of its own modules, ``vision_model``."""
    mcore = tmp_path / "mcore"
    words = ["--ckpt_format", "torch", "--load", towers("qwen2_5_vl+tied"), "--save", mcore]
    assert run("--to", "mcore", *words) == 0
    (path,) = mcore.rglob(FILE)
    content = torch.load(path, weights_only=False)
    content["model"] = {name.replace("visual.", "vision_model."): value for name, value in content["model"].items()}
    torch.save(content, path)
    (mcore / "manifest.json").unlink()
    assert run("--to", "hf", "--load", mcore, "--save", tmp_path / "hf") == 2
    said = capsys.readouterr().err
    assert (
        "30 tensors of the model are missing, the first is visual.patch_embed.proj.weight; 30 tensors are in no" in said
    )
    assert "the first is vision_model.patch_embed.proj.weight" in said


@pytest.mark.parametrize("dialect", ["pai", "mindspeed"])
def test_a_dialect_with_another_tower_is_refused(
    dialect: str, towers: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--ckpt_format", "torch", "--dialect", dialect, "--save", tmp_path / "out"]
    assert run("--to", "mcore", "--load", towers("qwen2_5_vl+untied"), *words) == 2
    assert f"tensor visual.patch_embed.proj.weight: --dialect {dialect} has no name for it" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["", "--ckpt_format torch --tp 2 --pp 2"])
def test_lora_lies_below_the_language_model_too(words: str, towers: Models, tmp_path: Path) -> None:
    base, adapter = towers("qwen2_5_vl+untied"), tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": ["o_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "base_model_name_or_path": str(base)}))
    names = [name for name in load_file(base / "model.safetensors") if name.endswith("o_proj.weight")]
    factors = {
        f"base_model.model.{name.removesuffix('.weight')}.lora_{kind}.weight": torch.randn(*shape)
        for name in names
        for kind, shape in (("A", (2, 32)), ("B", (32, 2)))
    }
    save_file(factors, adapter / "adapter_model.safetensors", metadata={"format": "pt"})
    assert run("--to", "mcore", "--load", adapter, "--save", tmp_path / "mcore", *words.split()) == 0
    if words:
        file = tmp_path / "mcore/release/mp_rank_00_000" / FILE
        stored = {name for name, value in torch.load(file, weights_only=False)["model"].items() if value is not None}
    else:
        stored = set(read_metadata(tmp_path / "mcore/release", lambda _: True).tensors)
    assert stored
    assert all(name.startswith("language_model.decoder.") for name in stored)
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "back") == 0
    back = load_file(tmp_path / "back/adapter_model.safetensors")
    assert back.keys() == factors.keys()
    assert all(torch.equal(value, back[name]) for name, value in factors.items())
