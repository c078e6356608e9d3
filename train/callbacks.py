"""What watches a run: stop on numbers that are none, and save the last step."""

import math
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy


class DivergedError(RuntimeError):
    """The loss or gradient is not a finite number any more; the message names the step."""


class FiniteGuard(TrainerCallback):
    """Stops the run when a logged loss or gradient norm is NaN or infinite. Raises DivergedError.

    Under fp16 an infinite gradient norm is loss scaling at work (the step is skipped), so only the loss counts there.
    """

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - the signature is the Trainer's
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Check what the Trainer has just logged."""
        for name in ("loss", "eval_loss") if args.fp16 else ("loss", "grad_norm", "eval_loss"):
            value = (logs or {}).get(name)
            if value is not None and not math.isfinite(float(value)):
                raise DivergedError(
                    f"step {state.global_step}: {name} is {value}. Training on would only spoil the weights; the last "
                    f"checkpoint has finite weights. Lower --learning_rate, lengthen the warm-up, or use --bf16 for --fp16"
                )


class SaveLastStep(TrainerCallback):
    """Saves at the last step whatever ``save_steps`` is; by epochs the Trainer does it, and ``no`` saves nothing."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Intervals come from the flags of this run, not from the checkpoint that it goes on from."""
        state.compute_steps(args, state.max_steps)

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a save when the last step is done."""
        if state.global_step >= state.max_steps and args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.BEST):
            control.should_save = True
