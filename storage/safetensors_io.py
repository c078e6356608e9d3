"""Stream a safetensors checkpoint tensor by tensor, in and out.

Reads one file or a sharded checkpoint with its index; writes shards in order with the index that
``from_pretrained`` expects (https://github.com/huggingface/safetensors).
"""

import json
import math
import os
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from functools import cache, partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any, NamedTuple, Self, cast

import torch
from safetensors import safe_open

from .assets import read_json
from .hashing import HashingFile, Ledger
from .manifest import data_start, safetensors_header

INDEX_NAME = "model.safetensors.index.json"
SINGLE_NAME = "model.safetensors"


class Checkpoint:
    """The tensors of a safetensors checkpoint on disk, in the order of its files; use it as a context manager.

    Files are memory-mapped and opened once; ``get`` copies one tensor, ``read`` a part of one. ``files`` names others
    than the model's, for example an adapter's. Raises FileNotFoundError when there are no safetensors weights,
    ValueError when the index is wrong (points outside the folder, misses a file or a tensor).
    """

    def __init__(self, folder: Path, files: Sequence[str] | None = None) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._where: dict[str, str] = {}
        self._starts: dict[str, int] = {}  # of each tensor's bytes in its file
        self._open: dict[str, Any] = {}
        self._streams: dict[str, int] = {}
        self._lock = Lock()
        header_of = cache(safetensors_header)  # an index is compared with the headers first
        for name in files or _shard_names(folder, header_of):
            start = data_start(folder / name)
            header = header_of(folder / name)
            _check_places(folder / name, header)
            for key, entry in header.items():
                if key in self._where:
                    raise ValueError(f"{folder / name}: tensor {key} is in {self._where[key]} too")
                self._where[key] = name
                self._starts[key] = start + entry["data_offsets"][0]
                self.shapes[key] = tuple(entry["shape"])
                self.dtypes[key] = _TYPES[entry["dtype"]]

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        for handle in self._open.values():
            handle.__exit__(None, None, None)
        for stream in self._streams.values():
            os.close(stream)
        self._open.clear()
        self._streams.clear()

    def __contains__(self, key: str) -> bool:
        return key in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def loaded_with(self, key: str) -> None:
        """The file that is read into memory whole for one tensor of it (``safe_load.BinCheckpoint``): here none is."""
        del key

    def get(self, key: str) -> torch.Tensor:
        """One tensor on the CPU in its stored dtype. Raises KeyError when there is none of that name."""
        name = self._where[key]
        with self._lock:
            if name not in self._open:
                self._open[name] = safe_open(self.folder / name, framework="pt").__enter__()
        return self._open[name].get_tensor(key)

    def view(self, key: str, start: int, stop: int) -> torch.Tensor:
        """As ``read``, but as a view of the file, which costs no memory of its own; not to be written to."""
        return self.get(key).view(-1)[start:stop]

    def read(self, key: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of a tensor seen flat, shape [stop - start], in its stored dtype.

        They are read into memory, not mapped: a part that is used once is faster so. Several threads may read.
        """
        name, dtype = self._where[key], self.dtypes[key]
        with self._lock:
            if name not in self._streams:
                self._streams[name] = os.open(self.folder / name, os.O_RDONLY)
        data = torch.empty(stop - start, dtype=dtype)
        rest = data.view(torch.uint8).numpy().data
        place = self._starts[key] + start * dtype.itemsize
        while rest:
            got = os.preadv(self._streams[name], [rest], place)
            if not got:
                raise ValueError(f"{self.folder / name}: the file was cut while it was read")
            rest, place = rest[got:], place + got
        return data


class Spec(NamedTuple):
    """A tensor that will be written."""

    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def size(self) -> int:
        """Bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def plan_shards(tensors: Iterable[Spec], max_bytes: int) -> dict[str, list[Spec]]:
    """Which file holds which tensors, in the order given: file name -> tensors in the order of their bytes.

    Files have at most ``max_bytes`` of tensors; a larger tensor gets one of its own. One file alone is
    ``model.safetensors``. Within a file the order given stays, but for wide types, which come first.
    """
    shards: list[list[Spec]] = [[]]
    size = 0
    for spec in tensors:
        if shards[-1] and size + spec.size > max_bytes:
            shards.append([])
            size = 0
        shards[-1].append(spec)
        size += spec.size
    return {_shard_name(number, len(shards)): _ordered(shard) for number, shard in enumerate(shards)}


def write_header(stream: HashingFile, tensors: Sequence[Spec]) -> None:
    """Begin a safetensors file whose tensors' bytes follow in this order; nothing is between them.

    Raises ValueError for an empty tensor: no model has one, but a partitioned weight looks like one.
    """
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for spec in tensors:
        if not spec.size:
            raise ValueError(f"tensor {spec.name} is empty {spec.shape}: it was not gathered from the ranks")
        if spec.dtype not in _DTYPES:
            raise ValueError(f"tensor {spec.name}: the safetensors format has no type {spec.dtype}")
        start, end = end, end + spec.size
        header[spec.name] = {"dtype": _DTYPES[spec.dtype], "shape": list(spec.shape), "data_offsets": [start, end]}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    stream.write(len(text).to_bytes(8, "little") + text)


def write_index(folder: Path, shards: Mapping[str, Sequence[Spec]], ledger: Ledger) -> None:
    """Write the index that ``from_pretrained`` expects beside several shards; nothing beside a single one."""
    if len(shards) == 1:
        return
    total = sum(spec.size for specs in shards.values() for spec in specs)
    weight_map = {spec.name: name for name, specs in shards.items() for spec in specs}
    text = json.dumps({"metadata": {"total_size": total}, "weight_map": weight_map}, indent=1) + "\n"
    ledger.write(folder / INDEX_NAME, lambda stream: stream.write(text.encode()))


def bytes_of(tensor: torch.Tensor) -> memoryview:
    """The bytes of a tensor on any device, in row-major order."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data


def write_tensors(stream: HashingFile, tensors: Mapping[str, torch.Tensor]) -> None:
    """Write one safetensors file: the same bytes as ``safetensors.torch.save_file`` with ``{"format": "pt"}``.

    Raises ValueError for an empty tensor, see ``write_header``.
    """
    specs = _ordered(Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in sorted(tensors.items()))
    write_header(stream, specs)
    for spec in specs:
        stream.write(bytes_of(tensors[spec.name]))


# The names of the format in the order of its reader's enumeration, which is the order of its writer.
_DTYPES = {
    torch.bool: "BOOL", torch.uint8: "U8", torch.int8: "I8", torch.float8_e5m2: "F8_E5M2", torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e8m0fnu: "F8_E8M0", torch.float8_e4m3fnuz: "F8_E4M3FNUZ", torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
    torch.int16: "I16", torch.uint16: "U16", torch.float16: "F16", torch.bfloat16: "BF16", torch.int32: "I32",
    torch.uint32: "U32", torch.float32: "F32", torch.complex64: "C64", torch.float64: "F64", torch.int64: "I64",
    torch.uint64: "U64",
}  # fmt: skip


_ORDER = {dtype: number for number, dtype in enumerate(_DTYPES)}
_TYPES = {name: dtype for dtype, name in _DTYPES.items()}


def _ordered(tensors: Iterable[Spec]) -> list[Spec]:
    """Wide types first: then every tensor lies at a multiple of its own width, whatever stands before it."""
    return sorted(tensors, key=lambda spec: -_ORDER.get(spec.dtype, 0))


def _check_places(path: Path, header: Mapping[str, Any]) -> None:
    """Raise ValueError when tensors have not the bytes of their shapes, or overlap, or leave a gap.

    The format's own reader does the same; ``read`` would take them from whatever lies there.
    """
    end = 0
    for key, entry in sorted(header.items(), key=lambda item: item[1]["data_offsets"]):
        kind, shape = entry.get("dtype"), entry.get("shape")
        if kind not in _TYPES:
            raise ValueError(f"{path}: tensor {key} has the unknown type {kind}")
        if not isinstance(shape, list) or not all(
            isinstance(side, int) and side >= 0 for side in cast("list[Any]", shape)
        ):
            raise ValueError(f"{path}: tensor {key} has the shape {shape}")
        start, end = end, end + math.prod(cast("list[int]", shape)) * _TYPES[kind].itemsize
        if entry["data_offsets"] != [start, end]:
            raise ValueError(
                f"{path}: tensor {key}, {kind} {shape}, lies at {entry['data_offsets']}, expected is {[start, end]}; the "
                "header is damaged"
            )


def _shard_name(number: int, count: int) -> str:
    return SINGLE_NAME if count == 1 else f"model-{number + 1:05d}-of-{count:05d}.safetensors"


def main_dtype(shapes: Mapping[str, tuple[int, ...]], dtypes: Mapping[str, torch.dtype]) -> torch.dtype:
    """The floating-point type that most of a model's bytes have; fp32 when it has none."""
    sizes: dict[torch.dtype, int] = {}
    for name, dtype in dtypes.items():
        if dtype.is_floating_point:
            sizes[dtype] = sizes.get(dtype, 0) + math.prod(shapes[name]) * dtype.itemsize
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)


