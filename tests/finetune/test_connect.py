"""The commands that start the nodes: no shell reads data in them."""

import os
import random
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from finebridge.finetune.connect import Ssh, Start, choose, starts
from finebridge.finetune.node_job import Job, forwarded
from finebridge.finetune.nodes import NodesError

HOSTILE = [
    "$(touch canary)", "`touch canary`", ";touch canary;", "\ntouch canary\n", "'", '"', "\\", "%h", "%%", "é日🎉", "\udcff",
    "-oProxyCommand=x", "--", " ", "\t", "${HOME}", "&", "|", "<", ">", "#", "!", "*", "~", "\x01", "\x7f", "=", "a", "/tmp/a b",
]  # fmt: skip


def job(argv: list[str] | None = None, env: dict[str, str] | None = None, hosts: str = "10.0.0.1 10.0.0.2 n3") -> Job:
    nodes = [(host, 8) for host in hosts.split()]
    return Job("finebridge.train.sft", argv or [], env or {}, nodes, "10.0.0.1", 29500, "/work", "out/logs", 600.0)


@pytest.fixture
def tools(tmp_path: Path) -> dict[str, str]:
    """An environment in which ssh, pdsh and srun are installed."""
    for name in ("ssh", "pdsh", "srun"):
        (tmp_path / name).touch(mode=0o755)
    return {"PATH": str(tmp_path)}


def remote_line(start: Start, host: str) -> str:
    """What sshd on ``host`` hands to the user's shell."""
    if start.command[0] == "ssh":
        return start.command[-1]
    return start.command[-1].replace("%h", host)  # pdsh does so


