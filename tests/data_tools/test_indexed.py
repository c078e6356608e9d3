"""The .bin/.idx format: bytes as Megatron writes them, and nothing damaged is opened."""

import importlib.util
import struct
import tracemalloc
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from finebridge.data_tools.indexed import IndexedError, IndexedReader, IndexedWriter, optimal_dtype

CODES = {"uint8": 1, "int8": 2, "int16": 3, "int32": 4, "int64": 5, "float64": 6, "float32": 7, "uint16": 8}


def by_hand(documents: Sequence[Sequence[Sequence[int]]], dtype: str) -> tuple[bytes, bytes]:
    """The .bin and .idx of documents of sequences, written from the description of the format with struct alone."""
    letter = {"uint16": "H", "int32": "i", "int64": "q", "uint8": "B", "int8": "b", "int16": "h"}[dtype]
    size = struct.calcsize(letter)
    sequences = [sequence for document in documents for sequence in document]
    data = b"".join(struct.pack(f"<{len(s)}{letter}", *s) for s in sequences)
    pointers, place = [], 0
    for sequence in sequences:
        pointers.append(place)
        place += size * len(sequence)
    ends = [0]
    for document in documents:
        ends.append(ends[-1] + len(document))
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, CODES[dtype], len(sequences), len(ends))
    index += struct.pack(f"<{len(sequences)}i", *map(len, sequences))
    index += struct.pack(f"<{len(sequences)}q", *pointers) + struct.pack(f"<{len(ends)}q", *ends)
    return data, index


def written(prefix: Path) -> tuple[bytes, bytes]:
    return Path(f"{prefix}.bin").read_bytes(), Path(f"{prefix}.idx").read_bytes()


DOCUMENTS = [[[5, 6, 7], [8]], [[9, 10]], [], [[65499, 0, 1, 2]]]


@pytest.mark.parametrize("dtype", ["int32", "uint16", "int64"])
def test_bytes_are_those_of_the_format(tmp_path: Path, dtype: str) -> None:
    with IndexedWriter(tmp_path / "x", dtype) as writer:
        for document in DOCUMENTS:
            flat = [token for sequence in document for token in sequence]
            writer.add_document(np.array(flat, dtype=np.int64), [len(sequence) for sequence in document])
    assert written(tmp_path / "x") == by_hand(DOCUMENTS, dtype)
    reader = IndexedReader(tmp_path / "x")
    assert [reader[i].tolist() for i in range(len(reader))] == [s for document in DOCUMENTS for s in document]
    assert reader.documents.tolist() == [0, 2, 3, 3, 4]
    assert reader.dtype == np.dtype(dtype)
    assert reader.is_plain
    assert not reader.has_modes


