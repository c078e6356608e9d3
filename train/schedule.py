"""The learning-rate schedule: any of transformers', with an absolute floor where the shape has one."""

from typing import Any

from .hf_flags import ArgumentsError

WSD = "warmup_stable_decay"
DECAY_SHARE = 0.1  # of the steps, when nothing else was said; https://arxiv.org/abs/2405.18392 finds 10 to 20 % enough

# Shape -> the transformers scheduler that reaches a floor, and how it names the floor.
_WITH_FLOOR: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cosine_with_min_lr": ("cosine_with_min_lr", "min_lr", {}),
    "cosine_warmup_with_min_lr": ("cosine_warmup_with_min_lr", "min_lr", {}),
    "cosine": ("cosine_with_min_lr", "min_lr", {}),
    "linear": ("polynomial", "lr_end", {"power": 1.0}),
    "polynomial": ("polynomial", "lr_end", {}),
    WSD: (WSD, "min_lr_ratio", {}),
}
_NEVER_FALLS = ("constant", "constant_with_warmup")


def schedule(name: str, min_lr: float, learning_rate: float) -> tuple[str, dict[str, Any]]:
    """Scheduler name and kwargs for ``TrainingArguments``, so that the learning rate ends at ``min_lr``.

    ``cosine`` and ``linear`` with a floor become the transformers scheduler of that shape that has one. Raises
    ArgumentsError when the floor is not below the peak or the shape has no floor.
    """
    if not 0 <= min_lr < learning_rate:
        raise ArgumentsError(
            f"--min_lr {min_lr:g} is the absolute floor of the schedule and must lie below --learning_rate {learning_rate:g}"
        )
    if name in ("cosine_with_min_lr", "cosine_warmup_with_min_lr") or (min_lr > 0 and name in _WITH_FLOOR):
        target, key, extra = _WITH_FLOOR[name]
        return target, {key: min_lr / learning_rate if key == "min_lr_ratio" else min_lr, **extra}
    if min_lr > 0 and name in _NEVER_FALLS:
        raise ArgumentsError(
            f"--min_lr {min_lr:g}: the schedule {name} never falls below --learning_rate {learning_rate:g}, so a floor has "
            f"no effect; leave --min_lr out, or choose one that falls: {', '.join(_WITH_FLOOR)}"
        )
    if min_lr > 0:
        raise ArgumentsError(
            f"--min_lr {min_lr:g}: the schedule {name} has no floor; those that have one: {', '.join(_WITH_FLOOR)}"
        )
    return name, {}


def decay_steps(name: str, kwargs: dict[str, Any] | None, steps: int, warmup: int) -> int | None:
    """Steps in which ``warmup_stable_decay`` falls when the user named none: a tenth of all; None when nothing is to choose.

    Raises ArgumentsError when the user's own number and the warm-up are more than all ``steps``.
    """
    if name != WSD:
        return None
    given = (kwargs or {}).get("num_decay_steps")
    chosen = max(1, round(DECAY_SHARE * steps)) if given is None else int(given)
    if warmup + chosen > steps:
        raise ArgumentsError(
            f"--lr_scheduler_type {WSD}: {warmup} steps of warm-up and {chosen} of decay are more than the run's {steps}; "
            "lower --warmup_steps or give --lr_scheduler_kwargs '{\"num_decay_steps\": N}'"
        )
    return chosen if given is None else None
