"""The layouts of other systems: bytes by hand, there and back, and every contradiction refused by name."""

import importlib.util
import json
import struct
import tracemalloc
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.blocks import Block, PreparedSource, write_prepared
from finebridge.data_tools.indexed import IndexedError, IndexedReader, IndexedWriter
from finebridge.data_tools.layout_base import LayoutOptions
from finebridge.data_tools.layouts import LAYOUTS
from finebridge.data_tools.layouts_cli import export_main, import_main
from finebridge.data_tools.packing import Packs
from finebridge.data_tools.schema import DataError
from finebridge.finetune.cli import main
from finebridge.storage.manifest import verify
from finebridge.storage.publish import publish

Samples = Sequence[tuple[Sequence[int], Sequence[tuple[int, int]]]]

TINY: Samples = [([1, 2, 3, 11, 12, 9], [(3, 6)]), ([4, 7, 9], [(1, 2), (2, 3)]), ([5, 6, 7, 8], [(1, 2), (3, 4)])]
IGNORE = -100


def prepared(folder: Path, samples: Samples) -> Path:
    """A published prepared dataset with these ids and spans."""
    with publish(folder, kind="dataset", made_from={}) as staging:
        with (
            IndexedWriter(staging / "text_document") as tokens,
            IndexedWriter(staging / "spans_document") as spans,
        ):
            for ids, pairs in samples:
                tokens.add(np.array(ids, dtype=np.int32))
                spans.add(np.array(pairs, dtype=np.int32).reshape(-1))
        rows = np.array([[0, i + 1] for i in range(len(samples))], dtype=np.int64).reshape(-1, 2)
        np.save(staging / "rows.npy", rows)
        (staging / "rejects.jsonl").touch()
        (staging / "report.json").write_text(json.dumps({"kind": "chat", "files": ["raw.jsonl"], "terminators": [9]}))
    return folder


def index_bytes(lengths: Sequence[int], code: int) -> bytes:
    size = {4: 4, 8: 2}[code]
    starts = [size * sum(lengths[:i]) for i in range(len(lengths))]
    count = len(lengths)
    return (
        b"MMIDIDX\x00\x00"
        + struct.pack("<QBQQ", 1, code, count, count + 1)
        + struct.pack(f"<{count}i", *lengths)
        + struct.pack(f"<{count}q", *starts)
        + struct.pack(f"<{count + 1}q", *range(count + 1))
    )


def ints(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}i", *values)


def shorts(*values: int) -> bytes:
    return struct.pack(f"<{len(values)}H", *values)


def packs(*groups: Sequence[int], capacity: int = 100) -> Packs:
    samples = [number for group in groups for number in group]
    return Packs(np.array(samples, dtype=np.int64), np.cumsum([0, *map(len, groups)]).astype(np.int64), capacity)


def export(name: str, samples: Samples, tmp_path: Path, **options: Any) -> Path:
    tmp_path.mkdir(exist_ok=True)
    source = prepared(tmp_path / f"source-{len(list(tmp_path.iterdir()))}", samples)
    LAYOUTS[name].export(source, tmp_path / "out" / "d", options=LayoutOptions(**options))
    return tmp_path / "out" / "d"


def loaded(name: str, prefix: Path, **options: Any) -> list[tuple[list[int], list[tuple[int, int]]]]:
    found = LAYOUTS[name].load(prefix, options=LayoutOptions(**options))
    return [(s.ids.tolist(), [tuple(span) for span in s.spans.tolist()]) for s in found]


def joined(samples: Samples) -> list[tuple[list[int], list[tuple[int, int]]]]:
    """The samples as a layout can tell them: spans that touch are one."""
    result = []
    for ids, spans in samples:
        merged: list[tuple[int, int]] = []
        for start, end in spans:
            if merged and merged[-1][1] == start:
                merged[-1] = (merged[-1][0], end)
            else:
                merged.append((start, end))
        result.append((list(ids), merged))
    return result


