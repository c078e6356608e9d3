"""LoRA between PEFT's factors of Hugging Face's modules and the factors of Megatron-Core's fused linear layers, exactly.

PEFT has A [rank, in] and B [out, rank] for each of q_proj, k_proj, v_proj; Megatron has one pair for ``linear_qkv``, and one
for gate and up projection. B's rows are the weight's rows, so the table's rule holds for B. Where the parts have the same
A, they share it. Where they have not, their A are stacked and B gets zero blocks, so that the product is the same number
for number. Back, zero blocks tell what was stacked; factors that were trained together since have none, and stay whole.

Two trainers' parameters are read: PEFT's on Megatron's modules (``linear_qkv.lora_A.default.weight``, the layer's own
tensors under ``base_layer``: MindSpeed-LLM, ms-swift) and Megatron-Bridge's (``linear_qkv.adapter.linear_in.weight``; with
its CanonicalLoRA ``linear_qkv.adapter.adapter_q.linear_in.weight``, which is Hugging Face's part). Both have one rank and
one alpha for all layers: ``megatron/bridge/peft/lora.py``, MindSpeed-LLM ``--lora-r --lora-alpha``.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

import torch

from .errors import BridgeError
from .family import Row
from .mapping import QKV, Gated, part_rows

NAMES = {
    "mindspeed": ("lora_A.default", "lora_B.default"),
    "megatron-bridge": ("adapter.linear_in", "adapter.linear_out"),
}
_FACTOR = re.compile(
    r"(.+\.linear_\w+)\.(?:lora_([AB])\.default|adapter\.(?:adapter_(q|k|v|gate|up)\.)?linear_(in|out))\.weight"
)
_PARTS = {"q": (3, 0), "k": (3, 1), "v": (3, 2), "gate": (2, 0), "up": (2, 1)}  # parts of the layer, number of this one
_LINEAR = re.compile(r".+\.linear_\w+\.weight")
_MODEL = ("decoder.", "mtp.", "embedding.", "output_layer.")
_LAYER = re.compile(r"^(decoder\.layers\.\d+|mtp\.layers\.\d+\.transformer_layer)\.")


@dataclass(frozen=True, slots=True)
class Pair:
    """The factors of one weight: ``scale * b @ a`` is added to it. a: [rank, in]; b: [out, rank]; of one dtype."""

    a: torch.Tensor
    b: torch.Tensor
    scale: Fraction

    @property
    def rank(self) -> int:
        """Columns of b."""
        return self.b.shape[1]


@dataclass(frozen=True, slots=True)
class Fused:
    """LoRA of a Megatron model: of each weight (canonical name) its pair, all of one rank and one alpha.

    ``targets`` are the layers' names as ``--lora-target-modules`` takes them; ``said`` what a user should know.
    """

    pairs: dict[str, Pair]
    rank: int
    alpha: int
    targets: list[str]
    said: list[str]

    def tensors(self, names: str) -> dict[str, torch.Tensor]:
        """All factors by the names of ``names`` (a key of ``NAMES``)."""
        ends = NAMES[names]
        return {
            f"{weight.removesuffix('.weight')}.{end}.weight": value
            for weight, pair in self.pairs.items()
            for end, value in zip(ends, (pair.a, pair.b), strict=True)
        }


class Factor(NamedTuple):
    """Which factor a tensor is: of which layer's weight, A or B, and of which part alone (``q``, ...), if any."""

    weight: str
    kind: str
    part: str | None

    @property
    def name(self) -> str:
        """For messages."""
        return self.weight.removesuffix(".weight") + (f" ({self.part})" if self.part else "")


def factor_of(name: str) -> Factor | None:
    """What a canonical tensor is of LoRA; None for what is none of it. Raises BridgeError for kinds that are not known."""
    if found := _FACTOR.fullmatch(name):
        module, kind, part, side = found.groups()
        return Factor(f"{module}.weight", kind or {"in": "A", "out": "B"}[side], part)
    if name.startswith(_MODEL) and (".lora_" in name or ".adapter." in name):
        raise BridgeError(
            f"tensor {name}: LoRA of a kind that is not converted; those that are: .lora_A.default.weight, "
            ".lora_B.default.weight and .adapter.linear_in.weight, .adapter.linear_out.weight of a linear layer"
        )
    return None


