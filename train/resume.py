"""Go on from a checkpoint: choose it, prove that all its state is there and fits this run, make it loadable.

Everything is told before anything is loaded. A checkpoint of ours carries a manifest with what shaped its run; one that
another tool wrote is checked by its files, as far as they tell.
"""

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage.manifest import MANIFEST_NAME, ManifestError, newest_verified, read, verify
from .checkpoint import PREFIX
from .drift import GROUP_KEYS, SCHEDULE, Drift, differences, refusal, refused
from .hf_flags import ArgumentsError
from .reshape import reshaped
from .shards import check_pickles, latest_folder, shard_files, shard_ranks

_RNG = re.compile(r"rng_state_(\d+)\.pth")
_STATEFUL = ("reduce_lr_on_plateau", "greedy")  # schedules that remember more than the number of steps
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Resume:
    """The folder to load from, whether it holds DeepSpeed's universal form, and the settings to take from the flags."""

    folder: Path
    universal: bool = False
    renewed: frozenset[str] = frozenset()


def find_resume(
    resume: str | bool | None, output_dir: Path, now: Mapping[str, Any], allowed: frozenset[str], say: Say
) -> Resume | None:
    """What to resume from: a named checkpoint, or with True the newest that verifies; None to start afresh.

    ``now`` is this run's shape (``run_shape.py``). Shards for another number of ranks are rewritten, see
    ``reshape.py``. Raises ArgumentsError when the checkpoint is not whole, lacks a file of its state, or differs from
    this run in what ``allowed`` does not name.
    """
    found = _chosen(resume, output_dir, say) if resume else None
    if found is None:
        return None
    ours = (found / MANIFEST_NAME).is_file()
    then = _recorded(found, now, say) if ours else _told_by_files(found, now, say)
    renewed = _judge(found, differences(then, now), now, allowed, say)
    needed = state_files(found, then["world_size"], now)
    if not ours:
        check_pickles(needed)
    if now["zero_stage"] and then["world_size"] != now["world_size"]:
        if "bf16_kahan" in str(now["optimizer"]).split():  # DeepSpeed's universal form has Adam's moments alone
            raise ArgumentsError(
                f"--resume_from_checkpoint {found}: {then['world_size']} ranks wrote it, and what --master_weights bf16_kahan "
                "keeps beside each weight cannot be given to another number of them; resume with as many, or start from its "
                "weights with --init_from_checkpoint"
            )
        # ZeRO-3's loader gives all groups the first one's settings; the flags' are the checkpoint's or were allowed.
        return Resume(reshaped(found, output_dir, say), universal=True, renewed=renewed | GROUP_KEYS.keys())
    return Resume(found, renewed=renewed)


def _chosen(resume: str | bool, output_dir: Path, say: Say) -> Path | None:
    """The named checkpoint, or the newest that verifies."""
    if isinstance(resume, str):
        if not (Path(resume) / MANIFEST_NAME).is_file():
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


def check_init(source: Path, say: Say) -> None:
    """Say what ``--init_from_checkpoint`` takes, after checking its files where a manifest tells them.

    Raises ArgumentsError naming the file that is missing or changed.
    """
    checked = (source / MANIFEST_NAME).is_file()
    if checked:
        try:
            verify(source)
        except ManifestError as error:
            raise ArgumentsError(f"--init_from_checkpoint: {error}") from None
    say(
        f"init: the weights of {source}{'' if checked else ' (it has no manifest, so they cannot be verified)'}; "
        "optimizer, schedule, step count and order of samples start afresh"
    )


def _recorded(found: Path, now: Mapping[str, Any], say: Say) -> Mapping[str, Any]:
    """What shaped the run of a checkpoint of ours."""
    recorded = read(found)["made_from"].get("run")
    return recorded if recorded is not None else _told_by_files(found, now, say)


def _told_by_files(found: Path, now: Mapping[str, Any], say: Say) -> Mapping[str, Any]:
    """This run's shape with what the files of a checkpoint without a record tell otherwise: ranks, batch size, length."""
    state = _trainer_state(found)
    then = {**now, "world_size": _ranks_by_files(found, now)}
    if state.get("train_batch_size"):
        then["per_device_train_batch_size"] = state["train_batch_size"]
    if now["max_steps"] and state.get("max_steps"):
        then["max_steps"] = state["max_steps"]
    say(
        f"resume: {found} does not say what shaped its run, so only ranks, batch size and --max_steps are compared: "
        "data, seed, accumulation and schedule must be the same, or samples are repeated or skipped"
    )
    return then