def test_5000_jobs_cross_a_shell_untouched(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Random arguments and values of the environment, through the lines for ssh and for pdsh."""
    monkeypatch.setattr(sys, "executable", "echo")  # the shell then shows what Python would get
    monkeypatch.delenv("PYTHONPATH", raising=False)
    draw = random.Random(7)
    sent: list[Job] = []
    lines: list[str] = []
    for number in range(5000):
        words = ["".join(draw.choices(HOSTILE, k=draw.randint(0, 6))) for _ in range(draw.randint(0, 5))]
        one = job(words, {f"V{index}": word for index, word in enumerate(words)}, "here n-1.x")
        (start,) = [way for way in starts(one, 0, "ssh" if number % 2 else "pdsh", Ssh()) if way.nodes == (1,)]
        lines.append(remote_line(start, "n-1.x"))
        sent.append(one)
    shown = subprocess.run(
        ["sh"],
        input="\n".join(lines).encode(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        cwd=tmp_path,
        check=True,
    )
    answers = shown.stdout.decode().splitlines()
    assert len(answers) == 5000
    for number, (one, answer) in enumerate(zip(sent, answers, strict=True)):
        *python, word, host = answer.split(" ")
        assert python == ["-P", "-m", "finebridge.finetune.node_launcher"]
        assert host == "n-1.x"
        assert Job.decode(one.encode() if number % 2 else word) == one
        assert (word == "-") == bool(number % 2)
    assert not list(tmp_path.iterdir()), "nothing was executed"


@pytest.mark.parametrize("word", ["", "-", "x" * 40, "W10=", "e30=", "$(x)"])
def test_what_is_no_job_is_refused(word: str) -> None:
    with pytest.raises(NodesError, match="no job of finebridge"):
        Job.decode(word)


def test_a_job_of_another_version_is_refused() -> None:
    with pytest.raises(NodesError, match=r"is installed here, the run was started with 0\.0\.0"):
        Job.decode(Job("m", [], {}, [], "a", 1, "/", "l", 1.0, version="0.0.0").encode())


def test_the_first_rank_of_each_node() -> None:
    uneven = Job("m", [], {}, [("a", 16), ("b", 8), ("c", 1)], "a", 1, "/", "l", 1.0)
    assert [uneven.first_rank(number) for number in range(3)] == [0, 16, 24]
    assert uneven.world == 25


def test_the_command_of_pdsh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PDSH_SSH_ARGS_APPEND", "-i /key")
    one = job()
    local, pdsh = starts(one, 1, "pdsh", Ssh(port=36005))
    assert (local.nodes, local.command[-2:], local.fed) == ((1,), ["-", "10.0.0.2"], True)
    assert pdsh.nodes == (0, 2)
    assert pdsh.command[:7] == ["pdsh", "-R", "ssh", "-f", "2", "-w", "10.0.0.1,n3"]
    assert pdsh.command[-1].endswith(f"-m finebridge.finetune.node_launcher {one.encode()} %h")
    options = pdsh.env["PDSH_SSH_ARGS_APPEND"]
    assert "-p 36005 -oBatchMode=yes -oStrictHostKeyChecking=yes" in options
    assert options.endswith(" -i /key"), "what the user has set stays"
    assert shlex.split(pdsh.shown())[1:] == pdsh.command


def test_the_commands_of_ssh() -> None:
    config = Path("/a b/config")
    first, second, third = starts(job(), None, "ssh", Ssh(22, config, "accept-new"))
    assert [one.nodes for one in (first, second, third)] == [(0,), (1,), (2,)]
    assert first.command[:7] == ["ssh", "-a", "-x", "-F", "/a b/config", "-p", "22"]
    assert "-oStrictHostKeyChecking=accept-new" in first.command
    assert "-oBatchMode=yes" in first.command
    assert first.command[-3:-1] == ["--", "10.0.0.1"]
    assert first.command[-1].endswith("-m finebridge.finetune.node_launcher - 10.0.0.1")
    assert job().encode() not in first.shown(), "it comes over standard input"


def test_the_command_of_srun() -> None:
    (one,) = starts(job(), 0, "srun", Ssh())
    assert one.nodes == (0, 1, 2)
    assert one.command[:5] == ["srun", "--nodes", "3", "--ntasks", "3"]
    assert one.command[-4:] == ["-P", "-m", "finebridge.finetune.node_launcher", "-"]


@pytest.mark.parametrize("path", ["/a'b/python", "/a$(touch x)/python", "/a\nb", "/a%h", "/a!b", "/a\\b", "/a`b`"])
def test_a_path_that_a_shell_could_misread_is_refused(monkeypatch: pytest.MonkeyPatch, path: str) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(sys, "executable", path)
        with pytest.raises(NodesError, match="the path of Python must be without quotes"):
            starts(job(), 0, "ssh", Ssh())
    monkeypatch.setenv("PYTHONPATH", path)
    with pytest.raises(NodesError, match="PYTHONPATH must be without quotes"):
        starts(job(), 0, "pdsh", Ssh())


def test_a_path_with_blanks_is_one_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "executable", "/my venv/größe/python")
    monkeypatch.setenv("PYTHONPATH", "/my code:/more")
    line = starts(job(), 0, "ssh", Ssh())[1].command[-1]
    assert shlex.split(line)[:3] == ["env", "PYTHONPATH=/my code:/more", "/my venv/größe/python"]


def test_pdsh_is_the_default_and_ssh_takes_what_pdsh_cannot(tools: dict[str, str]) -> None:
    def chosen(one: Job, here: int | None = 0, ssh: Ssh | None = None) -> tuple[str, str]:
        return choose(None, one, tools, slurm=False, here=here, ssh=ssh or Ssh())

    assert chosen(job()) == ("pdsh", "")
    for one, words in [
        (job(env={"WANDB_API_KEY": "k"}), "WANDB_API_KEY would be seen"),
        (job(env={"HF_TOKEN": "t"}), "HF_TOKEN would be seen"),
        (job(hosts="10.0.0.1 fe80::1"), "IPv6 address fe80::1"),
        (job(["x" * 200_000]), "too long for pdsh"),
    ]:
        launcher, why = chosen(one)
        assert launcher == "ssh"
        assert words in why
        with pytest.raises(NodesError, match="--launcher pdsh: .*; take --launcher ssh"):
            choose("pdsh", one, tools, slurm=False, here=0, ssh=Ssh())
    assert chosen(job(), here=None)[0] == "ssh"
    assert chosen(job(), ssh=Ssh(config=Path("/a b")))[0] == "ssh"
    (Path(tools["PATH"]) / "pdsh").unlink()
    assert chosen(job()) == ("ssh", "pdsh is not installed here")
    assert choose(None, job(), tools, slurm=True, here=0, ssh=Ssh()) == ("srun", "")
    for name in ("ssh", "srun"):
        (Path(tools["PATH"]) / name).unlink()
    for slurm in (True, False):
        with pytest.raises(NodesError, match="ssh is not installed here: .* --no_ssh --node_rank R"):
            choose(None, job(), tools, slurm=slurm, here=0, ssh=Ssh())


def test_what_is_forwarded() -> None:
    env = {
        "NCCL_DEBUG": "INFO", "HF_HOME": "/a b", "TORCH_HOME": "", "WANDB_MODE": "offline", "CUDA_HOME": "/cuda",
        "OMP_NUM_THREADS": "4", "GLOO_SOCKET_IFNAME": "eth0", "CUDA_VISIBLE_DEVICES": "0", "PATH": "/bin", "HOME": "/root",
        "MINE": "x", "XHF_": "no",
    }  # fmt: skip
    always = ["CUDA_HOME", "GLOO_SOCKET_IFNAME", "HF_HOME", "NCCL_DEBUG", "OMP_NUM_THREADS", "TORCH_HOME", "WANDB_MODE"]
    assert list(forwarded(env, [])) == always
    more = forwarded(env, ["MINE", "CUDA_VISIBLE_DEVICES", "PATH"])
    assert more == {name: env[name] for name in [*always, "MINE", "CUDA_VISIBLE_DEVICES", "PATH"]}
    for name, words in [("A=B", "no name"), ("RANK", "the launcher sets it"), ("NONE", "not set"), ("$(x)", "no name")]:
        with pytest.raises(NodesError, match=words):
            forwarded(env, [name])


def test_the_environment_of_this_process_travels_whole() -> None:
    one = job(env=dict(os.environ))
    assert Job.decode(one.encode()).env == dict(os.environ)
