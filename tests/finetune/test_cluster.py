"""The flags about nodes, and where a run then takes place."""

import os
import sys
from pathlib import Path
from typing import Any

import pytest
from finebridge.finetune.cluster import NODE_FLAGS, Cluster, take
from finebridge.finetune.nodes import Node, NodesError
from loopback_nodes import Runs

TWO = {"NODE_IP_LIST": "10.0.0.1:16,10.0.0.2:8"}
SLURM = {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "4", "SLURMD_NODENAME": "n1"}


def taken(values: dict[str, Any], env: dict[str, str], asked: int | None = None) -> Cluster:
    return take(values, env, asked, lambda: 3)


def test_the_flags_are_taken_out() -> None:
    values: dict[str, Any] = {"learning_rate": "1", "dry_run": True, "ssh_port": 36005, "forward_env": "A,B"}
    where = taken(values, {})
    assert values == {"learning_rate": "1"}
    assert (where.dry_run, where.ssh.port, where.forward, where.remote) == (True, 36005, ("A", "B"), False)
    assert set(NODE_FLAGS) >= {"hostfile", "no_ssh", "node_rank", "master_addr", "forward_env", "dry_run"}


@pytest.mark.parametrize(
    ("values", "env", "wanted"),
    [
        ({}, {}, (False, 0, [3], False)),
        ({}, {"NODE_IP_LIST": "10.0.0.1:4", "LOCAL_IP": "10.0.0.1"}, (False, 0, [4], False)),
        ({}, TWO, (True, None, [16, 8], False)),
        ({}, {**TWO, "LOCAL_IP": "10.0.0.2"}, (True, 1, [16, 8], False)),
        ({}, SLURM, (True, 0, [4, 4], False)),
        ({}, {**SLURM, "SLURM_JOB_NODELIST": "n1"}, (False, 0, [4], False)),
        ({}, {"SLURM_JOB_NODELIST": "n1", "SLURM_GPUS_ON_NODE": "4"}, (True, None, [4], False)),
        ({"no_ssh": True, "node_rank": "1"}, TWO, (True, 1, [16, 8], True)),
        ({"no_ssh": "true"}, {**TWO, "LOCAL_IP": "10.0.0.1"}, (True, 0, [16, 8], True)),
        ({"no_ssh": True, "node_rank": 2, "master_addr": "a"}, {"NODES": "4"}, (True, 2, [3, 3, 3, 3], True)),
        (
            {},
            {**SLURM, "SLURM_STEP_NUM_TASKS": "2", "SLURM_STEP_NODELIST": "n[1-2]", "SLURM_NODEID": "1"},
            (True, 1, [4, 4], True),
        ),
    ],
)
def test_where_a_run_takes_place(values: dict[str, Any], env: dict[str, str], wanted: tuple[Any, ...]) -> None:
    where = taken(dict(values), env)
    assert (where.remote, where.here, [node.slots for node in where.nodes], where.by_hand) == wanted
    assert where.processes == sum(wanted[2])
    assert where.leads == (not where.by_hand or where.here == 0)


