"""ZeRO without DeepSpeed's copies trains as DeepSpeed's own, and holds what pure bf16 needs and no more."""

from pathlib import Path

import pytest
from rank_runner import RankRunner

pytestmark = pytest.mark.distributed


def test_numbers_are_those_of_stock_deepspeed(ranks: RankRunner, tmp_path: Path) -> None:
    """Two micro-batches, bf16, a gradient larger than the bucket, two groups, the clip at work."""
    done = ranks.run([2, tmp_path], tmp_path / "log", ranks=2, entry="lean_zero_steps:quick").check()
    assert "alike: 2 True 2" in done.text
    assert "pure: 2 kahan" in done.text
    assert "spoilt: 2" in done.text


@pytest.mark.slow
def test_spoilt_gradients_under_zero_3(ranks: RankRunner, tmp_path: Path) -> None:
    done = ranks.run([3, tmp_path], tmp_path / "log", ranks=2, entry="lean_zero_steps:quick").check()
    assert "spoilt: 3" in done.text


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2])  # a division by 3 rounds otherwise before the sum than after it
def test_numbers_of_all_stages(world: int, ranks: RankRunner, tmp_path: Path) -> None:
    done = ranks.run(["1", "2", "3"], tmp_path / "log", ranks=world, entry="lean_zero_steps:alike", limit=400).check()
    assert done.text.count("alike: ") == 9


@pytest.mark.slow
@pytest.mark.parametrize("world", [1, 2, 3])
def test_pure_bf16_of_all_stages(world: int, ranks: RankRunner, tmp_path: Path) -> None:
    done = ranks.run([tmp_path], tmp_path / "log", ranks=world, entry="lean_zero_steps:pure", limit=400).check()
    assert done.text.count("pure: ") == 6
