"""The model of a base without storage, and how transformers carries its parameters to the tensors on disk.

The reverse of a conversion only cuts, turns and renames. So it is run on a probe, a small tensor of numbers that tell
their place, and the numbers in what comes out tell which region of the parameter each tensor on disk holds.
"""

import functools
import re
from collections import defaultdict
from collections.abc import Collection, Generator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

from ..storage.assets import read_json
from .placement import STACK, Part, PlacementError, as_matrix, whole

_SIDE = 24  # rows and columns of a probe: a dimension that is cut into 2, 3, 4, 6 or 8 is cut evenly


def build(base: Path, names: Collection[str], *, causal: bool, trust_remote_code: bool) -> "MemoryModel | None":
    """The model of ``base`` on the meta device: of the class that its config names, or with ``causal`` the language model.

    They differ for some models of pictures and text, which ``AutoModelForCausalLM`` trains without the pictures; where
    they do not, ``causal`` gives None. Raises PlacementError when transformers cannot build it.
    """
    try:
        config = AutoConfig.from_pretrained(base, trust_remote_code=trust_remote_code)
        own_code = trust_remote_code and getattr(config, "auto_map", None)
        kinds = (getattr(transformers, kind, None) for kind in (not own_code and config.architectures) or ())
        named = next((kind for kind in kinds if kind is not None), None)
        if causal and (named is None or MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), named) is named):
            return None
        with torch.device("meta"):
            if named is not None and not causal:
                model = named(config)
            else:
                model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
    except Exception as error:
        code = not trust_remote_code and "auto_map" in read_json(base / "config.json")
        hint = "; it comes with Python code of its own: read it, then allow it with --trust_remote_code" if code else ""
        raise PlacementError(f"{base}: transformers cannot build this model from its config: {error}{hint}") from error
    return MemoryModel(model, names)


class MemoryModel:
    """A model without storage and the tensors on disk that it loads.

    ``shapes`` are those of its parameters and buffers, ``modules`` its modules, by name.
    """

    def __init__(self, model: Any, names: Collection[str]) -> None:
        self._model = model
        state = model.state_dict()
        self.shapes = {name: tuple(tensor.shape) for name, tensor in state.items()}
        self.modules: dict[str, Any] = dict(model.named_modules())
        self._on_disk: dict[str, set[str]] = defaultdict(set)
        conversions = get_model_conversion_mapping(model)
        renamings, converters = _kinds(conversions)
        targets = {pattern: entry.target_patterns for entry in converters for pattern in entry.source_patterns}
        for name in sorted(names, key=dot_natural_key):
            own, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
            first, *others = targets[pattern] if pattern is not None else [own]
            for target in (first, *others):  # the converter names the first of several
                self._on_disk[own.replace(first, target)].add(name)
        # As after from_pretrained: what was used to read these names is what gives them back.
        self._used = [conversion for conversion in conversions if conversion.was_used()]

    def parts(self, name: str) -> list[Part]:
        """The regions of the parameter ``name`` and the tensors on disk that hold them. Raises PlacementError."""
        held = self._on_disk.get(name)
        if not held:
            raise PlacementError(f"{name}: the base on disk holds none of this weight{self._tie(name)}")
        together = self._stored_shapes(_layer(name))
        parts: list[Part] = []
        for made, region in self._regions(name, used=True).items():
            if made not in together or not region.fits(together[made], self.shapes[name]):
                raise PlacementError(
                    f"{name}: on disk it lies in {made}, but not as a region of its own; that is not handled"
                )
            parts.append(replace(region, name=self._known(made, held, name)))
        if len({part.name for part in parts}) != len(held):
            lost = min(held - {part.name for part in parts})
            raise PlacementError(
                f"{name}: {lost} belongs to it, but transformers' reverse conversion does not give it back"
            )
        return parts

    def fused(self, name: str) -> tuple[str, Part] | None:
        """The parameter that the weight ``name`` of one expert is read into, and its region, by any conversion known."""
        renamings, converters = _kinds(self._known_conversions())
        own, pattern = rename_source_key(name, renamings, converters)
        if pattern is None or own not in self.shapes:
            return None
        region = self._regions(own, used=False).get(name)
        return (own, region) if region is not None else None

    def tied(self) -> list[tuple[str, str]]:
        """Pairs of parameters that are one tensor; the second is alike in all of a group."""
        return list(self._model.all_tied_weights_keys.items())

    def _tie(self, name: str) -> str:
        other = dict(self.tied()).get(name)
        return f"; it is tied to {other}" if other else ""

    def _known(self, made: str, held: set[str], name: str) -> str:
        """The name on disk that ``made`` stands for: the same, or with the base model's prefix or without."""
        prefix = f"{self._model.base_model_prefix}."
        for candidate in (made, made.removeprefix(prefix), prefix + made):
            if candidate in held:
                return candidate
        raise PlacementError(f"{name}: {made}, which holds a part of it, is not on disk")

    @functools.cache  # noqa: B019
    def _known_conversions(self) -> list[Any]:
        found = get_model_conversion_mapping(self._model, add_legacy=False)
        return [conversion for conversion in found if not isinstance(conversion, PrefixChange)]

    @functools.cache  # noqa: B019 - lives as long as one merge
    def _stored_shapes(self, layer: str) -> dict[str, tuple[int, ...]]:
        """Shapes on disk of all that is in a layer: tensors that are joined there are only seen together."""
        tensors = {
            name: torch.empty(shape, device="meta") for name, shape in self.shapes.items() if _layer(name) == layer
        }
        return {name: tuple(tensor.shape) for name, tensor in self._reverted(tensors, self._used).items()}

    @functools.cache  # noqa: B019
    def _regions(self, name: str, *, used: bool) -> dict[str, Part]:
        shape = self.shapes[name]
        sides = shape[-2:] if len(shape) <= STACK else shape
        most = _SIDE if len(shape) <= STACK else 2
        small = (*shape[: -len(sides)], *(min(most, side) for side in sides)) if shape else ()
        probe = torch.arange(int(np.prod(small))).reshape(small)
        with self._resized(name, probe):
            made = self._reverted({name: probe}, self._used if used else self._known_conversions())
        arrays = {key: tensor.numpy() for key, tensor in made.items()}
        seen = np.sort(np.concatenate([array.ravel() for array in arrays.values()]))
        regions = {key: _region(array, probe.numpy(), shape) for key, array in arrays.items()}
        if not np.array_equal(seen, np.arange(probe.numel())) or None in regions.values():
            raise PlacementError(
                f"{name}: on disk its values are in another order, not in regions; that is not handled"
            )
        return {key: region for key, region in regions.items() if region is not None}

    def _reverted(self, tensors: dict[str, torch.Tensor], conversions: Sequence[Any]) -> dict[str, torch.Tensor]:
        self._model._weight_conversions = list(conversions)  # noqa: SLF001 - where from_pretrained keeps them
        try:
            return revert_weight_conversion(self._model, tensors)
        except Exception as error:
            name = next(iter(tensors))
            raise PlacementError(f"{name}: transformers' reverse conversion of it fails on a part: {error}") from error

    @contextmanager
    def _resized(self, name: str, probe: torch.Tensor) -> Generator[None]:
        """Inside, the parameter has the probe's shape: some conversions compare with it."""
        owner, _, leaf = name.rpartition(".")
        kept = self.modules[owner]._parameters.get(leaf)  # noqa: SLF001
        if kept is None:
            yield
            return
        self.modules[owner]._parameters[leaf] = torch.nn.Parameter(probe.to("meta"), requires_grad=False)  # noqa: SLF001
        try:
            yield
        finally:
            self.modules[owner]._parameters[leaf] = kept  # noqa: SLF001


