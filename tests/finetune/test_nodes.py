"""Which nodes a run has: nothing that a shell or ssh could take for something else, and no two answers."""

import random
import socket
from pathlib import Path

import pytest
from finebridge.finetune.nodes import (
    SLURM,
    Node,
    NodesError,
    check_reachable_names,
    counted,
    host_name,
    listed_nodes,
    parse_node_list,
    read_hostfile,
    this_node,
    write_hostfiles,
)

TWO = [Node("10.0.0.1", 8), Node("10.0.0.2", 8)]
NO_HOSTS = [
    "a;touch x", "-oProxyCommand=x", "$(x)", "`x`", "a b", "a|b", "a&b", "a>b", "a\nb", "a'b", 'a"b', "../a", "a/b",
    "user@a", "--help", "-a", "_a", ".a", "a:", "a:0", "a:-1", "a:08", "a:8:8", "a:eight", "a:8;b", "fe80::1", "[g]",
    "[::1", "[]", "ä", "*", "a%b", "10.0.0.256", "10.0.0", "010.0.0.1", "1", "[1.2.3.4.5]", "[::12345]", "a:100000", "x" * 254,
]  # fmt: skip


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("10.0.0.1:8", [Node("10.0.0.1", 8)]),
        ("10.0.0.1:8,10.0.0.2:4", [Node("10.0.0.1", 8), Node("10.0.0.2", 4)]),
        (" node-1.cluster_a:16 , node-2 ,", [Node("node-1.cluster_a", 16), Node("node-2", None)]),
        ("[fe80::1]:8,[::1]", [Node("fe80::1", 8), Node("::1", None)]),
    ],
)
def test_hosts_and_slots(text: str, wanted: list[Node]) -> None:
    assert parse_node_list(text) == wanted


@pytest.mark.parametrize("text", ["a:8,b:8,a:4", "a,a", "[::1]:1,[::1]:2", "Node,node", "a.,a", "[::1],[0:0::1]"])
def test_a_host_named_twice_is_refused(text: str) -> None:
    with pytest.raises(NodesError, match=r"NODE_IP_LIST names (a|a\.|::1|Node) twice"):
        parse_node_list(text)


@pytest.mark.parametrize("entry", NO_HOSTS)
def test_what_is_no_host_is_refused_by_name(entry: str) -> None:
    with pytest.raises(NodesError) as caught:
        parse_node_list(f"10.0.0.1:8,{entry}")
    assert repr(entry) in str(caught.value)


def test_no_text_gives_a_host_that_is_an_option_or_more_than_a_word() -> None:
    """5,000 lists of pieces that mean something to shells, ssh or pdsh."""
    pieces = [
        "a",
        "10.0.0.1",
        "[::1]",
        ":8",
        ",",
        "-",
        "-o",
        "$(touch c)",
        "`c`",
        ";",
        "\n",
        "'",
        " ",
        "ü",
        "%h",
        "@",
        "^",
    ]
    draw, taken = random.Random(9), 0
    for _ in range(5000):
        text = "".join(draw.choices(pieces, k=draw.randint(1, 4)))
        try:
            found = parse_node_list(text)
        except NodesError:
            continue
        taken += len(found)
        for node in found:
            assert node.host[0] in "a1:", text
            assert set(node.host) <= set("a10.:8-o"), text
    assert taken > 300


def hostfile(folder: Path, text: str) -> Path:
    (folder / "hosts").write_text(text)
    return folder / "hosts"


def test_a_hostfile_is_read(tmp_path: Path) -> None:
    text = "# ours\n10.0.0.1 slots=16\n\nfe80::1\tslots=8  # spare\n[fe80::2] slots=4\nnode-3\n"
    wanted = [Node("10.0.0.1", 16), Node("fe80::1", 8), Node("fe80::2", 4), Node("node-3", None)]
    assert read_hostfile(hostfile(tmp_path, text)) == wanted


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("a slots=8\nb slots=\n", "hosts:2: 'b slots=' is not HOST slots=N"),
        ("-oProxyCommand=x slots=1\n", "hosts:1: "),
        ("a slots=8 max_slots=9\n", "hosts:1: "),
        ("a slots=1\nA slots=1", "names a twice, as A too"),
        ("# nothing\n", "names no node"),
        ("10.0.0.1:8\n", "hosts:1: '10.0.0.1:8' is not HOST slots=N"),
    ],
)
def test_a_bad_hostfile_is_refused_with_its_line(tmp_path: Path, text: str, words: str) -> None:
    with pytest.raises(NodesError) as caught:
        read_hostfile(hostfile(tmp_path, text))
    assert words in str(caught.value)


