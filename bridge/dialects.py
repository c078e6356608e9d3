"""The names under which trainings store a tensor: by the layers that a model was built from, and by who trains.

The canonical names are those of TransformerEngine's layers, with one entry an expert. Names here are a rank's own
(``parallel.shift``); both directions are pure functions. Sources: megatron-core 0.16.1 ``models/gpt/gpt_layer_specs.py``,
``transformer/moe/experts.py``; ``mindspeed.py``; alibaba/Pai-Megatron-Patch a098ca5a (2025-12-15) ``toolkits/``.
"""

import re
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import torch

from . import mindspeed
from .errors import BridgeError
from .parallel import LOCAL_CUTS, NO_CUTS, Cuts, Layout, Slot, is_carried

LANGUAGE = "language_model."  # before the names of a language model that has a vision tower beside it
_IN_LAYER = re.compile(r"^(decoder\.layers\.\d+|mtp\.layers\.\d+\.(?:transformer_layer|mtp_model_layer))\.(.+)$")
_EXPERT = re.compile(r"^mlp\.experts\.local_experts\.(\d+)\.(linear_fc[12])\.(weight|bias)$")
_GROUPED = re.compile(r"^mlp\.experts\.(linear_fc[12])\.(weight|bias)(\d+)$")
_LINEAR = re.compile(r"^(.*\.(?:linear_\w+|eh_proj|in_proj|out_proj)(?:\.base_layer)?)\.weight\d*$")
_ADAPTED = ".base_layer."  # PEFT's LoRA wraps a linear layer: what the layer holds is one level deeper
_IN_LINEAR = re.compile(r"(\.linear_\w+)\.((?:layer_norm_)?(?:weight|bias))$")
_GROUPS = re.compile(r"weight([12])(?:_lora_([ab]))?")
_GROUPED_LORA = re.compile(r"\.experts\.weight[12]_lora_[ab]$")
FUSED = {  # the norm is a part of the linear layer behind it -> it is a module of its own
    "self_attention.linear_qkv.layer_norm_": "input_layernorm.",
    "self_attention.in_proj.layer_norm_": "input_layernorm.",
    "mlp.linear_fc1.layer_norm_": "pre_mlp_layernorm.",
    "self_attention.linear_q_up_proj.layer_norm_": "self_attention.q_layernorm.",
    "self_attention.linear_kv_up_proj.layer_norm_": "self_attention.kv_layernorm.",
}
_USUAL = (  # of a layer with experts or without, with latent attention or grouped queries
    r"(input|pre_mlp)_layernorm\.weight|self_attention\.(linear_qkv\.(layer_norm_weight|weight|bias)|linear_proj\.weight"
    r"|[qk]_layernorm\.weight|linear_q_proj\.weight|linear_(q|kv)_(down|up)_proj\.(layer_norm_)?weight)|mlp\.(router\."
    r"(weight|expert_bias)|shared_experts\.(linear_fc[12]\.weight|gate_weight)"
    r"|(experts\.local_experts\.\d+\.)?linear_fc[12]\.(layer_norm_)?weight)"
)
_LORA = r"(self_attention\.linear_(qkv|proj)|mlp\.linear_fc[12])\.lora_[AB]\.default\.weight"


class Dialect(NamedTuple):
    """What one kind of training calls the tensors, and how else its checkpoints differ.

    ``local``: it has Megatron's own layers in place of TransformerEngine's. ``cuts``: see ``parallel.cut_of``. ``known``: the
    tensors of a layer that it has, None for all. ``padded``: its vocabulary gets rows until every rank has as many as
    Megatron wants. ``iteration``: what is written when none is asked for; None is a release.
    """

    local: bool = False
    cuts: Cuts = NO_CUTS
    known: str | None = None
    forms: tuple[str, ...] = ("torch", "torch_dist")
    padded: bool = True
    iteration: int | None = None
    extra_states: bool = True
    config_in_args: bool = False  # the plain values of config.json are noted beside Megatron's arguments
    own_args: Callable[[Layout], dict[str, Any]] = lambda _: {}  # of a run, beside Megatron's


