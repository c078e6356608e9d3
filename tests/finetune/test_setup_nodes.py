"""``finebridge nodes setup`` over real sshds: whatever is missing, the commands that it shows, run where it says, cure it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from finebridge.finetune.cli import main
from namespaced_nodes import PORT, SshNode, _acquaint, cut, ssh_nodes

Break = Callable[[SshNode, SshNode], object]
slow = pytest.mark.slow
NODES = "10.77.0.1:1,10.77.0.2:1"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[SshNode]]:
    with ssh_nodes(2, tmp_path_factory.mktemp("pair")) as made:
        yield made


@pytest.fixture
def healthy(pair: list[SshNode]) -> list[SshNode]:
    """Two nodes as after a set-up that went well, whatever a test before did to them."""
    for node in pair:
        _acquaint(node, pair)
        node.ssh.chmod(0o700)
        (node.ssh / "id_ed25519").chmod(0o600)
    return pair


def setup(node: SshNode, *words: str, **env: str) -> tuple[int, str]:
    """The verb on a node: its exit code, and what it prints."""
    command = [sys.executable, "-P", "-m", "finebridge.finetune.cli", "nodes", "setup", *words]
    own = {**os.environ, "NODE_IP_LIST": NODES, **env}
    process = node.popen(command, env=own, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    said = process.communicate(timeout=60)[0]
    return process.returncode, said


def shown(text: str) -> dict[str, list[str]]:
    """The commands by machine."""
    found: dict[str, list[str]] = {}
    for line in text.splitlines():
        if head := re.fullmatch(r"on (this machine|\S+, as \S+):", line):
            found[head[1].partition(",")[0]] = commands = []
        elif line.startswith("  ") and not line.startswith("  # "):
            commands.append(line.strip())
    return found


def obey(text: str, made: list[SshNode]) -> None:
    """Run the commands where they belong."""
    for machine, commands in shown(text).items():
        node = next((node for node in made if machine in (node.address, node.name)), made[0])
        node.run(["bash", "-ec", "\n".join(commands)], stdin=subprocess.DEVNULL)


def break_key(one: SshNode, _: SshNode) -> None:
    one.run(["ssh-keygen", "-q", "-p", "-N", "some words", "-f", one.ssh / "id_ed25519"])


def take_key(one: SshNode, _: SshNode) -> None:
    for name in ("id_ed25519", "id_ed25519.pub"):
        (one.ssh / name).rename(one.folder / name)


def give_back(one: SshNode) -> None:
    """The key, as it was."""
    for name in ("id_ed25519", "id_ed25519.pub"):
        if (one.folder / name).exists():
            (one.folder / name).replace(one.ssh / name)


BREAKS: dict[str, tuple[Break, str, str]] = {
    "host key not known": (
        lambda one, two: (one.ssh / "known_hosts").unlink(), r"ok +ok +not known  -$",
        r"its host key, as seen from here, is SHA256:\S+\. Go on only if this shows the same:",
    ),
    "host key changed": (
        lambda one, two: (one.ssh / "known_hosts").write_text((one.ssh / "known_hosts").read_text().replace("AAAAI", "AAAAI")),
        r"ok +ok +CHANGED +-$", r"\(it was another one: was the node set up anew\?\)",
    ),
    "key not taken": (
        lambda one, two: (two.ssh / "authorized_keys").unlink(), r"ok +ok +ok +refused$", "this machine's key is not among",
    ),
    "others may write there": (
        lambda one, two: two.ssh.chmod(0o777), r"ok +ok +ok +refused$", "or others may change that file",
    ),
    "others may read the key": (
        lambda one, two: (one.ssh / "id_ed25519").chmod(0o644), r"ok +ok +ok +refused$", r"chmod 600 ~/\.ssh/id_ed25519",
    ),
    "no key": (take_key, r"ok +ok +ok +refused$", "no key is here that ssh would offer"),
}  # fmt: skip


@pytest.mark.parametrize("name", BREAKS)
def test_the_shown_commands_cure(name: str, healthy: list[SshNode]) -> None:
    break_it, row, words = BREAKS[name]
    one, two = healthy
    break_it(one, two)
    if name == "host key changed":  # the other node's, under this one's name
        other = (one.folder / "host_key.pub").read_text().split()[1]
        mine = (two.folder / "host_key.pub").read_text().split()[1]
        (one.ssh / "known_hosts").write_text((one.ssh / "known_hosts").read_text().replace(mine, other))
    try:
        code, said = setup(one)
        assert code == 2, said
        assert re.search(rf"^10\.77\.0\.2 +{PORT} +{row}", said, re.MULTILINE), said
        assert re.search(words, said), said
        obey(said, healthy)
        code, said = setup(one)
        if name == "no key":  # a new one is there now, which the node is to be told of
            assert "key is not among" in said
            obey(said, healthy)
            code, said = setup(one)
        assert (code, said) == (0, "ssh reaches 10.77.0.2 without a password\n")
    finally:
        give_back(one)


def test_two_bare_containers(tmp_path: Path) -> None:
    """No sshd, no keys, no ~/.ssh: from nothing to a login, by what is shown and nothing else."""
    with ssh_nodes(2, tmp_path) as made:
        for node in made:
            node.stop_sshd()
            shutil.rmtree(node.ssh)
            own = tmp_path / f"etc_ssh.{node.number}"
            shutil.copytree("/etc/ssh", own, ignore=shutil.ignore_patterns("ssh_host_*"))
            node.run(["mount", "--bind", own, "/etc/ssh"])
            node.run(["mount", "-t", "tmpfs", "none", "/run"])
        for wanted in ("nobody listens", "not known"):
            code, said = setup(made[0], "--ssh_port", "36007")
            assert code == 2
            assert re.search(rf"^10\.77\.0\.2 +36007 .*{wanted}", said, re.MULTILINE), said
            assert said.endswith("then here again: finebridge nodes setup --ssh_port 36007\n")
            obey(said, made)
        assert setup(made[0], "--ssh_port", "36007") == (0, "ssh reaches 10.77.0.2 without a password\n")
        assert made[0].run(["ssh", "-p", "36007", "-o", "BatchMode=yes", made[1].address, "hostname"]) == "node2\n"
