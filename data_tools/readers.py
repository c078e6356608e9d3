"""Files on disk to rows with file, line and byte offset: JSON lines, JSON arrays, Parquet, Arrow, CSV and text.

Two steps, so that parsing can run in worker processes: ``read_chunks`` cuts a file into runs of rows with bounded memory,
``rows_of`` parses one run. A bad row is a ``Rejected`` among the rows; a file that cannot be read is a DataError.
"""

import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from glob import glob
from pathlib import Path
from typing import Any, BinaryIO, cast

import orjson

from ..storage.manifest import MANIFEST_NAME
from .schema import DataError, Origin, Rejected
from .tables import MAX_ROW_BYTES, TooLong, read_arrow, read_csv, read_parquet, saved_shards
from .turns import json_name
from .unpacking import PACKED, open_unpacked

MAX_LINE_BYTES = MAX_ROW_BYTES
MAX_JSON_BYTES = 512 * 1024 * 1024
KINDS = (".jsonl", ".json", ".parquet", ".arrow", ".csv", ".txt")
HUB = "hub:"
SAMPLE_REPORT = "_report.json"  # in a folder that data sample wrote
_BOM = b"\xef\xbb\xbf"
_SPACED = re.compile(rb'"\s+:')
_HUB_ADVICE = (
    ". There is no network, or no such data set, or it asks for a login. Where there is a network, run "
    "'hf download --repo-type dataset {} --local-dir DIR' (huggingface-cli in old versions) and name the files in DIR here; "
    "HF_HUB_OFFLINE=1 fails at once instead of trying again and again"
)
_LINES = (".jsonl", ".json", ".csv", ".txt")  # the kinds that may be packed


@dataclass(frozen=True, slots=True)
class Chunk:
    """A run of consecutive rows of one file.

    ``data`` is whole lines (bytes, the last newline left off) or decoded rows. ``line`` is the number of the first line or
    row, counted from 1; ``offset`` is the byte of the unpacked file where the first line starts, -1 for decoded rows.
    """

    file: Path
    line: int
    offset: int
    data: bytes | list[object]


def resolve_files(patterns: Sequence[str]) -> list[Path]:
    """The sources that ``--train_data_file`` names, in the given order: a path each; one named twice comes twice.

    A name is a file, a glob (``**`` for any depth), a folder, or ``hub:OWNER/NAME[:SPLIT]`` for a data set of the Hub, which
    ``datasets`` downloads (split ``train`` by default); commas separate names. A folder stands for all files in it and
    below, sorted by path, without those whose name starts with ``.`` or ``_``; a folder that ``datasets`` wrote with
    ``save_to_disk`` is one source.

    Raises DataError when a name matches nothing and when a file is empty or of an unknown kind.
    """
    sources: list[Path] = []
    for value in patterns:
        names = [value] if os.path.exists(value) else [part.strip() for part in value.split(",")]  # noqa: PTH110 - see _on_disk
        for name in filter(None, names):
            try:
                found = _from_hub(name) if name.startswith(HUB) else _on_disk(name)
                expanded = [source for path in found for source in _expand(path)]
            except OSError as error:
                raise DataError(f"{name}: cannot be read: {error.strerror or error}") from None
            if not expanded:
                raise DataError(f"{name}: the folder is empty")
            sources += expanded
    if not sources:
        raise DataError("no data file is named")
    return sources


def files_of(source: Path) -> list[Path]:
    """The files that hold a source's rows: itself, or the shards of a folder saved by ``datasets``."""
    return saved_shards(source) if source.is_dir() else [source]


def read_chunks(file: Path, size: int = 1 << 20) -> Iterator[Chunk]:
    """A source's rows in order, in chunks of about ``size`` bytes (at most 16 MiB).

    Memory stays within a few dozen MiB whatever the file holds, except for a ``.json`` array (512 MiB at most), which is
    parsed as a whole. A ``.json`` file of JSON lines is read as such. Raises DataError when the file is broken, is cut
    off, or unpacks to more than any text would.
    """
    try:
        kind = _kind(file)
        if kind in (".jsonl", ".txt") or (kind == ".json" and _holds_json_lines(file)):
            with open_unpacked(file) as stream:
                yield from _line_chunks(file, stream, size)
            return
        line = 1
        for rows in _table(file, kind, size):
            yield Chunk(file, line, -1, rows)
            line += len(rows)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror or error}") from None


