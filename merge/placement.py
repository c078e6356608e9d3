"""Where a parameter of the model in memory lies on disk, in whole tensors or in regions of it.

An adapter names parameters as the model class does (``model.layers.0.mlp.experts.gate_up_proj``); a base may hold them
under other names, one tensor an expert, cut or transposed. The truth is transformers' own conversion
(``transformers/core_model_loading.py``), run on a small tensor whose values tell their place. A name that is on disk
as it is asks for none of this, and transformers is not imported.
"""

import difflib
import functools
import math
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.assets import read_json

if TYPE_CHECKING:
    from .memory_model import MemoryModel

STACK = 3  # dimensions of the weights of all experts


class PlacementError(ValueError):
    """A parameter has no place in the base on disk; the message names it."""


@dataclass(frozen=True, slots=True)
class Part:
    """A two-dimensional region of a parameter in memory and the tensor on disk that holds it.

    ``expert`` is the index on the first dimension of a 3-D parameter; None for other parameters, and when the tensor on
    disk is three-dimensional too and holds this region of every expert. ``rows`` and ``cols`` always have numbers for
    start and stop; a vector is one column, and all dimensions after the first are columns. ``transposed``: the tensor on
    disk is the transposed region (its last two dimensions are swapped).
    """

    name: str
    expert: int | None
    rows: slice
    cols: slice
    transposed: bool = False

    def fits(self, stored: tuple[int, ...], shape: tuple[int, ...]) -> bool:
        """Whether a tensor on disk of shape ``stored`` can hold this region of a parameter of ``shape``."""
        matrix = self.rows.stop - self.rows.start, self.cols.stop - self.cols.start
        matrix = matrix[::-1] if self.transposed else matrix
        if len(shape) == STACK and self.expert is None:
            return stored == (shape[0], *matrix)
        return as_matrix(stored) == matrix


