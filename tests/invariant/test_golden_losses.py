"""Losses and gradient norms of three small runs, kept in a file: a change of the code that moves one bit of them shows.

With the torch and the processor that made the file every number must be the same; elsewhere matrix products round
otherwise, and they must be close. ``FINEBRIDGE_WRITE_GOLDEN=1`` writes the file anew: do so only for a change that is meant
to train otherwise, and say so in the changelog.
"""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.ds_configs.resolve import FOLDER
from rank_runner import RankRunner

pytestmark = pytest.mark.distributed
GOLDEN = Path(__file__).parent / "golden_losses.json"
RUNS: dict[str, tuple[str, int, dict[str, Any]]] = {
    "full, one rank": ("hunyuan_v1_dense", 1, {"per_device_train_batch_size": 4, "lr_scheduler_type": "cosine"}),
    "MoE, ZeRO-3, two ranks, accumulation": (
        "qwen3_moe", 2,
        {"per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "deepspeed": "ds_zero3_no_offload"},
    ),
    "LoRA, ZeRO-2, two ranks, packed": (
        "hunyuan_v1_dense", 2,
        {"use_lora": "true", "lora_rank": 4, "lora_dropout": 0.1, "packing": "true", "max_seq_length": 96,
         "per_device_train_batch_size": 1, "deepspeed": "ds_zero2_no_offload"},
    ),
}  # fmt: skip


def machine() -> dict[str, str]:
    """What decides how a matrix product rounds."""
    found = re.search(r"model name\s*:\s*(.*)", Path("/proc/cpuinfo").read_text())
    return {"torch": torch.__version__, "processor": found.group(1) if found else "unknown"}


def run(name: str, ranks: RankRunner, models: Callable[[str], Path], data: Path, folder: Path) -> list[list[float]]:
    model_type, world, more = RUNS[name]
    values = {
        "model_name_or_path": models(model_type), "train_data_file": data, "output_dir": folder, "max_steps": 5,
        "logging_steps": 1, "learning_rate": 1e-2, "save_strategy": "no", "disable_tqdm": "true",
    } | more  # fmt: skip
    if "deepspeed" in values:
        settings = json.loads((FOLDER / f"{values['deepspeed']}.json").read_text())
        settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
        values["deepspeed"] = folder / "ds.json"
        folder.mkdir(exist_ok=True)
        values["deepspeed"].write_text(json.dumps(settings))
    ranks.run([w for flag, value in values.items() for w in (f"--{flag}", value)], folder / "log", ranks=world).check()
    history = json.loads((folder / "trainer_state.json").read_text())["log_history"]
    return [[float(entry["loss"]), float(entry["grad_norm"])] for entry in history if "loss" in entry]


@pytest.mark.parametrize("name", RUNS)
def test_nothing_moves(
    name: str, ranks: RankRunner, models: Callable[[str], Path], train_file: Path, tmp_path: Path
) -> None:
    golden = json.loads(GOLDEN.read_text()) if GOLDEN.exists() else {}
    made = run(name, ranks, models, train_file, tmp_path / "out")
    assert len(made) == 5
    if os.environ.get("FINEBRIDGE_WRITE_GOLDEN"):
        golden = {**golden, "machine": machine(), name: made}
        GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
    assert made[-1][0] < made[0][0]
    if golden["machine"] == machine():
        assert made == golden[name]
    else:
        assert made == [pytest.approx(pair, rel=1e-4) for pair in golden[name]]
