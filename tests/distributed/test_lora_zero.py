"""LoRA under ZeRO on two ranks: our own products train as PEFT's do, and what is frozen has no gradient and no optimizer."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rank_runner import RankRunner

pytestmark = pytest.mark.distributed
Models = Callable[[str], Path]
COUNTS = "counted "


def count_at_steps() -> None:
    """Before each step of the optimizer, tell how many numbers it has: of parameters, of gradients, and in its state."""
    from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
    from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
    from finebridge.train.trainer import FinetuneTrainer

    _count_before(DeepSpeedZeroOptimizer, "single_partition_of_fp32_groups")
    _count_before(DeepSpeedZeroOptimizer_Stage3, "fp32_partitioned_groups_flat")
    stock = FinetuneTrainer.training_step

    def training_step(self: Any, model: Any, *args: Any, **kwargs: Any) -> Any:
        result = stock(self, model, *args, **kwargs)
        assert all(parameter.grad is None for parameter in model.parameters() if not parameter.requires_grad)
        return result

    FinetuneTrainer.training_step = training_step


def _count_before(kind: Any, masters: str) -> None:
    stock = kind.step

    def step(self: Any, *args: Any, **kwargs: Any) -> Any:
        told = {
            "masters": sum(part.numel() for part in getattr(self, masters)),
            "gradients": sum(part.numel() for parts in self.averaged_gradients.values() for part in parts),
            "state": sum(v.numel() for s in self.optimizer.state.values() for v in s.values() if getattr(v, "ndim", 0)),
        }
        print(COUNTS + json.dumps(told), flush=True)
        return stock(self, *args, **kwargs)

    kind.step = step


def test_ours_is_pefts_and_only_adapters_have_an_optimizer(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path, zero: Callable[..., Path],
    history: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    """ZeRO-2 with our products, plain and recomputed, beside ZeRO-3, which is PEFT's own."""
    runs = {"two": [zero(2)], "recomputed": [zero(2), "--gradient_checkpointing", "true"], "three": [zero(3)]}
    words: list[object] = []
    for name, more in runs.items():
        words += [
            "+++", "--model_name_or_path", models("hunyuan_v1_dense"), "--train_data_file", train_file,
            "--output_dir", tmp_path / name, "--max_steps", 2, "--logging_steps", 1, "--learning_rate", 1e-2,
            "--per_device_train_batch_size", 2, "--gradient_accumulation_steps", 2, "--disable_tqdm", "true",
            "--save_strategy", "no", "--prepared_data_dir", tmp_path / "prepared", "--use_lora", "true", "--lora_rank", 4,
            "--lora_target", "all-linear", "--deepspeed", *more,
        ]  # fmt: skip
    done = ranks.run(words[1:], tmp_path / "log", ranks=2, entry="sft_many:main", before=count_at_steps).check()
    own = "LoRA: thin products of 14 linears added in place, those of q_proj+k_proj+v_proj, gate_proj+up_proj at once"
    assert done.text.count(own) == 2
    assert done.text.count("LoRA: 14 linears by PEFT's own forward, as ZeRO-3 gathers their parameters one by one") == 1
    losses = {name: [(entry["loss"], entry["grad_norm"]) for entry in history(tmp_path / name)] for name in runs}
    for name in ("two", "recomputed"):
        assert len(losses[name]) == 2
        for one, other in zip(losses[name], losses["three"], strict=True):
            assert one == pytest.approx(other, rel=1e-5)
    assert losses["two"][-1][0] < losses["two"][0][0]
    trained = int(done.text.split(" parameters, ")[1].split(" train")[0].replace(",", ""))
    for text in done.texts:
        counts = [json.loads(line.removeprefix(COUNTS)) for line in text.splitlines() if line.startswith(COUNTS)]
        assert len(counts) == 6
        for told in counts:
            assert trained / 2 <= told["masters"] < trained / 2 + 64
            assert trained / 2 <= told["gradients"] < trained / 2 + 64
            assert told["state"] in (0, 2 * told["masters"])
        assert counts[-1]["state"]
