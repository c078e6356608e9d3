"""Nodes of a run on one machine: a real sshd on 127.0.0.2 and 127.0.0.3, or a fake ssh; and ranks that write what they got.

As a module it is the command: ``python -m loopback_nodes FLAGS :: MODULE ARGUMENTS``.
"""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

NODES = "127.0.0.2:1,127.0.0.3:2"

# Takes the words of ssh; runs the last one as sshd does, by the user's shell.
FAKE_SSH = """#!/bin/sh
for last; do :; done
echo $$ >> "$FAKE_SSH_PIDS"
exec sh -c "$last"
"""

# Writes what it got into the folder that it is given; then does what the second word says.
RANK = """
import json, os, signal, sys, time
from pathlib import Path
from finebridge.train.orphans import die_with_launcher
die_with_launcher()
folder, what, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
launcher = int(os.environ["FINEBRIDGE_LAUNCHER"])
if what == "saves":
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.2), (folder / "stop").touch()))
got = {"argv": sys.argv[1:], "env": dict(os.environ), "pid": os.getpid(), "launcher": launcher, "cwd": os.getcwd()}
print(f"a line of rank {rank}", flush=True)
print(f"an error of rank {rank}", file=sys.stderr, flush=True)
(folder / f"{rank}.tmp").write_text(json.dumps(got))
(folder / f"{rank}.tmp").rename(folder / f"{rank}.json")
if what == "codes":
    time.sleep(rank / 2)
    sys.exit(int(sys.argv[3 + rank]))
while what != "done" and len(list(folder.glob("*.json"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)
if what == "fail" and rank == 2:
    raise RuntimeError("this rank fails")
if what == "saves":  # all ranks stop when one of them was asked to
    while not (folder / "stop").exists():
        time.sleep(0.01)
    sys.exit(143)
if what not in ("done", "fail"):
    time.sleep(600)
if what == "fail":
    time.sleep(600)
"""


class Runs:
    """Runs of the command on loopback nodes, with ``RANK`` as their ranks."""

    def __init__(self, folder: Path, flags: list[str], env: dict[str, str]) -> None:
        self.folder, self.flags = folder, flags
        self.said = folder / "said"
        (folder / "code").mkdir()
        (folder / "code" / "node_rank_helper.py").write_text(RANK)
        path = [str(folder / "code"), str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")]
        self.env = {
            **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, path)), "NODE_IP_LIST": NODES,
            "LOCAL_IP": "127.0.0.2", **env,
        }  # fmt: skip

    def start(self, *words: str, flags: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
        """Begin a run of ``RANK``; ``words`` follow the folder that its ranks write into."""
        shutil.rmtree(self.said, ignore_errors=True)
        self.said.mkdir()
        return self.start_module("node_rank_helper", str(self.said), *words, flags=flags, **env)

    def start_module(self, *words: object, flags: tuple[str, ...] = (), **env: str) -> subprocess.Popen[str]:
        """Begin a run of a module with its arguments."""
        flags = ("--preflight=off", *self.flags, *flags)
        command = [sys.executable, "-P", "-m", "loopback_nodes", *flags, "::", *map(str, words)]
        return subprocess.Popen(
            command, cwd=self.folder, env={**self.env, **env}, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE
        )

    def run(self, *words: str, flags: tuple[str, ...] = (), **env: str) -> subprocess.CompletedProcess[str]:
        """A whole run."""
        process = self.start(*words, flags=flags, **env)
        out, err = process.communicate(timeout=120)
        return subprocess.CompletedProcess(process.args, process.returncode, out, err)

    def running(self, process: subprocess.Popen[str], ranks: int = 3) -> list[dict[str, Any]]:
        """What all ranks got, as soon as they run."""
        while len(list(self.said.glob("*.json"))) < ranks:
            assert process.poll() is None, process.communicate()
            time.sleep(0.02)
        return self.got()

    def got(self) -> list[dict[str, Any]]:
        """What the ranks got, in their order."""
        return [json.loads(path.read_text()) for path in sorted(self.said.glob("*.json"))]


def all_gone(pids: list[int], within: float = 30.0) -> bool:
    """Whether none of these processes runs any more; those of other parents may take a moment to be seen as gone."""
    until = time.monotonic() + within
    while time.monotonic() < until:
        if not any(_runs(pid) for pid in pids):
            return True
        time.sleep(0.05)
    return False


def _runs(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


@contextmanager
def sshd(folder: Path) -> Iterator[list[str]]:
    """A real sshd with keys of its own on two loopback addresses; the flags that reach it. The user's ~/.ssh is not read."""
    program = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin")
    assert program
    Path("/run/sshd").mkdir(exist_ok=True)
    for name in ("host_key", "id"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", folder / name], check=True)
    shutil.copy(folder / "id.pub", folder / "authorized_keys")
    with socket.socket() as probe:
        probe.bind(("127.0.0.2", 0))
        port = probe.getsockname()[1]
    lines = [
        f"Port {port}", "ListenAddress 127.0.0.2", "ListenAddress 127.0.0.3", f"HostKey {folder}/host_key",
        f"AuthorizedKeysFile {folder}/authorized_keys", f"PidFile {folder}/sshd.pid", "PasswordAuthentication no",
        "StrictModes no", "UsePAM no", "MaxStartups 100",
    ]  # fmt: skip
    (folder / "sshd_config").write_text("\n".join(lines) + "\n")
    key = " ".join((folder / "host_key.pub").read_text().split()[:2])
    known = "".join(f"[127.0.0.{number}]:{port} {key}\n" for number in (2, 3))
    (folder / "known_hosts").write_text(known)
    config = f"Host *\n IdentityFile {folder}/id\n IdentitiesOnly yes\n UserKnownHostsFile {folder}/known_hosts\n"
    (folder / "ssh_config").write_text(config)
    server = subprocess.Popen([program, "-D", "-f", folder / "sshd_config", "-E", folder / "sshd.log"])
    try:
        until = time.monotonic() + 20
        while True:
            try:
                socket.create_connection(("127.0.0.3", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None, (folder / "sshd.log").read_text()
                assert time.monotonic() < until, "sshd does not listen"
                time.sleep(0.05)
        yield [f"--ssh_config={folder}/ssh_config", f"--ssh_port={port}"]
    finally:
        server.terminate()
        server.wait()


def missing() -> str:
    """Why real sshd and pdsh cannot be used here, or ""."""
    names = [name for name in ("ssh", "ssh-keygen", "pdsh") if not shutil.which(name)]
    names += [] if shutil.which("sshd", path="/usr/sbin:/usr/local/sbin") else ["sshd"]
    if names:
        return f"not installed: {', '.join(names)} (apt-get install -y openssh-client openssh-server pdsh)"
    return "" if sys.platform == "linux" and os.geteuid() == 0 else "sshd for another user's login needs root"


if __name__ == "__main__":
    from finebridge.finetune import cluster
    from finebridge.finetune.launch import gpu_count
    from finebridge.finetune.restart import Course, Restarts
    from finebridge.train.arguments import read_flags

    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
    cut = sys.argv.index("::")
    try:
        flags, argv = read_flags(sys.argv[1:cut]), sys.argv[cut + 2 :]
        most, elastic = int(flags.pop("max_restarts", 0)), bool(flags.pop("elastic", False))
        where = cluster.take(flags, os.environ, None, gpu_count)
        course = Course(argv, Path("out dir"), where.processes, (2, 2))
        restarts = Restarts(most, elastic, course) if most else None
        sys.exit(where.run(sys.argv[cut + 1], argv, "out dir", 60.0, restarts=restarts))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