def random_samples(count: int, longest: int, vocabulary: int, seed: int = 0) -> Samples:
    """Samples with 1 to 4 spans each, none of them on the first token, which no layout of labels to come can hold."""
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(count):
        length = int(rng.integers(2, longest + 1))
        cuts = np.sort(rng.choice(np.arange(1, length + 1), min(length, 2 * int(rng.integers(1, 5))), replace=False))
        cuts = cuts[: len(cuts) // 2 * 2]
        spans = [(int(a), int(b)) for a, b in cuts.reshape(-1, 2)]
        samples.append((rng.integers(0, vocabulary, length).tolist(), spans))
    return samples


def names(prefix: Path) -> list[str]:
    return sorted(path.name for path in prefix.parent.iterdir())


# --- bytes by hand ---


def test_megatron_bytes(tmp_path: Path) -> None:
    prefix = export("megatron", TINY, tmp_path, vocab_size=65499)
    assert names(prefix) == ["d_text_document.bin", "d_text_document.idx"]
    assert Path(f"{prefix}_text_document.bin").read_bytes() == shorts(1, 2, 3, 11, 12, 9, 4, 7, 9, 5, 6, 7, 8)
    assert Path(f"{prefix}_text_document.idx").read_bytes() == index_bytes([6, 3, 4], 8)
    export("megatron", TINY, tmp_path, vocab_size=65500, replace=True)
    assert Path(f"{prefix}_text_document.bin").read_bytes() == ints(1, 2, 3, 11, 12, 9, 4, 7, 9, 5, 6, 7, 8)
    assert Path(f"{prefix}_text_document.idx").read_bytes() == index_bytes([6, 3, 4], 4)


def test_megatron_names_the_column(tmp_path: Path) -> None:
    prefix = export("megatron", TINY, tmp_path, json_key="content")
    assert names(prefix) == ["d_content_document.bin", "d_content_document.idx"]
    assert [ids for ids, _ in loaded("megatron", prefix, json_key="content")] == [list(ids) for ids, _ in TINY]
    with pytest.raises(DataError, match=r"d_text_document\.bin: no such file"):
        loaded("megatron", prefix)


def test_mindspeed_bytes(tmp_path: Path) -> None:
    prefix = export("mindspeed", TINY, tmp_path)
    keys = ("attention_mask", "input_ids", "labels")
    assert names(prefix) == [f"d_packed_{key}_document.{kind}" for key in keys for kind in ("bin", "idx")]
    values = {
        "input_ids": ints(1, 2, 3, 11, 12, 9, 4, 7, 9, 5, 6, 7, 8),
        "attention_mask": ints(*[1] * 13),
        "labels": ints(*[IGNORE] * 3, 11, 12, 9, IGNORE, 7, 9, IGNORE, 6, IGNORE, 8),
    }
    for key, expected in values.items():
        assert Path(f"{prefix}_packed_{key}_document.bin").read_bytes() == expected, key
        assert Path(f"{prefix}_packed_{key}_document.idx").read_bytes() == index_bytes([6, 3, 4], 4), key


@pytest.mark.parametrize("pack", ["pack", "neat"])
def test_mindspeed_packed_bytes(tmp_path: Path, pack: str) -> None:
    groups = packs([2, 1], [0])
    prefix = export("mindspeed", TINY, tmp_path, pack=pack, packs=groups, seq_length=9, pad_id=0)
    mask = [1, 1, 1, 1, 2, 2, 2, 0, 0, 1, 1, 1, 1, 1, 1, 0, 0, 0] if pack == "neat" else [1] * 18
    no = IGNORE
    values = {
        "input_ids": ints(5, 6, 7, 8, 4, 7, 9, 0, 0, 1, 2, 3, 11, 12, 9, 0, 0, 0),
        "attention_mask": ints(*mask),
        "labels": ints(no, 6, no, 8, no, 7, 9, no, no, no, no, no, 11, 12, 9, no, no, no),
    }
    for key, expected in values.items():
        assert Path(f"{prefix}_packed_{key}_document.bin").read_bytes() == expected, key
        assert Path(f"{prefix}_packed_{key}_document.idx").read_bytes() == index_bytes([9, 9], 4), key


def test_mindspeed_pair_bytes(tmp_path: Path) -> None:
    prefix = export("mindspeed", TINY[:2], tmp_path, pairs=True)
    values = {
        "chosen_input_ids": (ints(1, 2, 3, 11, 12, 9), [6]),
        "chosen_labels": (ints(*[IGNORE] * 3, 11, 12, 9), [6]),
        "rejected_input_ids": (ints(4, 7, 9), [3]),
        "rejected_labels": (ints(IGNORE, 7, 9), [3]),
    }
    assert names(prefix) == [f"d_packed_{key}_document.{kind}" for key in values for kind in ("bin", "idx")]
    for key, (data, lengths) in values.items():
        assert Path(f"{prefix}_packed_{key}_document.bin").read_bytes() == data, key
        assert Path(f"{prefix}_packed_{key}_document.idx").read_bytes() == index_bytes(lengths, 4), key


def test_pai_bytes(tmp_path: Path) -> None:
    """The first item is the example of the original: prompt 1 2 3, answer 11 12 9."""
    prefix = export(
        "pai", TINY, tmp_path, seq_length=8, pad_id=0, packs=packs([0], [1, 2]), pack="pack", vocab_size=300
    )
    no = IGNORE
    first = [1, 2, 3, 11, 12, -10, 0, 0], [no, no, 11, 12, 9, no, no, no]
    second = [4, 7, -10, 5, 6, 7, -9, 0], [7, 9, no, 6, no, 8, no, no]
    assert names(prefix) == ["d_text_document.bin", "d_text_document.idx"]
    assert Path(f"{prefix}_text_document.bin").read_bytes() == ints(*first[0], *first[1], *second[0], *second[1])
    assert Path(f"{prefix}_text_document.idx").read_bytes() == index_bytes([16, 16], 4)


@pytest.mark.parametrize(("vocabulary", "write", "code"), [(300, shorts, 8), (65499, shorts, 8), (65500, ints, 4)])
def test_autoalign_bytes(tmp_path: Path, vocabulary: int, write: Any, code: int) -> None:
    prefix = export("autoalign", TINY, tmp_path, vocab_size=vocabulary, seq_length=8)
    stem = "d_conversations_maxlen_8_conv"
    no = vocabulary + 1
    assert names(prefix) == [f"{stem}.idx", f"{stem}_input.bin", f"{stem}_label.bin"]
    folder = prefix.parent
    assert (folder / f"{stem}_input.bin").read_bytes() == write(1, 2, 3, 11, 12, 9, 4, 7, 9, 5, 6, 7, 8)
    assert (folder / f"{stem}_label.bin").read_bytes() == write(no, no, no, 11, 12, 9, no, 7, 9, no, 6, no, 8)
    assert (folder / f"{stem}.idx").read_bytes() == index_bytes([6, 3, 4], code)


def test_autoalign_pair_bytes(tmp_path: Path) -> None:
    prefix = export("autoalign", TINY[:2], tmp_path, vocab_size=20, seq_length=8, pairs=True, json_key="text")
    folder, stem = prefix.parent, "d_text_maxlen_8"
    assert (folder / f"{stem}_chosen_input.bin").read_bytes() == shorts(1, 2, 3, 11, 12, 9)
    assert (folder / f"{stem}_chosen_label.bin").read_bytes() == shorts(21, 21, 21, 11, 12, 9)
    assert (folder / f"{stem}_chosen.idx").read_bytes() == index_bytes([6], 8)
    assert (folder / f"{stem}_rejected_input.bin").read_bytes() == shorts(4, 7, 9)
    assert (folder / f"{stem}_rejected_label.bin").read_bytes() == shorts(21, 7, 9)
    assert (folder / f"{stem}_rejected.idx").read_bytes() == index_bytes([3], 8)
    assert len(names(prefix)) == 6


# --- there and back ---

CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "mindspeed": ("mindspeed", {}, {}),
    "mindspeed pairs": ("mindspeed", {"pairs": True}, {"pairs": True}),
    "mindspeed neat": ("mindspeed", {"pack": "neat", "seq_length": 41, "pad_id": 3}, {}),
    "mindspeed singles": (
        "mindspeed",
        {"pack": "pack", "seq_length": 41, "pad_id": 999},
        {"pack": "pack", "pad_id": 999},
    ),
    "pai": ("pai", {"seq_length": 40, "pad_id": 3}, {}),
    "pai checked": ("pai", {"seq_length": 40, "pad_id": 0, "vocab_size": 1000}, {"seq_length": 40, "pad_id": 0}),
    "autoalign": ("autoalign", {"seq_length": 40, "vocab_size": 1000}, {"seq_length": 40, "vocab_size": 1000}),
    "autoalign int32": (
        "autoalign",
        {"seq_length": 40, "vocab_size": 99_999},
        {"seq_length": 40, "vocab_size": 99_999},
    ),
    "autoalign pairs": (
        "autoalign",
        {"seq_length": 40, "vocab_size": 1000, "pairs": True},
        {"seq_length": 40, "vocab_size": 1000, "pairs": True},
    ),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("budget", [1, 100, 1 << 20])
def test_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, budget: int) -> None:
    monkeypatch.setattr("finebridge.data_tools.blocks._TOKENS", budget)  # many small blocks, or one
    name, to, back = CASES[case]
    samples = random_samples(60, 40, 998)
    prefix = export(name, samples, tmp_path, **to)
    assert loaded(name, prefix, **back) == joined(samples)


