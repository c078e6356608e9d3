"""What a user sees while a run trains: a line a log step, and on a terminal a live line below them.

Takes the place of the Trainer's own bar and printed dictionaries. The numbers are those of the Trainer's logs, so every
tracker and ``trainer_state.json`` have them too.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy
from transformers.utils.logging import disable_progress_bar

from .record import span

Logs = Mapping[str, Any]

# Log key -> how it is shown; what a line does not have is left out.
_STEP: dict[str, Callable[[Any], str]] = {
    "epoch": lambda value: f"epoch {value:.2f}",
    "loss": lambda value: f"loss {value:.4f}",
    "aux_loss": lambda value: f"aux {value:.4f}",
    "learning_rate": lambda value: f"lr {value:.3g}",
    "grad_norm": lambda value: f"grad {value:.3g}",
}
_SPEED: dict[str, Callable[[Any], str]] = {
    "tokens_per_second": lambda value: f"{value:,.0f} tokens/s",
    "trained_tokens_per_second": lambda value: f"{value:,.0f} with loss",
    "padding_share": lambda value: f"padding {value:.1%}",
    "mfu": lambda value: f"MFU {value:.1%}",
    "memory_gib": lambda value: f"{value:.2f} GiB",
}
_UNSHOWN = ("_runtime", "_samples_per_second", "_steps_per_second")


def step_line(step: int, last: int, logs: Logs, left: float | None) -> str:
    """The line of a log step; ``left`` is the seconds to the end, when they can be told."""
    parts = [f"step {step}/{last}", *(show(logs[name]) for name, show in _STEP.items() if name in logs)]
    speed = ", ".join(show(logs[name]) for name, show in _SPEED.items() if name in logs)
    return "  ".join([*parts, *([speed] if speed else []), *([f"{span(left)} left"] if left is not None else [])])


def eval_line(step: int, logs: Logs) -> str:
    """The line of an evaluation: every metric that is not about speed, and how long it took."""
    shown = [
        f"{name.removeprefix('eval_')} {value:,.0f}"
        if name.endswith("tokens")
        else f"{name.removeprefix('eval_')} {value:.4f}"
        for name, value in logs.items()
        if name.startswith("eval_") and not name.endswith(_UNSHOWN)
    ]
    return f"eval at step {step}  {'  '.join(shown)}  took {span(logs.get('eval_runtime', 0.0))}"


def end_line(steps: int, logs: Logs) -> str:
    """The line behind the last step: how long it all took, and the throughput of the whole run."""
    speed = ", ".join(show(logs[name]) for name, show in _SPEED.items() if name in logs)
    return f"trained {steps} steps in {span(logs['train_runtime'])}" + (f": {speed}" if speed else "")


class ProgressLine(TrainerCallback):
    """Prints what the Trainer logs as one line each, on rank 0 alone.

    With ``live`` a terminal also gets a bar that moves at every step. Call ``close`` however training ends: it gives the
    terminal back. The last step is always logged.
    """

    def __init__(self, say: Callable[[str], None], *, live: bool) -> None:
        self._say = say
        self._live = live
        self._bar: Progress | None = None
        self._task = self._eval_task = TaskID(0)
        self._first = 0
        self._timed_from: tuple[int, float] | None = None

    def close(self) -> None:
        """End the live line, if there is one."""
        if self._bar is not None:
            self._bar.stop()
            self._bar = None

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signature is the Trainer's
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Start the live line where there is a terminal."""
        self._first = state.global_step
        disable_progress_bar()  # transformers' own, one at every save
        console = Console()
        if self._live and state.is_world_process_zero and console.is_terminal:
            columns = (
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[left]}"),
            )
            self._bar = Progress(*columns, console=console, transient=True)
            self._task = self._bar.add_task("step", total=state.max_steps, completed=state.global_step, left="")
            self._bar.start()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        """Move the live line; ask for a log line of the last step."""
        if self._timed_from is None:  # the first step is slow: it compiles and allocates
            self._timed_from = state.global_step, time.monotonic()
        if self._bar is not None:
            left = self._left(state)
            shown = "" if left is None else f"{span(left)} left"
            self._bar.update(self._task, completed=state.global_step, left=shown)
        if state.global_step >= state.max_steps and args.logging_strategy == IntervalStrategy.STEPS:
            control.should_log = True

    def on_prediction_step(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        eval_dataloader: DataLoader[Any] | None = None,
        **_: Any,
    ) -> None:
        """Show how far an evaluation is."""
        if self._bar is None or eval_dataloader is None:
            return
        if not self._eval_task:
            self._eval_task = self._bar.add_task("eval", total=len(eval_dataloader), left="")
        self._bar.advance(self._eval_task)

    def on_evaluate(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Take the evaluation's bar away."""
        if self._bar is not None and self._eval_task:
            self._bar.remove_task(self._eval_task)
            self._eval_task = TaskID(0)

    def on_log(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002
        logs: dict[str, Any] | None = None,
        **_: Any,
    ) -> None:
        """Print what was logged."""
        if not logs:
            return
        if "loss" in logs:
            left = self._left(state) if state.global_step < state.max_steps else None
            self._say(step_line(state.global_step, state.max_steps, logs, left))
        elif "train_runtime" in logs:
            self.close()
            self._say(end_line(state.global_step - self._first, logs))
        elif any(name.startswith("eval_") for name in logs):
            self._say(eval_line(state.global_step, logs))
        else:
            self._say(f"step {state.global_step}  " + "  ".join(f"{name} {value}" for name, value in logs.items()))

    def _left(self, state: TrainerState) -> float | None:
        """Seconds to the last step at the mean pace so far, with all evaluations and saves; None in the first step."""
        if self._timed_from is None or state.global_step <= self._timed_from[0]:
            return None
        step, since = self._timed_from
        return (time.monotonic() - since) / (state.global_step - step) * (state.max_steps - state.global_step)
