"""Which machines run, from ``NODE_IP_LIST="ip1:8,ip2:8"`` as the Hunyuan scripts set it."""

import re
from collections.abc import Mapping
from dataclasses import dataclass

_HOST = re.compile(r"(?P<host>[A-Za-z0-9][A-Za-z0-9._-]*|\[[0-9A-Fa-f:]+\])(?::(?P<slots>[1-9][0-9]*))?")


class NodesError(ValueError):
    """NODE_IP_LIST or its companions are wrong; the message names the entry."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine and how many processes it takes; None when the list does not say."""

    host: str
    slots: int | None


def parse_node_list(text: str) -> list[Node]:
    """``ip1:8,ip2:8`` as nodes. Raises NodesError on an entry that is no host, and on a host named twice."""
    nodes: list[Node] = []
    for entry in filter(None, (part.strip() for part in text.split(","))):
        match = _HOST.fullmatch(entry)
        if not match:
            raise NodesError(f"NODE_IP_LIST: {entry!r} is not HOST or HOST:SLOTS")
        nodes.append(Node(match["host"].strip("[]"), int(match["slots"]) if match["slots"] else None))
    hosts = [node.host for node in nodes]
    if twice := next((host for host in hosts if hosts.count(host) > 1), None):
        raise NodesError(f"NODE_IP_LIST names {twice} twice")
    return nodes


def local_processes(env: Mapping[str, str]) -> int | None:
    """Processes that NODE_IP_LIST or HOST_GPU_NUM ask for on this machine; None when neither does.

    Raises NodesError when several machines are named: starting them is not part of this version.
    """
    nodes = parse_node_list(env.get("NODE_IP_LIST", ""))
    if len(nodes) > 1:
        raise NodesError(
            f"NODE_IP_LIST names {len(nodes)} machines; this version starts one. On each machine run: torchrun --nnodes "
            f"{len(nodes)} --node_rank R --nproc_per_node N --master_addr {nodes[0].host} --master_port 29500 "
            "-m finebridge.train.sft FLAGS"
        )
    if nodes and nodes[0].slots:
        return nodes[0].slots
    count = env.get("HOST_GPU_NUM", "")
    if count and not re.fullmatch(r"[1-9][0-9]*", count):
        raise NodesError(f"HOST_GPU_NUM={count}: a positive number is expected")
    return int(count) if count else None
