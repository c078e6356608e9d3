"""A watcher in every rank, apart from torch's collectives: a rank that is dead, stopped or stuck is named, and all end.

gloo and NCCL notice a peer that was stopped, or that waits for its data for ever, only at their time-out (10 to 30
minutes), and name nobody. Here each rank has a thread that tells rank 0 every two seconds where it is, one JSON line over
TCP; rank 0's thread judges (``verdicts.py``) and tells all; the others judge rank 0 by its answers.
"""

import faulthandler
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
from collections.abc import Generator
from contextlib import contextmanager, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from . import launched, verdicts
from .runtime import RuntimeSetupError, from_main, gather, place, several_ranks
from .verdicts import EXIT_HANG, Beat

_EVERY = 2.0  # seconds between two beats
_LONGEST_LINE = 16384
_TIME_FOR_THE_CAUSE = 2.0  # seconds in which a rank that failed waits for news of a dead one, which would be the cause


class _Line:
    """A TCP connection that carries JSON objects, one a line."""

    def __init__(self, sock: socket.socket) -> None:
        sock.settimeout(5)
        self.sock, self.rest, self.rank = sock, b"", -1

    def send(self, **words: Any) -> None:
        """Send one object. A peer that does not take it is judged by its silence."""
        with suppress(OSError):
            self.sock.sendall(json.dumps(words).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]] | None:
        """The objects that have come, or None when the peer is gone or speaks something else."""
        try:
            data = self.sock.recv(65536)
        except TimeoutError:
            return []
        except OSError:
            return None
        *lines, self.rest = (self.rest + data).split(b"\n")
        if not data or len(self.rest) > _LONGEST_LINE:
            return None
        try:
            words: list[Any] = [json.loads(line) for line in lines]
        except ValueError:
            return None
        return words if all(isinstance(word, dict) for word in words) else None