@pytest.mark.parametrize(
    ("values", "env", "words"),
    [
        ({"launcher": "rsh"}, {}, "--launcher rsh: pdsh, ssh, srun are known"),
        ({"master_port": "70000"}, {}, "--master_port 70000: a port is expected"),
        ({"ssh_port": "ssh"}, {}, "--ssh_port=ssh: a positive number"),
        ({"ssh_host_keys": "no"}, {}, "--ssh_host_keys no: known or accept-new"),
        ({"ssh_config": "/no/where"}, {}, "--ssh_config /no/where: no such file"),
        ({"preflight": "never"}, {}, "--preflight never: on, only or off is expected"),
        ({"hostfile": "/no/where"}, {}, "--hostfile /no/where: no such file"),
        ({"master_addr": "-oProxyCommand=x"}, TWO, "--master_addr: '-oProxyCommand=x' is not a host"),
        ({"node_rank": "0"}, TWO, "--node_rank is for --no_ssh"),
        ({"no_ssh": True, "node_rank": "-1"}, TWO, "--node_rank -1: a number from 0 on"),
        ({"no_ssh": True, "node_rank": "2"}, TWO, "--node_rank is from 0 to 1"),
        ({"no_ssh": True}, TWO, "--node_rank is from 0 to 1"),
        ({"no_ssh": "maybe"}, TWO, "--no_ssh maybe: true or false"),
        ({"no_ssh": True, "node_rank": "0"}, {**TWO, "LOCAL_IP": "10.0.0.2"}, "--node_rank 0, but LOCAL_IP=10.0.0.2 is node 1"),
        ({"no_ssh": True, "node_rank": "0"}, {}, "--no_ssh: name the nodes by NODE_IP_LIST or --hostfile"),
        ({"no_ssh": True, "node_rank": "0"}, {"NODES": "2"}, "and --master_addr"),
        ({}, {"NODE_IP_LIST": "10.0.0.1,10.0.0.2"}, "this machine is none of the nodes: say how many processes"),
        ({}, {"NODE_IP_LIST": "10.0.0.1:8", "LOCAL_IP": "10.0.0.9"}, "LOCAL_IP=10.0.0.9 is none of NODE_IP_LIST"),
        ({}, {"NODE_IP_LIST": "127.0.0.1:8,10.0.0.2:8"}, "127.0.0.1 means another machine"),
        ({}, {**SLURM, "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NODELIST": "n[1-2]"}, "start finebridge once in the job script"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_refused(values: dict[str, Any], env: dict[str, str], words: str) -> None:
    with pytest.raises(NodesError) as caught:
        taken(dict(values), env)
    assert words in str(caught.value)


def test_a_dry_run_shows_the_commands(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Nothing is started and nothing is written."""
    for name in ("pdsh", "ssh"):
        (tmp_path / name).write_text("#!/bin/sh\ntouch started\n")
        (tmp_path / name).chmod(0o755)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("HF_HOME", "/a b")
    where = taken({"dry_run": True, "master_port": "29501"}, {**TWO, "LOCAL_IP": "10.0.0.1"})
    assert where.run("finebridge.train.sft", ["--run_name=$(x)"], "out", 600.0) == 0
    out, err = capfd.readouterr()
    local, pdsh = out.splitlines()
    assert local.startswith(sys.executable)
    assert local.endswith("-m finebridge.finetune.node_launcher - 10.0.0.1")
    assert " pdsh -R ssh -f 1 -w 10.0.0.2 " in pdsh
    assert "2 nodes, 24 ranks: 10.0.0.1 (16), 10.0.0.2 (8); rank 0 at 10.0.0.1 port 29501" in err
    assert "started by pdsh; forwarded: " in err
    assert "HF_HOME" in err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pdsh", "ssh"]


@pytest.mark.parametrize(
    ("given", "mode"),
    [({}, "on"), ({"preflight": True}, "on"), ({"preflight": False}, "off"), ({"preflight": "only"}, "only")],
)
def test_the_preflight_of_a_run(given: dict[str, Any], mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On by default; YAML takes on and off for truth values. It is asked before any rank is started, and may refuse."""
    asked: list[bool] = []
    monkeypatch.setattr("finebridge.finetune.preflight.Preflight.run", lambda _, only: asked.append(only) or 2)
    monkeypatch.setattr("finebridge.finetune.cluster.choose", lambda *_, **__: ("ssh", ""))
    where = taken(given, {**TWO, "LOCAL_IP": "10.0.0.1"})
    assert where.preflight == mode
    assert where.check([], "out") == (0 if mode == "off" else 2)
    assert asked == ([] if mode == "off" else [mode == "only"])
    assert taken(given, {}).check([], "out") == 0


def test_a_dry_run_of_one_machine(capfd: pytest.CaptureFixture[str]) -> None:
    assert taken({"dry_run": True}, {}).run("m", ["a b"], "out", 1.0) == 0
    assert capfd.readouterr().out == f"one machine, 3 ranks, each: {sys.executable} -P -m m 'a b'\n"


def test_one_machine_starts_its_ranks_as_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[tuple[object, ...]] = []
    monkeypatch.setattr("finebridge.finetune.launch.run_ranks", lambda *words: started.append(words) or 7)
    assert Cluster([Node("a", 4)]).run("m", ["x"], "out", 600.0) == 7
    assert started == [("m", ["x"], 4, 600.0)]


# Starts what srun would: the command on each node, with Slurm's names and the same standard input for all.
FAKE_SRUN = """#!/bin/sh
while [ "$1" != --unbuffered ]; do shift; done
shift
mkfifo one two
SLURMD_NODENAME=n1 "$@" < one &
SLURMD_NODENAME=n2 "$@" < two &
tee one > two
wait
"""


def test_a_job_of_slurm(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(FAKE_SRUN)
    (tmp_path / "bin" / "srun").chmod(0o755)
    env = {**SLURM, "SLURM_GPUS_ON_NODE": "2", "NODE_IP_LIST": "", "LOCAL_IP": ""}
    runs = Runs(tmp_path, [], {**env, "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"})
    done = runs.run("done", "a b", "$(touch canary)")
    assert done.returncode == 0, done.stderr
    assert "started by srun" in done.stderr
    got = runs.got()
    assert [one["argv"][1:] for one in got] == [["done", "a b", "$(touch canary)"]] * 4
    assert [(one["env"]["RANK"], one["env"]["SLURMD_NODENAME"]) for one in got] == [
        ("0", "n1"), ("1", "n1"), ("2", "n2"), ("3", "n2"),
    ]  # fmt: skip
    assert {one["env"]["MASTER_ADDR"] for one in got} == {"n1"}


def test_slurm_names_the_node_that_did_not_start(tmp_path: Path) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "srun").write_text(
        "#!/bin/sh\necho 'n2: cannot open /work' >&2\necho 'srun: error: n2: task 1: Exited with exit code 2' >&2\nexit 2\n"
    )
    (tmp_path / "bin" / "srun").chmod(0o755)
    env = {**SLURM, "NODE_IP_LIST": "", "LOCAL_IP": "", "PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"}
    done = Runs(tmp_path, [], env).run("done")
    assert done.returncode == 2
    assert "error: n2 could not be started (exit code 2)" in done.stderr
