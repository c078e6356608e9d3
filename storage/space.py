"""Space on disk: sizes as users write them, what is free, and whether an error means that nothing is."""

import errno
import os
import shutil
from pathlib import Path

EXIT_DISK_FULL = 28  # a process's exit code when the disk is full: the number of ENOSPC
_FULL = (errno.ENOSPC, errno.EDQUOT)


def parse_size(text: str) -> int:
    """Bytes from ``5GB``, ``200MB``, ``64KB`` or a plain number. Raises ValueError on anything else."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
    value = text.strip().upper()
    unit = next((unit for unit in units if value.endswith(unit)), "")
    factor = units.get(unit, 1)
    try:
        size = int(float(value.removesuffix(unit)) * factor)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write for example 5GB or 200MB") from None
    if size <= 0:
        raise ValueError(f"{text!r} is not a positive size")
    return size


def free_bytes(path: Path) -> int:
    """Bytes that this user may still write where ``path`` lies or will lie."""
    there = next(place for place in (path.absolute(), *path.absolute().parents) if place.exists())
    return shutil.disk_usage(there).free


def is_disk_full(error: BaseException | None) -> bool:
    """Whether an error, or what caused it, says that a disk or quota is full; libraries in Rust tell it as text."""
    while error is not None:
        if (isinstance(error, OSError) and error.errno in _FULL) or os.strerror(errno.ENOSPC) in str(error):
            return True
        error = error.__cause__ or error.__context__
    return False
