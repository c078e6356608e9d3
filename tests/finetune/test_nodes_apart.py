"""One command trains over nodes with networks and homes of their own, through real pdsh, ssh and sshd, as a user gives it."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path

import pytest
from conftest import ROOT, zero_settings
from namespaced_nodes import SshNode, ssh_nodes
from rank_runner import RankRunner

slow = pytest.mark.slow
Losses = list[tuple[float, float]]
OneNode = Callable[[int], Losses]
SEED = {"HOST_GPU_NUM": "1", "NODES": "2", "NODE_NUM": "2"}


@pytest.fixture(scope="module")
def flags(models: Callable[[str], Path], train_file: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A short training by ZeRO-3, all but its output folder."""
    folder = tmp_path_factory.mktemp("settings")
    words = [
        "--model_name_or_path", models("hunyuan_v1_dense"), "--train_data_file", train_file, "--max_steps", 2,
        "--deepspeed", zero_settings("ds_zero3_no_offload", folder), "--prepared_data_dir", folder / "prepared",
        "--per_device_train_batch_size", 2, "--learning_rate", "1e-2", "--logging_steps", 1, "--report_to", "none",
        "--save_strategy", "no", "--disable_tqdm", "true",
    ]  # fmt: skip
    return [str(word) for word in words]


@pytest.fixture(scope="module")
def one_node(flags: list[str], ranks: RankRunner, tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Losses]:
    """The losses and norms of gradients on one node with so many ranks."""

    @cache
    def of(world: int) -> Losses:
        folder = tmp_path_factory.mktemp("one")
        ranks.run([*flags, "--output_dir", str(folder)], folder / "log", ranks=world).check()
        return losses(folder)

    return of


def losses(folder: Path) -> Losses:
    """What a finished run has logged of each step."""
    entries = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    found = [(entry["loss"], entry["grad_norm"]) for entry in entries if "loss" in entry]
    assert len(found) == 2
    return found


