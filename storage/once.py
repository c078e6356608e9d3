"""Build an artifact once, however many processes on however many machines ask for it.

The first that creates the lock file beside the target builds and publishes; the others wait, saying who builds, how far
it is and since when, and then use what was built, or fail with the builder's error. The lock file is a heartbeat: its
owner writes to it every other second. One that stands still for 20 s belongs to nobody and is taken away, sooner when its
owner is seen to be dead from here. It lies beside the target and asks nothing of the file system but that a file is
created once: so machines that share a disk build once, machines with disks of their own once each, and no collective call
is needed. Who holds the lock clears what dead owners left, on whatever machine they were. One that stood still and goes on
later finds that the lock is another's, drops its work and waits.
"""

import json
import math
import os
import time
import uuid
from collections.abc import Callable, Collection, Generator, Mapping
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from threading import Event, Thread
from types import TracebackType
from typing import Any, Self

from .holds import hold
from .manifest import MANIFEST_NAME, ManifestError, verify
from .owner import host_of, lives, me
from .progress import Say, Tell
from .publish import clear_leftovers, leftovers, publish, temporary, write_text

Build = Callable[[Path, Say], Mapping[str, Any]]
_BEAT = 2.0  # seconds between heartbeats
_DEAD = 20.0  # seconds without one after which the lock is nobody's
_STILL = 600.0  # seconds without one for those who look but once, at times that another machine's clock set
_TOLD = 10.0  # seconds between two words of a waiter
_RECORD = 4000  # bytes of a lock file, one write each: 300 characters of any script fit beside the rest


class BuildFailedError(ValueError):
    """Another process built, this one waited, and the build failed; the message is the builder's."""


class _LateError(Exception):
    """This process stood still for so long that another one builds, or has built, in its place."""


class _LockFile:
    """A lock file that this process created; use it as a context manager. ``tell`` sets what waiters read."""

    def __init__(self, path: Path) -> None:
        """Raises FileExistsError when another process holds it."""
        self.path = path
        self._handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        self.record: dict[str, Any] = {
            "owner": me(), "attempt": uuid.uuid4().hex, "since": datetime.now().astimezone().isoformat(timespec="seconds"),
        }  # fmt: skip
        self._over, self._beats = Event(), 0
        try:
            self._beat()
        except BaseException:  # no room even for this
            os.close(self._handle)
            path.unlink()
            raise
        self._thread = Thread(target=self._keep_beating, name="lock-heartbeat", daemon=True)
        self._thread.start()

    def tell(self, text: str) -> None:
        """What is being done, for those who wait."""
        self.record["told"] = text[-300:]

    def _keep_beating(self) -> None:
        while not self._over.wait(_BEAT):
            with suppress(OSError):  # a full or distant disk: whoever waits sees no heartbeat and may take over
                self._beat()

    def _beat(self) -> None:
        self._beats += 1
        text = json.dumps({**self.record, "beat": self._beats})
        os.pwrite(self._handle, text.encode()[:_RECORD].ljust(_RECORD), 0)
        os.fsync(self._handle)  # so that other machines see it

    @property
    def held(self) -> bool:
        """Whether it is still this process's: one that stood still may have lost it."""
        with suppress(OSError):
            return os.path.samestat(os.fstat(self._handle), self.path.stat())
        return False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._over.set()
        self._thread.join()
        if self.held:
            self.path.unlink()
        os.close(self._handle)


class _Watch:
    """What a waiter sees of the process that holds a lock file."""

    def __init__(self, path: Path, say: Say, every: float, dead: float | None = None) -> None:
        self.path, self._say, self._every, self._dead = path, say, every, dead
        self.record: dict[str, Any] = {}  # the newest that was read
        self.attempts: set[object] = set()  # that were waited for: other waiters hold the lock for a moment too
        self._content: bytes | None = None
        self._changed = time.monotonic()
        self._began = self._said = time.monotonic()

    def look(self, *, once: bool = False) -> None:
        """Read the lock, tell now and then what is waited for, and take the lock away when its owner is dead.

        Who looks but ``once`` goes by the lock's time to see whether it stands still.
        """
        try:
            content = self.path.read_bytes()
        except OSError:  # gone: the next attempt to create it may succeed
            return
        now = time.monotonic()
        if content != self._content:
            self._content, self._changed = content, now
            self.record = {}  # of one that was created just now and is still empty nothing is known
            with suppress(ValueError, TypeError):
                self.record = dict(json.loads(content))
                self.attempts.add(self.record.get("attempt"))
        owner = str(self.record.get("owner", ""))
        if now - self._changed > (self._dead or _DEAD) or lives(owner) is False or (once and _stands_still(self.path)):
            self._take_away(owner)
        elif now - self._said > self._every:
            self._said = now
            told = self.record.get("told", "at work")
            self._say(
                f"waiting for process {named(owner)}, which holds {self.path} since {self.record.get('since', '?')} "
                f"(waited {now - self._began:.0f} s): {told}"
            )

    def _take_away(self, owner: str) -> None:
        grave = temporary(self.path)
        with suppress(FileNotFoundError):  # its owner was done just now, or another waiter was faster
            self.path.rename(grave)
            if grave.read_bytes() == self._content:
                self._say(
                    f"{self.path}: its owner, process {named(owner)}, is dead or stands still; going on without it"
                )
            else:  # another waiter was faster, and this is its lock
                with suppress(OSError):
                    os.link(grave, self.path)
            grave.unlink()
        self._content, self._changed = None, time.monotonic()

    def pause(self) -> None:
        """Sleep: short at first, then so that hundreds of waiters are no burden for a shared disk."""
        time.sleep(min(1.0, max(0.05, (time.monotonic() - self._began) / 10)))


