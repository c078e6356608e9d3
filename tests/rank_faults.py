"""Faults for ranks of the real trainer: at its n-th sample a rank is killed, stopped, or waits for ever.

As a module it is such a rank: ``python -m rank_faults KIND RANK SAMPLE FLAGS`` is ``python -m finebridge.train.sft FLAGS``.
"""

import os
import runpy
import signal
import sys
import time
from typing import Any


def at_sample(kind: str, rank: int, number: int) -> None:
    """Let ``kind`` (kill, stop, block, skip, raise, launcher) happen to ``rank`` at sample ``number`` of the run."""
    from finebridge.data_tools.dataset import PreparedDataset

    if int(os.environ["RANK"]) != rank:
        return
    read = PreparedDataset.__getitem__
    seen = 0

    def faulty(self: PreparedDataset, index: int) -> Any:
        nonlocal seen
        seen += 1
        if seen == number:
            _happen(kind)
        return read(self, index)

    PreparedDataset.__getitem__ = faulty


def _happen(kind: str) -> None:
    from torch.utils.data import get_worker_info

    me = os.getppid() if get_worker_info() else os.getpid()
    if kind == "kill":
        os.kill(me, signal.SIGKILL)
    elif kind == "stop":
        os.kill(me, signal.SIGSTOP)
    elif kind == "block":
        time.sleep(3600)
    elif kind == "skip":
        _skip_a_batch()
    elif kind == "raise":
        raise OSError("the disk is gone")
    elif kind == "launcher":
        os.kill(int(os.environ["FINEBRIDGE_LAUNCHER"]), signal.SIGKILL)
    elif kind == "terminate":
        from finebridge.train.stopping import _Request

        os.kill(int(os.environ["FINEBRIDGE_LAUNCHER"]), signal.SIGTERM)
        while _Request.at is None:  # until it is passed on to this rank
            time.sleep(0.02)


def _skip_a_batch() -> None:
    """This rank does not train on its next batch; the others wait for it in their collectives, or it in theirs."""
    import torch
    from finebridge.train.trainer import FinetuneTrainer

    train = FinetuneTrainer.training_step

    def skip(self: FinetuneTrainer, *_: Any, **__: Any) -> Any:
        FinetuneTrainer.training_step = train
        self._step.losses.append(torch.zeros(()))
        return self._step.losses[-1]

    FinetuneTrainer.training_step = skip


if __name__ == "__main__":
    _, KIND, RANK, SAMPLE, *sys.argv[1:] = sys.argv
    at_sample(KIND, int(RANK), int(SAMPLE))
    runpy.run_module("finebridge.train.sft", run_name="__main__")
