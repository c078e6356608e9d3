"""One node of a run: starts the node's ranks, tells how they end, and ends them when the launching side is gone.

Started by ``remote.py`` through ssh, pdsh or srun:  ``python -P -m finebridge.finetune.node_launcher JOB [HOST]``.
JOB is the word of ``job.py``, or ``-`` when it comes as the first line of standard input.
"""

import json
import os
import select
import sys
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

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
    stop = Stop(job.stop_grace)
    threading.Thread(target=_listen, args=(stop, source == "-"), daemon=True).start()
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
    if ended.rank is None:
        return Report(ended.code)
    tail = logs.tail(ended.rank) if ended.rank != logs.shown else []  # the lines of that one were all seen
    return Report(ended.code, ended.rank, ended.why, str(logs.path(ended.rank).absolute()), tail)


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


def _listen(stop: Stop, beats: bool) -> None:
    """Hear from the launching side. Without it, for SILENCE seconds when it beats, the ranks are ended."""
    while True:
        ready = select.select([0], [], [], SILENCE if beats else None)[0]
        words = os.read(0, 65_536) if ready else b""
        if not words:
            stop.now = True
            return
        if STOP in words:
            stop.began = time.monotonic()


if __name__ == "__main__":
    sys.exit(main())
