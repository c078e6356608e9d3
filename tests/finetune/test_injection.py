"""No list of hosts, hostfile, variable, flag or path of the user is ever executed, or taken for an option (R19)."""

import os
import random
import re
import socket
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from finebridge.finetune import cluster
from finebridge.finetune.beats import Beats
from finebridge.finetune.connect import Start
from finebridge.finetune.launch import Ended
from finebridge.finetune.node_job import Job
from finebridge.finetune.nodes import NodesError

HOSTILE = [
    "$(touch canary)", "`touch canary`", ";touch canary;", "|touch canary", "\ntouch canary\n", "&", "'", '"', "\\", " ", "\t",
    "\r", "-", "--", "-oProxyCommand=touch canary", "größe", "日本", "🎉", "%h",
    "^/etc/passwd", "@", "*", "~", "#", "\x1b[31m", "=",
]  # fmt: skip
PLAIN = ["a", "n-1.x", "10.0.0.2", "[::1]", "[fd00::2]", "7", ":8", ",", "slots=8"]
LIST, FILE = "10.0.0.1:8,10.0.0.2:8", "10.0.0.1 slots=8\n10.0.0.2 slots=8\n"
SANE: dict[str, str] = {
    "NODE_IP_LIST": LIST, "LOCAL_IP": "10.0.0.1", "HOST_GPU_NUM": "8", "NODES": "2", "NODE_NUM": "16", "hostfile": FILE,
    "SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "8", "SLURMD_NODENAME": "n1", "launcher": "ssh",
    "master_addr": "10.0.0.1", "master_port": "29500", "ssh_port": "36005", "ssh_config": "config", "ssh_host_keys": "known",
    "log_dir": "logs", "forward_env": "MINE", "net_interface": "bond1", "ib_hca": "mlx5_1", "ib_tc": "160",
    "HF_TEXT": "x", "output_dir": "out", "folder": "work", "word": "--flag",
}  # fmt: skip
OPTIONAL = ("hostfile", "SLURM_JOB_NODELIST", "master_addr", "ssh_config", "log_dir", "launcher")
HOST = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*|[0-9a-f:.]+", re.IGNORECASE)
ANYTHING = ("log_dir", "HF_TEXT", "output_dir", "folder", "word")  # where every text is right


class Caught:
    """Stands where ``Remote`` would start the processes, and keeps what it was given."""

    got: tuple[Job, list[Start]] | None = None

    def __init__(self, job: Job, ways: list[Start], beats: Beats | None) -> None:
        Caught.got = (job, ways)
        if beats is not None:
            beats.close()

    def run(self) -> Ended:
        return Ended(0)


def settings(draw: random.Random) -> tuple[dict[str, str], list[str]]:
    """Values for one run, and which of them are hostile."""
    values = {name: text for name, text in SANE.items() if name not in OPTIONAL or draw.random() < 0.5}
    if "SLURM_JOB_NODELIST" in values and draw.random() < 0.5:
        values = {name: text for name, text in values.items() if name not in ("NODE_IP_LIST", "hostfile", "LOCAL_IP")}
    values["launcher"] = draw.choice(("ssh", "pdsh"))
    chosen = draw.sample(sorted(values), draw.randint(1, 2))
    for name in chosen:
        pieces = draw.choices(HOSTILE, k=draw.randint(1, 2)) + draw.choices(PLAIN, k=draw.randint(0, 2))
        draw.shuffle(pieces)
        sane = values[name] if draw.random() < 0.5 else ""
        values[name] = draw.choice((sane + "".join(pieces), "".join(pieces) + sane))
    return values, chosen


def place(values: dict[str, str], folder: Path) -> Path:
    """The working directory."""
    return folder / "works" / values["folder"].replace("/", "_")