@pytest.mark.parametrize("budget", [1, 100, 1 << 20])
@pytest.mark.parametrize("case", ["mindspeed neat", "pai"])
def test_packs_there_and_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, budget: int) -> None:
    monkeypatch.setattr("finebridge.data_tools.blocks._TOKENS", budget)
    name, to, back = CASES[case]
    samples = random_samples(60, 10, 998)
    order = np.random.default_rng(5).permutation(60).tolist()
    groups = [order[i : i + 4] for i in range(0, 60, 4)]  # 4 x 10 tokens: some fill an item to its end
    pack = {"pack": "pack"} if name == "pai" else {}
    prefix = export(name, samples, tmp_path, **{**to, **pack, "packs": packs(*groups)})
    assert loaded(name, prefix, **back) == joined([samples[i] for i in order])


def test_megatron_there_and_back(tmp_path: Path) -> None:
    samples = random_samples(60, 40, 998)
    whole = [(ids, [(0, len(ids))]) for ids, _ in samples]
    assert loaded("megatron", export("megatron", samples, tmp_path, vocab_size=998)) == whole
    with IndexedWriter(tmp_path / "m_text_document") as writer:  # a document of two sequences, and one of none
        writer.add_document(np.array([1, 2, 3]), [1, 2])
        writer.add_document(np.array([], dtype=np.int32), [])
        writer.add(np.array([4]))
    assert loaded("megatron", tmp_path / "m") == [([1, 2, 3], [(0, 3)]), ([4], [(0, 1)])]


