"""Loops over tokens and bytes, compiled by numba.

Imported where they are called: numba takes a third of a second, which a run that finds its data prepared need not spend.
"""

from collections.abc import Callable
from typing import Any

import numba
import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]


def machine_code(kernel: Callable[..., Any]) -> Any:
    """Numba's compiled kernel, kept on disk for the next process where this folder or the user's cache can be written."""
    try:
        return numba.njit(cache=True)(kernel)
    except RuntimeError:  # no folder to keep it in: each process compiles it anew, a second or two
        return numba.njit(kernel)


@machine_code
def same_bytes(
    ids: npt.NDArray[np.int32],
    offsets: Ints,
    table: npt.NDArray[np.uint8],
    starts: npt.NDArray[np.int32],
    heads: npt.NDArray[np.uint64],
    data: npt.NDArray[np.uint64],
    ends: Ints,
) -> npt.NDArray[np.bool_]:
    """For each text whether its tokens' bytes are its bytes.

    Text ``t`` has the tokens ``ids[offsets[t]:offsets[t + 1]]`` and the bytes ``ends[t]`` to before ``ends[t + 1]`` of
    ``data``, which are eight to a little-endian word, with at least one word more behind them. Token ``i`` stands for
    ``table[starts[i]:starts[i + 1]]``; ``heads[i]`` are the first eight of these, zeros behind.
    """
    result = np.ones(len(ends) - 1, np.bool_)
    for text in range(len(ends) - 1):
        place, stop = ends[text], ends[text + 1]
        other = np.uint64(0)
        for token in range(offsets[text], offsets[text + 1]):
            first = starts[ids[token]]
            size = starts[ids[token] + 1] - first
            if place + size > stop:
                other = np.uint64(1)
                break
            shift = np.uint64((place & 7) << 3)
            word = data[place >> 3] >> shift | (data[(place >> 3) + 1] << np.uint64(1)) << (np.uint64(63) - shift)
            unused = np.uint64((8 - min(size, 8)) << 3)
            other |= ((word ^ heads[ids[token]]) << (unused >> np.uint64(1))) << (unused - (unused >> np.uint64(1)))
            for byte in range(8, size):
                at = place + byte
                other |= np.uint64(table[first + byte]) ^ (data[at >> 3] >> np.uint64((at & 7) << 3) & np.uint64(255))
            place += size
        result[text] = other == 0 and place == stop
    return result


@machine_code
def copy_texts(
    flat: npt.NDArray[np.int32], begins: Ints, ids: npt.NDArray[np.int32], offsets: Ints, shown: Ints
) -> None:
    """Copy text ``shown[i]``, which is ``ids[offsets[t]:offsets[t + 1]]``, to ``flat`` from ``begins[i]`` on."""
    for part in range(len(shown)):
        text = shown[part]
        place = begins[part]
        for token in range(offsets[text], offsets[text + 1]):
            flat[place] = ids[token]
            place += 1


@machine_code
def enter_hashes(
    hashes: npt.NDArray[np.uint64], places: Ints, new: npt.NDArray[np.uint64], new_places: Ints, before: Ints
) -> int:
    """Enter 128-bit hashes into a table by open addressing; the number of those that were not in it.

    ``hashes`` (shape [size, 2]) and ``places`` (shape [size], -1 where free) are the table, whose size is a power of two.
    Where a hash of ``new`` was in it, ``before`` gets the place that it had.
    """
    last = len(places) - 1
    entered = 0
    for row in range(len(new)):
        at = np.int64(new[row, 0] & np.uint64(last))
        while places[at] >= 0 and (hashes[at, 0] != new[row, 0] or hashes[at, 1] != new[row, 1]):
            at = (at + 1) & last
        if places[at] >= 0:
            before[row] = places[at]
        else:
            hashes[at, 0] = new[row, 0]
            hashes[at, 1] = new[row, 1]
            places[at] = new_places[row]
            entered += 1
    return entered
