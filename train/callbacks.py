"""What watches a run: stop on numbers that are none, and save the last step."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


class DivergedError(RuntimeError):
    """The loss or gradient is not a finite number any more; the message names the step."""


class FiniteGuard(TrainerCallback):
    """Stops the run when a logged loss or gradient norm is NaN or infinite. Raises DivergedError."""

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signature is the Trainer's
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Check what the Trainer has just logged."""
        for name in ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(float(value)):
                raise DivergedError(
                    f"step {state.global_step}: {name} is {value}. Training on would only spoil the weights; the last "
                    f"checkpoint is the last good state. Lower --learning_rate, lengthen the warm-up, or use --bf16 for --fp16"
                )


class SaveLastStep(TrainerCallback):
    """Saves at the last step whatever ``save_steps`` is, unless nothing is to be saved at all."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a save when the last step is done."""
        if state.global_step >= state.max_steps and args.save_strategy != SaveStrategy.NO:
            control.should_save = True
