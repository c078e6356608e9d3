"""That a process uses an artifact: a shared lock on its manifest, which ends with the process, however that ends.

It needs no right to write, and machines that share a disk see each other's, where the disk carries locks at all (``man 2
flock``: local disks and NFS do). Nothing waits for it but the moment in which somebody removes the artifact.
"""

import fcntl
import os
from collections.abc import Generator
from contextlib import contextmanager, suppress
from pathlib import Path

from .manifest import MANIFEST_NAME

_MOST = 64  # artifacts that one process holds; a run uses a few
_held: dict[Path, int] = {}  # open manifests, the one held longest first


def hold(folder: Path) -> None:
    """Let nobody prune a published folder while this process lives. Where no locks are to be had, nothing happens."""
    with suppress(OSError):
        handle = _locked(folder / MANIFEST_NAME)
        release(folder)
        _held[folder.absolute()] = handle
        if len(_held) > _MOST:
            release(next(iter(_held)))


def _locked(file: Path) -> int:
    """A shared lock on the file that has this name now: another may have come while this process waited. Raises OSError."""
    while True:
        handle = os.open(file, os.O_RDONLY)
        try:
            fcntl.flock(handle, fcntl.LOCK_SH)
            if os.path.samestat(os.fstat(handle), file.stat()):
                return handle
        except OSError:
            os.close(handle)
            raise
        os.close(handle)


def release(folder: Path) -> None:
    """Use a folder no longer."""
    handle = _held.pop(folder.absolute(), None)
    if handle is not None:
        os.close(handle)


@contextmanager
def alone(folder: Path) -> Generator[bool]:
    """Keep processes from beginning to use a published folder; false when one uses it already.

    Raises OSError when its manifest may not be written.
    """
    handle = os.open(folder / MANIFEST_NAME, os.O_RDWR)  # NFS wants the right to write for such a lock
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            yield False
            return
        except OSError:  # a disk without locks: nobody could have told
            pass
        yield True
    finally:
        os.close(handle)
