"""Hashes of what an artifact is made from, kept so that files that have not changed are not read again."""

import json
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

from .manifest import file_sha256
from .once import locked, mark
from .publish import clear_leftovers, write_text

_MEMO = "source_hashes.json"


def source_sha256(files: Sequence[Path], cache: Path, say: Callable[[str], None] = print) -> dict[Path, str]:
    """SHA-256 of every file; one that has not changed since (size, times, inode) is not read again.

    The memory of earlier hashes is ``cache/source_hashes.json``, and ``mark`` tells that a file was written to.
    """
    memo_file = cache / _MEMO
    hashes: dict[Path, str] = {}
    new: dict[str, list[Any]] = {}
    with locked(
        cache / f".{_MEMO}.lock", say
    ):  # the ranks of a machine come at once; one reads, the others find it done
        memo = _read_memo(memo_file)
        for file in dict.fromkeys(files):
            now = mark(file.stat())
            match memo.get(str(file.resolve())):
                case [earlier, str(known)] if earlier == now:
                    hashes[file] = known
                case _:
                    hashes[file] = file_sha256(file)
            new[str(file.resolve())] = [now, hashes[file]]
        if any(memo.get(name) != value for name, value in new.items()):
            clear_leftovers(cache, _MEMO, alone=True)
            with suppress(FileNotFoundError):  # this process stood still, and another one has the lock now
                write_text(memo_file, json.dumps({**memo, **new}))
    return hashes


def _read_memo(file: Path) -> dict[str, Any]:
    """What the memory holds; nothing when it is damaged (cut by a full disk, for example): it only saves time."""
    try:
        memo: object = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", memo) if isinstance(memo, dict) else {}
