"""One node of a run: starts the node's ranks, tells how they end, and ends them when the launching side is gone.

Started by ``remote.py`` through ssh, pdsh or srun:  ``python -P -m finebridge.finetune.node_launcher JOB [HOST]``.
JOB is the word of ``job.py``, or ``-`` when it comes as the first line of standard input.
"""

import json
import os
import select
import socket
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from .beats import listen_to
from .interface import lead_gloo
from .launch import Share, Stop, run_share
from .node_job import Job
from .nodes import NodesError
from .rank_logs import RankLogs

BEAT_EVERY, SILENCE = (
    5.0,
    40.0,
)  # seconds between two beats of the launching side, and without one until it counts as gone
EXIT_BAD_INPUT = 2
STOP, BEAT = b"stop\n", b"beat\n"


def main(argv: Sequence[str] | None = None) -> int:
    """Run the ranks of this node; 0 when it could tell how they ended, whatever that was."""
    source, *host = sys.argv[1:] if argv is None else argv
    try:
        job = Job.decode(_line() if source == "-" else source)
        number = _number(job, host[0] if host else os.environ.get("SLURMD_NODENAME", ""))
        os.chdir(job.folder)
        logs = RankLogs(Path(job.logs))
        logs.folder.mkdir(parents=True, exist_ok=True)
    except NodesError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    except OSError as error:
        print(f"error: {error.filename}: {error.strerror}; every node needs the same paths", file=sys.stderr)
        return EXIT_BAD_INPUT
    try:
        line = listen_to(job.beats, job.mark) if job.beats and source != "-" else None
    except OSError as error:
        place = "{}:{}".format(*job.beats or ())
        print(f"error: the launching side does not answer at {place}: {error.strerror or error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    stop = Stop(job.stop_grace)
    threading.Thread(target=_listen, args=(stop, line, source == "-"), daemon=True).start()
    _tell(job, logs, number, started=os.getpid())
    ended = run_node(job, number, stop, logs, lambda _: None)  # the launching side tells of a stop
    _tell(job, logs, number, **asdict(ended))
    return 0


@dataclass(frozen=True, slots=True)
class Report:
    """How the ranks of one node ended: as ``Ended``, with the failed rank's log on its node and its last lines."""

    code: int
    rank: int | None = None
    why: str = ""
    step: int | None = None
    diverged: bool = False
    verdict: str = ""
    hung: bool = False
    asked: bool = False
    log: str = ""
    tail: list[str] = field(default_factory=list[str])


def run_node(job: Job, number: int, stop: Stop, logs: RankLogs, tell: Callable[[str], None]) -> Report:
    """Run the ranks of node ``number`` with the job's environment, and this Python's tools (ninja) on the PATH."""
    os.environ.update(job.env)
    lead_gloo(job)
    os.environ["PATH"] = os.pathsep.join(filter(None, [str(Path(sys.executable).parent), os.environ.get("PATH", "")]))
    share = Share(job.nodes[number][1], job.first_rank(number), job.world, job.master, job.port)
    ended = run_share(job.module, job.argv, share, stop, tell, logs)
    logs.finish()
    report = Report(ended.code, None, "", ended.step, ended.diverged, ended.verdict, ended.hung, ended.asked)
    if ended.rank is None:
        return report
    tail = logs.tail(ended.rank) if ended.rank != logs.shown else []  # the lines of that one were all seen
    log = str(logs.path(ended.rank).absolute())
    return replace(report, rank=ended.rank, why=ended.why, log=log, tail=tail)


def _tell(job: Job, logs: RankLogs, number: int, **words: Any) -> None:
    """One line for the launching side, JSON behind the job's mark."""
    logs.say(1, f"{job.mark}{json.dumps({'node': number, **words})}\n".encode())


def _line() -> bytes:
    """The first line of standard input, and not a byte more: the rest is for ``_listen``."""
    with open(0, "rb", buffering=0, closefd=False) as stream:
        return stream.readline().strip()


def _number(job: Job, host: str) -> int:
    """Which node this is. Raises NodesError."""
    hosts = [name for name, _ in job.nodes]
    if host not in hosts:
        raise NodesError(f"this node is called {host!r}, which is none of {', '.join(hosts)}")
    return hosts.index(host)


def _listen(stop: Stop, line: socket.socket | None, fed: bool) -> None:
    """Hear from the launching side, on standard input and the line of its beats. Without it the ranks are ended.

    It is gone when one of them is closed, or silent for SILENCE seconds where it beats.
    """
    sources = [0, *([line.fileno()] if line else [])]
    while True:
        ready = select.select(sources, [], [], SILENCE if fed or line else None)[0]
        try:
            words = [os.read(source, 65_536) for source in ready]
        except OSError:  # the connection was broken off
            words = []
        if not words or b"" in words:
            stop.now = True
            return
        if any(STOP in heard for heard in words):
            stop.began = time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
