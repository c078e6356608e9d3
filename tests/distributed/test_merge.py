"""Adapters of the real trainer, merged by the real command, beside base and live adapter: dense and MoE, ZeRO-2 and ZeRO-3."""

import re
from collections.abc import Callable
from pathlib import Path

import pytest
from finebridge.merge.merge_lora import main
from rank_runner import RankRunner

pytestmark = pytest.mark.distributed
FAMILIES = ("qwen3", "hunyuan_v1_dense", "qwen3_moe", "hunyuan_v1_moe")


def test_what_two_ranks_trained_merges_exactly(
    ranks: RankRunner,
    models: Callable[[str], Path],
    listed_moe: Path,
    train_file: Path,
    tmp_path: Path,
    zero: Callable[..., Path],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """``listed_moe`` has its own code and a tensor an expert, also in memory."""
    bases = {name: models(name) for name in FAMILIES} | {"listed_moe": listed_moe}
    words: list[object] = []
    for name, base in bases.items():
        for stage in (2, 3):
            words += [
                "+++", "--model_name_or_path", base, "--train_data_file", train_file, "--output_dir", tmp_path / f"{name}{stage}",
                "--max_steps", 2, "--learning_rate", 5e-2, "--per_device_train_batch_size", 2, "--disable_tqdm", "true",
                "--prepared_data_dir", tmp_path / "prepared", "--use_lora", "true", "--lora_rank", 4,
                "--lora_target", "all-linear", "--deepspeed", zero(stage), "--report_to", "none",
                *(["--lora_experts", "true"] if "moe" in name else []),
                *(["--trust_remote_code", "true"] if base is listed_moe else []),
            ]  # fmt: skip
    ranks.run(words[1:], tmp_path / "log", ranks=2, entry="sft_many:main").check()
    for name, base in bases.items():
        for stage in (2, 3):
            out = tmp_path / f"merged_{name}{stage}"
            argv = [
                "--base_model_path", base, "--adapter_model_path", tmp_path / f"{name}{stage}/checkpoint-2", "--output_path", out,
                "--verify", "--allow_unchanged", *(["--trust_remote_code"] if base is listed_moe else []),
            ]  # fmt: skip
            assert main(list(map(str, argv))) == 0
            said = capsys.readouterr().out
            told = re.search(r"differ by at most (\S+) from base \+ live adapter, which moves them by (\S+);", said)
            assert told, said
            assert float(told[1]) < 1e-5
            assert float(told[2]) > 1e-3, "the adapter matters"
