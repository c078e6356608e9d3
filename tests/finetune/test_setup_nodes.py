"""``finebridge nodes setup`` over real sshds: whatever is missing, the commands that it shows, run where it says, cure it."""

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import ROOT
from finebridge.finetune.cli import main
from namespaced_nodes import SshNode, cut, known_host, ssh_nodes

Break = Callable[[SshNode, SshNode], object]
slow = pytest.mark.slow
NODES = "10.77.0.1:1,10.77.0.2:1"


def setup(node: SshNode, *words: str) -> tuple[int, str]:
    """The verb on a node."""
    return call(
        node, [sys.executable, "-P", "-m", "finebridge.finetune.cli", "nodes", "setup", *words], NODE_IP_LIST=NODES
    )


def call(node: SshNode, command: list[str], **env: str) -> tuple[int, str]:
    """The exit code of a command on a node, and what it prints."""
    process = node.popen(
        command, env={**os.environ, **env}, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
    )
    said = process.communicate(timeout=120)[0]
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


def obey(text: str, made: list[SshNode], *who: str) -> None:
    """Run the commands where they belong; on the second node ``who`` comes before bash."""
    for machine, commands in shown(text).items():
        there = machine == made[1].address
        made[there].run([*who * there, "bash", "-ec", "\n".join(commands)], stdin=subprocess.DEVNULL)


def other_host_key(one: SshNode, two: SshNode) -> None:
    """As if the second node had been set up anew."""
    keys = [(node.folder / "host_key.pub").read_text().split()[1] for node in (one, two)]
    known = one.ssh / "known_hosts"
    known.write_text(known.read_text().replace(keys[1], keys[0]))


def no_key(one: SshNode, _: SshNode) -> None:
    for name in ("id_ed25519", "id_ed25519.pub"):
        (one.ssh / name).unlink()


# What is broken -> how, the end of the node's row, other words, how often what is shown has to be done.
BREAKS: dict[str, tuple[Break, str, str, int]] = {
    "host key not known": (
        lambda one, _: (one.ssh / "known_hosts").unlink(), r"ok +ok +not known  -",
        r"its host key, as seen from here, is SHA256:\S+\. Go on only if this shows the same:", 1,
    ),
    "host key changed": (other_host_key, r"ok +ok +CHANGED +-", r"was another one: was the node set up anew\?\)", 1),
    "key not taken": (
        lambda _, two: (two.ssh / "authorized_keys").unlink(), r"ok +ok +ok +refused", "this machine's key is not among", 1,
    ),
    "others may write there": (
        lambda _, two: two.ssh.chmod(0o777), r"ok +ok +ok +refused", "or others may change that file", 1,
    ),
    "others may read the key": (
        lambda one, _: (one.ssh / "id_ed25519").chmod(0o644), r"ok +ok +ok +refused", r"chmod 600 ~/\.ssh/id_ed25519", 1,
    ),
    "others may write here": (
        lambda one, _: (one.ssh / "config").chmod(0o666), "ssh: Bad owner or permissions on .*", r"chmod 600 ~/\.ssh/config", 1,
    ),
    "no key": (no_key, r"ok +ok +ok +refused", "no key is here that ssh would offer", 2),
    "no sshd": (lambda _, two: two.stop_sshd(), r"ok +nobody listens +- +-", "no sshd is there:", 0),
    "no answer": (lambda one, two: cut(two, one), r"ok +no answer +- +-", "is the machine up, and the port open", 0),
    "passphrase": (
        lambda one, _: one.run(["ssh-keygen", "-q", "-p", "-N", "some words", "-f", one.ssh / "id_ed25519"]),
        r"ok +ok +ok +refused", 'eval "\\$\\(ssh-agent\\)"', 0,
    ),
}  # fmt: skip


@slow
@pytest.mark.parametrize("name", BREAKS)
def test_the_shown_commands_cure(name: str, tmp_path: Path) -> None:
    break_it, row, words, times = BREAKS[name]
    with ssh_nodes(2, tmp_path) as made:
        assert setup(made[0]) == (0, "ssh reaches 10.77.0.2 without a password\n")
        break_it(*made)
        code, said = setup(made[0])
        assert code == 2, said
        assert re.search(rf"^10\.77\.0\.2 +\S+ +{row}$", said, re.MULTILINE), said
        assert re.search(words, said), said
        for _ in range(times):
            obey(said, made)
            code, said = setup(made[0])
        assert code == (0 if times else 2), said


def make_bare(made: list[SshNode], folder: Path) -> None:
    """Leave no sshd, no keys, no ~/.ssh: openssh-server was installed, and nothing else done."""
    for node in made:
        node.stop_sshd()
        shutil.rmtree(node.ssh)
        own = folder / f"etc_ssh.{node.number}"
        shutil.copytree("/etc/ssh", own, ignore=shutil.ignore_patterns("ssh_host_*"))
        node.run(["mount", "--bind", own, "/etc/ssh"])
        node.run(["mount", "-t", "tmpfs", "none", "/run"])


