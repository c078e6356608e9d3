"""Rows for pretraining: every token once, documents apart, names of documents, and which files are read."""

import pickle
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.collator import FlatteningCollator
from finebridge.data_tools.indexed import IndexedError, IndexedReader, IndexedWriter
from finebridge.data_tools.layouts_cli import import_main
from finebridge.data_tools.preprocess import prepare
from finebridge.data_tools.schema import DataError, Origin
from finebridge.data_tools.text_dataset import TextDataset, open_text
from finebridge.data_tools.token_files import read_tokens, token_prefix
from finebridge.data_tools.tokenizer_files import TokenizerSource

EXAMPLE = Path(__file__).resolve().parents[2] / "finetune" / "example_data"
SOURCE = TokenizerSource(str(EXAMPLE))


def written(prefix: Path, documents: Sequence[Sequence[int]], dtype: Any = np.int32) -> Path:
    with IndexedWriter(prefix, dtype) as writer:
        for ids in documents:
            writer.add(np.array(ids, dtype=np.int64))
    return prefix


def rows(prefix: Path, length: int, **more: Any) -> TextDataset:
    reader = read_tokens(prefix)
    return TextDataset(reader, "key", length, lambda number: Origin(reader.data, number + 1), **more)


def numbered(count: int, longest: int, seed: int = 0) -> list[list[int]]:
    """Documents in which no token comes twice: 0, 1, 2 ... cut at random, some of the pieces empty."""
    sizes = np.random.default_rng(seed).integers(0, longest + 1, count)
    ends = np.cumsum(sizes)
    return [list(range(end - size, end)) for size, end in zip(sizes.tolist(), ends.tolist(), strict=True)]


