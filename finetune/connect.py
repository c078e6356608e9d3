"""How the launcher of each node is started: directly, by ssh, by pdsh, or by Slurm's srun.

What a remote shell reads is the path of Python, which must be plain, and words of letters and digits: the job is one word
of base64, or comes over standard input, where no list of processes shows it.

DeepSpeed's own launcher is not used (read in deepspeed 0.19.8, ``launcher/multinode_runner.py``): it exports values of the
environment unquoted, so that ``$(...)`` in one of them is executed on every node; it takes any word for a host, an option of
ssh as well; it forwards neither HF_* nor TORCH_* nor CUDA_*; when one node fails the others go on; on Ctrl-C it ends, by
``pkill -f``, every DeepSpeed run on those machines, other people's too.
"""

import os
import re
import shlex
import shutil
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

from .node_job import Job, secret_names
from .nodes import NodesError

Launcher = Literal["pdsh", "ssh", "srun"]
LAUNCHERS: tuple[Launcher, ...] = get_args(Launcher)
HOST_KEYS = {"known": "yes", "accept-new": "accept-new"}  # --ssh_host_keys: ssh's StrictHostKeyChecking
LAUNCH = "finebridge.finetune.node_launcher"  # what is started on every node
_LONGEST_WORD = 120_000  # bytes; Linux takes 128 KiB in one word of a command line
_PLAIN = re.compile(r"[^\x00-\x1f\x7f'\"\\!$`%]+")  # survives single quotes in every shell, and pdsh's %h


@dataclass(frozen=True, slots=True)
class Start:
    """One process on this machine, which starts the launchers of some nodes.

    With ``fed`` its standard input reaches them: the job's word (unless it is in the command), then what keeps them alive.
    """

    nodes: tuple[int, ...]
    command: list[str]
    env: dict[str, str] = field(default_factory=dict[str, str])
    fed: bool = True

    def shown(self) -> str:
        """The command as a shell would take it."""
        return shlex.join([*(f"{name}={value}" for name, value in self.env.items()), *self.command])


@dataclass(frozen=True, slots=True)
class Ssh:
    """How ssh is called: port and configuration file, when they are not those of ``~/.ssh/config``, and the host keys.

    ``patience`` is for the connection, in seconds; ``more`` are words that follow the options.
    """

    port: int | None = None
    config: Path | None = None
    host_keys: str = "known"
    patience: int = 10
    more: tuple[str, ...] = ()

    def options(self) -> list[str]:
        """Options that never ask anything, notice a lost network within 30 s, and share no connection with others."""
        settings = {
            "BatchMode": "yes",
            "StrictHostKeyChecking": HOST_KEYS[self.host_keys],
            "ConnectTimeout": str(self.patience),
            "ServerAliveInterval": "10",
            "ServerAliveCountMax": "3",
            "ClearAllForwardings": "yes",
            "ControlPath": "none",
            "PermitLocalCommand": "no",
            "RequestTTY": "no",
            "LogLevel": "ERROR",
        }
        chosen = [*(["-F", str(self.config)] if self.config else []), *(["-p", str(self.port)] if self.port else [])]
        return ["-a", "-x", *chosen, *(f"-o{name}={value}" for name, value in settings.items()), *self.more]


def starts(job: Job, here: int | None, launcher: Launcher, ssh: Ssh, module: str = LAUNCH) -> list[Start]:
    """The processes that start ``module`` on all nodes of a job; the node that is this machine needs no ssh.

    Raises NodesError.
    """
    if launcher == "srun":
        return [_srun(job, module)]
    others = tuple(number for number in range(len(job.nodes)) if number != here)
    local = [] if here is None else [Start((here,), [*_python(module), "-", job.nodes[here][0]])]
    if launcher == "pdsh" and others:  # an elastic run may have lost them all
        return [*local, _pdsh(job, others, ssh, module)]
    return [*local, *(_ssh(job, number, ssh, module) for number in others)]