@contextmanager
def locked(path: Path, say: Say = print, every: float = _TOLD, dead: float | None = None) -> Generator[Tell]:
    """Hold an exclusive lock, the file ``path``, telling every ``every`` seconds what is waited for.

    One that stands still for ``dead`` seconds (20) is taken away, sooner when its owner is seen to be dead from here.

    What it gives says what is done meanwhile, to those who wait too.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    watch = _Watch(path, say, every, dead)
    while True:
        try:
            lock = _LockFile(path)
            break
        except FileExistsError:
            watch.look()
            watch.pause()
    with lock:
        yield Tell(say, lock.tell)


@contextmanager
def claimed(target: Path, say: Say = print) -> Generator[bool]:
    """Keep everyone from building ``target``; false, without waiting, when somebody is at it. Raises OSError."""
    watch = _Watch(_lock_of(target), say, math.inf)
    lock = None
    for _ in range(2):
        try:
            lock = _LockFile(watch.path)
            break
        except FileExistsError:
            watch.look(once=True)
    if lock is None:
        yield False
        return
    with lock:
        yield True


def note_of(path: Path) -> dict[str, Any] | None:
    """What a lock or a note of failure says: owner, attempt, since, and told or error. None for any other file."""
    try:
        note = json.loads(path.read_bytes())
        return note if {"owner", "attempt", "since"} <= note.keys() else None
    except (OSError, ValueError, AttributeError, RecursionError):
        return None


def builder_of(target: Path) -> dict[str, Any] | None:
    """What the lock of a target says when a live process holds it, or one of another machine that was heard of lately."""
    note = note_of(_lock_of(target))
    if note is None or lives(str(note["owner"])) is False or _stands_still(_lock_of(target)):
        return None
    return note


def _stands_still(lock: Path) -> bool:
    """Whether a lock's owner, wherever it is, has given no sign for so long that no difference of clocks explains it."""
    try:
        return time.time() - lock.stat().st_mtime > _STILL
    except OSError:
        return False


def build_once(
    target: Path,
    build: Build,
    *,
    kind: str,
    say: Say = print,
    written: Mapping[str, Mapping[str, Any]] | None = None,
    key: str | None = None,
) -> bool:
    """Make sure that ``target`` stands and verifies; True when this call built it.

    ``build(folder, tell)`` fills the folder and returns what the manifest should say of the sources; what it ``tell``s is
    said, here and by those who wait. ``written`` (see ``publish``) it may fill with what it hashed while writing. A target
    that no longer verifies (a changed or cut file), or was made for another ``key`` where the name of the target does not
    hold it, is built again, and that is said. Raises what ``build`` does;
    BuildFailedError, or OSError with the same number, when another process built and failed while this one waited.
    """
    if _stands(target, key):
        _tidy(target)
        return False
    target.parent.mkdir(parents=True, exist_ok=True)
    watch = _Watch(_lock_of(target), say, _TOLD)
    while True:
        try:
            lock = _LockFile(watch.path)
        except FileExistsError:
            watch.look()
            watch.pause()
            continue
        with lock:
            _clear(target)
            if _stands(target, key, say):
                return False  # another process built it while this one waited
            _raise_failure(target, watch.attempts)
            with suppress(_LateError):
                _build(target, build, lock, kind, say, written, key)
                return True


def _build(
    target: Path,
    build: Build,
    lock: _LockFile,
    kind: str,
    say: Say,
    written: Mapping[str, Mapping[str, Any]] | None,
    key: str | None,
) -> None:
    tell = Tell(say, lock.tell)
    made_from: dict[str, Any] = {"key": key} if key else {}
    try:
        with publish(target, kind=kind, made_from=made_from, replace=True, written=written) as folder:
            made_from.update(build(folder, tell))
            if _stands(target, key):
                raise _LateError  # noqa: TRY301 - publish drops what was written
    except _LateError:
        raise
    except Exception as error:
        if not lock.held:  # whose owner now has cleared what this one wrote
            raise _LateError from error
        _note_failure(target, lock.record, error)
        raise
    _failure_of(target).unlink(missing_ok=True)
    _remember(target)  # all was hashed when it was published
    hold(target)


