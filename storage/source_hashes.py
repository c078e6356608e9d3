"""Hashes of what an artifact is made from, kept so that files that have not changed are not read again."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

from .manifest import file_sha256
from .once import locked
from .publish import write_text

_MEMO = "source_hashes.json"


def source_sha256(files: Sequence[Path], cache: Path, say: Callable[[str], None] = print) -> dict[Path, str]:
    """SHA-256 of every file; one that has not changed since (size, times, inode) is not read again.

    The memory of earlier hashes is ``cache/source_hashes.json``. The change time cannot be set by programs, so a file
    that was written to is always read.
    """
    memo_file = cache / _MEMO
    hashes: dict[Path, str] = {}
    new: dict[str, list[Any]] = {}
    with locked(
        cache / f".{_MEMO}.lock", say
    ):  # the ranks of a machine come at once; one reads, the others find it done
        memo = _read_memo(memo_file)
        for file in dict.fromkeys(files):
            mark = _mark(file)
            match memo.get(str(file.resolve())):
                case [earlier, str(known)] if earlier == mark:
                    hashes[file] = known
                case _:
                    hashes[file] = file_sha256(file)
            new[str(file.resolve())] = [mark, hashes[file]]
        if any(memo.get(name) != value for name, value in new.items()):
            write_text(memo_file, json.dumps({**memo, **new}))
    return hashes


def has_hash(file: Path, digest: str, cache: Path) -> bool | None:
    """Whether a file still has this SHA-256, told by the memory in ``cache`` without reading it; None when that cannot tell.

    Raises FileNotFoundError.
    """
    mark = _mark(file)
    match _read_memo(cache / _MEMO).get(str(file.resolve())):
        case [earlier, str(known)] if earlier == mark:
            return known == digest
        case [[size, *_], str(known)] if known == digest and size != mark[0]:
            return False
        case _:
            return None


def _mark(file: Path) -> list[int]:
    state = file.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]


def _read_memo(file: Path) -> dict[str, Any]:
    """What the memory holds; nothing when it is damaged (cut by a full disk, for example): it only saves time."""
    try:
        memo: object = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", memo) if isinstance(memo, dict) else {}