def to_hf(factors: Mapping[str, torch.Tensor], rows: Iterable[Row], *, alpha: Fraction) -> dict[str, Pair]:
    """The pairs of Hugging Face's weights by name, from Megatron's factors by canonical name.

    Raises BridgeError for a factor whose fellow or whose layer's weight is unknown, and for factors that do not fit.
    """
    table = {row.mcore: row for row in rows}
    found: defaultdict[Factor, dict[str, torch.Tensor]] = defaultdict(dict)
    for name, value in factors.items():
        if factor := factor_of(name):
            found[factor._replace(kind="")][factor.kind] = value
    result: dict[str, Pair] = {}
    for factor, values in found.items():
        if factor.weight not in table:
            raise BridgeError(f"{factor.name}: the checkpoint has LoRA on it, but the model's table has no such layer")
        row, pair = table[factor.weight], _pair(factor, values, alpha)
        if factor.part:
            result[_part(row, factor)] = pair
            continue
        try:
            parts = _unstack(row, pair)
        except BridgeError as error:
            raise BridgeError(f"{factor.name}: LoRA's B: {error}") from None
        result |= {part: one for part, one in zip(row.hf, parts, strict=True) if one}
    return result


def _pair(factor: Factor, values: Mapping[str, torch.Tensor], alpha: Fraction) -> Pair:
    if missing := {"A", "B"} - values.keys():
        raise BridgeError(f"{factor.name}: LoRA's {missing.pop()} is missing, its {next(iter(values))} is there")
    a, b = values["A"], values["B"]
    if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1]:  # noqa: PLR2004
        raise BridgeError(f"{factor.name}: LoRA's A {tuple(a.shape)} and B {tuple(b.shape)} do not fit together")
    if not (a.isfinite().all() and b.isfinite().all()):
        raise BridgeError(f"{factor.name}: LoRA's A or B holds values that are not finite")
    return Pair(a, b, alpha / a.shape[0])


def _part(row: Row, factor: Factor) -> str:
    """The weight of Hugging Face that a part of a layer is."""
    count, number = _PARTS[str(factor.part)]
    if len(row.hf) != count or not isinstance(row.rule, QKV | Gated):
        raise BridgeError(f"{factor.name}: LoRA on this part, but the layer is {', '.join(row.hf)}")
    return row.hf[number]


def to_mcore(pairs: Mapping[str, Pair], rows: Iterable[Row]) -> Fused:
    """LoRA of a Megatron model from the pairs of Hugging Face's weights by name.

    Layers without a pair get zeros, as Megatron has LoRA on all layers of a kind; smaller ranks are filled up with zeros.
    Raises BridgeError for a weight where Megatron has no LoRA, and when no one rank and alpha give all scales.
    """
    rows = list(rows)
    table = {part: row for row in rows for part in row.hf}
    for part in pairs:
        if part not in table:
            raise BridgeError(f"{part}: the adapter changes it, but no table of the model has it")
        if not _LINEAR.fullmatch(table[part].mcore):
            raise BridgeError(
                f"{part}: Megatron's trainers have LoRA on linear layers of attention and MLP only; merge such an adapter "
                "with finebridge merge and convert the result"
            )
    first = next(iter(pairs))
    if other := next((part for part, pair in pairs.items() if pair.scale != pairs[first].scale), None):
        raise BridgeError(
            f"{other} is scaled by {float(pairs[other].scale):g}, {first} by {float(pairs[first].scale):g}: Megatron has one "
            "alpha / rank for all layers; merge the adapter with finebridge merge and convert the result"
        )
    used = {table[part].mcore: table[part] for part in pairs}
    stacked = {name: _stack(row, [pairs.get(part) for part in row.hf]) for name, row in used.items()}
    rank = max(pair.rank for pair in stacked.values())
    alpha = pairs[first].scale * rank
    if alpha.denominator != 1:
        raise BridgeError(f"alpha {float(alpha):g} for rank {rank}: Megatron's trainers take a whole number")
    kinds = {_kind(name): name for name in stacked}
    whole = {
        row.mcore: _padded(stacked.get(row.mcore) or _zeros(stacked[kinds[_kind(row.mcore)]]), rank)
        for row in rows
        if _kind(row.mcore) in kinds
    }
    said = [f"LoRA of rank {rank}, alpha {alpha} on {len(whole)} layers"]
    ranks = {pair.rank for pair in pairs.values()}
    if ranks != {rank}:
        said[0] += (
            f": factors of rank {', '.join(map(str, sorted(ranks)))} are stacked or filled up with zeros to one rank"
        )
    if new := [name for name in whole if name not in stacked]:
        said.append(
            f"{len(new)} of these layers are not in the adapter: zeros, which training leaves zero; the first is {new[0]}"
        )
    if partly := [name for name, row in used.items() if not all(part in pairs for part in row.hf)]:
        row = used[partly[0]]
        missing = [part for part in row.hf if part not in pairs]
        said.append(
            f"{len(partly)} layers are adapted in part, {partly[0]} without {', '.join(missing)}: further training in "
            "Megatron trains all of them"
        )
    return Fused(whole, rank, int(alpha), _targets(rows, whole), said)