class Placement:
    """Answers for one base: ``names`` are those of its tensors on disk, ``base`` is the folder of its config.

    With ``shapes`` (name on disk -> shape) every answer is held against what is on disk, and a stack of experts that is
    stored transposed is told by its shape, as transformers tells it. The model is built once, without storage, when the
    first name asks for it.
    """

    def __init__(
        self,
        base: Path,
        names: Collection[str],
        *,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        trust_remote_code: bool = False,
    ) -> None:
        self.base = base
        self._names = frozenset(names)
        self._shapes = shapes or {}
        self._trust = trust_remote_code

    def parts(self, name: str, shape: tuple[int, ...]) -> list[Part]:
        """Where the parameter ``name`` of ``shape`` lies on disk; every element exactly once.

        Raises PlacementError when it is nowhere, has another shape, or is stored in a way that is no region.
        """
        if name in self._names:
            return self._checked([whole(name, shape)], name, shape)
        memory = self._owner(name)
        if memory is None:
            raise PlacementError(
                f"{name}: neither the base nor its model class has a weight of that name{self._near(name)}"
            )
        if memory.shapes[name] != tuple(shape):
            raise PlacementError(
                f"{name}: the base's config gives it the shape {memory.shapes[name]}, not {tuple(shape)}"
            )
        return self._checked(memory.parts(name), name, shape)

    def fused(self, name: str) -> tuple[str, Part] | None:
        """The fused parameter that the base holds in place of one expert's weight ``name``, and the region it stands for.

        The first is the parameter's name in memory, which ``parts`` takes; the region's ``name`` is the tensor on disk.
        None when the base has a tensor of that name, or no conversion of the model's makes one.
        """
        if name in self._names:
            return None
        for memory in self._models():
            found = memory.fused(name)
            if found is None:
                continue
            parameter, region = found
            stored = self.parts(parameter, memory.shapes[parameter])
            if len(stored) == 1:
                return parameter, replace(region, name=stored[0].name)
        return None

    def is_transposed(self, module: str) -> bool:
        """Whether a module keeps its experts' weights as [experts, in, out] rather than [experts, out, in].

        PEFT asks the module the same (``ParamWrapper.update_layer`` of ``peft/tuners/lora/layer.py``). Raises
        PlacementError when the model has no such module.
        """
        return bool(getattr(self.module(module), "is_transposed", False))

    def is_in_out(self, module: str) -> bool:
        """Whether a module keeps its matrix as [in, out], as transformers' Conv1D of GPT-2 does.

        Raises PlacementError when the model has no such module.
        """
        from transformers.pytorch_utils import Conv1D

        return isinstance(self.module(module), Conv1D)

    def parameters(self, module: str) -> list[tuple[str, tuple[int, ...]]]:
        """Names and shapes of a module's own parameters, in the order in which its class makes them.

        Raises PlacementError when the model has no such module.
        """
        own = self.module(module).named_parameters(recurse=False)
        return [(name, tuple(parameter.shape)) for name, parameter in own]

    def ending(self, end: str, modules: Collection[str]) -> list[str]:
        """Parameters whose names end so, in the class of the base that has all ``modules``; none when no class has them.

        Raises PlacementError when transformers cannot build the model.
        """
        owner = next((memory for memory in self._models() if memory.modules.keys() >= {*modules}), None)
        return [name for name in owner.shapes if f".{name}".endswith(f".{end}")] if owner else []

    def knows(self, name: str) -> bool:
        """Whether the model in memory has a parameter ``name``."""
        return self._owner(name) is not None

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape in memory of the parameter ``name``. Raises PlacementError when the model has none of that name."""
        memory = self._owner(name)
        if memory is None:
            raise PlacementError(f"{name}: the model class of the base has no such parameter")
        return memory.shapes[name]

    def tied(self, names: Collection[str]) -> list[tuple[str, str]]:
        """All pairs of parameters that are one tensor, by the config and the class; none when no pair has one of ``names``.

        The second of a pair is alike in all pairs of a group.
        """
        config = read_json(self.base / "config.json")
        text = config.get("text_config") or {}
        if config.get("tie_word_embeddings") is False and not text.get("tie_word_embeddings"):
            return []
        owner = next((memory for memory in self._models() if not memory.shapes.keys().isdisjoint(names)), None)
        pairs = owner.tied() if owner else []
        return pairs if any({*pair} & {*names} for pair in pairs) else []

    def _models(self) -> Iterator["MemoryModel"]:
        """The classes that an adapter may have been trained on; the second is built only when the first does not do."""
        yield self._model(causal=False)
        if (other := self._model(causal=True)) is not None:
            yield other

    @functools.cache  # noqa: B019 - lives as long as one merge
    def _model(self, *, causal: bool) -> Any:
        from .memory_model import build

        return build(self.base, self._names, causal=causal, trust_remote_code=self._trust)

    def module(self, name: str) -> Any:
        """A module of the model in memory, without storage. Raises PlacementError when the model has no such module."""
        for memory in self._models():
            if name in memory.modules:
                return memory.modules[name]
        raise PlacementError(f"{name}: the model class of the base has no such module")

    def _owner(self, name: str) -> "MemoryModel | None":
        return next((memory for memory in self._models() if name in memory.shapes), None)

    def _checked(self, parts: list[Part], name: str, shape: tuple[int, ...]) -> list[Part]:
        """The parts as they lie on disk, where shapes are known: a stack may lie there with its matrices transposed."""
        result: list[Part] = []
        for part in parts:
            stored = self._shapes.get(part.name)
            turned = replace(part, transposed=not part.transposed)
            if stored is None or part.fits(tuple(stored), shape):
                result.append(part)
            elif len(shape) == STACK and turned.fits(tuple(stored), shape):
                result.append(turned)
            else:
                raise PlacementError(
                    f"{name}: of shape {tuple(shape)}, but the base's {part.name} has the shape {tuple(stored)}"
                )
        return result

    def _near(self, name: str) -> str:
        alike = [known for known in self._names if known.count(".") == name.count(".")]
        close = difflib.get_close_matches(name, alike, n=1)
        return f"; the nearest on disk is {close[0]}" if close else ""


def as_matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """Rows and columns of a parameter that is no stack of experts: the first dimension and all others."""
    return (shape[0] if shape else 1), math.prod(shape[1:])


def whole(name: str, shape: tuple[int, ...]) -> Part:
    """The part that is a whole parameter of ``shape``, stored as it is."""
    rows, cols = shape[1:] if len(shape) == STACK else as_matrix(shape)
    return Part(name, None, slice(0, rows), slice(0, cols))
