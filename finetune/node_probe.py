"""What one node of a run is asked before anything is started there: what it has, and what it sees. No torch is imported.

Started by ``preflight.py`` as ``node_launcher.py`` is:  ``python -P -m finebridge.finetune.node_probe - [HOST]``. It reads
the job, its own number when it is spoken to (for the clock), and then the end of its input; it writes lines behind the
job's mark.
"""

import fcntl
import hashlib
import json
import os
import shutil
import signal
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

from ..storage.installed import installed
from ..storage.space import free_bytes
from .interface import interface_to
from .launch import gpu_count
from .node_job import Job
from .nodes import NodesError

EXIT_BAD_INPUT = 2
_END_LATER = 10  # seconds after the launching side's own limit in which a probe that hangs ends itself
_SIOCGIFADDR = 0x8915
_SIZES, _SAMPLES, _SAMPLE = (
    2000,
    50,
    65_536,
)  # files of a folder that are looked at, that are read, and how much of each


@dataclass(frozen=True, slots=True)
class Asked:
    """What the nodes are asked. All paths are absolute."""

    paths: dict[str, list[str]]  # flag -> what each node must see
    room: list[tuple[str, str, int]]  # flag, path, bytes that will be written there at least
    output: str  # the folder that all nodes share
    mark: str  # a name that no file has
    limit: float  # seconds in which an answer is of use


@dataclass(slots=True)
class Report:
    """What a node answers; texts are empty when all is well."""

    installed: dict[str, dict[str, str]] = field(default_factory=dict[str, dict[str, str]])
    folder: str = ""  # why the working directory cannot be used
    master: str = ""  # why the first node's name does not resolve
    port: str = ""  # who has rank 0's port
    free_port: int = 0
    gpus: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    visible: int = 0  # GPUs that ranks would see
    gpu_error: str = ""
    interfaces: dict[str, list[str]] = field(default_factory=dict[str, list[str]])
    leads: str = ""  # the interface that leads to the other nodes
    named: dict[str, list[str]] = field(default_factory=dict[str, list[str]])  # variable -> interfaces that it names
    room: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])
    paths: dict[str, dict[str, Any]] = field(default_factory=dict[str, dict[str, Any]])
    shares: int | None = None  # the node whose mark lies in the output folder


def main() -> int:
    """Answer and wait for the end of the input; 0 when there was an answer."""
    found = told(sys.argv[1:])
    if isinstance(found, int):
        return found
    job, number = found
    asked = Asked(**json.loads(job.argv[0]))
    signal.alarm(int(asked.limit) + _END_LATER)
    tell(job, number, ready=True)
    spoken_to(number)
    tell(job, number, time=time.time())
    mark = shared_mark(Path(asked.output)) / asked.mark
    report = look(job, number, asked)
    report.shares = _shares(mark, number)
    tell(job, number, report=asdict(report))
    with suppress(OSError):
        sys.stdin.buffer.read()  # until all have looked for the mark
    if report.shares == number:
        mark.unlink(missing_ok=True)
    return 0


def told(words: Sequence[str]) -> tuple[Job, int] | int:
    """The job and this node's number in it, or the exit code when it cannot be known, which is said."""
    try:
        job = Job.decode(sys.stdin.buffer.readline().strip(), any_version=True)
    except NodesError as error:
        print(f"error: {error}", file=sys.stderr)
        return EXIT_BAD_INPUT
    mine = words[1] if len(words) > 1 else os.environ.get("SLURMD_NODENAME", "")
    hosts = [name for name, _ in job.nodes]
    if mine not in hosts:
        print(f"error: this node is called {mine!r}, which is none of {', '.join(hosts)}", file=sys.stderr)
        return EXIT_BAD_INPUT
    os.environ.update(job.env)
    return job, hosts.index(mine)


def tell(job: Job, number: int, **words: Any) -> None:
    """One line for the launching side, JSON behind the job's mark."""
    print(f"{job.mark}{json.dumps({'node': number, **words})}", flush=True)


def spoken_to(number: int) -> None:
    """Wait until the launching side speaks to this node; over srun every node hears what is said to the others too."""
    for line in sys.stdin.buffer:
        if line.strip() == str(number).encode():
            return
    sys.exit(EXIT_BAD_INPUT)  # it is gone


def shared_mark(output: Path) -> Path:
    """Where a mark tells whether nodes share the output folder: there, or in the nearest folder above that exists."""
    return next(place for place in (output, *output.parents) if place.is_dir())


