"""How MindSpeed-LLM's checkpoints differ from those of Megatron-Core's own layers: names, and tensors kept in one.

- Latent attention has one ``linear_qkv`` in place of the down projections, the query's rows before those of key and value;
  every tensor-parallel rank holds it whole. ``--mla-mm-split`` makes two tensors of each up projection, head by head.
- Experts lie in ``weight1`` and ``weight2``, each transposed. With ``--moe-tp-extend-ep`` the tensor-parallel ranks of an
  expert rank have other experts and not parts of the same.
- Beside layers that predict further tokens, the last norm is ``final_layernorm`` and theirs are in ``mtp.final_layernorms``.

Source: Ascend/MindSpeed-LLM c77308a1 (2026-08-21), ``mindspeed_llm/tasks/checkpoint/{model_builder,convert_hf2mg}.py``.
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from .errors import BridgeError
from .parallel import Cuts, Layout, Slot

CUTS: Cuts = {"linear_q_proj.weight": None}
_A = "self_attention."
_JOINED = f"{_A}linear_qkv.weight"
_JOINED_KINDS = ("weight", "layer_norm_weight")  # else it is LoRA on it, for which the model has no layer
_ORDER = {f"{_A}linear_q_proj.weight": 0, f"{_A}linear_q_down_proj.weight": 0, f"{_A}linear_kv_down_proj.weight": 1}
_EXPERT = re.compile(r"mlp\.experts\.local_experts\.(\d+)\.linear_fc([12])\.weight")
_INDEXER = re.compile(rf"{re.escape(_A)}core_attention\.indexer\.(?:linear_)?(\w+)\.(weight|bias)")
_DSA = re.compile(r"(.*\.self_attention)\.dsa_indexer\.(wq_b|wk|weights_proj|k_norm)\.(weight|bias)")
_MTP_NORM = re.compile(r"mtp\.layers\.(\d+)\.final_layernorm\.weight")
_MTP_NORMS = re.compile(r"mtp\.final_layernorms\.(\d+)\.weight")
_PAIRS = {  # of --mla-mm-split: the first of a head's rows, the others, all of them
    "linear_qk_nope": ("linear_qk_rope", "linear_q_up_proj"),
    "linear_kv_nope": ("linear_v", "linear_kv_up_proj"),
}


class Woven(NamedTuple):
    """Two tensors whose rows alternate head by head, put together when they are asked for."""

    parts: tuple[torch.Tensor, torch.Tensor]
    heads: int

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole."""
        return (sum(len(part) for part in self.parts), *self.parts[0].shape[1:])

    @property
    def dtype(self) -> torch.dtype:
        """Of both."""
        return self.parts[0].dtype

    def whole(self) -> torch.Tensor:
        """The tensor, in memory."""
        by_head = [part.reshape(self.heads, -1, *part.shape[1:]) for part in self.parts]
        return torch.cat(by_head, 1).reshape(self.shape)


def slot(layer: str, inner: str) -> Slot | None:
    """Where MindSpeed keeps a tensor of a layer, when not as Megatron-Core's own layers do."""
    if inner in _ORDER:
        return Slot(f"{layer}.{_JOINED}", _ORDER[inner])
    if expert := _EXPERT.fullmatch(inner):
        number, which = expert.groups()
        return Slot(f"{layer}.mlp.experts.weight{which}", int(number), turned=True, axis=1 if which == "1" else 0)
    if indexer := _INDEXER.fullmatch(inner):
        return Slot(f"{layer}.{_A}dsa_indexer.{indexer[1]}.{indexer[2]}")
    return None


def outside(name: str, *, mtp: bool) -> str:
    """The name of a tensor outside of layers; ``mtp``: the model has layers that predict further tokens."""
    if found := _MTP_NORM.fullmatch(name):
        return f"mtp.final_layernorms.{found[1]}.weight"
    return "final_layernorm.weight" if mtp and name == "decoder.final_layernorm.weight" else name


def options(name: str) -> set[str]:
    """Further names that a tensor of latent attention may have: in two parts, or as TransformerEngine's layers have it."""
    at, found, last = name.rpartition(f".{_A}")
    parts = [(one, other) for one, (other, whole) in _PAIRS.items() if found and last == f"{whole}.weight"]
    split = {f"{at}{found}{part}.weight" for pair in parts for part in pair}
    if name.endswith(".input_layernorm.weight"):
        split.add(f"{name.removesuffix('input_layernorm.weight')}{_A}linear_qkv.layer_norm_weight")
    return split


