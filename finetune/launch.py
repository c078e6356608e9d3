"""Start the ranks of a run on this machine, and end all of them when one ends badly.

Launching starts processes (``python -m finebridge.train.sft``); it imports neither torch nor the trainer.
"""

import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from ..train.launched import NOTES, Notes
from ..train.orphans import LAUNCHER
from ..train.verdicts import EXIT_HANG
from .rank_logs import RankLogs

STOP_GRACE = 600.0  # seconds that a checkpoint may take after SIGTERM
_GRACE_SECONDS = 2.0
_SIGNAL_EXIT = 128
EXIT_STOPPED = _SIGNAL_EXIT + signal.SIGTERM
EXIT_UNREACHED = 2


def gpu_count() -> int:
    """GPUs that a run on this machine would see: ``CUDA_VISIBLE_DEVICES``, else what ``nvidia-smi -L`` lists."""
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return len([part for part in visible.split(",") if part.strip() not in ("", "-1")])
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return 0
    listed = subprocess.run([tool, "-L"], capture_output=True, text=True, check=False)  # noqa: S603 - a fixed argument list
    return sum(line.startswith("GPU ") for line in listed.stdout.splitlines()) if listed.returncode == 0 else 0


@dataclass(frozen=True, slots=True)
class Share:
    """This machine's part of a run: ``processes`` ranks from ``first`` on, of ``world``, that meet at ``master``:``port``."""

    processes: int
    first: int
    world: int
    master: str
    port: int


@dataclass(frozen=True, slots=True)
class Ended:
    """How a run ended, here or on all nodes: its exit code, the rank that failed and why, when that should be told.

    ``step``, ``diverged``, ``verdict`` and ``hung`` are what a machine's first rank had noted (``train/launched.py``);
    ``hung``: it found itself that a rank is silent or stuck, and not dead. ``asked``: to stop, by SIGTERM. ``lost`` are the
    hosts that were lost, or with ``EXIT_UNREACHED`` never reached.
    """

    code: int
    rank: int | None = None
    why: str = ""
    step: int | None = None
    diverged: bool = False
    verdict: str = ""
    hung: bool = False
    asked: bool = False
    lost: tuple[str, ...] = ()


class Stop:
    """What the launcher was asked (by SIGTERM, or ``now``), and until when the ranks have time for it."""

    def __init__(self, grace: float) -> None:
        self.grace, self.began, self.now = grace, 0.0, False

    def asked(self, _signal: int, _frame: object) -> None:
        """The handler of SIGTERM."""
        if self.began:
            raise KeyboardInterrupt
        self.began = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the ranks' time is up."""
        return bool(self.began) and time.monotonic() > self.began + self.grace


def run_ranks(module: str, argv: Sequence[str], processes: int, stop_grace: float = STOP_GRACE) -> int:
    """``run_all``; its exit code."""
    return run_all(module, argv, processes, stop_grace).code


def run_all(module: str, argv: Sequence[str], processes: int, stop_grace: float) -> Ended:
    """Run ``python -P -m module argv`` as ranks 0 to ``processes`` - 1, all of a run, and tell how it ended.

    Arguments reach the ranks as a list, no shell reads them. When a rank fails, or on Ctrl-C, the others get SIGTERM and
    after 2 s SIGKILL; the code is that of the rank that failed first. SIGTERM is passed on, and the ranks get
    ``stop_grace`` seconds to save a checkpoint and end; a second one ends them as Ctrl-C does. When the launcher itself is
    killed the ranks end too (``train/orphans.py``).
    """
    share = Share(processes, 0, processes, "127.0.0.1", free_port("127.0.0.1"))
    ended = run_share(module, argv, share, Stop(stop_grace), say)
    if ended.why:
        say(f"error: {ended.why}; the run stops")
    return ended