DIALECTS = {
    "mcore": Dialect(),
    "mcore-local": Dialect(local=True, cuts=LOCAL_CUTS),
    "mindspeed": Dialect(
        local=True, cuts=mindspeed.CUTS, known=rf"{_USUAL}|self_attention\.core_attention\.indexer\..*|{_LORA}", forms=("torch",),
        padded=False, iteration=1, extra_states=False, own_args=mindspeed.own_args,
        config_in_args=True,
    ),
    # Pai's own converters: hf2mcore_*.py write the format torch, with the down projections of latent attention
    # column-parallel as in the Megatron-Core of their time; distributed_checkpoints_convertor writes torch_dist.
    "pai": Dialect(cuts=LOCAL_CUTS, known=_USUAL, padded=False),
}  # fmt: skip


def check_dialect(dialect: str, form: str | None = None) -> Dialect:
    """The dialect of a name. Raises BridgeError when there is none, or when it has no checkpoints of the format ``form``."""
    if dialect not in DIALECTS:
        raise BridgeError(f"--dialect {dialect}: not known; choose from {', '.join(DIALECTS)}")
    found = DIALECTS[dialect]
    if form and form not in found.forms:
        raise BridgeError(
            f"--dialect {dialect}: its checkpoints have the format {found.forms[0]} only; give --ckpt_format {found.forms[0]}"
        )
    return found


def check_known(name: str, dialect: str) -> None:
    """Raise BridgeError for a canonical tensor that a dialect has no name for."""
    if not is_known(name, dialect):
        raise BridgeError(
            f"tensor {name}: --dialect {dialect} has no name for it that is known; choose from "
            + ", ".join(other for other, kind in DIALECTS.items() if not kind.known)
        )


def slot_of(name: str, dialect: str, *, mtp: bool = False) -> Slot:
    """Where a rank of this dialect keeps a canonical tensor. ``mtp``: the model predicts further tokens.

    Raises BridgeError for a tensor that the dialect has no name for.
    """
    check_known(name, dialect)
    found = _IN_LAYER.match(name)
    if dialect == "mindspeed":
        own = mindspeed.slot(*found.groups()) if found else Slot(mindspeed.outside(name, mtp=mtp))
        return own or Slot(_local(name))
    return Slot(_local(name) if DIALECTS[dialect].local else _grouped(name))


def stored_name(name: str, dialect: str) -> str:
    """The name of a tensor in a model's state dict. ``mcore``: TransformerEngine layers with grouped experts."""
    return slot_of(name, dialect).name


def dialects_of(stored: Collection[str], canonical: Collection[str]) -> list[str]:
    """The dialects that have all the names of a checkpoint whose tensors are ``canonical``.

    Experts may be one by one or grouped in any of them. None of them when layers of several kinds are mixed.
    """
    names = {unwrapped(name.removeprefix(LANGUAGE)) for name in stored}
    mtp = any(name.startswith("mtp.") for name in canonical)
    latent = any(name.endswith(".linear_kv_down_proj.weight") for name in canonical)
    grouped = {name for name in names if _GROUPED_LORA.search(name)}
    if grouped:  # only MindSpeed-LLM has it, and it is read only
        names -= grouped
        canonical = [name for name in canonical if not (".experts.local_experts." in name and ".lora_" in name)]
    fits = [
        dialect
        for dialect in (("mindspeed",) if grouped else ("mcore", "mcore-local", "mindspeed"))
        if all(is_known(name, dialect) for name in canonical)
        and names <= {other for name in canonical for other in _variants(name, dialect, mtp=mtp, latent=latent)}
    ]
    usual = {"mcore", "mcore-local"} & set(fits) and all(is_known(name, "pai") for name in canonical)
    return [*fits, "pai"] if usual else fits  # Pai has either kind of layers


def is_known(name: str, dialect: str) -> bool:
    """Whether a dialect has a name for a canonical tensor."""
    known = check_dialect(dialect).known
    if not known or not (found := _IN_LAYER.match(name)):
        return not known or not is_carried(name)
    return bool(re.fullmatch(known, found[2]))


