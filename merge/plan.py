"""What a merge will write, from file headers and adapters alone: each output tensor, its source and its changes.

Every tensor of every adapter gets exactly one place or the plan fails, before anything is written.
"""

import functools
import math
import re
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import xxhash

from ..storage.safe_load import Weights
from ..storage.safetensors_io import Spec, bytes_of, main_dtype
from .adapter import Adapter, Factors
from .lora_delta import AdapterError, Change, LowRank, Placed
from .placement import Part, Placement, PlacementError
from .targets import lacking

# Elements of a weight that are handled at once: they and what is made of them stay in the processor's cache.
BLOCK = 2**19
_STACK = 3  # dimensions of the weights of all experts in one tensor


class Wanted(NamedTuple):
    """A parameter of the model, its shape, and the change of it (of each expert's matrix when it is a stack)."""

    name: str
    shape: tuple[int, ...]
    experts: Sequence[Change]


@dataclass
class Output:
    """One tensor that is written: what it is, which tensor of the base it comes from, what is added."""

    spec: Spec
    source: str
    placed: list[Placed] = field(default_factory=list[Placed])

    @functools.cached_property
    def square(self) -> float | None:
        """The sum of squares of the change, where it is that of disjoint low-rank products; else None."""
        changes = [item.change for item in self.placed]
        if not self.sole or not all(isinstance(change, LowRank) and change.lengths is None for change in changes):
            return None
        return sum(item.weight**2 * item.change.square() for item in self.placed if isinstance(item.change, LowRank))

    @property
    def sole(self) -> bool:
        """Whether at most one adapter changes it."""
        return len({item.adapter for item in self.placed}) <= 1


@dataclass(frozen=True, slots=True)
class Plan:
    """All outputs in the base's order, what to say, and whether the embeddings are untied."""

    outputs: list[Output]
    said: list[str]
    unties: bool


