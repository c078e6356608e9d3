"""Where a run takes place: the flags about nodes, and one call that starts its ranks here or on all of them."""

import os
import re
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, get_args

from ..train.launched import RESTART
from . import launch, slurm
from .beats import Beats
from .connect import HOST_KEYS, LAUNCHERS, Launcher, Ssh, choose, starts
from .launch import Ended, Stop, free_port, say
from .network import NETWORK_FLAGS, network_variables
from .node_job import Job, forwarded, here
from .node_launcher import run_node
from .nodes import (
    SLURM,
    Node,
    NodesError,
    check_reachable_names,
    counted,
    host_name,
    listed_nodes,
    positive,
    this_node,
    write_hostfiles,
)
from .preflight import Mode, Preflight
from .rank_logs import RankLogs
from .remote import Remote, tell_failed
from .restart import Restarts

MASTER_PORT = 29500  # where rank 0 listens when the nodes are started by hand, or this machine is not the first
NODE_FLAGS = {
    "hostfile": "FILE\n      the nodes, a line HOST slots=N each; else NODE_IP_LIST, else Slurm's allocation",
    "launcher": "pdsh|ssh|srun\n      what starts the nodes (default: srun in a Slurm job, else pdsh, ssh where that is absent)",
    "no_ssh": "\n      start this node's ranks only, by hand on every node, with --node_rank and --master_addr",
    "node_rank": "R\n      with --no_ssh: which node this is, from 0 on",
    "master_addr": "HOST\n      where the others reach the first node (default: as the list names it)",
    "master_port": "P\n      rank 0's port (default: a free one, or 29500 when the first node is not this machine)",
    "ssh_port": "P\n      sshd's port on the nodes (default: as ~/.ssh/config says)",
    "ssh_config": "FILE\n      ssh's configuration instead of ~/.ssh/config",
    "ssh_host_keys": "known|accept-new\n      nodes whose host key is not known are refused (default), or taken over once",
    "forward_env": "NAME,NAME\n      variables that reach the nodes, beside NCCL_*, HF_*, TORCH_*, WANDB_* and CUDA_*",
    **{name: flag.text for name, flag in NETWORK_FLAGS.items()},
    "preflight": "on|only|off\n      check all nodes before any rank is started (default: on), or only that; see the README",
    "dry_run": "\n      show the nodes and the commands that would start them, and end",
    "log_dir": "DIR\n      one log for each rank, on its node (default: logs in --output_dir)",
}


Room = Sequence[tuple[str, str, int]]


