"""The learning-rate schedule: any of transformers', with an absolute floor where the shape has one."""

from typing import Any

from .hf_flags import ArgumentsError

# Shape -> the transformers scheduler that reaches a floor, and how it names the floor.
_WITH_FLOOR: dict[str, tuple[str, str, dict[str, Any]]] = {
    "cosine_with_min_lr": ("cosine_with_min_lr", "min_lr", {}),
    "cosine_warmup_with_min_lr": ("cosine_warmup_with_min_lr", "min_lr", {}),
    "cosine": ("cosine_with_min_lr", "min_lr", {}),
    "linear": ("polynomial", "lr_end", {"power": 1.0}),
    "polynomial": ("polynomial", "lr_end", {}),
}


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
        return target, {key: min_lr, **extra}
    if min_lr > 0:
        raise ArgumentsError(
            f"--min_lr {min_lr:g}: the schedule {name} has no floor; those that have one: {', '.join(_WITH_FLOOR)}"
        )
    return name, {}
