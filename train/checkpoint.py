"""Save, keep and find checkpoints so that each is whole or absent.

The HF Trainer writes its files into a staging folder; when every rank is done, rank 0 hashes them, writes the manifest
and renames the folder to ``checkpoint-N``. Files and layout inside stay those of the Trainer.
"""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch.distributed as dist

from ..storage.manifest import ManifestError, newest_verified, steps, verify
from ..storage.publish import clear_leftovers, commit, remove, stage
from .hf_flags import ArgumentsError
from .runtime import is_main

PREFIX = "checkpoint-"


class SaveError(RuntimeError):
    """A checkpoint could not be written or published; the message says why, earlier ones are untouched."""


def on_main(work: Callable[[], Any]) -> Any:
    """Run ``work`` on rank 0 and give its result to all ranks; its error is raised on every rank as SaveError.

    Every rank must call it. Nobody waits in the dark: the others receive the error, not a time-out.
    """
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome = [work(), None]
        except Exception as error:  # noqa: BLE001 - it is raised again, on every rank
            outcome = [None, f"{type(error).__name__}: {error}"]
    if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        dist.broadcast_object_list(outcome, src=0)
    if outcome[1] is not None:
        raise SaveError(outcome[1])
    return outcome[0]


def open_staging(output_dir: Path, step: int) -> Path:
    """The folder in which all ranks write the files of ``checkpoint-{step}``, the same on every rank."""
    return Path(on_main(lambda: str(stage(output_dir / f"{PREFIX}{step}"))))


def publish_checkpoint(staging: Path, output_dir: Path, step: int, made_from: Mapping[str, Any]) -> Path:
    """Publish what all ranks wrote into ``staging/checkpoint-{step}``; the final path. Every rank must call it."""
    if dist.is_available() and dist.is_initialized():
        dist.barrier()
    target = output_dir / f"{PREFIX}{step}"

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


def find_resume(
    resume: str | bool | None, output_dir: Path, say: Callable[[str], None], *, deepspeed: bool
) -> str | None:
    """The checkpoint to resume from: a named one, or with True the newest that verifies; None to start afresh.

    Raises ArgumentsError when a named checkpoint is not whole, when checkpoints exist and none verifies, or when the
    one found lacks the state of optimizer or schedule.
    """
    found = _chosen(resume, output_dir, say) if resume else None
    if found is None:
        return None
    for name in ("trainer_state.json", *(("latest",) if deepspeed else ("optimizer.pt", "scheduler.pt"))):
        if not (found / name).is_file():
            raise ArgumentsError(
                f"--resume_from_checkpoint {found}: no {name} there, so optimizer and schedule would start afresh "
                "(saved with --save_only_model, or with another --deepspeed setting?); to start from its weights alone, "
                "give it as --model_name_or_path"
            )
    return str(found)


def _chosen(resume: str | bool, output_dir: Path, say: Callable[[str], None]) -> Path | None:
    """The named checkpoint, or the newest that verifies."""
    if isinstance(resume, str):
        if not (Path(resume) / "manifest.json").is_file():
            say(f"resume: {resume} has no manifest (another tool wrote it), so its files cannot be verified")
            return Path(resume)
        try:
            verify(Path(resume))
        except ManifestError as error:
            raise ArgumentsError(f"--resume_from_checkpoint: {error}") from None
        return Path(resume)
    found, passed_over = newest_verified(output_dir, PREFIX)
    for reason in passed_over:
        say(f"resume: passed over {reason}")
    if found is None and passed_over:
        raise ArgumentsError(
            f"--resume_from_checkpoint: no checkpoint in {output_dir} is whole; remove them to start afresh"
        )
    say(f"resume: {found}" if found else f"resume: no checkpoint in {output_dir} yet, starting afresh")
    return found
