"""The check of all nodes before any rank is started: what is wrong is told, all of it, with what to do; nothing is left.

Nodes are namespaces of this machine with a real sshd each. Two things stand in for what cannot be here: a ``sitecustomize``
that moves Python's clock, as a namespace has no time of day of its own, and an ``nvidia-smi`` of a few lines.
"""

import os
import re
import shutil
import socket
import subprocess
import sys
from collections.abc import Callable, Generator, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from conftest import ROOT
from finebridge.finetune.connect import Ssh
from finebridge.finetune.launch import free_port
from finebridge.finetune.link_probe import pairs
from finebridge.finetune.node_job import Job
from finebridge.finetune.node_probe import Asked, look
from finebridge.finetune.preflight import Preflight, read_paths
from loopback_nodes import FAKE_SSH
from namespaced_nodes import SshNode, cut, known_host, slow_down, ssh_nodes

TRIALS = int(os.environ.get("FINEBRIDGE_TRIALS", "20"))
NVIDIA = """#!/bin/sh
case "$1" in
-L) echo "GPU 0: Stand-in (UUID: GPU-0)" ;;
--query-gpu*) echo "GPU-0, Stand-in, 81559, 70000" ;;
*) echo "GPU-0, 4711, /usr/bin/python3" ;;
esac
"""


@dataclass
class Site:
    """Four nodes with disks of their own where a test needs them, and the command that is checked, on the first one."""

    made: list[SshNode]
    folder: Path
    words: list[str]
    port: int
    hosts: list[str] = field(default_factory=list[str])

    def __post_init__(self) -> None:
        self.hosts = [node.address for node in self.made]

    def private(self, number: int) -> Path:
        """What is first on Python's path of a node."""
        return self.folder / f"site.{'abcd'[number]}"

    def run(self, *flags: str, slots: str = ":1", **env: str) -> tuple[int, str]:
        """The exit code and all that is said."""
        path = os.pathsep.join([str(self.folder / "site"), os.environ.get("PYTHONPATH", "")])
        hosts = ",".join(f"{host}{slots}" for host in self.hosts)
        words = [
            sys.executable, "-P", "-m", "finebridge.finetune.cli", "sft", *self.words, f"--master_port={self.port}", *flags,
        ]  # fmt: skip
        variables = {**os.environ, "PYTHONPATH": path, "NODE_IP_LIST": hosts, **env}
        node = self.made[0]
        process = node.popen(
            words,
            env=variables,
            cwd=self.folder,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )
        said = process.communicate(timeout=120)[0]
        return process.returncode, said


@pytest.fixture
def site(tmp_path: Path, models: Callable[[str], Path], train_file: Path) -> Iterator[Site]:
    """Four nodes that are well."""
    data = tmp_path / "data"
    with ssh_nodes(4, tmp_path, disks={tmp_path / "site": "abcd", data: "abaa"}) as made:
        for letter in "ab":
            shutil.copy(train_file, tmp_path / f"data.{letter}" / "train.jsonl")
        words = [
            f"--model_name_or_path={models('hunyuan_v1_dense')}", f"--train_data_file={data}/train.jsonl",
            f"--output_dir={tmp_path}/out", f"--prepared_data_dir={tmp_path}/out/prepared",
        ]  # fmt: skip
        yield Site(made, tmp_path, words, 29511)


def rows(said: str) -> list[list[str]]:
    """The table: cells with their lines joined again."""
    found: list[list[str]] = []
    for line in said.splitlines():
        cells = [line[:22].strip(), line[24:36].strip(), line[38:82].strip(), line[84:].strip()]
        if line.startswith(("preflight:", "node ", "2 nodes", "started by", "warning")) or not line:
            continue
        if cells[1]:
            found.append(cells)
        elif found:
            found[-1] = [" ".join(filter(None, pair)) for pair in zip(found[-1], cells, strict=True)]
    return found


def has_row(said: str, host: str, check: str, found: str, advice: str) -> bool:
    """Whether the table has such a row about a node; ``found`` and ``advice`` are patterns."""
    return any(
        host in cells[0] and cells[1] == check and re.search(found, cells[2]) and re.search(advice, cells[3])
        for cells in rows(said)
    )


def nothing_left(site: Site) -> bool:
    """No process of ours on any node, no mark, no rank's log."""
    busy = [words for node in site.made for words in node.running("finebridge.finetune")]
    return not busy and not list(site.folder.rglob(".preflight*")) and not list(site.folder.rglob("rank-*.log"))


