"""Memory-mapped token files, byte-compatible with Megatron-Core's indexed dataset.

``PREFIX.bin`` holds all tokens back to back, little-endian, without header or padding; ``PREFIX.idx`` (magic
``MMIDIDX``, version 1) holds dtype code, lengths, byte pointers and document boundaries. Stock Megatron opens these
files. Format: Megatron-LM ``megatron/core/datasets/indexed_dataset.py``.
"""

import shutil
import struct
from array import array
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

import numpy as np
import numpy.typing as npt

Numbers: TypeAlias = npt.NDArray[np.int64]

_MAGIC = b"MMIDIDX\x00\x00"
_HEADER = struct.Struct("<9sQBQQ")  # magic, version, dtype code, sequences, documents + 1
_CODES: dict[int, type[np.generic]] = {
    1: np.uint8, 2: np.int8, 3: np.int16, 4: np.int32, 5: np.int64, 6: np.float64, 7: np.float32, 8: np.uint16,
}  # fmt: skip
_SMALL_VOCABULARY = 65500  # Megatron's own limit, a little below 2 ** 16
_MAX_LENGTH = 2**31 - 1  # lengths are int32
_STEP = 1 << 20  # index entries, or tokens, that are looked at in one go: it bounds memory
_COPY_BYTES = 8 << 20


class IndexedError(ValueError):
    """An ``.idx``/``.bin`` pair contradicts itself, or tokens do not fit it; the message names the file."""


def optimal_dtype(vocab_size: int | None) -> type[np.generic]:
    """The dtype in which Megatron stores ids of a vocabulary: uint16 below 65500, else (or when unknown) int32."""
    return np.uint16 if vocab_size is not None and vocab_size < _SMALL_VOCABULARY else np.int32


class IndexedWriter:
    """Appends sequences; a context manager that writes the index when the block ends without an error.

    ``dtype`` is one that the format knows; a value that does not fit is refused, never wrapped. ``data`` is another
    place for the tokens than ``PREFIX.bin``. Memory: 8 bytes a sequence. Raises IndexedError.
    """

    def __init__(self, prefix: Path, dtype: npt.DTypeLike = np.int32, *, data: Path | None = None) -> None:
        self.prefix = prefix
        self.dtype = np.dtype(dtype).newbyteorder("<")
        known = [code for code, kind in _CODES.items() if np.dtype(kind) == np.dtype(dtype)]
        if not known:
            raise IndexedError(f"{prefix}.idx: the format has no code for {np.dtype(dtype)}")
        self._code = known[0]
        self._data = data or Path(f"{prefix}.bin")
        self._bin = self._data.open("wb")
        self._lengths = array("i")  # tokens of each sequence
        self._documents = array("i")  # sequences of each document

    def add(self, tokens: npt.NDArray[Any]) -> None:
        """Append one sequence, shape [n], as a document of its own."""
        self.add_document(tokens, [tokens.size])

    def add_document(self, tokens: npt.NDArray[Any], lengths: npt.ArrayLike) -> None:
        """Append one document: ``tokens``, shape [n], are its sequences back to back, ``lengths`` their sizes."""
        self._documents.append(self._add(tokens, lengths))

    def add_many(self, tokens: npt.NDArray[Any], lengths: npt.ArrayLike) -> None:
        """Append many sequences, back to back in ``tokens``, shape [n], each as a document of its own."""
        self._documents.frombytes(np.ones(self._add(tokens, lengths), dtype=np.int32).tobytes())

    def append(self, prefix: Path) -> None:
        """Append all of another pair of the same dtype by copying; merges the shards of several writers."""
        shard = IndexedReader(prefix)
        if shard.dtype != self.dtype:
            raise IndexedError(f"{prefix}.idx: its dtype is {shard.dtype}, that of {self.prefix}.idx is {self.dtype}")
        if shard.has_modes or not shard.is_plain:
            raise IndexedError(f"{prefix}.idx: modes, gaps or shared tokens cannot be appended")
        self._lengths.frombytes(shard.lengths.astype(np.int32).tobytes())
        for start in range(0, len(shard.documents) - 1, _STEP):
            sizes = np.diff(shard.documents[start : start + _STEP + 1])
            self._documents.frombytes(sizes.astype(np.int32).tobytes())
        with Path(f"{prefix}.bin").open("rb") as stream:
            shutil.copyfileobj(stream, self._bin, _COPY_BYTES)

    def _add(self, tokens: npt.NDArray[Any], lengths: npt.ArrayLike) -> int:
        """Write the tokens and note the lengths; the number of sequences."""
        sizes = np.asarray(lengths, dtype=np.int64).reshape(-1)
        if sizes.size and (sizes.min() < 0 or sizes.max() > _MAX_LENGTH):
            raise IndexedError(f"{self._data}: a sequence has 0 to {_MAX_LENGTH} tokens")
        if int(sizes.sum()) != tokens.size:
            raise IndexedError(f"{self._data}: {tokens.size} tokens, their lengths add up to {int(sizes.sum())}")
        stored = np.ascontiguousarray(tokens, dtype=self.dtype)
        if not np.can_cast(tokens.dtype, self.dtype) and not np.array_equal(stored, tokens):
            wrong = tokens.reshape(-1)[int((stored != tokens).reshape(-1).argmax())]
            raise IndexedError(f"{self._data}: {wrong} does not fit {self.dtype}")
        self._bin.write(stored.data)
        self._lengths.frombytes(sizes.astype(np.int32).tobytes())
        return sizes.size

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._bin.close()
        if kind is not None:
            return
        lengths = np.frombuffer(self._lengths, dtype=np.int32)
        documents = np.frombuffer(self._documents, dtype=np.int32)
        with Path(f"{self.prefix}.idx").open("wb") as stream:
            stream.write(_HEADER.pack(_MAGIC, 1, self._code, len(lengths), len(documents) + 1))
            stream.writelines(part.astype("<i4").tobytes() for part in _parts(lengths))
            bytes_before = 0
            for part in _parts(lengths):
                ends = bytes_before + np.cumsum(part, dtype=np.int64) * self.dtype.itemsize
                stream.write((ends - part.astype(np.int64) * self.dtype.itemsize).astype("<i8").tobytes())
                bytes_before = int(ends[-1])
            stream.write(bytes(8))  # document indices begin with 0
            sequences_before = 0
            for part in _parts(documents):
                ends = sequences_before + np.cumsum(part, dtype=np.int64)
                stream.write(ends.astype("<i8").tobytes())
                sequences_before = int(ends[-1])


