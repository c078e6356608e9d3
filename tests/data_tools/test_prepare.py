"""From files to a prepared dataset, its cache, its limits and its batches."""

import json
import re
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.blocks import Block, write_prepared
from finebridge.data_tools.collator import PaddingCollator
from finebridge.data_tools.dataset import DummyDataset, PreparedDataset
from finebridge.data_tools.indexed import IndexedError, IndexedReader, IndexedWriter
from finebridge.data_tools.preprocess import TokenizerSource, prepare
from finebridge.data_tools.schema import DataError
from finebridge.storage import progress
from finebridge.storage.manifest import verify
from finebridge.storage.publish import publish

ARGS = DataArguments(chat_template="hunyuan_dense")


def rows_file(path: Path, answers: list[str | None]) -> Path:
    """One row an answer; None writes a line that is no JSON."""
    lines = [
        "{broken" if answer is None
        else json.dumps({"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": answer}]})
        for answer in answers
    ]  # fmt: skip
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def tokenizer(tokenizers_by_template: dict[str, Any]) -> Any:
    return tokenizers_by_template["hunyuan_dense"]


@pytest.fixture
def source(tokenizer: Any, tmp_path: Path) -> TokenizerSource:
    """The tokenizer as a saved folder, as users name it, without a chat template of its own."""
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return TokenizerSource(str(tmp_path / "tokenizer"))


def test_what_is_written_is_what_was_encoded(tmp_path: Path, tokenizer: Any, source: TokenizerSource) -> None:
    said: list[str] = []
    file = rows_file(tmp_path / "a.jsonl", ["one", "two two", "three"])
    folder = prepare([str(file)], source, ARGS, tmp_path / "cache", said.append)
    verify(folder)
    data = PreparedDataset(folder, 100)
    assert len(data) == 3
    item = data[1]
    assert tokenizer.decode(item["input_ids"].tolist()).endswith("<｜hy_Assistant｜>two two<｜hy_place▁holder▁no▁2｜>")
    trained = item["labels"] != -100
    assert tokenizer.decode(item["input_ids"][trained].tolist()) == "two two<｜hy_place▁holder▁no▁2｜>"
    assert (item["labels"][trained] == item["input_ids"][trained]).all()
    assert data.terminators == [tokenizer.convert_tokens_to_ids("<｜hy_place▁holder▁no▁2｜>")]
    assert str(data.origin_of(2)) == f"{file}:3"
    assert "3 rows -> 3 samples" in said[-1]


def test_second_call_reuses_and_a_change_rebuilds(tmp_path: Path, source: TokenizerSource) -> None:
    said: list[str] = []
    file = rows_file(tmp_path / "a.jsonl", ["one"])
    first = prepare([str(file)], source, ARGS, tmp_path / "cache", said.append)
    again = prepare([str(file)], source, ARGS, tmp_path / "cache", said.append)
    assert again == first
    assert "prepared" in said[0]
    assert "reused" in said[1]
    stat = file.stat()
    file.write_text(file.read_text().replace("one", "two"))
    import os

    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # same size, same time, other content
    assert prepare([str(file)], source, ARGS, tmp_path / "cache", said.append) != first
    fast = DataArguments(chat_template="hunyuan_dense", think_mode="fast")
    assert prepare([str(file)], source, fast, tmp_path / "cache", said.append) != first


def test_worker_processes_give_the_same_bytes(tmp_path: Path, source: TokenizerSource) -> None:
    file = rows_file(tmp_path / "a.jsonl", [f"answer {i}" * (i % 5 + 1) if i % 9 else None for i in range(300)])
    folders = [
        prepare(
            [str(file)],
            source,
            DataArguments(chat_template="hunyuan_dense", preprocessing_num_workers=workers, max_rejects=0.5),
            tmp_path / str(workers),
        )
        for workers in (1, 2)
    ]
    for name in (
        "text_document.bin",
        "text_document.idx",
        "spans_document.bin",
        "rows.npy",
        "rejects.jsonl",
        "report.json",
    ):
        assert (folders[0] / name).read_bytes() == (folders[1] / name).read_bytes(), name


