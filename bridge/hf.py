"""A Hugging Face checkpoint as canonical tensors, and canonical tensors as a Hugging Face checkpoint; streamed."""

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from ..storage.hashing import HashingFile, Ledger
from ..storage.progress import Progress, Say
from ..storage.safe_load import open_weights
from ..storage.safetensors_io import Spec, bytes_of, main_dtype, plan_shards, write_header, write_index
from .errors import BridgeError
from .family import Family, Row
from .mapping import hf_dtype, hf_shapes, mcore_dtype, mcore_shape

_SCALE = "_scale_inv"  # what DeepSeek appends to the name of an fp8 weight for its scales, a block of 128 x 128 each
_FUSED = re.compile(r"(?P<experts>.*\.experts)\.(?P<kind>gate_up_proj|down_proj)")


class _Stored(NamedTuple):
    """Where a tensor's elements lie: from ``start`` on in the tensor ``name``; ``scale`` names its scales, if any."""

    name: str
    start: int
    shape: tuple[int, ...]
    scale: str | None = None


class HFCheckpoint:
    """The canonical tensors of a folder that ``from_pretrained`` loads; use it as a context manager.

    Experts may be stored one by one or fused, weights in DeepSeek's block-scaled fp8 (they come out in bf16). Raises
    BridgeError when a tensor of the table is missing, one on disk is in no table, or a copy differs from its original.
    """

    def __init__(self, folder: Path, config: Mapping[str, Any], family: Family) -> None:
        self.folder = folder
        self.said: list[str] = []
        self._weights = open_weights(folder)
        self.config = family.as_stored(config, self._weights, hf=True)
        if self.config != config:
            self.said.append(
                "config.json and the files differ in layers that predict further tokens: what the files hold counts"
            )
        self.rows = {row.mcore: row for row in family.rows(self.config)}
        self._parts: dict[str, _Stored] = {}
        for name, place in self._stored():
            own = family.spelled(name)
            if own in self._parts:
                raise BridgeError(f"{folder}: {place.name} is {own}, which {self._parts[own].name} is too")
            self._parts[own] = place
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._check_names(family)
        for name, row in self.rows.items():
            try:
                self.shapes[name] = mcore_shape(row.rule, tuple(self._parts[part].shape for part in row.hf))
            except BridgeError as error:
                raise BridgeError(f"{folder}: {', '.join(row.hf)}: {error}") from None
            kinds = {self._dtype(part) for part in row.hf}
            if len(kinds) > 1:
                raise BridgeError(f"{folder}: {', '.join(row.hf)} become one tensor, but have the types {kinds}")
            self.dtypes[name] = mcore_dtype(row.rule, kinds.pop())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._weights.__exit__(kind, error, where)

    def get(self, name: str) -> torch.Tensor:
        """One canonical tensor. Raises BridgeError when a part of it is not finite."""
        row = self.rows[name]
        parts = [self._part(part) for part in row.hf]
        try:
            return row.rule.to_mcore(parts)
        except BridgeError as error:
            raise BridgeError(f"{self.folder}: {row.hf[0]}: {error}") from None

    def check_copies(self) -> None:
        """Raise BridgeError when a tensor that repeats another one is not equal to it; reads both."""
        for name, other in self._copies.items():
            if name in self._parts and not self._part(name).equal(self._part(other)):
                raise BridgeError(f"{self.folder}: {name} should repeat {other}, but differs from it")

    def _part(self, name: str) -> torch.Tensor:
        place = self._parts[name]
        values = self._weights.view(place.name, place.start, place.start + math.prod(place.shape)).view(place.shape)
        if place.scale:
            values = _scaled(values, self._weights.get(place.scale), name)
        elif values.is_floating_point() and not math.isfinite(sum(map(float, values.aminmax()))):
            raise BridgeError(f"{self.folder}: {name} holds values that are not finite")
        return values

    def _dtype(self, name: str) -> torch.dtype:
        place = self._parts[name]
        return torch.bfloat16 if place.scale else self._weights.dtypes[place.name]

    def _stored(self) -> Iterator[tuple[str, _Stored]]:
        """Every part on disk by the name that tables use: of fused experts one by one."""
        for name, shape in self._weights.shapes.items():
            found = _FUSED.fullmatch(name)
            if found is None or len(shape) != 3:  # noqa: PLR2004
                if not name.endswith(_SCALE):
                    yield name, _Stored(name, 0, shape, name + _SCALE if name + _SCALE in self._weights else None)
                continue
            count, rows, cols = shape
            kinds = ("gate_proj", "up_proj") if found["kind"] == "gate_up_proj" else ("down_proj",)
            rows //= len(kinds)
            for number in range(count * len(kinds)):
                expert, kind = divmod(number, len(kinds))
                part = f"{found['experts']}.{expert}.{kinds[kind]}.weight"
                yield part, _Stored(name, number * rows * cols, (rows, cols))

    def _check_names(self, family: Family) -> None:
        """Every tensor on disk has one place, and every place a tensor."""
        wanted = {part for row in self.rows.values() for part in row.hf}
        if missing := sorted(wanted - self._parts.keys()):
            raise BridgeError(f"{self.folder}: {len(missing)} tensors are missing, the first is {missing[0]}")
        self._copies = family.copies(self.config) | family.tied(self.config)
        left = self._parts.keys() - wanted - self._copies.keys()
        dropped = {name for name in left if name.endswith(family.computed)}
        if unknown := sorted(left - dropped):
            raise BridgeError(
                f"{self.folder}: {len(unknown)} tensors are in no table of family {family.name}, the first is {unknown[0]}"
            )
        if dropped:
            self.said.append(f"{len(dropped)} computed buffers are left out, the first is {min(dropped)}")


