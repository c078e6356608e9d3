"""Stream a safetensors checkpoint tensor by tensor, in and out.

Reads one file or a sharded checkpoint with its index; writes shards in order with the index that
``from_pretrained`` expects (https://github.com/huggingface/safetensors).
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from safetensors import safe_open
from safetensors.torch import save_file

from .assets import read_json
from .manifest import safetensors_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Checkpoint:
    """The tensors of a safetensors checkpoint on disk, in the order of its files; use it as a context manager.

    Files are memory-mapped and opened once; ``get`` copies one tensor. Raises FileNotFoundError when there are no
    safetensors weights, ValueError when the index is wrong (points outside the folder, misses a file or a tensor).
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._where: dict[str, str] = {}
        self._open: dict[str, Any] = {}
        for name in _shard_names(folder):
            for key, entry in safetensors_header(folder / name).items():
                if key in self._where:
                    raise ValueError(f"{folder / name}: tensor {key} is in {self._where[key]} too")
                self._where[key] = name
                self.shapes[key] = tuple(entry["shape"])

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        self._open.clear()

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def get(self, key: str) -> torch.Tensor:
        """One tensor on the CPU in its stored dtype. Raises KeyError when there is none of that name."""
        name = self._where[key]
        if name not in self._open:
            self._open[name] = safe_open(self.folder / name, framework="pt").__enter__()
        return self._open[name].get_tensor(key)


class ShardWriter:
    """Writes tensors into numbered shards of at most ``max_bytes`` and then the index; call ``close`` at the end.

    A checkpoint that fits into one shard becomes ``model.safetensors`` without an index. A single tensor larger than
    ``max_bytes`` gets a shard of its own.
    """

    def __init__(self, folder: Path, max_bytes: int) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._pending: dict[str, torch.Tensor] = {}
        self._pending_bytes = 0
        self._shards: list[list[str]] = []
        self._seen: set[str] = set()
        self._total = 0

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Take one tensor; earlier ones are written out when the shard is full. Raises ValueError on a repeated name."""
        if key in self._seen:
            raise ValueError(f"tensor {key} is written twice")
        self._seen.add(key)
        size = tensor.numel() * tensor.element_size()
        if self._pending and self._pending_bytes + size > self.max_bytes:
            self._flush()
        self._pending[key] = tensor.contiguous()
        self._pending_bytes += size
        self._total += size

    def close(self) -> None:
        """Write what is pending, give the shards their final names and write the index."""
        if self._pending or not self._shards:
            self._flush()
        count = len(self._shards)
        if count == 1:
            self._shard_path(0).rename(self.folder / SINGLE_NAME)
            return
        weight_map: dict[str, str] = {}
        for number, keys in enumerate(self._shards):
            name = f"model-{number + 1:05d}-of-{count:05d}.safetensors"
            self._shard_path(number).rename(self.folder / name)
            weight_map |= dict.fromkeys(keys, name)
        index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
        (self.folder / INDEX_NAME).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _flush(self) -> None:
        save_file(self._pending, self._shard_path(len(self._shards)), metadata={"format": "pt"})
        self._shards.append(list(self._pending))
        self._pending, self._pending_bytes = {}, 0


def parse_size(text: str) -> int:
    """Bytes from ``5GB``, ``200MB``, ``64KB`` or a plain number. Raises ValueError on anything else."""
    units = {"KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12, "B": 1}
    value = text.strip().upper()
    unit = next((unit for unit in units if value.endswith(unit)), "")
    factor = units.get(unit, 1)
    try:
        size = int(float(value.removesuffix(unit)) * factor)
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not a size; write for example 5GB or 200MB") from None
    if size <= 0:
        raise ValueError(f"{text!r} is not a positive size")
    return size


def _shard_names(folder: Path) -> list[str]:
    """The weight files of a checkpoint in the index's order; a single file wins over an index, as in transformers."""
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    index_path = folder / INDEX_NAME
    if index_path.is_file():
        weight_map: dict[str, str] = read_json(index_path).get("weight_map", {})
        names = list(dict.fromkeys(weight_map.values()))
        for name in names:
            if Path(name).name != name:
                raise ValueError(f"{index_path}: weight_map points outside the folder: {name!r}")
            if not (folder / name).is_file():
                raise FileNotFoundError(f"{folder / name}: listed in {INDEX_NAME} but missing")
        stored = {key for name in names for key in safetensors_header(folder / name)}
        if lost := sorted(set(weight_map) - stored):
            raise ValueError(f"{index_path}: {len(lost)} tensors are in no file, the first is {lost[0]}")
        return names
    kinds = sorted({path.suffix for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")})
    hint = f" (found {', '.join(kinds)}; load and save the model once with safetensors)" if kinds else ""
    raise FileNotFoundError(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}{hint}")