def test_a_long_build_tells_how_far_it_is(
    tmp_path: Path, source: TokenizerSource, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    said: list[str] = []
    files = [str(rows_file(tmp_path / f"{name}.jsonl", ["x" * 400] * size)) for name, size in (("a", 30), ("b", 90))]
    prepare(files, source, ARGS, tmp_path / "cache", said.append)
    for what in ("checksums", "data"):
        shares = [int(found[1]) for line in said if (found := re.match(rf"{what}: (\d+)% of \d+ MB read, ", line))]
        assert shares == sorted(shares)
        assert shares[-1] == 100
        assert shares[0] < 100
        assert any(re.match(rf"{what}: \d+ MB read in \d+ s", line) for line in said)


def test_rejects_are_counted_and_listed(tmp_path: Path, source: TokenizerSource) -> None:
    said: list[str] = []
    file = rows_file(tmp_path / "a.jsonl", ["a", None, "<think>open", "b"])
    args = DataArguments(chat_template="hunyuan_dense", max_rejects=0.5)
    folder = prepare([str(file)], source, args, tmp_path / "cache", said.append)
    listed = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], row["code"]) for row in listed] == [(2, "not_json"), (3, "bad_think")]
    assert "4 rows -> 2 samples" in said[0]
    assert "not_json 1" in said[0]
    assert str(folder / "rejects.jsonl") in said[1]


def test_too_many_rejects_stop_the_run(tmp_path: Path, source: TokenizerSource) -> None:
    file = rows_file(tmp_path / "a.jsonl", ["a"] * 9 + [None])
    with pytest.raises(DataError, match=rf"1 of 10 rows are rejected(.|\n)*{file}:10: not_json"):
        prepare([str(file)], source, ARGS, tmp_path / "cache")
    none_left = rows_file(tmp_path / "b.jsonl", [None])
    with pytest.raises(DataError, match=r"b\.jsonl: no row can be read"):
        prepare([str(none_left)], source, ARGS, tmp_path / "cache")
    lenient = DataArguments(chat_template="hunyuan_dense", max_rejects=1, data_format="messages")
    with pytest.raises(DataError, match="none is left"):
        prepare([str(none_left)], source, lenient, tmp_path / "cache")


def test_over_long_samples(tmp_path: Path, source: TokenizerSource) -> None:
    said: list[str] = []
    file = rows_file(tmp_path / "a.jsonl", ["short", "long " * 50, "short"])
    folder = prepare([str(file)], source, ARGS, tmp_path / "cache")
    dropped = PreparedDataset(folder, 40, "drop", said.append)
    assert len(dropped) == 2
    assert [str(origin) for origin, _ in dropped.over_long_rows] == [f"{file}:2"]
    assert "1 of 3 samples are over --max_seq_length 40" in said[0]
    cut = PreparedDataset(folder, 40, "truncate", said.append)
    assert len(cut[1]["input_ids"]) == 40
    assert (cut[1]["labels"][1:] != -100).any()
    with pytest.raises(DataError, match=f"{file}:2"):
        PreparedDataset(folder, 40, "error")
    # cut so short that only the prompt is left: never a sample without loss
    with pytest.raises(DataError, match="every sample"):
        PreparedDataset(folder, 3, "truncate", said.append)


