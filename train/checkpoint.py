"""Save and keep checkpoints so that each is whole or absent.

All ranks write into a staging folder and hash what they write; when every rank is done, rank 0 writes the manifest and
renames the folder to ``checkpoint-N``. Files and layout inside stay those of the Trainer.
"""

import shutil
import time
import uuid
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from ..storage.hashing import Ledger
from ..storage.manifest import steps
from ..storage.publish import clear_leftovers, commit, remove, stage
from ..storage.space import free_bytes, is_disk_full
from .hf_flags import ArgumentsError
from .runtime import from_main, gather, has_accelerator, is_main, reduce, several_ranks

PREFIX = "checkpoint-"


class SaveError(RuntimeError):
    """A checkpoint could not be written or published; the message says why, earlier ones are untouched."""


class DiskFullError(SaveError):
    """There is no room for a checkpoint; what was written of it is removed, earlier ones are untouched."""


def on_main(work: Callable[[], Any], *, patience: timedelta | None = None) -> Any:
    """Run ``work`` on rank 0 and give its result to all ranks; an error there is raised on all, as SaveError.

    ArgumentsError and DiskFullError stay what they are. Every rank must call it. Nobody waits in the dark: the others
    receive the error, not a time-out. ``patience`` is for work that may take longer than the process group's own limit
    (10 min with NCCL, 30 with gloo).
    """
    outcome: list[Any] = [None, None, None]
    if is_main():
        try:
            outcome = [work(), None, None]
        except (ArgumentsError, DiskFullError) as error:
            outcome = [None, type(error), str(error)]
        except Exception as error:  # noqa: BLE001 - it is raised again, on every rank
            outcome = [None, SaveError, f"{type(error).__name__}: {error}"]
    outcome = from_main(outcome, dist.new_group(timeout=patience) if patience and several_ranks() else None)
    if outcome[1] is not None:
        raise outcome[1](outcome[2])
    return outcome[0]


def finite_on_all_ranks(model: Any) -> bool:
    """Whether every trained weight is a finite number, on every rank's part of it. Every rank must call it."""
    device = torch.accelerator.current_accelerator() if has_accelerator() else torch.device("cpu")
    finite = torch.ones((), dtype=torch.int32, device=device)
    for parameter in model.parameters():
        part = getattr(parameter, "ds_tensor", parameter).detach()
        if parameter.requires_grad and part.numel():
            low_high = torch.stack(part.aminmax())  # ten times faster than isfinite; a NaN anywhere is both of them
            finite &= torch.isfinite(low_high).all().to(device)
    reduce(finite, "MIN")
    return bool(finite)


def check_shared(output_dir: Path) -> None:
    """Refuse an output folder that not all ranks share: each would hold a part of every checkpoint.

    Every rank must call it. Raises ArgumentsError on every rank, naming those that do not see rank 0's folder.
    """
    mark = output_dir / on_main(lambda: _new_mark(output_dir))
    missing = [rank for rank, seen in enumerate(gather(_appears(mark))) if not seen]
    on_main(lambda: mark.unlink(missing_ok=True))
    if missing:
        raise ArgumentsError(
            f"--output_dir {output_dir}: ranks {missing} do not see what rank 0 writes there; choose a folder that all share"
        )


def put_back(output_dir: Path) -> None:
    """Before checkpoints are looked at: clear what a killed save left, and put back what it had moved aside.

    Every rank must call it.
    """
    on_main(lambda: clear_leftovers(output_dir, f"{PREFIX}*"))


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


def open_staging(output_dir: Path, step: int, needed: int) -> Path:
    """The folder in which all ranks write the files of ``checkpoint-{step}``, the same on every rank.

    It has its final name, inside the staging folder. Every rank must call it; raises DiskFullError, SaveError.
    """

    def make() -> str:
        name = f"{PREFIX}{step}"
        with _told_when_full(output_dir / name, needed):
            staging = stage(output_dir / name)
            try:
                (staging / name).mkdir()
            except OSError:
                discard(staging)
                raise
        return str(staging / name)

    return Path(on_main(make))


def agree(ledger: Ledger, needed: int) -> None:
    """Raise on every rank what any rank met while it wrote, and enter on rank 0 what the others wrote.

    Every rank must call it. Raises DiskFullError, or SaveError also when rank 0 does not see what another rank wrote.
    """
    error = ledger.errors[0] if ledger.errors else None
    full = is_disk_full(error)
    place = getattr(error, "filename", None) or ledger.folder
    told = gather((full, f"{type(error).__name__}: {error}" if error else "", str(place), ledger.entries))
    for rank, (is_full, text, path, _) in enumerate(told):
        if is_full:
            raise DiskFullError(full_text(Path(path), f"rank {rank} saved a checkpoint there", needed)) from error
        if text:
            raise SaveError(f"{path}: rank {rank} could not save: {text}") from error
    all_entries = [entries for *_, entries in told]
    if unseen := on_main(lambda: _unseen(ledger.folder, all_entries)):
        raise SaveError(f"{ledger.folder}: rank 0 does not see {unseen}; --output_dir is not shared")
    for entries in all_entries:
        ledger.entries.update(entries)


def _unseen(folder: Path, entries: Sequence[Mapping[str, Any]]) -> str | None:
    """A file that another rank wrote and this one does not see, with that rank."""
    lost = ((name, rank) for rank, names in enumerate(entries) for name in names if not (folder / name).exists())
    return next((f"{name}, which rank {rank} wrote" for name, rank in lost), None)


def publish_checkpoint(
    ledger: Ledger, output_dir: Path, made_from: Mapping[str, Any], needed: int, latest: str | None
) -> Path:
    """Publish what all ranks wrote and agreed on; the final path. Every rank must call it.

    ``latest`` is the name of DeepSpeed's folder of shards, which it reads from a file of that name. Raises
    DiskFullError, SaveError.
    """
    folder = ledger.folder
    target = output_dir / folder.name

    def work() -> None:
        with _told_when_full(target, needed):
            if latest:
                (folder / "latest").write_text(latest, encoding="utf-8")
            commit(folder, target, kind="checkpoint", made_from=made_from, replace=True, written=ledger.entries)
            folder.parent.rmdir()

    on_main(work)
    return target


def discard(staging: Path) -> None:
    """Remove what was written of a checkpoint that will not be; rank 0 does it."""
    if is_main():
        shutil.rmtree(staging, ignore_errors=True)


def full_text(path: Path, what: str, needed: int) -> str:
    """The message that a disk is full: where, for what, bytes needed and free."""
    return (
        f"{path}: the disk is full: {what}, which needs about {needed:,} bytes, {free_bytes(path):,} are free. The "
        "partial one is removed, earlier ones are whole. Make room or lower --save_total_limit, then go on with "
        "--resume_from_checkpoint"
    )


@contextmanager
def _told_when_full(path: Path, needed: int) -> Generator[None]:
    try:
        yield
    except OSError as error:
        if not is_disk_full(error):
            raise
        raise DiskFullError(full_text(path, "a checkpoint is saved there", needed)) from error


def rotate(output_dir: Path, limit: int | None, keep: str | None) -> None:
    """Delete the oldest checkpoints by step beyond ``limit``; ``keep`` (the best one) and the newest always stay."""
    if limit is None or limit <= 0:
        return
    older = [path for _, path in steps(output_dir, PREFIX)[1:]]
    best = [path for path in older if keep and path.name == Path(keep).name]
    for path in [path for path in older if path not in best][max(0, limit - 1 - len(best)) :]:
        remove(path)
    clear_leftovers(output_dir, f"{PREFIX}*")
