"""What an adapter does to a weight, in fp32 and for any rows of it, so that no weight is ever held whole.

LoRA: ``W + scale * B @ A`` (https://arxiv.org/abs/2106.09685). DoRA: each row of that sum is brought to a learnt length
(https://arxiv.org/abs/2402.09353). A module that was trained whole replaces the base's. All of them are matrices here: a
vector has one column, the experts of a block are parts of one matrix that lie below each other.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch


class AdapterError(ValueError):
    """The adapter cannot be merged, or not into this base; the message names the setting or tensor."""


def is_finite(value: torch.Tensor) -> bool:
    """Whether a tensor that is not empty holds no infinity and no NaN; ``isfinite().all()`` takes twenty times as long."""
    return math.isfinite(sum(map(float, value.aminmax())))


class Change(Protocol):
    """What one adapter makes of a matrix of ``shape``. ``source`` is the name of its parameter in the model."""

    @property
    def shape(self) -> tuple[int, int]: ...

    @property
    def source(self) -> str: ...

    def of(self, value: torch.Tensor, rows: slice) -> torch.Tensor:
        """The base's ``rows``, fp32, as the adapter has them. ``value`` is used up: the result may lie in its memory."""
        ...

    def part(self, rows: slice, cols: slice, *, transposed: bool) -> "Change":
        """What it makes of a region of the matrix, or of the region's transpose."""
        ...


@dataclass(frozen=True, slots=True)
class LowRank:
    """``left @ right * scale`` is added; with ``lengths`` the rows of the sum are then scaled to them (DoRA).

    left: fp32 [rows, rank]; right: fp32 [rank, cols]; lengths: fp32 [rows].
    """

    source: str
    left: torch.Tensor
    right: torch.Tensor
    scale: float
    lengths: torch.Tensor | None = None

    @property
    def shape(self) -> tuple[int, int]:
        return self.left.shape[0], self.right.shape[1]

    def square(self) -> float:
        """The sum of squares of ``left @ right * scale``, from the factors alone, in fp64."""
        left, right = self.left.double(), self.right.double()
        return float(((left.T @ left) * (right @ right.T)).sum()) * self.scale**2

    def of(self, value: torch.Tensor, rows: slice) -> torch.Tensor:
        summed = value.addmm_(self.left[rows], self.right, alpha=self.scale)
        if self.lengths is None:
            return summed
        return summed * (self.lengths[rows] / torch.linalg.vector_norm(summed, dim=1)).unsqueeze(1)

    def part(self, rows: slice, cols: slice, *, transposed: bool) -> "LowRank":
        whole = cols.stop - cols.start == self.shape[1]
        if self.lengths is not None and (transposed or not whole):
            raise AdapterError(f"{self.source}: DoRA scales whole rows, but the base holds them in parts")
        left, right = self.left[rows], self.right[:, cols]
        if transposed:
            left, right = right.T, left.T
        lengths = None if self.lengths is None else self.lengths[rows]
        return LowRank(self.source, left.contiguous(), right.contiguous(), self.scale, lengths)


@dataclass(frozen=True, slots=True)
class Replacement:
    """The trained matrix takes the base's place. ``read(start, stop)`` gives its elements, seen flat, from disk."""

    source: str
    shape: tuple[int, int]
    read: Callable[[int, int], torch.Tensor]

    def of(self, value: torch.Tensor, rows: slice) -> torch.Tensor:
        width = self.shape[1]
        return self.read(rows.start * width, rows.stop * width).float().view_as(value)

    def part(self, rows: slice, cols: slice, *, transposed: bool) -> "Replacement":
        if transposed or cols.stop - cols.start != self.shape[1]:
            raise AdapterError(f"{self.source}: this weight was trained whole, but the base holds it in parts of rows")
        first = rows.start * self.shape[1]

        def read(start: int, stop: int) -> torch.Tensor:
            return self.read(first + start, first + stop)

        return Replacement(self.source, (rows.stop - rows.start, self.shape[1]), read)


@dataclass(frozen=True, slots=True)
class Placed:
    """A change at its place in a tensor on disk: its first row and column there, and the adapter's weight."""

    change: Change
    top: int
    left: int
    weight: float
    adapter: int

    def covers(self, first: int, last: int, width: int) -> bool:
        """Whether it reaches over rows ``first`` to ``last`` of a tensor of ``width`` columns, whole."""
        height, cols = self.change.shape
        return self.top <= first and last <= self.top + height and self.left == 0 and cols == width


def merged_rows(value: torch.Tensor, first: int, placed: Sequence[Placed], *, sole: bool) -> torch.Tensor:
    """Rows ``first`` and following of a tensor, fp32 [rows, cols], with all changes: base + sum of weight * change.

    ``sole``: the changes are one adapter's, so that they do not overlap and a weight of 1 needs no subtraction. ``value`` is
    used up.
    """
    last = first + value.shape[0]
    if sole and len(placed) == 1 and placed[0].weight == 1 and placed[0].covers(first, last, value.shape[1]):
        return placed[0].change.of(value, slice(first - placed[0].top, last - placed[0].top))
    result = value.clone()
    for item in placed:
        height, width = item.change.shape
        top, bottom = max(first, item.top), min(last, item.top + height)
        if top >= bottom:
            continue
        region = slice(top - first, bottom - first), slice(item.left, item.left + width)
        new = item.change.of(value[region].clone(), slice(top - item.top, bottom - item.top))
        if sole and item.weight == 1:
            result[region] = new
        else:
            result[region].add_(new - value[region], alpha=item.weight)
    return result