def test_a_cut_that_leaves_loss_on_the_first_token_alone(tmp_path: Path) -> None:
    """That token is never predicted, so the sample would be a batch without loss."""
    trained = np.zeros(26, np.bool_)
    trained[[0, 10, 22]] = True  # a sample of 20 tokens, and one of 6
    lengths = np.asarray([20, 6])
    with publish(tmp_path / "data", kind="dataset", made_from={}) as folder:
        write_prepared(folder, [Block(np.arange(26, dtype=np.int32), trained, lengths, np.arange(2))], Path("raw"))
    said: list[str] = []
    data = PreparedDataset(tmp_path / "data", 10, "truncate", said.append)
    assert [item["input_ids"].tolist() for item in (data[n] for n in range(len(data)))] == [[20, 21, 22, 23, 24, 25]]
    assert [(str(origin), tokens) for origin, tokens in data.over_long_rows] == [("raw:1", 20)]
    assert "(1 without any loss token left: dropped)" in said[0]
    assert len(PreparedDataset(tmp_path / "data", 11, "truncate", said.append)) == 2


def test_no_chat_template_names_those_shipped(tmp_path: Path, source: TokenizerSource) -> None:
    file = rows_file(tmp_path / "a.jsonl", ["a"])
    with pytest.raises(DataError, match=r"no chat template.*hunyuan_dense"):
        prepare([str(file)], source, DataArguments(), tmp_path / "cache")
    with pytest.raises(DataError, match="did you mean hunyuan_dense"):
        prepare([str(file)], source, DataArguments(chat_template="hunyuan_dens"), tmp_path / "cache")
    with pytest.raises(DataError, match=r"no token <\|im_"):
        prepare([str(file)], source, DataArguments(chat_template="chatml"), tmp_path / "cache")


def test_padding_is_told_by_lengths_not_by_the_pad_token() -> None:
    items = [
        {"input_ids": np.array([1, 2, 0]), "labels": np.array([-100, 2, 0])},
        {"input_ids": np.array([3, 4]), "labels": np.array([-100, 4])},
    ]
    batch = PaddingCollator(pad_id=0)(items)
    assert batch["input_ids"].tolist() == [[1, 2, 0], [3, 4, 0]]
    assert batch["labels"].tolist() == [[-100, 2, 0], [-100, 4, -100]]  # token 0 of the first row is trained
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_dummy_data_is_reproducible() -> None:
    data = DummyDataset(100, 16, seed=3)
    assert len(data) == 1000
    assert data[5]["input_ids"].tolist() == DummyDataset(100, 16, seed=3)[5]["input_ids"].tolist()
    assert data[5]["input_ids"].tolist() != data[6]["input_ids"].tolist()
    assert (data[5]["labels"] == data[5]["input_ids"]).all()


def test_index_bytes_are_megatrons(tmp_path: Path) -> None:
    """The header and arrays, field by field, as Megatron-Core's indexed_dataset.py lays them out."""
    with IndexedWriter(tmp_path / "x") as writer:
        writer.add(np.array([5, 6, 7], dtype=np.int32))
        writer.add(np.array([8], dtype=np.int32))
    raw = (tmp_path / "x.idx").read_bytes()
    expected = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, 4, 2, 3) + struct.pack("<ii", 3, 1)
    expected += struct.pack("<qq", 0, 12) + struct.pack("<qqq", 0, 1, 2)
    assert raw == expected
    assert (tmp_path / "x.bin").read_bytes() == struct.pack("<iiii", 5, 6, 7, 8)
    reader = IndexedReader(tmp_path / "x")
    assert [reader[i].tolist() for i in range(len(reader))] == [[5, 6, 7], [8]]


@pytest.mark.parametrize("damage", ["magic", "cut", "pointer", "bin"])
def test_damaged_index_is_refused(tmp_path: Path, damage: str) -> None:
    with IndexedWriter(tmp_path / "x") as writer:
        writer.add(np.arange(8, dtype=np.int32))
    raw = bytearray((tmp_path / "x.idx").read_bytes())
    if damage == "magic":
        raw[0] = 0
    elif damage == "cut":
        del raw[-1]
    elif damage == "pointer":
        raw[38:46] = struct.pack("<q", 400)
    else:
        (tmp_path / "x.bin").write_bytes(b"1234")
    (tmp_path / "x.idx").write_bytes(bytes(raw))
    with pytest.raises(IndexedError, match=r"x\.idx"):
        IndexedReader(tmp_path / "x")
