"""NODE_IP_LIST: hosts and slots, and nothing that a shell or ssh could take for something else."""

import pytest
from finebridge.finetune.nodes import Node, NodesError, local_processes, parse_node_list


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


@pytest.mark.parametrize("text", ["a:8,b:8,a:4", "a,a", "[::1]:1,[::1]:2"])
def test_a_host_named_twice_is_refused(text: str) -> None:
    with pytest.raises(NodesError, match=r"NODE_IP_LIST names (a|::1) twice"):
        parse_node_list(text)


@pytest.mark.parametrize(
    "entry",
    [
        "a;touch x", "-oProxyCommand=x", "$(x)", "`x`", "a b", "a|b", "a&b", "a>b", "a\nb", "a'b", 'a"b', "../a", "a/b",
        "user@a", "--help", "-a", "_a", ".a", "a:", "a:0", "a:-1", "a:08", "a:8:8", "a:eight", "a:8;b", "fe80::1", "[g]",
        "[::1", "[]", "ä", "*",
    ],
)  # fmt: skip
def test_what_is_no_host_is_refused_by_name(entry: str) -> None:
    with pytest.raises(NodesError) as caught:
        parse_node_list(f"10.0.0.1:8,{entry}")
    assert repr(entry) in str(caught.value)


def test_several_machines_are_refused_with_the_torchrun_line() -> None:
    with pytest.raises(NodesError) as caught:
        local_processes({"NODE_IP_LIST": "10.0.0.1:8,10.0.0.2:8"})
    message = str(caught.value)
    assert "names 2 machines" in message
    assert "torchrun --nnodes 2 --node_rank R --nproc_per_node N --master_addr 10.0.0.1" in message
    assert "-m finebridge.train.sft" in message


@pytest.mark.parametrize(
    ("env", "wanted"),
    [
        ({}, None),
        ({"NODE_IP_LIST": "", "HOST_GPU_NUM": ""}, None),
        ({"HOST_GPU_NUM": "8"}, 8),
        ({"NODE_IP_LIST": "10.0.0.1:4", "HOST_GPU_NUM": "8"}, 4),
        ({"NODE_IP_LIST": "10.0.0.1", "HOST_GPU_NUM": "8"}, 8),
        ({"NODE_IP_LIST": "10.0.0.1"}, None),
    ],
)
def test_processes_of_this_machine(env: dict[str, str], wanted: int | None) -> None:
    assert local_processes(env) == wanted


@pytest.mark.parametrize("count", ["0", "-1", "eight", "2.0", "8;x", "²"])
def test_a_bad_host_gpu_num_is_refused(count: str) -> None:
    with pytest.raises(NodesError, match="HOST_GPU_NUM=.*a positive number is expected"):
        local_processes({"HOST_GPU_NUM": count})
