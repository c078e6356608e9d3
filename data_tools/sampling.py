"""Which rows of a source are taken: pure functions of a seed, the source's name and the rows' places, the same everywhere.

A row's place is the number of its file in the source and its line there. Its hash is SplitMix64's finaliser (Steele, Lea,
Flood 2014, "Fast Splittable Pseudorandom Number Generators") over a key of (seed, source, file), plus the line times the
golden gamma: one to one, so no two lines of a file share a hash. Sorted by hash, then file and line, the rows of a source
stand in its *rank order*, which no other source, worker or engine changes.

Of ``n`` rows ``floor(ratio * n + 1/2)`` are taken, computed with fractions, and at most ``max_samples``. Each row comes
``count // n`` times, and the first ``count % n`` of the rank order once more. A renewed draw goes on in the rank order
where the epoch before it ended, and begins again at its end: every row has its turn before any has a second one.
"""

import hashlib
from collections.abc import Sequence
from fractions import Fraction

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Hashes = npt.NDArray[np.uint64]

_GAMMA = np.uint64(0x9E3779B97F4A7C15)
_STEPS = ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB))


def row_hashes(seed: int, source: str, files: npt.NDArray[np.integer], lines: npt.NDArray[np.integer]) -> Hashes:
    """The hash of every row; ``files`` and ``lines`` have shape [rows], as has the result (uint64)."""
    count = int(files.max(initial=-1)) + 1
    keys = np.array([_file_key(seed, source, number) for number in range(count)], np.uint64)
    hashes = lines.astype(np.uint64)
    hashes *= _GAMMA
    hashes += keys[files] if count > 1 else keys[:1]
    for shift, factor in _STEPS:
        hashes ^= hashes >> np.uint64(shift)
        hashes *= np.uint64(factor)
    hashes ^= hashes >> np.uint64(31)
    return hashes


def _file_key(seed: int, source: str, number: int) -> int:
    digest = hashlib.blake2b(f"{seed}\n{number}\n{source}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little")


def rank_order(hashes: Hashes) -> Ints:
    """The numbers of rows by rising hash; rows that share one stay in the order given. int64, shape [rows]."""
    return np.argsort(hashes, kind="stable")


def amount(ratio: Fraction, max_samples: int | None, rows: int) -> int:
    """How many of ``rows`` rows are taken, repeats counted: halves are rounded up."""
    count = (2 * ratio.numerator * rows + ratio.denominator) // (2 * ratio.denominator)
    return count if max_samples is None else min(count, max_samples)


def ranks_taken(rows: int, count: int, epoch: int = 0) -> Ints:
    """The ranks of the rows that a draw takes, repeats as often as they come; int64, shape [count].

    ``epoch`` is 0 unless each epoch draws anew.
    """
    more = count % rows if rows else 0
    return np.concatenate([np.arange(count - more) % max(rows, 1), (np.arange(more) + epoch * more) % max(rows, 1)])


def times_taken(order: Ints, count: int, epoch: int = 0) -> Ints:
    """How often each row is taken, in the order of the rows; int64, shape [rows]. ``order`` is their rank order."""
    return np.bincount(order[ranks_taken(len(order), count, epoch)], minlength=len(order))


def spread(counts: Sequence[int]) -> Ints:
    """Where each source's part begins when all are laid one after the other, and the end; int64, shape [sources + 1]."""
    return np.append(0, np.cumsum(np.asarray(counts, np.int64)))
