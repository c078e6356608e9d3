"""Which machines a run has: NODE_IP_LIST and its companions as the Hunyuan scripts set them, a hostfile, or Slurm.

No list of hosts is ever read by a shell, and no host can be taken for an option by ssh or pdsh (``-oProxyCommand=...``).
"""

import ipaddress
import re
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ..storage.publish import write_text
from . import slurm

SLURM = "Slurm's allocation"  # a source of nodes, beside NODE_IP_LIST and --hostfile
_HOST = r"[A-Za-z0-9](?:[A-Za-z0-9._-]{0,252})|\[[0-9A-Fa-f:.]{2,45}\]"
_COUNT = r"[1-9][0-9]{0,4}"
_ENTRY = re.compile(rf"(?P<host>{_HOST})(?::(?P<slots>{_COUNT}))?")
_LINE = re.compile(rf"(?P<host>{_HOST}|[0-9A-Fa-f:.]{{2,45}})(?:\s+slots=(?P<slots>{_COUNT}))?")


class NodesError(ValueError):
    """The nodes, or the flags and variables about them, are wrong; the message names them."""


@dataclass(frozen=True, slots=True)
class Node:
    """A machine and how many processes it takes; None when the list does not say."""

    host: str
    slots: int | None


def parse_node_list(text: str) -> list[Node]:
    """``ip1:8,[fe80::1]:8,name`` as nodes. Raises NodesError on an entry that is no host, and on a host named twice."""
    entries = filter(None, (part.strip() for part in text.split(",")))
    return _once([_node(entry, _ENTRY, "NODE_IP_LIST", "HOST or HOST:SLOTS") for entry in entries], "NODE_IP_LIST")


def read_hostfile(path: Path) -> list[Node]:
    """The nodes of a hostfile, a line ``HOST slots=N`` each, ``#`` begins a comment. Raises NodesError with the line."""
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise NodesError(f"--hostfile {path}: {getattr(error, 'strerror', None) or error}") from None
    said = [(number, line.partition("#")[0].strip()) for number, line in enumerate(lines, 1)]
    nodes = [_node(line, _LINE, f"--hostfile {path}:{number}", "HOST slots=N") for number, line in said if line]
    if not nodes:
        raise NodesError(f"--hostfile {path}: it names no node")
    return _once(nodes, f"--hostfile {path}")


def write_hostfiles(nodes: Sequence[Node], folder: Path) -> None:
    """Write ``hostfile`` (DeepSpeed's lines) and ``pssh.hosts`` (names alone, for pdsh and its kin), each atomically."""
    write_text(folder / "hostfile", "".join(f"{node.host} slots={node.slots}\n" for node in nodes))
    write_text(folder / "pssh.hosts", "".join(f"{node.host}\n" for node in nodes))


def listed_nodes(env: Mapping[str, str], hostfile: Path | None) -> tuple[list[Node], str]:
    """The nodes that are named, and by what; none and "" when nothing names any. Raises NodesError.

    ``--hostfile`` and NODE_IP_LIST may both be given when they agree. Slurm is asked when neither is.
    """
    listed = parse_node_list(env.get("NODE_IP_LIST", ""))
    if hostfile is not None:
        nodes = read_hostfile(hostfile)
        if listed and [_same(node.host) for node in listed] != [_same(node.host) for node in nodes]:
            raise NodesError(
                f"--hostfile {hostfile} names {_hosts(nodes)}, NODE_IP_LIST {_hosts(listed)}; give one of the two"
            )
        for one, other in zip(listed, nodes, strict=False):
            if one.slots and other.slots and one.slots != other.slots:
                raise NodesError(
                    f"--hostfile {hostfile} gives {other.host} {other.slots} slots, NODE_IP_LIST {one.slots}"
                )
        slots = [one.slots for one in listed] or [None] * len(nodes)
        return [Node(node.host, node.slots or other) for node, other in zip(nodes, slots, strict=True)], "--hostfile"
    if listed:
        return listed, "NODE_IP_LIST"
    try:
        names, variable = slurm.nodes(env)
        slots = slurm.slots_by_node(env) if names else None
    except slurm.SlurmError as error:
        raise NodesError(str(error)) from None
    found = [Node(_node(name, _ENTRY, variable, "a host").host, slots) for name in names]
    return (_once(found, variable), SLURM) if found else ([], "")