def test_plain_packs_come_back_without_padding(tmp_path: Path) -> None:
    """Where samples meet is not stored; a last token that is the pad token but has loss is no padding."""
    samples = [([1, 0, 5], [(2, 3)]), ([6, 0], [(1, 2)])]
    options = {"pack": "pack", "packs": packs([0, 1]), "seq_length": 8, "pad_id": 0}
    prefix = export("mindspeed", samples, tmp_path, **options)
    assert loaded("mindspeed", prefix, pack="pack", pad_id=0) == [([1, 0, 5, 6, 0], [(2, 3), (4, 5)])]


@pytest.mark.parametrize("case", CASES)
def test_no_samples(tmp_path: Path, case: str) -> None:
    name, to, back = CASES[case]
    assert loaded(name, export(name, [], tmp_path, **to), **back) == []


def test_loss_on_the_first_token_is_not_predicted(tmp_path: Path) -> None:
    samples: Samples = [([1, 2, 3], [(0, 3)])]
    assert loaded("mindspeed", export("mindspeed", samples, tmp_path / "a")) == joined(samples)
    one = {"seq_length": 4, "vocab_size": 9}
    assert loaded("pai", export("pai", samples, tmp_path / "b", **one, pad_id=0)) == [([1, 2, 3], [(1, 3)])]
    assert loaded("autoalign", export("autoalign", samples, tmp_path / "c", **one), **one) == [([1, 2, 3], [(1, 3)])]


# --- options and limits ---


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("pai", {"pad_id": 0}, "--seq_length is needed"),
        ("pai", {"seq_length": 9}, "--pad_id is needed"),
        ("pai", {"seq_length": 9, "pad_id": -1}, "--pad_id -1"),
        ("pai", {"seq_length": 9, "pad_id": 50, "vocab_size": 50}, "--pad_id 50"),
        ("pai", {"seq_length": 0, "pad_id": 0}, "--seq_length 0"),
        ("pai", {"seq_length": 9, "pad_id": 0, "pack": "neat"}, "choose --pack"),
        ("pai", {"seq_length": 9, "pad_id": 0, "pairs": True}, "preference pairs"),
        ("autoalign", {"seq_length": 9}, "--vocab_size is needed"),
        ("autoalign", {"vocab_size": 99}, "--seq_length is needed"),
        ("autoalign", {"seq_length": 9, "vocab_size": 99, "pad_id": 0}, "--pad_id means nothing"),
        ("autoalign", {"seq_length": 9, "vocab_size": 99, "pack": "pack"}, "never packed"),
        (
            "autoalign",
            {"seq_length": 9, "vocab_size": 12},
            r"sample of raw\.jsonl:1, token 4: its id is beyond --vocab_size 12",
        ),
        ("mindspeed", {"pack": "neat", "pad_id": 0}, "--seq_length is needed"),
        ("mindspeed", {"pack": "pack", "seq_length": 9}, "--pad_id is needed"),
        ("mindspeed", {"pad_id": 0}, "need --pack"),
        ("mindspeed", {"packs": packs([0, 1, 2])}, "need --pack"),
        ("mindspeed", {"pairs": True, "pack": "pack", "seq_length": 9, "pad_id": 0}, "pairs are never packed"),
        ("mindspeed", {"pairs": True}, "3 samples are no pairs"),
        ("megatron", {"seq_length": 9}, "--seq_length means nothing"),
        ("megatron", {"json_key": "a/b"}, "--json_key a/b: it cannot be a part of a file's name"),
        ("mindspeed", {"json_key": "text"}, "--json_key means nothing"),
        ("megatron", {"vocab_size": 11}, "token 3: its id is beyond"),
    ],
)
def test_options_that_do_not_fit(tmp_path: Path, name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(DataError, match=message):
        export(name, TINY, tmp_path, **options)
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_samples_that_do_not_fit(tmp_path: Path) -> None:
    """Six tokens go into 6 of Pai, but MindSpeed keeps one place for padding."""
    assert len(loaded("pai", export("pai", TINY, tmp_path / "a", seq_length=6, pad_id=0))) == 3
    for name, options in (
        ("pai", {"seq_length": 5, "pad_id": 0}),
        ("mindspeed", {"seq_length": 6}),
        ("autoalign", {"seq_length": 5, "vocab_size": 99}),
    ):
        with pytest.raises(
            DataError, match=r"more than 5 tokens do not fit, the first is that of raw\.jsonl:1 \(6 tokens\)"
        ):
            export(name, TINY, tmp_path, **options)
        prefix = export(name, TINY, tmp_path / name, over_long="drop", **options)
        options.pop("pad_id", None)
        assert loaded(name, prefix, **options) == joined(TINY[1:])
    both = export("mindspeed", [*TINY, TINY[1]], tmp_path, seq_length=6, pairs=True, over_long="drop")
    assert loaded("mindspeed", both, pairs=True) == joined([TINY[2], TINY[1]])  # the partner goes too


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        (packs([0, 1]), "pack 0 has 9 tokens, 8 fit"),
        (packs([0], [3]), "beyond the 3"),
        (packs([0], [-1]), "beyond the 3"),
        (packs([0], [], [1]), "do not divide"),
        (replace(packs([0], [1]), offsets=np.array([0, 1])), "do not divide"),
    ],
)
def test_wrong_packs(tmp_path: Path, groups: Packs, message: str) -> None:
    with pytest.raises(DataError, match=message):
        export("pai", TINY, tmp_path, seq_length=8, pad_id=0, pack="pack", packs=groups)


