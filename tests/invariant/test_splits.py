"""However ranks, batch, accumulation and packing split one global batch: one gradient, through the real trainer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from rank_runner import RankRunner
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
RATE = 0.1


def update(folder: Path, base: Path) -> torch.Tensor:
    """What one step of plain gradient descent did to the weights: the gradient times the learning rate."""
    before, after = load_file(base / "model.safetensors"), load_file(folder / "checkpoint-1" / "model.safetensors")
    return torch.cat([(before[name] - after[name]).flatten().double() for name in sorted(before)])


@pytest.fixture(scope="module")
def step(
    ranks: RankRunner, models: Callable[[str], Path], train_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> Callable[..., tuple[float, torch.Tensor]]:
    """Takes one step and gives its loss and update."""
    prepared = tmp_path_factory.mktemp("prepared")

    def run(batch: int, accumulation: int = 1, world: int = 1, **more: Any) -> tuple[float, torch.Tensor]:
        import json

        folder, base = tmp_path_factory.mktemp("run"), models("hunyuan_v1_dense")
        values = {
            "model_name_or_path": base, "train_data_file": train_file, "output_dir": folder, "max_steps": 1,
            "learning_rate": RATE, "lr_scheduler_type": "constant", "per_device_train_batch_size": batch, "optim": "sgd",
            "gradient_accumulation_steps": accumulation, "max_grad_norm": 0, "disable_tqdm": "true", "logging_steps": 1,
            "prepared_data_dir": prepared,
        } | more  # fmt: skip
        argv = [word for name, value in values.items() for word in (f"--{name}", value)]
        ranks.run(argv, folder / "log", ranks=world).check()
        history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
        return history[0]["loss"], update(folder, base)

    return run


@pytest.mark.parametrize("how", ["token", "sequence"])
def test_one_gradient_for_every_split(how: str, step: Callable[..., tuple[float, torch.Tensor]]) -> None:
    loss, gradient = step(8, loss_normalization=how)
    assert gradient.norm() > 0
    for split in ((1, 8, 1), (1, 4, 2), (4, 1, 2)):
        other_loss, other = step(*split, loss_normalization=how)
        assert other_loss == pytest.approx(loss, rel=1e-6), split
        assert float((gradient - other).norm() / gradient.norm()) < 1e-5, split


def test_the_rules_are_three(step: Callable[..., tuple[float, torch.Tensor]]) -> None:
    steps = {how: step(1, 4, 2, loss_normalization=how) for how in ("token", "sequence", "batch")}
    assert steps["batch"][0] == pytest.approx(steps["sequence"][0], rel=1e-6), "each micro-batch is one sample here"
    assert float((steps["token"][1] - steps["sequence"][1]).norm() / steps["token"][1].norm()) > 0.01


def test_packs_have_the_gradient_of_their_samples(step: Callable[..., tuple[float, torch.Tensor]]) -> None:
    """All 24 samples in one step: as rows of their own, and in packs on two ranks with accumulation."""
    loss, gradient = step(24)
    for how in ("token", "sequence"):
        if how == "sequence":
            loss, gradient = step(24, loss_normalization=how)
        packed_loss, packed = step(1, 16, 2, packing="true", max_seq_length=128, loss_normalization=how)
        assert packed_loss == pytest.approx(loss, rel=1e-6)
        assert float((gradient - packed).norm() / gradient.norm()) < 1e-5