def rows_of(chunk: Chunk) -> Iterator[tuple[Origin, object]]:
    """Every row of a chunk, parsed, with its origin; blank lines are left out.

    A bad row comes as a ``Rejected`` instance with code ``not_utf8``, ``not_json``, ``duplicate_key`` or
    ``line_too_long``. A line of a ``.txt`` file is the row ``{"text": line}``.
    """
    file, number, offset = chunk.file, chunk.line, chunk.offset
    if isinstance(chunk.data, list):
        for index, value in enumerate(chunk.data):
            yield Origin(file, number + index, offset), too_long(value.size) if isinstance(value, TooLong) else value
        return
    parse = parse_text if _kind(file) == ".txt" else parse_json
    for line in chunk.data.split(b"\n"):
        if line and not line.isspace():
            try:
                row = parse(line)
            except Rejected as reason:
                row = reason
            yield Origin(file, number, offset), row
        number += 1
        offset += len(line) + 1


def parse_json(line: bytes) -> object:
    """A line's JSON value (RFC 8259, UTF-8). Raises Rejected with the column for anything else.

    A key that comes twice in one object is refused: which of both was meant is not known. (One case passes, and the last
    value counts: two equal keys of which one has a space before its colon and the other none.)
    """
    if len(line) > MAX_LINE_BYTES:
        raise too_long(len(line))
    try:
        value: object = orjson.loads(line)
    except orjson.JSONDecodeError as error:
        _check_utf8(line)
        raise Rejected("not_json", f"column {error.colno}: {error.msg}") from None
    if _may_repeat(line, value):
        _check_keys(line)
    return value


def too_long(size: int) -> Rejected:
    """The outcome of a row of ``size`` bytes that is not held in memory."""
    return Rejected("line_too_long", f"{size:,} bytes; a row may have {MAX_LINE_BYTES:,}")


def parse_text(line: bytes) -> object:
    """The row of a line of plain text. Raises Rejected."""
    if len(line) > MAX_LINE_BYTES:
        raise too_long(len(line))
    _check_utf8(line)
    return {"text": line.decode().removesuffix("\r")}


def _check_utf8(line: bytes) -> None:
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise Rejected(
            "not_utf8", f"byte {error.start + 1} is not UTF-8; convert the file (it may be GBK, Latin-1 or UTF-16)"
        ) from None


def _may_repeat(text: bytes, value: object) -> bool:
    r"""Whether a key may come twice in an object of this JSON text, which stands for ``value``.

    The end of a key shows as `":` in the text; `\":` is a quote inside a string. Only when there are more (or fewer) of
    them than the value has keys, which is seldom, must the text be read again by the exact but slow way.
    """
    keys, marks = _count_keys(value), text.count(b'":')
    return marks != keys and marks - text.count(b'\\":') != keys


def _count_keys(value: object) -> int:
    """The keys of all objects of a JSON value. No recursion: orjson lets 1,024 levels pass."""
    count = 0
    waiting: list[Any] = [value]
    for item in waiting:  # it grows while it is walked
        if type(item) is dict:
            fields = cast("dict[str, Any]", item)
            count += len(fields)
            waiting += fields.values()
        elif type(item) is list:
            waiting += cast("list[Any]", item)
    return count


def _unique(pairs: list[tuple[str, Any]]) -> None:
    seen: set[str] = set()
    for key, _ in pairs:
        if key in seen:
            raise Rejected("duplicate_key", f"the key {key[:80]!r} comes twice in one object")
        seen.add(key)