class ShardWriter:
    """Writes tensors into numbered shards of at most ``max_bytes`` and then the index; call ``close`` at the end.

    A checkpoint that fits into one shard becomes ``model.safetensors`` without an index. A single tensor larger than
    ``max_bytes`` gets a shard of its own. Of several ranks that are given the same tensors in the same order each writes
    every ``world``-th shard, in the background, while the next one is gathered; in memory is one shard of its own. With a
    patient ledger the last one may still be under way after ``close``.
    """

    def __init__(self, folder: Path, max_bytes: int, ledger: Ledger, *, rank: int = 0, world: int = 1) -> None:
        self.folder = folder
        self.max_bytes = max_bytes
        self._ledger = ledger
        self._rank, self._world = rank, world
        self._pending: dict[str, torch.Tensor] = {}
        self._names: list[str] = []
        self._bytes = 0
        self._shards: list[list[str]] = []
        self._seen: set[str] = set()
        self._total = 0

    def add(self, key: str, tensor: torch.Tensor) -> None:
        """Take one tensor; earlier ones are written out when the shard is full.

        On another rank than the one that writes it the tensor's content is not looked at. Raises ValueError on a
        repeated name.
        """
        if key in self._seen:
            raise ValueError(f"tensor {key} is written twice")
        self._seen.add(key)
        size = tensor.numel() * tensor.element_size()
        if self._names and self._bytes + size > self.max_bytes:
            self._flush()
        if self._is_mine(len(self._shards)):
            self._ledger.settle()
            self._pending[key] = tensor.detach().cpu()
        self._names.append(key)
        self._bytes += size
        self._total += size

    def close(self) -> None:
        """Write what is pending, give the shards their final names and, on rank 0, write the index."""
        if self._names or not self._shards:
            self._flush()
        self._ledger.later(self._complete)
        if not self._ledger.patient:
            self._ledger.settle()

    def _complete(self) -> None:
        count = len(self._shards)
        weight_map: dict[str, str] = {}
        for number, keys in enumerate(self._shards):
            name = _shard_name(number, count)
            if self._is_mine(number):
                self._ledger.rename(self._shard_path(number), self.folder / name)
            weight_map |= dict.fromkeys(keys, name)
        if count > 1 and self._rank == 0:
            index = {"metadata": {"total_size": self._total}, "weight_map": weight_map}
            text = json.dumps(index, indent=1) + "\n"
            self._ledger.write(self.folder / INDEX_NAME, lambda stream: stream.write(text.encode()))

    def _is_mine(self, number: int) -> bool:
        return number % self._world == self._rank

    def _shard_path(self, number: int) -> Path:
        return self.folder / f"shard-{number:05d}.safetensors"

    def _flush(self) -> None:
        if self._is_mine(len(self._shards)):
            self._ledger.later(partial(self._write, self._shard_path(len(self._shards)), self._pending))
            self._pending = {}
        self._shards.append(self._names)
        self._names, self._bytes = [], 0

    def _write(self, path: Path, tensors: dict[str, torch.Tensor]) -> None:
        self._ledger.write(path, lambda stream: write_tensors(stream, tensors))


