"""Parquet, Arrow and CSV to lists of rows, with a byte budget that holds for hostile files too.

A 300-byte Parquet file can stand for gigabytes: one long value in a dictionary, named by thousands of rows, while its
metadata claims a megabyte. So text columns stay dictionary-encoded while they are read, the size of every row is
computed from lengths alone, and only then are rows made, about ``budget`` bytes at a time.
"""

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import numpy.typing as npt
import orjson

from .schema import DataError

MAX_ROW_BYTES = 16 * 1024 * 1024
MAX_RATIO = 500  # bytes of text that one byte on disk may stand for; text that people write stays under 50
RATIO_SLACK = 64 * 1024 * 1024  # bytes before the ratio is judged
_BATCH_ROWS = 1024
_END_OF_STREAM = b"\xff\xff\xff\xff\0\0\0\0"
_MAX_HEADER = 1 << 20
_SMALL_GROUP = 32 * 1024 * 1024
_MAX_GROUP_RATIO = 100  # of the pages of a large row group; text compresses to a fifth, and dictionaries come before
_MAX_FIXED = 64  # bytes; such values cannot stay dictionary-encoded
_VALUE_BYTES = 16  # what a number or a null counts


@dataclass(frozen=True, slots=True)
class TooLong:
    """Stands for a row or line that is too long to be held; ``size`` is its length in bytes."""

    size: int


def check_ratio(file: Path, unpacked: int, packed: int) -> None:
    """Raises DataError when a file unpacks to far more than real text does: it is a bomb, made or broken."""
    if unpacked > RATIO_SLACK and unpacked > MAX_RATIO * max(packed, 1):
        raise _bomb(file, unpacked, packed)


def _bomb(file: Path, unpacked: int, packed: int) -> DataError:
    return DataError(
        f"{file}: {packed:,} of its bytes unpack to {unpacked:,} or more, {unpacked // max(packed, 1):,} times as many; "
        "this is no training data (a decompression bomb?)"
    )