@dataclass(frozen=True, slots=True)
class Cluster:
    """The nodes of a run, which of them is this machine, and how the others are reached."""

    nodes: list[Node]
    here: int | None = 0
    remote: bool = False  # whether ranks of other machines belong to the run
    launcher: Launcher | None = None
    slurm: bool = False
    by_hand: bool = False
    master_addr: str = ""
    master_port: int | None = None
    ssh: Ssh = field(default_factory=Ssh)
    forward: tuple[str, ...] = ()
    network: dict[str, str] = field(default_factory=dict[str, str])  # variables that the flags about it set
    log_dir: str = ""
    dry_run: bool = False
    preflight: Mode = "on"
    measured: bool = False  # whether the links between the nodes have passed a preflight already

    @property
    def processes(self) -> int:
        """The number of ranks, on all nodes."""
        return sum(node.slots or 0 for node in self.nodes)

    @property
    def leads(self) -> bool:
        """Whether this process does what is done once a run; by hand only that of the first node does."""
        return not self.by_hand or self.here == 0

    def check(self, argv: Sequence[str], output_dir: str, room: Room = ()) -> int:
        """The preflight of a run with these flags, unless it is off; 0 when all is well. Raises NodesError.

        ``room`` tells flag, path and bytes of what will be written. One machine is looked at only when that is all.
        """
        if self.preflight == "off" or self.dry_run or not (self.remote or self.preflight == "only"):
            return 0
        job, only = self._job("", argv, output_dir, 0.0), self.preflight == "only"
        if self.by_hand or not self.remote:
            return Preflight(job, output_dir, self.here, "ssh", self.ssh, room).run_here(only=only)
        launcher, _ = choose(self.launcher, job, os.environ, slurm=self.slurm, here=self.here, ssh=self.ssh)
        return Preflight(job, output_dir, self.here, launcher, self.ssh, room, links=not self.measured).run(only=only)

    def run(
        self,
        module: str,
        argv: Sequence[str],
        output_dir: str,
        stop_grace: float,
        room: Room = (),
        restarts: Restarts | None = None,
    ) -> int:
        """Run ``python -P -m module argv`` as all ranks, or with --dry_run show how; the exit code. Raises NodesError.

        Before that comes ``check``; what it finds ends the run with 2.
        """
        if (code := self.check(argv, output_dir, room)) or self.preflight == "only":
            return code
        if not self.remote:
            if self.dry_run:
                print(
                    f"one machine, {self.processes} ranks, each: {shlex.join([sys.executable, '-P', '-m', module, *argv])}"
                )
                return 0
            os.environ.update(self.network)
            if restarts is None:
                return launch.run_ranks(module, argv, self.processes, stop_grace)

            def alone(_: Sequence[Node], words: Sequence[str], told: str) -> Ended:
                os.environ[RESTART] = told  # which the ranks inherit
                return launch.run_all(module, words, self.processes, stop_grace)

            return restarts.run(self.nodes, alone)
        job = self._job(module, argv, output_dir, stop_grace)
        if self.by_hand:
            return self._by_hand(job)
        launcher, why = choose(self.launcher, job, os.environ, slurm=self.slurm, here=self.here, ssh=self.ssh)
        if self.dry_run:
            self._tell(job, launcher, why)
            for way in starts(job, self.here, launcher, self.ssh):
                print(way.shown())
            return 0
        if restarts is None:
            return self.attempt(module, argv, output_dir, stop_grace, launcher, why).code
        if restarts.elastic and launcher == "srun":
            raise NodesError("--elastic: srun starts all nodes of the allocation or none; take --launcher ssh")

        def attempt(nodes: Sequence[Node], words: Sequence[str], told: str) -> Ended:
            where = replace(self, nodes=list(nodes))
            return where.attempt(module, words, output_dir, stop_grace, launcher, why, told)

        return restarts.run(self.nodes, attempt)

    def attempt(
        self,
        module: str,
        argv: Sequence[str],
        output_dir: str,
        stop_grace: float,
        launcher: Launcher,
        why: str,
        told: str = "",
    ) -> Ended:
        """Start all nodes once and wait for the end; ``told`` is what the ranks learn of a restart. Raises NodesError."""
        job = self._job(module, argv, output_dir, stop_grace)
        if told:
            job = replace(job, env={**job.env, RESTART: told})
        beats = None
        if launcher == "pdsh" and self.here is not None:
            beats = Beats()
            host = job.master if self.here == 0 else self.nodes[self.here].host
            job = replace(job, beats=(host, beats.port))
        ways = starts(job, self.here, launcher, self.ssh)
        self._tell(job, launcher, why)
        logs = Path(job.logs)
        logs.mkdir(parents=True, exist_ok=True)
        write_hostfiles(self.nodes, logs)
        return Remote(job, ways, beats).run()

    def _job(self, module: str, argv: Sequence[str], output_dir: str, stop_grace: float) -> Job:
        port = self.master_port or (free_port("") if self.here == 0 and not self.by_hand else MASTER_PORT)
        nodes = [(node.host, node.slots or 1) for node in self.nodes]
        master = self.master_addr or self.nodes[0].host
        logs = self.log_dir or str(Path(output_dir) / "logs")
        env = forwarded({**os.environ, **self.network}, self.forward)
        return Job(module, list(argv), env, nodes, master, port, here(), logs, stop_grace)

    def _tell(self, job: Job, launcher: str, why: str) -> None:
        nodes = ", ".join(f"{host} ({slots})" for host, slots in job.nodes)
        reason = f", as {why}" if why else ""
        names = ", ".join(name for name in job.env if name != RESTART)
        say(f"{len(job.nodes)} nodes, {job.world} ranks: {nodes}; rank 0 at {job.master} port {job.port}")
        say(f"started by {launcher}{reason}; forwarded: {names or 'no variable'}; logs: {job.logs}")

    def _by_hand(self, job: Job) -> int:
        """This node's ranks; the other nodes are started in the same way by who started this one."""
        number = self.here or 0
        host, slots = job.nodes[number]
        first = job.first_rank(number)
        say(f"node {number} of {len(job.nodes)}, ranks {first} to {first + slots - 1} of {job.world}; logs: {job.logs}")
        if self.dry_run:
            return 0
        logs = RankLogs(Path(job.logs))
        logs.folder.mkdir(parents=True, exist_ok=True)
        told = run_node(job, number, Stop(job.stop_grace), logs, say)
        if told.rank is not None:
            tell_failed(told, host)
        elif told.why:
            say(f"error: {told.why}")
        return told.code


