"""Memory-mapped token files, byte-compatible with Megatron-Core's indexed dataset.

``PREFIX.bin`` holds all tokens back to back, little-endian, without header or padding; ``PREFIX.idx`` (magic
``MMIDIDX``, version 1) holds dtype code, lengths, byte pointers and document boundaries. Stock Megatron opens these
files. Format: Megatron-LM ``megatron/core/datasets/indexed_dataset.py``.
"""

import struct
from pathlib import Path
from types import TracebackType
from typing import Self

import numpy as np
import numpy.typing as npt

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")
_CODES: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
_INT32_CODE = 4


class IndexedError(ValueError):
    """An ``.idx``/``.bin`` pair contradicts itself; the message names the file."""


class IndexedWriter:
    """Appends int32 sequences, one document each; a context manager that writes the index when the block ends."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self._bin = Path(f"{prefix}.bin").open("wb")  # noqa: SIM115 - closed by __exit__
        self._lengths: list[int] = []

    def add(self, tokens: npt.NDArray[np.int32]) -> None:
        """Append one sequence, shape [n], int32."""
        self._bin.write(np.ascontiguousarray(tokens, dtype="<i4").tobytes())
        self._lengths.append(int(tokens.size))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bin.close()
        if kind is not None:
            return
        lengths = np.asarray(self._lengths, dtype="<i4")
        ends = np.cumsum(lengths, dtype=np.int64) * 4
        pointers = np.concatenate([np.zeros(min(1, len(ends)), dtype=np.int64), ends[:-1]]).astype("<i8")
        documents = np.arange(len(lengths) + 1, dtype="<i8")
        with Path(f"{self.prefix}.idx").open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, 1, _INT32_CODE, len(lengths), len(documents)))
            stream.writelines(array.tobytes() for array in (lengths, pointers, documents))


class IndexedReader:
    """Random access to the sequences of ``PREFIX.bin/.idx``; ``lengths`` (int32, shape [n]) are in tokens.

    Every count, pointer and size is checked against the files before use. Raises IndexedError, FileNotFoundError.
    """

    def __init__(self, prefix: Path) -> None:
        index, data = Path(f"{prefix}.idx"), Path(f"{prefix}.bin")
        raw = index.read_bytes()
        if len(raw) < _HEADER.size:
            raise IndexedError(f"{index}: {len(raw)} bytes are no index")
        magic, version, code, sequences, documents = _HEADER.unpack_from(raw)
        if magic != _MAGIC or version != 1 or code not in _CODES:
            raise IndexedError(f"{index}: not a Megatron index (magic {magic!r}, version {version}, dtype code {code})")
        if len(raw) < _HEADER.size + 12 * sequences + 8 * documents:
            raise IndexedError(f"{index}: cut; the header promises {sequences} sequences in {documents} documents")
        dtype = np.dtype(_CODES[code]).newbyteorder("<")
        self.lengths = np.frombuffer(raw, "<i4", sequences, _HEADER.size)
        self._pointers = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
        size = data.stat().st_size
        ends = self._pointers + self.lengths.astype(np.int64) * dtype.itemsize
        bad = (self.lengths < 0) | (self._pointers < 0) | (self._pointers % dtype.itemsize != 0) | (ends > size)
        if bad.any():
            raise IndexedError(f"{index}: sequence {int(bad.argmax())} lies outside {data.name} ({size} bytes)")
        self._data = np.memmap(data, dtype=dtype, mode="r") if size else np.empty(0, dtype)
        self._itemsize = dtype.itemsize

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[np.generic]:
        """One sequence, a view of the memory map."""
        start = int(self._pointers[index]) // self._itemsize
        return self._data[start : start + int(self.lengths[index])]
