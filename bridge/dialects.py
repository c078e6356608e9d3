"""The names under which Megatron-Core stores a tensor, by the kind of layers that a model was built from.

The canonical names are those of TransformerEngine's layers, with one entry an expert. Names here are a rank's own
(``parallel.shift``); both directions are pure functions. Source: megatron-core 0.16.1 ``models/gpt/gpt_layer_specs.py``,
``transformer/moe/experts.py``.
"""

import re
from collections.abc import Collection, Iterable, Mapping

import torch

from .errors import BridgeError

DIALECTS = ("mcore", "mcore-local")
_PLANNED = ("mindspeed", "pai")
_IN_LAYER = re.compile(r"^(decoder\.layers\.\d+|mtp\.layers\.\d+\.(?:transformer_layer|mtp_model_layer))\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$")
_GROUPED = re.compile(r"^mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
_LINEAR = re.compile(r"^(.*\.(?:linear_\w+|eh_proj|in_proj|out_proj)(?:\.base_layer)?)\.weight\d*$")
_ADAPTED = ".base_layer."  # PEFT's LoRA wraps a linear layer: what the layer holds is one level deeper
_IN_LINEAR = re.compile(r"(\.linear_\w+)\.((?:layer_norm_)?(?:weight|bias))$")
_GROUPS = re.compile(r"weight([12])(?:_lora_([ab]))?")
FUSED = {  # the norm is a part of the linear layer behind it -> it is a module of its own
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.in_proj.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
}


def check_dialect(dialect: str) -> None:
    """Raise BridgeError for a dialect that cannot be written."""
    if dialect in _PLANNED:
        raise BridgeError(f"--dialect {dialect}: not yet; {' and '.join(DIALECTS)} can be written")
    if dialect not in DIALECTS:
        raise BridgeError(f"--dialect {dialect}: not known; choose from {', '.join(DIALECTS)}")


def stored_name(name: str, dialect: str) -> str:
    """The name of a tensor in a model's state dict. ``mcore``: TransformerEngine layers with grouped experts."""
    check_dialect(dialect)
    found = _IN_LAYER.match(name)
    if not found:
        return name
    layer, inner = found.groups()
    if dialect == "mcore":
        expert = _EXPERT.match(inner)
        return f"{layer}.mlp.experts.{expert[2]}.{expert[3]}{expert[1]}" if expert else name
    for fused, alone in FUSED.items():
        if inner.startswith(fused):
            return f"{layer}.{alone}{inner.removeprefix(fused)}"
    return name


def adapted_name(stored: str) -> str:
    """The stored name of a tensor of a linear layer that PEFT's LoRA wraps. Raises BridgeError for other ones' names."""
    name, count = _IN_LINEAR.subn(rf"\1{_ADAPTED}\2", stored)
    if not count and "experts" in stored:
        raise BridgeError(f"{stored}: grouped experts have no LoRA by expert; give --dialect mcore-local")
    return name  # a norm that stands alone is not wrapped


def canonical_names(stored: Iterable[str]) -> dict[str, str]:
    """Of each name of one state dict the canonical one, whatever layers it is from: what a layer holds tells.

    Not for ``experts.weight1`` and ``weight2``: see ``ungrouped``.
    """
    layers: dict[str, set[str]] = {}
    names = {name: name.replace(_ADAPTED, ".") for name in stored}
    for name in names.values():
        if found := _IN_LAYER.match(name):
            layers.setdefault(found[1], set()).add(found[2])
    result: dict[str, str] = {}
    for own, name in names.items():
        found = _IN_LAYER.match(name)
        result[own] = f"{newest(found[1])}.{_inner(found[2], layers[found[1]])}" if found else name
    return result


def uses_local_spec(stored: Collection[str]) -> bool:
    """Whether a state dict with latent attention is from Megatron's own layers: their down projections are cut."""
    return any(name.endswith("self_attention.kv_layernorm.weight") for name in stored)


def ungrouped(tensors: Mapping[str, torch.Tensor], ep: int) -> dict[str, torch.Tensor]:
    """The state dict of a rank with ``weight1`` [h, E*2f] and ``weight2`` [E*f, h] of grouped experts parted; views.

    Each expert's weights are stored transposed, one after the other in memory; so is MindSpeed-LLM's LoRA on them
    (``weight1_lora_a``, ``tasks/posttrain/lora/moe/experts.py``). ``ep``: expert-parallel ranks, which
    tells E together with the router's rows. Raises BridgeError when there is no router beside them.
    """
    result: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        prefix, _, last = name.rpartition(".experts.")
        group = _GROUPS.fullmatch(last)
        if not group:
            result[name] = tensor
            continue
        kind = f"lora_{group[2].upper()}.default.weight" if group[2] else "weight"
        router = tensors.get(f"{prefix}.router.weight")
        experts = len(router) // ep if router is not None else 0
        if not experts or tensor.numel() % experts or tensor.dim() != 2:  # noqa: PLR2004 - a matrix
            raise BridgeError(f"{name} {tuple(tensor.shape)}: the number of its experts cannot be told from the router")
        rows, cols = tensor.shape
        each = tensor.reshape(experts, rows, -1) if group[1] == "1" else tensor.reshape(experts, -1, cols)
        for number in range(experts):
            result[f"{prefix}.experts.local_experts.{number}.linear_fc{group[1]}.{kind}"] = each[number].t()
    return result


def extra_states(stored: Iterable[str], *, last_stage: bool) -> list[str]:
    """The ``_extra_state`` entries that the linear layers of a state dict have; their value is None without fp8."""
    linear = dict.fromkeys(found[1] for name in stored if (found := _LINEAR.match(name)))
    return [f"{name}._extra_state" for name in (*linear, *(["output_layer"] if last_stage else []))]


def newest(layer: str) -> str:
    """Newer releases call the layer of multi-token prediction ``mtp_model_layer`` in the model, not on disk."""
    return layer.replace(".mtp_model_layer", ".transformer_layer")


def _inner(inner: str, layer: Collection[str]) -> str:
    """The canonical name of a layer's tensor, given the names of all tensors of that layer in this state dict."""
    if grouped := _GROUPED.match(inner):
        return f"mlp.experts.local_experts.{grouped[3]}.{grouped[1]}.{grouped[2]}"
    for fused, alone in FUSED.items():
        linear = fused.removesuffix("layer_norm_") + "weight"
        if inner.startswith(alone) and linear in layer:
            return fused + inner.removeprefix(alone)
    return inner
