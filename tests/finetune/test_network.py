"""The network between nodes: what the flags set, and which interface gloo is told."""

import os
import re
import sys
from pathlib import Path

import pytest
from finebridge.finetune import interface
from finebridge.finetune.cluster import take
from finebridge.finetune.interface import interface_to
from finebridge.finetune.network import NETWORK_FLAGS, network_variables
from finebridge.finetune.node_job import Job
from finebridge.finetune.nodes import NodesError
from nodes import nodes

GIVEN = {"net_interface": "bond1", "ib_hca": "mlx5_bond_1,mlx5_bond_2:1", "ib_gid_index": "3", "ib_tc": "160"}
SET = {
    "NCCL_SOCKET_IFNAME": "=bond1", "GLOO_SOCKET_IFNAME": "bond1", "NCCL_IB_HCA": "mlx5_bond_1,mlx5_bond_2:1",
    "NCCL_IB_GID_INDEX": "3", "NCCL_IB_TC": "160",
}  # fmt: skip


def test_what_the_flags_set() -> None:
    assert network_variables({}, {}) == {}, "nothing is preset"
    assert network_variables(GIVEN, {}) == SET
    assert network_variables(GIVEN, {**SET, "NCCL_SOCKET_IFNAME": "bond1"}) == SET, (
        "the same may stand in the environment"
    )
    assert network_variables({"ib_hca": "^mlx5_0"}, {"NCCL_IB_TC": "1"}) == {"NCCL_IB_HCA": "^mlx5_0"}
    assert all("default: " in flag.text for flag in NETWORK_FLAGS.values())


@pytest.mark.parametrize(
    ("given", "env", "words"),
    [
        ({"ib_tc": "256"}, {}, "--ib_tc 256: N is expected"),
        ({"ib_gid_index": "x"}, {}, "--ib_gid_index x: N is expected"),
        ({"ib_hca": "a;b"}, {}, "--ib_hca a;b: NAME,NAME is expected"),
        ({"net_interface": "-x"}, {}, "--net_interface -x: NAME is expected"),
        ({"ib_tc": "160"}, {"NCCL_IB_TC": "106"}, "--ib_tc 160, but NCCL_IB_TC=106 is set; give one of the two"),
    ],
)
def test_what_is_wrong_is_refused(given: dict[str, str], env: dict[str, str], words: str) -> None:
    with pytest.raises(NodesError, match=re.escape(words)):
        take(dict(given), env, None, lambda: 1)


def test_they_reach_all_nodes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for tool in ("ssh", "pdsh"):
        (tmp_path / tool).touch(mode=0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    where = take({**GIVEN, "dry_run": True}, {"NODE_IP_LIST": "10.0.0.1:8,10.0.0.2:8"}, None, lambda: 1)
    assert where.run("m", [], "out", 1.0) == 0
    assert "forwarded: " in (said := capsys.readouterr().err)
    assert all(name in said for name in SET)


def test_the_interface_that_leads_to_a_host(tmp_path: Path) -> None:
    """Also by an address that an interface has beside its first one, and by the second host where the first is here alone."""
    assert interface_to(["127.0.0.1", "::1", "localhost"]) == ""
    assert interface_to([]) == ""
    code = (
        "import sys; from finebridge.finetune.interface import interface_to as to;"
        "print([to([host]) for host in sys.argv[1:]], to(['127.0.1.1', '10.77.0.2']))"
    )
    with nodes(2, tmp_path) as (one, _):
        for words in ("link add docker0 type bridge", "address add 10.99.0.1/24 dev docker0", "link set docker0 up"):
            one.run(["ip", *words.split()])
        for words in ("address add 10.88.0.1/24 dev eth0", "address add fd77::1/64 dev eth0 nodad"):
            one.run(["ip", *words.split()])
        hosts = [
            "10.77.0.1",
            "10.77.0.2",
            "10.88.0.1",
            "10.88.0.7",
            "fd77::2",
            "fd77::1",
            "10.99.0.7",
            "192.0.2.1",
            "no.where",
        ]
        found = one.run([sys.executable, "-P", "-c", code, *hosts])
    assert found == f"{['eth0'] * 6 + ['docker0', '', '']} eth0\n"


@pytest.mark.parametrize(("before", "after"), [("", "eth7"), ("bond1", "bond1")])
def test_gloo_is_told_unless_it_was(before: str, after: str, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job("m", [], {}, [("10.0.0.1", 1), ("10.0.0.2", 1)], "10.0.0.1", 1, "/", "l", 1.0)
    monkeypatch.setattr(
        interface, "interface_to", lambda hosts: {"10.0.0.1,10.0.0.1,10.0.0.2": "eth7"}[",".join(hosts)]
    )
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", before)
    if not before:
        monkeypatch.delenv("GLOO_SOCKET_IFNAME")
    interface.lead_gloo(job)
    assert os.environ["GLOO_SOCKET_IFNAME"] == after