def canonical(name: str) -> str:
    """The canonical name of one that only MindSpeed has; others stay."""
    if found := _MTP_NORMS.fullmatch(name):
        return f"mtp.layers.{found[1]}.final_layernorm.weight"
    if found := _DSA.fullmatch(name):
        linear = "" if found[2] == "k_norm" else "linear_"
        return f"{found[1]}.core_attention.indexer.{linear}{found[2]}.{found[3]}"
    return "decoder.final_layernorm.weight" if name == "final_layernorm.weight" else name


def own_args(layout: Layout) -> dict[str, Any]:
    """What MindSpeed notes of a layout beside Megatron's arguments. Raises BridgeError for one that it does not have."""
    if layout.expert_tp not in (1, layout.tp):
        raise BridgeError(f"--etp {layout.expert_tp}: MindSpeed-LLM has 1 or --tp {layout.tp}")
    if layout.layer_list and layout.chunks > 1:
        raise BridgeError("--num_layer_list and --vpp: MindSpeed-LLM has one or the other")
    layers = ",".join(map(str, layout.layer_list)) if layout.layer_list else None
    return {"moe_tp_extend_ep": False, "mla_mm_split": False, "num_layer_list": layers}


def check_args(args: Mapping[str, Any], folder: object) -> None:
    """Raise BridgeError when the arguments say that layers lie elsewhere than their numbers tell."""
    for key in ("schedules_method", "noop_layers"):
        if value := args.get(key):
            raise BridgeError(f"{folder}: its arguments have {key} {value}, whose order of layers is not read")


def parted(state: Mapping[str, torch.Tensor], args: Mapping[str, Any], tp: int) -> dict[str, torch.Tensor | Woven]:
    """A rank's state dict with the projections of latent attention one by one, by their canonical names; views.

    Raises BridgeError when the arguments do not tell where one ends.
    """
    result: dict[str, torch.Tensor | Woven] = dict(state)
    for name, tensor in state.items():
        at, found, last = name.rpartition(f".{_A}")
        module, _, kind = last.partition(".")
        here = f"{at}{found}"
        if module == "linear_qkv" and kind in _JOINED_KINDS and f"{here}kv_layernorm.weight" in state:
            del result[name]
            result |= _down(here, name, state, args) if kind == "weight" else {f"{at}.input_layernorm.weight": tensor}
        elif module in _PAIRS and kind == "weight" and (other := f"{here}{_PAIRS[module][0]}.weight") in state:
            del result[name], result[other]
            result[f"{here}{_PAIRS[module][1]}.weight"] = _woven(tensor, state[other], args, tp)
    return result


def is_joined(shapes: Mapping[str, Sequence[int]]) -> bool:
    """Whether a state dict has latent attention with the down projections in one tensor."""
    return any(
        name.removesuffix(_JOINED) + f"{_A}kv_layernorm.weight" in shapes for name in shapes if name.endswith(_JOINED)
    )


def _down(at: str, name: str, state: Mapping[str, torch.Tensor], args: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """The query's rows of the joined projection and those of key and value."""
    tensor, norm = state[name], state.get(f"{at}q_layernorm.weight")
    rope = int(args.get("qk_pos_emb_head_dim") or args.get("qk_rope_head_dim") or 0)
    if norm is None and not rope:
        raise BridgeError(f"{name}: args have no qk_pos_emb_head_dim, which tells where the query ends")
    left = len(tensor) - len(state[f"{at}kv_layernorm.weight"])  # for the query and the rotary part
    query, rows = ("linear_q_proj", left - rope) if norm is None else ("linear_q_down_proj", len(norm))
    if not 0 < rows < left or rope not in (0, left - rows):
        raise BridgeError(
            f"{name} {tuple(tensor.shape)}: its rows are not those of a query, the latent and {rope} rotary ones"
        )
    return {f"{at}{query}.weight": tensor[:rows], f"{at}linear_kv_down_proj.weight": tensor[rows:]}


def _woven(one: torch.Tensor, other: torch.Tensor, args: Mapping[str, Any], tp: int) -> Woven:
    """Two parts of an up projection as one."""
    total = int(args.get("num_attention_heads") or 0)
    heads = total // tp
    if not total or total % tp or len(one) % heads or len(other) % heads or one.shape[1:] != other.shape[1:]:
        raise BridgeError(
            f"args: num_attention_heads {total} does not fit up projections of {tuple(one.shape)} and {tuple(other.shape)} "
            f"(--mla-mm-split) on each of {tp} ranks"
        )
    return Woven((one, other), heads)