def _shard_names(folder: Path, header_of: Callable[[Path], Collection[str]]) -> list[str]:
    """The weight files of a checkpoint in the index's order; a single file wins over an index, as in transformers."""
    if (folder / SINGLE_NAME).is_file():
        return [SINGLE_NAME]
    if (folder / INDEX_NAME).is_file():
        return indexed_files(folder / INDEX_NAME, header_of)
    kinds = sorted({path.suffix for path in folder.iterdir() if path.suffix in (".bin", ".pt", ".pth")})
    hint = f" (found {', '.join(kinds)}; load and save the model once with safetensors)" if kinds else ""
    raise FileNotFoundError(f"{folder}: no {SINGLE_NAME} and no {INDEX_NAME}{hint}")


def indexed_files(index: Path, tensors_of: Callable[[Path], Collection[str]]) -> list[str]:
    """Names of the weight files of an index, in its order; ``tensors_of`` tells the names of the tensors in a file.

    Raises FileNotFoundError for a missing file, ValueError when the index points outside its folder, lists a tensor that
    no file holds, or does not list one that a file holds.
    """
    weight_map: Any = read_json(index).get("weight_map")
    if (
        not isinstance(weight_map, dict)
        or not weight_map
        or not all(isinstance(name, str) for name in weight_map.values())
    ):
        raise ValueError(f"{index}: no weight_map that names the file of every tensor")
    names: list[str] = list(dict.fromkeys(weight_map.values()))
    for name in names:
        if Path(name).name != name:
            raise ValueError(f"{index}: weight_map points outside the folder: {name!r}")
        if not (index.parent / name).is_file():
            raise FileNotFoundError(f"{index.parent / name}: listed in {index.name} but missing")
    stored = {key: name for name in names for key in tensors_of(index.parent / name)}
    if lost := sorted(weight_map.keys() - stored):
        raise ValueError(f"{index}: {len(lost)} tensors are in no file, the first is {lost[0]}")
    if extra := sorted(stored.keys() - weight_map):
        raise ValueError(f"{index.parent / stored[extra[0]]}: tensor {extra[0]} is not listed in {index.name}")
    return names
