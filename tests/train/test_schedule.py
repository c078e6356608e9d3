"""The learning rate ends at --min_lr, by transformers' own schedulers."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.schedule import decay_steps, schedule
from rank_runner import RankRunner
from transformers import get_scheduler

Models = Callable[[str], Path]
PEAK, FLOOR, STEPS, WARMUP = 1e-5, 1e-6, 20, 4


def rates(name: str, floor: float, **kwargs: Any) -> list[float]:
    """The learning rate of every step, and after the last."""
    target, more = schedule(name, floor, PEAK)
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=PEAK)
    scheduler = get_scheduler(target, optimizer, WARMUP, STEPS, scheduler_specific_kwargs={**more, **kwargs})
    seen = [optimizer.param_groups[0]["lr"]]
    for _ in range(STEPS):
        optimizer.step()
        scheduler.step()
        seen.append(optimizer.param_groups[0]["lr"])
    return seen


@pytest.mark.parametrize("name", ["cosine", "cosine_with_min_lr", "linear", "polynomial"])
def test_the_last_rate_is_the_floor(name: str) -> None:
    seen = rates(name, FLOOR)
    assert seen[-1] == pytest.approx(FLOOR, rel=1e-6)
    assert max(seen) == pytest.approx(PEAK)
    assert seen[WARMUP:] == sorted(seen[WARMUP:], reverse=True)


@pytest.mark.parametrize("floor", [0.0, FLOOR])
def test_wsd_stays_then_falls_to_the_floor(floor: float) -> None:
    chosen = decay_steps("warmup_stable_decay", None, STEPS, WARMUP)
    assert chosen == 2
    seen = rates("warmup_stable_decay", floor, num_decay_steps=chosen)
    assert seen[WARMUP : STEPS - 1] == [PEAK] * (STEPS - 1 - WARMUP)
    assert seen[-1] == pytest.approx(floor, rel=1e-6)


def test_decay_steps_of_the_user_stay() -> None:
    assert decay_steps("warmup_stable_decay", {"num_decay_steps": 8}, STEPS, WARMUP) is None
    assert decay_steps("cosine", None, STEPS, WARMUP) is None
    with pytest.raises(ArgumentsError, match="4 steps of warm-up and 18 of decay are more than the run's 20"):
        decay_steps("warmup_stable_decay", {"num_decay_steps": 18}, STEPS, WARMUP)


@pytest.mark.parametrize(
    ("name", "floor", "message"),
    [
        ("cosine", 2e-5, "must lie below --learning_rate 1e-05"),
        ("constant", FLOOR, "constant never falls below --learning_rate 1e-05, so a floor has no effect"),
        ("constant_with_warmup", FLOOR, "constant_with_warmup never falls"),
        ("inverse_sqrt", FLOOR, "inverse_sqrt has no floor; those that have one: cosine_with_min_lr"),
    ],
)
def test_floors_that_make_no_sense(name: str, floor: float, message: str) -> None:
    with pytest.raises(ArgumentsError, match=message):
        schedule(name, floor, PEAK)


def test_wsd_through_the_command(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    """The floor is the last rate, the steps of decay are told, and too many are refused in one message."""
    words = [
        "--model_name_or_path", models("hunyuan_v1_dense"), "--train_data_file", train_file, "--max_steps", 4,
        "--per_device_train_batch_size", 2, "--learning_rate", 1e-3, "--min_lr", 1e-4, "--lr_scheduler_type",
        "warmup_stable_decay", "--disable_tqdm", "true", "--output_dir", tmp_path,
    ]  # fmt: skip
    more = ["--lr_scheduler_kwargs", '{"num_decay_steps": 9}']
    done = ranks.run([*words, "+++", *words, *more], tmp_path / "log", entry="sft_many:main")
    assert done.codes == [2]
    assert "run 0 ended with 0" in done.text
    assert "schedule: the learning rate falls in the last 1 of 4 steps (chosen for you)" in done.text
    scheduler = torch.load(tmp_path / "checkpoint-4" / "scheduler.pt", weights_only=True)
    assert all(rate == pytest.approx(1e-4) for rate in scheduler["_last_lr"])
    assert (
        "error: --lr_scheduler_type warmup_stable_decay: 0 steps of warm-up and 9 of decay are more than" in done.text
    )
