"""How the packed rows of an optimizer step are cut into micro-batches: as few as a number of tokens allows.

A step's loss is divided by the whole step's tokens or samples, so the cut changes neither the loss nor the gradients, only
how much a GPU has to do at a time.
"""

from collections.abc import Callable, Mapping
from typing import Any

from ..ds_configs.resolve import FIXED_BY_FLAGS
from .arguments import Arguments
from .hf_flags import ArgumentsError, hf_value

AUTO = 16_384  # tokens; fewer leave an H100 waiting for its CPU at models under a billion parameters
_ROWS, _MICRO_BATCHES = "per_device_train_batch_size", "gradient_accumulation_steps"


def cut(rows: int, length: int, tokens: int) -> tuple[int, int]:
    """Rows of a micro-batch and micro-batches of a step of ``rows``, each row of ``length`` tokens.

    The largest divisor of ``rows`` whose micro-batch has at most ``tokens`` tokens; one row when none has.
    """
    most = max(1, tokens // length)
    size = next(size for size in range(min(most, rows), 0, -1) if rows % size == 0)
    return size, rows // size


def micro_batches(
    args: Arguments, settings: Mapping[str, Any] | None, say: Callable[[str], None], *, on_gpu: bool
) -> dict[str, int]:
    """What --tokens_per_micro_batch makes of a step's rows, by flags of ``TrainingArguments``; empty when nothing changes.

    Not given it is 16,384 tokens on a GPU when the number of rows was not given either. Raises ArgumentsError when it was
    given and cannot be.
    """
    wanted = args.model.tokens_per_micro_batch
    fixed = [
        name for name, flag in FIXED_BY_FLAGS.items()
        if flag in (_ROWS, _MICRO_BATCHES) and (settings or {}).get(name, "auto") != "auto"
    ]  # fmt: skip
    why = None
    if not args.shares_rows:
        why = "rows are padded; give --packing"
    elif args.model.loss_normalization == "batch":
        why = "with --loss_normalization batch the cut into micro-batches changes the loss"
    elif fixed:
        why = f'--deepspeed fixes {fixed[0]}; set it to "auto"'
    if why and wanted:
        raise ArgumentsError(f"--tokens_per_micro_batch {wanted}: {why}")
    if why or (wanted in (None, "auto") and not on_gpu) or (wanted is None and _ROWS in args.given):
        return {}
    before = int(hf_value(args.hf, _ROWS)), int(hf_value(args.hf, _MICRO_BATCHES))
    length = args.data.max_seq_length
    made = cut(before[0] * before[1], length, AUTO if wanted in (None, "auto") else int(wanted))
    if made == before:
        return {}
    say(
        f"micro-batches: {made[1]} of {made[0]} x {length} tokens a step in place of {before[1]} of {before[0]} x {length}; "
        f"the step is the same (--tokens_per_micro_batch {wanted or 'auto'})"
    )
    return dict(zip((_ROWS, _MICRO_BATCHES), made, strict=True))
