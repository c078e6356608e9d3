"""The process's place in the run: device, ranks, DeepSpeed's own initialisation, compiled extensions.

On a CPU three things come first or a run goes wrong in silence: ``use_cpu`` (else several ranks train several models),
DeepSpeed's ``init_distributed`` before any model (else ZeRO-3 sees one rank), and no compilation that a killed process
could leave locked for ever.
"""

import os
import socket
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..ds_configs.resolve import offloads_optimizer
from ..storage.once import locked


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


def say(text: str) -> None:
    """Print one line from rank 0 only."""
    if is_main():
        print(text, flush=True)


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
    if offloads_optimizer(settings):
        build_cpu_adam(say)


def finish() -> None:
    """Leave the process group in order, all ranks together."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def check_world(seen: int) -> None:
    """Compare the world size that the Trainer sees with the launcher's. Raises RuntimeSetupError."""
    if seen != world_size():
        raise RuntimeSetupError(
            f"the launcher started {world_size()} ranks but the Trainer sees {seen}: each would train a model of its own"
        )


def build_cpu_adam(tell: Callable[[str], None]) -> None:
    """Compile DeepSpeed's CPU Adam once, under a lock that the kernel releases when its owner dies.

    torch's own build lock is a plain file: a killed build leaves it and every later run waits for ever. The build
    folder is finebridge's own, so under our lock a leftover file has no owner and is removed.
    """
    root = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(_extensions_dir())))
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"  # this venv's ninja
    from deepspeed.ops.op_builder import CPUAdamBuilder  # pyright: ignore[reportAttributeAccessIssue] - made at import time

    with locked(root / ".finebridge.lock", tell):
        (root / "cpu_adam" / "lock").unlink(missing_ok=True)
        if not any((root / "cpu_adam").glob("*.so")):
            tell(f"compiling DeepSpeed's CPU Adam into {root} (once, a few minutes on a small machine)")
        CPUAdamBuilder().load(verbose=False)


def _extensions_dir() -> Path:
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    return (
        cache
        / "finebridge"
        / "torch_extensions"
        / f"py{sys.version_info.major}{sys.version_info.minor}_{torch.__version__}"
    )


def _be_the_only_rank() -> None:
    """The environment of a one-process run; without it DeepSpeed looks for MPI."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    os.environ.update(RANK="0", LOCAL_RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
