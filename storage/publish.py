"""Write an artifact so that it is whole or absent.

Everything goes into a temporary sibling of the target; files and folders are fsynced, ``manifest.json`` is written
last, and one rename makes the artifact appear. A killed writer leaves only a ``.tmp-`` sibling, which no reader trusts
and the next writer of the same target removes.
"""

import os
import shutil
import socket
import time
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .manifest import MANIFEST_NAME, describe, dump, files_below
from .owner import host_of, lives, me

_MARK = ".tmp-"
_OLD = ".old"
_STILL = 600.0  # seconds


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace one small file atomically and durably: temporary sibling, fsync, rename, fsync of the folder."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """``write_text`` of what is no text."""
    clear_leftovers(path.parent, path.name)
    staging = temporary(path)
    try:
        staging.write_bytes(content)
        fsync_path(staging)
        staging.replace(path)
    except BaseException:
        staging.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def temporary(target: Path, ending: str = "") -> Path:
    """The path of a hidden sibling that tells whose it is; ``clear_leftovers`` knows it."""
    return target.with_name(f".{target.name}{_MARK}{me()}-{uuid.uuid4().hex[:8]}{ending}")


def stage(target: Path, *, alone: bool = False) -> Path:
    """A new, empty temporary sibling of ``target``; what dead writers of this target left is cleared first.

    ``alone`` as for ``clear_leftovers``. Raises OSError when the parent is not writable.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    clear_leftovers(target.parent, target.name, alone=alone)
    staging = temporary(target)
    staging.mkdir()
    return staging


def commit(
    staging: Path,
    target: Path,
    *,
    kind: str,
    made_from: Mapping[str, Any],
    replace: bool = False,
    written: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Make what lies in ``staging`` appear as ``target``: fsync, manifest, rename.

    ``written`` are the entries of files that were hashed and fsynced while they were written (``hashing.Ledger``).
    Raises FileExistsError when ``target`` exists and ``replace`` is false. With ``replace`` the old artifact is moved
    aside first and removed only after the new one stands on the device; when that fails it is moved back.
    """
    written = written or {}
    manifest = describe(staging, kind, made_from, written)
    readable = 0o666 & ~_umask()
    for path in files_below(staging):
        path.chmod(path.stat().st_mode | readable)  # some writers go through 0600 temporary files
        if path.relative_to(staging).as_posix() not in written:
            fsync_path(path)
    for folder in sorted((p for p in staging.rglob("*") if p.is_dir()), reverse=True):
        fsync_path(folder)
    write_text(staging / MANIFEST_NAME, dump(manifest))
    old = temporary(target, _OLD) if target.exists() else None
    if old and not replace:
        raise FileExistsError(f"{target} exists already")
    if old:
        target.rename(old)
    try:
        staging.rename(target)
        fsync_path(target.parent)
    except BaseException:
        if not staging.exists():
            target.rename(staging)
        if old:
            old.rename(target)
        raise
    if old and old.is_dir() and not old.is_symlink():
        shutil.rmtree(old, ignore_errors=True)
    elif old:
        old.unlink()


def remove(target: Path) -> None:
    """Delete a published folder so that no half of it is ever seen under its name."""
    doomed = temporary(target)
    target.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def clear_leftovers(parent: Path, name: str, *, alone: bool = False) -> None:
    """Clear what dead writers of ``parent/name`` left; ``name`` may end in ``*`` for every target of that prefix.

    Those of other hosts are left alone, since nobody can tell from here whether they live; unless the caller is ``alone``:
    it holds the lock of this target, which they have lost. An old artifact that a writer had moved aside when it was
    killed is put back.
    """
    for path, target in list(leftovers(parent, name)):
        owner = path.name.partition(_MARK)[2].rpartition("-")[0]
        if lives(owner) if alone else not is_dead(path, owner):
            continue
        if is_moved_aside(path) and not target.exists():
            path.rename(target)
        else:
            _discard(path, target)


def leftovers(parent: Path, name: str) -> Generator[tuple[Path, Path]]:
    """What writers of ``parent/name`` have begun or left, and its target; ``name`` as for ``clear_leftovers``."""
    for path in parent.iterdir():
        target = parent / path.name[1:].partition(_MARK)[0]
        if (
            path.name.startswith(".")
            and _MARK in path.name
            and (target.name == name or (name.endswith("*") and target.name.startswith(name[:-1])))
        ):
            yield path, target


def _discard(path: Path, target: Path) -> None:
    """Delete what was to become ``target``; its writer, should it live after all, can no longer publish any of it."""
    doomed = temporary(target)
    try:
        path.rename(doomed)
    except OSError:  # another process clears, too; or it is another user's
        return
    if doomed.is_dir():
        shutil.rmtree(doomed, ignore_errors=True)
    else:
        doomed.unlink()


def writer_of(path: Path) -> tuple[Path, str] | None:
    """The target and the owner of a temporary sibling, told by its name; None for anything else."""
    name, mark, rest = path.name[1:].partition(_MARK)
    return (path.with_name(name), rest.rpartition("-")[0]) if mark and path.name.startswith(".") else None


def is_moved_aside(path: Path) -> bool:
    """Whether a temporary sibling is an artifact that stood until a new one was to take its place."""
    return path.name.endswith(_OLD)


def is_dead(path: Path, owner: str) -> bool:
    """Whether the writer of a temporary folder is gone: seen to be dead, or of this host's name and still for long.

    The second is this machine before it was started again; or a container of the same name, which would write.
    """
    known = lives(owner)
    if known is not None or host_of(owner) != socket.gethostname():
        return known is False
    return time.time() - last_change(path) > _STILL


def last_change(path: Path) -> float:
    """When a file or anything below a folder changed last, seconds since 1970."""
    return max(part.lstat().st_ctime for part in (path, *path.rglob("*")))


@contextmanager
def publish(
    target: Path,
    *,
    kind: str,
    made_from: Mapping[str, Any],
    replace: bool = False,
    written: Mapping[str, Mapping[str, Any]] | None = None,
    alone: bool = False,
) -> Generator[Path]:
    """Yield a staging folder; on success it becomes ``target``, on any error nothing is left behind.

    For one writing process. ``made_from`` and ``written`` (see ``commit``) are read when the block ends, so that the
    writer may fill them meanwhile. ``alone`` as for ``clear_leftovers``.
    Raises FileExistsError before any work when ``target`` exists and ``replace`` is false.
    """
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists already")
    staging = stage(target, alone=alone)
    try:
        yield staging
        commit(staging, target, kind=kind, made_from=made_from, replace=replace, written=written)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value
