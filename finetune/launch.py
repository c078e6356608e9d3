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

_GRACE_SECONDS = 10.0
_SIGNAL_EXIT = 128


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


def run_ranks(module: str, argv: Sequence[str], processes: int) -> int:
    """Run ``python -P -m module argv`` as ranks 0 to ``processes`` - 1; the exit code of the first rank that failed, or 0.

    Arguments reach the ranks as a list, no shell reads them. When a rank fails, or on Ctrl-C or SIGTERM, the others
    get SIGTERM and after 10 s SIGKILL.
    """
    port = _free_port()
    threads = os.environ.get("OMP_NUM_THREADS") or str(max(1, len(os.sched_getaffinity(0)) // processes))
    ranks: list[subprocess.Popen[bytes]] = []
    previous = signal.signal(signal.SIGTERM, _interrupt)
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
            }
            ranks.append(subprocess.Popen([sys.executable, "-P", "-m", module, *argv], env=env))  # noqa: S603 - no shell
        return _wait(ranks)
    except KeyboardInterrupt:
        print("interrupted: stopping the ranks", file=sys.stderr, flush=True)
        return _SIGNAL_EXIT + signal.SIGINT
    finally:
        _end(ranks)
        signal.signal(signal.SIGTERM, previous)


def _cpu_only() -> dict[str, str]:
    """Without a GPU DeepSpeed need not look for one, and warn on every rank that it found none."""
    return {} if gpu_count() or "DS_ACCELERATOR" in os.environ else {"DS_ACCELERATOR": "cpu"}


def _wait(ranks: Sequence[subprocess.Popen[bytes]]) -> int:
    """Wait until all ranks are done or one has failed; its exit code (128 + signal when it was killed)."""
    while True:
        codes = [rank.poll() for rank in ranks]
        for number, code in enumerate(codes):
            if code:
                if code < 0:
                    name = next((s.name for s in signal.Signals if s == -code), f"signal {-code}")
                    why = " (out of memory?)" if name == "SIGKILL" else ""
                    print(f"error: rank {number} was ended by {name}{why}; the run stops", file=sys.stderr, flush=True)
                elif number > 0:
                    print(
                        f"error: rank {number} ended with exit code {code}; the run stops", file=sys.stderr, flush=True
                    )
                return code if code > 0 else _SIGNAL_EXIT - code
        if all(code == 0 for code in codes):
            return 0
        time.sleep(0.1)


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


def _interrupt(_signal: int, _frame: object) -> None:
    raise KeyboardInterrupt


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