class Heartbeat:
    """This rank's part of the watch; ``enter`` is all that training calls."""

    def __init__(self, rank: int, world: int, limit: float, dump: Path) -> None:
        self.rank, self.world, self.limit, self.dump = rank, world, limit, dump
        self.mine = Beat(rank, socket.gethostname(), os.getpid())
        self.since = time.monotonic()
        self.failing = self.leaving = False
        self.peers: dict[int, _Line] = {}
        self.beats: dict[int, tuple[Beat, float]] = {}  # with the time at which it was heard
        self.server: socket.socket | None = None
        self.thread = threading.Thread(target=self._guard, name="finebridge_heartbeat", daemon=True)

    def enter(self, phase: str, step: int | None = None) -> None:
        """Training has come to ``phase``; ``step`` is the number of finished optimizer steps, when it has changed."""
        mine = self.mine
        if step is not None and step != mine.step:
            mine = replace(mine, step=step, micro=0, turn=0, fresh=mine.phase == "start")
        self.since = time.monotonic()
        self.mine = replace(mine, phase=phase, turn=mine.turn + 1, micro=mine.micro + (phase == "forward"))

    def fail(self, error: BaseException) -> None:
        """Tell the others that this rank ends with an error, unless a dead rank is the cause: then this does not return."""
        self.failing = True
        time.sleep(_TIME_FOR_THE_CAUSE)
        self._tell(**asdict(self.here()))
        self._tell(failed=f"{type(error).__name__}: {error}"[:2000])

    def leave(self) -> None:
        """Say goodbye: from here on this rank may be gone."""
        self.leaving = True
        self._tell(bye=True)

    def _tell(self, **words: Any) -> None:
        for line in list(self.peers.values()):
            line.send(**words)

    def here(self) -> Beat:
        """Where this rank is now."""
        return replace(self.mine, still=time.monotonic() - self.since)

    def listen(self, host: str) -> tuple[str, int]:
        """Rank 0 opens a port where the others reach it, on one machine only from there; the address to connect to.

        On several machines the others reach rank 0 by ``host``, as torch's store does; its own idea of that name's
        address may be another (127.0.1.1), so it listens on all.
        """
        if os.environ.get("LOCAL_WORLD_SIZE") == str(self.world):
            host = "127.0.0.1"
            self.server = socket.create_server((host, 0), backlog=1024)
        elif socket.has_dualstack_ipv6():
            self.server = socket.create_server(("", 0), family=socket.AF_INET6, dualstack_ipv6=True, backlog=1024)
        else:
            self.server = socket.create_server(("", 0), backlog=1024)
        return host, int(self.server.getsockname()[1])

    def connect(self, host: str, port: int, token: str) -> None:
        """Join rank 0. Raises OSError."""
        line = _Line(socket.create_connection((host, port), timeout=20))
        line.rank = 0
        line.send(token=token, **asdict(self.mine))
        self.peers[0] = line

    def start(self, token: str) -> None:
        """Watch from now on."""
        self.token = token
        os.register_at_fork(after_in_child=self._close)  # else a worker that outlives the rank would keep its line open
        now = time.monotonic()
        others = range(1, self.world) if self.rank == 0 else [0]
        self.beats = {rank: (Beat(rank), now) for rank in others}
        self.thread.start()

    def _close(self) -> None:
        for line in self.peers.values():
            line.sock.close()
        if self.server:
            self.server.close()

    def _guard(self) -> None:
        every = min(_EVERY, self.limit / 5)
        waiting = selectors.DefaultSelector()
        for line in self.peers.values():
            waiting.register(line.sock, selectors.EVENT_READ, line)
        if self.server:
            waiting.register(self.server, selectors.EVENT_READ)
        told = awake = time.monotonic()
        while True:
            for key, _ in waiting.select(every / 2):
                line: _Line | None = key.data
                if line is None:
                    if self.server:
                        sock, _ = self.server.accept()
                        waiting.register(sock, selectors.EVENT_READ, _Line(sock))
                elif (words := line.receive()) is None or not all(self._heard(line, word) for word in words):
                    waiting.unregister(line.sock)
                    self._gone(line)
            now = time.monotonic()
            if now - awake > max(5.0, 3 * every):  # this process itself was stopped: it knows nothing of that time
                self.beats = {rank: (beat, now) for rank, (beat, _) in self.beats.items()}
            awake = now
            if now - told >= every:
                told = now
                self._tell(**asdict(self.here()))
            if verdict := self._judge(now):
                launched.note(hung=True)
                self._end(verdict)

    def _judge(self, now: float) -> str | None:
        if self.leaving or self.failing:
            return None
        beats = {
            rank: replace(beat, silent=now - at, still=beat.still + now - at) for rank, (beat, at) in self.beats.items()
        }
        if self.rank == 0:
            beats[0] = self.here()
        return verdicts.judge(beats, self.limit)

    def _heard(self, line: _Line, word: dict[str, Any]) -> bool:
        """Read one line of a peer: its beat, its goodbye or a verdict. False for a stranger, who has not the token."""
        if line.rank < 0:
            if not secrets.compare_digest(str(word.pop("token", "")), self.token) or word.get("rank") not in self.beats:
                return False
            line.rank = int(word["rank"])
            self.peers[line.rank] = line
        rank = line.rank
        if word.get("bye"):
            self.beats.pop(rank, None)
        elif "verdict" in word:
            self._end(str(word["verdict"]))
        elif rank in self.beats and "failed" in word:
            beat, _ = self.beats.pop(rank)
            if not (self.failing or self.leaving):
                self._end(verdicts.failed(beat, str(word["failed"])))
        elif rank in self.beats:
            known = self.beats[rank][0]
            fields = {name: word[name] for name in asdict(known) if name in word}
            self.beats[rank] = (replace(known, **fields), time.monotonic())
        return True

    def _gone(self, line: _Line) -> None:
        """A connection broke; that of a rank which has not said goodbye means its death."""
        line.sock.close()
        self.peers.pop(line.rank, None)
        if line.rank in self.beats and not self.leaving:
            beat, at = self.beats.pop(line.rank)
            self._end(verdicts.dead(replace(beat, silent=time.monotonic() - at)))

    def _end(self, verdict: str) -> None:
        """Say the verdict once on each machine, keep where this rank was, tell the others, end the process.

        A rank that the verdict is about because it failed ends by itself, with its traceback.
        """
        if self.failing and verdict.startswith(f"rank {self.rank} "):
            return  # its own error is about to be told in full
        about_0 = verdict.startswith("rank 0 ")
        if os.environ.get("LOCAL_RANK", "0") == "0" or (about_0 and self.rank == 1):
            print(
                f"error: {verdict}. All ranks end; where each of them was is in {self.dump}",
                file=sys.stderr,
                flush=True,
            )
        with suppress(OSError):
            self.dump.mkdir(parents=True, exist_ok=True)
            with (self.dump / f"rank-{self.rank}.txt").open("w", encoding="utf-8") as stream:
                stream.write(f"{verdict}\n{self.here()}\n")
                stream.flush()
                faulthandler.dump_traceback(stream)
        launched.note(verdict=verdict[:300])
        self._tell(verdict=verdict)
        until = time.monotonic() + 1
        for line in list(self.peers.values()):  # closing before they have read it could take the verdict from them
            line.sock.settimeout(max(0.01, until - time.monotonic()))
            while self.rank == 0 and line.receive():
                pass
        os._exit(EXIT_HANG)


_current: Heartbeat | None = None


def start(limit: float, output_dir: Path) -> None:
    """Begin to watch, on every rank, when the process group stands. ``limit`` is in seconds, 0 is off.

    Raises RuntimeSetupError on all ranks when one cannot reach rank 0.
    """
    global _current  # noqa: PLW0603 - a process is one rank and has one watch
    if limit <= 0 or not several_ranks():
        return
    rank, world = place()
    beat = Heartbeat(rank, world, limit, output_dir / "hang")
    address: tuple[Any, ...] = ()
    if rank == 0:
        address = (*beat.listen(os.environ.get("MASTER_ADDR", "127.0.0.1")), secrets.token_hex(16))
    host, port, token = from_main(address)
    why = ""
    if rank > 0:
        try:
            beat.connect(host, port, token)
        except OSError as error:
            why = f"rank {rank} ({socket.gethostname()}) cannot reach {host}:{port}: {error}"
    if said := next(filter(None, gather(why)), None):
        raise RuntimeSetupError(
            f"the ranks watch each other over TCP, but {said}. Open the network between the machines for all ports, or "
            "turn the watch off with --heartbeat_timeout 0"
        )
    beat.start(token)
    _current = beat


def enter(phase: str, step: int | None = None) -> None:
    """Training has come to ``phase``, one of those in ``verdicts.py``, or save, evaluate, leaving; see Heartbeat.enter."""
    if step is not None:
        launched.note(step=step)
    if _current:
        _current.enter(phase, step)


@contextmanager
def told() -> Generator[None]:
    """While this lasts the other ranks learn of an error that ends this one; after it, that it is gone."""
    try:
        yield
    except Exception as error:
        if _current:
            _current.fail(error)
        raise
    finally:
        if _current:
            _current.leave()
