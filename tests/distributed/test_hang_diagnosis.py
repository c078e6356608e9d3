"""Ranks, launchers and cables that fail on two nodes: the launching terminal names them, and nothing is left on any node.

Each node has a network, processes and an sshd of its own; pdsh starts them. ``FINEBRIDGE_TRIALS=50`` repeats each slow case.
"""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from finebridge.train.record import read_record
from namespaced_nodes import SshNode, cut, ssh_nodes
from rank_runner import RankRunner

pytestmark = pytest.mark.distributed
TRIALS = int(os.environ.get("FINEBRIDGE_TRIALS", "1"))
TESTS = Path(__file__).parents[1]
HOST = "10.77.0.2"
CLI = "finebridge.finetune.cli"

# In the place of the trainer, which takes long to import: gloo's collectives under the real watch, whose limit
# is 3 s. Tells when it is at work.
RANK = """
import sys, time
from pathlib import Path
from finebridge.train.orphans import die_with_launcher
die_with_launcher()
import torch
import torch.distributed as dist
from finebridge.train import heartbeat, runtime
folder, limit = Path(sys.argv[1]), float(sys.argv[2])
dist.init_process_group("gloo")
rank, numbers = dist.get_rank(), torch.zeros(1000)
heartbeat.start(limit, folder)
began = time.monotonic()
with heartbeat.told():
    for step in range(100_000):
        heartbeat.enter("data", step)
        while (folder / f"block-{rank}").exists():
            time.sleep(0.01)
        heartbeat.enter("backward")
        dist.all_reduce(numbers)
        if time.monotonic() - began > 1.0:  # a beat told of a step
            (folder / f"at-work-{rank}").touch()
        time.sleep(0.005)
"""
VERDICTS = {
    "kill": (137, rf"error: rank 1 on {HOST} was ended by SIGKILL", r"rank 1 \(host node2, .* has died; .* it was at step \d+"),
    "stop": (75, r"rank 1 \(host node2, .* has said nothing for \d+ s; it was at step \d+", ""),
    "launcher": (75, rf"error: {HOST} was lost \(.*\), and with it rank 1;", rf"\n{HOST}: lost at step \d+\n"),
    "link": (75, r"rank 1 \(host node2, .* has said nothing for \d+ s; it was at step \d+", ""),
    "block": (75, r"rank 1 \(host node2, .* is stuck at step \d+, waiting for a batch for \d+ s", ""),
}  # fmt: skip


@pytest.fixture
def two(tmp_path: Path) -> Iterator[list[SshNode]]:
    with ssh_nodes(2, tmp_path) as made:
        yield made


def start(nodes: list[SshNode], folder: Path, module: str, *words: object) -> "subprocess.Popen[str]":
    """Begin a run of one rank on each node, from the first one."""
    (folder / "watched_rank.py").write_text(RANK)
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(folder), str(TESTS), os.environ.get("PYTHONPATH")])),
        "NODE_IP_LIST": ",".join(f"{node.address}:1" for node in nodes), "LOCAL_IP": nodes[0].address,
        "GLOO_SOCKET_IFNAME": "eth0",
    }  # fmt: skip
    command = (
        ["loopback_nodes", "--launcher=pdsh", "--preflight=off", "::", module, *words]
        if module != CLI
        else [CLI, *words]
    )
    with (folder / "said").open("w") as said:
        return nodes[0].popen([sys.executable, "-P", "-m", *command], cwd=folder, env=env, stdout=said, stderr=said)


def rank_of(node: SshNode, folder: Path) -> int:
    """The process of the node's rank, by its number on this machine."""
    there = Path(f"/proc/{node.pid}/ns/pid_for_children").readlink()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            environ = (place / "environ").read_bytes().split(b"\0")
            words = (place / "cmdline").read_bytes()
            mine = (place / "ns" / "pid").readlink() == there and str(folder).encode() in words
            if mine and any(word.startswith(b"RANK=") for word in environ):
                return int(place.name)
    raise AssertionError(f"no rank runs on {node.name}")


def parent(pid: int) -> int:
    """The launcher of a rank."""
    return int(Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[1])


def at_work(process: "subprocess.Popen[str]", folder: Path) -> None:
    while len(list(folder.glob("at-work-*"))) < 2:
        assert process.poll() is None, (folder / "said").read_text()
        time.sleep(0.02)


def let_happen(kind: str, nodes: list[SshNode], folder: Path) -> None:
    """One of VERDICTS, to the second node or its rank."""
    if kind == "link":
        cut(nodes[1], nodes[0])
    elif kind == "block":
        (folder / "block-1").touch()
    else:
        rank = rank_of(nodes[1], folder)
        os.kill(parent(rank) if kind == "launcher" else rank, signal.SIGSTOP if kind == "stop" else signal.SIGKILL)


def check_end(
    process: "subprocess.Popen[str]", nodes: list[SshNode], folder: Path, kind: str, within: float = 60.0
) -> None:
    """It ends within a minute of the fault, is told, and nothing is left on any node five seconds later."""
    code, cause, also = VERDICTS[kind]
    try:
        process.wait(within)
    except subprocess.TimeoutExpired:
        process.kill()
        raise
    said = (folder / "said").read_text()
    assert process.returncode == code, said
    assert re.search(cause, said), said
    assert re.search(also, said), said
    check_nothing_left(nodes, 5.0)


