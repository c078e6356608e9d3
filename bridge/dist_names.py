"""The keys of ``torch_dist`` and the canonical names, both ways.

Megatron stores a layer under its number or all layers of the decoder in one tensor with the layers as its first dimension
(TransformerBlock.sharded_state_dict), the experts always in one tensor with the experts before the weight's own dimensions
(SequentialMLP.sharded_state_dict), a gated layer's halves sometimes as two tensors (apply_swiglu_sharded_factory). The
norms' keys depend on the layer spec that trained: of MLA and of MoE layers the local spec keeps other ones than Transformer
Engine's. All of these are read; written are those of the dialect that is asked for.
"""

import itertools
import math
import re
from collections.abc import Collection, Mapping
from typing import NamedTuple

from .dialects import LANGUAGE, check_dialect, check_known, is_known
from .dist_records import Chunk, Stored
from .errors import BridgeError
from .parallel import is_carried
from .sections import NAMES

_LAYER = re.compile(
    r"(?P<head>.*\blayers\.)(?P<number>\d+\.)?(?P<inner>transformer_layer\.|mtp_model_layer\.)?(?P<rest>.+)"
)
_EXPERTS = re.compile(r"mlp\.experts\.experts\.(?:(\d+)\.)?(linear_fc[12]\..+)")
_EXPERT = re.compile(r"(.*\bmlp\.experts\.)local_experts\.(\d+)\.(.+)")
_PART = re.compile(r"(?:linear_fc1\.(?:weight|bias)(?=_)|(?:in_proj|conv1d)\.weight(?=\.))(_[wv]|\.\w+)$")
_DECODER = re.compile(r"(decoder\.layers\.)(\d+)\.(.+)")

# The endings of the keys of one tensor's parts, in their order: one for all of it, or a gated layer's halves, or sections.
_WHOLES = [("",), ("_w", "_v"), *(tuple(f".{part}" for part in parts) for parts in NAMES.values())]

# (of a stored key, of the canonical name, the neighbour in the same layer that tells that this row holds)
# The local spec writes the rows 2 to 4 of a layer with latent attention and the last one of others: its map of keys is
# meant for dense layers without latent attention (megatron-core 0.16.1, models/gpt/gpt_layer_specs.py).
_NORMS = [
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_", "self_attention.linear_qkv.weight"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_", "self_attention.linear_q_up_proj.weight"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_", "self_attention.linear_kv_up_proj.weight"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_", "mlp.linear_fc2.weight"),
    ("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.", "mlp.router.weight"),
]  # fmt: skip


class Piece(NamedTuple):
    """A canonical tensor, or a half of one, within what is stored: the key, the place in its leading dimensions, the chunks."""

    key: str
    at: tuple[int, ...]
    shape: tuple[int, ...]
    chunks: list[Chunk]


def pieces_of(tensors: Mapping[str, Stored]) -> dict[str, list[Piece]]:
    """Of each canonical name the pieces that, joined on the first dimension, are its tensor.

    Raises BridgeError for two keys of the same tensor and for half a tensor.
    """
    neighbours: dict[str, set[str]] = {}
    short = {key: key.removeprefix(LANGUAGE) for key in tensors}
    for key in short.values():
        if found := _LAYER.fullmatch(key):
            neighbours.setdefault(key[: found.start("rest")], set()).add(_plain(found["rest"]))
    names: dict[str, dict[str, Piece]] = {}
    for key, stored in tensors.items():
        pattern, half, depth = _canonical(short[key], neighbours)
        if len(stored.shape) < depth:
            raise BridgeError(f"tensor {key}: the shape {stored.shape} has no dimension for its layers or experts")
        for index, chunks in _split(stored, depth).items():
            name = pattern
            for number in index:
                name = name.replace("{}", str(number), 1)
            parts = names.setdefault(name, {})
            if half in parts:
                raise BridgeError(f"tensor {name}: stored twice, as {parts[half].key} and as {key}")
            parts[half] = Piece(key, index, stored.shape[depth:], chunks)
    for name, parts in names.items():
        if not any(parts.keys() == set(whole) for whole in _WHOLES):
            raise BridgeError(
                f"tensor {name}: of its parts only {', '.join(piece.key for piece in parts.values())} is stored"
            )
    order = [ending for whole in _WHOLES for ending in whole]
    return {name: [parts[ending] for ending in sorted(parts, key=order.index)] for name, parts in names.items()}


