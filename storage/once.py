"""Build an artifact once, however many processes ask for it.

The first process that gets the lock builds and publishes; the others wait, saying so, and then use what was built. The
lock is ``flock`` on a file beside the target, so the kernel releases it when its owner dies: no stale lock can hang a
later run. A failed build is not remembered: each waiter tries in turn and raises the cause itself.
"""

import fcntl
import json
import time
from collections.abc import Callable, Generator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from .manifest import ManifestError, verify
from .publish import publish, write_text


def build_once(
    target: Path,
    build: Callable[[Path], Mapping[str, Any]],
    *,
    kind: str,
    say: Callable[[str], None] = print,
    written: Mapping[str, Mapping[str, Any]] | None = None,
) -> bool:
    """Make sure that ``target`` stands and verifies; True when this call built it.

    ``build`` fills the folder it is given and returns what the manifest should say of the sources. ``written`` (see
    ``publish``) it may fill with what it hashed while writing. A target that no longer verifies (a changed or cut file)
    is built again, and that is said.
    """
    if _stands(target):
        return False
    with locked(target.with_name(f".{target.name}.lock"), say):
        if _stands(target, say):
            return False  # another process built it while this one waited
        made_from: dict[str, Any] = {}
        with publish(target, kind=kind, made_from=made_from, replace=True, written=written) as folder:
            made_from.update(build(folder))
        _remember(target)  # all was hashed when it was published
    return True


def verify_once(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder, whose files are hashed once: later only their size, times and inode are looked at.

    The memory lies beside the folder (``.NAME.verified``). A program cannot set the change time of a file, so one that
    was written to is always hashed again. Raises ManifestError.
    """
    if _memory(folder) == _marks(folder):
        return verify(folder, hashes=False)
    manifest = verify(folder)
    _remember(folder)
    return manifest


def _marks(folder: Path) -> dict[str, list[int]]:
    states = {path.relative_to(folder).as_posix(): path.stat() for path in sorted(folder.rglob("*"))}
    return {
        name: [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino, state.st_dev]
        for name, state in states.items()
    }


def _memory(folder: Path) -> object:
    try:
        return json.loads(_memory_of(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # it only saves time


def _remember(folder: Path) -> None:
    with suppress(OSError):  # a place that is only read: then every start hashes
        write_text(_memory_of(folder), json.dumps(_marks(folder)))


def _memory_of(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.verified")


@contextmanager
def locked(path: Path, say: Callable[[str], None] = print, every: float = 10.0) -> Generator[None]:
    """Hold an exclusive lock on ``path`` (created when absent), telling every ``every`` seconds what is waited for."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a") as stream:
        began = said = time.monotonic()
        while True:
            try:
                fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                time.sleep(0.05)
                if time.monotonic() - said > every:
                    said = time.monotonic()
                    say(f"waiting for another process that holds {path} ({said - began:.0f} s)")
        yield


def _stands(target: Path, say: Callable[[str], None] | None = None) -> bool:
    if not target.exists():
        return False
    try:
        verify_once(target)
    except (ManifestError, FileNotFoundError) as error:  # or it is being replaced at this moment
        if say:
            say(f"building again: {error}")
        return False
    return True
