"""The flags about the network between nodes, for the libraries that send over it. Nothing is preset: clusters differ.

What they default to is NCCL's own choice (its documentation, "Environment Variables"), and right on most clusters.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass

from .nodes import NodesError


@dataclass(frozen=True, slots=True)
class NetworkFlag:
    """A flag: what its value looks like, the variables that it sets (``{}`` is the value), its help."""

    form: str
    variables: dict[str, str]
    text: str


_NAME = r"[A-Za-z0-9][A-Za-z0-9_.:-]*"
_BYTE = r"25[0-5]|2[0-4]\d|1?\d?\d"
NETWORK_FLAGS = {
    "net_interface": NetworkFlag(
        _NAME,
        {"NCCL_SOCKET_IFNAME": "={}", "GLOO_SOCKET_IFNAME": "{}"},
        "NAME\n      the interface between the nodes (default: NCCL takes ib*, else the first that is neither lo nor docker*; "
        "gloo gets the one that leads to the first node)",
    ),
    "ib_hca": NetworkFlag(
        rf"[\^=]*{_NAME}(,{_NAME})*",
        {"NCCL_IB_HCA": "{}"},
        "NAME,NAME\n      InfiniBand or RoCE devices, as NCCL_IB_HCA (default: all that are up); ^NAME leaves one out",
    ),
    "ib_gid_index": NetworkFlag(
        _BYTE,
        {"NCCL_IB_GID_INDEX": "{}"},
        "N\n      RoCE's GID, as NCCL_IB_GID_INDEX; show_gids lists them, often 3 is RoCE v2 (default: NCCL finds it)",
    ),
    "ib_tc": NetworkFlag(
        _BYTE,
        {"NCCL_IB_TC": "{}"},
        "N\n      the traffic class of your network's lossless queue, as NCCL_IB_TC (default: 0)",
    ),
}


def network_variables(given: Mapping[str, str], env: Mapping[str, str]) -> dict[str, str]:
    """What the flags that are given set. Raises NodesError on a wrong value, or when the environment has another one."""
    found: dict[str, str] = {}
    for name, flag in NETWORK_FLAGS.items():
        if not (value := given.get(name, "")):
            continue
        if not re.fullmatch(flag.form, value):
            raise NodesError(f"--{name} {value}: {flag.text.partition(chr(10))[0]} is expected")
        for variable, form in flag.variables.items():
            found[variable] = form.format(value)
            if env.get(variable, found[variable]) not in (value, found[variable]):
                raise NodesError(f"--{name} {value}, but {variable}={env[variable]} is set; give one of the two")
    return found