def choose(
    asked: Launcher | None, job: Job, env: Mapping[str, str], *, slurm: bool, here: int | None, ssh: Ssh
) -> tuple[Launcher, str]:
    """What starts the nodes, and why when that is not the default: srun for Slurm's nodes, pdsh where it is installed, ssh.

    Raises NodesError when ``asked`` cannot do it.
    """
    launcher = asked or ("srun" if slurm and shutil.which("srun", path=env.get("PATH")) else "pdsh")
    why = _hinders_pdsh(job, env, here, ssh) if launcher == "pdsh" else ""
    if why and asked:
        raise NodesError(f"--launcher pdsh: {why}; take --launcher ssh")
    chosen: Launcher = "ssh" if why else launcher
    if not shutil.which(chosen, path=env.get("PATH")):
        raise NodesError(
            f"{chosen} is not installed here: apt-get install -y openssh-client pdsh; or start every node by hand with "
            "--no_ssh --node_rank R --master_addr A"
        )
    return chosen, why


def _hinders_pdsh(job: Job, env: Mapping[str, str], here: int | None, ssh: Ssh) -> str:
    """Why pdsh cannot start these nodes, or "". It has no standard input for them: all is on its command line."""
    if not shutil.which("pdsh", path=env.get("PATH")):
        return "pdsh is not installed here"
    if here is None:
        return "this machine is none of the nodes, and pdsh passes no SIGTERM on (LOCAL_IP says which one it is)"
    if secrets := secret_names(job.env):
        return f"{secrets[0]} would be seen in every node's list of processes with pdsh"
    if address := next((host for host, _ in job.nodes if ":" in host), None):
        return f"pdsh does not take the IPv6 address {address}"
    if ssh.config and not re.fullmatch(r"[\w@+=:,./~-]+", str(ssh.config)):
        return f"pdsh parts --ssh_config {ssh.config} at its blanks"
    return "the arguments are too long for pdsh" if len(job.encode()) > _LONGEST_WORD else ""


def _python(module: str) -> list[str]:
    return [sys.executable, "-P", "-m", module]


def _remote(module: str, *words: str) -> str:
    """The line for a remote shell. Raises NodesError when a path is not plain."""
    path = os.environ.get("PYTHONPATH", "")
    for name, text in (("the path of Python", sys.executable), ("PYTHONPATH", path or ".")):
        if not _PLAIN.fullmatch(text):
            raise NodesError(f"{name} must be without quotes, $, %, !, backslashes and line breaks: {text!r}")
    return shlex.join([*(["env", f"PYTHONPATH={path}"] if path else []), *_python(module), *words])


def _ssh(job: Job, number: int, ssh: Ssh, module: str) -> Start:
    host = job.nodes[number][0]
    return Start((number,), ["ssh", *ssh.options(), "--", host, _remote(module, "-", host)])


def _pdsh(job: Job, others: tuple[int, ...], ssh: Ssh, module: str) -> Start:
    """One pdsh for all: ``-f`` starts them all at once, ``%h`` is the host."""
    options = " ".join([*ssh.options(), os.environ.get("PDSH_SSH_ARGS_APPEND", "")]).strip()
    hosts = ",".join(job.nodes[number][0] for number in others)
    command = ["pdsh", "-R", "ssh", "-f", str(len(others)), "-w", hosts, _remote(module, job.encode(), "%h")]
    return Start(others, command, {"PDSH_SSH_ARGS_APPEND": options}, fed=False)


def _srun(job: Job, module: str) -> Start:
    """One task a node with all of its cores and GPUs; srun gives each its standard input, and no shell reads the words."""
    count = str(len(job.nodes))
    options = [
        "--nodes",
        count,
        "--ntasks",
        count,
        "--ntasks-per-node=1",
        "--cpu-bind=none",
        "--kill-on-bad-exit=1",
        "--overlap",
    ]
    return Start(tuple(range(len(job.nodes))), ["srun", *options, "--unbuffered", *_python(module), "-"])
