"""Faults of ranks under the real launcher: named, ended, nothing left. ``FINEBRIDGE_TRIALS=50`` repeats each."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

TRIALS = int(os.environ.get("FINEBRIDGE_TRIALS", "1"))
ROOT = Path(__file__).parents[1]


def left(launcher: int) -> list[int]:
    """Processes of a run: those that carry its launcher in their environment."""
    mark = f"FINEBRIDGE_LAUNCHER={launcher}".encode()
    found: list[int] = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if mark in (folder / "environ").read_bytes().split(b"\0"):
                found.append(int(folder.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("trial", range(TRIALS))
@pytest.mark.parametrize("settings", ["", "ds_zero3_no_offload"])
@pytest.mark.parametrize(
    ("kind", "rank", "codes", "verdict"),
    [
        ("kill", 0, {137}, "rank 0 .* has died|rank 0 was ended by SIGKILL"),
        ("kill", 1, {137}, "rank 1 .* has died|rank 1 was ended by SIGKILL"),
        ("stop", 0, {75}, "rank 0 .* has said nothing for"),
        ("stop", 1, {75}, "rank 1 .* has said nothing for"),
        ("block", 0, {75}, "rank 0 .* is stuck at step [0-9]+, waiting for a batch"),
        ("block", 1, {75}, "rank 1 .* is stuck at step [0-9]+, waiting for a batch"),
        ("launcher", 1, {-9}, ""),
    ],
)
def test_the_run_ends_and_nothing_is_left(
    kind: str,
    rank: int,
    codes: set[int],
    verdict: str,
    settings: str,
    trial: int,
    models: Callable[[str], Path],
    train_file: Path,
    tmp_path: Path,
) -> None:
    argv = [
        "--model_name_or_path", models("hunyuan_v1_dense"), "--train_data_file", train_file, "--output_dir", tmp_path / "out",
        "--max_steps", 1000, "--per_device_train_batch_size", 2, "--save_strategy", "no", "--heartbeat_timeout", 15,
        "--dataloader_num_workers", (trial + rank) % 2, *(["--deepspeed", settings] if settings else []),
    ]  # fmt: skip
    words = [kind, str(rank), "5", *map(str, argv)]
    code = f"from finebridge.finetune.launch import run_ranks; raise SystemExit(run_ranks('rank_faults', {words!r}, 2))"
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    with (tmp_path / "said.txt").open("w") as said:
        run = subprocess.Popen(
            [sys.executable, "-c", code], env={**os.environ, "PYTHONPATH": path}, stdout=said, stderr=said
        )
        try:
            assert run.wait(300) in codes, (tmp_path / "said.txt").read_text()
        finally:
            run.kill()
    until = time.monotonic() + 5
    while (still := left(run.pid)) and time.monotonic() < until:
        time.sleep(0.1)
    assert not still
    assert re.search(verdict, (tmp_path / "said.txt").read_text())
