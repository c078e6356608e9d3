"""What stops a run within the step it happens in, with a message that names the step and the samples."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.indexed import IndexedReader
from finebridge.storage.manifest import describe, dump
from finebridge.train.guards import DivergedError, StepGuard
from rank_runner import RankRunner
from safetensors.torch import load_file, save_file

Models = Callable[[str], Path]


def guard(policy: Any = "warn", *, fp16: bool = False) -> tuple[StepGuard, list[str]]:
    said: list[str] = []
    return StepGuard(policy, 3.0, said.append, fp16=fp16), said


@pytest.mark.parametrize(
    ("loss", "norm"), [(float("nan"), 1.0), (float("inf"), 1.0), (1.0, float("nan")), (1.0, float("inf"))]
)
def test_numbers_that_are_none_stop_the_run(loss: float, norm: float) -> None:
    with pytest.raises(DivergedError, match=r"step 7: (loss|grad_norm) is (nan|inf) \(samples of rank 0: a.jsonl:3\)"):
        guard()[0].check(7, loss, norm, lambda: "samples of rank 0: a.jsonl:3")


def test_loss_scaling_may_see_an_infinite_gradient() -> None:
    checked, _ = guard(fp16=True)
    checked.check(1, 2.0, float("inf"), str)
    with pytest.raises(DivergedError, match="loss is nan"):
        checked.check(2, float("nan"), float("inf"), str)


def test_a_gradient_of_zero_stops_the_run() -> None:
    """Activations of 1e30 come out of a norm as zeros, and the loss looks like that of a new model for ever."""
    with pytest.raises(DivergedError, match="step 3: the gradient is exactly 0 though the loss is 5.6000"):
        guard()[0].check(3, 5.6, 0.0, str)
    guard(fp16=True)[0].check(3, 5.6, 0.0, str)


def test_a_loss_that_stays_zero_stops_the_run() -> None:
    checked, _ = guard()
    for step in range(1, 10):
        checked.check(step, 0.0, 1.0, str)
    checked.check(10, 1e-30, 1.0, str)
    for step in range(11, 20):
        checked.check(step, 0.0, 1.0, str)
    with pytest.raises(DivergedError, match="step 20: the loss was exactly 0 for 10 steps"):
        checked.check(20, 0.0, 1.0, str)


def test_spikes_by_policy() -> None:
    for policy in ("warn", "stop", "off"):
        checked, said = guard(policy)
        for step in range(20):
            checked.check(step, 1.0 + step / 100, None, str)
        checked.check(20, 3.0, None, str)
        if policy == "stop":
            with pytest.raises(
                DivergedError, match="step 21: the loss 4.0000 is over 3 times the median of the last 21 steps"
            ):
                checked.check(21, 4.0, None, lambda: "x")
        else:
            checked.check(21, 4.0, None, lambda: "x")
            assert [line.startswith("warning: step 21: the loss 4.0000") for line in said] == [True] * (
                policy == "warn"
            )


def test_the_first_steps_are_no_spikes() -> None:
    checked, said = guard("stop")
    for step, loss in enumerate([1.0] * 19 + [9.0]):
        checked.check(step, loss, None, str)
    assert not said


def flags(model: Path, data: object, out: Path, **more: Any) -> list[object]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "max_steps": 6, "logging_steps": 50,
        "per_device_train_batch_size": 2, "disable_tqdm": "true", "save_steps": 1,
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def test_two_ranks_stop_at_the_same_step(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    """Activations of 1e30 stop the first step, a rate of 1e30 the second, though nothing is logged before step 50."""
    broken = tmp_path / "broken"
    shutil.copytree(models("hunyuan_v1_dense"), broken)
    tensors = load_file(broken / "model.safetensors")
    for layer in (0, 1):
        tensors[f"model.layers.{layer}.mlp.down_proj.weight"][:] = 1e30
    tensors["model.layers.1.mlp.gate_proj.weight"] *= 1e10
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    for base, step, seen, more in (
        (broken, 1, "the gradient is exactly 0", {}),
        (models("hunyuan_v1_dense"), 2, "loss is nan", {"learning_rate": 1e30, "lr_scheduler_type": "constant"}),
    ):
        out = tmp_path / f"step {step}"
        done = ranks.run(flags(base, train_file, out, **{"save_steps": 2, **more}), out / "log", ranks=2)
        assert done.codes == [1, 1], done.text
        assert f"error: step {step}: {seen}" in done.text
        assert f"samples of rank 0: {train_file}:" in done.text
        assert f"rank 1: {train_file}:" in done.text
        assert not list(out.glob("*checkpoint-*"))


@pytest.mark.parametrize(
    ("spoil", "named", "workers"),
    [
        ("token", "token 100000 is not in the model's vocabulary", 0),
        ("loss", "no token of this sample carries loss", 2),
    ],
)
def test_a_sample_that_cannot_be_trained_on_stops_the_run(
    spoil: str, named: str, workers: int, ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    """Prepared data that was damaged after it was made: one sample has an id out of the vocabulary or no loss."""
    base = models("hunyuan_v1_dense")
    ranks.run(flags(base, train_file, tmp_path / "a", max_steps=1, save_strategy="no"), tmp_path / "log").check()
    (folder,) = (path for path in (tmp_path / "a" / "prepared_data").iterdir() if path.is_dir())
    name = "text_document" if spoil == "token" else "spans_document"
    reader = IndexedReader(folder / name)
    values = np.fromfile(folder / f"{name}.bin", dtype=reader.dtype)
    values[: int(reader.lengths[0])] = 100_000 if spoil == "token" else 0
    if spoil == "loss":
        values[:2] = (0, 1)  # the first token alone, which nothing predicts
    values.tofile(folder / f"{name}.bin")
    manifest = json.loads((folder / "manifest.json").read_text())
    new = describe(folder, manifest["kind"], manifest["made_from"])
    (folder / "manifest.json").write_text(dump(new))
    done = ranks.run(
        flags(base, folder, tmp_path / "b", save_strategy="no", max_steps=24, dataloader_num_workers=workers),
        tmp_path / "log2",
    )
    assert done.codes == [2]
    assert f"error: {train_file}:1: {named}" in done.text
    assert "Traceback" not in done.text
