"""Nodes of a cluster, made of this machine: each has its own network, host name, processes, boot id, and disks if asked.

    with nodes(2, disks={folder: "ab"}) as (one, two):
        one.run(["ping", "-c1", two.address])

All files of this machine are shared by the nodes, at the same paths, as a network folder is. A folder in ``disks`` is on
the disk that its letter names, one letter a node: "ab" are two private ones under one path, "aab" is shared by two of
three nodes. The folder ``NAME.a`` beside it is that disk as it is seen from outside. Node 1 is also the switch: nothing
is made in the network of this machine, and when the process that holds the nodes ends, however it ends, they end too.
"""

import ctypes
import json
import os
import shutil
import signal
import subprocess
import uuid
from collections.abc import Generator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
from rank_runner import Finished, RankRunner

_UNSHARE = ["unshare", "--net", "--mount", "--uts", "--pid", "--fork", "--kill-child", "--mount-proc"]
# argv: host name, file of hosts, file of the boot id, then pairs of a disk and where it is mounted. Ends with its input.
_INIT = """
set -e
hostname "$1"; mount --bind "$2" /etc/hosts; mount --bind "$3" /proc/sys/kernel/random/boot_id; shift 3
while [ $# -gt 0 ]; do mount --bind "$1" "$2"; shift 2; done
ip link set lo up
echo ready
read -r _ || :
"""
_KINDS = {"net": 0x40000000, "uts": 0x04000000, "mnt": 0x00020000, "pid_for_children": 0x20000000}
_PR_SET_PDEATHSIG = 1


class Node:
    """One of ``nodes``; ``pid`` is the process that holds its namespaces."""

    def __init__(self, pid: int, name: str, address: str) -> None:
        self.pid, self.name, self.address = pid, name, address

    def popen(self, words: Sequence[object], **options: Any) -> "subprocess.Popen[str]":
        """Start a process on the node: a child of this one, with a number of the node's own for the processes there."""
        _join(self.pid, "pid_for_children")  # where the children of this thread are born
        try:
            words = [str(word) for word in words]
            return subprocess.Popen(words, text=True, preexec_fn=self.move, **options)  # noqa: PLW1509 - only system calls
        finally:
            _join(os.getpid(), "pid_for_children", of="pid")

    def run(self, words: Sequence[object], **options: Any) -> str:
        """What a command on the node prints. Raises CalledProcessError."""
        with self.popen(words, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, **options) as process:
            said = process.communicate()[0]
        if process.returncode:
            raise subprocess.CalledProcessError(process.returncode, list(words), said)
        return said

    def move(self) -> None:
        """Move this process, which has no threads, to the node's network, host name and files."""
        folder = Path.cwd()
        for kind in ("net", "uts", "mnt"):
            _join(self.pid, kind)
        os.chdir(folder)

    def enter(self) -> None:
        """``move``, and among the node's processes: what goes on is a child of this process, which ends as it does."""
        _join(self.pid, "pid_for_children")
        if child := os.fork():
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            if code < 0:
                os.kill(os.getpid(), -code)
            os._exit(code)
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self.move()


@contextmanager
def nodes(
    count: int, folder: Path, *, names: Sequence[str] = (), disks: Mapping[Path, str] | None = None
) -> Generator[list[Node]]:
    """So many nodes, in a network of their own. ``folder`` keeps small files; ``names`` are host names, equal ones too.

    Skips the test, with the reason, where this machine's user may not make namespaces.
    """
    if missing := [tool for tool in ("unshare", "nsenter", "ip", "bash") if not shutil.which(tool)]:
        pytest.skip(f"nodes need {', '.join(missing)}")
    tried = subprocess.run([*_UNSHARE, "true"], capture_output=True, text=True, check=False)
    if tried.returncode:
        pytest.skip(f"namespaces are not permitted here: {tried.stderr.strip()}")
    names = names or [f"node{number}" for number in range(1, count + 1)]
    made: list[Node] = []
    with ExitStack() as ends:
        for number, name in enumerate(names):
            mounts = [part for path, letters in (disks or {}).items() for part in (_disk(path, letters[number]), path)]
            files = [_hosts(folder, names, number), _boot_id(folder, number)]
            words = [*_UNSHARE, "bash", "-c", _INIT, "init", name, *map(str, (*files, *mounts))]
            init = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            ends.callback(_end, init)
            assert init.stdout is not None
            assert init.stdout.readline() == "ready\n"
            made.append(Node(init.pid, name, _address(number)))
        _connect(made)
        yield made