class Planner:
    """Places the changes of adapters on the tensors of one base."""

    def __init__(
        self,
        base: Weights,
        config: dict[str, Any],
        dtype: torch.dtype,
        *,
        allow_unchanged: bool = False,
        trust_remote_code: bool = False,
    ) -> None:
        self.base = base
        self.allow_unchanged = allow_unchanged
        self.config = config
        self.said: list[str] = []
        self.placement = Placement(base.folder, base.shapes, shapes=base.shapes, trust_remote_code=trust_remote_code)
        for name, stored in base.dtypes.items():
            if stored.is_floating_point and stored.itemsize == 1:
                raise AdapterError(
                    f"{name}: the base is stored in {stored}, numbers that mean nothing without their scales; merge into "
                    "the model in bf16 or fp32 that it was made from"
                )
        own = main_dtype(base.shapes, base.dtypes)
        self.outputs: dict[str, Output] = {}
        for name in base:
            stored = base.dtypes[name]
            keeps = not stored.is_floating_point or own.itemsize < stored.itemsize > dtype.itemsize
            self.outputs[name] = Output(Spec(name, stored if keeps else dtype, base.shapes[name]), name)
        if kept := [
            name for name in base if base.dtypes[name].is_floating_point and self.outputs[name].spec.dtype != dtype
        ]:
            self.said.append(f"{len(kept)} tensors stay {base.dtypes[kept[0]]} as in the base, the first is {kept[0]}")
        self._holder: dict[str, str] = {}  # tied parameter without a tensor of its own -> the tensor that it shares

    def plan(self, adapters: Sequence[Adapter], weights: Sequence[float]) -> Plan:
        """Place everything. Raises AdapterError naming the tensor that has no place."""
        groups = self._tied(adapters)
        changes = [self._changes(adapter) for adapter in adapters]
        unties = self._untie(groups, changes)
        for number, (adapter, weight) in enumerate(zip(adapters, weights, strict=True)):
            with _hint(adapter):
                for wanted in changes[number].values():
                    self._place(wanted, weight, number)
            for name, key in adapter.copies.items():
                self._compare(name, key, adapter)
            self.said += lacking(adapter, self.base, self.placement, allow_unchanged=self.allow_unchanged)
        for output in self.outputs.values():
            if output.placed and not output.spec.dtype.is_floating_point:
                raise AdapterError(
                    f"{output.spec.name}: the base's weight is {output.spec.dtype}, no floating-point weight to add to"
                )
        return Plan(list(self.outputs.values()), self.said, unties)

    # ---- tied embeddings

    def _tied(self, adapters: Sequence[Adapter]) -> list[list[str]]:
        """Groups of parameters that share one tensor, that which is on disk first; none when no adapter changes any."""
        names = {name for adapter in adapters for name in adapter.names}
        sizes = set(_vocabularies(self.config))
        if sizes:
            shared = any((self.base.shapes.get(name) or (*sizes,))[0] in sizes for name in names)
        else:  # embeddings and heads are in no numbered layer
            shared = not all(re.search(r"\.\d+\.", name) for name in names)
        if not shared:
            return []  # so the model's class need not be asked
        groups: dict[str, list[str]] = {}
        for name, source in self.placement.tied(names):
            groups.setdefault(source, [source]).append(name)
        found = [self._shared(group) for group in groups.values() if any(map(self._stored, group))]
        for first, *others in found:
            self._holder |= dict.fromkeys(others, self._stored(first) or first)
        return found

    def _shared(self, group: Sequence[str]) -> list[str]:
        """A tied group without those that the base stores with numbers of their own: transformers does not tie them."""
        first = next((name for name in group if self._stored(name)), group[0])
        others = [name for name in group if name != first]
        return [first, *(name for name in others if not (own := self._stored(name)) or self._equal(own, first))]

    def _untie(self, groups: Sequence[Sequence[str]], changes: Sequence[dict[str, Wanted]]) -> bool:
        """Give tied parameters tensors of their own, unless all adapters change those of a group as one.

        Each starts as the shared one. As the config ties all groups or none, one that is parted parts the others.
        """
        alike = (
            _same(wanted.get(group[0]), wanted.get(name)) for group in groups for name in group for wanted in changes
        )
        parted = not all(alike)
        for name in (name for group in groups for name in group[1:]):
            own, holder = self._stored(name), self._holder[name]
            if parted and not own:
                self.outputs[name] = Output(self.outputs[holder].spec._replace(name=name), holder)
                self.said.append(f"{name} is stored beside {holder} now: they were one tensor, the adapter parts them")
            elif not parted:
                self.outputs.pop(own or name, None)  # some files hold both of a tied pair
                for wanted in changes:
                    wanted.pop(name, None)
        return parted

    def _stored(self, name: str) -> str | None:
        """The tensor on disk that is the parameter ``name``, whole and as it is; None when there is none such."""
        if name in self.base.shapes:
            return name
        if not self.placement.knows(name):
            return None
        shape = self.placement.shape(name)
        try:
            parts = self.placement.parts(name, shape)
        except PlacementError:  # it shares another's tensor
            return None
        return parts[0].name if self.base.shapes[parts[0].name] == shape and not parts[0].transposed else None

    def _equal(self, own: str, other: str) -> bool:
        """Whether two tensors on disk hold the same numbers."""
        source = self._stored(other) or other
        return self.base.shapes[own] == self.base.shapes[source] and self._digest(own) == self._digest(source)

    def _digest(self, name: str) -> bytes:
        """A checksum of a tensor's bytes; one tensor after the other is read, not both at once from two files."""
        digest, count = xxhash.xxh3_128(), math.prod(self.base.shapes[name])
        for start in range(0, count, BLOCK):
            digest.update(bytes_of(self.base.read(name, start, min(start + BLOCK, count))))
        return digest.digest()

    # ---- one adapter

    def _changes(self, adapter: Adapter) -> dict[str, Wanted]:
        """All changes of one adapter, by parameter."""
        with _hint(adapter):
            return {wanted.name: wanted for wanted in self._each_change(adapter)}

    def _each_change(self, adapter: Adapter) -> Iterator[Wanted]:
        by_module: dict[str, list[Factors]] = {}
        for place in sorted(adapter.factors):
            by_module.setdefault(place[0], []).append(adapter.factors[place])
        for module, nested in by_module.items():
            targets = targeted(adapter, module, self.placement)
            if not targets:
                if len(nested) > 1 or nested[0].nested:
                    raise AdapterError(f"{nested[-1].key}: no target_parameters of {adapter.folder} name this module")
                shape = self.base.shapes.get(self._source(f"{module}.weight"), ())
                turned = self._in_out and len(set(shape)) == 1 and self.placement.is_in_out(module)
                yield from (
                    Wanted(name, _vector(change), [change])
                    for name, change in adapter.linear(nested[0], shape, turned=turned)
                )
            elif len(targets) != len(nested):
                raise AdapterError(
                    f"{module}: the adapter changes {len(nested)} parameters of this module, the model's class has "
                    f"{len(targets)} of those that target_parameters names"
                )
            else:
                # Each parameter is wrapped around the one before it, so that the last is the outermost.
                for found, (parameter, shape) in zip(reversed(nested), targets, strict=True):
                    turned = len(shape) == _STACK and self.placement.is_transposed(module)
                    experts = adapter.experts(found, parameter, shape, transposed=turned)
                    yield Wanted(f"{module}.{parameter}", shape, experts)
            for found in nested:
                if found.kinds:
                    raise AdapterError(f"{found.key}: lora_{next(iter(found.kinds))} has no use in this adapter")
        for name in adapter.whole:
            shape, change = adapter.file.shapes[adapter.whole[name]], adapter.replacement(name)
            yield Wanted(name, shape, _experts(change, shape))

    def _source(self, name: str) -> str:
        """The tensor on disk whose numbers the parameter ``name`` starts with; its own name when none is the whole of it."""
        return self._stored(name) or self._holder.get(name, name)

    @functools.cached_property
    def _in_out(self) -> bool:
        """Whether some weight of the base lies as [in, out], told by its bias. Then a square one needs a second look."""
        shapes = self.base.shapes
        return any(
            shape[1:] == shapes.get(f"{name.removesuffix('.weight')}.bias", ()) != shape[:1]
            for name, shape in shapes.items()
            if name.endswith(".weight") and len(shape) == 2  # noqa: PLR2004
        )

    def _place(self, wanted: Wanted, weight: float, number: int) -> None:
        """Put a change on the tensors on disk that hold its parameter. Raises AdapterError, PlacementError."""
        name, shape, experts = wanted
        places: list[tuple[str, Change, int, int]]
        if name in self.outputs and self.outputs[name].spec.shape == shape:
            places = [(name, change, index * change.shape[0], 0) for index, change in enumerate(experts)]
        elif name not in self.outputs and (found := self.placement.fused(name)):
            places = [self._within(*found, experts[0])]
        else:
            places = [
                (part.name, change, 0 if part.expert is not None else index * change.shape[0], 0)
                for part in self.placement.parts(name, shape)
                for index, whole in enumerate(experts)
                if part.expert in (None, index)
                for change in [whole.part(part.rows, part.cols, transposed=part.transposed)]
            ]
        for target, change, top, left in places:
            self.outputs[target].placed.append(Placed(change, top, left, weight, number))

    def _within(self, parameter: str, region: Part, change: Change) -> tuple[str, Change, int, int]:
        """The place of one expert's change inside the tensor that holds all experts."""
        shape = self.placement.shape(parameter)
        (stored,) = self.placement.parts(parameter, shape)
        height, width = change.shape
        change = change.part(slice(0, height), slice(0, width), transposed=region.transposed != stored.transposed)
        rows, cols = (region.cols, region.rows) if stored.transposed else (region.rows, region.cols)
        if change.shape != (rows.stop - rows.start, cols.stop - cols.start):
            raise AdapterError(f"{change.source}: {height} x {width} does not fit into {region.name} {shape}")
        stride = shape[2] if stored.transposed else shape[1]
        return region.name, change, (region.expert or 0) * stride + rows.start, cols.start

    def _compare(self, name: str, key: str, adapter: Adapter) -> None:
        """An adapter's copy of a frozen weight must be the base's own. Raises AdapterError."""
        source = self._source(name)
        if self.base.shapes.get(source) != adapter.file.shapes[key]:
            raise AdapterError(
                f"{name}: the adapter holds a copy {adapter.file.shapes[key]} of this weight, the base's is "
                f"{self.base.shapes.get(source)}"
            )
        count = math.prod(self.base.shapes[source])
        for start in range(0, count, BLOCK):
            stop = min(start + BLOCK, count)
            copy = adapter.file.read(key, start, stop)
            if not copy.equal(self.base.read(source, start, stop).to(copy.dtype)):
                raise AdapterError(f"{name}: the adapter holds a copy of this weight that is not the base's")


