"""How far a long piece of work is: a bar on a terminal, a line now and then elsewhere and for those who wait."""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from threading import Lock
from types import TracebackType
from typing import TYPE_CHECKING, Self

if TYPE_CHECKING:
    from rich.progress import Progress as Bar

Say = Callable[[str], None]
Advance = Callable[[int], None]  # tells that so many bytes more are done
EVERY = 10.0  # seconds between two lines


@dataclass(frozen=True, slots=True)
class Tell:
    """A ``Say`` for work that others wait for: a call is said here and told them, ``note`` is told them alone."""

    say: Say
    note: Say

    def __call__(self, text: str) -> None:
        """Say a line, and tell it those who wait."""
        self.note(text)
        self.say(text)


class StoppedError(Exception):
    """The work that this thread does a part of was stopped."""


class Progress:
    """Bytes that are done, of ``total``; a context manager. ``what`` names the work, ``how`` is what bytes are: read, written.

    Any thread may ``advance`` it. Where stderr is a terminal a bar shows it, else ``say`` does every ten seconds; those who
    wait (see ``Tell``) read it either way. What took shorter is not said.
    """

    def __init__(self, what: str, total: int, how: str, say: Say = print) -> None:
        self._what, self._total, self._how = what, total, how
        self._done = 0
        self._lock = Lock()
        self._stopped = False
        self._bar = _bar(what, total) if total and sys.stderr.isatty() else None
        self._say = say if self._bar is None else say.note if isinstance(say, Tell) else None
        self._told = False
        self._began = self._last = time.monotonic()

    def advance(self, size: int) -> None:
        """So many bytes more are done. Raises StoppedError when the block was left by an error: its threads end so."""
        with self._lock:
            if self._stopped:
                raise StoppedError
            self._done += size
            if self._bar is not None:
                self._bar.update(self._bar.task_ids[0], completed=self._done)
            now = time.monotonic()
            if self._say is not None and now - self._last >= EVERY:
                self._last, self._told = now, True
                rate = self._rate(now)
                left = max(0, self._total - self._done) / max(rate, 1.0)
                self._say(
                    f"{self._what}: {self._done / max(self._total, 1):.0%} of {self._total / 1e6:,.0f} MB {self._how}, "
                    f"{rate / 1e6:.1f} MB/s, about {left:.0f} s left"
                )

    def _rate(self, now: float) -> float:
        return self._done / max(now - self._began, 1e-9)

    def __enter__(self) -> Self:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        with self._lock:
            self._stopped = kind is not None
        if self._bar is not None:
            self._bar.stop()
        if self._say is not None and self._told and not self._stopped:
            now = time.monotonic()
            self._say(
                f"{self._what}: {self._done / 1e6:,.0f} MB {self._how} in {now - self._began:.0f} s, "
                f"{self._rate(now) / 1e6:.1f} MB/s"
            )


def _bar(what: str, total: int) -> "Bar | None":
    """A bar on stderr, which goes when it is done; None for a terminal that cannot move its cursor."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, TextColumn, TimeRemainingColumn, TransferSpeedColumn
    from rich.progress import Progress as Bar

    console = Console(stderr=True)
    if not console.is_interactive:
        return None
    columns = (TextColumn(what), BarColumn(), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    # What is printed meanwhile goes above the bar, but for what goes to a file or pipe.
    bar = Bar(*columns, console=console, transient=True, redirect_stdout=sys.stdout.isatty())
    bar.add_task(what, total=total)
    return bar
