"""Loops over tokens and bytes, compiled by numba."""

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
    data: npt.NDArray[np.uint8],
    ends: Ints,
) -> npt.NDArray[np.bool_]:
    """For each text whether its tokens' bytes are its bytes.

    Text ``t`` has the tokens ``ids[offsets[t]:offsets[t + 1]]`` and the bytes ``data[ends[t]:ends[t + 1]]``; token ``i``
    stands for ``table[starts[i]:starts[i + 1]]``.
    """
    result = np.ones(len(ends) - 1, np.bool_)
    for text in range(len(ends) - 1):
        place, stop = ends[text], ends[text + 1]
        other = np.uint8(0)
        for token in range(offsets[text], offsets[text + 1]):
            first = starts[ids[token]]
            size = starts[ids[token] + 1] - first
            if place + size > stop:
                other = np.uint8(1)
                break
            for byte in range(size):
                other |= table[first + byte] ^ data[place + byte]
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
