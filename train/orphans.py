"""No process outlives the one that started it, however that one ended. Linux only; torch is not needed here.

``python -P -m finebridge.train.orphans PARENT COMMAND ...`` becomes a command that ends with the process PARENT.
"""

import ctypes
import os
import signal
import sys

LAUNCHER = "FINEBRIDGE_LAUNCHER"  # the launcher's process id, in the environment of its ranks
_PR_SET_PDEATHSIG = 1
_me = os.getpid()


def die_with_launcher() -> None:
    """From now on the kernel kills this rank when its launcher ends, and what it forks (DataLoader workers) with it.

    Another launcher's ranks are left alone: who starts a rank from a shell may want it to outlive the shell.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is None or sys.platform != "linux":
        return
    _die_with(int(launcher))
    os.register_at_fork(after_in_child=_in_child)


def _in_child() -> None:
    global _me
    parent, _me = _me, os.getpid()
    _die_with(parent)


def _die_with(parent: int) -> None:
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it ended before the kernel was told
        os._exit(1)


if __name__ == "__main__":
    if sys.platform == "linux":
        _die_with(int(sys.argv[1]))
    os.execvp(sys.argv[2], sys.argv[2:])  # noqa: S606 - an argument list, no shell