def check_nothing_left(nodes: list[SshNode], within: float) -> None:
    until = time.monotonic() + within
    while (left := [words for node in nodes for words in node.running()]) and time.monotonic() < until:
        time.sleep(0.05)
    assert left == []


def diagnose(kind: str, nodes: list[SshNode], folder: Path) -> None:
    process = start(nodes, folder, "watched_rank", folder, 3)
    at_work(process, folder)
    let_happen(kind, nodes, folder)
    check_end(process, nodes, folder, kind)


@pytest.mark.slow
def test_a_cable_that_is_pulled_out_is_told_and_both_nodes_end(two: list[SshNode], tmp_path: Path) -> None:
    diagnose("link", two, tmp_path)
    assert "on node" not in (tmp_path / "said").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("kind", VERDICTS)
@pytest.mark.parametrize("trial", range(TRIALS))
def test_faults_of_the_second_node(kind: str, trial: int, two: list[SshNode], tmp_path: Path) -> None:
    diagnose(kind, two, tmp_path)
    assert trial >= 0


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["link", "killed"])
@pytest.mark.parametrize("trial", range(TRIALS))
def test_a_launching_machine_that_vanishes(kind: str, trial: int, two: list[SshNode], tmp_path: Path) -> None:
    """The ranks do not watch each other here: pdsh's nodes notice it by themselves, within a minute."""
    process = start(two, tmp_path, "watched_rank", tmp_path, 0)
    at_work(process, tmp_path)
    began = time.monotonic()
    if kind == "killed":
        process.kill()
        process.wait()
        check_nothing_left(two, 5.0)
        return
    cut(two[1], two[0])
    check_nothing_left(two, 60.0)
    assert process.wait(1) == 75, (trial, time.monotonic() - began)
    assert f"error: {HOST} was lost" in (tmp_path / "said").read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "codes", "words"),
    [
        ("kill", {137}, rf"rank 1 on {HOST} was ended by SIGKILL"),
        ("stop", {75}, r"rank 1 \(host node2, .* has said nothing for \d+ s; it was at step \d+"),
        ("block", {75}, r"rank 1 \(host node2, .* is stuck at step \d+"),
        (
            "skip",
            {75},
            r"rank 1 \(host node2, .* is at step \d+, .* while rank 0 is at step \d+, .*: they wait for each other",
        ),
        ("launcher", {75}, rf"error: {HOST} was lost"),
    ],
)
def test_faults_of_the_real_trainer(
    kind: str, codes: set[int], words: str, two: list[SshNode], models: Callable[[str], Path], train_file: Path,
    tmp_path: Path, zero: Callable[..., Path],
) -> None:  # fmt: skip
    flags = [
        "--model_name_or_path", models("hunyuan_v1_dense"), "--train_data_file", train_file, "--output_dir", tmp_path / "out",
        "--deepspeed", zero(3), "--per_device_train_batch_size", 2, "--max_steps", 500, "--report_to", "none",
        "--heartbeat_timeout", 10, "--save_strategy", "no",
    ]  # fmt: skip
    process = start(two, tmp_path, "rank_faults", kind, 1, 8, *flags)
    process.wait(300)
    said = (tmp_path / "said").read_text()
    assert process.returncode in codes, said
    assert re.search(words, said), said
    check_nothing_left(two, 5.0)


@pytest.mark.slow
def test_an_elastic_run_goes_on_with_the_node_that_is_left(
    two: list[SshNode], models: Callable[[str], Path], train_file: Path, tmp_path: Path, zero: Callable[..., Path],
    ranks: RankRunner, history: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    """ZeRO-3 on two nodes, then on one: the checkpoint is rewritten, and each step has the samples of the straight run."""
    flags = [
        "--model_name_or_path", models("hunyuan_v1_dense"), "--train_data_file", train_file, "--max_steps", 150,
        "--deepspeed", zero(3), "--per_device_train_batch_size", 2, "--report_to", "none", "--heartbeat_timeout", 10,
        "--save_steps", 10, "--save_total_limit", 2, "--logging_steps", 1, "--learning_rate", "1e-3",
    ]  # fmt: skip
    straight, out = tmp_path / "straight", tmp_path / "out"
    ranks.run([*flags, "--output_dir", straight], straight / "log", ranks=2, limit=300).check()
    process = start(two, tmp_path, CLI, "sft", *flags, "--output_dir", out, "--max_restarts", 1, "--elastic")
    while not (out / "checkpoint-10").exists():
        assert process.poll() is None, (tmp_path / "said").read_text()
        time.sleep(0.02)
    cut(two[1], two[0])
    process.wait(400)
    said = (tmp_path / "said").read_text()
    assert process.returncode == 0, said
    assert re.search(
        r"restart 1 of 1 \(the last one\) from the newest whole checkpoint, as rank 1 \(host node2,", said
    ), said
    assert f"error: {HOST} could not be started" in said
    assert (
        f"elastic: without {HOST}; world size 2 -> 1; the global batch stays 4: --per_device_train_batch_size 2, "
        "--gradient_accumulation_steps 2" in said
    )
    assert "resume: world_size was 2, is 1" in said
    one, other = (
        {entry["step"]: entry["loss"] for entry in history(folder) if "loss" in entry} for folder in (straight, out)
    )
    assert one.keys() == other.keys()
    assert all(other[step] == pytest.approx(loss, rel=1e-3) for step, loss in one.items())
    first, second = read_record(out)
    assert (first["ranks"], second["ranks"], second["restart"]["number"]) == (2, 1, 1)
    check_nothing_left(two, 5.0)
