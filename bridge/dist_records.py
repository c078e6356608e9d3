"""What lies where in a checkpoint of torch.distributed.checkpoint, which Megatron's ``torch_dist`` is.

``.metadata`` (a pickle) tells of every tensor its shape, its type and its chunks, and of every chunk or object the record
that holds it: a complete file of torch.save within a ``.distcp`` file. Nothing here knows a model
(https://github.com/pytorch/pytorch/tree/main/torch/distributed/checkpoint: metadata.py, filesystem.py).
"""

import math
import mmap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..storage.safe_load import UnsafeFileError
from ..storage.safe_pickle import Inert, read_pickle, read_torch, tensor_bytes, typed
from .errors import BridgeError

METADATA_NAME = ".metadata"


class Record(NamedTuple):
    """Where a file of torch.save lies: bytes ``start`` to ``start + length`` of ``file`` in the checkpoint's folder."""

    file: str
    start: int
    length: int


class Chunk(NamedTuple):
    """A box of a tensor, from ``offset`` on, and its record."""

    offset: tuple[int, ...]
    shape: tuple[int, ...]
    record: Record


class Stored(NamedTuple):
    """A tensor as it is stored: its chunks tile its shape (``check_tiling``)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    chunks: list[Chunk]


class Table(NamedTuple):
    """The content of ``.metadata``: tensors, the names of those that were not asked for, and objects."""

    tensors: dict[str, Stored]
    others: list[str]
    objects: dict[str, Record]


def read_metadata(folder: Path, wanted: Callable[[str], bool]) -> Table:
    """What a checkpoint holds, by keys; of tensors that are not ``wanted`` the keys alone.

    Raises BridgeError when the file is absent, broken, unsafe or does not say where something lies.
    """
    path = folder / METADATA_NAME
    try:
        found = read_pickle(path.read_bytes(), path)
    except FileNotFoundError:
        raise BridgeError(
            f"{path}: absent; name the folder of one torch_dist checkpoint (iter_0000010 or release)"
        ) from None
    except UnsafeFileError as error:
        raise BridgeError(str(error)) from None
    try:
        fields = _fields(found)
        records = _records(fields["storage_data"])
        table = Table({}, [], {})
        for key, entry in fields["state_dict_metadata"].items():
            if entry.named.endswith(".BytesStorageMetadata"):
                table.objects[key] = next(iter(records[key].values()))
            elif not wanted(key):
                table.others.append(key)
            else:
                table.tensors[key] = _stored(_fields(entry), records[key], f"{path}: tensor {key}")
    except BridgeError:
        raise
    except Exception as error:  # noqa: BLE001 - what is no metadata at all raises any kind
        raise BridgeError(
            f"{path}: not the metadata of torch.distributed.checkpoint ({type(error).__name__}: {error})"
        ) from None
    return table


def _fields(value: Any) -> dict[str, Any]:
    if isinstance(value, Inert) and isinstance(value.state, dict):
        return value.state
    raise TypeError(f"{value!r} has no fields")


def _records(storage_data: dict[Inert, Inert]) -> dict[str, dict[tuple[int, ...], Record]]:
    """The record of each chunk by key and offset; objects have the offset ()."""
    records: dict[str, dict[tuple[int, ...], Record]] = {}
    for index, info in storage_data.items():
        where, place = _fields(index), _fields(info)
        record = Record(place["relative_path"], int(place["offset"]), int(place["length"]))
        if "/" in record.file or "\\" in record.file:
            raise BridgeError(f"{METADATA_NAME} points outside of the folder: {record.file!r}")
        if place.get("transform_descriptors"):
            raise BridgeError(f"{record.file}: packed with {place['transform_descriptors']}, which is not read here")
        offset = tuple(where.get("offset") or ())
        if records.setdefault(where["fqn"], {}).setdefault(offset, record) != record:
            raise BridgeError(f"{METADATA_NAME}: two records hold the chunk at {offset} of {where['fqn']}")
    return records


def _stored(fields: dict[str, Any], records: dict[tuple[int, ...], Record], where: str) -> Stored:
    properties = fields["properties"].state
    dtype = properties[0] if isinstance(properties, tuple) else properties["dtype"]
    if not isinstance(dtype, torch.dtype):
        raise BridgeError(f"{where} has the unknown type {dtype!r}")
    chunks: list[Chunk] = []
    for chunk in map(_fields, fields["chunks"]):
        offset = tuple(map(int, chunk["offsets"]))
        if offset not in records:
            raise BridgeError(f"{where}: no record holds its chunk at {offset}")
        chunks.append(Chunk(offset, tuple(map(int, chunk["sizes"])), records[offset]))
    return Stored(dtype, tuple(map(int, fields["size"])), chunks)


def check_tiling(key: str, stored: Stored) -> None:
    """Raises BridgeError unless there are elements and the chunks cover each of them once."""
    if 0 in stored.shape:
        raise BridgeError(f"tensor {key} is empty: {stored.shape}")
    total = 0
    for chunk in stored.chunks:
        if {len(chunk.offset), len(chunk.shape)} != {len(stored.shape)} or any(
            first < 0 or size < 0 or first + size > whole
            for first, size, whole in zip(chunk.offset, chunk.shape, stored.shape, strict=True)
        ):
            raise BridgeError(f"tensor {key}: its chunk {_box(chunk)} lies outside of its shape {stored.shape}")
        size = math.prod(chunk.shape)
        if size * stored.dtype.itemsize > chunk.record.length:
            raise BridgeError(
                f"tensor {key}: its chunk {_box(chunk)} cannot be in the {chunk.record.length} bytes of {chunk.record.file}"
            )
        total += size
    boxes = [chunk for chunk in stored.chunks if 0 not in chunk.shape]
    if pair := _overlap(boxes):
        raise BridgeError(f"tensor {key}: its chunks {_box(pair[0])} and {_box(pair[1])} overlap")
    if total != math.prod(stored.shape):
        raise BridgeError(f"tensor {key}: chunks are missing, {total} of {math.prod(stored.shape)} elements are stored")


def _box(chunk: Chunk) -> str:
    return f"{list(chunk.offset)}+{list(chunk.shape)}"


def _overlap(chunks: list[Chunk]) -> tuple[Chunk, Chunk] | None:
    """Two chunks that overlap. Cuts that no chunk spans part them first, so that a grid of n chunks costs n log n."""
    pending = [chunks]
    while pending:
        group = pending.pop()
        if len(group) < 2:  # noqa: PLR2004 - a pair
            continue
        parts = next((parts for axis in range(len(group[0].shape)) if len(parts := _parted(group, axis)) > 1), None)
        if parts:
            pending += parts
            continue
        for number, one in enumerate(group):
            for other in group[:number]:
                if _common(one.offset, one.shape, other) is not None:
                    return one, other
    return None


def _parted(chunks: list[Chunk], axis: int) -> list[list[Chunk]]:
    """The chunks in groups whose spans on an axis do not meet."""
    groups: list[list[Chunk]] = []
    end = -1
    for chunk in sorted(chunks, key=lambda chunk: chunk.offset[axis]):
        if chunk.offset[axis] >= end:
            groups.append([])
        groups[-1].append(chunk)
        end = max(end, chunk.offset[axis] + chunk.shape[axis])
    return groups


def _common(offset: Sequence[int], shape: Sequence[int], chunk: Chunk) -> list[tuple[int, int]] | None:
    """From where to where, on each axis of the whole tensor, a box and a chunk share elements; None when none."""
    spans = [
        (max(first, start), min(first + size, start + count))
        for first, size, start, count in zip(offset, shape, chunk.offset, chunk.shape, strict=True)
    ]
    return spans if all(start < stop for start, stop in spans) else None


class Files:
    """The ``.distcp`` files of a checkpoint, mapped into memory when something of them is asked for."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._maps: dict[str, memoryview] = {}
        self._checked: set[Record] = set()

    def check(self, records: Sequence[Record]) -> None:
        """Raises BridgeError when a file is absent or too short for what it is to hold."""
        ends: dict[str, int] = {}
        for record in records:
            if record.start < 0 or record.length <= 0:
                raise BridgeError(f"{self._folder / record.file}: a record of {record.length} bytes at {record.start}")
            ends[record.file] = max(ends.get(record.file, 0), record.start + record.length)
        for name, end in ends.items():
            if not (self._folder / name).is_file():
                raise BridgeError(f"{self._folder / name}: absent; copy the checkpoint anew")
            if (size := (self._folder / name).stat().st_size) < end:
                raise BridgeError(f"{self._folder / name}: cut, {size} of at least {end} bytes; copy it anew")

    def close(self) -> None:
        """Forget the maps; each ends with the last tensor that is a view of it."""
        self._maps.clear()

    def read(self, record: Record) -> Any:
        """What ``read_torch`` gives for a record, whose checksums are compared the first time."""
        if record.file not in self._maps:
            with (self._folder / record.file).open("rb") as stream:
                # A private map: torch takes no memory that must not be written, and nobody writes it.
                whole = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY)
            self._maps[record.file] = memoryview(whole)
        data = self._maps[record.file][record.start : record.start + record.length]
        try:
            found = read_torch(data, self._where(record), check=record not in self._checked)
        except UnsafeFileError as error:
            raise BridgeError(str(error)) from None
        self._checked.add(record)
        return found

    def box(self, key: str, stored: Stored, offset: Sequence[int], shape: Sequence[int]) -> torch.Tensor:
        """A box of a tensor; a view of the file when one dense chunk holds it, else the only copy that is made.

        Raises BridgeError when a record is broken or holds something else than was said.
        """
        parts = [(chunk, spans) for chunk in stored.chunks if (spans := _common(offset, shape, chunk)) is not None]
        if len(parts) == 1:
            return typed(self._part(key, stored, *parts[0]), stored.dtype)
        whole = torch.empty(*shape, dtype=stored.dtype)
        for chunk, spans in parts:
            place = whole.unsqueeze(-1).view(torch.uint8)
            for axis, (start, stop) in enumerate(spans):
                place = place.narrow(axis, start - offset[axis], stop - start)
            place.copy_(self._part(key, stored, chunk, spans))
        return whole

    def _part(self, key: str, stored: Stored, chunk: Chunk, spans: Sequence[tuple[int, int]]) -> torch.Tensor:
        """The bytes of what a chunk holds between ``spans``."""
        where = self._where(chunk.record)
        try:
            data, dtype = tensor_bytes(self.read(chunk.record), where)
        except UnsafeFileError as error:
            raise BridgeError(f"tensor {key}: {error}") from None
        if dtype != stored.dtype or tuple(data.shape[:-1]) != chunk.shape:
            raise BridgeError(
                f"tensor {key}: {where} holds {dtype} {tuple(data.shape[:-1])} in place of {stored.dtype} {chunk.shape}"
            )
        for axis, (start, stop) in enumerate(spans):
            data = data.narrow(axis, start - chunk.offset[axis], stop - start)
        return data

    def _where(self, record: Record) -> str:
        return f"{self._folder / record.file} at {record.start}"