def write_hf(
    folder: Path,
    rows: Sequence[Row],
    copies: Mapping[str, str],
    specs: Mapping[str, Spec],
    get: Callable[[str], torch.Tensor],
    *,
    max_bytes: int,
    workers: int = 2,
    say: Say = print,
) -> dict[str, dict[str, Any]]:
    """Write canonical tensors as safetensors shards with the names of Hugging Face; the manifest's entries.

    ``specs`` are the canonical tensors by name, ``copies`` what is stored twice. Parts of one tensor are written one after
    the other, so that ``get`` is asked once for each, but for the originals of copies.
    """
    source: dict[str, tuple[Row, int]] = {}
    tensors: list[Spec] = []
    main = main_dtype(
        {name: spec.shape for name, spec in specs.items()}, {name: spec.dtype for name, spec in specs.items()}
    )
    for row in rows:
        spec = specs[row.mcore]
        for number, (name, shape) in enumerate(zip(row.hf, hf_shapes(row.rule, spec.shape), strict=True)):
            source[name] = row, number
            tensors.append(Spec(name, hf_dtype(row.rule, spec.dtype, main), shape))
    by_name = {spec.name: spec for spec in tensors}
    for name, other in copies.items():
        if other in source:
            source[name] = source[other]
            tensors.append(by_name[other]._replace(name=name))
    ledger = Ledger(folder)
    shards = plan_shards(tensors, max_bytes)

    def one(item: tuple[str, Sequence[Spec]]) -> None:
        name, shard = item
        last: tuple[str, list[torch.Tensor]] = ("", [])

        def fill(stream: HashingFile) -> None:
            nonlocal last
            write_header(stream, shard)
            for spec in shard:
                row, number = source[spec.name]
                if last[0] != row.mcore:
                    last = ("", [])  # before the next is read: two are never in memory
                    last = row.mcore, row.rule.to_hf(get(row.mcore))
                progress.advance(stream.write(bytes_of(last[1][number].to(spec.dtype))))

        ledger.write(folder / name, fill)

    size = sum(spec.size for spec in tensors)
    with ThreadPoolExecutor(workers) as pool, Progress("conversion", size, "written", say) as progress:
        list(pool.map(one, shards.items()))
    write_index(folder, shards, ledger)
    return ledger.entries


def _scaled(values: torch.Tensor, scales: torch.Tensor, name: str, block: int = 128) -> torch.Tensor:
    """Block-scaled fp8 in bf16: each block of 128 x 128 times its scale, in fp32, rounded once."""
    rows, cols = values.shape
    if tuple(scales.shape) != (-(-rows // block), -(-cols // block)):
        raise BridgeError(f"{name}: {tuple(scales.shape)} scales for {rows} x {cols} values in blocks of {block}")
    result = torch.empty(rows, cols, dtype=torch.bfloat16)
    for top in range(0, rows, block):
        across = scales[top // block].float().repeat_interleave(block)[:cols]
        result[top : top + block] = (values[top : top + block].float() * across).bfloat16()
    if not math.isfinite(sum(map(float, result.aminmax()))):
        raise BridgeError(f"{name}: holds values that are not finite")
    return result
