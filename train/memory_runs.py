"""Many equal layers behind one another cost what three of them tell: the first, the last and one for all between.

Two passes, with all layers recomputed and with none, tell every number between: up to the backward of the recomputed
layers everything is as without them, less what they do not keep, and from there on as with all of them.
"""

from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Any, cast

import torch
from torch import nn

from .memory import Activations, Batch, Moment, Pass, one_pass
from .recompute import checkpointed_layers, kinds_of

_SHOWN = 3  # layers of a run that are computed


@dataclass(frozen=True)
class Short:
    """What was cut: for each layer that is left its number in the whole model, those that it stands for, and its name.

    ``names`` are those of all layers of the whole model.
    """

    numbers: Sequence[int]
    behind: Sequence[Sequence[int]]
    left: Sequence[str]
    names: Sequence[str]

    def whole(self, found: Pass) -> Pass:
        """The pass of the whole model, from that of the short one."""
        kept = [0] * len(self.names)
        for number, others, size in zip(self.numbers, self.behind, found.kept, strict=True):
            for place in (number, *others):
                kept[place] = size
        return Pass(list(self._moments(found)), kept)

    def _moments(self, found: Pass) -> Iterator[Moment]:
        """Backward's moments, from the head down; above a layer all is held that the lacking ones below it kept."""
        lacking = [size * len(others) for size, others in zip(found.kept, self.behind, strict=True)]
        below = sum(lacking)
        for layer, group in groupby(found.moments, key=lambda moment: moment.layer):
            moments = list(group)
            if layer is None:  # above all layers, or below them
                yield from (replace(moment, peak=moment.peak + below) for moment in moments)
                continue
            below = sum(lacking[:layer])
            for number in (*reversed(self.behind[layer]), self.numbers[layer]):
                more = below + found.kept[layer] * (number - self.numbers[layer])
                for moment in moments:
                    name = moment.name.replace(self.left[layer], self.names[number], 1)
                    yield Moment(name, moment.numel, number, moment.peak + more)


@contextmanager
def shortened(model: Any) -> Generator[Short]:
    """Within it the model has only three of many equal layers behind one another."""
    layers = checkpointed_layers(model)
    names = [_name(model, layer) for layer in layers]
    numbers: list[int] = []
    behind: list[list[int]] = []
    for _, group in groupby(range(len(layers)), key=kinds_of(layers).__getitem__):
        run = list(group)
        left = run if len(run) <= _SHOWN else [run[0], run[1], run[-1]]
        numbers += left
        behind += [run[2:-1] if number == run[1] and len(run) > _SHOWN else [] for number in left]
    gone = {id(layers[number]) for others in behind for number in others}
    lists = [
        (module, name, child)
        for module in model.modules()
        for name, child in module.named_children()
        if isinstance(child, nn.ModuleList) and any(id(layer) in gone for layer in child)
    ]
    for module, name, child in lists:
        setattr(module, name, nn.ModuleList(layer for layer in child if id(layer) not in gone))
    try:
        yield Short(numbers, behind, [_name(model, layers[number]) for number in numbers], names)
    finally:
        for module, name, child in lists:
            setattr(module, name, cast("Any", child))


def _name(model: nn.Module, layer: nn.Module) -> str:
    """How the names of a layer's parameters begin."""
    return next(f"{name}." for name, module in model.named_modules() if module is layer)


def activations(model: Any, batch: Batch, *, autocast: torch.dtype | None = None) -> Activations:
    """Both passes of a model made by ``memory.without_data``, which is left in training mode. Raises UnknownMemoryError."""
    with shortened(model) as short:
        plain, recomputed = (one_pass(model, batch, recompute=way, autocast=autocast) for way in (False, True))
    return Activations(short.whole(plain), short.whole(recomputed))