def test_one_by_one_and_many_at_once_are_the_same(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sequences = [rng.integers(0, 60000, n).astype(np.int32) for n in rng.integers(0, 9, 200)]
    with IndexedWriter(tmp_path / "one", np.uint16) as writer:
        for sequence in sequences:
            writer.add(sequence)
    with IndexedWriter(tmp_path / "many", np.uint16) as writer:
        for part in (sequences[:77], sequences[77:]):
            writer.add_many(np.concatenate(part), [len(sequence) for sequence in part])
    assert (
        written(tmp_path / "one") == written(tmp_path / "many") == by_hand([[s.tolist()] for s in sequences], "uint16")
    )


def test_shards_are_appended(tmp_path: Path) -> None:
    whole = by_hand([*DOCUMENTS, [[3]], *DOCUMENTS], "int32")
    for name, part in (("a", DOCUMENTS), ("b", [])):
        for kind, raw in zip(("bin", "idx"), by_hand(part, "int32"), strict=True):
            (tmp_path / f"{name}.{kind}").write_bytes(raw)
    with IndexedWriter(tmp_path / "x") as writer:
        writer.append(tmp_path / "a")
        writer.append(tmp_path / "b")
        writer.add(np.array([3]))
        writer.append(tmp_path / "a")
    assert written(tmp_path / "x") == whole


def test_shards_that_cannot_be_appended(tmp_path: Path) -> None:
    data, index = by_hand(DOCUMENTS, "uint16")
    (tmp_path / "a.bin").write_bytes(data)
    (tmp_path / "a.idx").write_bytes(index)
    (tmp_path / "m.bin").write_bytes(by_hand(DOCUMENTS, "int32")[0])
    (tmp_path / "m.idx").write_bytes(by_hand(DOCUMENTS, "int32")[1] + b"\0\1\0\1")
    assert IndexedReader(tmp_path / "m").has_modes
    with IndexedWriter(tmp_path / "x") as writer:
        with pytest.raises(IndexedError, match=r"a\.idx: its dtype is uint16"):
            writer.append(tmp_path / "a")
        with pytest.raises(IndexedError, match=r"m\.idx: modes"):
            writer.append(tmp_path / "m")
    assert written(tmp_path / "x") == by_hand([], "int32")


def test_values_and_lengths_that_do_not_fit(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        for wrong in (-100, 65536):
            with pytest.raises(IndexedError, match=f"{wrong} does not fit uint16"):
                writer.add(np.array([1, wrong], dtype=np.int32))
        with pytest.raises(IndexedError, match="3 tokens, their lengths add up to 2"):
            writer.add_many(np.arange(3), [1, 1])
        with pytest.raises(IndexedError, match="0 to 2147483647"):
            writer.add_many(np.arange(3), [4, -1])
    assert written(tmp_path / "x") == by_hand([], "uint16")
    with pytest.raises(IndexedError, match="no code for uint32"):
        IndexedWriter(tmp_path / "y", np.uint32)


def test_an_error_leaves_no_index(tmp_path: Path) -> None:
    with pytest.raises(KeyError), IndexedWriter(tmp_path / "x") as writer:  # noqa: PT012 - the block is the case
        writer.add(np.array([1]))
        raise KeyError
    assert not (tmp_path / "x.idx").exists()


def test_dtype_by_vocabulary() -> None:
    assert [optimal_dtype(size) for size in (1, 65499, 65500, 151_643, None)] == [
        np.uint16, np.uint16, np.int32, np.int32, np.int32,
    ]  # fmt: skip


@pytest.mark.parametrize("name", CODES)
def test_every_dtype_is_read(tmp_path: Path, name: str) -> None:
    with IndexedWriter(tmp_path / "x", name) as writer:
        writer.add(np.array([1, 2, 3], dtype=name))
    assert (tmp_path / "x.idx").read_bytes()[17] == CODES[name]
    reader = IndexedReader(tmp_path / "x")
    assert reader[0].tolist() == [1, 2, 3]
    assert reader.dtype == np.dtype(name)


def test_gathering_is_reading_one_by_one(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    with IndexedWriter(tmp_path / "x") as writer:
        for length in rng.integers(0, 7, 50):
            writer.add(rng.integers(0, 99, length))
    reader = IndexedReader(tmp_path / "x")
    for numbers in ([], [3], [0, 1, 2, 3], list(range(50)), rng.permutation(50).tolist(), [7, 7, 0]):
        expected = [token for number in numbers for token in reader[number].tolist()]
        assert reader.gather(np.array(numbers, dtype=np.int64)).tolist() == expected
    with pytest.raises(IndexError):
        reader.gather(np.array([50]))


# Three sequences in two documents, int32: where each field lies, and what it is set to.
HEADER, LENGTHS, POINTERS, DOCS = 0, 34, 34 + 12, 34 + 36
DAMAGE = {
    "magic": (HEADER, b"X"),
    "version": (9, struct.pack("<Q", 2)),
    "dtype code": (17, b"\x09"),
    "dtype code 0": (17, b"\x00"),
    "other dtype": (17, b"\x05"),
    "sequences + 1": (18, struct.pack("<Q", 4)),
    "sequences - 1": (18, struct.pack("<Q", 2)),
    "sequences huge": (18, struct.pack("<Q", 1 << 62)),
    "sequences all ones": (18, b"\xff" * 8),
    "sequences wrap to zero": (18, struct.pack("<Q", (1 << 64) // 4)),
    "documents + 1": (26, struct.pack("<Q", 4)),
    "documents - 1": (26, struct.pack("<Q", 2)),
    "documents zero": (26, struct.pack("<Q", 0)),
    "documents huge": (26, struct.pack("<Q", 1 << 61)),
    "documents all ones": (26, b"\xff" * 8),
    "length negative": (LENGTHS, struct.pack("<i", -1)),
    "length too large": (LENGTHS + 8, struct.pack("<i", 4)),
    "length largest": (LENGTHS + 8, struct.pack("<i", 2**31 - 1)),
    "length too small": (LENGTHS + 8, struct.pack("<i", 2)),
    "pointer negative": (POINTERS, struct.pack("<q", -4)),
    "pointer lowest": (POINTERS, struct.pack("<q", -(2**63))),
    "pointer between tokens": (POINTERS + 8, struct.pack("<q", 10)),
    "pointer falls": (POINTERS + 16, struct.pack("<q", 4)),
    "pointer beyond": (POINTERS + 16, struct.pack("<q", 400)),
    "pointer highest": (POINTERS + 16, struct.pack("<q", 2**63 - 4)),
    "first document": (DOCS, struct.pack("<q", 1)),
    "document falls": (DOCS + 8, struct.pack("<q", 5)),
    "document negative": (DOCS + 8, struct.pack("<q", -1)),
    "last document": (DOCS + 16, struct.pack("<q", 2)),
    "last document beyond": (DOCS + 16, struct.pack("<q", 1 << 60)),
}


@pytest.fixture
def sound(tmp_path: Path) -> Path:
    data, index = by_hand([[[1, 2], [3]], [[4, 5, 6]]], "int32")
    (tmp_path / "x.bin").write_bytes(data)
    (tmp_path / "x.idx").write_bytes(index)
    assert len(IndexedReader(tmp_path / "x")) == 3
    return tmp_path / "x"


@pytest.mark.parametrize("what", DAMAGE)
def test_a_changed_field_is_refused(sound: Path, what: str) -> None:
    place, value = DAMAGE[what]
    raw = bytearray(Path(f"{sound}.idx").read_bytes())
    raw[place : place + len(value)] = value
    Path(f"{sound}.idx").write_bytes(bytes(raw))
    tracemalloc.start()
    try:
        with pytest.raises(IndexedError, match=r"x\.(idx|bin)"):
            IndexedReader(sound)
        assert tracemalloc.get_traced_memory()[1] < 4_000_000  # nothing was allocated on the header's word
    finally:
        tracemalloc.stop()


def test_every_cut_is_refused(sound: Path) -> None:
    for kind in ("idx", "bin"):
        path = Path(f"{sound}.{kind}")
        raw = path.read_bytes()
        for size in range(len(raw)):
            path.write_bytes(raw[:size])
            with pytest.raises(IndexedError):
                IndexedReader(sound)
        for more in (1, 2, 4, 8):
            path.write_bytes(raw + bytes(more))
            with pytest.raises(IndexedError):
                IndexedReader(sound)
        path.write_bytes(raw)
    assert IndexedReader(sound)[2].tolist() == [4, 5, 6]


def test_a_missing_file_is_named(sound: Path) -> None:
    Path(f"{sound}.bin").unlink()
    with pytest.raises(FileNotFoundError, match=r"x\.bin"):
        IndexedReader(sound)


def test_ids_beyond_the_vocabulary(tmp_path: Path) -> None:
    tokens = np.zeros(5_000_000, dtype=np.uint16)
    tokens[4_999_999] = 300
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_many(tokens, np.full(1000, 5000))
    reader = IndexedReader(tmp_path / "x")
    reader.check_ids(301)
    reader.check_ids(70_000)  # more than uint16 holds
    reader.check_ids(300, at_most=1000)  # the end is not looked at
    with pytest.raises(IndexedError, match=r"x\.bin: sequence 999 holds id 300, the vocabulary has 300"):
        reader.check_ids(300)
    with IndexedWriter(tmp_path / "n") as writer:
        writer.add(np.array([1, -5]))
        writer.add(np.array([], dtype=np.int32))
    with pytest.raises(IndexedError, match="sequence 0 holds id -5"):
        IndexedReader(tmp_path / "n").check_ids(10, at_most=10)
    with IndexedWriter(tmp_path / "empty"):
        pass
    IndexedReader(tmp_path / "empty").check_ids(1)


def test_memory_does_not_grow_with_python_numbers(tmp_path: Path) -> None:
    """Three million sequences: 8 bytes each while writing; a list of Python numbers alone would take 36 each, twice."""
    block, blocks = 100_000, 30
    tokens, lengths = np.zeros(block, dtype=np.int32), np.ones(block, dtype=np.int64)
    tracemalloc.start()
    try:
        with IndexedWriter(tmp_path / "x") as writer:
            for _ in range(blocks):
                writer.add_many(tokens, lengths)
        assert tracemalloc.get_traced_memory()[1] < 8 * 1.2 * block * blocks + 40_000_000
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        reader = IndexedReader(tmp_path / "x")
        assert tracemalloc.get_traced_memory()[1] - before < 4 * block * blocks + 100_000_000
    finally:
        tracemalloc.stop()
    assert len(reader) == block * blocks
    assert reader.documents[-1] == block * blocks
    assert reader.pointers[-1] == 4 * (block * blocks - 1)


needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed; it is the oracle here"
)


@needs_megatron
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("vocabulary", [1000, 65499, 65500, 151_643])
def test_megatron_writes_the_same_bytes_and_reads_ours(tmp_path: Path, vocabulary: int) -> None:
    """What its tools/preprocess_data.py does with the ids of each document: append the eod, add_document, finalize."""
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDataset, IndexedDatasetBuilder

    rng = np.random.default_rng(2)
    eod = vocabulary - 1
    documents = [[*rng.integers(0, vocabulary, n).tolist(), eod] for n in rng.integers(1, 40, 300)]
    assert np.dtype(optimal_dtype(vocabulary)) == np.dtype(DType.optimal_dtype(vocabulary))
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"), dtype=DType.optimal_dtype(vocabulary))
    with IndexedWriter(tmp_path / "ours", optimal_dtype(vocabulary)) as writer:
        for number, document in enumerate(documents):
            sizes = [len(document)] if number % 3 else [1, len(document) - 1]  # a document of sentences now and then
            theirs.add_document(document, sizes)
            writer.add_document(np.array(document), sizes)
        theirs.add_document([], [])  # what an empty text becomes
        writer.add_document(np.array([], dtype=np.int64), [])
        theirs.add_item(torch.IntTensor([1, 2]))
        theirs.end_document()
        writer.add(np.array([1, 2]))
    theirs.finalize(str(tmp_path / "theirs.idx"))
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
    opened, reader = IndexedDataset(str(tmp_path / "ours")), IndexedReader(tmp_path / "theirs")
    assert len(opened) == len(reader)
    assert all(np.array_equal(opened[i], reader[i]) for i in range(len(reader)))
    assert opened.document_indices.tolist() == reader.documents.tolist()


@needs_megatron
@pytest.mark.filterwarnings("ignore")
def test_shards_merge_as_megatrons_do(tmp_path: Path) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    for name in ("a", "b"):
        with IndexedWriter(tmp_path / name) as writer:
            for number in range(20):
                writer.add_document(np.arange(number + 2), [1, number + 1])
    theirs = IndexedDatasetBuilder(str(tmp_path / "theirs.bin"))
    with IndexedWriter(tmp_path / "ours") as writer:
        for name in ("a", "b"):
            theirs.add_index(str(tmp_path / name))
            writer.append(tmp_path / name)
    theirs.finalize(str(tmp_path / "theirs.idx"))
    assert written(tmp_path / "ours") == written(tmp_path / "theirs")
