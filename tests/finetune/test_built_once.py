"""Prepared data and kept conversions: whole or absent however their builder ends, built by one of many, and for a reason."""

import os
import random
import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from finebridge.bridge import kept
from finebridge.data_tools import preprocess
from finebridge.finetune.cli import main
from rank_runner import RankRunner

Models = Callable[[str], Path]
Trial = Callable[..., dict[str, Any]]
TRIALS = int(os.environ.get("FINEBRIDGE_TRIALS", "50"))
WHAT = ("data", "weights")
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def commands(models: Models, train_file: Path) -> dict[str, list[str]]:
    """What is built once; the folder for it is the last word."""
    model = models("qwen3")
    data = ["data", "build", train_file, "--tokenizer_name_or_path", model, "--output_dir"]
    weights = ["convert", "--enable-hf2mg-convert", "--load", model, "--tp", 2, "--mg-cache-dir"]
    return {"data": list(map(str, data)), "weights": list(map(str, weights))}


@pytest.fixture(scope="module")
def server(trials: Callable[[str], Trial]) -> Trial:
    return trials("command_trials.py")


@pytest.fixture
def trial(
    server: Trial, commands: dict[str, list[str]], what: str, tmp_path_factory: pytest.TempPathFactory
) -> Trial:  # fmt: skip
    """``trial(at=, act=, overwrite=)``: the command under a fault, and then without; ``overwrite``: another one stands there."""
    home = tmp_path_factory.getbasetemp() / f"built once: {what}"
    home.mkdir(exist_ok=True)
    new = commands[what]
    old = [*new[:-1], "--dtype", "bf16", new[-1]] if what == "weights" else new
    return partial(server, new=new, old=old, home=str(home), kept=True)


def whole(trial: Trial, *, overwrite: bool) -> dict[str, Any]:
    done = trial(at=0, act="kill", overwrite=overwrite)
    assert (done["code"], done["found"], done["again"], done["then"]) == (0, "new", 0, "new"), done
    assert done["left"] == done["then_left"]
    assert not [name for name in done["left"] if "tmp" in name or "lock" in name]
    return done


# What is built, whether another one stands there, and how many writes are tried (0: all).
SWEEPS = [("data", False, 6), ("weights", True, 6)]
SWEEPS += [
    pytest.param(what, over, 0, marks=slow) for what, over in (("data", False), ("weights", False), ("weights", True))
]
LATE = 20  # writes: with torch's format the device is asked now and then, how often depends on its speed


