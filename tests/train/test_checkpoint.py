"""Which checkpoints rotation keeps: by step, the best and the newest always."""

from pathlib import Path

import pytest
from finebridge.storage.publish import publish
from finebridge.train.checkpoint import rotate


def fill(folder: Path, *numbers: int) -> None:
    for number in numbers:
        with publish(folder / f"checkpoint-{number}", kind="checkpoint", made_from={}) as staging:
            (staging / "x").write_text(str(number))


@pytest.mark.parametrize(
    ("limit", "best", "left"),
    [
        (None, None, {2, 4, 6, 10}),
        (2, None, {6, 10}),
        (1, None, {10}),
        (2, "checkpoint-2", {2, 10}),
        (1, "checkpoint-2", {2, 10}),
        (2, "checkpoint-10", {6, 10}),
        (3, "elsewhere/checkpoint-4", {4, 6, 10}),
    ],
)
def test_rotation(tmp_path: Path, limit: int | None, best: str | None, left: set[int]) -> None:
    fill(tmp_path, 10, 2, 6, 4)  # written out of order: time says nothing
    rotate(tmp_path, limit, best)
    assert {path.name for path in tmp_path.iterdir()} == {f"checkpoint-{number}" for number in left}