def together(
    runner: RankRunner, jobs: Sequence[tuple[Node, Sequence[object]]], folder: Path, entry: str, **extra: str
) -> Finished:
    """Call a function of words on nodes, all at once, as ranks of one world, in forks that have everything imported."""
    local = [sum(node is other for other, _ in jobs[:number]) for number, (node, _) in enumerate(jobs)]
    plan = [
        {
            "node": node.pid, "words": list(map(str, words)), "entry": entry,
            "env": {
                "LOCAL_RANK": str(local[number]), "LOCAL_WORLD_SIZE": str(sum(node is other for other, _ in jobs)),
                "MASTER_ADDR": jobs[0][0].address,
            },
        }
        for number, (node, words) in enumerate(jobs)
    ]  # fmt: skip
    return runner.run([json.dumps(plan)], folder, ranks=len(jobs), entry="nodes:on_node", **extra)


def on_node(argv: Sequence[str]) -> int:
    """The rank's part of ``together``."""
    job = json.loads(argv[0])[int(os.environ["RANK"])]
    os.environ.update(job["env"])
    Node(job["node"], "", "").enter()
    module, _, name = job["entry"].partition(":")
    return getattr(import_module(module), name)(job["words"])


def _address(number: int) -> str:
    return f"10.77.0.{number + 1}"


def _disk(path: Path, letter: str) -> Path:
    disk = path.with_name(f"{path.name}.{letter}")
    for folder in (disk, path):
        folder.mkdir(parents=True, exist_ok=True)
    return disk


def _hosts(folder: Path, names: Sequence[str], mine: int) -> Path:
    """Addresses of all nodes; of equal names the own one comes first."""
    order = sorted(range(len(names)), key=lambda number: number != mine)
    lines = ["127.0.0.1 localhost", *(f"{_address(number)} {names[number]}" for number in order)]
    file = folder / f"hosts.{mine}"
    file.write_text("\n".join(lines) + "\n")
    return file


def _boot_id(folder: Path, number: int) -> Path:
    file = folder / f"boot_id.{number}"
    file.write_text(f"{uuid.uuid4()}\n")
    return file


def _connect(made: Sequence[Node]) -> None:
    """A bridge in the first node, a cable from it to each of the others."""
    switch = made[0].pid
    _ip(switch, "link", "add", "name", "eth0", "type", "bridge")
    for number, node in enumerate(made[1:], 1):
        cable = f"cable{number}"
        _ip(switch, "link", "add", "name", cable, "type", "veth", "peer", "name", "eth0", "netns", str(node.pid))
        _ip(switch, "link", "set", cable, "master", "eth0", "up")
    for number, node in enumerate(made):
        _ip(node.pid, "address", "add", f"{_address(number)}/24", "dev", "eth0")
        _ip(node.pid, "link", "set", "eth0", "up")


def _ip(pid: int, *words: str) -> None:
    subprocess.run(["nsenter", "--net", "--target", str(pid), "ip", *words], check=True)


def _join(pid: int, kind: str, of: str = "") -> None:
    handle = os.open(f"/proc/{pid}/ns/{of or kind}", os.O_RDONLY)
    try:
        if ctypes.CDLL(None, use_errno=True).setns(handle, _KINDS[kind]):
            raise OSError(ctypes.get_errno(), f"setns {kind} of {pid}")
    finally:
        os.close(handle)


def _end(init: "subprocess.Popen[str]") -> None:
    init.kill()  # the kernel ends what runs on the node
    init.communicate()
