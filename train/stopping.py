"""SIGTERM: save a checkpoint at the end of this step, on all ranks alike, and end with exit code 143.

Schedulers (Slurm, Kubernetes) send it some time before they kill. It may reach all ranks or one; after each step they agree
by one number, over gloo, so that no GPU waits for it.
"""

import os
import signal
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .runtime import reduce, several_ranks

EXIT_STOPPED = 128 + signal.SIGTERM
_SAME_REQUEST = 5.0  # seconds; a scheduler and a launcher may both send it


class StoppedError(BaseException):
    """The run was asked to stop and has stopped; the message says where, and how to go on. Nothing may swallow it."""


class EvaluationCut(Exception):  # noqa: N818 - no error: the evaluation is left for a save
    """All ranks leave the evaluation because the run is asked to stop."""


class _Request:
    """What the signal handler knows."""

    at: float | None = None
    training = False


def listen() -> None:
    """Handle SIGTERM from now on; until training begins there is nothing to save, and it raises StoppedError."""
    signal.signal(signal.SIGTERM, _asked)


def _asked(_signal: int, _frame: object) -> None:
    now = time.monotonic()
    if _Request.at is not None and now - _Request.at > _SAME_REQUEST:
        os._exit(EXIT_STOPPED)
    _Request.at = _Request.at or now
    if not _Request.training:
        raise StoppedError("stopped by SIGTERM before the first step; nothing was trained, nothing is saved")


def stopped(step: int, saved: str | None) -> StoppedError:
    """What is told of a run that stops after ``step``."""
    where = f"stopped by SIGTERM at step {step}"
    if saved is None:
        return StoppedError(f"{where}; nothing is saved" + (" (--save_strategy no)" if step else ""))
    return StoppedError(f"{where}, checkpoint {saved} saved; go on with --resume_from_checkpoint")


class StopWhenAsked(TrainerCallback):
    """Ends training after a step with a checkpoint when any rank was asked to. Raises StoppedError, EvaluationCut.

    An evaluation that is due at that step is left out. A run that has done its last step ends as always.
    """

    def __init__(self) -> None:
        self._group: Any = None
        self._stops = False

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """From here on there is a next step to wait for; Ctrl-C ends the process at once."""
        if several_ranks() and dist.get_backend() != "gloo":
            self._group = dist.new_group(backend="gloo")
        _Request.training = True
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a save when this is the last step."""
        if not self._agreed() or state.global_step >= state.max_steps:
            return
        if args.save_strategy == SaveStrategy.NO:
            raise stopped(state.global_step, None)
        self._stops = control.should_save = True
        control.should_evaluate = False

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:  # noqa: ARG002
        """The checkpoint stands."""
        if self._stops:
            raise stopped(state.global_step, f"{args.output_dir}/checkpoint-{state.global_step}")

    def on_prediction_step(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """An evaluation may take long: leave it between two batches."""
        if self._agreed():
            raise EvaluationCut

    def _agreed(self) -> bool:
        """Whether any rank was asked to stop. Every rank must call it at the same place."""
        flag = torch.tensor(int(_Request.at is not None), dtype=torch.int32)
        reduce(flag, "MAX", self._group)
        return bool(flag)
