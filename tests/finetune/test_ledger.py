"""Which stages stand: the same inputs and the same artifact, wherever the folder lies."""

import shutil
from pathlib import Path
from typing import Any

from finebridge.finetune.ledger import NAME, Ledger
from finebridge.storage.publish import publish

INPUTS: dict[str, Any] = {"data": "abc", "learning_rate": 1e-5, "deepspeed": {"stage": 2}, "none": None}


def made(folder: Path, text: str = "x") -> Path:
    with publish(folder / "hf-3", kind="model", made_from={}, replace=True) as staging:
        (staging / "weights").write_text(text)
    return folder / "hf-3"


def test_a_stage_stands_for_its_inputs_alone(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, tmp_path / "memory")
    assert ledger.look("model", INPUTS).artifact is None
    assert ledger.inputs("model") == {}
    ledger.begin("model", INPUTS)
    assert ledger.inputs("model") == INPUTS
    assert ledger.look("model", INPUTS) == (standing := ledger.look("model", INPUTS))
    assert (standing.artifact, standing.begun) == (None, True)
    ledger.done("model", INPUTS, made(tmp_path))
    assert ledger.look("model", INPUTS).artifact == tmp_path / "hf-3"
    assert ledger.look("export", INPUTS).artifact is None
    other = ledger.look("model", {**INPUTS, "data": "abd", "seed": 1})
    assert (other.artifact, other.begun) == (None, False)
    assert other.why == "data was abc, is abd; seed was not given, is 1"
    ledger.begin("model", {**INPUTS, "data": "abd"})
    assert not ledger.look("model", INPUTS).begun, "what was made before stands no more"


def test_a_changed_artifact_does_not_stand(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, tmp_path / "memory")
    ledger.done("model", INPUTS, made(tmp_path))
    made(tmp_path, "y")
    assert ledger.look("model", INPUTS).artifact is None, "whole, but another one"
    ledger.done("model", INPUTS, made(tmp_path))
    (tmp_path / "hf-3" / "weights").write_text("z")
    standing = ledger.look("model", INPUTS)
    assert (standing.artifact, standing.begun) == (None, True)
    assert "weights" in standing.why
    shutil.rmtree(tmp_path / "hf-3")
    assert ledger.look("model", INPUTS).artifact is None


def test_the_folder_may_be_moved(tmp_path: Path) -> None:
    Ledger(tmp_path / "a", tmp_path / "memory").done("model", INPUTS, made(tmp_path / "a"))
    (tmp_path / "a").rename(tmp_path / "b")
    assert Ledger(tmp_path / "b", tmp_path / "memory").look("model", INPUTS).artifact == tmp_path / "b" / "hf-3"


def test_files_that_are_no_published_folder(tmp_path: Path) -> None:
    ledger, files = Ledger(tmp_path / "out", tmp_path / "memory"), [tmp_path / "x_a.bin", tmp_path / "x_b.bin"]
    for file in files:
        file.write_text("tokens")
    ledger.done("tokens", INPUTS, tmp_path / "x", files)
    assert ledger.look("tokens", INPUTS).artifact == tmp_path / "x"
    files[1].write_text("tokenz")
    assert ledger.look("tokens", INPUTS).artifact is None
    files[1].unlink()
    assert ledger.look("tokens", INPUTS).artifact is None


def test_a_damaged_ledger_knows_nothing(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path, tmp_path / "memory")
    for text in ("", "{", "[]", '{"model": 3}', '{"model": {"inputs": {}}}'):
        (tmp_path / NAME).write_text(text)
        assert not ledger.look("model", INPUTS).begun, text
    ledger.done("model", INPUTS, made(tmp_path))
    assert ledger.artifacts() == [tmp_path / "hf-3"]