def _variants(name: str, dialect: str, *, mtp: bool, latent: bool) -> set[str]:
    """All names that trainings of this dialect have for a tensor, depending on their options."""
    own = {slot_of(name, dialect, mtp=mtp).name}
    inner = _inner_of(name)
    special = mindspeed.slot(name.removesuffix(f".{inner}"), inner)
    if expert := _EXPERT.match(inner):
        own |= {name, *([special.name] if special and dialect != "mcore" else [])}
    if dialect == "mindspeed":  # with latent attention its options may also be TransformerEngine's layers
        own |= mindspeed.options(name) | ({_grouped(name)} if latent and inner and (expert or not special) else set())
    return own


def _inner_of(name: str) -> str:
    found = _IN_LAYER.match(name)
    return found[2] if found else ""


def _local(name: str) -> str:
    """What Megatron's own layers call a tensor."""
    inner = _inner_of(name)
    for fused, alone in FUSED.items():
        if inner.startswith(fused):
            return name.removesuffix(inner) + alone + inner.removeprefix(fused)
    return name


def adapted_name(stored: str) -> str:
    """The stored name of a tensor of a linear layer that PEFT's LoRA wraps. Raises BridgeError for other ones' names."""
    name, count = _IN_LINEAR.subn(rf"\1{_ADAPTED}\2", stored)
    if not count and "experts" in stored:
        raise BridgeError(f"{stored}: grouped experts have no LoRA by expert; give --dialect mcore-local")
    return name  # a norm that stands alone is not wrapped


def unwrapped(stored: str) -> str:
    """The stored name of a tensor without the level that PEFT's LoRA adds."""
    return stored.replace(_ADAPTED, ".")


def _grouped(name: str) -> str:
    """What TransformerEngine's layers call a tensor."""
    inner = _inner_of(name)
    expert = _EXPERT.match(inner)
    return f"{name.removesuffix(inner)}mlp.experts.{expert[2]}.{expert[3]}{expert[1]}" if expert else name


def canonical_names(stored: Iterable[str]) -> dict[str, str]:
    """Of each name of one state dict the canonical one, whatever layers it is from: what a layer holds tells.

    Not for tensors that are kept in one: see ``ungrouped`` and ``mindspeed.parted``. Raises BridgeError for a name that
    is none of a model's.
    """
    names = list(stored)
    tower = any(name.startswith(LANGUAGE) for name in names)
    short = {name: mindspeed.canonical(unwrapped(name.removeprefix(LANGUAGE))) for name in names}
    layers: dict[str, set[str]] = {}
    for name in short.values():
        if found := _IN_LAYER.match(name):
            layers.setdefault(found[1], set()).add(found[2])
    result: dict[str, str] = {}
    for whole, name in short.items():
        found = _IN_LAYER.match(name)
        if is_carried(name) and not tower:
            raise BridgeError(
                f"tensor {whole}: how Megatron-Core spreads it over ranks is not known; it cannot be converted"
            )
        result[whole] = f"{newest(found[1])}.{_inner(found[2], layers[found[1]])}" if found else name
    return result


def cuts_of(shapes: Mapping[str, Sequence[int]]) -> Cuts:
    """Which cuts a state dict has, by its shapes: see ``parallel.cut_of``.

    Latent attention's down projection has the latent's rows and those of the rotary part; cut it has fewer.
    """
    shapes = {unwrapped(name): shape for name, shape in shapes.items()}
    if mindspeed.is_joined(shapes):
        return mindspeed.CUTS
    for name, shape in shapes.items():
        at, found, _ = name.rpartition("linear_kv_down_proj.weight")
        norms = (f"{at}kv_layernorm.weight", f"{at}linear_kv_up_proj.layer_norm_weight")
        if found and any(norm in shapes and shape[0] <= shapes[norm][0] for norm in norms):
            return LOCAL_CUTS
    return NO_CUTS


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
        hidden = tensor.shape[0 if group[1] == "1" else -1] if tensor.dim() else 0
        if not experts or not hidden or tensor.numel() % (experts * hidden) or tensor.dim() != 2:  # noqa: PLR2004 - a matrix
            raise BridgeError(f"{name} {tuple(tensor.shape)}: the number of its experts cannot be told from the router")
        each = tensor.reshape(experts, hidden, -1) if group[1] == "1" else tensor.reshape(experts, -1, hidden)
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