def take(values: dict[str, Any], env: Mapping[str, str], asked: int | None, gpus: Callable[[], int]) -> Cluster:
    """Take the flags of NODE_FLAGS out of ``values``; where the run takes place. ``asked`` is --nproc_per_node.

    Raises NodesError on a flag, a list of nodes or a variable that is wrong, or contradicts another.
    """
    given = {name: "" if (value := values.pop(name, "")) is None else str(value) for name in NODE_FLAGS}
    numbers = {name: positive(given[name], f"--{name}") for name in ("master_port", "ssh_port")}
    for name, number in numbers.items():
        if number and number > 65_535:  # noqa: PLR2004 - the last port
            raise NodesError(f"--{name} {number}: a port is expected")
    ssh = Ssh(numbers["ssh_port"], _file(given["ssh_config"], "ssh_config"), given["ssh_host_keys"] or "known")
    if ssh.host_keys not in HOST_KEYS:
        raise NodesError(f"--ssh_host_keys {ssh.host_keys}: {' or '.join(HOST_KEYS)} is expected")
    asked_for = {"": "on", "true": "on", "false": "off"}.get(
        given["preflight"].lower(), given["preflight"]
    )  # YAML's on, off
    mode = next((name for name in get_args(Mode) if name == asked_for), None)
    if mode is None:
        raise NodesError(f"--preflight {given['preflight']}: on, only or off is expected")
    launcher = next((name for name in LAUNCHERS if name == given["launcher"]), None)
    if given["launcher"] and launcher is None:
        raise NodesError(f"--launcher {given['launcher']}: {', '.join(LAUNCHERS)} are known")
    common: dict[str, Any] = {
        "launcher": launcher,
        "master_addr": host_name(given["master_addr"], "--master_addr") if given["master_addr"] else "",
        "master_port": numbers["master_port"],
        "ssh": ssh,
        "forward": tuple(filter(None, given["forward_env"].split(","))),
        "network": network_variables(given, env),
        "log_dir": given["log_dir"],
        "dry_run": _switch(given["dry_run"], "dry_run"),
        "preflight": mode,
    }
    nodes, source = listed_nodes(env, _file(given["hostfile"], "hostfile"))
    rank = _node_rank(given["node_rank"])
    no_ssh = _switch(given["no_ssh"], "no_ssh")
    if source == SLURM and slurm.tasks_of_step(env) > 1 and not no_ssh:
        no_ssh, rank = True, _task(env, len(nodes))
    if no_ssh:
        nodes, source = _unnamed(nodes, source, env, common["master_addr"])
        mine = _this_one(nodes, source, rank, env)
        return Cluster(counted(nodes, source, env, asked, gpus), mine, len(nodes) > 1, by_hand=True, **common)
    if rank is not None:
        raise NodesError("--node_rank is for --no_ssh, where every node is started by hand")
    alone = len(nodes) < 2 and source != SLURM and not (nodes and env.get("LOCAL_IP"))  # noqa: PLR2004 - one machine
    mine = 0 if alone else this_node(nodes, source, env)
    full = counted(nodes, source, env, asked, gpus if mine is not None else _unknown)
    check_reachable_names(full, source)
    return Cluster(full, mine, len(nodes) > 1 or mine is None, slurm=source == SLURM, **common)


def _unnamed(nodes: list[Node], source: str, env: Mapping[str, str], master: str) -> tuple[list[Node], str]:
    """The nodes of a run that is started by hand: named ones, or NODES of them whose names nobody needs."""
    if nodes:
        return nodes, source
    count = positive(env.get("NODES", ""), "NODES")
    if count is None or (count > 1 and not master):
        raise NodesError(
            "--no_ssh: name the nodes by NODE_IP_LIST or --hostfile, or give NODES, their number, and --master_addr"
        )
    return [Node(f"node-{number}", None) for number in range(count)], "NODES"


def _this_one(nodes: Sequence[Node], source: str, rank: int | None, env: Mapping[str, str]) -> int:
    """Which node this is, by --node_rank or by itself."""
    found = this_node(nodes, source, env) if source != "NODES" and (rank is None or env.get("LOCAL_IP")) else rank
    if rank is not None and found != rank:
        raise NodesError(f"--node_rank {rank}, but LOCAL_IP={env.get('LOCAL_IP')} is node {found} of {source}")
    if found is None or found >= len(nodes):
        raise NodesError(f"--no_ssh: --node_rank is from 0 to {len(nodes) - 1}, and tells which of the nodes this is")
    return found


def _task(env: Mapping[str, str], count: int) -> int:
    try:
        return slurm.task_of_step(env, count)
    except slurm.SlurmError as error:
        raise NodesError(str(error)) from None


def _unknown() -> int:
    raise NodesError(
        "this machine is none of the nodes: say how many processes each takes, by HOST:SLOTS or HOST_GPU_NUM"
    )


def _node_rank(text: str) -> int | None:
    if text and not re.fullmatch(r"[0-9]{1,5}", text):
        raise NodesError(f"--node_rank {text}: a number from 0 on is expected")
    return int(text) if text else None


def _switch(text: str, name: str) -> bool:
    if text.lower() not in ("", "true", "false"):
        raise NodesError(f"--{name} {text}: true or false is expected")
    return text.lower() == "true"


def _file(text: str, name: str) -> Path | None:
    if text and not Path(text).is_file():
        raise NodesError(f"--{name} {text}: no such file")
    return Path(text).absolute() if text else None