def run_share(
    module: str,
    argv: Sequence[str],
    share: Share,
    stop: Stop,
    tell: Callable[[str], None],
    logs: RankLogs | None = None,
) -> Ended:
    """Run this machine's ranks as ``run_all`` does; what is not about one rank is told. Their output goes into ``logs``."""
    ranks: list[subprocess.Popen[bytes]] = []
    notes = Notes()
    previous = signal.signal(signal.SIGTERM, stop.asked)
    try:
        for local in range(share.processes):
            env, command = _env(share, local), [sys.executable, "-P", "-m", module, *argv]
            inherited = [] if local else [notes.number]
            if inherited:
                env[NOTES] = str(notes.number)
            ranks.append(
                logs.start(share.first + local, command, env, inherited)
                if logs
                else subprocess.Popen(command, env=env, pass_fds=inherited)  # noqa: S603 - no shell
            )
        ended = _wait(ranks, stop, share.first, tell)
    except KeyboardInterrupt:
        tell("interrupted: stopping the ranks")
        ended = Ended(_SIGNAL_EXIT + (signal.SIGTERM if stop.began else signal.SIGINT))
    finally:
        _end(ranks)
        signal.signal(signal.SIGTERM, previous)
        noted = notes.read()
    return replace(ended, asked=bool(stop.began), **noted)


def say(text: str) -> None:
    """Tell the user, on standard error."""
    print(text, file=sys.stderr, flush=True)


def free_port(host: str) -> int:
    """A port that is free on this machine at an address, "" for all of them."""
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _env(share: Share, local: int) -> dict[str, str]:
    """The environment of a rank."""
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // share.processes))
    return {
        **os.environ,
        **_cpu_only(),
        "RANK": str(share.first + local),
        "LOCAL_RANK": str(local),
        "WORLD_SIZE": str(share.world),
        "LOCAL_WORLD_SIZE": str(share.processes),
        "MASTER_ADDR": share.master,
        "MASTER_PORT": str(share.port),
        "OMP_NUM_THREADS": threads,
        "PYTHONUNBUFFERED": "1",  # losses reach a log file when they are printed
        LAUNCHER: str(os.getpid()),
    }


def _cpu_only() -> dict[str, str]:
    """Without a GPU DeepSpeed need not look for one, and warn on every rank that it found none."""
    return {} if gpu_count() or "DS_ACCELERATOR" in os.environ else {"DS_ACCELERATOR": "cpu"}


def _wait(ranks: Sequence[subprocess.Popen[bytes]], stop: Stop, first: int, tell: Callable[[str], None]) -> Ended:
    """Wait until all ranks are done, one has failed, or a stop takes too long."""
    passed_on = False
    while True:
        time.sleep(0.1)
        codes = [rank.poll() for rank in ranks]
        if not passed_on and (stop.began or EXIT_STOPPED in codes):
            passed_on, stop.began = True, stop.began or time.monotonic()
            tell(
                f"SIGTERM: the ranks save a checkpoint when this step is done, within {stop.grace:.0f} s (--stop_grace); "
                "a second SIGTERM or Ctrl-C ends them at once"
            )
            for rank in ranks:
                if rank.poll() is None:
                    rank.terminate()
        in_order = (None, 0, EXIT_STOPPED, -signal.SIGTERM) if passed_on else (None, 0)
        if any(code not in in_order for code in codes):
            return _failed(ranks, first)
        if None not in codes:
            return Ended(EXIT_STOPPED if any(codes) else 0)
        if stop.now:
            return Ended(_SIGNAL_EXIT + signal.SIGINT)
        if stop.over:
            return Ended(EXIT_STOPPED, why="the ranks did not stop in time and are ended, see the last checkpoint")


def _failed(ranks: Sequence[subprocess.Popen[bytes]], first: int) -> Ended:
    """The rank that failed, with its exit code (128 + signal when it was killed), and why if its output does not tell.

    Ranks that found another one missing end with EXIT_HANG; that one may need a moment to end, and its code tells more.
    """
    until = time.monotonic() + _GRACE_SECONDS
    while True:
        codes = {number: code for number, rank in enumerate(ranks) if (code := rank.poll())}
        causes = {number: code for number, code in codes.items() if code != EXIT_HANG}
        if causes or len(codes) == len(ranks) or time.monotonic() > until:
            break
        time.sleep(0.05)
    number, code = min((causes or codes).items())
    rank, why = first + number, ""
    if code < 0:
        name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
        why = f"rank {rank} was ended by {name}" + (" (out of memory?)" if name == "SIGKILL" else "")
    elif rank > 0 and code != EXIT_HANG:
        why = f"rank {rank} ended with exit code {code}"
    return Ended(code if code > 0 else _SIGNAL_EXIT - code, rank, why)


def _end(ranks: Sequence[subprocess.Popen[bytes]]) -> None:
    for rank in ranks:
        if rank.poll() is None:
            rank.terminate()
    deadline = time.monotonic() + _GRACE_SECONDS
    for rank in ranks:
        try:
            rank.wait(max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            rank.kill()
            rank.wait()
