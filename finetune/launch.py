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
from collections.abc import Sequence

from ..train.orphans import LAUNCHER
from ..train.verdicts import EXIT_HANG

STOP_GRACE = 600.0  # seconds that a checkpoint may take after SIGTERM
_GRACE_SECONDS = 2.0
_SIGNAL_EXIT = 128
EXIT_STOPPED = _SIGNAL_EXIT + signal.SIGTERM


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


def run_ranks(module: str, argv: Sequence[str], processes: int, stop_grace: float = STOP_GRACE) -> int:
    """Run ``python -P -m module argv`` as ranks 0 to ``processes`` - 1; the exit code of the run.

    Arguments reach the ranks as a list, no shell reads them. When a rank fails, or on Ctrl-C, the others get SIGTERM and
    after 2 s SIGKILL; the code is that of the rank that failed first. SIGTERM is passed on, and the ranks get
    ``stop_grace`` seconds to save a checkpoint and end; a second one ends them as Ctrl-C does. When the launcher itself is
    killed the ranks end too (``train/orphans.py``).
    """
    port = _free_port()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // processes))
    ranks: list[subprocess.Popen[bytes]] = []
    stop = _Stop(stop_grace)
    previous = signal.signal(signal.SIGTERM, stop.asked)
    try:
        for rank in range(processes):
            env = {
                **os.environ,
                **_cpu_only(),
                "RANK": str(rank),
                "LOCAL_RANK": str(rank),
                "WORLD_SIZE": str(processes),
                "LOCAL_WORLD_SIZE": str(processes),
                "MASTER_ADDR": "127.0.0.1",
                "MASTER_PORT": str(port),
                "OMP_NUM_THREADS": threads,
                "PYTHONUNBUFFERED": "1",  # losses reach a log file when they are printed
                LAUNCHER: str(os.getpid()),
            }
            ranks.append(subprocess.Popen([sys.executable, "-P", "-m", module, *argv], env=env))  # noqa: S603 - no shell
        return _wait(ranks, stop)
    except KeyboardInterrupt:
        print("interrupted: stopping the ranks", file=sys.stderr, flush=True)
        return _SIGNAL_EXIT + (signal.SIGTERM if stop.began else signal.SIGINT)
    finally:
        _end(ranks)
        signal.signal(signal.SIGTERM, previous)


class _Stop:
    """What the launcher was asked by SIGTERM, and until when the ranks have time for it."""

    def __init__(self, grace: float) -> None:
        self.grace, self.began = grace, 0.0

    def asked(self, _signal: int, _frame: object) -> None:
        """The handler of SIGTERM."""
        if self.began:
            raise KeyboardInterrupt
        self.began = time.monotonic()

    @property
    def over(self) -> bool:
        """Whether the ranks' time is up."""
        return bool(self.began) and time.monotonic() > self.began + self.grace


def _cpu_only() -> dict[str, str]:
    """Without a GPU DeepSpeed need not look for one, and warn on every rank that it found none."""
    return {} if gpu_count() or "DS_ACCELERATOR" in os.environ else {"DS_ACCELERATOR": "cpu"}


def _wait(ranks: Sequence[subprocess.Popen[bytes]], stop: _Stop) -> int:
    """Wait until all ranks are done, one has failed, or a stop takes too long; the exit code of the run."""
    passed_on = False
    while True:
        time.sleep(0.1)
        codes = [rank.poll() for rank in ranks]
        if not passed_on and (stop.began or EXIT_STOPPED in codes):
            passed_on, stop.began = True, stop.began or time.monotonic()
            print(
                f"SIGTERM: the ranks save a checkpoint when this step is done, within {stop.grace:.0f} s (--stop_grace); "
                "a second SIGTERM or Ctrl-C ends them at once",
                file=sys.stderr,
                flush=True,
            )
            for rank in ranks:
                if rank.poll() is None:
                    rank.terminate()
        in_order = (None, 0, EXIT_STOPPED, -signal.SIGTERM) if passed_on else (None, 0)
        if any(code not in in_order for code in codes):
            return _failed(ranks)
        if None not in codes:
            return EXIT_STOPPED if any(codes) else 0
        if stop.over:
            print(
                "error: the ranks did not stop in time; they are ended, see the last checkpoint",
                file=sys.stderr,
                flush=True,
            )
            return EXIT_STOPPED


def _failed(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """The exit code of the rank that failed (128 + signal when it was killed), which is said.

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
    if code < 0:
        name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
        why = " (out of memory?)" if name == "SIGKILL" else ""
        print(f"error: rank {number} was ended by {name}{why}; the run stops", file=sys.stderr, flush=True)
    elif number > 0 and code != EXIT_HANG:
        print(f"error: rank {number} ended with exit code {code}; the run stops", file=sys.stderr, flush=True)
    return code if code > 0 else _SIGNAL_EXIT - code


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


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