def _ranks_by_files(found: Path, now: Mapping[str, Any]) -> int:
    """How many ranks wrote a checkpoint, by its random states and shards.

    Without DeepSpeed the files of fewer ranks look like those of a checkpoint that lost some: at least this run's
    number is taken, and what lacks is then told.
    """
    numbered = [int(match.group(1)) for path in found.iterdir() if (match := _RNG.fullmatch(path.name))]
    seen = max(max(numbered) + 1, 2) if numbered else 1  # one rank's file has no number
    return max(seen, shard_ranks(latest_folder(found)) if now["zero_stage"] else now["world_size"])


def state_files(found: Path, ranks: int, now: Mapping[str, Any]) -> list[Path]:
    """Every file whose state a resume loads, for a checkpoint that ``ranks`` ranks wrote with this run's settings.

    Raises ArgumentsError naming the first that is missing: stock Trainers start afresh in silence without some of them.
    """
    _trainer_state(found)
    rng = ["rng_state.pth"] if ranks == 1 else [f"rng_state_{rank}.pth" for rank in range(ranks)]
    needed = [found / name for name in ("trainer_state.json", "scheduler.pt", *rng)]
    if now["zero_stage"] is None:
        scaler = ["scaler.pt"] if now["precision"] == "fp16" else []
        needed += [found / name for name in ("optimizer.pt", *scaler)] + _weights(
            found, adapter=now["lora"] is not None
        )
    else:
        needed += shard_files(latest_folder(found), now["zero_stage"], ranks, bf16=now["precision"] == "bf16")
    missing = [path for path in needed if not path.is_file()]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise ArgumentsError(
            f"--resume_from_checkpoint {found}: {missing[0].relative_to(found)} is missing{more}, so optimizer and "
            f"schedule would start afresh (the state of {ranks} ranks is expected; was it saved with --save_only_model, or "
            "with another --deepspeed setting?). --init_from_checkpoint starts from its weights alone"
        )
    return needed


def _weights(found: Path, *, adapter: bool) -> list[Path]:
    """The files of the weights: of the adapter, or of the model with every shard that its index names."""
    if adapter:
        return [found / "adapter_config.json", found / "adapter_model.safetensors"]
    index = found / "model.safetensors.index.json"
    if not index.is_file():
        return [found / "model.safetensors"]
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (ValueError, KeyError, AttributeError) as error:
        raise ArgumentsError(f"{index}: not an index of weights: {error}") from None
    return [index, *(found / Path(name).name for name in sorted(names))]


def _trainer_state(found: Path) -> dict[str, Any]:
    """The Trainer's own state. Raises ArgumentsError when it is missing or does not tell the step."""
    path = found / "trainer_state.json"
    try:
        state = json.loads(path.read_text(encoding="utf-8"))
        int(state["global_step"])
    except (OSError, ValueError, KeyError, TypeError):
        raise ArgumentsError(
            f"--resume_from_checkpoint {path}: missing or damaged, so the step to go on from is not known"
        ) from None
    return state


def _judge(
    found: Path, drifts: list[Drift], now: Mapping[str, Any], allowed: frozenset[str], say: Say
) -> frozenset[str]:
    """Say the differences; the names of those that were allowed and are to be set anew. Raises ArgumentsError."""
    stopping = refused(drifts, now["lr_scheduler_type"], allowed)
    types = {now["lr_scheduler_type"], *(drift.then for drift in drifts if drift.name == "lr_scheduler_type")}
    if types & set(_STATEFUL):  # their state cannot be set to a position
        stopping += [drift for drift in drifts if drift.name in SCHEDULE and drift not in stopping]
    if stopping:
        others = [drift for drift in drifts if drift not in stopping]
        also = "\nalso different, without harm: " + "; ".join(map(str, others)) if others else ""
        raise ArgumentsError(
            f"--resume_from_checkpoint {found}: this run is not the one that saved it:\n{refusal(stopping)}{also}"
        )
    renewed = frozenset(drift.name for drift in drifts if drift.name in allowed)
    for drift in drifts:
        say(f"resume: {'allowed: ' if drift.name in renewed else ''}{drift}")
    return renewed
