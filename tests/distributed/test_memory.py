"""What ``finebridge plan`` says that a rank holds is what ranks of DeepSpeed's own ZeRO hold, byte by byte; ours hold less."""

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.ds_configs.resolve import resolve
from finebridge.finetune.plan import arguments_of, planned_model
from finebridge.train.masters import without_masters
from finebridge.train.zero_memory import held, read_zero, weights_of
from rank_runner import RankRunner

pytestmark = pytest.mark.distributed
LORA = ["--use_lora", "true", "--lora_rank", "3"]


def size(tensors: Iterable[Any]) -> int:
    """Bytes of all storages of these tensors."""
    found = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


def write_what_is_held() -> None:
    """After the first of a later step's micro-batches every rank writes what it holds; DeepSpeed's own names."""
    from finebridge.train import lean_zero
    from finebridge.train.trainer import FinetuneTrainer

    lean_zero.install = lambda: None
    inner = FinetuneTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        made = inner(self, *args, **kwargs)
        zero = self.deepspeed.optimizer
        parameters = list(self.deepspeed.module.parameters())
        states = [value for state in zero.optimizer.state.values() for value in state.values()]
        if hasattr(zero, "fp16_groups"):
            told = {
                "weights": size([*parameters, *(parameter.ds_tensor for parameter in parameters)]),
                "gradients": size([zero.grad_partitions_flat_buffer]),
                "master": size(zero.fp32_partitioned_groups_flat),
                "buffers": size(bucket.buffer for bucket in zero.ipg_buckets.values()),
            }
        else:
            told = {
                "weights": size(parameters),
                "gradients": size(g for grads in zero.all_grad_tensors.values() for g in grads or ()),
                "master": size(zero.single_partition_of_fp32_groups),
                "buffers": 0,
            }
        told["moments"] = size(value for value in states if isinstance(value, torch.Tensor))
        file = Path(self.args.output_dir) / f"held-{os.environ['RANK']}.json"
        if self.state.global_step == 1 and not file.exists():
            file.write_text(json.dumps(told))
        return made

    FinetuneTrainer.training_step = training_step


@pytest.mark.slow
def test_the_plan_is_what_two_ranks_hold(
    ranks: RankRunner, models: Any, train_file: Path, tmp_path: Path, zero: Any
) -> None:
    pure = tmp_path / "pure_bf16.json"
    pure.write_text(json.dumps(without_masters(resolve("ds_zero2_no_offload"))))
    large = json.loads(zero(3).read_text())
    large["zero_optimization"]["stage3_param_persistence_threshold"] = 700  # some are kept whole, some are not
    (tmp_path / "large.json").write_text(json.dumps(large))
    cases = [
        ("hunyuan_v1_dense", zero(2), []),
        ("hunyuan_v1_dense", pure, []),
        ("hunyuan_v1_moe", tmp_path / "large.json", []),
        ("qwen3_moe", zero(2), LORA),
    ]
    words: list[object] = []
    given = ["--bf16", "true", "--gradient_accumulation_steps", "2", "--per_device_train_batch_size", "1"]
    for number, (model, settings, more) in enumerate(cases):
        words += [
            "+++", "--model_name_or_path", models(model), "--train_data_file", train_file, "--output_dir", tmp_path / str(number),
            "--max_steps", 2, "--disable_tqdm", "true", "--save_strategy", "no", "--prepared_data_dir", tmp_path / "prepared",
            "--deepspeed", settings, *given, *more,
        ]  # fmt: skip
    ranks.run(words[1:], tmp_path / "log", ranks=2, entry="sft_many:main", limit=600, before=write_what_is_held).check()
    for number, (model, settings, more) in enumerate(cases):
        args = arguments_of(models(model), ["--deepspeed", str(settings), *given, *more])
        made = planned_model(args, torch.bfloat16, deepspeed=True)
        read = read_zero(resolve(str(settings), has_accelerator=False), made.config.hidden_size)
        expected = held(weights_of(made), read, 2, accumulates=True)
        both = [json.loads((tmp_path / str(number) / f"held-{rank}.json").read_text()) for rank in range(2)]
        told = {name: max(one[name] for one in both) for name in both[0]}
        assert told == {name: getattr(expected, name) for name in told}, (model, settings.name, more)
