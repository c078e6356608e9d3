"""What Slurm says of an allocation: its nodes and how many processes each takes. No ``scontrol`` is asked."""

import math
import re
from collections.abc import Iterator, Mapping
from itertools import product

MOST_NODES = 65_536
_PART = re.compile(r"[A-Za-z0-9._-]+|\[[0-9,-]+\]")
_RANGE = re.compile(r"(?P<first>[0-9]{1,9})(?:-(?P<last>[0-9]{1,9}))?")


class SlurmError(ValueError):
    """A variable of Slurm is not what its documentation says; the message names it."""


def expand(text: str) -> list[str]:
    """``node[001-003,7],login`` as node001, node002, node003, node7, login. Raises SlurmError."""
    names: list[str] = []
    for entry in _entries(text):
        parts = _PART.findall(entry)
        if not entry or "".join(parts) != entry:
            raise SlurmError(f"SLURM_JOB_NODELIST={text!r}: {entry!r} is no list of nodes")
        choices = [list(_numbers(part, text)) if part.startswith("[") else [part] for part in parts]
        if math.prod(map(len, choices)) > MOST_NODES:
            raise SlurmError(f"SLURM_JOB_NODELIST={text!r} names more than {MOST_NODES} nodes")
        names += ["".join(words) for words in product(*choices)]
    return names


def nodes(env: Mapping[str, str]) -> tuple[list[str], str]:
    """The nodes of the allocation, and the variable that names them; none outside of Slurm. Raises SlurmError.

    They are the step's when srun has started several of us, else the job's.
    """
    kind = "STEP" if tasks_of_step(env) > 1 else "JOB"
    name = f"SLURM_{kind}_NODELIST"
    names = expand(text) if (text := env.get(name, "")) else []
    stated = _number(env, f"SLURM_{kind}_NUM_NODES")
    if names and stated not in (None, len(names)):
        raise SlurmError(f"SLURM_{kind}_NUM_NODES={stated}, but {name} names {len(names)}")
    return names, name


def tasks_of_step(env: Mapping[str, str]) -> int:
    """How many of us srun has started; 1 in a job script. Raises SlurmError."""
    return _number(env, "SLURM_STEP_NUM_TASKS") or 1


def task_of_step(env: Mapping[str, str], count: int) -> int:
    """Which of ``count`` nodes this task of a step is. Raises SlurmError unless there is one task a node."""
    tasks, number = tasks_of_step(env), _number(env, "SLURM_NODEID")
    if tasks != count or number is None or number >= count:
        raise SlurmError(
            f"SLURM_STEP_NUM_TASKS={tasks}, SLURM_NODEID={number}: start finebridge once in the job script, or with srun "
            "--ntasks-per-node=1; it starts a node's ranks itself"
        )
    return number


def slots_by_node(env: Mapping[str, str]) -> int | None:
    """Processes that a node takes: its GPUs, else the tasks of a node; None when Slurm tells neither. Raises SlurmError.

    Scripts ask for one task a node, as for torchrun, or for one a GPU; another number contradicts the GPUs.
    """
    gpus = _gpus(env)
    tasks = _number(env, "SLURM_NTASKS_PER_NODE")
    if gpus and tasks not in (None, 1, gpus):
        raise SlurmError(f"SLURM_NTASKS_PER_NODE={tasks}, but a node has {gpus} GPUs (SLURM_GPUS_ON_NODE)")
    return gpus or tasks


def _gpus(env: Mapping[str, str]) -> int | None:
    """SLURM_GPUS_ON_NODE, or SLURM_GPUS_PER_NODE with or without a type (``a100:8``)."""
    here, each = _number(env, "SLURM_GPUS_ON_NODE"), env.get("SLURM_GPUS_PER_NODE", "")
    if each and not re.fullmatch(r"([A-Za-z0-9._-]+:)?[0-9]{1,5}", each):
        raise SlurmError(f"SLURM_GPUS_PER_NODE={each!r}: a number, or TYPE:NUMBER, is expected")
    wanted = int(each.rpartition(":")[2]) if each else None
    if here and wanted and here != wanted:
        raise SlurmError(f"SLURM_GPUS_ON_NODE={here} contradicts SLURM_GPUS_PER_NODE={each}")
    return wanted or here


def _number(env: Mapping[str, str], name: str) -> int | None:
    text = env.get(name, "")
    if text and not re.fullmatch(r"[0-9]{1,5}", text):
        raise SlurmError(f"{name}={text!r}: a number is expected")
    return int(text) if text else None


def _entries(text: str) -> list[str]:
    """The parts of a list; a comma in brackets parts none."""
    entries, depth = [""], 0
    for letter in text:
        depth += (letter == "[") - (letter == "]")
        if letter == "," and depth == 0:
            entries.append("")
        else:
            entries[-1] += letter
    return entries


def _numbers(part: str, text: str) -> Iterator[str]:
    """What a bracket stands for; ``001-003`` keeps its zeros."""
    for piece in part[1:-1].split(","):
        match = _RANGE.fullmatch(piece)
        first, last = (int(match["first"]), int(match["last"] or match["first"])) if match else (1, 0)
        if match is None or last < first or last - first >= MOST_NODES:
            raise SlurmError(f"SLURM_JOB_NODELIST={text!r}: {piece!r} is no range")
        yield from (f"{number:0{len(match['first'])}d}" for number in range(first, last + 1))