def test_nodes_that_are_well(site: Site) -> None:
    site.hosts = site.hosts[:2]
    code, said = site.run("--preflight=only")
    assert code == 0, said
    assert [cells[0] for cells in rows(said)] == ["all 2"] * len(rows(said))
    assert {cells[1] for cells in rows(said)} == {
        "clock", "version", "GPU", "interface", "disk", "shared", "data", "link",
    }  # fmt: skip
    assert re.search(r"\npreflight: 2 nodes, all well: Python 3\.\S+, torch 2\.\S+, gloo: all-reduce \S+ GB/s", said)
    assert nothing_left(site)


# What is wrong on which node: host, check, what is found, what to do.
GHOST, NAMELESS = "10.77.0.99", "nowhere.invalid"
Wanted = tuple[str, str, str, str]
FAULTS: dict[str, Wanted] = {
    "unreachable": (GHOST, "reach", "No route to host|timed out", "is it up"),
    "name": (NAMELESS, "name", "Could not resolve hostname", "give its address"),
    "unknown key": ("10.77.0.3", "host key", "key is known|verification failed", "is not known here.*accept-new"),
    "changed key": ("10.77.0.4", "host key", "IDENTIFICATION HAS CHANGED", "another one than is known.*ssh-keygen -R"),
    "port": ("10.77.0.1", "port", "29511: taken by process", "--master_port"),
    "version": ("10.77.0.2", "version", "deepspeed 9.9, not 0", "pip install"),
    "code": ("10.77.0.2", "code", "train/steps.py", "git pull"),
    "clock": ("10.77.0.2", "clock", "61 s ahead|6[0-2] s ahead", "NTP"),
    "data": ("10.77.0.2", "data", "No such file or directory", "bring it there"),
    "interface": ("10.77.0.1", "interface", "GLOO_SOCKET_IFNAME names eth7", "export GLOO_SOCKET_IFNAME=eth0"),
}


@contextmanager
def spoiled(site: Site) -> Generator[None]:
    """Bring all of FAULTS about."""
    one, _, three, four = site.made
    other = site.private(1)
    (other / "deepspeed-9.9.dist-info").mkdir()
    (other / "deepspeed-9.9.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: deepspeed\nVersion: 9.9\n"
    )
    shutil.copytree(
        ROOT, other / "finebridge", ignore=shutil.ignore_patterns(".*", "tests", "benchmarks", "__pycache__")
    )
    with (other / "finebridge" / "train" / "steps.py").open("a") as stream:
        stream.write("# newer\n")
    (other / "sitecustomize.py").write_text("import time\nnow = time.time\ntime.time = lambda: now() + 61\n")
    (site.folder / "data.b" / "train.jsonl").unlink()
    known = (one.ssh / "known_hosts").read_text()
    changed = known_host(four).replace(four.folder.joinpath("host_key.pub").read_text().split()[1], other_key(site))
    known = known.replace(known_host(three), "").replace(known_host(four), changed)
    (one.ssh / "known_hosts").write_text(known)
    site.hosts += [GHOST, NAMELESS]
    listen = f"import socket; s = socket.create_server(('', {site.port})); print('', flush=True); s.accept()"
    process = one.popen([sys.executable, "-c", listen], stdout=subprocess.PIPE)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "\n"
        yield
    finally:
        process.kill()
        process.communicate()


def other_key(site: Site) -> str:
    return (site.made[0].folder / "host_key.pub").read_text().split()[1]


def untold(site: Site) -> tuple[list[str], str]:
    """Which of FAULTS the table lacks, and all that was said."""
    code, said = site.run(GLOO_SOCKET_IFNAME="eth7")
    assert code == 2, said
    assert "nothing was started" in said
    assert nothing_left(site)
    return [name for name, wanted in FAULTS.items() if not has_row(said, *wanted)], said


def test_all_faults_are_told_at_once(site: Site) -> None:
    with spoiled(site):
        missing, said = untold(site)
    assert missing == [], said


@pytest.mark.slow
def test_faults_again_and_again(site: Site) -> None:
    with spoiled(site):
        for _ in range(TRIALS):
            missing, said = untold(site)
            assert missing == [], said


LATER: dict[str, Wanted] = {
    "no space": ("10.77.0.3", "disk", r"1\.0 MB free, at least 2\d\.\d MB needed", "make room"),
    "not shared": ("10.77.0.3", "shared", "--output_dir", "a folder that all nodes share"),
    "slots": ("10.77.0.2", "GPU", "2 processes, but 1 GPUs", r"write 10\.77\.0\.2:1"),
    "no GPU": ("10.77.0.4", "GPU", "2 processes, but 0 GPUs", "--nproc_per_node"),
    "hangs": ("10.77.0.3", "answer", "it was reached, but gave no answer within 10 s", "something hangs there"),
    "stopped": ("10.77.0.4", "reach", "timed out", "does not answer"),
    "memory": ("10.77.0.2", "GPU memory", r"68 of 80 GiB in use by process 4711 \(/usr/bin/python3\)", "wait for it"),
    "other data": ("10.77.0.2", "data", "is not what the other nodes have: 1 files", "copy it anew"),
}


