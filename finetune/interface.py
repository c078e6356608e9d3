"""Through which network interface a node reaches the others: gloo is told, which else asks the host name.

A host name leads to 127.0.1.1 where Debian has written /etc/hosts, to nothing in some containers, or to a network that the
other nodes are not in; gloo then offers that address, or loopback, and no other node can connect to it.
"""

import array
import fcntl
import ipaddress
import os
import socket
import struct
from collections.abc import Iterable, Iterator
from pathlib import Path

from .node_job import Job

_SIOCGIFCONF = 0x8912  # Linux: the IPv4 addresses with the names of their interfaces, as struct ifreq
_IFREQ, _MOST = 40, 1024  # bytes of one: 16 for the name, 4 others, 4 for the address, and so on; how many are read


def lead_gloo(job: Job) -> None:
    """Set GLOO_SOCKET_IFNAME on a node of a job to the interface that leads to the other nodes, unless it is set."""
    if "GLOO_SOCKET_IFNAME" not in os.environ and (
        found := interface_to([job.master, *(host for host, _ in job.nodes)])
    ):
        os.environ["GLOO_SOCKET_IFNAME"] = found


def interface_to(hosts: Iterable[str]) -> str:
    """The interface that leads to the first of the hosts that is not on loopback; "" when none is found."""
    for host in hosts:
        address = _source(host)
        if address and not ipaddress.ip_address(address).is_loopback:
            packed = socket.inet_pton(socket.AF_INET6 if ":" in address else socket.AF_INET, address)
            return dict(_six() if ":" in address else _four()).get(packed, "")
    return ""


def _source(host: str) -> str:
    """This machine's address on the way to a host, or ""; nothing is sent."""
    try:
        found = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)
    except (OSError, UnicodeError):
        return ""
    for family, kind, _, _, address in found:
        with socket.socket(family, kind) as probe:
            try:
                probe.connect(address)
            except OSError:
                continue
            return str(probe.getsockname()[0]).partition("%")[0]
    return ""


def _four() -> Iterator[tuple[bytes, str]]:
    """All IPv4 addresses of this machine, second ones of an interface too."""
    room = array.array("B", bytes(_IFREQ * _MOST))
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        told = fcntl.ioctl(probe, _SIOCGIFCONF, struct.pack("iL", len(room), room.buffer_info()[0]))
    for entry in struct.iter_unpack(f"16s4x4s{_IFREQ - 24}x", room[: struct.unpack("iL", told)[0]].tobytes()):
        yield entry[1], entry[0].partition(b"\0")[0].decode()


def _six() -> Iterator[tuple[bytes, str]]:
    """All IPv6 addresses of this machine."""
    for line in Path("/proc/net/if_inet6").read_text().splitlines():
        words = line.split()
        yield bytes.fromhex(words[0]), words[-1]