def targeted(adapter: Adapter, module: str, placement: Placement) -> list[tuple[str, tuple[int, ...]]]:
    """Parameters of a module that the adapter names itself (``target_parameters``), with shapes, in the class's order."""
    ends = [target.rpartition(".") for target in adapter.config.get("target_parameters") or []]
    named = {parameter for owner, _, parameter in ends if not owner or f".{module}".endswith(f".{owner}")}
    return [(name, shape) for name, shape in placement.parameters(module) if name in named] if named else []


@contextmanager
def _hint(adapter: Adapter) -> Generator[None]:
    """Inside, a name without a place is told with the base that the adapter names."""
    try:
        yield
    except PlacementError as error:
        hint = f"; {adapter.folder} was made for {adapter.made_for}" if adapter.made_for else ""
        raise AdapterError(f"{error}{hint}") from None


def _same(one: Wanted | None, other: Wanted | None) -> bool:
    """Whether an adapter changes two tied weights alike, so that they may stay tied."""
    if one is None or other is None:
        return one is other
    first, second = one.experts[0], other.experts[0]
    if one.shape != other.shape or type(first) is not type(second):
        return False
    rows, cols = first.shape
    step = max(1, BLOCK // cols)
    return all(
        first.of(torch.zeros(stop - start, cols), slice(start, stop)).equal(
            second.of(torch.zeros(stop - start, cols), slice(start, stop))
        )
        for start in range(0, rows, step)
        for stop in [min(start + step, rows)]
    )


def _vocabularies(config: dict[str, Any]) -> Iterator[int]:
    """Every size of a vocabulary in a model's config and the configs of its parts."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _vocabularies(value)
        elif key == "vocab_size" and value:
            yield value


def _vector(change: LowRank) -> tuple[int, ...]:
    """A change's shape as the parameter has it: a bias is a vector."""
    return change.shape[:1] if change.source.endswith(".bias") else change.shape


def _experts(change: Change, shape: tuple[int, ...]) -> list[Change]:
    """A change of a stack of matrices as one of each."""
    if len(shape) != _STACK:
        return [change]
    _, rows, cols = shape
    return [
        change.part(slice(start, start + rows), slice(0, cols), transposed=False)
        for start in range(0, change.shape[0], rows)
    ]
