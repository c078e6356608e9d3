"""A merge that is killed or meets a full disk at any of its write points: the output is whole or absent, never half."""

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from command_trials import assert_full_disks_left_nothing
from finebridge.storage.hashing import file_entry
from safetensors.torch import save_file

from .conftest import MakeAdapter, arguments, save_base

Trial = Callable[..., dict[str, Any]]
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory, make_adapter: MakeAdapter) -> list[Path]:
    """A sharded base with files of all kinds beside it, and an adapter."""
    base = save_base(tmp_path_factory.mktemp("faults") / "base", shards="30KB")
    for name in ("tokenizer.json", "tokenizer_config.json", "modeling_x.py"):
        (base / name).write_text("{}")
    return [base, make_adapter(base)]


@pytest.fixture(scope="module")
def ask(trials: Callable[[str], Trial], sources: list[Path], tmp_path_factory: pytest.TempPathFactory) -> Trial:
    """``ask(at=, act=, overwrite=)``: one merge under a fault, and one after it without."""
    inputs = ["merge", "--base_model_path", sources[0], "--adapter_model_path", sources[1], "--max_shard_size", "20KB"]
    words = {
        name: [*map(str, inputs), "--save_dtype", dtype, "--output_path"]
        for name, dtype in (("new", "bf16"), ("old", "fp16"))
    }
    return partial(trials("command_trials.py"), **words, home=str(tmp_path_factory.mktemp("merges")))


@pytest.fixture
def trial(ask: Trial, sources: list[Path]) -> Iterator[Trial]:
    """``ask``; afterwards base and adapter must be what they were."""
    before = entries(sources)
    yield ask
    assert entries(sources) == before, "a merge only reads its sources"


def entries(folders: list[Path]) -> dict[Path, Any]:
    return {path: file_entry(path) for folder in folders for path in sorted(folder.rglob("*")) if path.is_file()}


def points_of(trial: Trial, act: str, *, overwrite: bool) -> int:
    whole = trial(at=0, act=act, overwrite=overwrite)
    assert (whole["code"], whole["found"], whole["left"]) == (0, "new", [])
    assert whole["points"] > 40
    return whole["points"]


SWEEPS = [(False, 7), (True, 11), pytest.param(False, 1, marks=slow), pytest.param(True, 1, marks=slow)]


@pytest.mark.parametrize(("overwrite", "stride"), SWEEPS)
def test_a_merge_killed_anywhere(trial: Trial, overwrite: bool, stride: int) -> None:
    points = points_of(trial, "kill", overwrite=overwrite)
    results = [trial(at=at, act="kill", overwrite=overwrite) for at in [*range(1, points, stride), points]]
    assert {result["code"] for result in results} == {-9}
    for result in results:
        assert result["found"] in (("old", "new", "absent") if overwrite else ("new", "absent")), result
        if result["found"] == "new" and not overwrite:
            assert result["again"] == 2, "it stands, and is never written over in silence"
        else:
            assert (result["again"], result["then"], result["then_left"]) == (0, "new", []), result
    found = {result["found"] for result in results}
    assert found >= ({"old", "new"} if overwrite else {"absent", "new"})


@pytest.mark.parametrize(("overwrite", "stride"), SWEEPS)
def test_a_disk_full_from_any_point_on(trial: Trial, overwrite: bool, stride: int) -> None:
    points = points_of(trial, "enospc", overwrite=overwrite)
    results = [trial(at=at, act="enospc", overwrite=overwrite) for at in range(1, points + 1, stride)]
    assert_full_disks_left_nothing(results, overwrite=overwrite)


SLOW = """
import signal, sys, time
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
from finebridge.finetune.cli import main
from finebridge.merge import stream
merged = stream._merged
stream._merged = lambda *block: time.sleep(2) or merged(*block)
sys.exit(main())
"""


@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGTERM])
def test_a_merge_that_is_stopped_leaves_nothing(tmp_path: Path, stop: signal.Signals) -> None:
    name = "model.layers.0.self_attn.q_proj"
    for folder in ("base", "adapter", "made"):
        (tmp_path / folder).mkdir()
    (tmp_path / "base" / "config.json").write_text('{"vocab_size": 7}')
    save_file(
        {f"{name}{n or ''}.weight": torch.ones(1024, 1024) for n in range(16)}, tmp_path / "base" / "model.safetensors"
    )
    factors = {"lora_A": torch.ones(1, 1024), "lora_B": torch.ones(1024, 1)}
    save_file(
        {f"base_model.model.{name}.{key}.weight": value for key, value in factors.items()},
        tmp_path / "adapter" / "adapter_model.safetensors",
    )
    settings = {"peft_type": "LORA", "r": 1, "lora_alpha": 1}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    words = arguments(tmp_path / "base", tmp_path / "adapter", tmp_path / "made" / "out", "--workers", "1")
    merging = subprocess.Popen([sys.executable, "-P", "-c", SLOW, "merge", *words], stderr=subprocess.PIPE, text=True)
    while not list((tmp_path / "made").glob(".*/*.safetensors")) and merging.poll() is None:
        time.sleep(0.01)
    merging.send_signal(stop)
    _, said = merging.communicate(timeout=60)
    assert (merging.returncode, said) == (130, "interrupted\n")
    assert list((tmp_path / "made").iterdir()) == []
