"""Checkpoints of AutoAlign's preference runs: two models in each file, of which the trained one is the model.

Source: icip-cas/AutoAlign e16a07e4 (2026-04-08), ``src/autoalign_megatron/patch/model/qwen2/model_dpo.py``
(``state_dict_for_save_checkpoint``): ``policy_model`` is the whole module's state, the reference below ``ref_model.`` in it.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.source import open_source
from finebridge.bridge.torch_format import FILE
from finebridge.finetune.cli import main
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .oracle import megatron_logits, needs_megatron

Models = Callable[[str], Path]
SAID = "a checkpoint of a DPO run: the reference model (ref_model) is left out, the policy is the model"


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


@pytest.fixture
def make_dpo(hf_models: Models, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint that training with preferences left: the policy is the model, the reference another one."""

    def make(*layout: str) -> Path:
        base, other, folder = hf_models("qwen2"), tmp_path / "other", tmp_path / "dpo"
        other.mkdir()
        (other / "config.json").write_text((base / "config.json").read_text())
        values = {name: tensor + 1 for name, tensor in load_file(base / "model.safetensors").items()}
        save_file(values, other / "model.safetensors", metadata={"format": "pt"})
        words = ["--to", "mcore", "--ckpt_format", "torch", *layout]
        assert run(*words, "--load", base, "--save", folder) == 0
        assert run(*words, "--load", other, "--save", tmp_path / "reference") == 0
        for path in folder.rglob(FILE):
            content = torch.load(path, weights_only=False)
            reference = torch.load(tmp_path / "reference" / path.relative_to(folder), weights_only=False)
            for key in [key for key in content if key.startswith("model")]:
                inside = {f"ref_model.{name}": value for name, value in reference[key].items()}
                content[key] = {"policy_model": content[key] | inside, "ref_model": reference[key]}
            torch.save(content, path)
        (folder / "manifest.json").unlink()
        return folder

    return make


@pytest.mark.parametrize("layout", ["", "--tp 2 --pp 2", "--pp 2 --vpp 2"])
def test_the_reference_is_left_out_and_told(
    layout: str, make_dpo: Callable[..., Path], hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_dpo(*layout.split())
    capsys.readouterr()
    assert run("inspect", folder) == 0
    assert capsys.readouterr().out.count(SAID) == 1
    assert run("--to", "hf", "--load", folder, "--save", tmp_path / "hf") == 0
    assert capsys.readouterr().out.count(SAID) == 1
    before, after = (load_file(place / "model.safetensors") for place in (hf_models("qwen2"), tmp_path / "hf"))
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_what_is_no_pair_of_models_is_refused(
    make_dpo: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder = make_dpo()
    path = folder / "release/mp_rank_00" / FILE
    content = torch.load(path, weights_only=False)

    def refused(model: dict[str, Any]) -> str:
        torch.save(content | {"model": model}, path)
        assert run("inspect", folder) == 2
        return capsys.readouterr().err

    assert "policy_model and ref_model are expected" in refused({**content["model"], "value_model": {}})
    assert "policy_model and ref_model are expected" in refused({**content["model"], "policy_model": 3})
    assert "ref_model in model is a dict, no plain tensor by name" in refused(
        {"ref_model": content["model"]["ref_model"]}
    )


@needs_megatron
def test_what_comes_out_computes_what_the_policy_did(
    make_dpo: Callable[..., Path], hf_models: Models, tmp_path: Path
) -> None:
    folder = make_dpo("--tp", "2")
    assert run("--to", "hf", "--load", folder, "--save", tmp_path / "hf") == 0
    ids = torch.arange(20)[None]
    with open_source(folder).tensors as tensors:
        canonical = {name: tensors.get(name).clone() for name in tensors.shapes}
    config = json.loads((hf_models("qwen2") / "config.json").read_text())
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(tmp_path / "hf").eval()(ids).logits
    assert (megatron_logits(config, canonical, ids) - logits).abs().max() < 1e-5
