"""Rows that can be read and that the filters leave in, by their places: what there is to choose from, without tokens.

``scan_chunk`` and ``rows_at`` are pure functions of a chunk, which local processes call here and any other engine can call.
"""

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import islice
from multiprocessing import get_context
from pathlib import Path
from typing import Self

import numpy as np
import orjson

from .arguments import DataArguments
from .duplicates import Seen, split_places
from .filters import Filters, row_hash
from .formats import RowForm, parse_row
from .readers import Chunk, parse_text, read_chunks, rows_of
from .sampling import Hashes, Ints
from .schema import DataError, Rejected
from .workers import end_with_parent

_AHEAD = 3  # chunks a worker that are under way


@dataclass(slots=True)
class ScannedChunk:
    """The rows of a chunk that are left: ``lines`` and ``offsets`` (int64, shape [rows]), with ``--deduplicate`` their hashes.

    ``count`` rows were read; ``digests`` is uint64, shape [rows, 2].
    """

    count: int
    lines: Ints
    offsets: Ints
    digests: Hashes
    rejects: list[tuple[int, int, str, str]]


@dataclass(slots=True)
class Scan:
    """The rows of a source that are left: the numbers of their files and their lines, int64, shape [rows]."""

    count: int = 0
    files: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    lines: Ints = field(default_factory=lambda: np.empty(0, np.int64))
    rejects: Counter[str] = field(default_factory=Counter[str])


def scan_chunk(chunk: Chunk, form: RowForm, filters: Filters | None, *, hashes: bool) -> ScannedChunk:
    """The rows of a chunk that can be read and that the filters leave in; ``hashes``: with the hash of what they say."""
    count, places, digests = 0, list[tuple[int, int]](), list[bytes]()
    rejects: list[tuple[int, int, str, str]] = []
    for origin, value in rows_of(chunk):
        count += 1
        try:
            if isinstance(value, Rejected):
                raise value
            row = parse_row(value, form)
            if filters:
                filters(row)
        except Rejected as reason:
            rejects.append((origin.line, origin.offset, reason.code, reason.detail))
            continue
        places.append((origin.line, origin.offset))
        if hashes:
            digests.append(row_hash(row))
    lines, offsets = np.asarray(places, np.int64).reshape(-1, 2).T
    return ScannedChunk(count, lines, offsets, np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2), rejects)


def rows_at(chunk: Chunk, times: Mapping[int, int]) -> Iterator[bytes]:
    """The rows of some lines as JSON lines, each as often as ``times`` says; lines of JSON are left as they stand."""
    if isinstance(chunk.data, bytes):
        is_text = chunk.file.name.partition(".txt")[1]
        for line, data in enumerate(chunk.data.split(b"\n"), chunk.line):
            if count := times.get(line):
                row = orjson.dumps(parse_text(data)) if is_text else data.rstrip(b"\r")
                yield (row + b"\n") * count
        return
    for line, value in enumerate(chunk.data, chunk.line):
        if count := times.get(line):
            try:
                yield (orjson.dumps(value) + b"\n") * count
            except TypeError as error:
                raise DataError(f"{chunk.file}:{line}: a value that JSON does not know: {error}") from None


class Scanner:
    """Scans sources one after the other in some processes, on whose number no result depends.

    A context manager. With ``--deduplicate`` rows that came before, in an earlier source too, are rejects.
    """

    def __init__(self, args: DataArguments, workers: int) -> None:
        _begin(args)  # forked workers find it made
        self._workers = workers
        self._pool = ProcessPoolExecutor(workers, get_context("fork"), end_with_parent) if workers > 1 else None
        self._files: list[Path] = []  # all so far, as duplicates are numbered
        self._seen = Seen() if args.deduplicate else None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool:
            self._pool.shutdown(cancel_futures=True)

    def scan(self, files: Sequence[Path], form: RowForm, listed: Path) -> Scan:
        """The rows of a source that are left; the others are written to ``listed``, as in ``rejects.jsonl``."""
        result, parts = Scan(), list[tuple[Ints, Ints]]()
        with listed.open("w", encoding="utf-8") as stream:
            for number, file in enumerate(files):
                self._files.append(file)
                for found in self._scanned((chunk, form) for chunk in read_chunks(file)):
                    lines = self._new(found)
                    parts.append((np.full(len(lines), number), lines))
                    result.count += found.count
                    for line, offset, code, detail in found.rejects:
                        result.rejects[code] += 1
                        entry = {"file": str(file), "line": line, "offset": offset, "code": code, "detail": detail}
                        stream.write(json.dumps(entry, ensure_ascii=False) + "\n")
        if parts:
            result.files, result.lines = (np.concatenate(values) for values in zip(*parts, strict=True))
        return result

    def _scanned(self, jobs: Iterator[tuple[Chunk, RowForm]]) -> Iterator[ScannedChunk]:
        """In the order of the jobs."""
        if self._pool is None:
            yield from (_scan(*job) for job in jobs)
            return
        try:
            waiting = [self._pool.submit(_scan, *job) for job in islice(jobs, _AHEAD * self._workers)]
            while waiting:
                yield waiting.pop(0).result()
                waiting += [self._pool.submit(_scan, *job) for job in islice(jobs, 1)]
        except BrokenProcessPool:
            raise DataError(
                "a process that reads rows was killed (out of memory?); try a smaller --preprocessing_num_workers"
            ) from None

    def _new(self, found: ScannedChunk) -> Ints:
        """The lines of rows that did not come before; the others are made rejects."""
        if self._seen is None:
            return found.lines
        own = np.full_like(found.lines, len(self._files) - 1)
        owners, lines = split_places(self._seen.add(found.digests, own, found.lines))
        for row in np.flatnonzero(owners >= 0).tolist():
            detail = f"the same as {self._files[owners[row]]}:{lines[row]}"
            found.rejects.append((int(found.lines[row]), int(found.offsets[row]), "duplicate", detail))
        found.rejects.sort()
        return found.lines[owners < 0]


_rules: tuple[Filters | None, bool] = (None, False)


def _begin(args: DataArguments) -> None:
    global _rules  # noqa: PLW0603 - forked workers inherit it
    _rules = (Filters.of(args), args.deduplicate)


def _scan(chunk: Chunk, form: RowForm) -> ScannedChunk:
    return scan_chunk(chunk, form, _rules[0], hashes=_rules[1])
