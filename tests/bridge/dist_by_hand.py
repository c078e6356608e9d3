"""``torch_dist`` checkpoints made from the format's description alone, by torch's own classes."""

import itertools
import math
import pickle
from argparse import Namespace
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.dist_format import DistCheckpoint
from finebridge.bridge.errors import BridgeError
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit."""
    if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (got, wanted)))


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits, so NaN of every kind too."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


class ByHand:
    """Writes the format from its description: any chunks, in any files, with any bytes between the records."""

    def __init__(self, folder: Path, files: int = 2) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.table: dict[str, Any] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}
        self.common: Any = {"args": Namespace(num_layers=2), "checkpoint_version": 3.0, "iteration": 5}
        self._files = itertools.cycle([f"__{number}_{number % 2}.distcp" for number in range(files)])

    def record(self, value: object) -> _StorageInfo:
        name = next(self._files)
        with (self.folder / name).open("ab") as stream:
            stream.write(b"between")
            start = stream.tell()
            torch.save(value, stream)
            return _StorageInfo(name, start, stream.tell() - start)

    def add(self, key: str, tensor: torch.Tensor, boxes: list[Box] | None = None) -> None:
        boxes = boxes or [((0,) * tensor.ndim, tuple(tensor.shape))]
        chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)) for offset, shape in boxes]
        self.table[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
        for offset, shape in boxes:
            part = tensor[tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))]
            self.places[MetadataIndex(key, offset)] = self.record(part.clone())

    def add_object(self, key: str, value: object) -> None:
        self.table[key] = BytesStorageMetadata()
        self.places[MetadataIndex(key)] = self.record([value])

    def close(self, kind: type = Metadata) -> Path:
        (self.folder / ".metadata").write_bytes(pickle.dumps(kind(self.table, storage_data=self.places)))
        if self.common is not None:
            torch.save(self.common, self.folder / "common.pt")
        return self.folder


def simple(folder: Path) -> tuple[ByHand, dict[str, torch.Tensor]]:
    made = ByHand(folder)
    tensors = {
        "embedding.word_embeddings.weight": bits((6, 4), torch.bfloat16),
        "output_layer.weight": torch.randn(6, 4),
    }
    for key, tensor in tensors.items():
        made.add(key, tensor, [((0, 0), (3, 4)), ((3, 0), (3, 4))])
    return made, tensors


def read_all(folder: Path) -> None:
    with DistCheckpoint(folder) as checkpoint:
        for name in checkpoint:
            checkpoint.get(name).clone()


def refused(folder: Path, match: str) -> None:
    with pytest.raises(BridgeError, match=match):
        read_all(folder)