def test_two_bare_containers(tmp_path: Path) -> None:
    """From nothing to a login, by what is shown and nothing else."""
    with ssh_nodes(2, tmp_path) as made:
        make_bare(made, tmp_path)
        for wanted in ("nobody listens", "not known"):
            code, said = setup(made[0], "--ssh_port", "36007")
            assert code == 2
            assert re.search(rf"^10\.77\.0\.2 +36007 .*{wanted}", said, re.MULTILINE), said
            assert said.endswith("\n\nthen call nodes setup again\n")
            obey(said, made)
        assert setup(made[0], "--ssh_port", "36007") == (0, "ssh reaches 10.77.0.2 without a password\n")
        assert made[0].run(["ssh", "-p", "36007", "-o", "BatchMode=yes", made[1].address, "hostname"]) == "node2\n"


@slow
def test_unknown_host_keys_are_taken_over_when_asked_but_no_changed_ones(tmp_path: Path) -> None:
    with ssh_nodes(2, tmp_path) as made:
        one, _ = made
        (one.ssh / "known_hosts").unlink()
        assert setup(one, "--ssh_host_keys", "accept-new")[0] == 0
        assert (one.ssh / "known_hosts").is_file()
        assert setup(one)[0] == 0
        (one.ssh / "known_hosts").write_text(known_host(made[1]))
        other_host_key(*made)
        code, said = setup(one, "--ssh_host_keys", "accept-new")
    assert code == 2
    assert "CHANGED" in said


@slow
@pytest.mark.distributed
def test_the_chapter_of_the_readme(models: Callable[[str], Path], train_file: Path, tmp_path: Path) -> None:
    """Each of its commands, from two bare containers to a finished run. What apt-get installs is here already."""
    chapter = (
        (ROOT / "README.md").read_text(encoding="utf-8").partition("### Several nodes\n")[2].partition("\n### ")[0]
    )
    lines = [line for block in re.findall(r"```sh\n(.*?)```", chapter, re.DOTALL) for line in block.splitlines()]
    ours = {
        "10.0.0.": "10.77.0.", ":8": ":1", " MODEL ": f" {models('hunyuan_v1_dense')} ", "data.jsonl": str(train_file),
        "--output_dir out": f"--output_dir {tmp_path / 'out'} --max_steps 2 --report_to none --save_strategy no",
    }  # fmt: skip
    exports, said = [f"cd {ROOT}", f"export FINEBRIDGE_PYTHON={sys.executable}"], list[str]()
    with ssh_nodes(2, tmp_path) as made:
        make_bare(made, tmp_path)
        for line in lines:
            for old, new in ours.items():
                line = line.replace(old, new)  # noqa: PLW2901
            if line.startswith("export "):
                exports.append(line)
            elif not line.startswith("apt-get "):
                code, text = call(made[0], ["bash", "-ec", "\n".join([*exports, line])])
                if "nodes setup" in line:
                    for _ in range(2):
                        assert code == 2
                        obey(text, made)
                        code, text = call(made[0], ["bash", "-ec", "\n".join([*exports, line])])
                assert code == 0, text
                said.append(text)
        assert [node.running("finebridge") for node in made] == [[], []]
    assert len(said) == 4
    assert said[1] == "ssh reaches 10.77.0.2 without a password\n"
    assert " pdsh -R ssh -f 1 -w 10.77.0.2 " in said[2]
    assert "done: 2 steps" in said[3]


@slow
def test_an_sshd_of_ones_own_without_root(tmp_path: Path) -> None:
    """A user starts it, for that user alone."""
    with ssh_nodes(2, tmp_path) as made:
        one, two = made
        two.stop_sshd()
        with (two.folder / "passwd").open("a") as users:
            users.write("alice:x:2000:2000::/home/alice:/bin/bash\n")
        two.run(["mount", "-t", "tmpfs", "none", "/home"])
        two.run(["install", "-d", "-o", "2000", "-g", "2000", "/home/alice"])
        (one.ssh / "known_hosts").unlink()
        (one.ssh / "config").write_text("Host *\n User alice\n Port 36009\n")
        for wanted in ("nobody listens", "not known"):
            code, said = setup(one)
            assert code == 2
            assert wanted in said
            assert "on 10.77.0.2, as alice:" in said
            obey(said, made, "setpriv", "--reuid=2000", "--regid=2000", "--clear-groups", "env", "HOME=/home/alice")
        assert setup(one) == (0, "ssh reaches 10.77.0.2 without a password\n")
        assert one.run(["ssh", two.address, "id -un"]) == "alice\n"


@pytest.mark.parametrize(
    ("words", "env", "wanted"),
    [
        (
            ["setup", "--ssh_prot", "1"],
            {},
            "--ssh_prot: --hostfile, --ssh_port, --ssh_config, --ssh_host_keys are known here",
        ),
        (["setup", "--ssh_port", "x"], {"NODE_IP_LIST": "a,b"}, "--ssh_port=x: a positive number"),
        (["setup"], {}, "no other machine is named: export NODE_IP_LIST="),
        (["setup"], {"NODE_IP_LIST": "-oProxyCommand=x:1,b:1"}, "NODE_IP_LIST: '-oProxyCommand=x:1' is not HOST"),
        (["check"], {}, "finebridge nodes setup"),
        ([], {}, "finebridge nodes setup"),
    ],
)
def test_bad_input(
    words: list[str], env: dict[str, str], wanted: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:  # fmt: skip
    monkeypatch.delenv("NODE_IP_LIST", raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    assert main(["nodes", *words]) == 2
    assert wanted in capsys.readouterr().err
