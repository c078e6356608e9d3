"""Models that stock Megatron-Core does not compute are converted only when that is asked for, or never."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
from finebridge.bridge.families import qwen3
from finebridge.bridge.family import Family, has, needs_patch, none
from finebridge.finetune.cli import main

Models = Callable[[str], Path]
FAMILY = qwen3.FAMILY
WORDS = ["convert", "--dry_run", "--to"]


def family(monkeypatch: pytest.MonkeyPatch, **changes: object) -> Family:
    monkeypatch.setattr(qwen3, "FAMILY", replace(FAMILY, **changes))  # pyright: ignore[reportArgumentType]
    return qwen3.FAMILY


def test_a_model_that_needs_a_patch(
    hf_models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    base = str(hf_models("qwen3"))
    family(monkeypatch, support=needs_patch("it adds where others multiply"))
    assert main([*WORDS, "mcore", "--load", base]) == 2
    said = capsys.readouterr().err
    assert "stock Megatron-Core computes qwen3 otherwise: it adds where others multiply" in said
    assert "--allow_patched_attention" in said
    assert main([*WORDS, "hf", "--load", base]) == 0, "neither side is Megatron's"
    made = str(tmp_path / "mcore")
    assert main(["convert", "--to", "mcore", "--load", base, "--save", made, "--allow_patched_attention"]) == 0
    assert "only for a Megatron-Core that was changed: it adds where others multiply" in capsys.readouterr().out
    assert main([*WORDS, "hf", "--load", made]) == 2, "what stock Megatron-Core trained is another model"
    assert main([*WORDS, "hf", "--load", made, "--allow_patched_attention"]) == 0
    Path(made, "config.json").unlink()
    assert main([*WORDS, "hf", "--load", made]) == 2
    assert "patched_attention=it adds where others multiply is none for which a config" in capsys.readouterr().err


def test_a_model_that_nothing_computes(
    hf_models: Models, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    family(monkeypatch, support=none("there is no such attention"))
    assert main([*WORDS, "mcore", "--load", str(hf_models("qwen3")), "--allow_patched_attention"]) == 2
    assert "qwen3 has no form in Megatron-Core: there is no such attention" in capsys.readouterr().err


def test_only_some_models_of_a_family_may_need_it(monkeypatch: pytest.MonkeyPatch) -> None:
    assert FAMILY.support({}).kind == "stock"
    assert family(monkeypatch, support=needs_patch("why", has("odd"))).support({}).kind == "stock"
    assert qwen3.FAMILY.support({"odd": 1}).reason == "why"
    assert none("why", has("odd"))({"odd": 1}).kind == "none"
