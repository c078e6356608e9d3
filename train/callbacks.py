"""What happens at steps beside training: saving the last one, telling the watch of ranks where this one is."""

from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import SaveStrategy

from .heartbeat import enter


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

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,
        **_: Any,
    ) -> None:
        """Early stopping makes this step the last."""
        if control.should_training_stop and args.save_strategy != SaveStrategy.NO:
            control.should_save = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Ask for a save when the last step is done."""
        if state.global_step >= state.max_steps and args.save_strategy in (SaveStrategy.STEPS, SaveStrategy.BEST):
            control.should_save = True


class Phases(TrainerCallback):
    """Tells the watch what the Trainer tells: steps, evaluation, the end. The trainer itself tells the phases of a step."""

    def on_train_begin(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:  # noqa: ARG002
        """The first batch is waited for."""
        enter("data", state.global_step)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Gradients are there."""
        enter("optimizer")

    def on_step_end(self, args: Any, state: TrainerState, control: Any, **_: Any) -> None:  # noqa: ARG002
        """A step is done."""
        enter("data", state.global_step)

    def on_prediction_step(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """A held-out batch is done."""
        enter("evaluate")

    def on_evaluate(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Back to training."""
        enter("data")

    def on_save(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """Back to training."""
        enter("data")

    def on_train_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
        """What comes now is rank 0's alone."""
        enter("leaving")