def _check_keys(text: bytes, rows: int | None = None) -> None:
    """Raises Rejected for a key that comes twice, with the row's number where the text is an array of ``rows``."""
    decoder, content = json.JSONDecoder(object_pairs_hook=_unique), text.decode()
    start = 0 if rows is None else content.index("[") + 1
    for number in range(1, 2 if rows is None else rows + 1):
        try:
            while content[start] in " \t\r\n,":
                start += 1
            _, start = decoder.raw_decode(content, start)
        except (RecursionError, Rejected) as error:
            reason = error if isinstance(error, Rejected) else Rejected("not_json", "nested too deep")
            raise reason if rows is None else Rejected(reason.code, f"row {number}: {reason.detail}") from None


def _json_array(file: Path, stream: BinaryIO, budget: int) -> Iterator[list[object]]:
    """Rows of a file that is one JSON array. It is parsed as a whole, so it may have 512 MiB at most.

    Raises DataError for a larger file, for one that is no array, and for one with a fault anywhere.
    """
    data = stream.read(MAX_JSON_BYTES + 1)
    advice = "write one row a line (.jsonl)"
    if len(data) > MAX_JSON_BYTES:
        raise DataError(f"{file}: a JSON array of more than {MAX_JSON_BYTES >> 20} MiB is not read; {advice}")
    data = data.removeprefix(_BOM)
    refused = f"the array cannot be read; {advice}, then only the bad rows are refused"
    try:
        rows: object = orjson.loads(data)
    except orjson.JSONDecodeError as error:
        message = error.msg.split(":")[0]
        raise DataError(f"{file}:{error.lineno}: column {error.colno}: {message}; {refused}") from None
    if not isinstance(rows, list):
        raise DataError(f"{file}: one JSON {json_name(rows)} where a list of rows is expected; {advice}")
    rows = cast("list[object]", rows)
    # Among many rows a key with a space before its colon could make up for one that comes twice.
    if _may_repeat(data, rows) or any(data[found.start() - 1] != ord("\\") for found in _SPACED.finditer(data)):
        try:
            _check_keys(data, len(rows))
        except Rejected as reason:
            raise DataError(f"{file}: {reason.detail}; {refused}") from None
    step = max(1, len(rows) * budget // max(len(data), 1))
    del data
    for start in range(0, len(rows), step):
        yield rows[start : start + step]


def _line_chunks(file: Path, stream: BinaryIO, size: int) -> Iterator[Chunk]:
    """Blocks of whole lines; a line that outgrows MAX_LINE_BYTES is not held, only counted."""
    number, offset = 1, 0  # where the unfinished line starts
    parts: list[bytes] = []  # what is held of it
    length = 0  # how long it is so far
    while block := stream.read(size):
        if number == 1 and not offset and not length and block.startswith(_BOM):
            block, offset = block[len(_BOM) :], len(_BOM)
        start, cut = 0, block.rfind(b"\n")
        if cut >= 0 and length > MAX_LINE_BYTES:
            start = block.index(b"\n") + 1
            length += start - 1
            yield Chunk(file, number, offset, [TooLong(length)])
            number, offset, length = number + 1, offset + length + 1, 0
        if cut >= start:
            data = b"".join((*parts, block[start:cut]))
            if data:
                yield Chunk(file, number, offset, data)
            number, offset, length = number + data.count(b"\n") + 1, offset + len(data) + 1, 0
            parts.clear()
        length += len(block) - max(start, cut + 1)
        if length > MAX_LINE_BYTES:
            parts.clear()
        else:
            parts.append(block[max(start, cut + 1) :])
    if length:
        yield Chunk(file, number, offset, [TooLong(length)] if length > MAX_LINE_BYTES else b"".join(parts))


def _table(file: Path, kind: str, size: int) -> Iterator[list[object]]:
    """The rows of a source that is no text file of lines."""
    if kind == ".csv":
        yield from read_csv(file, lambda: open_unpacked(file), size)
    elif kind == ".json":
        with open_unpacked(file) as stream:
            yield from _json_array(file, stream, size)
    elif kind == ".parquet":
        yield from read_parquet(file, size)
    else:
        for shard in files_of(file):
            yield from read_arrow(shard, size)


def _holds_json_lines(file: Path) -> bool:
    """Whether a ``.json`` file starts with a line that is a JSON object of its own and goes on after it."""
    with open_unpacked(file) as stream:
        line = stream.readline(MAX_LINE_BYTES).removeprefix(_BOM)
        more = stream.readline(MAX_LINE_BYTES)
    if not line.lstrip().startswith(b"{") or not more:
        return False
    try:
        orjson.loads(line)
    except orjson.JSONDecodeError:
        return False
    return True


def _kind(file: Path) -> str:
    """The kind of a source by its name, one of KINDS; a folder is Arrow. "" when unknown."""
    suffixes = file.suffixes
    if suffixes and suffixes[-1] in PACKED:
        kind = suffixes[-2] if len(suffixes) > 1 else ""
        return kind if kind in _LINES else ""
    kind = file.suffix
    return kind if kind in KINDS else ".arrow" if file.is_dir() else ""


def _on_disk(name: str) -> list[Path]:
    path = Path(name)
    # Unlike Path.exists, os.path.exists says False for what is too long to be a path.
    found = [path] if os.path.exists(path) else [Path(one) for one in sorted(glob(name, recursive=True))]  # noqa: PTH110, PTH207 - glob takes absolute ones too
    if "**" in name:
        found = [one for one in found if one.is_file()]  # it matches the folders on the way as well
    if not found:
        hint = f"; a data set of the Hub is named {HUB}OWNER/NAME" if name.count("/") == 1 else ""
        raise DataError(f"{name}: no such data file (the current folder is {Path.cwd()}){hint}")
    return found


def _expand(path: Path) -> list[Path]:
    """A file, checked, or the sources in a folder."""
    if path.is_dir():
        if (path / "state.json").is_file() and (path / "dataset_info.json").is_file():
            return [path] if saved_shards(path) else []
        if (path / "dataset_dict.json").is_file():
            splits = sorted(str(entry) for entry in path.iterdir() if (entry / "state.json").is_file())
            raise DataError(f"{path}: a data set with several splits; name one of {', '.join(splits) or 'its folders'}")
        if (path / "text_document.idx").is_file():
            raise DataError(f"{path} is a prepared dataset; name it alone")
        inside = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith((".", "_"))]
        if (path / SAMPLE_REPORT).is_file():
            inside = [entry for entry in inside if entry.name != MANIFEST_NAME]  # of a folder of data sample, no rows
        return [source for entry in inside for source in _expand(entry)]
    if not path.is_file():
        raise DataError(f"{path}: not a file that can be read")
    if not _kind(path):
        raise DataError(
            f"{path}: this kind of file is not read; known are {', '.join(KINDS)}; {', '.join(_LINES)} may end in "
            f"{' or '.join(PACKED)} too. Name the data files of a mixed folder with a glob ('{path.parent}/*.jsonl')"
        )
    if path.stat().st_size == 0:
        raise DataError(f"{path}: the file is empty")
    return [path]


def _from_hub(name: str) -> list[Path]:
    """The Arrow files of ``hub:OWNER/NAME[:SPLIT]`` in the cache of ``datasets``, downloaded when they are not there."""
    repository, _, split = name.removeprefix(HUB).partition(":")
    if repository.count("/") != 1 or not all(repository.split("/")) or "[" in split:
        raise DataError(f"{name}: a data set of the Hub is named {HUB}OWNER/NAME or {HUB}OWNER/NAME:SPLIT")
    try:
        from datasets import load_dataset
    except ImportError:
        raise DataError(f"{name}: reading from the Hub needs the package 'datasets': pip install datasets") from None
    try:
        loaded: Any = load_dataset(repository, split=split or "train")
    except Exception as error:  # noqa: BLE001 - it raises whatever its builders raise
        message = (str(error).splitlines() or [type(error).__name__])[0]
        advice = _HUB_ADVICE.format(repository) if isinstance(error, OSError) else ""
        raise DataError(f"{name}: datasets cannot load it: {message}{advice}") from None
    return [Path(entry["filename"]) for entry in loaded.cache_files]