def read_parquet(file: Path, budget: int) -> Iterator[list[object]]:
    """Rows of a Parquet file as dicts (TooLong for a row over 16 MiB), about ``budget`` bytes a list.

    A null in a struct, at any depth, is a key that is not there; a null of a column of its own stays. Raises DataError for
    a broken file and for a bomb. Row groups of more than 32 MiB are read without dictionaries, which
    would grow as large as the group; a bomb hidden among that many true bytes is noticed a batch late.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(file) as probe:
            schema, about = probe.schema_arrow, probe.metadata
            leaves: list[Any] = [probe.schema.column(i) for i in range(len(probe.schema))]  # pyright: ignore[reportArgumentType]
        if wide := [
            leaf.path for leaf in leaves if leaf.physical_type == "FIXED_LEN_BYTE_ARRAY" and leaf.length > _MAX_FIXED
        ]:
            raise DataError(f"{file}: the column {wide[0]!r} holds fixed-size binary values; store text as strings")
        text = [leaf.path for leaf in leaves if leaf.physical_type == "BYTE_ARRAY"]

        def batches() -> Iterator[Any]:
            for number in range(about.num_row_groups):
                group = about.row_group(number)
                size = (
                    group.total_byte_size
                )  # as the metadata says; asking its columns aborts Python on some broken files
                if size > _SMALL_GROUP and size > _MAX_GROUP_RATIO * file.stat().st_size:
                    raise _bomb(file, size, file.stat().st_size)
                small = size <= _SMALL_GROUP
                step = _BATCH_ROWS if small else max(1, min(_BATCH_ROWS, 4 * budget * group.num_rows // size))
                with pq.ParquetFile(
                    file,
                    metadata=about,
                    read_dictionary=text if small else None,
                    pre_buffer=False,
                    buffer_size=1 << 20,
                    arrow_extensions_enabled=False,
                ) as table:
                    yield from table.iter_batches(step, row_groups=[number], use_threads=False)

        yield from _rows(file, batches(), schema, budget)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(file, error) from None


def read_arrow(file: Path, budget: int) -> Iterator[list[object]]:
    """Rows of an Arrow IPC file or stream (what ``datasets`` writes), as ``read_parquet`` gives them.

    Batches that the writer compressed are unpacked one at a time before they are measured.
    """
    import pyarrow as pa

    try:
        with pa.memory_map(str(file)) as source:
            if source.read(6) == b"ARROW1":
                table = pa.ipc.open_file(source)
                batches = (table.get_batch(i) for i in range(table.num_record_batches))
            else:
                source.seek(max(0, source.size() - len(_END_OF_STREAM)))
                if source.read() != _END_OF_STREAM:
                    raise DataError(f"{file}: no Arrow data, or cut off; copy or make it again")
                source.seek(0)
                table = pa.ipc.open_stream(source)
                batches = iter(table)
            yield from _rows(file, batches, table.schema, budget)
    except (pa.ArrowException, OSError, ValueError) as error:
        raise _unreadable(file, error) from None


def read_csv(file: Path, unpack: Callable[[], BinaryIO], budget: int) -> Iterator[list[object]]:
    """Rows of a CSV file with a header line; every value is a string, an empty field the empty string.

    ``unpack`` opens the file's unpacked content; it is called twice. Raises DataError, with the row (counted from 1,
    without the header and blank lines), when a row has another number of fields than the header.
    """
    import pyarrow as pa
    from pyarrow import csv

    bad: list[Any] = []

    def refuse(row: Any) -> str:
        bad.append(row)
        return "error"

    try:
        with unpack() as stream:
            names = _csv_header(file, stream)
        with unpack() as source:
            table = csv.open_csv(
                source,
                read_options=csv.ReadOptions(use_threads=False, block_size=MAX_ROW_BYTES),
                parse_options=csv.ParseOptions(newlines_in_values=True, invalid_row_handler=refuse),
                convert_options=csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.string()), strings_can_be_null=False, null_values=[]
                ),
            )
            yield from _rows(file, iter(table), table.schema, budget)
    except (pa.ArrowException, OSError, ValueError) as error:
        if bad:
            raise DataError(
                f"{file}: row {bad[0].number - 1} has {bad[0].actual_columns} fields instead of "
                f"{bad[0].expected_columns}; fields with commas or line breaks must stand in double quotes"
            ) from None
        raise _unreadable(file, error) from None


def saved_shards(folder: Path) -> list[Path]:
    """The Arrow files of a folder that ``datasets`` wrote with ``save_to_disk``, in their order. Raises DataError."""
    try:
        state = json.loads((folder / "state.json").read_text(encoding="utf-8"))
        names = [entry["filename"] for entry in state["_data_files"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise DataError(f"{folder}: its state.json is not what datasets writes ({error})") from None
    shards = [folder / str(name) for name in names]
    for shard in shards:
        if shard.parent != folder or not shard.is_file():
            raise DataError(f"{folder}: state.json names {shard.name!r}, which is not in the folder")
    return shards


def _csv_header(file: Path, stream: BinaryIO) -> list[str]:
    """The column names. Raises DataError when one comes twice or there is none."""
    import csv
    import io

    lines = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        names = next((row for row in csv.reader(_bounded(file, lines)) if row), [])
    except UnicodeDecodeError:
        raise DataError(f"{file}: not UTF-8; convert it (it may be GBK, Latin-1 or UTF-16)") from None
    except csv.Error as error:
        raise DataError(f"{file}:1: the header cannot be read: {error}") from None
    if not names:
        raise DataError(f"{file}: there is no header line")
    if twice := [name for name in names if names.count(name) > 1]:
        raise DataError(f"{file}:1: two columns are named {twice[0]!r}")
    return names


def _bounded(file: Path, lines: TextIO) -> Iterator[str]:
    while line := lines.readline(_MAX_HEADER):
        if len(line) == _MAX_HEADER:
            raise DataError(f"{file}:1: the header line is longer than a megabyte")
        yield line


def _rows(file: Path, batches: Iterator[Any], schema: Any, budget: int) -> Iterator[list[object]]:
    """Record batches to lists of rows of about ``budget`` bytes; ``schema`` says what must be restored."""
    packed = file.stat().st_size
    if twice := [name for name in schema.names if schema.names.count(name) > 1]:
        raise DataError(f"{file}: two columns are named {twice[0]!r}")
    restorers = {field.name: restore for field in schema if (restore := _restorer(field.type))}
    total = 0
    for batch in batches:
        batch.validate(full=True)  # offsets and UTF-8 of a file that others wrote
        sizes = np.zeros(batch.num_rows, np.int64)
        for name, column in zip(batch.schema.names, batch.columns, strict=True):
            sizes += _sizes(file, name, column)
        ends = np.cumsum(sizes)
        start = before = 0
        while start < batch.num_rows:
            stop = max(start + 1, int(np.searchsorted(ends, before + budget, "right")))
            total += int(ends[stop - 1]) - before
            if not file.name.endswith((".gz", ".zst")):  # their ratio is watched while they are unpacked
                check_ratio(file, total, packed)
            if sizes[start] > MAX_ROW_BYTES:
                yield [TooLong(int(sizes[start]))]
            else:
                rows: list[Any] = _plain(batch.slice(start, stop - start)).to_pylist()
                for name, restore in restorers.items():
                    for row in rows:
                        row[name] = restore(row[name])
                yield rows
            start, before = stop, int(ends[stop - 1])


def _restorer(kind: Any) -> Callable[[Any], Any] | None:
    """What turns a column's values into those that were stored; None where they are so already.

    Strings may hold JSON: ``datasets`` stores values of mixed types so (its ``Json`` feature), and left alone, texts would
    keep their JSON quotes. A struct has the keys of all rows' objects, null where an object had no such key; nobody can
    tell these from nulls that were written, so every null in a struct is taken for a key that is not there.
    """
    from pyarrow import types

    if getattr(kind, "extension_name", None) == "arrow.json":
        return lambda value: None if value is None else orjson.loads(value)
    if types.is_list(kind) or types.is_large_list(kind):
        if item := _restorer(kind.value_type):
            return lambda value: None if value is None else [item(one) for one in value]
    elif types.is_map(kind):
        if item := _restorer(kind.item_type):
            return lambda value: None if value is None else [(key, item(one)) for key, one in value]
    elif types.is_struct(kind):
        inner = {field.name: restore for field in kind if (restore := _restorer(field.type))}
        return lambda value: None if value is None else _restored(value, inner)
    return None


def _restored(fields: dict[str, Any], inner: Mapping[str, Callable[[Any], Any]]) -> dict[str, Any]:
    """An object without its nulls, and with the values of ``inner`` restored."""
    if None in fields.values():
        fields = {key: value for key, value in fields.items() if value is not None}
    for key, restore in inner.items():
        if key in fields:
            fields[key] = restore(fields[key])
    return fields


def _sizes(file: Path, name: str, array: Any) -> npt.NDArray[np.int64]:
    """The bytes of each element of an Arrow array (int64, shape [n]), computed without making the values."""
    import pyarrow as pa
    from pyarrow import types
    from pyarrow.compute import binary_length  # pyright: ignore[reportAttributeAccessIssue] - made at run time

    kind = array.type
    if isinstance(kind, pa.BaseExtensionType):
        return _sizes(file, name, array.storage)
    if types.is_dictionary(kind):
        inside = _sizes(file, name, array.dictionary)
        index = array.indices.fill_null(0).to_numpy(zero_copy_only=False)
        return inside[index] if inside.size else np.zeros(len(array), np.int64)
    if types.is_string(kind) or types.is_binary(kind) or types.is_large_string(kind) or types.is_large_binary(kind):
        return binary_length(array).fill_null(0).to_numpy(zero_copy_only=False).astype(np.int64) + _VALUE_BYTES
    if types.is_struct(kind):
        return sum((_sizes(file, name, array.field(i)) for i in range(kind.num_fields)), np.zeros(len(array), np.int64))
    if types.is_list(kind) or types.is_large_list(kind) or types.is_map(kind):
        values = (
            pa.StructArray.from_arrays([array.keys, array.items], ["k", "v"]) if types.is_map(kind) else array.values
        )
        ends = np.concatenate(([0], np.cumsum(_sizes(file, name, values))))
        offsets = array.offsets.to_numpy()
        return ends[offsets[1:]] - ends[offsets[:-1]] + _VALUE_BYTES
    if types.is_primitive(kind) or types.is_null(kind) or types.is_decimal(kind):
        return np.full(len(array), _VALUE_BYTES, np.int64)
    raise DataError(f"{file}: the column {name!r} has the type {kind}, which is not read; store text as strings")


def _plain(batch: Any) -> Any:
    """The batch with dictionaries replaced by their values: making rows is then several times faster."""
    import pyarrow as pa

    return batch.cast(pa.schema([field.with_type(_plain_type(field.type)) for field in batch.schema]))


def _plain_type(kind: Any) -> Any:
    import pyarrow as pa
    from pyarrow import types

    if types.is_dictionary(kind):
        return kind.value_type
    if types.is_list(kind) or types.is_large_list(kind):
        make = pa.list_ if types.is_list(kind) else pa.large_list
        return make(kind.value_field.with_type(_plain_type(kind.value_type)))
    if types.is_struct(kind):
        return pa.struct([field.with_type(_plain_type(field.type)) for field in kind])
    return kind


def _unreadable(file: Path, error: Exception) -> DataError:
    """The library's complaint as a DataError, shortened: it may quote the data."""
    if isinstance(error, DataError):
        return error
    return DataError(f"{file}: cannot be read as {file.suffix.removeprefix('.')}: {str(error).splitlines()[0][:200]}")
