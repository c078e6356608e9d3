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
from ..storage.manifest import safetensors_header

_PREFIX = "base_model.model."
# Settings that do not change what the factors add. Any other setting that is set stops the merge: a kind of adapter
# that is merged as plain LoRA without being one gives wrong weights.
_HARMLESS = {
    "alora_invocation_tokens": None, "auto_mapping": ..., "base_model_name_or_path": ..., "bias": "none", "exclude_modules": ...,
    "inference_mode": ..., "layers_pattern": ..., "layers_to_transform": ..., "lora_alpha": ..., "lora_dropout": ...,
    "megatron_config": ..., "megatron_core": ..., "peft_type": ..., "peft_version": ..., "qalora_group_size": ..., "r": ...,
    "revision": ..., "runtime_config": ..., "target_modules": ..., "task_type": ..., "use_rslora": ...,
}  # fmt: skip
# Starting values of A and B that leave the base as it is (others, such as pissa and olora, change the base's weights).
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")


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


@dataclass(frozen=True, slots=True)
class Adapter:
    """Factors by base weight name (``model.layers.0.self_attn.q_proj.weight``), and copies of base weights.

    PEFT stores an embedding's or head's own, frozen weight beside its factors; it must equal the base's.
    """

    weights: dict[str, LoraWeight]
    copies: dict[str, torch.Tensor]


def load_adapter(folder: Path) -> Adapter:
    """The adapter that PEFT or finebridge saved in ``folder``.

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
    _check_settings(config, config_path)
    safetensors_header(weights_path)  # a cut file is told by name
    with safe_open(weights_path, framework="pt") as handle:
        tensors = {key: handle.get_tensor(key) for key in handle.keys()}  # noqa: SIM118 - not a dict
    weights: dict[str, LoraWeight] = {}
    copies = {
        key.removeprefix(_PREFIX).replace(".base_layer.", "."): tensors.pop(key)
        for key in list(tensors)
        if ".base_layer." in key
    }
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
    return Adapter(weights, copies)


def _check_settings(config: dict[str, Any], path: Path) -> None:
    if (initial := config.get("init_lora_weights", True)) not in _INITIAL:
        raise AdapterError(
            f"{path}: init_lora_weights is {initial!r}, which changes the base; such adapters are not merged yet"
        )
    for key, value in config.items():
        plain = _HARMLESS.get(key)
        if plain is ... or key == "init_lora_weights" or value in (plain, None, False, [], {}):
            continue
        raise AdapterError(f"{path}: {key} is {value!r}; merging such adapters is not supported yet")
    alpha = config.get("lora_alpha")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float):
        raise AdapterError(f"{path}: lora_alpha is {alpha!r}; a number is expected")


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