def test_nothing_half_written(tmp_path: Path) -> None:
    prefix = export("mindspeed", TINY, tmp_path)
    before = {path: path.read_bytes() for path in prefix.parent.iterdir()}
    with pytest.raises(DataError, match=r"d_packed_input_ids_document\.bin exists already; give --replace"):
        export("mindspeed", TINY[:1], tmp_path)
    with pytest.raises(DataError, match="beyond --vocab_size"):  # after the first block was written
        export("megatron", TINY, tmp_path, vocab_size=3)
    assert {path: path.read_bytes() for path in prefix.parent.iterdir()} == before
    export("mindspeed", TINY[:1], tmp_path, replace=True)
    assert loaded("mindspeed", prefix) == joined(TINY[:1])
    assert len(names(prefix)) == 6
    with pytest.raises(DataError, match=r"would be read as part of this dataset"):
        export("mindspeed", TINY[:2], tmp_path, pairs=True, replace=True)


def test_a_damaged_source_is_named(tmp_path: Path) -> None:
    for spans in ([(2, 1)], [(0, 9)], [(-1, 2)], [(0, 2), (1, 3)], [(1, 1)]):
        with pytest.raises(DataError, match=r"sample 1 has no tokens"):
            export("mindspeed", [TINY[0], ([4, 7, 9], spans)], tmp_path)
    with pytest.raises(DataError, match="sample 1 is empty"):
        export("mindspeed", [TINY[0], ([], [])], tmp_path)
    folder = prepared(tmp_path / "odd", TINY)
    with IndexedWriter(folder / "spans_document") as writer:
        for _ in TINY:
            writer.add(np.array([1, 2, 3]))
    with pytest.raises(DataError, match="sample 0 has a span without an end"):
        PreparedSource(folder).read(np.arange(3))


# --- contradictions in files from others ---


def rewrite(prefix: Path, ending: str, change: Any, dtype: str = "<i4") -> None:
    """Change the values of a file's tokens in place, and leave its index alone."""
    path = Path(f"{prefix}{ending}")
    values = np.frombuffer(path.read_bytes(), dtype).copy()
    change(values)
    path.write_bytes(values.tobytes())


def put(*pairs: tuple[int, int]) -> Any:
    def change(values: Any) -> None:
        for place, value in pairs:
            values[place] = value

    return change


@pytest.mark.parametrize(
    ("ending", "change", "message"),
    [
        ("labels", put((3, 12)), r"labels_document\.bin: sequence 0, token 3: its label is neither -100"),
        ("labels", put((15, 0)), r"sequence 1, token 6: padding has a label"),
        ("input_ids", put((0, -1)), r"input_ids_document\.bin: sequence 0, token 0: the value is no token id"),
        ("attention_mask", put((0, 0)), r"attention_mask_document\.bin: sequence 0, token 0: an attention mask"),
        ("attention_mask", put((9, 2)), r"sequence 1, token 0: an attention mask"),
        ("attention_mask", put((13, 3)), r"sequence 1, token 4: an attention mask"),
        ("attention_mask", put((15, 1)), r"sequence 1, token 6: an attention mask"),
        ("attention_mask", put((17, 1)), r"sequence 1, token 8: an attention mask"),
        ("attention_mask", put((14, -1)), r"sequence 1, token 5: an attention mask"),
    ],
)
def test_mindspeed_contradictions(tmp_path: Path, ending: str, change: Any, message: str) -> None:
    """Item 0 is the sample of six tokens; item 1 has four, two, and padding from token 6."""
    samples = [TINY[0], TINY[2], ([4, 7], [(1, 2)])]
    options = {"pack": "neat", "packs": packs([0], [1, 2]), "seq_length": 9, "pad_id": 0}
    prefix = export("mindspeed", samples, tmp_path, **options)
    assert loaded("mindspeed", prefix) == joined(samples)
    rewrite(prefix, f"_packed_{ending}_document.bin", change)
    with pytest.raises(DataError, match=message):
        loaded("mindspeed", prefix)


def test_mindspeed_columns_that_differ(tmp_path: Path) -> None:
    prefix = export("mindspeed", TINY, tmp_path)
    for lengths, message in (([6, 4, 3], "sequence 1 has 4 values, .* 3"), ([6, 7], "2 sequences, .* has 3")):
        with IndexedWriter(Path(f"{prefix}_packed_labels_document")) as writer:
            writer.add_many(np.zeros(13, dtype=np.int32), lengths)
        with pytest.raises(DataError, match=rf"labels_document\.idx: {message}"):
            loaded("mindspeed", prefix)
    Path(f"{prefix}_packed_labels_document.idx").unlink()
    with pytest.raises(DataError, match=r"labels_document\.idx: no such file"):
        loaded("mindspeed", prefix)
    pairs = export("mindspeed", TINY[:2], tmp_path / "p", pairs=True)
    for key in ("rejected_input_ids", "rejected_labels"):
        with IndexedWriter(Path(f"{pairs}_packed_{key}_document")):
            pass
    with pytest.raises(DataError, match="0 rejected answers, 1 chosen"):
        loaded("mindspeed", pairs, pairs=True)


