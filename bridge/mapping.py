"""The reversible rules between tensors of a Hugging Face checkpoint and of the canonical Megatron-Core model.

A rule takes the parts that Hugging Face stores, in a fixed order, and makes one canonical tensor of them; and back:
``to_hf(to_mcore(parts)) == parts``. The canonical model is Megatron-Core's with TP 1, one entry a layer and an expert,
the vocabulary unpadded, names of its Transformer Engine modules (https://github.com/NVIDIA/Megatron-LM).
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Protocol

import torch

from .errors import BridgeError


class Rule(Protocol):
    """How parts become one tensor and one tensor its parts. Both look at the first dimension only; it may hash."""

    def to_mcore(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """The canonical tensor of the parts. Raises BridgeError when shapes do not fit the rule."""
        ...

    def to_hf(self, whole: torch.Tensor) -> list[torch.Tensor]:
        """The parts of the canonical tensor, in order. Raises BridgeError when its shape does not fit the rule."""
        ...


@dataclass(frozen=True, slots=True)
class Copy:
    """The same tensor under another name."""

    def to_mcore(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        return parts[0]

    def to_hf(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole]


@dataclass(frozen=True, slots=True)
class Vocab:
    """Rows by token: ``rows`` of them are the vocabulary, what follows in a Megatron checkpoint is padding."""

    rows: int

    def to_mcore(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        if parts[0].shape[0] != self.rows:
            raise BridgeError(f"{parts[0].shape[0]} rows, config.json says vocab_size {self.rows}")
        return parts[0]

    def to_hf(self, whole: torch.Tensor) -> list[torch.Tensor]:
        if whole.shape[0] < self.rows:
            raise BridgeError(f"{whole.shape[0]} rows, config.json says vocab_size {self.rows}")
        return [whole[: self.rows]]


@dataclass(frozen=True, slots=True)
class Gated:
    """Gate and up projection below each other, [2 * ffn, hidden]."""

    def to_mcore(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        gate, up = parts
        if gate.shape != up.shape:
            raise BridgeError(f"gate {tuple(gate.shape)} and up {tuple(up.shape)} differ")
        return torch.cat([gate, up])

    def to_hf(self, whole: torch.Tensor) -> list[torch.Tensor]:
        if whole.shape[0] % 2:
            raise BridgeError(f"{whole.shape[0]} rows are no gate and up of the same size")
        return list(whole.chunk(2))


@dataclass(frozen=True, slots=True)
class QKV:
    """Query, key and value heads by query group: each group's queries, then its key, then its value.

    Weights are [heads * head_dim, hidden] and [groups * head_dim, hidden], biases the same without hidden.
    """

    heads: int
    groups: int
    head_dim: int

    def to_mcore(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        sizes = self._sizes()
        for part, size in zip(parts, sizes, strict=True):
            if part.shape[0] != self.groups * size:
                raise BridgeError(f"{part.shape[0]} rows where {self.groups * size} are expected ({self})")
        tail = parts[0].shape[1:]
        grouped = [part.reshape(self.groups, size, *tail) for part, size in zip(parts, sizes, strict=True)]
        return torch.cat(grouped, dim=1).reshape(self.groups * sum(sizes), *tail)

    def to_hf(self, whole: torch.Tensor) -> list[torch.Tensor]:
        sizes = self._sizes()
        if whole.shape[0] != self.groups * sum(sizes):
            raise BridgeError(f"{whole.shape[0]} rows where {self.groups * sum(sizes)} are expected ({self})")
        tail = whole.shape[1:]
        grouped = whole.reshape(self.groups, sum(sizes), *tail)
        return [part.reshape(self.groups * part.shape[1], *tail) for part in grouped.split(sizes, dim=1)]

    def rows(self) -> list[int]:
        """Rows of query, key and value."""
        return [self.groups * size for size in self._sizes()]

    def _sizes(self) -> list[int]:
        """Rows of a group's queries, key and value."""
        return [self.heads // self.groups * self.head_dim, self.head_dim, self.head_dim]


@dataclass(frozen=True, slots=True)
class Stacked:
    """The parts of another rule below each other in one tensor; ``rows`` are those of each part."""

    rule: Rule
    rows: tuple[int, ...]

    def to_mcore(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        whole = parts[0]
        if whole.shape[0] != sum(self.rows):
            raise BridgeError(f"{whole.shape[0]} rows where {sum(self.rows)} are expected ({self.rule})")
        return self.rule.to_mcore(whole.split(self.rows))

    def to_hf(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [torch.cat(self.rule.to_hf(whole))]


@dataclass(frozen=True, slots=True)
class GatedQKV:
    """As ``QKV``, with a gate for each query head: on disk behind its query, here a group's gates behind its queries."""

    heads: int
    groups: int
    head_dim: int

    def to_mcore(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        query, *rest = parts
        return self._plain().to_mcore([self._swapped(query, self.heads // self.groups, 2), *rest])

    def to_hf(self, whole: torch.Tensor) -> list[torch.Tensor]:
        query, *rest = self._plain().to_hf(whole)
        return [self._swapped(query, 2, self.heads // self.groups), *rest]

    def _plain(self) -> QKV:
        return QKV(2 * self.heads, self.groups, self.head_dim)

    def _swapped(self, query: torch.Tensor, outer: int, inner: int) -> torch.Tensor:
        rows = 2 * self.heads * self.head_dim
        if query.shape[0] != rows:
            raise BridgeError(f"{query.shape[0]} rows where {rows} are expected ({self})")
        return (
            query.reshape(self.groups, outer, inner, self.head_dim, *query.shape[1:])
            .transpose(1, 2)
            .reshape(query.shape)
        )


@dataclass(frozen=True, slots=True)
class DeltaNet:
    """Input projection of a gated delta net: all queries, keys, values, gates, betas and alphas, one after the other.

    On disk are two tensors, (query, key, value, gate) and (beta, alpha), each ordered by key head.
    """

    key_heads: int
    value_heads: int
    key_dim: int
    value_dim: int

    def to_mcore(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        rows: list[torch.Tensor] = []
        for part, sizes in zip(parts, self._sizes(), strict=True):
            if part.shape[0] != self.key_heads * sum(sizes):
                raise BridgeError(f"{part.shape[0]} rows where {self.key_heads * sum(sizes)} are expected ({self})")
            by_head = part.reshape(self.key_heads, sum(sizes), *part.shape[1:])
            rows += [piece.flatten(0, 1) for piece in by_head.split(sizes, 1)]
        return torch.cat(rows)

    def to_hf(self, whole: torch.Tensor) -> list[torch.Tensor]:
        first, second = self._sizes()
        sizes, tail = [*first, *second], whole.shape[1:]
        if whole.shape[0] != self.key_heads * sum(sizes):
            raise BridgeError(f"{whole.shape[0]} rows where {self.key_heads * sum(sizes)} are expected ({self})")
        pieces = [
            piece.reshape(self.key_heads, size, *tail)
            for piece, size in zip(whole.split([self.key_heads * size for size in sizes]), sizes, strict=True)
        ]
        return [torch.cat(some, 1).flatten(0, 1) for some in (pieces[: len(first)], pieces[len(first) :])]

    def _sizes(self) -> tuple[list[int], list[int]]:
        """Rows of a key head in both tensors on disk."""
        values = self.value_heads // self.key_heads
        return [self.key_dim, self.key_dim, values * self.value_dim, values * self.value_dim], [values, values]


_WIDER = {torch.bfloat16: torch.float32, torch.float16: torch.float32, torch.float32: torch.float64}


@dataclass(frozen=True, slots=True)
class MinusOne:
    """A norm's weight as its distance from one, in the next wider type: in its own most weights below 0.5 would change."""

    def to_mcore(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        (weight,) = parts
        made = weight.to(_WIDER.get(weight.dtype, weight.dtype)) - 1
        if not torch.equal((made + 1).to(weight.dtype).view(torch.uint8), weight.contiguous().view(torch.uint8)):
            raise BridgeError(f"a weight is so close to 0 that its distance from 1 does not fit into {made.dtype}")
        return made

    def to_hf(self, whole: torch.Tensor) -> list[torch.Tensor]:
        return [whole.double() + 1]


def mcore_dtype(rule: Rule, dtype: torch.dtype) -> torch.dtype:
    """The type of the canonical tensor of parts of a type."""
    return _WIDER.get(dtype, dtype) if isinstance(rule, MinusOne) else dtype


def hf_dtype(rule: Rule, dtype: torch.dtype, main: torch.dtype) -> torch.dtype:
    """The type of the parts of a canonical tensor in a model that is mostly of the type ``main``.

    A ``MinusOne`` that is wider than the model came from the next narrower type, else Megatron has written it.
    """
    if not isinstance(rule, MinusOne) or dtype.itemsize <= main.itemsize:
        return dtype
    return torch.float32 if dtype == torch.float64 else main


def part_rows(rule: Rule, known: Sequence[int | None]) -> list[int]:
    """The rows of every part when only some parts are there (None: not). Raises BridgeError when the rule does not tell."""
    if isinstance(rule, QKV):
        return rule.rows()
    there = [rows for rows in known if rows is not None]
    if len(there) < len(known) and not isinstance(rule, Gated):
        raise BridgeError(
            f"only {len(there)} of its {len(known)} parts are there, and {rule} does not tell the size of others"
        )
    return there if len(there) == len(known) else there * len(known)


@cache
def mcore_shape(rule: Rule, shapes: tuple[tuple[int, ...], ...]) -> tuple[int, ...]:
    """The shape of the canonical tensor of parts of these shapes. Raises BridgeError when they do not fit the rule."""
    tails = {shape[1:] for shape in shapes}
    if len(tails) > 1:
        raise BridgeError(f"the shapes {', '.join(map(str, shapes))} do not fit together")
    return tuple(rule.to_mcore([_rows(shape) for shape in shapes]).shape[:1]) + tails.pop()


@cache
def hf_shapes(rule: Rule, shape: tuple[int, ...]) -> tuple[tuple[int, ...], ...]:
    """The shapes of the parts of a canonical tensor. Raises BridgeError when its shape does not fit the rule."""
    return tuple(tuple(part.shape[:1]) + shape[1:] for part in rule.to_hf(_rows(shape)))


def _rows(shape: tuple[int, ...]) -> torch.Tensor:
    """A tensor with this first dimension and no content: torch's own one without content takes a second to import."""
    return torch.empty(*shape[:1], 0)
