"""How far a long piece of work is: what is said when, what those who wait read, and the bar on a terminal."""

import re
import threading
from collections.abc import Iterator
from types import SimpleNamespace

import pytest
from finebridge.storage import progress
from finebridge.storage.progress import Progress, StoppedError, Tell
from terminals import terminal

MB = 10**6


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """``clock.now`` is the time in seconds."""
    made = SimpleNamespace(now=100.0)
    monkeypatch.setattr(progress, "time", SimpleNamespace(monotonic=lambda: made.now))
    return made


def test_a_line_every_ten_seconds_and_one_at_the_end(clock: SimpleNamespace) -> None:
    said: list[str] = []
    with Progress("conversion", 4000 * MB, "written", said.append) as told:
        for _ in range(8):
            clock.now += 4
            told.advance(500 * MB)
    assert said == [
        "conversion: 38% of 4,000 MB written, 125.0 MB/s, about 20 s left",
        "conversion: 75% of 4,000 MB written, 125.0 MB/s, about 8 s left",
        "conversion: 4,000 MB written in 32 s, 125.0 MB/s",
    ]


def test_what_is_short_is_not_said(clock: SimpleNamespace) -> None:
    said: list[str] = []
    with Progress("checksums", 2, "read", said.append) as told:
        clock.now += 9
        told.advance(1)
        told.advance(1)
    assert said == []


def test_threads_advance_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    said: list[str] = []

    def work() -> None:
        for _ in range(500):
            told.advance(MB)

    with Progress("checksums", 2000 * MB, "read", said.append) as told:
        threads = [threading.Thread(target=work) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    shares = [int(re.match(r"checksums: (\d+)% of 2,000 MB read", line)[1]) for line in said[:-1]]
    assert len(shares) == 2000
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert said[-1].startswith("checksums: 2,000 MB read in ")


def test_threads_of_work_that_is_stopped_end(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    said: list[str] = []

    def stop() -> None:
        with told:
            told.advance(1)
            raise KeyboardInterrupt

    told = Progress("merge", 2, "written", said.append)
    with pytest.raises(KeyboardInterrupt):
        stop()
    with pytest.raises(StoppedError):
        told.advance(1)
    assert [line.partition(",")[0] for line in said] == ["merge: 50% of 0 MB written"], "no end is told"


def test_a_terminal_shows_a_bar_and_those_who_wait_read_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    said: list[str] = []
    noted: list[str] = []
    with terminal(monkeypatch) as shown:
        with Progress("merge", 4 * MB, "written", Tell(said.append, noted.append)) as told:
            told.advance(2 * MB)
            print("a result")
        with Progress("alone", 2, "written", said.append) as told:
            told.advance(2)
    for part in ("merge", "━━━", "2.0/4.0 MB", "alone"):
        assert part.encode() in shown
    assert said == []
    assert noted[0].startswith("merge: 50% of 4 MB written")
    assert capsys.readouterr().out == "a result\n", "stdout, which is no terminal, is left alone"


def test_a_terminal_that_moves_no_cursor_has_lines(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    said: list[str] = []
    with terminal(monkeypatch, "dumb") as shown, Progress("merge", 2, "written", said.append) as told:
        told.advance(1)
    assert len(said) == 2
    assert shown == b"\0"