def start(node: SshNode, words: list[str], *, script: str = "train/train.sh", **env: str) -> "subprocess.Popen[str]":
    """``bash train/train.sh`` with words, on a node."""
    own = {**os.environ, "FINEBRIDGE_PYTHON": sys.executable, **env}
    command = ["bash", ROOT / script, *words]
    return node.popen(command, env=own, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def path_without(tool: str, folder: Path) -> str:
    """A PATH on which all is found but one tool."""
    folder.mkdir()
    for place in reversed(os.environ["PATH"].split(os.pathsep)):
        for file in Path(place).iterdir() if Path(place).is_dir() else ():
            if file.name != tool:
                (folder / file.name).unlink(missing_ok=True)
                (folder / file.name).symlink_to(file)
    assert not shutil.which(tool, path=str(folder))
    return str(folder)


def check_training(made: Sequence[SshNode], flags: list[str], folder: Path, wanted: Losses, **env: str) -> str:
    """Train over nodes; equal to one node's losses to the last bit, nothing is left. What it said beside rank 0's lines."""
    process = start(made[0], [*flags, "--output_dir", str(folder / "out")], **env)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, out + err
    assert [node.running() for node in made] == [[]] * len(made)
    assert losses(folder / "out") == wanted
    assert "done: 2 steps" in out
    return err


def listed(one: SshNode, two: SshNode, field: str = "address", slots: int = 1) -> str:
    text = "[{}]:{}" if field == "address6" else "{}:{}"
    return ",".join(text.format(getattr(node, field), slots) for node in (one, two))


@pytest.mark.distributed
def test_the_seeds_command_trains_over_two_nodes_by_pdsh(flags: list[str], one_node: OneNode, tmp_path: Path) -> None:
    with ssh_nodes(2, tmp_path) as (one, two):
        env = {**SEED, "LOCAL_IP": one.address, "NODE_IP_LIST": listed(one, two)}
        said = check_training([one, two], flags, tmp_path, one_node(2), **env)
    assert "2 nodes, 2 ranks: 10.77.0.1 (1), 10.77.0.2 (1); rank 0 at 10.77.0.1 port " in said
    assert "started by pdsh; " in said


@slow
@pytest.mark.distributed
@pytest.mark.parametrize("field", ["address6", "name", "name6"])
def test_nodes_by_other_names(field: str, flags: list[str], one_node: OneNode, tmp_path: Path) -> None:
    """IPv6 addresses in brackets; names, without LOCAL_IP; names that stand for IPv6 addresses alone."""
    with ssh_nodes(2, tmp_path) as (one, two):
        env = {"NODE_IP_LIST": listed(one, two, field)}
        said = check_training([one, two], flags, tmp_path, one_node(2), **env)
    way = "ssh, as pdsh does not take the IPv6 address fd77::1" if field == "address6" else "pdsh"
    assert f"started by {way}; " in said


@slow
@pytest.mark.distributed
@pytest.mark.parametrize("own", ["127.0.1.1", "10.99.0.1", "", "::1"])
def test_a_node_whose_own_name_leads_nowhere(own: str, flags: list[str], one_node: OneNode, tmp_path: Path) -> None:
    """/etc/hosts as Debian writes it, with an address of another network, or without the name: gloo asks for it."""
    with ssh_nodes(2, tmp_path) as (one, two):
        for number, node in enumerate((one, two)):
            node.run(["ip", "link", "add", "docker0", "type", "bridge"])
            node.run(["ip", "address", "add", "10.99.0.1/24", "dev", "docker0"])
            node.run(["ip", "link", "set", "docker0", "up"])
            (tmp_path / f"hosts.{number}").write_text(f"127.0.0.1 localhost\n{own} {node.name}\n" if own else "\n")
        said = check_training([one, two], flags, tmp_path, one_node(2), NODE_IP_LIST=listed(one, two))
    assert "started by pdsh; " in said


@slow
@pytest.mark.distributed
def test_the_whole_way_over_two_nodes(flags: list[str], one_node: OneNode, tmp_path: Path) -> None:
    """``bash finetune/finetune.sh``, to the exported model, with the network's interface as a flag."""
    words = [*flags, "--save_strategy", "steps", "--save_steps", "2", "--net_interface", "eth0"]
    with ssh_nodes(2, tmp_path) as (one, two):
        env = {"NODE_IP_LIST": listed(one, two), "script": "finetune/finetune.sh"}
        said = check_training([one, two], words, tmp_path, one_node(2), **env)
    assert "forwarded: GLOO_SOCKET_IFNAME, " in said
    assert list((tmp_path / "out" / "hf-2").glob("*.safetensors"))


@slow
@pytest.mark.distributed
def test_two_ranks_a_node_by_ssh_where_pdsh_is_absent(flags: list[str], one_node: OneNode, tmp_path: Path) -> None:
    with ssh_nodes(2, tmp_path) as (one, two):
        hosts = tmp_path / "hostfile"
        hosts.write_text(f"{one.name} slots=2\n{two.name} slots=2\n")
        words = [*flags, "--hostfile", str(hosts)]
        said = check_training([one, two], words, tmp_path, one_node(4), PATH=path_without("pdsh", tmp_path / "bin"))
    assert "started by ssh, as pdsh is not installed here; " in said


@slow
@pytest.mark.distributed
@pytest.mark.parametrize("named", [True, False])
def test_nodes_started_by_hand(named: bool, flags: list[str], one_node: OneNode, tmp_path: Path) -> None:
    """The same command on both with --no_ssh: by the list, or by the number of nodes and the first one's address."""
    with ssh_nodes(2, tmp_path) as made:
        master = [] if named else ["--master_addr", made[0].address]
        env = {**SEED, "NODE_IP_LIST": listed(*made) if named else ""}
        words = [*flags, *master, "--output_dir", str(tmp_path / "out"), "--no_ssh", "--node_rank"]
        for node in made:
            node.stop_sshd()  # nobody needs it
        started = [start(node, [*words, str(number)], **env) for number, node in enumerate(made)]
        said = [process.communicate(timeout=300) for process in started]
        assert [process.returncode for process in started] == [0, 0], said
        assert [node.running() for node in made] == [[], []]
    assert losses(tmp_path / "out") == one_node(2)
    assert "done: 2 steps" in said[0][0]
    assert "node 1 of 2, ranks 1 to 1 of 2; " in said[1][1]


@slow
@pytest.mark.distributed
def test_contradictions_of_the_seeds_variables_are_refused(flags: list[str], tmp_path: Path) -> None:
    """Before anything is started on any node, with exit code 2."""
    with ssh_nodes(2, tmp_path) as (one, two):
        right = {**SEED, "LOCAL_IP": one.address, "NODE_IP_LIST": listed(one, two)}
        for name, value, words in [
            ("NODES", "3", "NODES=3, but NODE_IP_LIST names 2"), ("LOCAL_IP", "10.77.0.9", "LOCAL_IP=10.77.0.9 is none of"),
            ("NODE_NUM", "16", "NODE_NUM=16, which is NODES x HOST_GPU_NUM, but"), ("HOST_GPU_NUM", "8", "HOST_GPU_NUM=8, but"),
        ]:  # fmt: skip
            process = start(one, [*flags, "--output_dir", str(tmp_path / "out")], **{**right, name: value})
            said = process.communicate(timeout=60)[1]
            assert process.returncode == 2, said
            assert words in said
            assert two.running() == []
    assert not (tmp_path / "out").exists()
