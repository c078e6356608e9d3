"""Run on each rank: load models under ZeRO-3 by transformers' reader and by ours, and compare what each rank holds."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from finebridge.ds_configs.resolve import resolve
from finebridge.train import runtime
from finebridge.train.loading import ModelError, streamed_loading
from transformers import AutoModelForCausalLM
from transformers.integrations import HfDeepSpeedConfig


def held(model: Any) -> dict[str, torch.Tensor]:
    """The part of every parameter that this rank keeps, without padding, and every buffer."""
    parts: dict[str, torch.Tensor] = dict(model.named_buffers())
    for name, parameter in model.named_parameters(remove_duplicate=False):
        size = parameter.ds_tensor.ds_numel
        left = parameter.ds_numel - size * parameter.ds_zero_partition_rank
        parts[name] = parameter.ds_tensor[: max(0, min(size, left))]
    return parts


def main(argv: Sequence[str]) -> int:
    """``argv``: dtype, then folders that must load alike; a folder named ``broken`` must be refused on every rank."""
    dtype = getattr(torch, argv[0])
    settings = resolve("ds_zero3_no_offload")
    settings["zero_optimization"] |= {
        "stage3_param_persistence_threshold": 0, "reduce_bucket_size": 1000, "stage3_prefetch_bucket_size": 1000,
    }  # fmt: skip
    settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "train_batch_size": 2}
    settings |= {"bf16": {"enabled": dtype == torch.bfloat16}, "fp16": {"enabled": False}, "gradient_clipping": 1.0}
    runtime.start(settings)
    keep = HfDeepSpeedConfig(settings)
    for folder in map(Path, argv[1:]):
        if folder.name == "broken":
            try:
                with streamed_loading():
                    AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
            except ModelError as error:
                print(f"refused: {error}")
            continue
        stock = held(AutoModelForCausalLM.from_pretrained(folder, dtype=dtype))
        with streamed_loading():
            model = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
        ours = held(model)
        assert list(stock) == list(ours)
        for name, value in stock.items():
            kept = ours[name].dtype == torch.float32 != value.dtype  # a router that the model wants in fp32
            assert kept == (dtype != torch.float32 and name.endswith("gate.wg.weight")), name
            assert value.equal(ours[name].to(value.dtype)), name
        assert all(parameter.numel() == 0 for parameter in model.parameters())
        print(f"alike: {folder.name}, {sum(part.numel() for part in ours.values())} values here")
    del keep
    runtime.finish()
    return 0