def _stack(row: Row, parts: Sequence[Pair | None]) -> Pair:
    """One pair for a layer, from those of its parts; equal A are there once. Raises BridgeError when they do not fit."""
    present = [pair for pair in parts if pair]
    blocks: list[torch.Tensor] = []
    starts: list[int] = []
    for pair in present:
        same = next((number for number, block in enumerate(blocks) if _equal(block, pair.a)), len(blocks))
        blocks += [pair.a] if same == len(blocks) else []
        starts.append(sum(len(block) for block in blocks[:same]))
    if len({(block.shape[1], block.dtype) for block in blocks}) > 1:
        raise BridgeError(f"{', '.join(row.hf)}: their A have the shapes {[tuple(block.shape) for block in blocks]}")
    rank, place = sum(map(len, blocks)), iter(starts)
    try:
        sizes = part_rows(row.rule, [len(pair.b) if pair else None for pair in parts])
        wide = [
            present[0].b.new_zeros(len(pair.b) if pair else size, rank) for size, pair in zip(sizes, parts, strict=True)
        ]
        for whole, pair in zip(wide, parts, strict=True):
            if pair:
                start = next(place)
                whole[:, start : start + pair.rank] = pair.b
        return Pair(torch.cat(blocks), row.rule.to_mcore(wide), present[0].scale)
    except BridgeError as error:
        raise BridgeError(f"{', '.join(row.hf)}: LoRA's B: {error}") from None


def _unstack(row: Row, whole: Pair) -> list[Pair | None]:
    """The pairs of a layer's parts; None for one that is not changed. What was trained since it was stacked stays whole."""
    live = ((whole.a != 0).any(1) | (whole.b != 0).any(0)).nonzero()
    rank = int(live.max()) + 1 if len(live) else 0  # what follows only fills up
    parts = row.rule.to_hf(whole.b[:, :rank])
    used = [part.any(0).nonzero() for part in parts]
    spans = [(int(places.min()), int(places.max()) + 1) if len(places) else None for places in used]
    if rank and not any(spans):  # not yet trained: nothing tells the parts apart
        spans = [(0, rank)] * len(parts)
    blocks = sorted({span for span in spans if span})
    edges = [0, *(stop for _, stop in blocks)]
    tiled = [start for start, _ in blocks] == edges[:-1] and edges[-1] == rank
    result: list[Pair | None] = []
    for part, span in zip(parts, spans, strict=True):
        start, stop = span if span and tiled else (0, rank)
        one = Pair(whole.a[start:stop].contiguous(), part[:, start:stop].contiguous(), whole.scale)
        result.append(one if span else None)
    return result


def _equal(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two factors are the same, bit for bit."""
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    return torch.equal(one.contiguous().view(torch.uint8), other.contiguous().view(torch.uint8))


def _padded(pair: Pair, rank: int) -> Pair:
    more = rank - pair.rank
    if not more:
        return pair
    a = torch.cat([pair.a, pair.a.new_zeros(more, pair.a.shape[1])])
    return Pair(a, torch.cat([pair.b, pair.b.new_zeros(len(pair.b), more)], 1), pair.scale)


def _zeros(like: Pair) -> Pair:
    return Pair(torch.zeros_like(like.a), torch.zeros_like(like.b), like.scale)


def _kind(name: str) -> str:
    """A layer's weight without numbers: Megatron's trainers have LoRA on all of a kind or none."""
    return re.sub(r"\.\d+\.", ".*.", _LAYER.sub("", name))


def _targets(rows: Sequence[Row], adapted: Iterable[str]) -> list[str]:
    """Names that mean exactly these layers where a trainer compares the ends of modules' names."""
    modules = [name.removesuffix(".weight").split(".") for name in adapted]
    kinds = {_kind(name) for name in adapted}
    others = {
        row.mcore.split(".")[-2] for row in rows if _LINEAR.fullmatch(row.mcore) and _kind(row.mcore) not in kinds
    }
    return sorted({module[-1] if module[-1] not in others else ".".join(module[-2:]) for module in modules})
