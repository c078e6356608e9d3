"""DeepSpeed's own files of a checkpoint: which there must be, and how they are read without running what is in them.

DeepSpeed reads its shards with ``torch.load`` and ``weights_only`` off, which runs whatever code a pickle names, at more
than thirty places. torch can be told to refuse that everywhere in a process; the shards then load, as they hold tensors,
plain values and the few classes below.
"""

import os
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from torch.serialization import add_safe_globals, get_unsafe_globals_in_checkpoint

from .hf_flags import ArgumentsError

_SHARD = re.compile(r"(?:bf16_)?zero_pp_rank_(\d+)_mp_rank_00_(optim|model)_states\.pt")
_SHARD_CLASSES = frozenset({
    "deepspeed.runtime.zero.config.ZeroStageEnum",
    "deepspeed.utils.tensor_fragment.fragment_address",
    "deepspeed.runtime.fp16.loss_scaler.LossScaler",
    "deepspeed.runtime.fp16.loss_scaler.DynamicLossScaler",
})  # fmt: skip
_PICKLED = (".pt", ".pth")


def refuse_pickles(*, deepspeed: bool) -> None:
    """From now on no ``torch.load`` of this process and of its children runs code from a file, whatever its caller says.

    With ``deepspeed`` the classes that its shards hold are allowed; they have plain fields only.
    """
    os.environ.pop("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", None)  # torch refuses to start loading with both
    os.environ["TORCH_FORCE_WEIGHTS_ONLY_LOAD"] = "1"
    if deepspeed:
        add_safe_globals(list(_shard_classes()))


def _shard_classes() -> Iterator[Any]:
    from deepspeed.runtime.fp16.loss_scaler import DynamicLossScaler, LossScaler
    from deepspeed.runtime.zero.config import ZeroStageEnum
    from deepspeed.utils.tensor_fragment import fragment_address

    yield from (ZeroStageEnum, fragment_address, LossScaler, DynamicLossScaler)


def check_pickles(files: Iterable[Path]) -> None:
    """Refuse files that name a class which loading them would not allow; nothing in them is run.

    Raises ArgumentsError with the file and the class. For checkpoints without a manifest of ours: the others are known.
    """
    for path in files:
        if path.suffix not in _PICKLED:
            continue
        try:
            named = set(get_unsafe_globals_in_checkpoint(path))
        except (ValueError, RuntimeError, OSError, EOFError) as error:
            raise ArgumentsError(f"{path}: not a file that torch wrote, or it was cut: {error}") from None
        if strange := sorted(named - _SHARD_CLASSES - _NUMPY):
            raise ArgumentsError(f"{path}: it would run {strange[0]} when it is loaded; such a file is not read")


_NUMPY = frozenset(
    {"numpy._core.multiarray._reconstruct", "numpy.core.multiarray._reconstruct", "numpy.ndarray", "numpy.dtype"}
)


def latest_folder(checkpoint: Path) -> Path:
    """The ``global_step*`` folder that ``latest`` names. Raises ArgumentsError when either is missing."""
    latest = checkpoint / "latest"
    if not latest.is_file():
        raise ArgumentsError(
            f"{latest} is missing, so optimizer and schedule would start afresh (saved with --save_only_model, or without "
            "--deepspeed?); --init_from_checkpoint starts from the checkpoint's weights alone"
        )
    folder = checkpoint / latest.read_text(encoding="utf-8").strip()
    if folder.parent != checkpoint or not folder.is_dir():
        raise ArgumentsError(f"{latest}: it names {folder.name}, and there is no such folder")
    return folder


def shard_ranks(folder: Path) -> int:
    """How many ranks wrote the ZeRO shards of a ``global_step*`` folder, by the highest rank named; 0 without shards."""
    ranks = [int(found.group(1)) for path in folder.iterdir() if (found := _SHARD.fullmatch(path.name))]
    return max(ranks, default=-1) + 1


def shard_files(folder: Path, stage: int, ranks: int, *, bf16: bool) -> list[Path]:
    """Every file that DeepSpeed reads from a ``global_step*`` folder written by ``ranks`` ranks under a ZeRO stage."""
    prefix = "bf16_" if bf16 else ""
    optimizer = [folder / f"{prefix}zero_pp_rank_{rank}_mp_rank_00_optim_states.pt" for rank in range(ranks)]
    if stage == 3:  # noqa: PLR2004
        return [*optimizer, *(folder / f"zero_pp_rank_{rank}_mp_rank_00_model_states.pt" for rank in range(ranks))]
    return [*(optimizer if stage else ()), folder / "mp_rank_00_model_states.pt"]