def _kinds(conversions: Sequence[Any]) -> tuple[list[Any], list[Any]]:
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    return renamings, [entry for entry in conversions if isinstance(entry, WeightConverter)]


def _layer(name: str) -> str:
    """What holds the tensors that may be joined on disk: the layer, else the module."""
    layer = re.match(r".*?\.\d+(?=\.)", name)
    return layer.group() if layer else name.rpartition(".")[0]


def _region(piece: Any, probe: Any, shape: tuple[int, ...]) -> Part | None:
    """Which region of the parameter of ``shape`` the ``piece`` of its probe is; None when it is none."""
    true, small = whole("", shape), whole("", probe.shape)
    rows, cols = small.rows.stop, small.cols.stop
    stack, expert = probe.reshape(-1, rows, cols), None
    if probe.ndim != STACK:
        piece = piece.reshape(as_matrix(piece.shape))
    if probe.ndim == STACK and piece.ndim == STACK - 1:
        expert = int(piece.flat[0]) // (rows * cols)
        stack = stack[expert : expert + 1]
    piece = piece.reshape(-1, *piece.shape[-2:])
    (top, left), (bottom, right) = (divmod(int(piece.flat[end]) % (rows * cols), cols) for end in (0, -1))
    region = stack[:, top : bottom + 1, left : right + 1]
    transposed = not np.array_equal(piece, region)
    if transposed and not np.array_equal(piece.swapaxes(1, 2), region):
        return None
    down, across = _scaled(top, bottom + 1, rows, true.rows.stop), _scaled(left, right + 1, cols, true.cols.stop)
    return Part("", expert, down, across, transposed)


def _scaled(start: int, stop: int, small: int, true: int) -> slice:
    """A range of the probe's side as one of the true side; where that is not even, the shape on disk does not fit."""
    return slice(start * true // small, stop * true // small)
