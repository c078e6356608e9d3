"""SIGTERM in the middle of a run, through the real command: saved, code 143, and the run goes on as if never stopped."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_runner import RankRunner
from safetensors.torch import load_file

Models = Callable[[str], Path]
History = Callable[[Path], list[dict[str, Any]]]


def flags(model: Path, data: Path, out: Path, **more: Any) -> list[str]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "max_steps": 6, "logging_steps": 1,
        "per_device_train_batch_size": 2, "disable_tqdm": "true", "save_steps": 100, "lr_scheduler_type": "cosine",
        "learning_rate": 1e-3, "prepared_data_dir": out.parent / "prepared",
    } | more  # fmt: skip
    return [str(word) for name, value in values.items() for word in (f"--{name}", value)]


def launched(fault: list[str], argv: list[str], extensions: Path) -> subprocess.CompletedProcess[str]:
    """The launcher with ranks to which something happens at a sample; see rank_faults."""
    code = "from finebridge.finetune.launch import run_ranks; "
    code += f"raise SystemExit(run_ranks('rank_faults', {fault + argv!r}, 2))"
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, "TORCH_EXTENSIONS_DIR": str(extensions)}
    return subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=240, check=False
    )


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("where", "more"),
    [
        ("training", {"deepspeed": "ds_zero3_no_offload"}),
        ("evaluation", {"eval_strategy": "steps", "eval_steps": 2, "per_device_eval_batch_size": 2}),
    ],
)
def test_a_stopped_run_goes_on_as_if_it_never_was(
    where: str,
    more: dict[str, Any],
    ranks: RankRunner,
    models: Models,
    train_file: Path,
    tmp_path: Path,
    history: History,
) -> None:
    """The signal comes while rank 1 reads a sample: of training, or of the evaluation after step 2."""
    base = models("hunyuan_v1_dense")
    if where == "evaluation":
        more = {**more, "eval_data_file": train_file}
    out, straight = tmp_path / "out", tmp_path / "straight"
    done = launched(
        ["terminate", "1", "9" if where == "evaluation" else "5"],
        flags(base, train_file, out, **more),
        tmp_path / "extensions",
    )
    assert done.returncode == 143, done.stdout + done.stderr
    assert not (tmp_path / "extensions").exists(), "neither needs a compiled part"
    (saved,) = out.glob("checkpoint-*")
    step = int(saved.name.split("-")[1])
    assert step == 2 if where == "evaluation" else 2 <= step < 6
    assert "eval_loss" not in done.stdout
    assert (
        f"stopped by SIGTERM at step {step}, checkpoint {saved} saved; go on with --resume_from_checkpoint"
        in done.stdout
    )
    ranks.run(flags(base, train_file, out, resume_from_checkpoint="true", **more), tmp_path / "log", ranks=2).check()
    ranks.run(flags(base, train_file, straight, **more), tmp_path / "log2", ranks=2).check()
    assert [entry["loss"] for entry in history(out)] == [entry["loss"] for entry in history(straight)]
    ours, theirs = (load_file(folder / "checkpoint-6" / "model.safetensors") for folder in (out, straight))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
