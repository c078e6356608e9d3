"""An adapter's file that holds less than its config names is told of, or refused."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.merge.lora_delta import AdapterError
from finebridge.merge.merge_lora import merge
from safetensors.torch import load_file, save_file

from .conftest import MakeAdapter, load, logits, peft_logits, tensors
from .test_kinds import moe

Edited = Callable[..., Path]


def without(*parts: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(values: dict[str, torch.Tensor]) -> None:
        for key in [key for key in values if any(part in key for part in parts)]:
            del values[key]

    return change


def test_a_target_that_the_file_lost_is_refused_unless_allowed(base: Path, edited: Edited, tmp_path: Path) -> None:
    adapter = edited(without("v_proj"))
    lost = "target_modules names 'v_proj', adapter_model.safetensors holds nothing of it"
    with pytest.raises(
        AdapterError, match=rf"{lost}, but the model has model\.layers\.0\.self_attn\.v_proj\.weight; .*not whole"
    ):
        merge(base, [adapter], tmp_path / "out")
    said: list[str] = []
    merge(base, [adapter], tmp_path / "out", allow_unchanged=True, say=said.append)
    assert said == [f"{adapter / 'adapter_config.json'}: {lost}"]
    got, was = tensors(tmp_path / "out"), tensors(base)
    assert {name.split(".")[-2] for name in was if not got[name].equal(was[name])} == {"q_proj", "down_proj"}


@pytest.mark.parametrize(
    "settings",
    [
        {"exclude_modules": ["v_proj"]},
        {"layers_to_transform": [0]},
        {"target_modules": ["q_proj", "down_proj", "c_attn"]},
    ],
    ids=str,
)
def test_a_target_that_a_setting_leaves_out_or_no_model_has_is_a_line(
    base: Path, edited: Edited, tmp_path: Path, settings: dict[str, Any]
) -> None:
    said: list[str] = []
    merge(base, [edited(without("v_proj"), **settings)], tmp_path / "out", say=said.append)
    (line,) = said
    if "target_modules" in settings:
        assert line.endswith(
            "names 'c_attn', adapter_model.safetensors holds nothing of it, nor was a weight of that name found in the model"
        )
    else:
        assert line.endswith("target_modules names 'v_proj', adapter_model.safetensors holds nothing of it")


def test_layers_that_the_file_lost_are_told(base: Path, edited: Edited, tmp_path: Path) -> None:
    said: list[str] = []
    adapter = edited(without("layers.1.self_attn.q_proj", "layers.1.self_attn.v_proj"))
    merge(base, [adapter], tmp_path / "out", say=said.append)
    assert said == [
        f"{adapter}: 2 modules stay as in the base, they have no factors where their like in other layers have: "
        "model.layers.1.self_attn.q_proj ..."
    ]


def test_a_whole_adapter_says_nothing(base: Path, make_adapter: MakeAdapter, tmp_path: Path) -> None:
    said: list[str] = []
    for number, settings in enumerate(
        ({"modules_to_save": ["lm_head"], "target_modules": "all-linear"}, {"bias": "all"})
    ):
        merge(base, [make_adapter(**settings)], tmp_path / str(number), say=said.append)
    assert said == []


def test_parameters_may_be_named_without_their_module(tmp_path: Path) -> None:
    base, adapter = moe(
        "qwen3_moe", tmp_path, target_modules=["q_proj"], target_parameters=["gate_up_proj", "down_proj"]
    )
    said: list[str] = []
    merge(base, [adapter], tmp_path / "out", say=said.append)
    assert said == []
    assert (logits(load(tmp_path / "out")) - peft_logits(base, adapter)).abs().max() < 2e-5


def test_experts_that_the_file_lost_are_refused(tmp_path: Path) -> None:
    base, adapter = moe("qwen3_moe", tmp_path)
    said: list[str] = []
    merge(base, [adapter], tmp_path / "out", say=said.append)
    assert said == []
    path = adapter / "adapter_model.safetensors"
    values = load_file(path)
    without("experts")(values)
    save_file(values, path)
    named = json.loads((adapter / "adapter_config.json").read_text())["target_parameters"]
    with pytest.raises(
        AdapterError, match=rf"target_parameters names '({'|'.join(named)})', .*holds nothing of it, but the model"
    ):
        merge(base, [adapter], tmp_path / "other")
