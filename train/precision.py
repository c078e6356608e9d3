"""Weights that a model asks for in fp32 (routers, mostly) stay in fp32 under DeepSpeed's bf16 and fp16.

A model asks by creating a parameter in fp32 (Hunyuan's ``wg``) or by name (``_keep_in_fp32_modules_strict``). DeepSpeed casts
every parameter, under ZeRO-3 when it is created and else when the engine starts; the names that it keeps are buffers'.
"""

from copy import deepcopy
from typing import Any

import torch
from torch import nn
from transformers import initialization
from transformers.core_model_loading import build_glob_alternation

_MARK = "finebridge_fp32"


def asked_in_fp32(model: Any, dtype: torch.dtype) -> set[str]:
    """Names of the parameters that ``model``, loaded in ``dtype``, wants in fp32. Builds the same model without storage."""
    if dtype == torch.float32:
        return set()
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with initialization.no_init_weights(), initialization.meta_device_safe_creation_ops(), torch.device("meta"):
            twin: Any = type(model)(deepcopy(model.config))
    finally:
        torch.set_default_dtype(before)
    created = {name for name, parameter in twin.named_parameters() if parameter.dtype == torch.float32}
    plan: dict[str, torch.dtype] = twin._get_dtype_plan(dtype)  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]
    if not plan:
        return created
    pattern, _, _ = build_glob_alternation(list(plan))
    return created | {name for name, _ in twin.named_parameters() if pattern.search(name)}


def keep_in_fp32(model: nn.Module, names: set[str]) -> None:
    """Mark these parameters, and have DeepSpeed leave marked ones as they are. Call before the engine is made."""
    for name, parameter in model.named_parameters():
        if name in names:
            setattr(parameter, _MARK, True)
    if names:
        _spare_in_casts()
        _spare_in_flat_buffers()


def split_groups(optimizer: torch.optim.Optimizer) -> None:
    """Give marked parameters groups of their own: DeepSpeed makes one flat buffer, of one dtype, of each group."""
    for group in list(optimizer.param_groups):
        marked = [parameter for parameter in group["params"] if hasattr(parameter, _MARK)]
        if marked and len(marked) < len(group["params"]):
            group["params"] = [parameter for parameter in group["params"] if not hasattr(parameter, _MARK)]
            optimizer.add_param_group({**group, "params": marked})


def _spare_in_casts() -> None:
    from deepspeed.runtime.engine import DeepSpeedEngine

    engine: Any = DeepSpeedEngine
    stock = engine._cast_module_mixed_precision  # noqa: SLF001
    if getattr(stock, _MARK, False):
        return

    def cast(self: Any, *args: Any, **kwargs: Any) -> None:
        kept = [(parameter, parameter.data) for parameter in self.module.parameters() if hasattr(parameter, _MARK)]
        stock(self, *args, **kwargs)
        for parameter, data in kept:
            parameter.data = data

    setattr(cast, _MARK, True)
    engine._cast_module_mixed_precision = cast  # noqa: SLF001


def _spare_in_flat_buffers() -> None:
    """ZeRO-3 moves all trained parts into one flat buffer and hands out slices of it; here one buffer for each dtype."""
    from deepspeed.runtime.zero import stage3

    module: Any = stage3
    stock = module.defragment
    if getattr(stock, _MARK, False):
        return

    def defragment(tensors: list[torch.Tensor]) -> torch.Tensor:
        kinds = list(dict.fromkeys(tensor.dtype for tensor in tensors))
        buffers = [stock([tensor for tensor in tensors if tensor.dtype == kind]) for kind in kinds]
        return buffers[0]

    def set_groups_flat(self: Any) -> None:
        for group in self.fp16_groups:
            first = group[0].ds_tensor  # the parts of a group follow each other in its buffer
            numel = sum(parameter.partition_numel() for parameter in group)
            self.fp16_partitioned_groups_flat.append(first.as_strided((numel,), (1,), first.storage_offset()))

    def create_cpu_buffers(self: Any) -> None:
        stock_cpu_buffers(self)
        buffers = self.param_groups_fp16_flat_cpu_memory
        for number, group in enumerate(self.trainable_param_groups):
            if hasattr(group["params"][0], _MARK):
                buffers[number] = buffers[number].float()

    setattr(defragment, _MARK, True)
    module.defragment = defragment
    stock_cpu_buffers = module.DeepSpeedZeroOptimizer_Stage3._create_param_groups_fp16_flat_cpu_memory  # noqa: SLF001
    module.DeepSpeedZeroOptimizer_Stage3._create_param_groups_fp16_flat_cpu_memory = create_cpu_buffers  # noqa: SLF001
    module.DeepSpeedZeroOptimizer_Stage3._set_fp16_partitioned_groups_flat = set_groups_flat  # noqa: SLF001
