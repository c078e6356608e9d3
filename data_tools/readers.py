"""Files on disk to rows with file and line: JSON lines, read one by one with bounded memory."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import orjson

from .schema import DataError, Origin, Rejected

MAX_LINE_BYTES = 16 * 1024 * 1024


def resolve_files(patterns: Sequence[str]) -> list[Path]:
    """The files that ``--train_data_file`` names: files, comma-separated lists and globs, in the given order.

    Raises DataError when a name matches nothing, is a folder, or is of an unsupported kind.
    """
    files: list[Path] = []
    for pattern in (part.strip() for value in patterns for part in value.split(",") if part.strip()):
        path = Path(pattern)
        found = [path] if path.exists() else sorted(path.parent.glob(path.name)) if _is_glob(path.name) else []
        if not found:
            raise DataError(f"{pattern}: no such data file (the current folder is {Path.cwd()})")
        for file in found:
            if not file.is_file():
                raise DataError(f"{file}: a folder; name its files, for example '{file}/*.jsonl'")
            if file.suffix != ".jsonl":
                raise DataError(f"{file}: only .jsonl (one JSON object a line) is read")
            if file.stat().st_size == 0:
                raise DataError(f"{file}: the file is empty")
        files += found
    if not files:
        raise DataError("no data file is named")
    return files


def read_lines(file: Path) -> Iterator[tuple[Origin, bytes]]:
    """Every non-blank line with its origin. A line over 16 MiB is yielded cut; parsing it then fails and is counted."""
    with file.open("rb") as stream:
        number = 0
        while line := stream.readline(MAX_LINE_BYTES + 1):
            number += 1
            if len(line) > MAX_LINE_BYTES:
                while (rest := stream.readline(MAX_LINE_BYTES)) and not rest.endswith(b"\n"):
                    pass
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if line.strip():
                yield Origin(file, number), line


def parse_json(line: bytes) -> object:
    """A line's JSON value (RFC 8259, UTF-8). Raises Rejected with the column for anything else."""
    if len(line) > MAX_LINE_BYTES:
        raise Rejected("line_too_long", f"over {MAX_LINE_BYTES} bytes")
    try:
        line.decode("utf-8")
    except UnicodeDecodeError as error:
        raise Rejected(
            "not_utf8", f"byte {error.start + 1} is not UTF-8; convert the file (it may be GBK, Latin-1 or UTF-16)"
        ) from None
    try:
        return orjson.loads(line)
    except orjson.JSONDecodeError as error:
        raise Rejected("not_json", f"column {error.colno}: {error.msg}") from None


def _is_glob(name: str) -> bool:
    return any(mark in name for mark in "*?[")
