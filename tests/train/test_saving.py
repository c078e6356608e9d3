"""A save writes in the background: nothing is published before the device has it, and its errors reach the caller."""

import errno
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import tiny_model, train_tokenizer
from finebridge.storage.manifest import verify
from finebridge.train import checkpoint
from finebridge.train.checkpoint import SaveError
from finebridge.train.saving import SavingTrainer
from transformers import Trainer, TrainingArguments


@pytest.fixture
def trainer(tmp_path: Path) -> SavingTrainer:
    """One that has taken a step, so that AdamW has its states."""
    model = tiny_model("hunyuan_v1_dense", train_tokenizer("hunyuan_dense"))
    args = TrainingArguments(str(tmp_path / "out"), use_cpu=True, report_to="none")
    trainer = SavingTrainer(model, args)
    trainer.max_shard_size = 60_000
    trainer.create_optimizer_and_scheduler(1)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    trainer.optimizer.step()  # pyright: ignore[reportOptionalMemberAccess]
    trainer.state.global_step = 1
    (tmp_path / "out").mkdir(exist_ok=True)
    return trainer


def save(trainer: SavingTrainer) -> Path:
    trainer._save_checkpoint(trainer.model, None)  # pyright: ignore[reportArgumentType]
    return Path(str(trainer.args.output_dir)) / "checkpoint-1"


def test_every_file_is_on_the_device_before_it_is_published(
    trainer: SavingTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: dict[int, int] = {}  # inode: bytes
    honest, commit = os.fsync, checkpoint.commit

    def fsync(handle: int) -> None:
        honest(handle)
        synced[os.fstat(handle).st_ino] = os.fstat(handle).st_size

    def look(staging: Path, target: Path, *, written: Any, **more: Any) -> None:
        names = {"optimizer.pt", "rng_state.pth", "scheduler.pt", "training_args.bin", "model.safetensors.index.json"}
        assert names < written.keys()
        assert sum(name.endswith(".safetensors") for name in written) > 2
        states = [(staging / name).stat() for name in written]
        assert all(synced[state.st_ino] == state.st_size for state in states)
        commit(staging, target, written=written, **more)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(checkpoint, "commit", look)
    verify(save(trainer))


@pytest.mark.parametrize("broken", ["shard-00000.safetensors", "optimizer.pt", "model.safetensors.index.json"])
def test_an_error_in_the_background_is_the_saves(
    broken: str, trainer: SavingTrainer, monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = os.fsync

    def fsync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().name == broken:
            raise OSError(errno.EIO, "Input/output error")
        honest(handle)

    monkeypatch.setattr(os, "fsync", fsync)
    with pytest.raises(SaveError, match=rf"{broken}: rank 0 could not save: OSError: .*Input/output error"):
        save(trainer)
    assert not list(Path(str(trainer.args.output_dir)).iterdir())


def test_only_what_is_published_is_pushed(trainer: SavingTrainer, monkeypatch: pytest.MonkeyPatch) -> None:
    pushed: list[str] = []
    monkeypatch.setattr(Trainer, "_push_from_checkpoint", lambda _, folder: pushed.append(verify(Path(folder))["kind"]))
    trainer.args.push_to_hub = True
    save(trainer)
    assert pushed == ["checkpoint"]
