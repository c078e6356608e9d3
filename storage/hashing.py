"""Checksums: the algorithms, of files that lie on disk and of files while they are written.

An entry of a manifest is ``{"size": bytes, ALGORITHM: hex digest}`` and so names its own algorithm: what was published
with SHA-256 stays readable. New entries use XXH3, which keeps up with memory (https://xxhash.com); it finds damage, it
does not stop a forger. Keys of caches stay SHA-256.
"""

import hashlib
import os
from collections import deque
from collections.abc import Callable, Generator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import xxhash

from .progress import Advance

NEW = "xxh3_128"
_AT_ONCE = 32 * 2**20  # bytes after which the device is asked to take them while more is written
# Bytes to read or write at once: a piece is hashed while it is in the cache, and the kernel asks for no larger run of free
# memory, which a virtual machine may have to get from its host first (measured: 0.5 to 4 CPU seconds for 1.5 GB in one go).
PIECE = 2**20
_ALGORITHMS: dict[str, Callable[[], Any]] = {NEW: xxhash.xxh3_128, "sha256": hashlib.sha256}


def file_digest(path: Path, algorithm: str = NEW, advance: Advance | None = None) -> str:
    """The checksum of a file's bytes as lower-case hex; ``advance`` is told how many bytes were read, piece by piece."""
    digest = _ALGORITHMS[algorithm]()
    piece = memoryview(bytearray(PIECE))
    with path.open("rb", buffering=0) as stream:
        while size := stream.readinto(piece):
            digest.update(piece[:size])
            if advance:
                advance(size)
    return digest.hexdigest()


def text_digest(data: bytes) -> str:
    """The checksum of bytes in memory, by the algorithm of new entries."""
    digest = _ALGORITHMS[NEW]()
    digest.update(data)
    return digest.hexdigest()


def file_entry(path: Path, advance: Advance | None = None) -> dict[str, Any]:
    """A manifest's entry of a file, from reading it (see ``file_digest``): about 0.1 s a GB when it is in memory."""
    return {"size": path.stat().st_size, NEW: file_digest(path, NEW, advance)}


def algorithm_of(entry: Mapping[str, Any]) -> str | None:
    """The algorithm that an entry names, None when it names none that is known."""
    return next((name for name in _ALGORITHMS if name in entry), None)


class HashingFile:
    """A new file that is hashed while it is written, and fsynced when the block ends; use it as a context manager.

    ``error`` is the OSError that stopped it: torch's zip writer raises another in its place.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.error: OSError | None = None
        self._digest = _ALGORITHMS[NEW]()
        self._size = self._sent = 0  # bytes written, and of them those that the device was asked to take
        self._background = ThreadPoolExecutor(1)
        self._syncing: Future[None] | None = None

    def __enter__(self) -> Self:
        self._stream = self.path.open("wb", buffering=0)
        return self

    def write(self, data: Any) -> int:
        """Append the bytes of any contiguous buffer; how many bytes."""
        whole = rest = memoryview(data).cast("B")
        try:
            while rest:
                done = self._stream.write(rest[:PIECE]) or 0
                self._digest.update(rest[:done])
                rest = rest[done:]
        except OSError as error:
            error.filename = str(self.path)
            self.error = error
            raise
        self._size += len(whole)
        if self._size - self._sent > _AT_ONCE and (self._syncing is None or self._syncing.done()):
            self._sent = self._size
            self._syncing = self._background.submit(self._sync, os.fdatasync)
        return len(whole)

    def flush(self) -> None:
        """Nothing is buffered here."""

    def _sync(self, wait_for_device: Callable[[int], None]) -> None:
        """Have the device take what is written so far, while more may be written."""
        try:
            wait_for_device(self._stream.fileno())
        except OSError as error:  # the system tells it once, so the last fsync may not hear of it
            error.filename = str(self.path)
            self.error = error

    def entry(self) -> dict[str, Any]:
        """The manifest's entry of what was written."""
        return {"size": self._size, NEW: self._digest.hexdigest()}

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        try:
            self._background.shutdown()
            if kind is None:
                if not self.error:
                    self._sync(os.fsync)
                if self.error:
                    raise self.error
        finally:
            self._stream.close()


class Ledger:
    """What this process wrote below ``folder``: relative name -> entry, so that nothing is read back to be hashed.

    ``entries`` is the dictionary to fill, for example the one that ``publish`` was given as ``written``.

    With ``patient`` an error of writing is kept in ``errors`` instead of raised: in a run of several ranks the one that
    failed must go on to the point where all agree, else the others wait for it for ever. Nor does such a ledger wait for
    the device: each file is fsynced in the background, and whoever looks at ``entries`` or ``errors`` waits for all.
    """

    def __init__(
        self, folder: Path, entries: dict[str, dict[str, Any]] | None = None, *, patient: bool = False
    ) -> None:
        self.folder, self.patient = folder, patient
        self._entries: dict[str, dict[str, Any]] = {} if entries is None else entries
        self._errors: list[Exception] = []
        self._background = ThreadPoolExecutor(1)
        self._put_off: deque[Future[None]] = deque()

    @property
    def entries(self) -> dict[str, dict[str, Any]]:
        """The entries of all that was written. Raises what stopped a write in the background, unless patient."""
        self.settle()
        return self._entries

    @property
    def errors(self) -> list[Exception]:
        """What a patient ledger met, in no certain order of files."""
        self.settle()
        return self._errors

    def later(self, work: Callable[[], None]) -> None:
        """Run a piece of this process's own work in the background, after those before it."""
        self._put_off.append(self._background.submit(work))

    def settle(self) -> None:
        """Wait for all that runs in the background. Raises the first error of it, unless patient."""
        met: list[BaseException | None] = []
        while self._put_off:
            met.append(self._put_off.popleft().exception())
        for error in filter(None, met):
            with self.guard():
                raise error

    def write(self, path: Path, work: Callable[[HashingFile], object]) -> None:
        """Make a new file below the folder by ``work``, and enter it. Raises what stopped it, unless patient."""
        with self.guard():
            stream = HashingFile(path)
            try:
                with ExitStack() as stack:
                    work(stack.enter_context(stream))
                    if self.patient:
                        self.later(stack.pop_all().close)
            except Exception:
                if stream.error:
                    raise stream.error from None
                raise
            self._entries[path.relative_to(self.folder).as_posix()] = stream.entry()

    @contextmanager
    def guard(self) -> Generator[None]:
        """Run a block of this process's own work, keeping its error when the ledger is patient."""
        try:
            yield
        except Exception as error:
            if not self.patient:
                raise
            self._errors.append(error)

    def rename(self, old: Path, new: Path) -> None:
        """Give a file that was entered its final name; nothing when it could not be written."""
        entry = self._entries.pop(old.relative_to(self.folder).as_posix(), None)
        if entry is not None:
            old.rename(new)
            self._entries[new.relative_to(self.folder).as_posix()] = entry
