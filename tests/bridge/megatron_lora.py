"""LoRA on real Megatron-Core, for ``megatron_server.py``: as MindSpeed-LLM has it, by PEFT's own layers, and as Megatron-Bridge.

Megatron-Bridge itself cannot be imported without Transformer Engine. ``adapted`` follows ``ParallelLinearAdapter`` and
``LoRALinear`` of its ``megatron/bridge/peft``: which parallel layers the factors are, and under which keys they are stored.
"""

import functools
from argparse import Namespace
from pathlib import Path
from typing import Any


def by_peft(model: Any, path: Path, settings: dict[str, Any]) -> Any:
    """The model with a rank's file loaded strictly into PEFT's layers, and the factors' product added by PEFT."""
    import peft
    import torch
    from peft import LoraConfig, get_peft_model
    from peft.tuners.lora.tp_layer import LoraParallelLinear

    dispatch = peft.tuners.lora.model.dispatch_megatron  # it asks for an argument that PEFT 0.21 no longer gives
    peft.tuners.lora.model.dispatch_megatron = functools.partial(dispatch, fan_in_fan_out=False)
    parallel = {"megatron_config": model.config, "megatron_core": "megatron.core"}
    config = LoraConfig(**settings, **parallel, init_lora_weights=False)  # PEFT 0.21 cannot start these layers
    model = get_peft_model(model, config).get_base_model()
    with torch.serialization.safe_globals([Namespace]):
        model.load_state_dict(torch.load(path, weights_only=True)["model"])
    for module in [module for module in model.modules() if isinstance(module, LoraParallelLinear)]:
        module.merge()
    return model.eval()


def adapted(layer: Any, rank: int, scale: float) -> Any:
    """A parallel linear layer with factors beside it."""
    import torch
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.mlp import apply_swiglu_sharded_factory
    from megatron.core.transformer.module import MegatronModule

    class Adapted(MegatronModule):
        def __init__(self) -> None:
            super().__init__(config=layer.config)
            row, same = isinstance(layer, RowParallelLinear), torch.nn.init.zeros_
            common = {
                "config": layer.config,
                "init_method": same,
                "bias": False,
                "is_expert": layer.is_expert,
                "tp_group": layer.tp_group,
            }
            into = (
                RowParallelLinear(layer.input_size, rank, input_is_parallel=True, skip_bias_add=True, **common)
                if row
                else ColumnParallelLinear(layer.input_size, rank, gather_output=True, **common)
            )
            out = ColumnParallelLinear(rank, layer.output_size, gather_output=row, **common)
            self.to_wrap, self.adapter = layer, torch.nn.ModuleDict({"linear_in": into, "linear_out": out})

        def forward(self, states: Any, *_: Any, **__: Any) -> Any:
            result, bias = self.to_wrap(states)
            return result + self.adapter["linear_out"](self.adapter["linear_in"](states)[0])[0] * scale, bias

        def sharded_state_dict(self, prefix: str = "", sharded_offsets: Any = (), metadata: Any = None) -> Any:
            state = self.to_wrap.sharded_state_dict(prefix, sharded_offsets, metadata)
            for name, module in self.adapter.items():
                state |= module.sharded_state_dict(f"{prefix}adapter.{name}.", sharded_offsets, metadata)
            key = f"{prefix}adapter.linear_out.weight"
            if prefix.endswith("linear_fc1."):
                state[key] = apply_swiglu_sharded_factory(state[key], sharded_offsets)
            return state

    return Adapted()


def by_bridge(model: Any, base: str, lora: str, settings: dict[str, Any]) -> Any:
    """The model with weights from one ``torch_dist`` checkpoint and factors from another, with default strictness."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    rank, targets = settings["r"], settings["target_modules"]
    for parent in list(model.modules()):
        for name in set(targets) & set(dict(parent.named_children())):
            setattr(parent, name, adapted(getattr(parent, name), rank, settings["lora_alpha"] / rank))
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = {}
    for folder, factors in ((base, False), (lora, True)):
        metadata = dist_checkpointing.load_content_metadata(folder) or {}
        whole = model.sharded_state_dict(metadata={**metadata, "dp_cp_group": group})
        wanted = {
            key: value
            for key, value in whole.items()
            if (".adapter." in key) == factors and not (factors and key.endswith("_extra_state"))
        }
        state |= dist_checkpointing.load({"model": wanted}, folder)["model"]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(state[name.replace(".to_wrap.", ".")])
    return model.eval()