def _tidy(target: Path) -> None:
    """Clear what a builder left that was killed when the artifact stood already, and was seen to die."""
    with suppress(OSError):  # a place that is only read, or a lock that another one holds
        _Watch(_lock_of(target), lambda _: None, _TOLD).look()
        if any(any(leftovers(path.parent, path.name)) for path in _written(target)):
            with _LockFile(_lock_of(target)):
                _clear(target)


def _clear(target: Path) -> None:
    """Clear what earlier holders of the lock, which the caller holds now, left beside the target."""
    for path in _written(target):
        clear_leftovers(path.parent, path.name, alone=True)


def _written(target: Path) -> tuple[Path, ...]:
    """All that is written for a target through temporary siblings."""
    return target, _lock_of(target), _failure_of(target), memory_of(target)


def _note_failure(target: Path, record: Mapping[str, Any], error: Exception) -> None:
    """Leave the cause for those who wait; it is theirs alone: who comes later tries anew."""
    cause = {"error": str(error) or repr(error), "errno": error.errno if isinstance(error, OSError) else None}
    with suppress(OSError):  # a full disk: then they try themselves
        write_text(_failure_of(target), json.dumps({**record, **cause}))


def _raise_failure(target: Path, attempts: Collection[object]) -> None:
    """Raise what ended the build that this process waited for."""
    try:
        failure = json.loads(_failure_of(target).read_text(encoding="utf-8"))
        owner, attempt, error, number = (failure[key] for key in ("owner", "attempt", "error", "errno"))
    except (OSError, ValueError, KeyError, TypeError):
        return
    if attempt not in attempts:
        return
    said = f"{error} (met by process {named(owner)}, which built {target} while this one waited)"
    if number is not None:
        raise OSError(int(number), said, str(target))
    raise BuildFailedError(said)


def _lock_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.lock")


def _failure_of(target: Path) -> Path:
    return target.with_name(f".{target.name}.failed")


def named(owner: str) -> str:
    """A process for people: its number and host."""
    return f"{owner.split('-')[-2]} on {host_of(owner)}" if owner.count("-") > 2 else "that has not told its name"  # noqa: PLR2004


def verify_once(folder: Path) -> dict[str, Any]:
    """The manifest of a published folder, whose files are hashed once: later only their size, times and inode are looked at.

    The memory lies beside the folder (``.NAME.verified``). A program cannot set the change time of a file, so one that
    was written to is always hashed again. Its time is when the folder was last used. As long as this process lives, nobody
    prunes the folder. Raises ManifestError.
    """
    hold(folder)
    if remembered(folder):
        with suppress(OSError):  # a place that is only read
            os.utime(memory_of(folder))
        return verify(folder, hashes=False)
    manifest = verify(folder)
    _remember(folder)
    return manifest


def forget(folder: Path) -> None:
    """Drop what is remembered of a folder that was removed."""
    memory_of(folder).unlink(missing_ok=True)


def remembered(folder: Path) -> bool:
    """Whether the files of a published folder were hashed and found whole, and not written to since."""
    return _memory(folder) == _marks(folder)


def note_verified(folder: Path, whole: bool) -> None:
    """Remember what hashing all files of a published folder has shown; when it was last used stays as it is."""
    memory = memory_of(folder)
    try:
        used = (memory if memory.exists() else folder / MANIFEST_NAME).stat()
        if whole:
            _remember(folder)
            os.utime(memory, ns=(used.st_atime_ns, used.st_mtime_ns))
        else:
            memory.unlink(missing_ok=True)
    except OSError:
        return  # a place that is only read


def mark(state: os.stat_result) -> list[int]:
    """What tells that a file was not written to since: no program can set the change time.

    The number of the device is no part of it: machines that share a disk each have their own.
    """
    return [state.st_size, state.st_mtime_ns, state.st_ctime_ns, state.st_ino]


def _marks(folder: Path) -> dict[str, list[int]]:
    return {path.relative_to(folder).as_posix(): mark(path.stat()) for path in sorted(folder.rglob("*"))}


def _memory(folder: Path) -> object:
    try:
        return json.loads(memory_of(folder).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None  # it only saves time


def _remember(folder: Path) -> None:
    with suppress(OSError):  # a place that is only read: then every start hashes
        write_text(memory_of(folder), json.dumps(_marks(folder)))


def memory_of(folder: Path) -> Path:
    """The file beside a published folder that remembers its files; its time is when the folder was last used."""
    return folder.with_name(f".{folder.name}.verified")


def _stands(target: Path, key: str | None, say: Say | None = None) -> bool:
    if not target.exists():
        return False
    try:
        made_from = verify_once(target)["made_from"]
    except (ManifestError, FileNotFoundError) as error:  # or it is being replaced at this moment
        if say:
            say(f"building again: {error}")
        return False
    if key and made_from.get("key") != key:
        if say:
            say(f"building again: {target} was made from other files or with other flags")
        return False
    return True