class IndexedReader:
    """Random access to the sequences of ``PREFIX.bin/.idx``, in any dtype of the format.

    ``lengths`` (int32, shape [n]) are in tokens, ``pointers`` (int64, shape [n], memory-mapped) in bytes,
    ``documents`` (int64, shape [d + 1], memory-mapped) are the sequences at which documents begin and end, and
    ``tokens`` is all of the .bin, memory-mapped. ``data`` is another place for the tokens than ``PREFIX.bin``.

    Every count, pointer and size is checked against the files before use, and nothing is allocated on a header's word.
    Raises IndexedError, FileNotFoundError.
    """

    def __init__(self, prefix: Path, *, data: Path | None = None) -> None:
        self.index, self.data = Path(f"{prefix}.idx"), data or Path(f"{prefix}.bin")
        index_size, data_size = self.index.stat().st_size, self.data.stat().st_size
        if index_size < _HEADER.size:
            raise IndexedError(f"{self.index}: {index_size} bytes are no index")
        raw = np.memmap(self.index, dtype=np.uint8, mode="r")
        magic, version, code, sequences, documents = _HEADER.unpack(raw[: _HEADER.size].tobytes())
        if magic != _MAGIC or version != 1 or code not in _CODES:
            raise IndexedError(
                f"{self.index}: not a Megatron index (magic {magic!r}, version {version}, dtype code {code})"
            )
        promised = _HEADER.size + 12 * sequences + 8 * documents
        if index_size not in (promised, promised + sequences):
            raise IndexedError(
                f"{self.index}: {index_size} bytes, its header promises {promised} for {sequences} sequences and "
                f"{documents} document boundaries; it was cut or is damaged"
            )
        self.has_modes = (
            sequences > 0 and index_size == promised + sequences
        )  # multimodal; their meaning is unknown here
        self.dtype = np.dtype(_CODES[code]).newbyteorder("<")
        self.lengths: npt.NDArray[np.int32] = np.frombuffer(raw, "<i4", sequences, _HEADER.size).copy()  # aligned
        self.pointers: Numbers = np.frombuffer(raw, "<i8", sequences, _HEADER.size + 4 * sequences)
        self.documents: Numbers = np.frombuffer(raw, "<i8", documents, _HEADER.size + 12 * sequences)
        self.is_plain = self._check_pointers(data_size)
        self._check_documents()
        self.tokens: npt.NDArray[Any] = (
            np.memmap(self.data, dtype=self.dtype, mode="r") if data_size else np.empty(0, self.dtype)
        )

    def __reduce__(self) -> tuple[Any, ...]:
        """Opened again where it is unpickled: a loader's worker must not get a copy of all tokens."""
        return partial(type(self), data=self.data), (Path(str(self.index).removesuffix(".idx")),)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> npt.NDArray[Any]:
        """One sequence, a view of the memory map."""
        start = int(self.pointers[index]) // self.dtype.itemsize
        return self.tokens[start : start + int(self.lengths[index])]

    def gather(self, numbers: npt.NDArray[np.integer[Any]]) -> npt.NDArray[Any]:
        """The tokens of several sequences back to back, in this order; a copy, shape [sum of their lengths]."""
        lengths = self.lengths[numbers].astype(np.int64)
        starts = self.pointers[numbers] // self.dtype.itemsize
        ends = np.cumsum(lengths)
        if not len(ends):
            return np.empty(0, self.dtype)
        if np.array_equal(starts[1:], starts[:-1] + lengths[:-1]):
            return np.array(self.tokens[int(starts[0]) : int(starts[0] + ends[-1])])
        return np.asarray(self.tokens[np.repeat(starts - ends + lengths, lengths) + np.arange(ends[-1])])

    def check_ids(self, vocab_size: int, at_most: int | None = None) -> None:
        """Refuse ids outside [0, ``vocab_size``).

        ``at_most`` tokens, spread evenly over the file in runs of a million, are looked at; None means all.
        """
        starts = range(0, self.tokens.size, _STEP)
        runs = len(starts) if at_most is None else max(1, min(len(starts), at_most // _STEP))
        for number in range(runs if starts else 0):
            start = starts[number * len(starts) // runs]
            part = self.tokens[start : start + (_STEP if at_most is None else min(_STEP, at_most))]
            bad = (part < 0) | (part >= vocab_size)
            if bad.any():
                place = start + int(bad.argmax())
                where = int(np.searchsorted(self.pointers, place * self.dtype.itemsize, side="right")) - 1
                raise IndexedError(
                    f"{self.data}: sequence {where} holds id {self.tokens[place]}, the vocabulary has {vocab_size}"
                )

    def _check_pointers(self, data_size: int) -> bool:
        """Whether the sequences lie back to back and fill the .bin. Raises IndexedError for one outside."""
        item, plain, before, end = self.dtype.itemsize, True, 0, 0
        for start in range(0, len(self.lengths), _STEP):
            lengths = self.lengths[start : start + _STEP].astype(np.int64)
            pointers = self.pointers[start : start + _STEP]
            room = data_size - pointers  # no overflow: a pointer below 0 is found first
            bad = (lengths < 0) | (pointers < 0) | (pointers % item != 0) | (lengths * item > room)
            bad |= np.diff(pointers, prepend=before) < 0
            if bad.any():
                number = start + int(bad.argmax())
                raise IndexedError(
                    f"{self.index}: sequence {number} ({self.lengths[number]} tokens at byte {self.pointers[number]}) "
                    f"does not lie in {self.data.name} ({data_size} bytes), or before the one it follows"
                )
            before = int(pointers[-1])
            ends = pointers + lengths * item
            plain &= bool(pointers[0] == end and (pointers[1:] == ends[:-1]).all())
            end = max(end, int(ends.max()))
        if end != data_size:
            raise IndexedError(
                f"{self.data}: {data_size} bytes, the last sequence of {self.index.name} ends at {end}; "
                "they do not belong together"
            )
        return plain

    def _check_documents(self) -> None:
        if not len(self.documents) or self.documents[0] != 0 or self.documents[-1] != len(self.lengths):
            raise IndexedError(f"{self.index}: its documents do not reach from sequence 0 to {len(self.lengths)}")
        for start in range(0, len(self.documents), _STEP):
            bad = np.flatnonzero(np.diff(self.documents[start : start + _STEP + 1]) < 0)
            if bad.size:
                raise IndexedError(f"{self.index}: document {start + int(bad[0])} ends before it begins")


def _parts(values: npt.NDArray[np.int32]) -> Iterator[npt.NDArray[np.int32]]:
    """``values`` in pieces of bounded size."""
    for start in range(0, len(values), _STEP):
        yield values[start : start + _STEP]
