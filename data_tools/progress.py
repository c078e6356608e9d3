"""How far a long build is: a bar on a terminal, a line now and then elsewhere."""

import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
from rich.progress import Progress as Bar

from .readers import Chunk

_EVERY = 10.0  # seconds between lines where there is no terminal


class Progress:
    """A context manager; ``watch`` passes chunks on and counts the bytes of files that were read, of all files' bytes."""

    def __init__(self, files: Sequence[Path], say: Callable[[str], None]) -> None:
        self.total = sum(file.stat().st_size for file in files)
        self._say = say
        self._done = 0
        console = Console(stderr=True)
        self._bar: Bar | None = None
        if console.is_terminal:
            columns = (BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
            self._bar = Bar(TextColumn("data"), *columns, console=console, transient=True)
            self._task = self._bar.add_task("data", total=self.total)
        self._began = self._said = time.monotonic()

    def watch(self, file: Path, chunks: Iterator[Chunk]) -> Iterator[Chunk]:
        """The chunks of a file, unchanged. A table's or archive's share is known only when it has been read."""
        seen = 0
        size = file.stat().st_size
        for chunk in chunks:
            yield chunk
            if isinstance(chunk.data, bytes) and seen + len(chunk.data) <= size:
                seen += len(chunk.data)
                self._advance(len(chunk.data))
        self._advance(size - seen)

    def _advance(self, size: int) -> None:
        self._done += size
        if self._bar is not None:
            self._bar.update(self._task, completed=self._done)
            return
        now = time.monotonic()
        if now - self._said > _EVERY:
            self._said = now
            rate = self._done / (now - self._began)
            left = (self.total - self._done) / max(rate, 1.0)
            self._say(
                f"data: {self._done / max(self.total, 1):.0%} of {self.total / 1e6:,.0f} MB read, "
                f"{rate / 1e6:.1f} MB/s, about {left:.0f} s left"
            )

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()