def told(said: str, *names: str) -> bool:
    return all(has_row(said, *LATER[name]) for name in names)


def with_gpu(node: SshNode) -> None:
    """Let nvidia-smi be there for what sshd starts on a node."""
    (node.folder / "nvidia-smi").write_text(NVIDIA)
    (node.folder / "nvidia-smi").chmod(0o755)
    with (node.folder / "sshd_config").open("a") as stream:
        stream.write(f"SetEnv PATH={node.folder}:/usr/bin:/bin\n")
    node.stop_sshd()
    node.start_sshd()


@pytest.mark.slow
def test_disks_and_gpus(site: Site) -> None:
    _, two, three, _ = site.made
    (site.folder / "out").mkdir()
    three.run(["mount", "-t", "tmpfs", "-o", "size=1000k", "tmpfs", site.folder / "out"])
    with_gpu(two)
    with (site.folder / "data.b" / "train.jsonl").open("a") as stream:
        stream.write("\n")
    for _ in range(TRIALS):
        code, said = site.run(slots=":2")
        assert code == 2, said
        assert told(said, "no space", "not shared", "slots", "no GPU", "other data"), said
        code, said = site.run(slots=":1")
        assert code == 2, said
        assert told(said, "memory"), said
        assert nothing_left(site)


@pytest.mark.slow
def test_a_node_that_hangs_is_a_row(site: Site) -> None:
    """A probe that sleeps, and an sshd that stands still: the kernel still takes connections for it."""
    (site.private(2) / "sitecustomize.py").write_text(
        "import os, sys, time\n"
        "def wait(event, args):\n"
        "    if event == 'open' and str(args[0]).endswith('train.jsonl'): time.sleep(600)\n"
        "sys.addaudithook(wait)\n"
    )
    sshd = site.made[3].sshd
    assert sshd is not None
    for _ in range(TRIALS):
        sshd.send_signal(19)
        code, said = site.run()
        sshd.send_signal(18)
        assert code == 2, said
        assert told(said, "hangs", "stopped"), said
    assert not list(site.folder.rglob("rank-*.log"))


@pytest.mark.slow
def test_a_slow_link_is_named(site: Site) -> None:
    one, two, three, _ = site.made
    try:
        slow_down(three, one, 30_000)
    except subprocess.CalledProcessError as error:
        pytest.skip(f"this kernel shapes no traffic: {error.output}")
    for _ in range(TRIALS):
        code, said = site.run()
        assert code == 2, said
        assert has_row(
            said, three.address, "link", r"^0\.00\S+ GB/s to its neighbours, \S+ GB/s elsewhere", "ethtool eth0"
        ), said
        assert len(rows(said)) == 1, said
    two.run(["ip", "link", "set", "eth0", "up"])
    cut(two, one)
    for _ in range(TRIALS):
        code, said = site.run()
        assert code == 2, said
        assert has_row(said, two.address, "reach", "No route to host|timed out", "is it up"), said


@pytest.mark.slow
def test_a_firewall_between_nodes_that_ssh_passes(site: Site) -> None:
    """Only the connections that the ranks need are refused; routes tell what a firewall would."""
    site.hosts = site.hosts[:3]
    _, two, three, _ = site.made
    two.run(["ip", "route", "add", "blackhole", f"{three.address}/32"])
    code, said = site.run()
    assert code == 2, said
    assert any(cells[1] == "network" and "ports between the nodes must be open" in cells[3] for cells in rows(said)), (
        said
    )


# A fake ssh for each node waits until all have begun: one that is asked after another would wait for ever.
WAITS = FAKE_SSH.replace("exec", 'while [ $(wc -l < "$FAKE_SSH_PIDS") -lt $FAKE_SSH_ALL ]; do sleep 0.05; done\nexec')


# Starts what srun would, with the same standard input for all.
SRUN = """#!/bin/sh
while [ "$1" != --unbuffered ]; do shift; done
shift
mkfifo one two
SLURMD_NODENAME=127.0.0.2 "$@" < one &
SLURMD_NODENAME=127.0.0.3 "$@" < two &
tee one > two
wait
rm one two
"""