def pieces(data: TextDataset) -> list[list[int]]:
    """The pieces of all rows in their order."""
    found: list[list[int]] = []
    for item in map(data.__getitem__, range(len(data))):
        found += [piece.tolist() for piece in np.split(item["input_ids"], np.cumsum(item["lengths"])[:-1])]
    return found


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize(("longest", "length"), [(9, 16), (100, 16), (5, 1000), (40, 7)])
def test_every_token_is_in_one_row_and_every_piece_in_one_document(
    longest: int, length: int, seed: int | None, dtype: Any, tmp_path: Path
) -> None:
    documents = numbered(60, longest)
    data = rows(written(tmp_path / "x", documents, dtype), length, seed=seed)
    total = sum(map(len, documents))
    assert data.lengths.tolist() == [length] * (total // length) + [total % length] * (total % length > 0)
    seen = pieces(data)
    stream = list(chain(*seen))
    assert sorted(stream) == list(range(total))
    owner = {token: number for number, ids in enumerate(documents) for token in ids}
    assert all(len({owner[token] for token in piece}) == 1 for piece in seen)
    order = list(dict.fromkeys(owner[piece[0]] for piece in seen))  # a document's pieces follow one another
    assert (order == sorted(order)) == (seed is None)
    assert stream == list(chain(*(documents[number] for number in order)))
    for index, item in enumerate(map(data.__getitem__, range(len(data)))):
        ids, labels, lengths = item["input_ids"], item["labels"], item["lengths"]
        assert len(ids) == data.lengths[index] == lengths.sum()
        firsts = np.cumsum(lengths) - lengths
        assert (labels[firsts] == -100).all()
        assert (np.delete(labels, firsts) == np.delete(ids, firsts)).all()


def test_rows_depend_on_data_and_seed_alone(tmp_path: Path) -> None:
    prefix = written(tmp_path / "x", [[number, number] for number in range(12)])
    first, again, other = (pieces(rows(prefix, 6, seed=seed)) for seed in (1, 1, 2))
    assert first == again != other
    assert [piece[0] for piece in first] == [
        3,
        7,
        6,
        1,
        10,
        0,
        2,
        9,
        11,
        5,
        8,
        4,
    ]  # the same on every machine and with every numpy


def test_the_collator_starts_positions_anew_in_each_piece(tmp_path: Path) -> None:
    data = rows(written(tmp_path / "x", [[1, 2, 3], [4, 5], [6, 7, 8, 9]]), 6)
    batch = FlatteningCollator(borders=True)([data[0], data[1]])
    assert batch["position_ids"].tolist() == [[0, 1, 2, 0, 1, 0, 0, 1, 2]]
    assert batch["labels"].tolist() == [[-100, 2, 3, -100, 5, -100, -100, 8, 9]]
    assert batch["cu_seq_lens_q"].tolist() == [0, 3, 5, 6, 9]


def test_across_documents_a_row_is_one_piece(tmp_path: Path) -> None:
    prefix = written(tmp_path / "x", [[1, 2, 3], [], [4, 5], [6, 7, 8, 9]])
    data = rows(prefix, 6, across=True)
    assert [(item["labels"].tolist(), item["lengths"].tolist()) for item in (data[0], data[1])] == [
        ([-100, 2, 3, 4, 5, 6], [6]),
        ([-100, 8, 9], [3]),
    ]
    assert data.key != rows(prefix, 6).key


def test_what_cannot_be_predicted_is_left_out_and_told(tmp_path: Path) -> None:
    said: list[str] = []
    data = rows(written(tmp_path / "x", [[1, 2, 3], [], [4], [5], [6, 7], [8]]), 4, say=said.append)
    assert [item.tolist() for item in (data[0]["input_ids"], data[1]["input_ids"])] == [[1, 2, 3, 4], [5, 6, 7, 8]]
    assert said == ["data: 5 documents, 8 tokens -> 2 rows of 4 tokens; 1 documents are empty"]
    data = rows(written(tmp_path / "y", [[1, 2, 3], [4], [5], [6], [7, 8], [9]]), 3, say=said.append)
    assert [data[index]["input_ids"].tolist() for index in range(2)] == [[1, 2, 3], [7, 8, 9]]
    assert said[-1].endswith(
        "9 tokens -> 2 rows of 3 tokens; 3 tokens are left out, in rows where none can be predicted"
    )
    for documents, why in ([[[1], [2]], "no document has two tokens"], [[[], []], "no tokens"]):
        with pytest.raises(DataError, match=why):
            rows(written(tmp_path / "z", documents), 8)


def test_a_document_of_several_sequences_is_one_piece(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "x", np.uint16) as writer:
        writer.add_document(np.arange(5), [2, 0, 3])
        writer.add_document(np.arange(0), [])
        writer.add_document(np.arange(5, 9), [4])
    data = rows(tmp_path / "x", 16)
    assert pieces(data) == [[0, 1, 2, 3, 4], [5, 6, 7, 8]]
    assert data.name_of(0) == f"{tmp_path}/x.bin:1, {tmp_path}/x.bin:3"


def test_rows_name_the_lines_of_raw_text(tmp_path: Path) -> None:
    file = tmp_path / "t.txt"
    file.write_text("\n".join(f"{number} + {number}" for number in range(9)) + "\n\nlast one\n")
    data = open_text(str(file), SOURCE, DataArguments(max_seq_length=1000), tmp_path / "cache")
    assert data.name_of(0) == ", ".join(f"{file}:{line}" for line in range(1, 6)) + " and 5 more"
    assert data.key == next((tmp_path / "cache").glob("*/report.json")).parent.name


def test_a_loaders_worker_opens_the_files_itself(tmp_path: Path) -> None:
    """Workers that are spawned get the dataset pickled, and no token in it."""
    tokens = written(tmp_path / "x", [list(range(400))] * 50)
    data = open_text(str(tokens), SOURCE, DataArguments(max_seq_length=64), tmp_path / "cache", seed=0)
    sent = pickle.dumps(data)
    assert len(sent) < 20_000 < Path(f"{tokens}.bin").stat().st_size
    copy = pickle.loads(sent)
    assert pieces(copy) == pieces(data)
    assert copy.name_of(7) == data.name_of(7)


@pytest.fixture
def tokens(tmp_path: Path) -> Path:
    """Token files of three documents that end with the end token, which the example's tokenizer can read."""
    eos = SOURCE.load().eos_token_id
    return written(tmp_path / "corpus_text_document", [[5, 6, 7, eos], [8, 9, eos], [10, eos]], np.uint16)


@pytest.mark.parametrize("name", ["{}", "{}.bin", "{}.idx"])
def test_token_files_by_prefix_or_either_name(
    name: str, tokens: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert token_prefix(name.format(tokens)) == tokens
    opened = [open_text(name.format(tokens), SOURCE, DataArguments(), tmp_path / "cache") for _ in range(2)]
    assert opened[0].key == opened[1].key
    assert len(list((tmp_path / "cache").glob("*/manifest.json"))) == 1
    assert "end-of-text" not in capsys.readouterr().out
    assert pieces(opened[0]) == [ids.tolist() for ids in map(IndexedReader(tokens).__getitem__, range(3))]
    written(tokens, [[5, 6, 7]], np.uint16)
    assert open_text(str(tokens), SOURCE, DataArguments(), tmp_path / "cache").key != opened[0].key
    assert "have no end-of-text token behind them; --append_eod" in capsys.readouterr().out


def test_imported_token_files_are_plain_text(tokens: Path, tmp_path: Path) -> None:
    prefix = str(tokens).removesuffix("_text_document")
    assert import_main([prefix, "--layout", "megatron", "--output_dir", str(tmp_path / "back")]) == 0
    data = open_text(str(tmp_path / "back"), SOURCE, DataArguments(), tmp_path / "cache")
    assert pieces(data) == pieces(rows(tokens, 2048))
    with pytest.raises(
        DataError, match="plain text for pretraining; conversations.*; finebridge pretrain trains on them"
    ):
        prepare([str(tmp_path / "back")], SOURCE, DataArguments(), tmp_path, wanted="chat")


def cut(prefix: Path) -> None:
    data = Path(f"{prefix}.bin").read_bytes()
    Path(f"{prefix}.bin").write_bytes(data[:-2])


def cut_index(prefix: Path) -> None:
    data = Path(f"{prefix}.idx").read_bytes()
    Path(f"{prefix}.idx").write_bytes(data[:-2])


BROKEN: dict[str, tuple[Callable[[Path], object], str]] = {
    "no index": (lambda p: Path(f"{p}.idx").unlink(), r"corpus_text_document\.idx: no such file; tokens are a \.bin"),
    "no tokens": (lambda p: Path(f"{p}.bin").unlink(), r"corpus_text_document\.bin: no such file"),
    "cut": (cut, r"sequence 2 \(2 tokens at byte 14\) does not lie in corpus_text_document\.bin \(16 bytes\)"),
    "cut index": (cut_index, "it was cut or is damaged"),
    "empty": (lambda p: written(p, []), "no tokens"),
    "beyond": (
        lambda p: written(p, [[1, 2], [3, 60000, 4]], np.uint16),
        r"sequence 1 holds id 60000, the vocabulary has \d+; is .*example_data the tokenizer that it was made with",
    ),
    "negative": (lambda p: written(p, [[1, -100]]), "sequence 0 holds id -100"),
    "floats": (lambda p: written(p, [[1, 2]], np.float32), "its values are float32, no token ids"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_token_files(name: str, tokens: Path, tmp_path: Path) -> None:
    spoil, why = BROKEN[name]
    spoil(tokens)
    with pytest.raises((DataError, IndexedError), match=why):
        open_text(str(tokens), SOURCE, DataArguments(), tmp_path / "cache")
    assert not list((tmp_path / "cache").glob("*/manifest.json"))


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("0.3 one 0.7 two", "several data sets with weights cannot be mixed yet"),
        ("{0},{0}", None),
        ("{0}.bin,{0}.bin", "token files are not joined"),
        ("{1}", "did you mean .*corpus_text_document?"),
        ("text.jsonl", None),
        ("2024 dumps/*.jsonl", None),
    ],
)
def test_names_that_are_no_token_files(name: str, why: str | None, tokens: Path) -> None:
    given = name.format(tokens, str(tokens).removesuffix("_text_document"))
    if why is None:
        assert token_prefix(given) is None
        return
    with pytest.raises(DataError, match=why):
        token_prefix(given)


def test_flags_of_raw_text_are_refused_beside_token_files(tokens: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="--append_eod is for raw text; .* holds tokens already"):
        open_text(str(tokens), SOURCE, DataArguments(append_eod=True), tmp_path)


def test_chats_are_refused(tmp_path: Path) -> None:
    chats = str(EXAMPLE / "train_lora.jsonl")
    with pytest.raises(
        DataError, match="are conversations; plain text .* needed here .*; finebridge sft trains on them"
    ):
        open_text(chats, SOURCE, DataArguments(), tmp_path / "cache")
