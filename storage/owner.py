"""A name for this process that no other has, on whatever machine or in whatever container, and whether its bearer lives.

Host names do not tell machines apart: containers of one image share them. The kernel's boot id and the namespace of
process numbers do, and the time a process began tells it from a later one with the same number (``man 5 proc``).
"""

import os
import socket
from functools import cache
from pathlib import Path


def me() -> str:
    """The name of this process: HOST-PLACE-PID-START. Only the host's name may hold dashes."""
    return f"{socket.gethostname()}-{_place()}-{os.getpid()}-{_start(os.getpid())}"


def host_of(owner: str) -> str:
    """The host's name in a process's name."""
    return owner.rsplit("-", 3)[0]


def lives(owner: str) -> bool | None:
    """Whether the process of this name lives; None when nobody can tell from here: another machine, boot or container."""
    _, place, pid, start = ("", "", "", *owner.rsplit("-", 3))[-4:]
    if place != _place() or not pid.isdecimal():
        return None
    found = _start(int(pid))
    return None if not found and _hidden(int(pid)) else found == start


@cache
def _place() -> str:
    boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip().replace("-", "")
    return f"{boot[:16]}n{Path('/proc/self/ns/pid').stat().st_ino:x}"


def _hidden(pid: int) -> bool:
    """Whether there is such a process, another user's, which /proc does not show (its option hidepid)."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return not Path(f"/proc/{pid}").exists()
    except OSError:
        pass
    return False


def _start(pid: int) -> str:
    """When a process began, in ticks since the machine did; empty when there is none, or none but its exit code."""
    try:
        state, *fields = Path(f"/proc/{pid}/stat").read_text(errors="replace").rpartition(")")[2].split()
    except OSError:
        return ""
    return "" if state in "ZX" else fields[18]
