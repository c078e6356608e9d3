"""What a LoRA adapter adds to a weight: ``scale * B @ A``, computed in fp32.

Reads PEFT's adapter folder (``adapter_config.json`` and ``adapter_model.safetensors``). LoRA:
https://arxiv.org/abs/2106.09685; rsLoRA (scale alpha / sqrt(r)): https://arxiv.org/abs/2312.03732.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from ..storage.assets import read_json

_PREFIX = "base_model.model."
# Adapter kinds that add something other than scale * B @ A: merging them as plain LoRA would be wrong.
_UNSUPPORTED: dict[str, Any] = {
    "use_dora": False, "modules_to_save": None, "target_parameters": None, "rank_pattern": None, "alpha_pattern": None,
    "fan_in_fan_out": False, "bias": "none", "lora_bias": False, "trainable_token_indices": None, "layer_replication": None,
    "eva_config": None, "corda_config": None, "use_qalora": False,
}  # fmt: skip


class AdapterError(ValueError):
    """The adapter cannot be merged, or not into this base; the message names the setting or tensor."""


@dataclass(frozen=True, slots=True)
class LoraWeight:
    """The factors of one module: A has shape [rank, in], B has shape [out, rank]."""

    a: torch.Tensor
    b: torch.Tensor
    scale: float

    def delta(self) -> torch.Tensor:
        """The update of the weight, fp32, shape [out, in]."""
        return (self.b.float() @ self.a.float()) * self.scale


def load_adapter(folder: Path) -> dict[str, LoraWeight]:
    """The factors by base weight name (``model.layers.0.self_attn.q_proj.weight``).

    Raises AdapterError when a file is missing, a setting is not plain LoRA or rsLoRA, a tensor is left over, shapes do
    not fit or a value is not finite.
    """
    config_path, weights_path = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    for path in (config_path, weights_path):
        if not path.is_file():
            raise AdapterError(f"{path}: missing; --adapter_model_path takes the folder that PEFT or finebridge saved")
    config = read_json(config_path)
    if config.get("peft_type") != "LORA":
        raise AdapterError(f"{config_path}: peft_type is {config.get('peft_type')!r}; only LORA adapters are merged")
    for key, plain in _UNSUPPORTED.items():
        if (value := config.get(key, plain)) != plain and value not in ({}, []):
            raise AdapterError(f"{config_path}: {key} is {value!r}; merging such adapters is not supported yet")
    with safe_open(weights_path, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
    weights: dict[str, LoraWeight] = {}
    for key in sorted(tensors):
        module, found, _ = key.removeprefix(_PREFIX).partition(".lora_A.weight")
        if not found:
            continue
        a, b = tensors.pop(key), tensors.pop(key.replace(".lora_A.", ".lora_B."), None)
        weights[f"{module}.weight"] = _pair(module, a, b, config)
    if tensors:
        raise AdapterError(f"{weights_path}: {len(tensors)} tensors are not LoRA factors, the first is {min(tensors)}")
    if not weights:
        raise AdapterError(f"{weights_path}: holds no LoRA factors")
    return weights


def _pair(module: str, a: torch.Tensor, b: torch.Tensor | None, config: dict[str, Any]) -> LoraWeight:
    if b is None:
        raise AdapterError(f"{module}: lora_A without lora_B")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1] or a.numel() == 0 or b.numel() == 0:  # noqa: PLR2004
        raise AdapterError(f"{module}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit together")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise AdapterError(f"{module}: the adapter holds values that are not finite")
    rank = a.shape[0]
    alpha = float(config["lora_alpha"])
    return LoraWeight(a, b, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank))