def counted(
    nodes: Sequence[Node], source: str, env: Mapping[str, str], asked: int | None, gpus: Callable[[], int]
) -> list[Node]:
    """The nodes, each with its number of processes: of the list, else ``asked`` (--nproc_per_node), HOST_GPU_NUM, ``gpus``.

    One machine takes ``asked`` first. Raises NodesError when two of them contradict each other, or NODES or NODE_NUM
    (all ranks) tell something else.
    """
    stated = positive(env.get("HOST_GPU_NUM", ""), "HOST_GPU_NUM")
    count = positive(env.get("NODES", ""), "NODES")
    if count is not None and count != max(1, len(nodes)):
        raise NodesError(
            f"NODES={count}, but {f'{source} names {len(nodes)}' if nodes else 'no NODE_IP_LIST names them'}"
        )
    if len(nodes) < 2:  # noqa: PLR2004 - one machine
        host, slots = (nodes[0].host, nodes[0].slots) if nodes else ("127.0.0.1", None)
        return [Node(host, asked or slots or stated or gpus() or 1)]
    given = [node.slots for node in nodes if node.slots]
    for node in nodes:
        if asked and node.slots and node.slots != asked:
            raise NodesError(f"--nproc_per_node {asked}, but {source} gives {node.host} {node.slots}")
    if stated and len(given) == len(nodes) and stated not in given:
        raise NodesError(f"HOST_GPU_NUM={stated}, but {source} gives the nodes {', '.join(map(str, given))}")
    full = [Node(node.host, node.slots or asked or stated or gpus() or 1) for node in nodes]
    ranks, total = sum(node.slots or 0 for node in full), positive(env.get("NODE_NUM", ""), "NODE_NUM")
    if total is not None and total != ranks:
        raise NodesError(f"NODE_NUM={total}, which is NODES x HOST_GPU_NUM, but {source} gives {ranks} ranks")
    return full


def this_node(nodes: Sequence[Node], source: str, env: Mapping[str, str]) -> int | None:
    """Which of the nodes is this machine: by LOCAL_IP, Slurm's name, else its names and addresses; None for none of them.

    Raises NodesError when LOCAL_IP is none of them, or two of them are this machine.
    """
    if mine := env.get("LOCAL_IP", "").strip().strip("[]"):
        found = [number for number, node in enumerate(nodes) if _same(node.host) == _same(mine)]
        found = found or [number for number, node in enumerate(nodes) if mine in _addresses(node.host)]
        if not found:
            raise NodesError(f"LOCAL_IP={mine} is none of {source}: {_hosts(nodes)}")
        return found[0]
    if source == SLURM:
        return next((number for number, node in enumerate(nodes) if node.host == env.get("SLURMD_NODENAME")), None)
    found = [number for number, node in enumerate(nodes) if _is_here(node.host)]
    if len(found) > 1:
        raise NodesError(
            f"{source}: {nodes[found[0]].host} and {nodes[found[1]].host} are both this machine; name it once, or set "
            "LOCAL_IP to the one that it is"
        )
    return found[0] if found else None


def check_reachable_names(nodes: Sequence[Node], source: str) -> None:
    """Raise NodesError when some hosts are loopback addresses and some are not: the others would call themselves."""
    loopback = [node.host for node in nodes if re.match(r"localhost$|127\.|::1$", node.host, re.IGNORECASE)]
    if loopback and len(loopback) < len(nodes):
        raise NodesError(
            f"{source}: {loopback[0]} means another machine on each of the nodes; give the address that all can reach"
        )


def host_name(text: str, name: str) -> str:
    """A host, IPv6 addresses without their brackets. Raises NodesError."""
    return _node(text, _LINE, name, "a host").host


def positive(text: str, name: str) -> int | None:
    """A positive number, None when the text is empty. Raises NodesError."""
    if text and not re.fullmatch(_COUNT, text):
        raise NodesError(f"{name}={text}: a positive number is expected")
    return int(text) if text else None


def _node(text: str, pattern: re.Pattern[str], where: str, wanted: str) -> Node:
    match = pattern.fullmatch(text)
    if not match:
        raise NodesError(f"{where}: {text!r} is not {wanted}")
    host = match["host"].strip("[]")
    if ":" in host or re.fullmatch(
        r"[0-9.]+", host
    ):  # what looks like an address must be one: 10.1 is 10.0.0.1 to some
        try:
            ipaddress.ip_address(host)
        except ValueError:
            raise NodesError(f"{where}: {text!r} is not {wanted}: {host} is no address") from None
    return Node(host, int(match["slots"]) if match["slots"] else None)


def _once(nodes: list[Node], where: str) -> list[Node]:
    """The nodes, when none is named twice."""
    seen: dict[str, str] = {}
    for node in nodes:
        host = _same(node.host)
        if host in seen:
            also = "" if seen[host] == node.host else f", as {node.host} too"
            raise NodesError(f"{where} names {seen[host]} twice{also}")
        seen[host] = node.host
    return nodes


def _same(host: str) -> str:
    """One spelling of a host: names without case, addresses in their shortest form."""
    try:
        return str(ipaddress.ip_address(host))
    except ValueError:
        return host.lower().rstrip(".")


def _hosts(nodes: Sequence[Node]) -> str:
    return ", ".join(node.host for node in nodes)


def _addresses(host: str) -> list[str]:
    try:
        return [str(found[4][0]) for found in socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)]
    except (OSError, UnicodeError):
        return []


def _is_here(host: str) -> bool:
    """Whether a name or an address is this machine's own: only then can a socket be bound to it."""
    name = socket.gethostname().lower()
    if _same(host) in (name, name.partition(".")[0]):
        return True
    for address in _addresses(host):
        with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as probe:
            try:
                probe.bind((address, 0))
            except OSError:
                continue
            return True
    return False
