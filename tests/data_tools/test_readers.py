"""Every kind of file, whole and broken: rows keep their line and offset, hostile files end in one clear error."""

import gzip
import json
import pickle
import subprocess
import sys
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.data_tools.formats import RowForm, parse_row
from finebridge.data_tools.readers import (
    MAX_LINE_BYTES,
    Chunk,
    files_of,
    parse_json,
    read_chunks,
    resolve_files,
    rows_of,
)
from finebridge.data_tools.schema import DataError, Rejected

ROWS = [{"text": f"row {number} ä中\nnext"} for number in range(50)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()


def read(file: Path, size: int = 1 << 20) -> list[tuple[int, int, Any]]:
    """Line, offset and value of every row; a rejection by its code."""
    rows = [row for chunk in read_chunks(file, size) for row in rows_of(chunk)]
    assert all(origin.file == file for origin, _ in rows)
    return [(o.line, o.offset, row.code if isinstance(row, Rejected) else row) for o, row in rows]


def values(file: Path) -> list[Any]:
    return [row for _, _, row in read(file)]


# ---- lines


@pytest.mark.parametrize("size", [3, 7, 64, 1000, 1 << 20])
def test_lines_keep_number_and_offset_whatever_the_block_size(tmp_path: Path, size: int) -> None:
    file = tmp_path / "a.jsonl"
    data = b'\xef\xbb\xbf{"a":1}\n\n  \n{"a":2}\r\n{"a":\n' + LINES + b'\n{"a":3}'
    file.write_bytes(data)
    rows = read(file, size)
    assert [row for _, _, row in rows] == [{"a": 1}, {"a": 2}, "not_json", *ROWS, {"a": 3}]
    assert [line for line, _, _ in rows] == [1, 4, 5, *range(6, 56), 57]
    for line, offset, value in rows:
        written = data[offset:].split(b"\n", 1)[0]
        assert written == data.removeprefix(b"\xef\xbb\xbf").split(b"\n")[line - 1]
        assert isinstance(value, str) or json.loads(written) == value


@pytest.mark.parametrize("extra", [1, 5 << 20])
@pytest.mark.parametrize("end", [b"\n", b'\n\n{"a":2}\n', b""])
def test_a_line_too_long_is_one_rejection_and_the_next_keep_their_place(tmp_path: Path, extra: int, end: bytes) -> None:
    file = tmp_path / "a.jsonl"
    long = b"x" * (MAX_LINE_BYTES + extra)
    file.write_bytes(b'{"a":1}\n' + long + end)
    expected: list[Any] = [(1, 0, {"a": 1}), (2, 8, "line_too_long")]
    if b"2" in end:
        expected.append((4, 8 + len(long) + 2, {"a": 2}))
    assert read(file) == expected


def test_a_line_of_just_the_limit_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b'"' + b"x" * (MAX_LINE_BYTES - 2) + b'"\n{}\n')
    assert [len(row) for row in values(file)] == [MAX_LINE_BYTES - 2, 0]


def test_a_text_file_is_a_row_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.txt"
    file.write_bytes(b'one\r\n\n  \n{"a": 1}\n\xff\xfe\n' + "zwei ä".encode())
    assert read(file) == [
        (1, 0, {"text": "one"}),
        (4, 9, {"text": '{"a": 1}'}),
        (5, 18, "not_utf8"),
        (6, 21, {"text": "zwei ä"}),
    ]


