"""The commands of the README as a user types them, with real processes."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
ENV = {**os.environ, "FINEBRIDGE_PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}

SEED_FLAGS = """--do_train --model_size 7B --deepspeed ds_zero3_offload_no_auto.json --overwrite_output_dir
--per_device_train_batch_size 1 --gradient_accumulation_steps 1 --gradient_checkpointing
--lr_scheduler_type cosine_with_min_lr --logging_steps 1 --save_steps 100 --learning_rate 1e-5
--min_lr 1e-6 --warmup_ratio 0.01 --save_strategy steps --save_safetensors True --model_max_length 4096
--max_seq_length 4096 --bf16""".split()


def bash(script: str, *words: object, cwd: Path | None = None, **env: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / script), *map(str, words)],
        capture_output=True, text=True, check=False, cwd=cwd or ROOT, env={**ENV, **env}, timeout=600,
    )  # fmt: skip


def test_the_seeds_flag_list_trains(models: Callable[[str], Path], train_file: Path, tmp_path: Path) -> None:
    base = models("hunyuan_v1_dense")
    done = bash(
        "finetune/finetune.sh", "--model_name_or_path", base, "--tokenizer_name_or_path", base, "--train_data_file",
        train_file, "--output_dir", tmp_path / "out", "--max_steps", 5, *SEED_FLAGS,
        NODE_IP_LIST="127.0.0.1:1", HOST_GPU_NUM="8",
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    config = json.loads((tmp_path / "out" / "checkpoint-5" / "config.json").read_text())
    assert config["dtype"] == "bfloat16"
    assert done.stdout.count("warning: --warmup_ratio is now --warmup_steps 0.01") == 1
    assert (tmp_path / "out" / "hf-5" / "config.json").is_file(), "the model alone, as finetune.sh is finebridge run"


def test_train_lora_then_merge(models: Callable[[str], Path], train_file: Path, tmp_path: Path) -> None:
    """LoRA on two ranks from a recipe, merged by the script from another folder; merged logits are the live adapter's."""
    base = models("hunyuan_v1_dense")
    recipe = tmp_path / "lora.yaml"
    recipe.write_text(
        f"model_name_or_path: {base}\ntrain_data_file: {train_file}\nuse_lora: true\nlora_rank: 4\nlora_alpha: 8\n"
        "deepspeed: ds_zero3_no_offload\nlearning_rate: 1e-2\nmax_steps: 3\nlogging_steps: 1\n"
    )
    done = bash("train/train.sh", "lora.yaml", "output_dir=out here", "--nproc_per_node", 2, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    adapter = tmp_path / "out here" / "checkpoint-3"
    done = bash(
        "merge/merge_lora_weight.sh", "--base_model_path", base, "--adapter_model_path", adapter, "--output_path",
        "merged", "--save_dtype", "fp32", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr

    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    ids = torch.arange(4, 36).reshape(2, 16)
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    live: Any = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    merged = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    with torch.inference_mode():
        logits = [model.eval()(input_ids=ids, use_cache=False).logits for model in (plain, live, merged)]
    assert (logits[1] - logits[2]).abs().max() < 1e-5
    assert (logits[0] - logits[1]).abs().max() > 1e-4


def test_build_token_files_then_pretrain(models: Callable[[str], Path], tmp_path: Path) -> None:
    base = models("hunyuan_v1_dense")
    (tmp_path / "corpus.txt").write_text("".join(f"one and {number}\n" for number in range(50)))
    words = ["--tokenizer-name-or-path", base, "--output-prefix", "export/corpus", "--append-eod"]
    done = bash("finetune/finetune.sh", "data", "build", "corpus.txt", *words, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    words = ["--model_name_or_path", base, "--train_data_file", "export/corpus_text_document", "--output_dir", "out"]
    done = bash("train/pretrain.sh", *words, "--max_steps", 1, "--max_seq_length", 64, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "data: 50 documents" in done.stdout
    assert (tmp_path / "out" / "checkpoint-1" / "manifest.json").is_file()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["--model_name_or_path", "./typo", "--train_data_file", "x.jsonl"],
            "--model_name_or_path ./typo: no such folder",
        ),
        (["--lerning_rate", "1"], "did you mean --learning_rate?"),
        (["recipe.yaml"], "recipe.yaml: No such file"),
        (["trian"], "unknown verb 'trian'"),
    ],
)
def test_bad_input_ends_with_2_and_one_message(words: list[str], message: str, tmp_path: Path) -> None:
    done = bash("finetune/finetune.sh", *words, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_bad_rows_stop_every_rank_with_2(models: Callable[[str], Path], tmp_path: Path) -> None:
    data = tmp_path / "bad.jsonl"
    data.write_text('{"messages": [{"role": "user", "content": "q"}]}\n')
    done = bash(
        "finetune/finetune.sh", "--model_name_or_path", models("hunyuan_v1_dense"), "--train_data_file", data,
        "--output_dir", tmp_path / "out", "--nproc_per_node", 2,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{data}:1: no_assistant_turn" in done.stderr
    assert done.stderr.count("no_assistant_turn") == 1


def test_preview_shows_the_trained_tokens(models: Callable[[str], Path], train_file: Path) -> None:
    done = bash(
        "finetune/finetune.sh",
        "data",
        "preview",
        train_file,
        "--model_name_or_path",
        models("hunyuan_v1_dense"),
        "--count",
        1,
    )
    assert done.returncode == 0, done.stderr
    assert (
        "/no_think0+0=<｜hy_Assistant｜>{{<think>\n\n</think>\n<answer>\n0\n</answer><｜hy_place▁holder▁no▁2｜>}}"
        in done.stdout
    )


def test_a_left_over_compile_lock_does_not_hang() -> None:
    """torch waits for ever on a lock file that a killed compile left; ours is removed under a lock of the kernel."""
    from finebridge.train.extensions import folder

    lock = folder() / "cpu_adam" / "lock"
    lock.parent.mkdir(parents=True, exist_ok=True)
    lock.touch()
    code = (
        "from finebridge.train.extensions import prepare; "
        "prepare({'zero_optimization': {'offload_optimizer': {'device': 'cpu'}}}, print); print('built')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=600, env=ENV
    )
    assert done.stdout.endswith("built\n"), done.stderr
    assert f"left {lock}, on which torch would wait for ever: removed" in done.stdout
    assert not lock.exists()
