"""Settings that a resume would take from the checkpoint in silence, set to the flags where the user allowed that.

Loading an optimizer's state brings the checkpoint's weight decay, betas and epsilon back, and loading a schedule's its
peak: ``--learning_rate`` given anew would have no effect, a changed ``--max_steps`` a jump nobody asked for.
"""

from collections.abc import Collection
from typing import Any

import torch

from .drift import GROUP_KEYS, SCHEDULE

_HOW = ("fused", "foreach")  # how the same step is computed: never the checkpoint's to say


class FreshSettings:
    """What optimizer and schedule were made with from the flags; take it before a checkpoint is loaded over them."""

    def __init__(self, optimizer: Any, scheduler: Any) -> None:
        keys = (*GROUP_KEYS.values(), *_HOW)
        self._groups = [{key: group[key] for key in keys if key in group} for group in optimizer.param_groups]
        self._schedule = dict(scheduler.state_dict())

    def put_back(self, names: Collection[str], optimizer: Any, scheduler: Any) -> None:
        """Set what ``names`` (of ``drift.TABLE``) names to the flags' values, the schedule at the step it had reached.

        Any schedule of transformers that is a function of the step (a ``LambdaLR``) can be put there.
        """
        keys = [*_HOW, *(key for name, key in GROUP_KEYS.items() if name in names)]
        for group, fresh in zip(optimizer.param_groups, self._groups, strict=True):
            group.update({key: fresh[key] for key in keys if key in fresh})
        if SCHEDULE & set(names):
            step = scheduler.last_epoch
            scheduler.load_state_dict(self._schedule | {"last_epoch": step, "_step_count": step + 1})
            rates = [base * shape(step) for base, shape in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)]
            for group, base, rate in zip(optimizer.param_groups, scheduler.base_lrs, rates, strict=True):
                group["initial_lr"], group["lr"] = base, rate
            scheduler._last_lr = rates  # noqa: SLF001 - what get_last_lr tells, and the log


def separate_steps(optimizer: Any) -> None:
    """Give every parameter its own step counter again, after a universal checkpoint was loaded under ZeRO-3.

    DeepSpeed 0.19 sets one tensor as the counter of all groups, so that each group counts for all, and Adam corrects its
    moments for twice as many steps. torch's fused kernels want the counter beside its parameter, the others on the CPU.
    """
    while hasattr(optimizer, "optimizer"):
        optimizer = optimizer.optimizer
    fused = any(group.get("fused") for group in optimizer.param_groups)
    for parameter, state in optimizer.state.items():
        if isinstance(state.get("step"), torch.Tensor):
            state["step"] = state["step"].to(parameter.device if fused else "cpu", copy=True)