def test_chunks_are_of_the_asked_size_and_cheap_to_send(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(LINES * 200)
    chunks = list(read_chunks(file, 10_000))
    assert 9_000 < max(len(chunk.data) for chunk in chunks) < 12_000
    assert pickle.loads(pickle.dumps(chunks[1])) == chunks[1]
    assert len(pickle.dumps(chunks[1])) < len(chunks[1].data) + 500


@pytest.mark.parametrize(
    ("line", "code", "detail"),
    [
        (b"{", "not_json", "column 2"),
        (b"\xff\xfe{}", "not_utf8", "byte 1 is not UTF-8"),
        (b'{"a": "\xc3("}', "not_utf8", "byte 8"),
        ('{"a": "ü"}'.encode("utf-16"), "not_utf8", "byte 1"),
        (b'{"a": NaN}', "not_json", "column 7"),
        (b'{"a": Infinity}', "not_json", "column"),
        (b'{"a": "\\ud800"}', "not_json", "column"),
        (b"{'a': 1}", "not_json", "column 2"),
        (b'{"a": 1} {"b": 2}', "not_json", "column"),
        (b'{"a": "tab\there"}', "not_json", "column"),
        (b"[" * 100_000, "not_json", "column"),
        (b'{"a":' * 3000 + b"1" + b"}" * 3000, "not_json", "column"),
        (b"x" * (MAX_LINE_BYTES + 1), "line_too_long", "16,777,217 bytes"),
        (b'{"a": 1, "b": 2, "a": 1}', "duplicate_key", "'a' comes twice"),
        (b'{"m": [{"role": "user", "role": "tool"}]}', "duplicate_key", "'role'"),
        (b'{"a" : 1, "a" : 2}', "duplicate_key", "'a'"),
        (b'{"a\\"": 1, "a\\"": 2}', "duplicate_key", "'a\"'"),
        (b'{"a": 1, "\\u0061": 2}', "duplicate_key", "'a'"),
        (b'{"a":{"b":' * 500 + b'1,"b":2' + b"}}" * 500, "not_json", ""),
    ],
)
def test_lines_that_are_no_json(line: bytes, code: str, detail: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse_json(line)
    assert caught.value.code == code
    assert detail in caught.value.detail
    assert len(caught.value.detail) < 300


@pytest.mark.parametrize(
    "value",
    [
        {"a": 'he said "a": "b"'},
        {"a": ": b", "c": ["x", ": y"]},
        {'a"': 1, "b\\": {"c": []}},
        {"a": "\\", "b": '\\":'},
        {"n": 10**18, 'x": "y': 1.5},
        [{"a": 1}, {"a": 2}],
        "text",
    ],
)
def test_text_that_looks_like_keys_is_no_duplicate(value: Any) -> None:
    assert parse_json(json.dumps(value).encode()) == value


def test_the_slow_way_reads_what_the_fast_way_reads() -> None:
    assert parse_json(b'{"n" : 1' + b"0" * 300 + b"}") == {"n": 1e300}


# ---- tables and arrays


def write_parquet(file: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(ROWS), file, row_group_size=20)


def write_arrow_file(file: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_file(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_arrow_stream(file: Path) -> None:
    import pyarrow as pa

    table = pa.Table.from_pylist(ROWS)
    with pa.ipc.new_stream(str(file), table.schema) as writer:
        writer.write_table(table, max_chunksize=7)


def write_csv(file: Path) -> None:
    import csv

    with file.open("w", newline="", encoding="utf-8") as stream:
        writer = csv.DictWriter(stream, ["text"])
        writer.writeheader()
        writer.writerows(ROWS)


TABLES: list[tuple[str, Callable[[Path], Any]]] = [
    ("a.parquet", write_parquet),
    ("file.arrow", write_arrow_file),
    ("stream.arrow", write_arrow_stream),
    ("a.csv", write_csv),
    ("a.json", lambda file: file.write_text(json.dumps(ROWS, indent=1), encoding="utf-8")),
]


@pytest.mark.parametrize(("name", "write"), TABLES, ids=[name for name, _ in TABLES])
def test_tables_and_arrays_give_the_rows_that_were_written(
    tmp_path: Path, name: str, write: Callable[[Path], Any]
) -> None:
    file = tmp_path / name
    write(file)
    assert resolve_files([str(file)]) == [file]
    assert read(file, 300) == [(number, -1, row) for number, row in enumerate(ROWS, 1)]
    assert len(list(read_chunks(file, 300))) > 5


@pytest.mark.parametrize("limit", [0, 1000, 1 << 30])
def test_large_and_small_row_groups_give_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, limit: int
) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq
    from finebridge.data_tools import tables

    rows = [{"m": [{"a": "same", "b": f"{number}" * number}], "n": number} for number in range(90)]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "a.parquet", row_group_size=40)
    monkeypatch.setattr(tables, "_SMALL_GROUP", limit)
    assert read(tmp_path / "a.parquet", 500) == [(number, -1, row) for number, row in enumerate(rows, 1)]


def test_nested_rows_of_a_table(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [
        {"messages": [{"role": "user", "content": "q", "n": None}], "m": [("k", "v")], "n": 1, "d": None},
        {"messages": None, "m": [], "n": None, "d": "x"},
        {"messages": [], "m": None, "n": 3, "d": "x"},
    ]
    schema = pa.schema(
        {
            "messages": pa.list_(pa.struct({"role": pa.string(), "content": pa.large_string(), "n": pa.null()})),
            "m": pa.map_(pa.string(), pa.string()),
            "n": pa.int64(),
            "d": pa.dictionary(pa.int32(), pa.string()),
        }
    )
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "a.parquet")
    del rows[0]["messages"][0]["n"]  # nobody can tell a null in a struct from a key that was not there
    assert values(tmp_path / "a.parquet") == rows


def call(name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A tool called by the assistant."""
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": name, "arguments": arguments}}],
    }


USER = {"role": "user", "content": "q"}
CALLS = [
    {
        "messages": [USER, call("weather", {"city": "Paris", "near": {"km": 5}})],
        "tools": [{"name": "weather"}],
    },
    {"messages": [USER, call("search", {"query": "x", "near": {"mi": 5, "of": [{"a": 1}, {"b": 2}]}})], "kind": "s"},
    {"messages": [USER, {"role": "assistant", "content": "a"}], "chat_template_kwargs": {"x": 1}},
    {"messages": [USER, call("now", {})]},
    {"messages": [USER, {"role": "assistant", "content": "b"}], "chat_template_kwargs": {"y": 1}},
]


@pytest.mark.parametrize("kind", ["parquet", "arrow"])
def test_a_key_of_one_row_is_none_of_the_others(tmp_path: Path, kind: str) -> None:
    """Tool-call arguments carry loss, so ``"query": null`` from another row's call would be trained."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    table = pa.concat_tables([pa.Table.from_pylist([row]) for row in CALLS], promote_options="permissive")
    if kind == "parquet":
        pq.write_table(table, tmp_path / "a.parquet")
    else:
        with pa.ipc.new_file(str(tmp_path / "a.arrow"), table.schema) as writer:
            writer.write_table(table)
    lines = tmp_path / "a.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in CALLS))
    made = values(tmp_path / f"a.{kind}")
    assert [{key: value for key, value in row.items() if value is not None} for row in made] == CALLS
    how = RowForm("messages")
    assert [parse_row(row, how) for row in made] == [parse_row(row, how) for row in values(lines)]


def test_structs_in_maps_lose_their_nulls_and_lists_keep_theirs(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    inner = pa.struct({"a": pa.string(), "b": pa.list_(pa.string())})
    table = pa.table(
        {"m": pa.array([[("k", {"a": None, "b": [None, "x"]}), ("n", None)]], pa.map_(pa.string(), inner))}
    )
    pq.write_table(table, tmp_path / "a.parquet")
    assert values(tmp_path / "a.parquet") == [{"m": [("k", {"b": [None, "x"]}), ("n", None)]}]


def test_json_cells_of_datasets_are_decoded(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    rows = [{"m": [{"c": "x"}]}, {"m": [{"c": [{"type": "text", "text": "y"}]}]}, {"m": [{"c": None}]}]
    features = datasets.Features({"m": datasets.List({"c": datasets.Json()})})
    saved = datasets.Dataset.from_list(rows, features=features)
    saved.save_to_disk(str(tmp_path / "saved"))
    saved.to_parquet(str(tmp_path / "a.parquet"))
    assert resolve_files([str(tmp_path / "saved")]) == [tmp_path / "saved"]
    assert [file.suffix for file in files_of(tmp_path / "saved")] == [".arrow"]
    expected = [*rows[:2], {"m": [{}]}]  # datasets stores a null and a missing value alike
    assert values(tmp_path / "saved") == expected
    assert values(tmp_path / "a.parquet") == expected


def test_a_saved_folder_is_one_source_in_shard_order(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    saved = datasets.Dataset.from_list(ROWS)
    saved.save_to_disk(str(tmp_path / "one"), num_shards=3)
    assert read(tmp_path / "one") == [(number, -1, row) for number, row in enumerate(ROWS, 1)]
    datasets.DatasetDict({"train": saved, "test": saved}).save_to_disk(str(tmp_path / "dict"))
    with pytest.raises(DataError, match="several splits; name one of .*dict/test, .*dict/train"):
        resolve_files([str(tmp_path / "dict")])
    (tmp_path / "one" / "state.json").write_text('{"_data_files": [{"filename": "../../etc/passwd"}]}')
    with pytest.raises(DataError, match="not in the folder"):
        resolve_files([str(tmp_path / "one")])
    (tmp_path / "one" / "state.json").write_text("[]")
    with pytest.raises(DataError, match="not what datasets writes"):
        resolve_files([str(tmp_path / "one")])


def test_csv_values_are_strings_as_written(tmp_path: Path) -> None:
    file = tmp_path / "a.csv"
    file.write_bytes(b'\xef\xbb\xbfq,a\r\n1,"two\n\nlines, ""x"""\r\n\r\nnull,\r\n')
    assert values(file) == [{"q": "1", "a": 'two\n\nlines, "x"'}, {"q": "null", "a": ""}]


def test_json_lines_under_the_name_json_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_bytes(LINES)
    assert values(file) == ROWS
    assert read(file)[1][:2] == (2, LINES.index(b"\n") + 1)


def test_an_array_with_a_key_that_comes_twice_is_refused_like_a_line(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    twice = '{"messages": [{"role": "user", "content": "q", "content": "SECOND"}]}'
    for text, number in [
        (f"[{twice}]", 1),
        (f'[{{"a": "x\\": y"}},\n {twice}, {{}}]', 2),
        ('[{"a" : 1}, {"content" : 1, "content" : 2}]', 2),
        ('[1, {"a" : 1}, {"content": 1, "content": 2}]', 3),
    ]:
        file.write_text(text)
        with pytest.raises(DataError, match=rf"a.json: row {number}: the key 'content' comes twice.*\(.jsonl\)"):
            values(file)


def test_arrays_whose_texts_look_like_keys_are_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    rows = [{"a": 'he said "a": "b" : c'}, {"a": "\\", "b": '\\":'}, [], "x", 5, {"a": {"a": [{"a": 1}, {"a": 2}]}}]
    for text in (json.dumps(rows), json.dumps(rows, indent=2), json.dumps(rows, separators=(" , ", " : "))):
        file.write_text(text)
        assert values(file) == rows


# ---- packed files


def pack(name: str, data: bytes) -> bytes:
    if name == "zst":
        import zstandard

        return zstandard.ZstdCompressor().compress(data)
    return gzip.compress(data)


@pytest.mark.parametrize("name", ["gz", "zst"])
@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "txt"])
def test_packed_files_of_several_parts(tmp_path: Path, name: str, kind: str) -> None:
    file = tmp_path / f"a.{kind}.{name}"
    content = {"jsonl": LINES, "json": json.dumps(ROWS).encode(), "csv": b"text\na\nb\n", "txt": b"a\nb\n"}[kind]
    half = len(content) // 2
    file.write_bytes(pack(name, content[:half]) + pack(name, b"") + pack(name, content[half:]))
    assert resolve_files([str(file)]) == [file]
    assert values(file) == (ROWS if kind.startswith("json") else [{"text": "a"}, {"text": "b"}])


@pytest.mark.parametrize("name", ["gz", "zst"])
@pytest.mark.parametrize("lost", [1, 5, 60, -9])
def test_packed_files_that_are_cut_off_or_broken(tmp_path: Path, name: str, lost: int) -> None:
    file = tmp_path / f"a.jsonl.{name}"
    packed = pack(name, LINES * 3)
    file.write_bytes(packed[:-lost] if lost > 0 else packed[:40] + bytes(20) + packed[60:])
    with pytest.raises(DataError, match=f"{file}: the (file is cut off|packed data is broken)"):
        list(read_chunks(file))
    file.write_bytes(packed + b"garbage" * 10)
    with pytest.raises(DataError, match=str(file)):
        list(read_chunks(file))


# ---- bombs, in a process of its own whose memory is measured

BOMBS = """
import gzip, resource, sys, zlib
from pathlib import Path
import pyarrow as pa, pyarrow.parquet as pq, pyarrow.csv, zstandard, numpy
from finebridge.data_tools.readers import read_chunks
from finebridge.data_tools.schema import DataError
folder, kind = Path(sys.argv[1]), sys.argv[2]
file = folder / f"bomb.{kind}"
big = pa.array(["a" * (1 << 20)])
if kind == "parquet":
    column = pa.DictionaryArray.from_arrays(pa.array(numpy.zeros(4096, numpy.int32)), big)
    pq.write_table(pa.table({"text": column}), file, compression="zstd", store_schema=False, write_statistics=False)
elif kind == "one-row.parquet":
    column = pa.DictionaryArray.from_arrays(pa.array(numpy.zeros(4096, numpy.int32)), big)
    pq.write_table(pa.table({"text": pa.ListArray.from_arrays(pa.array([0, 4096]), column)}), file, store_schema=False,
                   write_statistics=False)
elif kind == "arrow":
    column = pa.DictionaryArray.from_arrays(pa.array(numpy.zeros(4096, numpy.int32)), big)
    with pa.ipc.new_file(str(file), pa.schema({"text": column.type})) as writer:
        writer.write_table(pa.table({"text": column}))
elif kind == "jsonl.gz":
    packer = zlib.compressobj(9, wbits=31)
    block = b"\\n" * (1 << 20)
    file.write_bytes(b"".join(packer.compress(block) for _ in range(200)) + packer.flush())
elif kind == "jsonl.zst":
    packer = zstandard.ZstdCompressor().compressobj()
    block = b"x" * (1 << 20)
    file.write_bytes(b"".join(packer.compress(block) for _ in range(400)) + packer.flush())
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    for chunk in read_chunks(file):
        pass
except DataError as error:
    print("DataError", error)
print(file.stat().st_size, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


@pytest.mark.parametrize("kind", ["parquet", "one-row.parquet", "arrow", "jsonl.gz", "jsonl.zst"])
def test_a_bomb_is_refused_in_bounded_memory(tmp_path: Path, kind: str) -> None:
    done = subprocess.run(
        [sys.executable, "-c", BOMBS, str(tmp_path), kind], capture_output=True, text=True, check=True
    )
    message, figures = done.stdout.strip().split("\n")
    size, grown = map(int, figures.split())
    assert size < 2_000_000
    assert message.startswith(f"DataError {tmp_path / f'bomb.{kind}'}: ")
    assert "of its bytes unpack to " in message
    assert grown < 300_000  # KiB, of gigabytes


def test_a_large_row_group_of_nothing_is_a_bomb_before_it_is_read(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = tmp_path / "a.parquet"
    table = pa.table({"text": ["a" * (1 << 20)] * 40})
    pq.write_table(table, file, compression="zstd", use_dictionary=False)
    with pytest.raises(DataError, match=f"^{file}: .* times as many; this is no training data"):
        next(read_chunks(file))


def test_a_row_of_a_table_that_is_too_long_is_one_rejection(tmp_path: Path) -> None:
    import os

    import pyarrow as pa
    import pyarrow.parquet as pq

    long = os.urandom(MAX_LINE_BYTES // 2 + 100).hex()
    rows = ["a", long, "b"]
    pq.write_table(pa.table({"text": rows}), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet") == [(1, -1, {"text": "a"}), (2, -1, "line_too_long"), (3, -1, {"text": "b"})]


# ---- files that are found, and those that are not


def test_files_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl", "x,y.jsonl", "sub/deep/d.txt", "sub/.hidden", "sub/_SUCCESS"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("{}\n")
    names = [tmp_path / f"{n}.jsonl" for n in "abc"]
    assert resolve_files([f"{tmp_path}/c.jsonl,{tmp_path}/[ab].jsonl"]) == [names[2], names[0], names[1]]
    assert resolve_files([f"{tmp_path}/x,y.jsonl"]) == [tmp_path / "x,y.jsonl"]
    assert resolve_files([str(tmp_path)]) == [*names, tmp_path / "sub/deep/d.txt", tmp_path / "x,y.jsonl"]
    assert resolve_files([f"{tmp_path}/**/*.txt"]) == [tmp_path / "sub/deep/d.txt"]
    assert resolve_files([f"{tmp_path}/a.jsonl", f"{tmp_path}/a.jsonl"]) == [names[0]] * 2


def test_many_names_in_one_value_and_a_name_that_is_too_long(tmp_path: Path) -> None:
    names = [tmp_path / f"{number:0100}.jsonl" for number in range(60)]
    for name in names:
        name.write_text("{}\n")
    assert resolve_files([",".join(map(str, names))]) == names
    for name in ("x" * 300, "/".join(["x" * 200] * 30)):
        with pytest.raises(DataError, match="no such data file"):
            resolve_files([name])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("gone.jsonl", None, "no such data file"),
        ("gone/name", None, "no such data file"),
        ("a.xlsx", b"x", "known are .jsonl, .json, .parquet, .arrow, .csv, .txt"),
        ("a", b"x", "this kind of file is not read"),
        ("a.parquet.gz", b"x", "this kind of file is not read"),
        ("a.gz", b"x", "this kind of file is not read"),
        ("empty.jsonl", b"", "is empty"),
        ("empty.parquet", b"", "is empty"),
        ("hub:name", None, "hub:OWNER/NAME"),
        ("hub:a/b:train[:5%]", None, "hub:OWNER/NAME"),
    ],
)
def test_names_that_are_no_data(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: bytes | None, message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=message.replace("[", r"\[")):
        resolve_files([name])


def test_a_folder_with_other_files_is_refused_with_the_glob_to_use(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is empty"):
        resolve_files([str(tmp_path)])
    (tmp_path / "a.jsonl").write_text("{}")
    (tmp_path / "notes.md").write_text("x")
    with pytest.raises(DataError, match=r"notes.md: .*\*\.jsonl"):
        resolve_files([str(tmp_path)])
    with pytest.raises(DataError, match="no data file is named"):
        resolve_files([" , "])


def test_a_hub_name_that_cannot_be_had_says_so() -> None:
    pytest.importorskip("datasets")  # offline by the tests' settings
    with pytest.raises(DataError, match="^hub:no-one/nothing: datasets cannot load it: Couldn't reach") as caught:
        resolve_files(["hub:no-one/nothing"])
    told = str(caught.value)
    assert "no network, or no such data set" in told
    assert "'hf download --repo-type dataset no-one/nothing --local-dir DIR'" in told
    assert "HF_HUB_OFFLINE=1 fails at once" in told


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b'[{"a": 1},\n {"a": NaN}]', "a.json:2: column 8.*only the bad row"),
        ("a.json", b'{"a": 1}', "one JSON object where a list of rows is expected"),
        ("a.json", b'{"a": 1}\n', "one JSON object"),
        ("a.json", b'{\n"a": [1]}\n', "one JSON object"),
        ("a.json", b'"text"', "one JSON string"),
        ("a.json", b"\xff", "column"),
        ("a.parquet", b"PAR1 no PAR1", "cannot be read as parquet"),
        ("a.arrow", b"no table", "no Arrow data, or cut off"),
        ("b.arrow", b"ARROW1\0\0 no table", "cannot be read as arrow"),
        ("a.csv", b"a,b\n1,2\n\n3,4,5\n", "row 2 has 3 fields instead of 2"),
        ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', "row 2 has 1 fields instead of 2"),
        ("a.csv", b"a,a\n1,2\n", "two columns are named 'a'"),
        ("a.csv", b"a,b\n" + b"1,2\n" * 9000 + b"\xff,2\n", "invalid UTF8"),
        ("a.csv", b"\xff\xfea,b\n", "not UTF-8"),
        ("a.csv", b"\n\n", "no header line"),
        ("a.csv", b"x" * (1 << 21), "longer than a megabyte"),
        ("a.csv", b"a\n" + b"x" * (2 * MAX_LINE_BYTES + 100) + b"\nb\n", "cannot be read as csv"),
    ],
)
def test_broken_files_are_one_error_that_names_them(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    file = tmp_path / name
    file.write_bytes(content)
    with pytest.raises(DataError, match=message) as caught:
        list(read_chunks(file))
    assert str(caught.value).startswith(str(file))
    assert len(str(caught.value)) < len(str(file)) + 300


@pytest.mark.parametrize(("name", "write"), TABLES[:3], ids=[name for name, _ in TABLES[:3]])
def test_a_table_with_flipped_bytes_is_read_or_refused(tmp_path: Path, name: str, write: Callable[[Path], Any]) -> None:
    file = tmp_path / name
    write(file)
    whole = file.read_bytes()
    outcomes: set[str] = set()
    for position in range(0, len(whole), max(1, len(whole) // 60)):
        file.write_bytes(whole[:position] + bytes([whole[position] ^ 0xFF]) + whole[position + 1 :])
        try:
            outcomes.add("read" if len(values(file)) >= 0 else "")
        except DataError:
            outcomes.add("refused")
    assert "refused" in outcomes


def test_a_stream_that_lost_its_last_batches_is_refused(tmp_path: Path) -> None:
    import pyarrow as pa

    file = tmp_path / "a.arrow"
    write_arrow_stream(file)
    with pa.memory_map(str(file)) as source:
        pa.ipc.open_stream(source).read_next_batch()
        whole = file.read_bytes()
        ends = source.tell()
    assert 0 < ends < len(whole)
    file.write_bytes(whole[:ends])
    with pytest.raises(DataError, match="cut off"):
        list(read_chunks(file))


def test_two_columns_of_one_name_and_types_that_are_no_text(tmp_path: Path) -> None:
    import pyarrow as pa
    import pyarrow.parquet as pq

    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["text", "text"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(DataError, match="two columns are named 'text'"):
        list(read_chunks(tmp_path / "a.parquet"))
    pq.write_table(pa.table({"b": pa.array([b"x" * 100], pa.binary(100))}), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="'b' holds fixed-size binary"):
        list(read_chunks(tmp_path / "b.parquet"))
    views = pa.table({"v": pa.array(["x"]).cast(pa.string_view())})
    with pa.ipc.new_file(str(tmp_path / "v.arrow"), views.schema) as writer:
        writer.write_table(views)
    with pytest.raises(DataError, match="'v' has the type string_view"):
        list(read_chunks(tmp_path / "v.arrow"))


def test_rows_of_takes_decoded_rows_as_they_are() -> None:
    chunk = Chunk(Path("a.parquet"), 5, -1, [{"a": 1}, None])
    assert [(origin.line, row) for origin, row in rows_of(chunk)] == [(5, {"a": 1}), (6, None)]
    assert zlib.crc32(pickle.dumps(chunk)) == zlib.crc32(pickle.dumps(chunk))