def _canonical(key: str, neighbours: Mapping[str, set[str]]) -> tuple[str, str, int]:
    """The canonical name with {} for what is a leading dimension, the part (one of _WHOLES), and how many there are."""
    found = _LAYER.fullmatch(key)
    if not found:
        return key, "", 0
    rest = _renamed(_plain(found["rest"]), neighbours[key[: found.start("rest")]])
    part = _PART.search(rest)
    half = part[1] if part else ""
    rest = rest.removesuffix(half)
    depth = 0 if found["number"] else 1
    if experts := _EXPERTS.fullmatch(rest):
        depth += not experts[1]
        rest = f"mlp.experts.local_experts.{experts[1] or '{}'}.{experts[2]}"
    inner = "transformer_layer." if found["inner"] else ""
    return f"{found['head']}{found['number'] or '{}.'}{inner}{rest}", half, depth


def _plain(rest: str) -> str:
    """A name in a layer as it is without PEFT's LoRA around the linear layer."""
    return rest.replace(".base_layer.", ".")


def _renamed(rest: str, neighbours: set[str]) -> str:
    for stored, canonical, witness in _NORMS:
        if rest.startswith(stored) and witness in neighbours:
            return canonical + rest.removeprefix(stored)
    return rest


def dialects_of_keys(keys: Collection[str], names: Collection[str]) -> list[str]:
    """The dialects that have all the keys of norms of a checkpoint whose tensors are ``names``; other keys are alike."""
    norms = tuple(stored for stored, *_ in _NORMS) + tuple(canonical for _, canonical, _ in _NORMS)

    def of_norms(every: Collection[str]) -> set[str]:
        """The keys of norms, without prefix and number."""
        found = [_LAYER.fullmatch(key.removeprefix(LANGUAGE)) for key in every]
        return {f"{one['head']}{_plain(one['rest'])}" for one in found if one and _plain(one["rest"]).startswith(norms)}

    def has(dialect: str) -> bool:
        if any(not is_known(name, dialect) for name in names):
            return False
        local = dialect == "mcore-local"
        return of_norms(keys) == of_norms({_local(name, names) if local else name for name in names})

    fits = [dialect for dialect in ("mcore", "mcore-local") if has(dialect)]
    return [*fits, "pai"] if fits and all(is_known(name, "pai") for name in names) else fits


def _split(stored: Stored, depth: int) -> dict[tuple[int, ...], list[Chunk]]:
    """The chunks that share elements with each place in the first ``depth`` dimensions."""
    places: dict[tuple[int, ...], list[Chunk]] = {}
    for chunk in stored.chunks:
        spans = [range(first, first + size) for first, size in zip(chunk.offset, chunk.shape, strict=True)]
        for index in itertools.product(*spans[:depth]):
            places.setdefault(index, []).append(chunk)
    return places


class Place(NamedTuple):
    """Where a canonical tensor is stored: at ``at`` in the leading dimensions ``lead`` of ``key``."""

    key: str
    at: tuple[int, ...]
    lead: tuple[int, ...]