def test_the_nodes_of_slurm(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """One start for all: each node picks out what is said to it."""
    (tmp_path / "srun").write_text(SRUN)
    (tmp_path / "srun").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.chdir(tmp_path)
    hosts = [("127.0.0.2", 1), ("127.0.0.3", 1)]
    argv = ["--model_name_or_path=tencent/Hunyuan-A13B"]
    job = Job("m", argv, {}, hosts, hosts[0][0], free_port(""), str(tmp_path), "logs", 1.0)
    check = Preflight(job, "out", 0, "srun", Ssh(), links=False, answer=60.0)
    assert check.run(only=True) == 0
    said = capsys.readouterr().out
    assert ["all 2", "clock", "within 5 s of this machine's", "-"] in rows(said)
    assert any("tencent/Hunyuan-A13B: a name on the Hub" in cells[2] for cells in rows(said))


@pytest.mark.slow
def test_one_machine_is_looked_at_when_that_is_all(
    models: Callable[[str], Path], train_file: Path, tmp_path: Path
) -> None:
    """Nothing is made, whatever the verb; ``run`` keeps the hashes that it has read for its plan."""
    for verb in ("run", "sft"):
        done = subprocess.run(
            [
                sys.executable, "-P", "-m", "finebridge.finetune.cli", verb, "--preflight=only", "--output_dir=out",
                f"--train_data_file={train_file}", f"--model_name_or_path={models('hunyuan_v1_dense')}",
            ],
            cwd=tmp_path, capture_output=True, text=True, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert re.search(r"\npreflight: 1 node, all well: Python 3\S+, torch 2\S+, ", done.stdout)
        assert "GPU" in done.stdout
        assert {path.name for path in tmp_path.rglob("*") if path.is_file()} <= {"source_hashes.json"}


@pytest.mark.parametrize("count", [4, pytest.param(64, marks=pytest.mark.slow)])
def test_all_nodes_are_asked_at_the_same_time(
    count: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(WAITS)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("FAKE_SSH_PIDS", str(tmp_path / "pids"))
    monkeypatch.setenv("FAKE_SSH_ALL", str(count))
    hosts = [(f"127.0.1.{number + 1}", 1) for number in range(count)]
    job = Job("m", [], {}, hosts, hosts[0][0], free_port(""), str(tmp_path), "logs", 1.0)
    check = Preflight(job, str(tmp_path / "out"), None, "pdsh", Ssh(), links=False, answer=60.0)
    assert check.run(only=True) == 0
    said = capsys.readouterr().out
    assert len((tmp_path / "pids").read_text().split()) == count
    assert all(cells[0] == f"all {count}" for cells in rows(said))
    assert f"preflight: {count} nodes, all well" in said
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin", "pids"]


@pytest.mark.parametrize("count", range(2, 9))
def test_pairs_are_apart_and_every_node_has_both_neighbours(count: int) -> None:
    rounds = pairs(count)
    assert len(rounds) <= 3
    assert all(len({node for pair in one for node in pair}) == 2 * len(one) for one in rounds)
    met = {frozenset(pair) for one in rounds for pair in one}
    assert met == {frozenset((a, (a + 1) % count)) for a in range(count)}


def test_what_a_run_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("a.jsonl", "b.jsonl", "t.bin", "t.idx", "zero.json"):
        Path(name).touch()
    argv = [
        "--train_data_file=*.jsonl,t",
        "--model_name_or_path=tencent/Hunyuan",
        "--deepspeed=zero.json",
        "--output_dir=a.jsonl",
    ]
    assert read_paths(argv) == {
        "train_data_file": [str(tmp_path / name) for name in ("a.jsonl", "b.jsonl", "t.bin", "t.idx")],
        "deepspeed": [str(tmp_path / "zero.json")],
    }


def test_a_node_started_by_hand_is_looked_at_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("", 0)) as taken:
        job = Job(
            "m", [], {}, [("127.0.0.1", 1), ("b", 1)], "127.0.0.1", taken.getsockname()[1], str(tmp_path), "logs", 1.0
        )
        assert Preflight(job, str(tmp_path), 0, "ssh", Ssh()).run_here(only=False) == 2
        assert f"taken by process {os.getpid()}: " in capsys.readouterr().err
        assert Preflight(job, str(tmp_path), 1, "ssh", Ssh()).run_here(only=False) == 0
    assert "preflight: node 1 of 2 nodes, all well" in capsys.readouterr().err
    asked = Asked({}, [("x", str(tmp_path / "no" / "where"), 7)], str(tmp_path), "mark", 1.0)
    (room,) = look(job, 1, asked).room
    assert room["free"] > 7
    assert room["writable"]
