"""A rank that is dead, stopped or stuck is named by the others, and all end."""

import contextlib
import functools
import re
import socket
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.train.heartbeat import Heartbeat
from rank_faults import at_sample
from rank_runner import RankRunner

Models = Callable[[str], Path]


def flags(model: Path, data: Path, out: Path, **more: Any) -> list[object]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "max_steps": 40, "logging_steps": 1,
        "per_device_train_batch_size": 2, "disable_tqdm": "true", "heartbeat_timeout": 10, "save_strategy": "no",
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("local", ["2", "1"])  # both ranks on this machine, or one on each of two
def test_a_stranger_is_not_heard(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, local: str) -> None:
    monkeypatch.setenv("LOCAL_WORLD_SIZE", local)
    verdicts: list[str] = []

    first, second = (Heartbeat(rank, 2, 60, tmp_path) for rank in range(2))
    monkeypatch.setattr(first, "_end", verdicts.append)
    address = first.listen("localhost")
    first.start("the token")
    for lie in (b'{"token": "a guess", "rank": 1, "failed": "no"}\n', b"GET / HTTP/1.1\n\n", b"[1]\n", b"x" * 20000):
        with socket.create_connection(address) as stranger:
            stranger.settimeout(30)
            stranger.sendall(lie)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(1) == b"", "hung up"
    assert not verdicts
    second.enter("data", 4)
    second.connect(*address, "the token")
    second.peers[0].send(failed="OSError: yes")
    until = time.monotonic() + 30
    while not verdicts and time.monotonic() < until:
        time.sleep(0.02)
    (verdict,) = verdicts
    assert re.fullmatch(r"rank 1 \(host .*, process \d+\) failed at step 5, waiting for a batch: OSError: yes", verdict)


ZERO3 = {"deepspeed": "ds_zero3_no_offload"}


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "rank", "more", "verdict"),
    [
        ("kill", 1, {}, "has died; "),
        ("stop", 0, ZERO3, "has said nothing for "),
        ("block", 1, ZERO3, r"is stuck at step [23], waiting for a batch for "),
        ("raise", 1, {}, r"failed at step [23], waiting for a batch: OSError: the disk is gone"),
    ],
)
def test_the_rank_is_named_and_all_end(
    kind: str,
    rank: int,
    more: dict[str, Any],
    verdict: str,
    ranks: RankRunner,
    models: Models,
    train_file: Path,
    tmp_path: Path,
) -> None:
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path, **more)
    fault = functools.partial(at_sample, kind, rank, 5)
    done = ranks.run(argv, tmp_path / "log", ranks=2, limit=150, patience=5, before=fault)
    other = done.texts[1 - rank]
    assert done.codes[1 - rank] == 75, other
    assert f"error: rank {rank} (host" in other
    assert re.search(verdict, other)
    assert done.codes[rank] == {"kill": -9, "stop": -9, "block": 75, "raise": 1}[kind]
    assert ("OSError: the disk is gone" in done.texts[rank]) == (kind == "raise"), "its traceback"
    assert "Thread" in (tmp_path / "hang" / f"rank-{1 - rank}.txt").read_text()
