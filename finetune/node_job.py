"""What travels to every node of a run: one word of base64, so that no shell, ssh or pdsh reads a byte of it."""

import base64
import binascii
import json
import os
import re
import secrets
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from .. import __version__
from .nodes import NodesError

FORWARDED = ("NCCL_", "HF_", "TORCH_", "WANDB_", "CUDA_")  # the beginnings of names
FORWARDED_NAMES = ("OMP_NUM_THREADS", "GLOO_SOCKET_IFNAME")
_STAY = ("CUDA_VISIBLE_DEVICES",)  # each node has its own
_SECRET = re.compile(r"TOKEN|KEY|SECRET|PASSW|CREDENTIAL")
_LAUNCHERS = re.compile(r"RANK|LOCAL_RANK|(LOCAL_)?WORLD_SIZE|MASTER_(ADDR|PORT)|FINEBRIDGE_LAUNCHER|PYTHONPATH")


@dataclass(frozen=True, slots=True)
class Job:
    """A run as each of its nodes is told of it. ``mark`` begins the lines in which a node reports (``node_launcher.py``)."""

    module: str
    argv: list[str]
    env: dict[str, str]
    nodes: list[tuple[str, int]]  # host, processes
    master: str
    port: int
    folder: str  # the working directory, on every node
    logs: str
    stop_grace: float
    beats: tuple[str, int] | None = None  # where a node that is not fed hears that the launching side lives (beats.py)
    version: str = __version__
    mark: str = field(default_factory=lambda: f"\x1e{secrets.token_hex(8)} ")

    def encode(self) -> str:
        """The word, of letters, digits, ``-``, ``_`` and ``=``. Any text survives, also bytes that are no UTF-8."""
        return base64.urlsafe_b64encode(json.dumps(asdict(self)).encode()).decode()

    @classmethod
    def decode(cls, word: str | bytes, *, any_version: bool = False) -> "Job":
        """The job in a word. Raises NodesError when it is none, or from another version."""
        try:
            values: dict[str, Any] = json.loads(base64.b64decode(word, altchars=b"-_", validate=True))
            if values["version"] != __version__ and not any_version:
                raise NodesError(
                    f"finebridge {__version__} is installed here, the run was started with {values['version']}"
                )
            values["nodes"] = [(str(host), int(slots)) for host, slots in values["nodes"]]
            values["beats"] = values["beats"] and (str(values["beats"][0]), int(values["beats"][1]))
            return cls(**values)
        except (binascii.Error, ValueError, KeyError, TypeError) as error:
            if isinstance(error, NodesError):
                raise
            raise NodesError(f"no job of finebridge: {error}") from None

    @property
    def world(self) -> int:
        """The number of ranks."""
        return sum(slots for _, slots in self.nodes)

    def first_rank(self, number: int) -> int:
        """The first rank of a node."""
        return sum(slots for _, slots in self.nodes[:number])


def forwarded(env: Mapping[str, str], more: Sequence[str]) -> dict[str, str]:
    """The variables that every node gets: FORWARDED, FORWARDED_NAMES and ``more`` (--forward_env). Raises NodesError.

    PATH and LD_LIBRARY_PATH stay behind unless they are asked for: a node's own are right for it.
    """
    for name in more:
        if not re.fullmatch(r"[A-Za-z_][A-Za-z0-9_]*", name):
            raise NodesError(f"--forward_env: {name!r} is no name of a variable")
        if _LAUNCHERS.fullmatch(name):
            raise NodesError(f"--forward_env {name}: the launcher sets it on every node")
        if name not in env:
            raise NodesError(f"--forward_env {name}: it is not set here")
    chosen = [name for name in env if name.startswith(FORWARDED) and name not in _STAY]
    return {name: env[name] for name in sorted({*chosen, *more, *(set(FORWARDED_NAMES) & set(env))})}


def secret_names(env: Mapping[str, str]) -> list[str]:
    """The variables whose values should not stand in a list of processes, by their names."""
    return [name for name, value in env.items() if value and _SECRET.search(name.upper())]


def here() -> str:
    """The working directory, the same on every node. Raises NodesError when it was removed."""
    try:
        return os.getcwd()  # noqa: PTH109 - a word of a job
    except FileNotFoundError:
        raise NodesError("the working directory does not exist any more; change to one that does") from None
