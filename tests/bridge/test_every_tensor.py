"""Each tensor of each family: one that is absent, has another name or another shape stops the plan, which names it."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge import hf
from finebridge.bridge import source as opening
from finebridge.bridge.convert import Target, plan
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.source import open_source
from finebridge.storage.safe_load import open_weights

from .conftest import MODELS

Models = Callable[[str], Path]
Shapes = dict[str, tuple[int, ...]]


class Headers:
    """What a checkpoint says of itself before any tensor is read."""

    def __init__(self, shapes: Shapes, dtypes: dict[str, torch.dtype]) -> None:
        self.shapes, self.dtypes = shapes, dtypes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __exit__(self, *_: object) -> None: ...


def kinds(shapes: Shapes) -> list[str]:
    """One tensor of each kind: the last of those whose names differ in numbers only."""
    return list({re.sub(r"\.\d+\.", ".", name): name for name in shapes}.values())


def changed(shapes: Shapes, name: str) -> Iterator[tuple[str, Shapes]]:
    rest = {other: shape for other, shape in shapes.items() if other != name}
    yield "dropped", rest
    yield "renamed", rest | {f"{name}x": shapes[name]}
    for axis in range(len(shapes[name])):
        shape = list(shapes[name])
        shape[axis] += 2
        yield f"axis {axis}", rest | {name: tuple(shape)}
    yield "a dimension more", rest | {name: (*shapes[name], 1)}


@pytest.mark.parametrize("name", MODELS)
def test_every_tensor_is_looked_at(name: str, hf_models: Models, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = hf_models(name)
    with open_weights(folder) as weights:
        shapes, dtypes = dict(weights.shapes), dict(weights.dtypes)
    monkeypatch.setattr(opening, "form_of", lambda _: "hf")
    target = Target("torch", allow_patched_attention=True)

    def planned(held: Shapes) -> Any:
        monkeypatch.setattr(
            hf, "open_weights", lambda _: Headers(held, {key: dtypes.get(key, torch.float32) for key in held})
        )
        return plan(open_source(folder), target)

    assert planned(shapes).specs
    for one in kinds(shapes):
        module = one.removesuffix(".weight").removesuffix(".bias").rpartition(".")[0] or one  # a rule has several parts
        for what, held in changed(shapes, one):
            with pytest.raises(BridgeError, match=re.escape(module)):
                pytest.fail(f"{one}, {what}: {planned(held)}")