def test_an_item_of_padding_alone(tmp_path: Path) -> None:
    options = {"pack": "pack", "packs": packs([0], [1, 2]), "seq_length": 9, "pad_id": 0}
    prefix = export("mindspeed", TINY, tmp_path, **options)
    rewrite(prefix, "_packed_input_ids_document.bin", lambda values: values[9:].fill(0))
    rewrite(prefix, "_packed_labels_document.bin", lambda values: values[9:].fill(IGNORE))
    with pytest.raises(DataError, match="sequence 1, token 0: the whole item is padding"):
        loaded("mindspeed", prefix, pack="pack", pad_id=0)


@pytest.mark.parametrize(
    ("change", "options", "message"),
    [
        (put((5, 9)), {}, "sequence 0, token 0: no token of the item is marked"),
        (put((6, 5)), {}, "sequence 0, token 6: padding holds another token"),
        (put((8 + 6, 5)), {}, "sequence 0, token 6: padding holds another token, or a label"),
        (put(), {"pad_id": 1}, "sequence 0, token 6: padding holds another token"),
        (put((8 + 2, 12)), {}, "sequence 0, token 2: its label is neither"),
        (put((8 + 5, 9)), {}, "sequence 0, token 5: its label is neither"),
        (put((16 + 8 + 2, 5)), {}, "sequence 1, token 2: its label is neither"),  # the next sample's first token
        (put(), {"vocab_size": 12}, "sequence 0, token 4: the value is no token id"),
        (put(), {"seq_length": 7}, r"sequence 0 has 16 values, not 2 x 7"),
    ],
)
def test_pai_contradictions(tmp_path: Path, change: Any, options: dict[str, Any], message: str) -> None:
    to = {"seq_length": 8, "pad_id": 0, "pack": "pack", "packs": packs([0], [1, 2])}
    prefix = export("pai", TINY, tmp_path, **to)
    rewrite(prefix, "_text_document.bin", change)
    with pytest.raises(DataError, match=rf"d_text_document\.(bin|idx): {message}"):
        loaded("pai", prefix, **options)


def test_pai_in_unsigned_numbers_is_refused(tmp_path: Path) -> None:
    with IndexedWriter(tmp_path / "d_text_document", np.uint16) as writer:
        writer.add(np.array([1, 65526, 9, 65436]))
    with pytest.raises(DataError, match="uint16 holds neither -100 nor end marks"):
        loaded("pai", tmp_path / "d")


def test_autoalign_contradictions(tmp_path: Path) -> None:
    options = {"seq_length": 8, "vocab_size": 300}
    prefix = export("autoalign", TINY, tmp_path, **options)
    with pytest.raises(DataError, match=r"no such file"):
        loaded("autoalign", prefix, seq_length=9, vocab_size=300)
    with pytest.raises(
        DataError, match=r"conv_label\.bin: sequence 0, token 0: its label is neither 302 nor the token"
    ):
        loaded("autoalign", prefix, seq_length=8, vocab_size=301)
    rewrite(prefix, "_conversations_maxlen_8_conv_input.bin", put((7, 300)), "<u2")
    with pytest.raises(DataError, match=r"conv_input\.bin: sequence 1, token 1: the value is no token id of a voc"):
        loaded("autoalign", prefix, **options)
    Path(f"{prefix}_conversations_maxlen_8_conv_label.bin").write_bytes(bytes(24))
    with pytest.raises(IndexedError, match=r"conv\.idx: sequence 2 .* does not lie in .*conv_label\.bin"):
        loaded("autoalign", prefix, **options)


# --- the commands ---


def test_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples = random_samples(60, 30, 998)
    source, prefix = prepared(tmp_path / "source", samples), tmp_path / "out" / "d"
    common = ["--layout", "mindspeed", "--neat_pack", "--seq_length", "64", "--pad_id", "0"]
    assert export_main([str(source), "--output_prefix", str(prefix), *common]) == 0
    said = capsys.readouterr().out
    assert f"60 samples, {sum(len(ids) for ids, _ in samples):,} tokens in" in said
    assert "% of each filled" in said
    assert import_main([str(prefix), "--output_dir", str(tmp_path / "back"), *common]) == 0
    assert "data: 60 samples" in capsys.readouterr().out
    made_from = verify(tmp_path / "back")["made_from"]
    assert made_from["layout"] == "mindspeed"
    assert len(made_from["files"]) == 6
    block = PreparedSource(tmp_path / "back").read(np.arange(60))
    found = sorted((sample.ids.tolist(), sample.spans.tolist()) for sample in block.samples())
    assert found == sorted((ids, [list(span) for span in spans]) for ids, spans in joined(samples))
    report = json.loads((tmp_path / "back" / "report.json").read_text())
    assert report["files"] == [f"{prefix}_packed_input_ids_document.bin"]
    with pytest.raises(DataError, match="exists already; choose another --output"):
        import_main([str(prefix), "--output_dir", str(tmp_path / "back"), *common])
    with pytest.raises(DataError, match="exists already; give --replace"):
        export_main([str(source), "--output_prefix", str(prefix), *common])
    assert export_main([str(source), "--output_prefix", str(prefix), *common, "--replace"]) == 0


