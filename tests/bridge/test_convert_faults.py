"""A conversion that is killed or meets a full disk at any of its write points: the output is whole or absent, never half."""

from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from command_trials import assert_full_disks_left_nothing
from finebridge.finetune.cli import main
from finebridge.storage.hashing import file_entry

from .conftest import thinned, tiny

Trial = Callable[..., dict[str, Any]]
TARGETS = {
    "torch_dist": ["--to", "mcore", "--ckpt_format", "torch_dist"],
    "torch": ["--to", "mcore", "--ckpt_format", "torch", "--tp", "2"],
    "hf": ["--to", "hf", "--max_shard_size", "30KB"],
}
# Target, whether an older output is replaced, and how many points are tried (0: all).
FEW = [("torch_dist", True, 7), ("torch", False, 7), ("hf", True, 7)]
SWEEPS = thinned([*FEW, *((target, overwrite, 0) for target in TARGETS for overwrite in (False, True))], FEW)
LATE = 20  # points: with torch's format the device is asked now and then, how often depends on its speed


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By target what is converted: a Hugging Face folder with files beside its weights, and the same from Megatron."""
    folder = tmp_path_factory.mktemp("sources")
    tiny("qwen3_tied", num_hidden_layers=1).save_pretrained(folder / "hf")
    for name in ("tokenizer.json", "tokenizer_config.json", "modeling_x.py"):
        (folder / "hf" / name).write_text("{}")
    assert main(["convert", "--to", "mcore", "--load", str(folder / "hf"), "--save", str(folder / "mcore")]) == 0
    return {"torch_dist": folder / "hf", "torch": folder / "hf", "hf": folder / "mcore"}


@pytest.fixture(scope="module")
def server(trials: Callable[[str], Trial]) -> Trial:
    return trials("command_trials.py")


@pytest.fixture
def trial(
    server: Trial, sources: dict[str, Path], target: str, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Trial]:
    """``trial(at=, act=, overwrite=)``: one conversion under a fault, and one without; the source stays what it was."""
    home = tmp_path_factory.getbasetemp() / f"conversions to {target}"
    home.mkdir(exist_ok=True)
    command = ["convert", *TARGETS[target], "--load", str(sources[target])]
    words = {name: [*command, "--dtype", dtype, "--save"] for name, dtype in (("new", "bf16"), ("old", "fp16"))}
    before = entries(sources[target])
    yield partial(server, **words, home=str(home))
    assert entries(sources[target]) == before, "a conversion only reads its source"


def entries(folder: Path) -> dict[Path, Any]:
    return {path: file_entry(path) for path in sorted(folder.rglob("*")) if path.is_file()}


def points_of(trial: Trial, act: str, *, overwrite: bool) -> int:
    whole = trial(at=0, act=act, overwrite=overwrite)
    assert (whole["code"], whole["found"], whole["left"]) == (0, "new", []), whole
    assert whole["points"] > 40
    return whole["points"]


@pytest.mark.parametrize(("target", "overwrite", "tried"), SWEEPS)
def test_a_conversion_killed_anywhere(trial: Trial, overwrite: bool, tried: int) -> None:
    points = points_of(trial, "kill", overwrite=overwrite)
    places = [*range(1, points, points // tried if tried else 1), points, points + LATE]
    results = [trial(at=at, act="kill", overwrite=overwrite) for at in places]
    for result in results:
        assert result["code"] == -9 or (result["at"] > points - LATE and result["found"] == "new"), result
        assert result["found"] in (("old", "new", "absent") if overwrite else ("new", "absent")), result
        if result["found"] == "new" and not overwrite:
            assert result["again"] == 2, "it stands, and is never written over in silence"
        else:
            assert (result["again"], result["then"], result["then_left"]) == (0, "new", []), result
    found = {result["found"] for result in results}
    assert found >= ({"old", "new"} if overwrite else {"absent", "new"})


@pytest.mark.parametrize(("target", "overwrite", "tried"), SWEEPS)
def test_a_disk_full_from_any_point_on(trial: Trial, overwrite: bool, tried: int) -> None:
    points = points_of(trial, "enospc", overwrite=overwrite)
    places = range(1, points + 1, points // tried if tried else 1)
    results = [trial(at=at, act="enospc", overwrite=overwrite) for at in places]
    assert_full_disks_left_nothing(results, overwrite=overwrite)