def places_of(names: Collection[str], *, uniform: bool, dialect: str, tower: bool = False) -> dict[str, Place]:
    """Where each canonical name is stored; ``uniform``: all layers of the decoder in one tensor.

    ``tower``: there is a vision tower beside the language model, though maybe not in ``names``.

    Raises BridgeError when an expert is absent, and with ``uniform`` when a layer has what another one has not.
    """
    check_dialect(dialect, "torch_dist")
    for name in names:
        check_known(name, dialect)
    split = {name: _key(_local(name, names) if dialect == "mcore-local" else name, uniform=uniform) for name in names}
    groups: dict[str, dict[tuple[int, ...], str]] = {}
    for name, (key, index) in split.items():
        groups.setdefault(key, {})[index] = name
    layers = 1 + max((int(found[2]) for found in map(_DECODER.fullmatch, split) if found), default=-1)
    places: dict[str, Place] = {}
    for key, members in groups.items():
        lead = tuple(1 + max(numbers) for numbers in zip(*members, strict=True))
        if stacked := uniform and key.startswith("decoder.layers."):
            lead = (layers, *lead[1:])
        if len(members) < math.prod(lead):
            missing = next(index for index in itertools.product(*map(range, lead)) if index not in members)
            kinds = ["layer", "expert"] if stacked else ["expert"]
            words = ", ".join(f"{kind} {number}" for kind, number in zip(kinds, missing, strict=False))
            raise BridgeError(f"tensor {key}: nothing for {words}, although there is {next(iter(members.values()))}")
        places |= {name: Place(key, index, lead) for index, name in members.items()}
    if tower or any(map(is_carried, names)):  # a vision tower, beside which the language model has a name
        places |= {
            name: place._replace(key=LANGUAGE + place.key) for name, place in places.items() if not is_carried(name)
        }
    return places


def section_places(place: Place) -> list[Place]:
    """Where the sections of a tensor are stored (see ``sections.py``), given where the tensor would be."""
    return [place._replace(key=f"{place.key}.{name}") for name in NAMES[place.key.split(".")[-2]]]


def _local(name: str, names: Collection[str]) -> str:
    """What a model of the local spec calls a tensor in ``torch_dist``, with a number for its layer and its expert."""
    found = _LAYER.fullmatch(name)
    layer = name[: found.start("rest")] if found else ""
    latent = f"{layer}self_attention.linear_kv_up_proj.weight" in names
    for stored, canonical, _ in _NORMS[1:4] if latent else _NORMS[4:]:
        if layer and name.startswith(layer + canonical):
            return layer + stored + name.removeprefix(layer + canonical)
    return name


def _key(name: str, *, uniform: bool) -> tuple[str, tuple[int, ...]]:
    index: tuple[int, ...] = ()
    if uniform and (layer := _DECODER.fullmatch(name)):
        name, index = layer[1] + layer[3], (int(layer[2]),)
    if expert := _EXPERT.fullmatch(name):
        name, index = f"{expert[1]}experts.{expert[3]}", (*index, int(expert[2]))
    return name, index


# Modules of the canonical names that are no modules of Transformer Engine or whose state Megatron leaves out.
_STATELESS = re.compile(r"(.*\.)?(word_embeddings|position_embeddings|output_layer|router|shared_experts)")


def extra_states_of(places: Mapping[str, Place]) -> list[str]:
    """Keys of the ``_extra_state`` objects that a model of Transformer Engine asks for, whatever its version.

    Linears always have one, norms and the core attention of some versions; Megatron's default strictness wants each that
    the model has and does not mind more.
    """
    keys: dict[str, None] = {}
    for name, place in places.items():
        if is_carried(name):
            continue
        module = place.key.rpartition(".")[0]
        if ".adapter." in module:  # Megatron-Bridge leaves them out of what it saves of an adapter
            continue
        modules = [] if _STATELESS.fullmatch(module) else [module]
        if attention := re.match(r".*\bself_attention\.", module):
            modules.append(attention[0] + "core_attention")
        at, lead = place.at or (0,), place.lead or (1,)
        for stateful in modules:
            keys[f"{stateful}._extra_state/shard_{'.'.join(map(str, at))}_{'.'.join(map(str, lead))}"] = None
    return list(keys)
