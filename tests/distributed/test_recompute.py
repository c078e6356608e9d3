"""Gradient checkpointing changes no loss: stages x full, LoRA, LoRA on experts x fused and listed experts x both modes."""

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from finebridge.train.recompute import recompute_kwargs
from rank_runner import RankRunner

pytestmark = pytest.mark.distributed
Models = Callable[[str], Path]
MODES = {
    "off": [],
    "chosen": ["--gradient_checkpointing", "true"],
    "reentrant": ["--gradient_checkpointing", "true", "--gradient_checkpointing_kwargs", '{"use_reentrant": true}'],
}
KINDS = {
    "full": [],
    "lora": ["--use_lora", "true", "--lora_rank", "4"],
    "experts": ["--use_lora", "true", "--lora_rank", "4", "--lora_experts", "true"],
}


def matrix(
    ranks: RankRunner, folder: Path, data: Path, bases: Sequence[Path], settings: Sequence[Path | None],
    kinds: Sequence[str], modes: Sequence[str],
) -> dict[tuple[Any, ...], list[float]]:  # fmt: skip
    """Losses of two steps of every combination, all in one start of two ranks."""
    words: list[object] = []
    cases = list(itertools.product(bases, settings, kinds, modes))
    for number, (base, zero, kind, mode) in enumerate(cases):
        words += [
            "+++", "--model_name_or_path", base, "--train_data_file", data, "--output_dir", folder / str(number),
            "--max_steps", 2, "--logging_steps", 1, "--learning_rate", 1e-2, "--per_device_train_batch_size", 2,
            "--disable_tqdm", "true", "--save_strategy", "no", "--prepared_data_dir", folder / "prepared",
            "--trust_remote_code", "true", *KINDS[kind], *MODES[mode], *(("--deepspeed", zero) if zero else ()),
        ]  # fmt: skip
    done = ranks.run(words[1:], folder / "log", ranks=2, entry="sft_many:main", limit=900).check()
    told = done.text.count("gradient checkpointing: use_reentrant false (chosen for you")
    assert told == sum(mode == "chosen" for *_, mode in cases)
    losses: dict[tuple[Any, ...], list[float]] = {}
    for number, case in enumerate(cases):
        state = json.loads((folder / str(number) / "trainer_state.json").read_text())
        losses[case] = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
        assert len(losses[case]) == 2
        assert losses[case][1] < losses[case][0]
    return losses


def differing(losses: dict[tuple[Any, ...], list[float]]) -> list[tuple[Any, ...]]:
    """The combinations whose losses are not those of the run without gradient checkpointing."""
    return [case for case, values in losses.items() if values != pytest.approx(losses[(*case[:-1], "off")], abs=1e-6)]


def test_checkpointing_with_lora_under_zero3_changes_no_loss(
    ranks: RankRunner, models: Models, listed_moe: Path, train_file: Path, tmp_path: Path, zero: Callable[..., Path]
) -> None:
    bases = [models("hunyuan_v1_moe"), listed_moe]
    assert not differing(matrix(ranks, tmp_path, train_file, bases, [zero(3)], ["lora"], ["off", "chosen"]))


@pytest.mark.slow
def test_checkpointing_changes_no_loss(
    ranks: RankRunner, models: Models, listed_moe: Path, train_file: Path, tmp_path: Path, zero: Callable[..., Path]
) -> None:
    bases = [models("hunyuan_v1_dense"), models("hunyuan_v1_moe"), listed_moe]
    assert not differing(
        matrix(ranks, tmp_path / "a", train_file, bases[1:], [zero(2), zero(3)], list(KINDS), list(MODES))
    )
    assert not differing(
        matrix(ranks, tmp_path / "b", train_file, bases[:2], [None], ["full", "lora"], ["off", "chosen"])
    )


def test_a_mode_that_was_given_stays() -> None:
    said: list[str] = []
    assert recompute_kwargs({}, said.append) is None
    given = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}}
    assert recompute_kwargs(given, said.append) == {"use_reentrant": True}
    assert not said
    given = {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"preserve_rng_state": True}}
    assert recompute_kwargs(given, said.append) == {"preserve_rng_state": True, "use_reentrant": False}
    assert len(said) == 1
