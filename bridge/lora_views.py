"""A checkpoint with LoRA as another set of canonical tensors: merged into the model, or beside it."""

from collections.abc import Iterable, Mapping
from types import TracebackType
from typing import TYPE_CHECKING, Self

import torch

from ..merge.lora_delta import LowRank
from .errors import BridgeError
from .family import Row
from .lora import Pair, factor_of
from .mapping import hf_shapes

if TYPE_CHECKING:
    from .source import Stored


class _View:
    """What both have of the checkpoint below: its tensors without its own LoRA, its end."""

    def __init__(self, base: "Stored | None", said: Iterable[str]) -> None:
        self.base = base
        shapes = base.shapes if base else {}
        self.shapes = {name: shape for name, shape in shapes.items() if not factor_of(name)}
        self.dtypes = {name: base.dtypes[name] for name in self.shapes} if base else {}
        self.said = [*(base.said if base else ()), *said]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        if self.base:
            self.base.__exit__(kind, error, where)


class Merged(_View):
    """The model with the products of the pairs added, in fp32, part by part as ``finebridge merge`` adds them.

    ``pairs`` by the names of Hugging Face's weights, ``rows`` the model's. What ``get`` gives of a changed weight is fp32,
    to be rounded once. Raises BridgeError for a pair that does not fit its weight.
    """

    base: "Stored"

    def __init__(self, base: "Stored", pairs: Mapping[str, Pair], rows: Iterable[Row], said: Iterable[str]) -> None:
        super().__init__(base, said)
        self._pairs = pairs
        self._rows = {row.mcore: row for row in rows if any(name in pairs for name in row.hf)}
        for name, row in self._rows.items():
            if name not in self.shapes:
                raise BridgeError(f"{name}: there is LoRA on it, but no such weight")
            for part, (height, width) in zip(row.hf, hf_shapes(row.rule, self.shapes[name]), strict=True):
                if (pair := pairs.get(part)) and (len(pair.b), pair.a.shape[1]) != (height, width):
                    raise BridgeError(
                        f"{part}: the weight is {height} x {width}, its LoRA is {len(pair.b)} x {pair.a.shape[1]}"
                    )

    def get(self, name: str) -> torch.Tensor:
        """One canonical tensor. Raises BridgeError when the sum is not finite."""
        value = self.base.get(name)
        if name not in self._rows:
            return value
        row = self._rows[name]
        parts = [self._sum(part, weight) for part, weight in zip(row.hf, row.rule.to_hf(value), strict=True)]
        return row.rule.to_mcore(parts)

    def _sum(self, name: str, weight: torch.Tensor) -> torch.Tensor:
        pair, weight = self._pairs.get(name), weight.float()
        if not pair:
            return weight
        result = LowRank(name, pair.b.float(), pair.a.float(), float(pair.scale)).of(weight, slice(None))
        if not result.isfinite().all():
            raise BridgeError(f"{name}: the sum with LoRA holds values that are not finite")
        return result


class Beside(_View):
    """LoRA's own tensors, beside the model's when there is a ``base``."""

    def __init__(self, base: "Stored | None", tensors: Mapping[str, torch.Tensor], said: Iterable[str]) -> None:
        super().__init__(base, said)
        self._tensors = tensors
        self.shapes |= {name: tuple(value.shape) for name, value in tensors.items()}
        self.dtypes |= {name: value.dtype for name, value in tensors.items()}

    def get(self, name: str) -> torch.Tensor:
        """One tensor."""
        if name in self._tensors:
            return self._tensors[name]
        assert self.base is not None, name
        return self.base.get(name)
