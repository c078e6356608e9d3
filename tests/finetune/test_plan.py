"""``finebridge plan``: what it says of measured runs, what it chooses, and what it refuses."""

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from finebridge.ds_configs.resolve import resolve
from finebridge.finetune import plan
from finebridge.finetune.cli import main
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.masters import without_masters
from finebridge.train.zero_memory import read_zero

GPU = Path(__file__).parents[2] / "benchmarks" / "gpu"
sys.path.insert(0, str(GPU))

import speed  # noqa: E402 - found through the line above

SMALL = {**speed.ROWS["tiny"].config, "vocab_size": 4000, "num_hidden_layers": 6}
BF16 = ["--bf16", "--packing", "--per_device_train_batch_size", "1", "--max_seq_length", "4096"]


def config(folder: Path, values: Any) -> Path:
    file = folder / "config.json"
    file.write_text(json.dumps(values))
    return file


def flags(length: int, accumulation: int, **more: str) -> dict[str, str]:
    return {
        "max_seq_length": str(length), "gradient_accumulation_steps": str(accumulation), "bf16": "true",
        "per_device_train_batch_size": "1", "deepspeed": "ds_zero2_no_offload", "gradient_checkpointing": "false",
        "packing": "true", **more,
    }  # fmt: skip


LORA = {name: str(value) for name, value in speed.LORA.items()}
# The shapes of benchmarks/gpu/speed.py, eager, under DeepSpeed's own ZeRO, as one H100 held them (GiB, gpu_speed.csv).
MEASURED = {
    "0.6b": (26.796, flags(8192, 2)),
    "4b": (70.388, flags(4096, 4, master_weights="bf16_stochastic")),
    "8b-lora": (24.654, flags(16384, 1, **LORA, gradient_checkpointing="true")),
}


@pytest.mark.slow
@pytest.mark.parametrize("row", MEASURED)
def test_measured_rows_are_foretold_within_a_tenth(row: str, tmp_path: Path) -> None:
    measured, given = MEASURED[row]
    words = [word for name, value in given.items() for word in (f"--{name}", value)]
    args = plan.arguments_of(config(tmp_path, {**speed.ROWS[row].config, "vocab_size": 151936}), words)
    task = plan.task_of(args, 1, plan.limit_of(80, 1), deepspeed=True)
    hidden = plan.config_of(args).hidden_size
    settings = resolve(str(args.hf["deepspeed"]))
    settings = without_masters(settings) if "master_weights" in given else settings
    choice = plan.choose(row, task, read_zero(settings, hidden))
    assert choice.peak / 2**30 == pytest.approx(measured, rel=0.1)
    assert choice.recomputed == (36 if row == "8b-lora" else 0)


def told(capsys: pytest.CaptureFixture[str], words: Sequence[str]) -> tuple[int, list[str]]:
    code = main(["plan", *words])
    return code, capsys.readouterr().out.splitlines()


def test_the_fastest_setting_that_fits_is_chosen(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = str(config(tmp_path, SMALL))
    code, lines = told(capsys, [file, "--gpus", "2", "--gpu_memory", "80", *BF16])
    assert code == 0
    assert lines[0].startswith("plan: Qwen3ForCausalLM, ")
    assert lines[0].endswith("; 2 GPUs; a step is 1 x 1 x 4096 tokens on each")
    rows = {line.split()[0]: line.split()[1:] for line in lines[3:-1] if not line.startswith("*")}
    assert {"ds_zero2_offload", "ds_zero3_no_offload", "ds_zero3_offload", "without"} <= rows.keys()
    assert sum(line.startswith("* ") for line in lines) == 1
    best = next(line for line in lines if line.startswith("* ")).split()
    others = [float(values[-1]) for values in rows.values()]
    assert float(best[-1]) <= min(others)
    assert lines[-1].endswith("--gradient_checkpointing auto")


def test_less_memory_recomputes_more_and_then_fits_no_more(tmp_path: Path) -> None:
    args = plan.arguments_of(config(tmp_path, SMALL), BF16)
    task = plan.task_of(args, 1, 2**40, deepspeed=True)
    zero = read_zero(resolve("ds_zero3_no_offload"), 64)
    free = plan.choose("free", task, zero)
    assert free.recomputed == 0
    numbers: list[int | None] = []
    for share in (0.9, 0.6, 0.1):
        limited = replace(task, limit=int(free.peak * share))
        choice = plan.choose("less", limited, zero)
        assert choice.recomputed is None or choice.peak <= limited.limit
        numbers.append(choice.recomputed)
    assert numbers[0] is not None
    assert 0 < numbers[0] < 6
    assert numbers[2] is None
    fixed = plan.choose("all", replace(task, recompute=True), zero)
    assert fixed.recomputed == 6
    assert fixed.passes < free.passes
    assert fixed.seconds > free.seconds


def test_what_does_not_fit_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    large = {**SMALL, "num_hidden_layers": 4, "hidden_size": 2048, "intermediate_size": 8192}
    code, lines = told(capsys, [str(config(tmp_path, large)), "--gpus", "1", "--gpu_memory", "1.5", *BF16])
    assert code == 1
    assert lines[-1].startswith("nothing fits: try a smaller --per_device_train_batch_size")


@pytest.mark.parametrize(
    ("words", "text"),
    [
        (["--gpus", "0", "--gpu_memory", "80"], "--gpus and --gpu_memory: positive numbers"),
        (["--gpus", "1", "--gpu_memory", "80", "--learnin_rate", "1"], "unknown flag --learnin_rate; did you mean"),
        (["--gpus", "1", "--gpu_memory", "80", "--config_name", "qwen3"], "--config_name: the model is named first"),
        (["--gpus", "1", "--gpu_memory", "80", "--deepspeed", "zero9"], "--deepspeed zero9: no such file"),
    ],
)
def test_bad_input_is_refused(words: list[str], text: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=text):
        plan.main([str(config(tmp_path, SMALL)), *words])
    with pytest.raises(ArgumentsError, match="no such config"):
        plan.arguments_of(tmp_path / "nowhere", [])


@pytest.mark.slow
def test_the_check_of_the_plan_runs_on_a_cpu(tmp_path: Path) -> None:
    file = tmp_path / "check.csv"
    words = ["--rows", "tiny,tiny:auto", "--steps", "4", "--csv", str(file), "--", "--memory_budget_gib", "0.02"]
    done = subprocess.run(
        [sys.executable, str(GPU / "plan_check.py"), *words], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = file.read_text().splitlines()
    assert len(lines) == 3
    assert ",tiny:auto," in lines[2]
    assert "planned_gib" in lines[0]
