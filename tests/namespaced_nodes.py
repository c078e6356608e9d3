"""Nodes of a cluster that ssh reaches: those of ``nodes.py``, each with an sshd, a home and an address for IPv6 as well.

    with ssh_nodes(2, folder) as (one, two):
        one.run(["ssh", two.address, "hostname"])
        cut(two, one)  # its cable is out; cut(two, one, back=True)

Every node has host keys and a key of its own, and knows those of the others, as after a set-up that went well: tests take
something away. ``~`` is ``node.home``, also to ssh and sshd, which ask /etc/passwd and not HOME. sshd listens at ``PORT``,
which ~/.ssh/config says too, checks the rights of files as it does anywhere, and takes no password.
"""

import os
import pwd
import shutil
import subprocess
from collections.abc import Generator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
from nodes import Node, nodes

PORT = 36005  # the seed's; every node has a network, and so all ports, of its own
SSHD = shutil.which("sshd", path="/usr/sbin:/usr/local/sbin:/usr/bin") or ""
_TRIES = "for _ in $(seq 200); do exec 3<>/dev/tcp/127.0.0.1/$0 && exit 0; sleep 0.02; done 2>/dev/null; exit 1"


class SshNode(Node):
    """A node with an sshd. ``address6`` is its IPv6 address, ``name6`` a name for that alone, ``folder`` has its files."""

    def __init__(self, node: Node, folder: Path) -> None:
        super().__init__(node.pid, node.name, node.address)
        number = node.address.rpartition(".")[2]
        self.number, self.address6, self.name6 = int(number), f"fd77::{number}", f"{node.name}-six"
        self.folder, self.home, self.ssh = folder, folder / "home", folder / "home" / ".ssh"
        self.sshd: subprocess.Popen[str] | None = None

    def popen(self, words: Sequence[object], **options: Any) -> "subprocess.Popen[str]":
        """``Node.popen`` with the node's home; no agent of this machine's user has a key for it."""
        env = {name: value for name, value in (options.pop("env", None) or os.environ).items() if "SSH_" not in name}
        return super().popen(words, env={**env, "HOME": str(self.home)}, **options)

    def start_sshd(self) -> None:
        """Start sshd, and wait until it listens."""
        words = [SSHD, "-D", "-f", self.folder / "sshd_config", "-E", self.folder / "sshd.log"]
        self.sshd = self.popen(words)
        self.run(["bash", "-c", _TRIES, PORT])

    def stop_sshd(self) -> None:
        """End sshd; sessions that are open go on."""
        if self.sshd is not None:
            self.sshd.terminate()
            self.sshd.wait()

    def running(self, having: str = "") -> list[str]:
        """The commands that run on the node and contain a text; not sshd, nor the one that keeps the node."""
        mine, found = Path(f"/proc/{self.pid}/ns/pid_for_children").readlink(), list[str]()
        for place in Path("/proc").glob("[0-9]*"):
            try:
                here = (place / "ns" / "pid").readlink() == mine and "State:\tZ" not in (place / "status").read_text()
                words = (place / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
            except OSError:
                continue  # it has ended
            if here and words and not words.startswith(("sshd: ", f"{SSHD} ", "bash -c \nset -e\nhostname")):
                found += [words] if having in words else []
        return found


@contextmanager
def ssh_nodes(count: int, folder: Path, *, names: Sequence[str] = (), **options: Any) -> Generator[list[SshNode]]:
    """So many nodes (two to four are enough for anything) with ``nodes``'s options. Skips, with the reason, as that does."""
    if absent := missing():
        pytest.skip(absent)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, and leaves it empty
    with nodes(count, folder, names=names, **options) as plain, ExitStack() as ends:
        made = [SshNode(node, folder / f"node.{number}") for number, node in enumerate(plain, 1)]
        for node in made:
            _files(node)
            node.run(["ip", "address", "add", f"{node.address6}/64", "dev", "eth0", "nodad"])
            node.run(["mount", "--bind", node.folder / "passwd", "/etc/passwd"])
        for number, node in enumerate(made):
            _acquaint(node, made)
            with (folder / f"hosts.{number}").open("a") as hosts:
                hosts.writelines(f"{other.address6} {other.name6}\n" for other in made)
            node.start_sshd()
            ends.callback(node.stop_sshd)
        yield made


def missing() -> str:
    """Why no sshd can be used here, or ""."""
    names = [name for name in ("ssh", "ssh-keygen", "pdsh") if not shutil.which(name)] + ([] if SSHD else ["sshd"])
    return f"not installed: {', '.join(names)} (apt-get install -y openssh-client openssh-server pdsh)" if names else ""


def cut(node: SshNode, switch: SshNode, *, back: bool = False) -> None:
    """Take a node's cable out of the switch, which is the first node, or put it back. Nobody is told: packets get lost."""
    switch.run(["ip", "link", "set", f"cable{node.number - 1}", "up" if back else "down"])


def slow_down(node: SshNode, switch: SshNode, kbits: int) -> None:
    """Let no more than so many kbit/s through a node's cable, each way; what queues up is late by up to 400 ms, then lost."""
    bucket = ["root", "tbf", "rate", f"{kbits}kbit", "burst", "4kb", "latency", "400ms"]
    for end, device in ((node, "eth0"), (switch, f"cable{node.number - 1}")):
        end.run(["tc", "qdisc", "replace", "dev", device, *bucket])


def known_host(node: SshNode) -> str:
    """The lines of known_hosts for a node."""
    key = " ".join((node.folder / "host_key.pub").read_text().split()[:2])
    return "".join(f"[{host}]:{PORT} {key}\n" for host in (node.address, node.address6, node.name, node.name6))


def _files(node: SshNode) -> None:
    """What is on a node's own disk."""
    node.ssh.mkdir(parents=True)
    for place in (node.folder, node.home, node.ssh):
        place.chmod(0o700)
    for key in (node.folder / "host_key", node.ssh / "id_ed25519"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", node.name, "-f", key], check=True)
    me = pwd.getpwuid(os.geteuid())
    others = [line for line in Path("/etc/passwd").read_text().splitlines() if not line.startswith(f"{me.pw_name}:")]
    mine = ":".join(map(str, (*me[:5], node.home, me.pw_shell)))
    (node.folder / "passwd").write_text("\n".join([mine, *others]) + "\n")
    lines = [
        f"Port {PORT}", f"HostKey {node.folder}/host_key", f"PidFile {node.folder}/sshd.pid", "PasswordAuthentication no",
        "UsePAM no", "MaxStartups 100",
    ]  # fmt: skip
    (node.folder / "sshd_config").write_text("\n".join(lines) + "\n")


def _acquaint(node: SshNode, made: Sequence[SshNode]) -> None:
    """Let a node trust the keys of all, and know their host keys."""
    (node.ssh / "config").write_text(f"Host *\n  Port {PORT}\n")
    (node.ssh / "known_hosts").write_text("".join(map(known_host, made)))
    keys = "".join((other.ssh / "id_ed25519.pub").read_text() for other in made)
    (node.ssh / "authorized_keys").write_text(keys)
    (node.ssh / "authorized_keys").chmod(0o600)