@pytest.mark.parametrize(("what", "overwrite", "tried"), SWEEPS)
def test_a_builder_killed_at_any_write(trial: Trial, overwrite: bool, tried: int) -> None:
    clean = whole(trial, overwrite=overwrite)
    points = clean["points"]
    assert points > 40
    places = [*range(1, points, points // tried if tried else 1), points]
    results = [trial(at=at, act="kill", overwrite=overwrite) for at in places]
    for result in results:
        assert result["code"] == -9 or (result["at"] > points - LATE and result["found"] == "new"), result
        assert result["found"] in (("old", "new", "absent") if overwrite else ("new", "absent")), result
        assert (result["again"], result["then"], result["then_left"]) == (0, "new", clean["left"]), result
    assert {result["found"] for result in results} >= ({"old", "new"} if overwrite else {"absent", "new"})


@slow
@pytest.mark.parametrize("what", WHAT)
def test_a_builder_killed_at_any_time(trial: Trial) -> None:
    clean = whole(trial, overwrite=False)
    chance = random.Random(8)
    moments = [chance.randrange(int(1000 * clean["seconds"]) + 1) for _ in range(TRIALS)]
    results = [trial(at=at, act="kill after", overwrite=False) for at in moments]
    for result in results:
        assert result["found"] in ("new", "absent"), result
        assert (result["again"], result["then"], result["then_left"]) == (0, "new", clean["left"]), result
    assert sum(result["code"] == -9 for result in results) > TRIALS // 2


def outcome(text: str) -> list[str]:
    """What a command says that it did."""
    words = {"prepared": "built", "wrote": "built", "reused": "reused"}
    return [words[word] for word in re.findall(r"(?:^|; )(prepared|wrote|reused) /", text, re.MULTILINE)]


@pytest.mark.parametrize("what", [pytest.param("data", marks=slow), "weights"])
def test_eight_at_once_make_one(what: str, commands: dict[str, list[str]], ranks: RankRunner, tmp_path: Path) -> None:
    words = [*commands[what], tmp_path / "out"]
    done = ranks.run(words, tmp_path / "logs", ranks=8, entry="finebridge.finetune.cli:main").check()
    said = [word for text in done.texts for word in outcome(text)]
    assert Counter(said) == {"built": 1, "reused": 7}


CHANGES: dict[str, tuple[str, str, str]] = {  # what is changed, and whether data and weights are built again
    "nothing": ("", "reused", "reused"),
    "a byte of the data": ("data.jsonl", "built", "reused"),
    "a byte of the weights": ("model/model.safetensors", "reused", "built"),
    "the model's configuration": ("model/config.json", "reused", "built"),
    "the tokenizer, which goes with the weights": ("model/tokenizer_config.json", "built", "built"),
    "a file that is read by nobody": ("model/README.md", "reused", "reused"),
    "how the data is read": ("data --think_mode fast", "built", "reused"),
    "how long samples may be": ("data --max_seq_length 64", "reused", "reused"),
    "tensor parallel size": ("weights --tp 2", "reused", "built"),
    "pipeline parallel size": ("weights --pp 2", "reused", "built"),
    "expert parallel size": ("weights --ep 2", "reused", "built"),
    "dtype": ("weights --dtype bf16", "reused", "built"),
    "threads": ("weights --workers 1", "reused", "reused"),
}


FEW = ["nothing", "a byte of the data", "a byte of the weights", "pipeline parallel size"]


@pytest.mark.parametrize("names", [FEW, pytest.param(list(CHANGES), marks=slow)], ids=["few", "all"])
def test_what_is_built_again_and_what_is_not(
    names: list[str], models: Models, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Exactly what depends on a change. When it is taken back, what still stands is found again."""
    shutil.copytree(models("qwen3_moe"), tmp_path / "model")
    shutil.copyfile(train_file, tmp_path / "data.jsonl")
    words = {
        "data": ["data", "build", tmp_path / "data.jsonl", "--tokenizer_name_or_path", tmp_path / "model"],
        "weights": ["convert", "--enable-hf2mg-convert", "--load", tmp_path / "model"],
    }
    words["data"] += ["--output_dir", tmp_path / "prepared"]

    def outcomes(flags: dict[str, list[str]]) -> list[str]:
        said: list[str] = []
        for what in WHAT:
            assert main([*map(str, words[what]), *flags.get(what, [])]) == 0
            said += outcome(capsys.readouterr().out)
        return said

    assert outcomes({}) == ["built", "built"]
    for name in names:
        change, *wanted = CHANGES[name]
        flags, before = {}, None
        if change.startswith(WHAT) and " " in change:
            what, *more = change.split()
            flags = {what: more}
        elif change:
            file = tmp_path / change
            before = file.read_bytes() if file.exists() else b"?"
            file.write_bytes(before + b" " if file.suffix != ".safetensors" else before[:-1] + bytes([before[-1] ^ 1]))
        assert outcomes(flags) == wanted, name
        if before:
            (tmp_path / change).write_bytes(before)
        back = "built" if wanted[1] == "built" and "parallel" not in name else "reused"
        assert outcomes({}) == ["reused", back], f"{name}, taken back; one conversion lies at one place"


@pytest.mark.parametrize(
    ("what", "module", "name"), [("data", preprocess, "_build"), ("weights", kept, "write_target")]
)
def test_a_source_that_changes_while_it_is_read(
    what: str, module: ModuleType, name: str, models: Models, train_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """What was made of it has another key than it should have, and is not kept."""
    model, data = shutil.copytree(models("qwen3"), tmp_path / "model"), tmp_path / "data.jsonl"
    shutil.copyfile(train_file, data)
    words = {
        "data": ["data", "build", data, "--tokenizer_name_or_path", model, "--output_dir", tmp_path / "made"],
        "weights": ["convert", "--enable-hf2mg-convert", "--load", model, "--mg-cache-dir", tmp_path / "made"],
    }[what]
    source = data if what == "data" else model / "config.json"
    honest = getattr(module, name)
    with monkeypatch.context() as meanwhile:
        meanwhile.setattr(module, name, lambda *args: (honest(*args), source.write_text(source.read_text() + " "))[0])
        assert main(list(map(str, words))) == 2
    assert "written to while" in capsys.readouterr().err
    assert not list(tmp_path.glob("made/**/manifest.json"))
    assert main(list(map(str, words))) == 0
    assert outcome(capsys.readouterr().out) == ["built"]