def test_a_hostfile_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    with pytest.raises(NodesError, match="No such file"):
        read_hostfile(tmp_path / "none")
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    with pytest.raises(NodesError, match="can't decode"):
        read_hostfile(tmp_path / "bytes")


def test_the_hostfiles_of_the_seeds_list(tmp_path: Path) -> None:
    """The original's sed made 10.0.0.16 of 10.0.0.1:16."""
    write_hostfiles(parse_node_list("10.0.0.1:16,10.0.0.2:8"), tmp_path)
    assert (tmp_path / "hostfile").read_text() == "10.0.0.1 slots=16\n10.0.0.2 slots=8\n"
    assert (tmp_path / "pssh.hosts").read_text() == "10.0.0.1\n10.0.0.2\n"
    assert read_hostfile(tmp_path / "hostfile") == parse_node_list("10.0.0.1:16,10.0.0.2:8")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hostfile", "pssh.hosts"]


def test_where_the_nodes_come_from(tmp_path: Path) -> None:
    path = hostfile(tmp_path, "10.0.0.1 slots=8\n10.0.0.2\n")
    list_, slurm = {"NODE_IP_LIST": "10.0.0.1,10.0.0.2:8"}, {"SLURM_JOB_NODELIST": "n[1-2]", "SLURM_GPUS_ON_NODE": "4"}
    assert listed_nodes({}, None) == ([], "")
    assert listed_nodes({**list_, **slurm}, path) == (TWO, "--hostfile"), "slots are taken from both"
    assert listed_nodes({**list_, **slurm}, None)[1] == "NODE_IP_LIST"
    assert listed_nodes(slurm, None) == ([Node("n1", 4), Node("n2", 4)], SLURM)
    assert listed_nodes({"SLURM_JOB_NODELIST": ""}, None) == ([], "")


@pytest.mark.parametrize(
    ("env", "words"),
    [
        ({"NODE_IP_LIST": "10.0.0.1,10.0.0.3"}, "names 10.0.0.1, 10.0.0.2, NODE_IP_LIST 10.0.0.1, 10.0.0.3"),
        ({"NODE_IP_LIST": "10.0.0.2,10.0.0.1"}, "give one of the two"),
        ({"NODE_IP_LIST": "10.0.0.1:4,10.0.0.2"}, "gives 10.0.0.1 8 slots, NODE_IP_LIST 4"),
    ],
)
def test_a_hostfile_that_contradicts_the_list_is_refused(tmp_path: Path, env: dict[str, str], words: str) -> None:
    with pytest.raises(NodesError) as caught:
        listed_nodes(env, hostfile(tmp_path, "10.0.0.1 slots=8\n10.0.0.2\n"))
    assert words in str(caught.value)


BARE = [Node("10.0.0.1", None), Node("10.0.0.2", None)]


@pytest.mark.parametrize(
    ("nodes", "env", "asked", "wanted"),
    [
        ([], {}, None, [3]),
        ([], {"HOST_GPU_NUM": "8", "NODES": "1"}, None, [8]),
        ([], {"HOST_GPU_NUM": "8"}, 2, [2]),
        ([Node("a", 4)], {"HOST_GPU_NUM": "8"}, None, [4]),
        ([Node("a", 4)], {}, 2, [2]),
        (TWO, {"HOST_GPU_NUM": "8", "NODES": "2", "NODE_NUM": "16"}, None, [8, 8]),
        (TWO, {}, 8, [8, 8]),
        (BARE, {"HOST_GPU_NUM": "8"}, None, [8, 8]),
        (BARE, {"HOST_GPU_NUM": "8"}, 2, [2, 2]),
        (BARE, {}, None, [3, 3]),
        ([Node("a", 16), Node("b", 8)], {"HOST_GPU_NUM": "16", "NODE_NUM": "24"}, None, [16, 8]),
    ],
)
def test_how_many_processes_each_takes(
    nodes: list[Node], env: dict[str, str], asked: int | None, wanted: list[int]
) -> None:
    assert [node.slots for node in counted(nodes, "NODE_IP_LIST", env, asked, lambda: 3)] == wanted
    assert counted([], "", {}, None, lambda: 0) == [Node("127.0.0.1", 1)]


