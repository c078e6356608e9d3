"""Write an artifact so that it is whole or absent.

Everything goes into a temporary sibling of the target; files and folders are fsynced, ``manifest.json`` is written
last, and one rename makes the artifact appear. A killed writer leaves only a ``.tmp-`` sibling, which no reader trusts
and the next writer of the same target removes.
"""

import json
import os
import shutil
import socket
import uuid
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .manifest import MANIFEST_NAME, describe, files_below

_MARK = ".tmp-"


def fsync_path(path: Path) -> None:
    """Flush a file or a folder entry to the device."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text(path: Path, text: str) -> None:
    """Replace one small file atomically and durably: temporary sibling, fsync, rename, fsync of the folder."""
    temporary = path.with_name(f".{path.name}{_MARK}{uuid.uuid4().hex[:8]}")
    try:
        temporary.write_text(text, encoding="utf-8")
        fsync_path(temporary)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    fsync_path(path.parent)


def stage(target: Path) -> Path:
    """A new, empty temporary sibling of ``target``; staging folders that dead writers of this target left are removed.

    Raises OSError when the parent is not writable.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    for stale in target.parent.glob(f".{target.name}{_MARK}*"):
        if not _owner_lives(stale):
            shutil.rmtree(stale, ignore_errors=True)
    staging = target.with_name(f".{target.name}{_MARK}{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    staging.mkdir()
    return staging


def commit(staging: Path, target: Path, *, kind: str, made_from: Mapping[str, Any], replace: bool = False) -> None:
    """Make what lies in ``staging`` appear as ``target``: fsync, manifest, rename.

    Raises FileExistsError when ``target`` exists and ``replace`` is false. With ``replace`` the old artifact is moved
    aside first and removed only after the new one stands.
    """
    manifest = describe(staging, kind, made_from)
    readable = 0o666 & ~_umask()
    for path in files_below(staging):
        path.chmod(path.stat().st_mode | readable)  # some writers go through 0600 temporary files
        fsync_path(path)
    for folder in sorted((p for p in staging.rglob("*") if p.is_dir()), reverse=True):
        fsync_path(folder)
    write_text(staging / MANIFEST_NAME, json.dumps(manifest, indent=1, ensure_ascii=False) + "\n")
    aside = target.with_name(f".{target.name}{_MARK}old-{uuid.uuid4().hex[:8]}")
    if target.exists():
        if not replace:
            raise FileExistsError(f"{target} exists already")
        target.rename(aside)
    staging.rename(target)
    fsync_path(target.parent)
    shutil.rmtree(aside, ignore_errors=True)


@contextmanager
def publish(target: Path, *, kind: str, made_from: Mapping[str, Any], replace: bool = False) -> Generator[Path]:
    """Yield a staging folder; on success it becomes ``target``, on any error nothing is left behind.

    For one writing process. ``made_from`` is read when the block ends, so that the writer may fill it meanwhile.
    Raises FileExistsError before any work when ``target`` exists and ``replace`` is false.
    """
    if target.exists() and not replace:
        raise FileExistsError(f"{target} exists already")
    staging = stage(target)
    try:
        yield staging
        commit(staging, target, kind=kind, made_from=made_from, replace=replace)
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        raise


def _umask() -> int:
    value = os.umask(0)
    os.umask(value)
    return value


def _owner_lives(staging: Path) -> bool:
    """Whether the process that named a staging folder may still be writing; another host's is never judged."""
    owner = staging.name.split(_MARK, 1)[1].rsplit("-", 2)
    if len(owner) != 3 or owner[0] != socket.gethostname() or not owner[1].isdigit():  # noqa: PLR2004
        return True
    try:
        os.kill(int(owner[1]), 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
