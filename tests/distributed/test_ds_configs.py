"""Every shipped DeepSpeed setting trains for real, with the losses of the plain Trainer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.ds_configs.resolve import FOLDER, shipped
from rank_runner import RankRunner

pytestmark = pytest.mark.distributed
TOLERANCE = 5e-6
STEPS = 3


def flags(model: Path, data: Path, out: Path, batch: int) -> list[object]:
    return [
        "--model_name_or_path", model, "--train_data_file", data, "--output_dir", out, "--max_steps", STEPS,
        "--logging_steps", 1, "--learning_rate", 1e-3, "--lr_scheduler_type", "constant", "--disable_tqdm", "true",
        "--per_device_train_batch_size", batch, "--prepared_data_dir", data.parent / "prepared",
    ]  # fmt: skip


@pytest.fixture(scope="module")
def plain_losses(
    ranks: RankRunner, models: Callable[[str], Path], train_file: Path, tmp_path_factory: pytest.TempPathFactory
) -> list[float]:
    out = tmp_path_factory.mktemp("plain")
    ranks.run(flags(models("hunyuan_v1_dense"), train_file, out, 4), out / "log").check()
    state = json.loads((out / "trainer_state.json").read_text())
    losses = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert len(losses) == STEPS
    assert losses[-1] < losses[0]
    return losses


def partitioning(name: str, folder: Path) -> Path:
    """The shipped settings with the persistence threshold at 0: a tiny model would never be partitioned otherwise."""
    settings: dict[str, Any] = json.loads((FOLDER / f"{name}.json").read_text())
    if settings["zero_optimization"]["stage"] == 3:
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    path = folder / f"{name}.json"
    path.write_text(json.dumps(settings))
    return path


@pytest.mark.parametrize("world", [1, 2])
@pytest.mark.parametrize("name", shipped())
def test_losses_equal_the_plain_trainer(
    name: str, world: int, ranks: RankRunner, models: Callable[[str], Path], train_file: Path, tmp_path: Path,
    plain_losses: list[float], history: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path, 4 // world)
    # DeepSpeed's CPU Adam is compiled once a machine; that is the one slow step.
    ranks.run([*argv, "--deepspeed", partitioning(name, tmp_path)], tmp_path / "log", ranks=world, limit=600).check()
    losses = [entry["loss"] for entry in history(tmp_path)]
    assert losses == pytest.approx(plain_losses, abs=TOLERANCE)


def test_two_ranks_without_deepspeed_are_one_run(
    ranks: RankRunner, models: Callable[[str], Path], train_file: Path, tmp_path: Path, plain_losses: list[float],
    history: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    ranks.run(flags(models("hunyuan_v1_dense"), train_file, tmp_path, 2), tmp_path / "log", ranks=2).check()
    assert [entry["loss"] for entry in history(tmp_path)] == pytest.approx(plain_losses, abs=TOLERANCE)


def test_accumulation_equals_the_large_batch(
    ranks: RankRunner, models: Callable[[str], Path], train_file: Path, tmp_path: Path, plain_losses: list[float],
    history: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    argv = [*flags(models("hunyuan_v1_dense"), train_file, tmp_path, 1), "--gradient_accumulation_steps", 2]
    argv += ["--deepspeed", partitioning("ds_zero3_no_offload", tmp_path)]
    ranks.run(argv, tmp_path / "log", ranks=2).check()
    assert [entry["loss"] for entry in history(tmp_path)] == pytest.approx(plain_losses, abs=TOLERANCE)