def test_the_import_is_what_raw_files_would_have_given(tmp_path: Path) -> None:
    source = prepared(tmp_path / "source", joined(random_samples(50, 30, 998)))
    assert export_main([str(source), "--output_prefix", str(tmp_path / "d"), "--layout", "mindspeed"]) == 0
    assert import_main([str(tmp_path / "d"), "--output_dir", str(tmp_path / "back"), "--layout", "mindspeed"]) == 0
    for name in ("text_document.bin", "text_document.idx", "spans_document.bin", "spans_document.idx"):
        assert (tmp_path / "back" / name).read_bytes() == (source / name).read_bytes(), name
    assert np.array_equal(np.load(tmp_path / "back" / "rows.npy"), np.load(source / "rows.npy"))
    report = json.loads((tmp_path / "back" / "report.json").read_text())
    reader = IndexedReader(source / "text_document")
    assert report["terminators"] == []  # a label's last token may be a line break, or any word
    assert report["tokens"] == int(reader.lengths.sum())
    assert report["samples"] == report["rows"] == 50


def test_what_an_export_leaves_out_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = prepared(tmp_path / "source", TINY)
    words = [
        str(source),
        "--layout",
        "pai",
        "--seq_length",
        "5",
        "--pad_id",
        "0",
        "--output_prefix",
        str(tmp_path / "d"),
    ]
    with pytest.raises(DataError, match="--over_long drop"):
        export_main([*words, "--pack"])
    assert export_main([*words, "--pack", "--over_long", "drop"]) == 0
    assert "do not fit: 1 sample: raw.jsonl:1 (6 tokens)" in capsys.readouterr().out
    assert sorted(loaded("pai", tmp_path / "d")) == sorted(joined(TINY[1:]))


def test_what_an_import_leaves_out_is_listed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    samples: Samples = [TINY[0], ([1, 2], []), ([3, 4], [(0, 1)]), TINY[1]]
    prefix = export("mindspeed", samples, tmp_path)
    assert import_main([str(prefix), "--layout", "mindspeed", "--output_dir", str(tmp_path / "back")]) == 0
    assert "left out, no_loss: 2" in capsys.readouterr().out
    rejects = [json.loads(line) for line in (tmp_path / "back" / "rejects.jsonl").read_text().splitlines()]
    assert [(row["line"], row["code"]) for row in rejects] == [(2, "no_loss"), (3, "no_loss")]
    assert np.load(tmp_path / "back" / "rows.npy").tolist() == [[0, 1], [0, 4]]
    paired = export("mindspeed", samples, tmp_path / "p", pairs=True)
    with pytest.raises(DataError, match="none of its 4 samples"):  # each pair lacks a trained answer
        import_main([str(paired), "--layout", "mindspeed", "--pairs", "--output_dir", str(tmp_path / "none")])
    assert not (tmp_path / "none").exists()


def test_megatron_import_counts_empty_documents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with IndexedWriter(tmp_path / "m_text_document", np.uint16) as writer:
        writer.add_document(np.array([1, 2, 3]), [1, 2])
        writer.add_document(np.array([], dtype=np.int32), [])
        writer.add(np.array([4, 5]))
    assert import_main([str(tmp_path / "m"), "--layout", "megatron", "--output_dir", str(tmp_path / "back")]) == 0
    assert "left out, empty: 1" in capsys.readouterr().out
    assert [PreparedSource(tmp_path / "back").read(np.array([i])).ids.tolist() for i in (0, 1)] == [[1, 2, 3], [4, 5]]


@pytest.fixture
def model(tmp_path: Path, tokenizers_by_template: dict[str, Any]) -> Path:
    """A tokenizer and chat template for which a row of one digit and n digits as answer has n + 5 tokens."""
    from finebridge.data_tools.templates import ChatTemplate

    ChatTemplate(tokenizers_by_template["hunyuan_dense"], "hunyuan_dense")
    tokenizers_by_template["hunyuan_dense"].save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def conversations(path: Path, *tokens: int) -> Path:
    rows = [[{"role": "user", "content": "1"}, {"role": "assistant", "content": "2" * (n - 5)}] for n in tokens]
    path.write_text("".join(json.dumps({"messages": row}) + "\n" for row in rows))
    return path


def build(*words: object) -> int:
    return main(["data", "build", *map(str, words)])


