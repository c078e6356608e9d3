"""Megatron checkpoints in and out of the real trainer: the same weights as from and to Hugging Face folders, bit for bit."""

from collections.abc import Callable
from pathlib import Path

import pytest
from finebridge.finetune.cli import main
from finebridge.finetune.export import export_last, parse_export
from rank_runner import RankRunner

pytestmark = pytest.mark.distributed


def run(*words: object) -> int:
    return main(list(map(str, words)))


def test_a_run_from_megatron_to_megatron_is_the_run_from_hugging_face(
    ranks: RankRunner,
    models: Callable[[str], Path],
    train_file: Path,
    tmp_path: Path,
    zero: Callable[..., Path],
) -> None:
    """Full training through the launcher; an adapter's run beside it, merged on its way out."""
    base, mcore = models("qwen3"), tmp_path / "mcore"
    words = ["--ckpt_format", "torch", "--tp", 2, "--pp", 2]
    assert run("convert", "--to", "mcore", "--load", base, "--save", mcore, *words) == 0
    flags = [
        "--train_data_file", train_file, "--max_steps", 3, "--per_device_train_batch_size", 2, "--deepspeed", zero(3),
        "--prepared_data_dir", tmp_path / "prepared", "--report_to", "none", "--disable_tqdm", "true", "--use_cpu", "true",
        "--learning_rate", 1e-2,
    ]  # fmt: skip
    plain, lora = tmp_path / "plain", tmp_path / "lora"
    ranks.run(
        ["--model_name_or_path", base, "--output_dir", plain, *flags, "+++",
         "--model_name_or_path", base, "--output_dir", lora, *flags, "--use_lora", "true", "--lora_rank", 4],
        tmp_path / "log", ranks=2, entry="sft_many:main",
    ).check()  # fmt: skip

    out = tmp_path / "out"
    ends = ["--export_mcore", "tp=2,pp=2,format=torch_dist,iteration=step", "--nproc_per_node", 2]
    assert run("sft", "--model_name_or_path", mcore, "--output_dir", out, *flags, *ends) == 0
    assert (out / "mcore-3" / "latest_checkpointed_iteration.txt").read_text() == "3"
    assert run("convert", "verify", out / "mcore-3", plain / "checkpoint-3") == 0
    assert run("convert", "verify", out / "mcore-3", base) == 1, "it learned nothing"

    made = export_last(parse_export("tp=2,format=torch"), base, lora)
    words = [
        "--base_model_path",
        base,
        "--adapter_model_path",
        lora / "checkpoint-3",
        "--output_path",
        tmp_path / "merged",
    ]
    assert run("merge", *words) == 0
    assert run("convert", "verify", made, tmp_path / "merged") == 0
    assert run("convert", "verify", made, base) == 1, "the adapter is missing"
