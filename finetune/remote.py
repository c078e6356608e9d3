"""The launching side of a run on several nodes: starts them, shows what matters, ends all of them when one is lost.

Rank 0's lines are shown as they are. All else is in a log file for each rank on its node; of the rank that failed first the
last lines are shown, with node and rank.
"""

import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

from ..train.verdicts import EXIT_HANG
from .advice import advice
from .beats import Beats
from .connect import Start
from .launch import EXIT_STOPPED, EXIT_UNREACHED, Ended, Stop, say
from .node_job import Job
from .node_launcher import BEAT, BEAT_EVERY, STOP, Report

_START_WITHIN = 120.0  # seconds for ssh, and for Python to begin on a node
_END_WITHIN = 20.0  # seconds for the nodes to end their ranks, before the connections are cut
_CAUSE_WITHIN = 10.0  # seconds in which a rank that failed, and writes its traceback, may follow those that noticed it
_NAMED = re.compile(rb"(?:pdsh@\S+|srun: error): (\S+): (?:ssh|tasks? \S+:) [Ee]xited with exit code (\d+)")


class Remote:
    """A run on several nodes. ``run`` starts it and waits; it is used once."""

    def __init__(self, job: Job, starts: Sequence[Start], beats: Beats | None = None) -> None:
        self.job, self.starts, self.beats = job, starts, beats
        self.stop = Stop(job.stop_grace)
        self.processes: list[subprocess.Popen[bytes]] = []
        self.readers: list[threading.Thread] = []
        self.started: set[int] = set()
        self.ended: dict[int, Report] = {}
        self.said: list[bytes] = [b"" for _ in starts]  # the last errors of each start
        self._news: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._mark = job.mark.encode()
        self._began = self._beaten = time.monotonic()
        self._stop_passed_on = False

    def run(self) -> Ended:
        """How it ended; the code is 0, that of the first rank that failed, 75 for a lost node, 2 for one never reached."""
        previous = signal.signal(signal.SIGTERM, self.stop.asked)
        in_order = False
        try:
            if self.beats:
                self.beats.start(self.job.mark)
            for number in range(len(self.starts)):
                self._start(number)
            ended = self._watch()
            in_order = ended.code in (0, EXIT_STOPPED)
        except KeyboardInterrupt:
            say("interrupted: stopping the ranks on all nodes")
            ended = Ended(128 + (signal.SIGTERM if self.stop.began else signal.SIGINT))
        finally:
            self._end(in_order)
            signal.signal(signal.SIGTERM, previous)
        self._hear(0.0)  # how far the ranks had come that were ended
        ended = self._with_notes(ended)
        if ended.code == EXIT_HANG and ended.lost and ended.step is not None:
            say(f"{', '.join(ended.lost)}: lost at step {ended.step + 1}")
        return ended

    def _with_notes(self, ended: Ended) -> Ended:
        """With what the nodes' first ranks had noted."""
        told = self.ended.values()
        return replace(
            ended,
            step=max((one.step for one in told if one.step is not None), default=None),
            diverged=any(one.diverged for one in told),
            verdict=next((one.verdict for one in told if one.verdict), ""),
            asked=bool(self.stop.began) or any(one.asked for one in told),
        )

    def _start(self, number: int) -> None:
        start = self.starts[number]
        command = start.command
        if not start.fed:  # nothing that it reads would tell it that we are gone
            command = [sys.executable, "-P", "-m", "finebridge.train.orphans", str(os.getpid()), *command]
        process = subprocess.Popen(  # noqa: S603 - an argument list, no shell
            command,
            env={**os.environ, **start.env},
            stdin=subprocess.PIPE if start.fed else subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,  # Ctrl-C is for us, who tell the nodes; and no prompt finds a terminal
        )
        self.processes.append(process)
        for stream, to in ((process.stdout, 1), (process.stderr, 2)):
            if stream is not None:
                self.readers.append(threading.Thread(target=self._read, args=(number, stream, to), daemon=True))
                self.readers[-1].start()
        self._feed(process, self.job.encode().encode() + b"\n")

    def _feed(self, process: subprocess.Popen[bytes], words: bytes) -> None:
        """Write to a start that listens; one that has ended is found by its end."""
        if process.stdin is not None:
            with suppress(OSError):
                process.stdin.write(words)
                process.stdin.flush()

    def _watch(self) -> Ended:
        """Wait until all nodes are done, or one has failed; how it ended."""
        while True:
            self._hear(0.2)
            now = time.monotonic()
            if now - self._beaten > BEAT_EVERY:
                self._beaten = now
                self._tell_all(BEAT)
            if self.stop.began and not self._stop_passed_on:
                self._pass_on_stop()
            if bad := {number: told for number, told in self.ended.items() if told.code not in (0, EXIT_STOPPED)}:
                return self._failed(bad)
            if len(self.ended) == len(self.job.nodes):
                break
            if lost := self._lost():
                return self._tell_lost(lost)
            if now - self._began > _START_WITHIN and (late := self._not_started()):
                why = f"{', '.join(late)} has not started within {_START_WITHIN:.0f} s"
                say(f"error: {why}; the run stops")
                return Ended(EXIT_UNREACHED, why=why, lost=late)
            if self.stop.began and now > self.stop.began + self.stop.grace + _END_WITHIN:
                say("error: the ranks did not stop in time; they are ended, see the last checkpoint")
                return Ended(EXIT_STOPPED)
        for why in {told.why for told in self.ended.values() if told.why}:
            say(f"error: {why}")
        return Ended(EXIT_STOPPED if any(told.code for told in self.ended.values()) else 0)

    def _pass_on_stop(self) -> None:
        """The ranks agree to stop after the same step, so that it is enough when one node hears of it."""
        self._stop_passed_on = True
        say(
            f"SIGTERM: the ranks save a checkpoint when this step is done, within {self.stop.grace:.0f} s (--stop_grace); "
            "a second SIGTERM or Ctrl-C ends them at once"
        )
        self._tell_all(STOP)

    def _tell_all(self, words: bytes) -> None:
        for process in self.processes:
            self._feed(process, words)
        if self.beats:
            self.beats.send(words)

    def _hear(self, seconds: float) -> None:
        """Take in what the nodes have reported, for at most so long."""
        with suppress(queue.Empty):
            while True:
                words = self._news.get(timeout=seconds)
                seconds = 0.0
                number = int(words.pop("node"))
                if words.pop("started", None):
                    self.started.add(number)
                else:
                    self.ended[number] = Report(**words)

    def _failed(self, bad: dict[int, Report]) -> Ended:
        """Tell of the rank that failed first; ranks that noticed that another is gone (75) come after the cause.

        One that hangs does not end, so nothing more is waited for when that was found.
        """
        until = time.monotonic() + _CAUSE_WITHIN
        while all(told.code == EXIT_HANG and not told.hung for told in bad.values()) and time.monotonic() < until:
            if len(self.ended) == len(self.job.nodes):
                break
            self._hear(0.1)
            if lost := self._lost():
                return self._tell_lost(lost)
            bad |= {n: told for n, told in self.ended.items() if told.code not in (0, EXIT_STOPPED)}
        number, told = min(bad.items(), key=lambda one: (one[1].code == EXIT_HANG, list(self.ended).index(one[0])))
        host = self.job.nodes[number][0]
        tell_failed(told, host)
        return Ended(told.code, told.rank, failure(told, host))

    def _lost(self) -> list[tuple[int, int, int]]:
        """The nodes that have ended before they told how their ranks ended: number, that of their start, exit code."""
        if not self._gone():
            return []
        self._join(2.0)
        self._hear(0.0)
        return self._gone()

    def _gone(self) -> list[tuple[int, int, int]]:
        """The nodes without a report whose connection has ended; where pdsh or srun names some, those."""
        found: list[tuple[int, int, int]] = []
        for number, (start, process) in enumerate(zip(self.starts, self.processes, strict=True)):
            hosts = {self.job.nodes[node][0].encode(): node for node in start.nodes}
            told = _NAMED.findall(self.said[number])
            named = {hosts[host]: int(code) for host, code in told if host in hosts and hosts[host] not in self.ended}
            code = process.poll()
            ended = {} if code is None else {node: code for node in start.nodes if node not in self.ended}
            found += [(node, number, code) for node, code in (named or ended).items()]
        return found

    def _tell_lost(self, gone: list[tuple[int, int, int]]) -> Ended:
        """Tell of the first of the nodes that are gone; the others that are in the same case are named with it."""
        node, number, code = gone[0]
        host = self.job.nodes[node][0]
        began = node in self.started
        alike = tuple(dict.fromkeys(self.job.nodes[one][0] for one, *_ in gone if (one in self.started) == began))
        if began:
            why = f"{', '.join(alike)} was lost (exit code {code})"
            say(f"error: {why}, and with it {self._ranks_on(alike)}; the run stops")
            return Ended(EXIT_HANG, why=why, lost=alike)
        said = self.said[number].decode(errors="replace")
        if not self.starts[number].fed:
            said = "\n".join(line for line in said.splitlines() if host in line)
        known = advice(said)
        why = known[2] if known else "its own words stand above"
        say(f"error: {', '.join(alike)} could not be started (exit code {code}): {why}")
        return Ended(EXIT_UNREACHED, why=f"{', '.join(alike)} could not be started", lost=alike)

    def _ranks_on(self, hosts: tuple[str, ...]) -> str:
        firsts = [
            (self.job.first_rank(node), slots) for node, (host, slots) in enumerate(self.job.nodes) if host in hosts
        ]
        spans = [f"{first}" if slots == 1 else f"{first} to {first + slots - 1}" for first, slots in firsts]
        return ("rank " if spans == [str(firsts[0][0])] else "ranks ") + ", ".join(spans)

    def _not_started(self) -> tuple[str, ...]:
        begun = self.started | self.ended.keys()
        return tuple(host for node, (host, _) in enumerate(self.job.nodes) if node not in begun)

    def _read(self, number: int, stream: IO[bytes], to: int) -> None:
        """Show what comes from a start, but for the reports of its nodes."""
        rest = b""
        while content := os.read(stream.fileno(), 65_536):
            *lines, rest = re.split(rb"(?<=\n)|(?<=\r)(?!\n)", rest + content)
            for line in lines:
                self._line(number, line, to)
        if rest:
            self._line(number, rest, to)

    def _line(self, number: int, line: bytes, to: int) -> None:
        text, mark, words = line.partition(self._mark)
        if mark:
            with suppress(ValueError):  # cut short: its node was killed as it wrote
                self._news.put(json.loads(words))
        elif to == 2:  # noqa: PLR2004 - standard error
            self.said[number] = (self.said[number] + line)[-16_384:]
        self._show(self.starts[number], text, to)

    def _show(self, start: Start, text: bytes, to: int) -> None:
        """Rank 0's node without its name; pdsh names each node itself, at the beginning of a line."""
        name, first = self.job.nodes[start.nodes[0]][0].encode() + b": ", self.job.nodes[0][0].encode() + b": "
        if not start.fed:
            text = text.removeprefix(first)
            if any(text == host.encode() + b": " for host, _ in self.job.nodes):
                return
        elif 0 not in start.nodes and text:
            text = name + text
        with suppress(OSError):  # whoever read our output has seen enough
            while text:
                text = text[os.write(to, text) :]

    def _end(self, in_order: bool) -> None:
        """End every node: a closed connection tells its launcher to. What does not end in time is cut off."""
        if self.beats:
            self.beats.close()
        for start, process in zip(self.starts, self.processes, strict=False):
            if process.stdin is not None:
                with suppress(OSError):
                    process.stdin.close()
            if not start.fed and not in_order:
                for pid in _children(process.pid):  # pdsh leaves its ssh alone, and one whose node is lost waits for it
                    with suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
                process.kill()
        until = time.monotonic() + _END_WITHIN
        for process in self.processes:
            try:
                process.wait(max(0.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._join(2.0)

    def _join(self, within: float) -> None:
        """Wait for what the starts that have ended still say."""
        until = time.monotonic() + within
        for number, reader in enumerate(self.readers):
            if self.processes[number // 2].poll() is not None:
                reader.join(max(0.0, until - time.monotonic()))


def _children(pid: int) -> list[int]:
    """The processes that a process of ours, which still runs, has started (Linux)."""
    found: list[int] = []
    for task in Path(f"/proc/{pid}/task").glob("*/children"):
        with suppress(OSError):  # a thread that has ended
            found += map(int, task.read_text().split())
    return found


def tell_failed(told: Report, host: str) -> None:
    """Say which rank failed and where, with its last lines. Rank 0 has told of a rank that hangs in words of its own."""
    if told.code == EXIT_HANG and told.rank == 0:
        return
    tail = "".join(f"[{host} rank {told.rank}] {line}\n" for line in told.tail)
    say(f"{tail}error: {failure(told, host)}; the run stops")
    if told.log:
        say(f"its log is {told.log} on {host}")


def failure(told: Report, host: str) -> str:
    """Which rank failed, where and how, in a few words."""
    rank = f"rank {told.rank} on {host}" if told.rank is not None else host
    why = told.why.removeprefix(f"rank {told.rank} ") if told.why else f"ended with exit code {told.code}"
    return f"{rank} {why}"
