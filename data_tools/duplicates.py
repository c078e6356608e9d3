"""Rows that were there before, by their 128-bit hashes: a table of 24 bytes a place, at most half of it filled."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import numpy.typing as npt

from .encoder import EncodedChunk

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_LINE_BITS = 40  # of a place: its line; the file's number stands above
_SMALLEST = 1 << 12


class Seen:
    """Remembers hashes with the place that had each first; a place is a file's number and a line."""

    def __init__(self) -> None:
        self._hashes = np.zeros((_SMALLEST, 2), np.uint64)
        self._places = np.full(_SMALLEST, -1, np.int64)
        self._count = 0

    def add(self, hashes: Hashes, files: Ints, lines: Ints) -> Ints:
        """The place that had each hash before, as ``split_places`` reads it, -1 where it is new; int64, shape [rows].

        ``hashes`` have shape [rows, 2]; rows are taken in order, so a row may be a duplicate of one before it here.
        """
        while 2 * (self._count + len(hashes)) > len(self._places):
            self._grow()
        from .kernels import enter_hashes

        before = np.full(len(hashes), -1, np.int64)
        self._count += int(enter_hashes(self._hashes, self._places, hashes, files << _LINE_BITS | lines, before))
        return before

    def _grow(self) -> None:
        from .kernels import enter_hashes

        full = self._places >= 0
        hashes, places = self._hashes[full], self._places[full]
        size = 2 * len(self._places)
        self._hashes, self._places = np.zeros((size, 2), np.uint64), np.full(size, -1, np.int64)
        enter_hashes(self._hashes, self._places, hashes, places, np.full(len(hashes), -1, np.int64))


def split_places(places: Ints) -> tuple[Ints, Ints]:
    """The files' numbers and the lines of places; -1 has the file -1."""
    return places >> _LINE_BITS, places & ((1 << _LINE_BITS) - 1)


def without_duplicates(chunk: EncodedChunk, number: int, seen: Seen, name: Callable[[int], str]) -> EncodedChunk:
    """The chunk of file ``number`` without the rows that were seen before, which are rejects of it now.

    ``name`` tells the name of a file by its number.
    """
    if not len(chunk.lines):
        return chunk
    first = np.append(True, chunk.lines[1:] != chunk.lines[:-1])  # of each row's samples
    rows = np.cumsum(first) - 1
    lines = chunk.lines[first]
    before = seen.add(chunk.digests[first], np.full_like(lines, number), lines)
    if (before < 0).all():
        return chunk
    keep = (before < 0)[rows]
    rejects = list(chunk.rejects)
    offsets = chunk.offsets[first]
    owners, first_lines = split_places(before)
    for row in np.flatnonzero(before >= 0).tolist():
        detail = f"the same as {name(int(owners[row]))}:{first_lines[row]}"
        rejects.append((int(lines[row]), int(offsets[row]), "duplicate", detail))
    return replace(
        chunk,
        ids=chunk.ids[np.repeat(keep, chunk.lengths)],
        lengths=chunk.lengths[keep],
        spans=chunk.spans[np.repeat(keep, chunk.span_counts)],
        span_counts=chunk.span_counts[keep],
        lines=chunk.lines[keep],
        digests=chunk.digests[keep],
        offsets=chunk.offsets[keep],
        rejects=sorted(rejects),
    )
