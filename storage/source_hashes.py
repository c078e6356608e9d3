"""Hashes of what an artifact is made from, kept so that files that have not changed are not read again."""

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any, cast

from .manifest import file_sha256
from .once import locked, mark
from .progress import Progress, Say
from .publish import clear_leftovers, write_text
from .threads import usable_cores

_MEMO = "source_hashes.json"


def source_sha256(files: Sequence[Path], cache: Path, say: Say = print) -> dict[Path, str]:
    """SHA-256 of every file; one that has not changed since (size, times, inode) is not read again, others in parallel.

    The memory of earlier hashes is ``cache/source_hashes.json``, and ``mark`` tells that a file was written to.
    """
    memo_file = cache / _MEMO
    with locked(cache / f".{_MEMO}.lock", say) as tell:  # ranks come at once; one reads, the others find it done
        memo = _read_memo(memo_file)
        marks = {file: mark(file.stat()) for file in files}
        hashes = {file: known for file in marks if (known := _known(memo.get(str(file.resolve())), marks[file]))}
        unread = {file: marks[file][0] for file in marks if file not in hashes}
        if unread:
            hashes |= _read(unread, tell)
            clear_leftovers(cache, _MEMO, alone=True)
            new = {str(file.resolve()): [marks[file], hashes[file]] for file in unread}
            with suppress(FileNotFoundError):  # this process stood still, and another one has the lock now
                write_text(memo_file, json.dumps({**memo, **new}))
    return hashes


def has_hash(file: Path, digest: str, cache: Path) -> bool | None:
    """Whether a file still has this SHA-256, told by the memory in ``cache`` without reading it; None when that cannot tell.

    Raises FileNotFoundError.
    """
    now = mark(file.stat())
    match _read_memo(cache / _MEMO).get(str(file.resolve())):
        case [earlier, str(known)] if earlier == now:
            return known == digest
        case [[size, *_], str(known)] if known == digest and size != now[0]:
            return False
        case _:
            return None


def _known(entry: object, now: list[int]) -> str | None:
    match entry:
        case [earlier, str(known)] if earlier == now:
            return known
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