@pytest.mark.parametrize(
    ("nodes", "env", "asked", "words"),
    [
        (TWO, {"NODES": "3"}, None, "NODES=3, but NODE_IP_LIST names 2"),
        ([], {"NODES": "2"}, None, "NODES=2, but no NODE_IP_LIST names them"),
        ([Node("a", 8)], {"NODES": "2"}, None, "NODES=2, but NODE_IP_LIST names 1"),
        (TWO, {"NODE_NUM": "2"}, None, "NODE_NUM=2, which is NODES x HOST_GPU_NUM, but NODE_IP_LIST gives 16 ranks"),
        (TWO, {"HOST_GPU_NUM": "4"}, None, "HOST_GPU_NUM=4, but NODE_IP_LIST gives the nodes 8, 8"),
        (TWO, {}, 4, "--nproc_per_node 4, but NODE_IP_LIST gives 10.0.0.1 8"),
        (TWO, {"NODES": "two"}, None, "NODES=two: a positive number"),
        (TWO, {"NODE_NUM": "1.5"}, None, "NODE_NUM=1.5: a positive number"),
    ],
)
def test_contradictions_name_both(nodes: list[Node], env: dict[str, str], asked: int | None, words: str) -> None:
    with pytest.raises(NodesError) as caught:
        counted(nodes, "NODE_IP_LIST", env, asked, lambda: 8)
    assert words in str(caught.value)


def test_which_node_this_machine_is() -> None:
    away = Node("192.0.2.7", 8)  # of a network for examples
    assert this_node([away, Node("127.0.0.1", 8)], "NODE_IP_LIST", {}) == 1
    assert this_node([Node(socket.gethostname(), 8), away], "NODE_IP_LIST", {}) == 0
    assert this_node([away, Node("no-such-host.invalid", 8)], "NODE_IP_LIST", {}) is None
    assert this_node(TWO, "NODE_IP_LIST", {"LOCAL_IP": "10.0.0.2"}) == 1
    assert this_node([away, Node("localhost", 8)], "NODE_IP_LIST", {"LOCAL_IP": "127.0.0.1"}) == 1, "by its address"
    assert this_node([away, Node("::1", 8)], "NODE_IP_LIST", {"LOCAL_IP": "[0:0::1]"}) == 1
    assert this_node(TWO, SLURM, {"SLURMD_NODENAME": "10.0.0.1"}) == 0
    assert this_node([Node("127.0.0.1", 8)], SLURM, {}) is None
    with pytest.raises(NodesError, match=r"LOCAL_IP=10\.0\.0\.9 is none of NODE_IP_LIST: 10\.0\.0\.1, 10\.0\.0\.2"):
        this_node(TWO, "NODE_IP_LIST", {"LOCAL_IP": "10.0.0.9"})
    with pytest.raises(NodesError, match=r"127\.0\.0\.1 and localhost are both this machine"):
        this_node([Node("127.0.0.1", 1), Node("localhost", 1)], "NODE_IP_LIST", {})


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1", "127.9.9.9"])
def test_a_loopback_address_among_others_is_refused(host: str) -> None:
    with pytest.raises(NodesError, match="means another machine on each of the nodes"):
        check_reachable_names([Node(host, 1), Node("10.0.0.2", 1)], "NODE_IP_LIST")
    assert check_reachable_names([Node("127.0.0.2", 1), Node("127.0.0.3", 1)], "NODE_IP_LIST") is None


def test_a_host_alone() -> None:
    assert [host_name(text, "--master_addr") for text in ("[::1]", "::1", "node-1", "10.0.0.1")] == [
        "::1",
        "::1",
        "node-1",
        "10.0.0.1",
    ]
    for text in ("-o", "a:8", "a b", "$(x)"):
        with pytest.raises(NodesError, match="--master_addr"):
            host_name(text, "--master_addr")
