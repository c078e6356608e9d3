"""Room on disk for checkpoints, reckoned before the first step."""

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import IntervalStrategy, SaveStrategy

from ..storage.manifest import steps
from ..storage.space import free_bytes
from .checkpoint import PREFIX, on_main
from .hf_flags import ArgumentsError
from .runtime import say
from .weights import full_shape

_FP32 = 4  # bytes
_BESIDE = 20 * 10**6  # tokenizer, states of random numbers, logs: bytes at most, as a rule


def checkpoint_bytes(model: Any, args: TrainingArguments) -> int:
    """Bytes that one checkpoint takes, about: weights or adapter, and the states of optimizer and DeepSpeed.

    Reckoned with two states a trained parameter, as Adam has.
    """
    trained = _bytes(p for p in model.parameters() if p.requires_grad)
    every = _bytes(model.parameters())
    weights = trained if isinstance(model, PeftModel) else every
    if args.save_only_model:
        return _whole(weights)
    if not args.deepspeed:
        return _whole(weights + 2 * trained)
    masters = 3 * _FP32 * sum(_numel(p) for p in model.parameters() if p.requires_grad)
    settings: Any = args.deepspeed
    partitioned = settings.get("zero_optimization", {}).get("stage", 0) == 3  # noqa: PLR2004
    # Beside the masters DeepSpeed writes the 16-bit weights (ZeRO-2), and the frozen ones unless they are a base's.
    again = weights if not partitioned else weights - trained
    return _whole(weights + masters + again)


class SpaceCheck(TrainerCallback):
    """Before the first step: refuses when one checkpoint has no room, warns when the planned ones have none together.

    Raises ArgumentsError on every rank.
    """

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,  # noqa: ARG002 - the signature is the Trainer's
        model: Any = None,
        **_: Any,
    ) -> None:
        """Compare what will be written with what is free."""
        if args.save_strategy == SaveStrategy.NO:
            return
        one = checkpoint_bytes(model, args)
        on_main(lambda: self._compare(Path(str(args.output_dir)), one, _planned(args, state)))

    def __init__(self, keep: int | None) -> None:
        self.keep = keep or None

    def _compare(self, folder: Path, one: int, planned: int) -> None:
        free = free_bytes(folder)
        if one > free:
            raise ArgumentsError(
                f"--output_dir {folder}: one checkpoint needs about {one:,} bytes, {free:,} are free. Make room, choose "
                "another disk, or save less: --save_only_model (no resume), --save_strategy no"
            )
        # A new one is whole before an old one goes, so for a moment there is one more than are kept.
        there = len(steps(folder, PREFIX))
        more = planned if self.keep is None else min(planned, max(1, self.keep + 1 - there))
        if more * one > free:
            say(
                f"warning: --output_dir {folder}: {more} checkpoints of about {one:,} bytes are to come and {free:,} bytes "
                f"are free; they will not all fit. Keep fewer (--save_total_limit {max(1, free // one - 1)}) or save less often"
            )


def _planned(args: TrainingArguments, state: TrainerState) -> int:
    """How many checkpoints the rest of the run writes; at least one."""
    left = state.max_steps - state.global_step
    if args.save_strategy == IntervalStrategy.EPOCH.value:
        return max(1, math.ceil(left / max(1, state.max_steps) * float(args.num_train_epochs)))
    return max(1, math.ceil(left / max(1, state.save_steps)))


def _bytes(parameters: Iterable[Any]) -> int:
    return sum(_numel(p) * p.element_size() for p in parameters)


def _numel(parameter: Any) -> int:
    return math.prod(full_shape(parameter))


def _whole(size: int) -> int:
    return size + _BESIDE
