"""Hashes of what an artifact is made from, kept so that files that have not changed are not read again."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, cast

from .manifest import file_sha256
from .once import locked
from .progress import Progress, Say
from .publish import write_text
from .threads import usable_cores

_MEMO = "source_hashes.json"


def source_sha256(files: Sequence[Path], cache: Path, say: Say = print) -> dict[Path, str]:
    """SHA-256 of every file; one that has not changed since (size, times, inode) is not read again, others in parallel.

    The memory of earlier hashes is ``cache/source_hashes.json``. The change time cannot be set by programs, so a file
    that was written to is always read.
    """
    memo_file = cache / _MEMO
    # The ranks of a machine come at once: one reads, the others find it done.
    with locked(cache / f".{_MEMO}.lock", say) as tell:
        memo = _read_memo(memo_file)
        marks = {file: _mark(file) for file in dict.fromkeys(files)}
        known = {file: _known(memo.get(str(file.resolve())), mark) for file, mark in marks.items()}
        read = _read({file: marks[file][0] for file, sha256 in known.items() if sha256 is None}, tell)
        hashes = {file: sha256 or read[file] for file, sha256 in known.items()}
        new = {str(file.resolve()): [mark, hashes[file]] for file, mark in marks.items()}
        if any(memo.get(name) != value for name, value in new.items()):
            write_text(memo_file, json.dumps({**memo, **new}))
    return hashes


def _mark(file: Path) -> list[int]:
    state = file.stat()
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]


def _known(entry: object, mark: list[int]) -> str | None:
    match entry:
        case [earlier, str(sha256)] if earlier == mark:
            return sha256
        case _:
            return None


def _read(sizes: Mapping[Path, int], tell: Say) -> dict[Path, str]:
    """The SHA-256 of files by reading them, as many at once as there are cores."""
    with (
        ThreadPoolExecutor(usable_cores()) as pool,
        Progress("checksums", sum(sizes.values()), "read", tell) as progress,
    ):
        return dict(zip(sizes, pool.map(partial(file_sha256, advance=progress.advance), sizes), strict=True))


def _read_memo(file: Path) -> dict[str, Any]:
    """What the memory holds; nothing when it is damaged (cut by a full disk, for example): it only saves time."""
    try:
        memo: object = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    except (ValueError, RecursionError):
        return {}
    return cast("dict[str, Any]", memo) if isinstance(memo, dict) else {}
