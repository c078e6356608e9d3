"""The process's place in the run: device, ranks, DeepSpeed's own initialisation, compiled extensions.

On a CPU three things come first or a run goes wrong in silence: ``use_cpu`` (else several ranks train several models),
DeepSpeed's ``init_distributed`` before any model (else ZeRO-3 sees one rank), and no compilation that a killed process
could leave locked for ever.
"""

import atexit
import os
import signal
import socket
import sys
from typing import Any, Literal, NoReturn

import torch
import torch.distributed as dist

from . import extensions

_left: list[Any] = []  # process groups that were left


class RuntimeSetupError(RuntimeError):
    """The ranks of this run do not form one run; the message says why."""


def has_accelerator() -> bool:
    """Whether torch can use a GPU or another accelerator here."""
    return torch.accelerator.is_available()


def device_name(device: torch.device) -> str:
    """What a rank trains on, as the maker calls it."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def world_size() -> int:
    """Ranks that the launcher started."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main() -> bool:
    """Whether this is rank 0, the one that prints and writes what all share."""
    return int(os.environ.get("RANK", "0")) == 0


def several_ranks() -> bool:
    """Whether this process has joined others, so that collectives mean something."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def place() -> tuple[int, int]:
    """This rank's number and how many there are, in the process group; (0, 1) without others."""
    return (dist.get_rank(), dist.get_world_size()) if several_ranks() else (0, 1)


def gather(value: Any) -> list[Any]:
    """One value of every rank, in the order of ranks, on every rank. Every rank must call it."""
    if not several_ranks():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def from_main(value: Any, group: Any = None) -> Any:
    """Rank 0's value, on every rank. Every rank must call it; ``group`` is a process group of all ranks."""
    if not several_ranks():
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, group=group)
    return values[0]


def reduce(tensor: torch.Tensor, how: Literal["SUM", "MIN", "MAX"] = "SUM", group: Any = None) -> None:
    """Make a tensor, in place, the sum (least, greatest) over all ranks. Every rank must call it."""
    if several_ranks():
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, how), group=group)


def say(text: str) -> None:
    """Print one line from rank 0 only."""
    if is_main():
        print(text, flush=True)


def say_here(text: str) -> None:
    """Print one line from the first rank of each machine, which names itself where that is not rank 0."""
    if is_main():
        print(text, flush=True)
    elif os.environ.get("LOCAL_RANK") == "0":
        print(f"{socket.gethostname()}: {text}", flush=True)


def start(settings: dict[str, Any] | None) -> None:
    """Join the other ranks through DeepSpeed; call before ``TrainingArguments`` and before any model is built.

    ``settings`` are the resolved DeepSpeed settings, or None for a run without DeepSpeed, which the Trainer starts.
    """
    if not has_accelerator():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # silences a warning of every rank
    if settings is None:
        if world_size() == 1:
            for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
                os.environ.pop(name, None)  # one rank needs no process group, nor DDP's copies of the gradients
        return
    if "RANK" not in os.environ:
        _be_the_only_rank()
    import deepspeed

    if has_accelerator():
        torch.accelerator.set_device_index(int(os.environ.get("LOCAL_RANK", "0")))
        deepspeed.init_distributed()
    else:
        # Training never uses the shared-memory collectives, and probing for them compiles C++ for half a minute.
        from deepspeed import ops

        ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_backend="gloo")
    extensions.prepare(settings, say)


def finish() -> None:
    """Leave the process group in order, all ranks together.

    The group is kept until the process ends. Whoever lets go of it last joins gloo's threads, and those may wait for the
    interpreter lock to free a tensor: DDP's C++ part lets go while it holds that lock, a deadlock on busy machines.
    """
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        _left.append(dist.group.WORLD)
        dist.destroy_process_group()


def end(code: int) -> NoReturn:
    """End the process: what was registered for its end is run, the interpreter is not taken down.

    A gloo thread that asks for the interpreter lock while it is taken down is ended in the middle of a destructor, and the
    process aborts after all its work (``terminate called without an active exception``).
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the code is decided
    atexit._run_exitfuncs()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - trackers finish their uploads there
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def check_world(seen: int) -> None:
    """Compare the world size that the Trainer sees with the launcher's. Raises RuntimeSetupError."""
    if seen != world_size():
        raise RuntimeSetupError(
            f"the launcher started {world_size()} ranks but the Trainer sees {seen}: each would train a model of its own"
        )


def _be_the_only_rank() -> None:
    """The environment of a one-process run; without it DeepSpeed looks for MPI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
