"""Save and keep checkpoints so that each is whole or absent.

The HF Trainer writes its files into a staging folder; when every rank is done, rank 0 hashes them, writes the manifest
and renames the folder to ``checkpoint-N``. Files and layout inside stay those of the Trainer.
"""

import time
import uuid
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..storage.manifest import steps
from ..storage.publish import clear_leftovers, commit, remove, stage
from .hf_flags import ArgumentsError
from .runtime import has_accelerator, is_main

PREFIX = "checkpoint-"


class SaveError(RuntimeError):
    """A checkpoint could not be written or published; the message says why, earlier ones are untouched."""


def on_main(work: Callable[[], Any], *, patience: timedelta | None = None) -> Any:
    """Run ``work`` on rank 0 and give its result to all ranks; its error is raised on all, as ArgumentsError or SaveError.

    Every rank must call it. Nobody waits in the dark: the others receive the error, not a time-out. ``patience`` is for
    work that may take longer than the process group's own limit (10 min with NCCL, 30 with gloo).
    """
    outcome: list[Any] = [None, None, None]
    if is_main():
        try:
            outcome = [work(), None, None]
        except ArgumentsError as error:
            outcome = [None, ArgumentsError, str(error)]
        except Exception as error:  # noqa: BLE001 - it is raised again, on every rank
            outcome = [None, SaveError, f"{type(error).__name__}: {error}"]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        group: Any = dist.new_group(timeout=patience) if patience else None
        dist.broadcast_object_list(outcome, src=0, group=group)
    if outcome[1] is not None:
        raise outcome[1](outcome[2])
    return outcome[0]


def finite_on_all_ranks(model: Any) -> bool:
    """Whether every trained weight is a finite number, on every rank's part of it. Every rank must call it."""
    device = torch.accelerator.current_accelerator() if has_accelerator() else torch.device("cpu")
    finite = torch.ones((), dtype=torch.int32, device=device)
    for parameter in model.parameters():
        if parameter.requires_grad:
            finite &= torch.isfinite(getattr(parameter, "ds_tensor", parameter).detach()).all().to(device)
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(finite, op=dist.ReduceOp.MIN)
    return bool(finite)


def check_shared(output_dir: Path) -> None:
    """Refuse an output folder that not all ranks share: each would hold a part of every checkpoint.

    Every rank must call it. Raises ArgumentsError on every rank, naming those that do not see rank 0's folder.
    """
    mark = output_dir / on_main(lambda: _new_mark(output_dir))
    missing = [rank for rank, seen in enumerate(_gather(_appears(mark))) if not seen]
    on_main(lambda: mark.unlink(missing_ok=True))
    if missing:
        raise ArgumentsError(
            f"--output_dir {output_dir}: ranks {missing} do not see what rank 0 writes there; choose a folder that all share"
        )


def _new_mark(output_dir: Path) -> str:
    """The name of a new empty file in the folder."""
    output_dir.mkdir(parents=True, exist_ok=True)
    name = f".shared-{uuid.uuid4().hex}"
    (output_dir / name).touch()
    return name


def _appears(path: Path, seconds: float = 5.0) -> bool:
    """Whether a file exists, giving a network file system a few seconds to show it."""
    deadline = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def _gather(value: Any) -> list[Any]:
    """One value of every rank, in the order of ranks, on every rank."""
    if not (dist.is_available() and dist.is_initialized()):
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def open_staging(output_dir: Path, step: int) -> Path:
    """The folder in which all ranks write the files of ``checkpoint-{step}``, the same on every rank."""
    return Path(on_main(lambda: str(stage(output_dir / f"{PREFIX}{step}"))))


def publish_checkpoint(staging: Path, output_dir: Path, step: int, made_from: Mapping[str, Any]) -> Path:
    """Publish what all ranks wrote into ``staging/checkpoint-{step}``; the final path. Every rank must call it.

    Raises SaveError when a rank wrote files that rank 0 does not see: the checkpoint would not be whole.
    """
    target = output_dir / f"{PREFIX}{step}"
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    written = _gather({path.relative_to(staging).as_posix() for path in staging.rglob("*")})
    if lost := sorted(set[str]().union(*written) - written[0]):
        raise SaveError(
            f"{staging}: rank 0 does not see {lost[0]}, which another rank wrote; --output_dir is not shared"
        )

    def work() -> None:
        commit(staging / target.name, target, kind="checkpoint", made_from=made_from, replace=True)
        staging.rmdir()

    on_main(work)
    return target


def rotate(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Delete the oldest checkpoints by step beyond ``limit``; ``keep`` (the best one) and the newest always stay."""
    if limit is None or limit <= 0:
        return
    older = [path for _, path in steps(output_dir, PREFIX)[1:]]
    best = [path for path in older if keep and path.name == Path(keep).name]
    for path in [path for path in older if path not in best][max(0, limit - 1 - len(best)) :]:
        remove(path)
    clear_leftovers(output_dir, f"{PREFIX}*")