def run(values: dict[str, str], folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Job, list[Start]]:
    """The job and the commands of a run with these values. Raises NodesError."""
    flags: dict[str, Any] = {name: text for name, text in values.items() if name in cluster.NODE_FLAGS}
    for name in ("hostfile", "ssh_config"):
        if name in values:
            path = folder / name / values[name].replace("/", "_")[:80]
            path.parent.mkdir(exist_ok=True)
            path.write_text(values[name] if name == "hostfile" else "")
            flags[name] = str(path)
    work = place(values, folder)
    work.mkdir(parents=True, exist_ok=True)
    monkeypatch.chdir(work)
    env = {name: text for name, text in values.items() if name.isupper()}
    env |= {"MINE": values["HF_TEXT"], "PATH": os.environ["PATH"]}
    for name in (*SANE, "MINE"):
        monkeypatch.delenv(name, raising=False)
    for name, text in env.items():
        monkeypatch.setenv(name, text)
    Caught.got = None
    cluster.take({**flags, "preflight": "off"}, env, None, lambda: 8).run(
        "finebridge.train.sft", [values["word"]], values["output_dir"], 60.0
    )
    assert Caught.got is not None
    return Caught.got


def check(values: dict[str, str], job: Job, ways: list[Start], folder: Path) -> list[str]:
    """What was taken arrives as it is, every host is one; the lines that a shell on a node would read."""
    assert job.argv == [values["word"]]
    assert job.env["HF_TEXT"] == job.env["MINE"] == values["HF_TEXT"]
    assert job.logs == values.get("log_dir", str(Path(values["output_dir"]) / "logs"))
    assert job.folder == str(place(values, folder))
    assert Job.decode(job.encode()) == job
    lines: list[str] = []
    for way in ways:
        if way.command[0] == "ssh":
            host, line = way.command[way.command.index("--") + 1 :]
        elif way.command[0] == "pdsh":
            assert way.command[1:6] == ["-R", "ssh", "-f", "1", "-w"]
            host, line = way.command[6:]
            assert not re.search(r"[\n;`$'\"]", way.env["PDSH_SSH_ARGS_APPEND"])
        else:
            assert way.command[:3] == [sys.executable, "-P", "-m"]
            assert HOST.fullmatch(way.command[-1])
            continue
        assert HOST.fullmatch(host), host
        lines.append(line.replace("%h", host))
    return lines


@pytest.mark.parametrize("count", [500, pytest.param(5000, marks=pytest.mark.slow)])
def test_hostile_settings(count: int, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Lists, hostfiles, variables, flags, paths and arguments: taken to the letter, or refused; never executed."""

    def unresolved(*_: object, **__: object) -> None:
        raise OSError("no name is looked up")

    tools = tmp_path / "tools"
    tools.mkdir()
    for name in ("ssh", "pdsh"):
        (tools / name).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tools))
    monkeypatch.setattr(cluster, "Remote", Caught)
    monkeypatch.setattr(socket, "getaddrinfo", unresolved)
    monkeypatch.setattr(sys, "executable", "echo")
    monkeypatch.delenv("PYTHONPATH", raising=False)
    draw, lines, taken, refused = random.Random(19), list[str](), Counter[str](), Counter[str]()
    for _ in range(count):
        values, hostile = settings(draw)
        try:
            job, ways = run(values, tmp_path, monkeypatch)
        except NodesError:
            assert not set(hostile) <= set(ANYTHING), values
            refused.update(hostile)
        else:
            lines += check(values, job, ways, tmp_path)
            taken.update(hostile)
    shell = tmp_path / "shell"
    shell.mkdir()
    shown = subprocess.run(["/bin/sh"], input="\n".join(lines).encode(), capture_output=True, cwd=shell, check=True)
    assert len(shown.stdout.splitlines()) == len(lines) > count / 8
    assert not shown.stderr
    assert not list(tmp_path.rglob("canary"))
    assert min(refused[name] + taken[name] for name in SANE) > count / 200, "all were tried"
    assert min(taken[name] for name in ANYTHING) > count / 200
