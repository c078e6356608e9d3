"""What each optimizer step is checked for: numbers that are none, a loss that stays 0, spikes.

All ranks look at the same numbers, so all of them stop at the same step, before anything of it is saved.
"""

import math
from collections import deque
from collections.abc import Callable
from statistics import median

from .model_arguments import SpikePolicy

_HISTORY, _ENOUGH = 50, 20  # steps that a spike is compared with, and how many there must be
_ZERO_STEPS = 10


class DivergedError(RuntimeError):
    """The run must not go on; the message names the step and the samples that it saw."""


class StepGuard:
    """Looks at the loss and gradient norm of every step, not only of those that are logged.

    ``policy`` says what happens when a loss is over ``factor`` times the median of the last 50. ``fp16``: an infinite
    gradient norm is then loss scaling at work (the step is skipped), so only the loss counts.
    """

    def __init__(self, policy: SpikePolicy, factor: float, say: Callable[[str], None], *, fp16: bool) -> None:
        self.policy, self.factor, self.say, self.fp16 = policy, factor, say, fp16
        self._losses: deque[float] = deque(maxlen=_HISTORY)
        self._zeros = 0

    def check(self, step: int, loss: float, grad_norm: float | None, samples: Callable[[], str]) -> None:
        """Check the step that has just been made; ``samples`` names what it saw, of all ranks.

        Every rank must call it with the same numbers. Raises DivergedError.
        """
        for name, value in (("loss", loss), ("grad_norm", grad_norm)):
            if value is not None and not math.isfinite(value) and not (self.fp16 and name == "grad_norm"):
                raise DivergedError(
                    f"step {step}: {name} is {value} ({samples()}). Training on would only spoil the weights; the last "
                    "checkpoint has finite weights. Lower --learning_rate, lengthen the warm-up, or use --bf16 for --fp16"
                )
        if grad_norm == 0.0 and loss != 0.0 and not self.fp16:
            raise DivergedError(
                f"step {step}: the gradient is exactly 0 though the loss is {loss:.4f} ({samples()}). No trained weight gets "
                "a gradient: values inside the model overflow, or what is trained has no part in its output"
            )
        self._zeros = self._zeros + 1 if loss == 0.0 else 0
        if self._zeros == _ZERO_STEPS:
            raise DivergedError(
                f"step {step}: the loss was exactly 0 for {_ZERO_STEPS} steps ({samples()}). Nothing is learnt: are the "
                "answers all that the model can say, or is its output cut off from its weights?"
            )
        if self.policy != "off" and len(self._losses) >= _ENOUGH and loss > self.factor * median(self._losses):
            text = (
                f"step {step}: the loss {loss:.4f} is over {self.factor:g} times the median of the last {len(self._losses)} "
                f"steps, {median(self._losses):.4f} ({samples()})"
            )
            if self.policy == "stop":
                raise DivergedError(f"{text}; --loss_spike_policy warn goes on")
            self.say(f"warning: {text}")
        self._losses.append(loss)
