"""Whether a folder holds a Megatron checkpoint, told from names alone."""

from pathlib import Path

TRACKER = "latest_checkpointed_iteration.txt"


def is_megatron(folder: Path) -> bool:
    """Whether ``folder`` is a Megatron checkpoint of either format, or holds some and a file that tells the newest."""
    return any((folder / name).is_file() for name in (TRACKER, ".metadata")) or any(folder.glob("mp_rank_*"))