def look(job: Job, number: int, asked: Asked) -> Report:
    """What is to be known of this node alone."""
    report = Report(installed(), visible=gpu_count())
    try:
        os.chdir(job.folder)
    except OSError as error:
        report.folder = error.strerror or str(error)
    try:
        socket.getaddrinfo(job.master, job.port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        report.master = getattr(error, "strerror", None) or str(error)
    if number == 0:
        report.port = _taken(job.port)
    report.free_port = _any_port()
    report.gpus, report.gpu_error = _gpus()
    report.interfaces = _interfaces()
    report.leads = interface_to([job.master, *(host for host, _ in job.nodes)])
    report.named = _named_interfaces(bool(report.gpus))
    report.room = [_room(*entry) for entry in asked.room]
    report.paths = {path: _seen(Path(path)) for paths in asked.paths.values() for path in paths}
    return report


def _shares(mark: Path, number: int) -> int | None:
    """Which node made the mark: the first that comes to a folder. None when none can be made."""
    with suppress(FileExistsError):
        try:
            with mark.open("x") as stream:
                stream.write(f"{number} ")
        except FileExistsError:
            raise
        except OSError:
            return None
        return number
    until = time.monotonic() + 2
    while not (text := mark.read_text()).endswith(" ") and time.monotonic() < until:
        time.sleep(0.01)
    return int(text or number)


def _taken(port: int) -> str:
    """Who listens at a port of this machine, or ""."""
    both = socket.has_dualstack_ipv6()
    try:
        family = socket.AF_INET6 if both else socket.AF_INET
        socket.create_server(("", port), family=family, dualstack_ipv6=both).close()
    except OSError as error:
        return _listener(port) or error.strerror or str(error)
    return ""


def _any_port() -> int:
    with socket.create_server(("", 0)) as probe:
        return int(probe.getsockname()[1])


def _listener(port: int) -> str:
    """The process that listens at a port, as far as this user may see it."""
    inodes: set[str] = set()
    for table in ("tcp", "tcp6"):
        with suppress(OSError):
            rows = [line.split() for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]]
            inodes |= {row[9] for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    for handle in Path("/proc").glob("[0-9]*/fd/*"):
        with suppress(OSError):
            target = os.readlink(handle)  # noqa: PTH115 - no path
            if target.startswith("socket:[") and target[8:-1] in inodes:
                words = (handle.parents[1] / "cmdline").read_bytes().decode(errors="replace").split("\0")
                return f"taken by process {handle.parts[2]}: {' '.join(words).strip()[:60]}"
    return ""


def _gpus() -> tuple[list[dict[str, Any]], str]:
    """This machine's GPUs with what is used of them (MiB) and by which processes; why nvidia-smi cannot tell."""
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return [], ""
    answers: list[list[list[str]]] = []
    for query in ("--query-gpu=uuid,name,memory.total,memory.used", "--query-compute-apps=gpu_uuid,pid,process_name"):
        done = subprocess.run(  # noqa: S603 - a fixed argument list
            [tool, query, "--format=csv,noheader,nounits"], capture_output=True, text=True, check=False
        )
        if done.returncode:
            return [], (done.stdout + done.stderr).strip().splitlines()[-1:][0] or f"exit code {done.returncode}"
        answers.append(
            [[part.strip() for part in line.split(",")] for line in done.stdout.splitlines() if line.strip()]
        )
    users: dict[str, list[str]] = {}
    for uuid, pid, *name in answers[1]:
        users.setdefault(uuid, []).append(f"process {pid} ({', '.join(name)})")
    visible = [part.strip() for part in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if part.strip()]
    return [
        {"name": name, "total": _number(total), "used": _number(used), "users": users.get(uuid, [])}
        for index, (uuid, name, total, used) in enumerate(answers[0])
        if not visible or str(index) in visible or any(uuid.startswith(part) for part in visible)
    ], ""


def _number(text: str) -> int:
    return int(text) if text.isdigit() else 0  # [N/A] on unified memory


def _interfaces() -> dict[str, list[str]]:
    """The network interfaces and their addresses."""
    found: dict[str, list[str]] = {name: [] for _, name in socket.if_nameindex()}
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        for name, addresses in found.items():
            with suppress(OSError):  # one without an address
                answer = fcntl.ioctl(probe, _SIOCGIFADDR, struct.pack("256s", name.encode()))
                addresses.append(socket.inet_ntoa(answer[20:24]))
    with suppress(OSError):  # no IPv6
        for line in Path("/proc/net/if_inet6").read_text().splitlines():
            address, *_, name = line.split()
            found.setdefault(name, []).append(socket.inet_ntop(socket.AF_INET6, bytes.fromhex(address)))
    return found


def _named_interfaces(gpus: bool) -> dict[str, list[str]]:
    """What the variables for gloo, and with GPUs for NCCL, ask for; ``=`` before a name says that it is no beginning."""
    gloo, nccl = os.environ.get("GLOO_SOCKET_IFNAME", ""), os.environ.get("NCCL_SOCKET_IFNAME", "")
    named = {"GLOO_SOCKET_IFNAME": [f"={name}" for name in gloo.split(",") if name]}
    if gpus and not nccl.startswith("^"):
        exact = "=" if nccl.startswith("=") else ""
        named["NCCL_SOCKET_IFNAME"] = [f"{exact}{name}" for name in nccl.removeprefix("=").split(",") if name]
    return {name: wanted for name, wanted in named.items() if wanted}


def _room(flag: str, path: str, need: int) -> dict[str, Any]:
    place = shared_mark(Path(path))
    return {
        "flag": flag,
        "path": path,
        "need": need,
        "disk": place.stat().st_dev,
        "free": free_bytes(place),
        "writable": os.access(place, os.W_OK | os.X_OK),
    }


def _seen(place: Path) -> dict[str, Any]:
    """Size of a file or of all in a folder, and a hash of names, sizes, beginnings and ends; or why it is not seen.

    Hidden files are left out, as each machine may have its own.
    """
    try:
        if place.is_dir():
            every = sorted(islice((path for path in place.rglob("*") if path.is_file()), 100_000))
            files = [path for path in every if not any(part[0] == "." for part in path.relative_to(place).parts)]
        else:
            files = [place]
        sizes = [path.stat().st_size for path in files[:_SIZES]]
        digest = hashlib.sha256(json.dumps([[str(path.relative_to(place)) for path in files], sizes]).encode())
        for path, size in islice(zip(files, sizes, strict=False), _SAMPLES):
            with path.open("rb") as stream:
                digest.update(stream.read(_SAMPLE))
                stream.seek(max(0, size - _SAMPLE))
                digest.update(stream.read(_SAMPLE))
        return {"files": len(files), "size": sum(sizes), "hash": digest.hexdigest()[:12]}
    except OSError as error:
        return {"error": error.strerror or str(error)}


if __name__ == "__main__":
    sys.exit(main())
