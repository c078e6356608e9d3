"""A rank that is dead, stopped or stuck is named by the others, and all end."""

import functools
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_faults import at_sample
from rank_runner import RankRunner

Models = Callable[[str], Path]


def flags(model: Path, data: Path, out: Path, **more: Any) -> list[object]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "max_steps": 40, "logging_steps": 1,
        "per_device_train_batch_size": 2, "disable_tqdm": "true", "heartbeat_timeout": 10, "save_strategy": "no",
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


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
    assert "Thread" in (tmp_path / "hang" / f"rank-{1 - rank}.txt").read_text()
