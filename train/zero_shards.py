"""Read the fp32 master weights out of DeepSpeed's ZeRO shards, one tensor at a time, without DeepSpeed.

Files are memory-mapped, so the states of the optimizer beside the masters are never read, and unpickled with
``weights_only``: nothing in them can run. Layout: ``deepspeed/utils/zero_to_fp32.py``.
"""

import math
import re
from collections.abc import Sequence
from itertools import accumulate, pairwise
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, Self

import torch

_PARTITIONED = 3  # the ZeRO stage that partitions parameters


class ShardsError(ValueError):
    """The shards are not a whole set of a kind that is known; the message names the folder or file."""


class _Inert(int):
    """Stands for DeepSpeed's own small classes: nothing of them is needed but the number of an enumeration."""

    def __new__(cls, value: Any = 0, *_: Any) -> Self:
        return super().__new__(cls, value if isinstance(value, int) else 0)


_STUBS: list[Any] = [
    (_Inert, f"deepspeed.{name}")
    for name in (
        "runtime.zero.config.ZeroStageEnum", "runtime.fp16.loss_scaler.LossScaler",
        "runtime.fp16.loss_scaler.DynamicLossScaler", "utils.tensor_fragment.fragment_address",
    )
]  # fmt: skip


class ZeroShards:
    """The parameters and buffers in a folder of ZeRO shards (``global_stepN``).

    Raises ShardsError when a rank's file is missing, the stage is unknown or the lengths do not come out even.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        models = [_load(path) for path in _by_rank(folder, "*_model_states.pt")]
        states = [_load(path)["optimizer_state_dict"] for path in _by_rank(folder, "*_optim_states.pt")]
        if not models or not states or "zero_stage" not in states[0]:
            raise ShardsError(f"{folder}: no ZeRO shards there")
        world = states[0]["partition_count"]
        world = max(world) if isinstance(world, list) else world
        if len(states) != world or models[0]["mp_world_size"] != 1:
            raise ShardsError(
                f"{folder}: {len(states)} files of optimizer states; {world} ranks wrote, without tensor parallelism"
            )
        self._first = models[0]
        self._models = models
        self._partitioned = int(states[0]["zero_stage"]) == _PARTITIONED
        self._places: dict[str, tuple[list[list[torch.Tensor]], int, torch.Size]] = {}
        shapes = self._first["param_shapes"]
        if self._partitioned:
            parts = [list(state["fp32_flat_groups"]) for state in states]
            self._place(parts, {name: shape for group in shapes for name, shape in group.items()}, None)
            return
        paddings = states[0].get("param_alignment_paddings") or [None] * len(shapes)
        for number, (group, padding) in enumerate(zip(shapes, paddings, strict=True)):
            parts = [[state["single_partition_of_fp32_groups"][number] for state in states]]
            self._place(parts, group, padding)

    def _place(self, parts: list[list[torch.Tensor]], shapes: dict[str, torch.Size], padding: Any) -> None:
        """Note where each parameter lies: the same range of every list of ``parts``."""
        offset = 0
        for number, (name, shape) in enumerate(shapes.items()):
            self._places[name] = parts, offset, shape
            offset += math.ceil(math.prod(shape) / len(parts)) + (padding[number] if padding else 0)
        if offset > sum(len(part) for part in parts[0]):
            raise ShardsError(f"{self.folder}: the shards are shorter than the parameters that they should hold")

    def get(self, name: str) -> torch.Tensor:
        """One tensor: fp32 when it was trained, else as the model held it. Raises ShardsError when it is not there."""
        name = self._first["shared_params"].get(name, name)
        if name in self._places:
            parts, offset, shape = self._places[name]
            size = math.ceil(math.prod(shape) / len(parts))
            pieces = [piece for part in parts for piece in _range(part, offset, size)]
            return torch.cat(pieces)[: math.prod(shape)].view(shape)
        if name in self._frozen():
            shape = self._first["frozen_param_shapes"][name]
            files = self._models if self._partitioned else self._models[:1]
            pieces = [state["frozen_param_fragments"][name].reshape(-1) for state in files]
            return torch.cat(pieces)[: math.prod(shape)].view(shape)
        if name in self._first["buffer_names"]:
            return self._first["module"][name]
        raise ShardsError(f"{self.folder}: holds no parameter or buffer {name}")

    def _frozen(self) -> dict[str, Any]:
        return self._first.get("frozen_param_fragments") or {}


def _range(parts: Sequence[torch.Tensor], offset: int, size: int) -> list[torch.Tensor]:
    """The pieces that make up ``size`` elements from ``offset`` of all parts one after another."""
    edges = pairwise(accumulate((len(part) for part in parts), initial=0))
    return [
        part[max(0, offset - start) : offset + size - start]
        for part, (start, end) in zip(parts, edges, strict=True)
        if start < offset + size and end > offset
    ]


def _by_rank(folder: Path, pattern: str) -> list[Path]:
    return sorted(folder.glob(pattern), key=lambda path: [int(number) for number in re.findall(r"\d+", path.name)])


def _load(path: Path) -> dict[str, Any]:
    try:
        with torch.serialization.safe_globals(_STUBS):
            return torch.load(path, map_location="cpu", mmap=True, weights_only=True)
    except (RuntimeError, UnpicklingError, EOFError) as error:
        raise ShardsError(f"{path}: not readable as tensors and plain values: {error}") from None