def test_build_writes_over_files_when_told(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = conversations(tmp_path / "a.jsonl", 7, 2100)
    words = (data, "--tokenizer_name_or_path", model, "--output_prefix", tmp_path / "d")
    assert build(*words) == 0
    assert "2 samples, 2,107 tokens in 2 items" in capsys.readouterr().out  # a limit that nobody gave is none
    assert build(*words) == 2
    assert "exists already; give --replace" in capsys.readouterr().err
    conversations(data, 9)
    assert build(*words, "--replace") == 0
    assert "1 sample, 9 tokens in 1 item;" in capsys.readouterr().out
    assert [len(ids) for ids, _ in loaded("mindspeed", tmp_path / "d")] == [9]
    assert build(data, "--tokenizer_name_or_path", model, "--output_dir", tmp_path / "o", "--replace") == 2
    assert "--replace is for the files of --output_prefix" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["--max_seq_length", "--seq_length"])
def test_build_keeps_to_a_length_without_packs_too(
    tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str], flag: str
) -> None:
    """MindSpeed-LLM skips samples of its --seq-length."""
    data = conversations(tmp_path / "a.jsonl", 7, 12, 11)
    words = (data, "--tokenizer_name_or_path", model, "--output_prefix", tmp_path / "d", flag, 12)
    assert build(*words, "--over_long", "error") == 2
    assert f"the first is that of {data}:2 (12 tokens)" in capsys.readouterr().err
    assert build(*words) == 0
    assert f"do not fit: 1 sample: {data}:2 (12 tokens)" in capsys.readouterr().out
    assert [len(ids) for ids, _ in loaded("mindspeed", tmp_path / "d")] == [7, 11]
    assert build(*words, "--over_long", "split_turns", "--replace") == 0
    assert f"do not fit: 1 sample: {data}:2 (12 tokens)" in capsys.readouterr().out


def test_build_tells_what_training_leaves_out(tmp_path: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = conversations(tmp_path / "a.jsonl", 7, 13, 11)
    words = (data, "--tokenizer_name_or_path", model, "--output_dir", tmp_path / "o", "--max_seq_length", 12)
    assert build(*words) == 0
    *_, said, folder = capsys.readouterr().out.splitlines()
    assert said == f"data: 1 of 3 samples are over --max_seq_length 12: {data}:2 (13); dropped"
    assert Path(folder).is_dir()
    assert build(*words, "--over_long", "error") == 2
    assert f"1 of 3 samples are over --max_seq_length 12: {data}:2 (13)" in capsys.readouterr().err


def test_build_names_the_column_of_texts(tmp_path: Path, model: Path) -> None:
    data = tmp_path / "texts.jsonl"
    data.write_text('{"content": "12"}\n')
    words = (data, "--tokenizer_name_or_path", model, "--output_prefix", tmp_path / "out" / "d")
    assert build(*words, "--json_keys", "content") == 0
    assert {"d_content_document.bin", "d_content_document.idx"} <= set(names(tmp_path / "out" / "d"))


def test_a_changed_source_is_refused(tmp_path: Path) -> None:
    source = prepared(tmp_path / "source", TINY)
    (source / "text_document.bin").write_bytes(bytes(13 * 4))
    with pytest.raises(ValueError, match=r"text_document\.bin: its checksum"):
        export_main([str(source), "--layout", "megatron", "--output_prefix", str(tmp_path / "d")])
    with pytest.raises(DataError, match="no prepared dataset"):
        export_main([str(tmp_path), "--layout", "megatron", "--output_prefix", str(tmp_path / "d")])


def test_memory_does_not_grow_with_the_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finebridge.data_tools.blocks._TOKENS", 1 << 16)
    count, length = 20_000, 200  # 16 MB of tokens, 64 MB of files
    block = Block(
        np.arange(count * length, dtype=np.int32) % 900,
        np.arange(count * length) % length > 100,
        np.full(count, length),
        np.arange(count),
    )
    with publish(tmp_path / "source", kind="dataset", made_from={}) as folder:
        write_prepared(folder, [block], Path("raw"))
    options = LayoutOptions(pack="neat", seq_length=256, pad_id=0)
    tracemalloc.start()
    try:
        LAYOUTS["mindspeed"].export(tmp_path / "source", tmp_path / "d", options=options)
        back = write_prepared(tmp_path, LAYOUTS["mindspeed"].blocks(tmp_path / "d", options=LayoutOptions()), Path("d"))
        assert tracemalloc.get_traced_memory()[1] < 12_000_000
    finally:
        tracemalloc.stop()
    assert back["samples"] == count
    assert back["loss_tokens"] == count * 99
    assert (tmp_path / "text_document.bin").read_bytes() == (tmp_path / "source" / "text_document.bin").read_bytes()


@pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed; it is the oracle here"
)
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", ["megatron", "mindspeed", "pai"])
def test_stock_megatron_opens_what_is_written(tmp_path: Path, name: str) -> None:
    from megatron.core.datasets.indexed_dataset import IndexedDataset

    options = {"seq_length": 8, "pad_id": 0} if name == "pai" else {}
    prefix = export(name, TINY, tmp_path, **options)
    for index in prefix.parent.glob("*.idx"):
        theirs, ours = IndexedDataset(str(index.with_suffix(""))), IndexedReader(index.with_suffix(""))
        assert len(theirs) == len(ours) == 3
        assert all(np.array_equal(theirs[i], ours[i]) for i in range(3))
