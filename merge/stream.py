"""Compute and write a plan's tensors, a block of rows at a time: memory is independent of the model's size.

Blocks are computed ahead by threads and written in order. A block is read, added to in fp32, rounded once, measured.
"""

import contextlib
import ctypes
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..storage.hashing import HashingFile, Ledger
from ..storage.progress import Advance
from ..storage.safe_load import Weights
from ..storage.safetensors_io import Spec, bytes_of, plan_shards, write_header, write_index
from .adapter import matrix
from .lora_delta import AdapterError, is_finite, merged_rows
from .plan import BLOCK, Output
from .proof import Proof, Sums

_MEASURED = 8  # of so many blocks one, the first, is looked at for what rounding took: that costs as much as the merge
_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD = -1, -3  # of glibc's malloc.h
_KEPT = 2**26  # bytes
_AHEAD = 16  # blocks that may wait for the writer while the device is slow, 1 or 2 MB each


@dataclass(frozen=True, slots=True)
class Block:
    """Rows ``first`` to ``last`` of an output, seen as a matrix of ``width`` columns; the ``number``-th of its blocks.

    ``share`` is how many times the elements of measured blocks the output has, see ``_MEASURED``.
    """

    output: Output
    first: int
    last: int
    width: int
    number: int
    share: float


def write_plan(
    folder: Path,
    outputs: Sequence[Output],
    base: Weights,
    proof: Proof,
    ledger: Ledger,
    *,
    max_bytes: int,
    workers: int,
    advance: Advance,
) -> None:
    """Write all outputs as safetensors shards of at most ``max_bytes``, measuring into ``proof``, telling bytes that are written.

    Blocks are the unit of work: ``torch.set_num_threads(1)`` before.
    Raises AdapterError for a value that is not finite or does not fit into the output's dtype.
    """
    shards = plan_shards([output.spec for output in outputs], max_bytes)
    by_name = {output.spec.name: output for output in outputs}
    blocks = (block for specs in shards.values() for spec in specs for block in _blocks(by_name[spec.name]))
    _keep_freed_memory()
    with _workers(workers) as pool:
        done = _in_order(
            pool, lambda block: (block, *_merged(base, block, proof)), blocks,
            ahead=workers + _AHEAD, alike=lambda block: base.loaded_with(block.output.source),
        )  # fmt: skip

        def fill(stream: HashingFile, specs: Sequence[Spec]) -> None:
            write_header(stream, specs)
            left = sum(spec.size for spec in specs)
            while left:
                block, stored, sums = next(done)
                proof.add(block.output, sums)
                size = stream.write(bytes_of(stored))
                left -= size
                advance(size)

        for name, specs in shards.items():
            ledger.write(folder / name, lambda stream, specs=specs: fill(stream, specs))
        write_index(folder, shards, ledger)


@contextlib.contextmanager
def _workers(count: int) -> Generator[ThreadPoolExecutor]:
    """Threads that drop what waits for them when the merge is stopped."""
    pool = ThreadPoolExecutor(count)
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)


def _keep_freed_memory() -> None:
    """Have the C library keep the memory of a block for the next one: asking the system for it again costs a sixth more."""
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        library = ctypes.CDLL(None)
        library.mallopt(_M_TRIM_THRESHOLD, _KEPT)
        library.mallopt(_M_MMAP_THRESHOLD, _KEPT)


def _blocks(output: Output) -> Iterator[Block]:
    """An output in blocks of about ``BLOCK`` elements."""
    rows, width = matrix(output.spec.shape)
    step = max(1, BLOCK // max(1, width))
    share = rows / sum(min(step, rows - first) for first in range(0, rows, step * _MEASURED))
    for number, first in enumerate(range(0, rows, step)):
        yield Block(output, first, min(first + step, rows), width, number, share)


def _merged(base: Weights, block: Block, proof: Proof) -> tuple[torch.Tensor, Sums | None]:
    """A block as it is stored, and its sums when an adapter changes it."""
    output, dtype = block.output, block.output.spec.dtype
    read = base.read(output.source, block.first * block.width, block.last * block.width)
    if not output.placed:
        stored = read.to(dtype)
        if dtype.is_floating_point and not is_finite(stored):
            if not stored.isfinite().equal(read.isfinite()):
                raise _not_finite(output, read)
            proof.carried.add(output.spec.name)
        return stored, None
    value = read.float().view(-1, block.width)
    sums = Sums(base=_square(value), change=output.square or 0.0 if block.first == 0 else 0.0)
    before = value.clone() if output.square is None else None
    result = merged_rows(value, block.first, output.placed, sole=output.sole)
    stored = result.to(dtype)
    if not is_finite(stored):
        raise _not_finite(output, result)
    if before is not None:
        sums.change = _square(before.sub_(result))
    if dtype != torch.float32 and block.number % _MEASURED == 0:
        sums.lost = _square(stored.float().sub_(result)) * block.share
    return stored, sums


def _not_finite(output: Output, value: torch.Tensor) -> AdapterError:
    finite = value[value.isfinite()]
    if output.placed and len(finite) < value.numel():
        return AdapterError(f"{output.spec.name}: the merged weight holds values that are not finite")
    return AdapterError(
        f"{output.spec.name}: the merged weight reaches {float(finite.abs().max()):.3g}, which overflows "
        f"{output.spec.dtype}; use bf16"
    )


def _square(value: torch.Tensor) -> float:
    """The sum of squares of fp32 values."""
    flat = value.reshape(-1)
    return float(flat.dot(flat))


def _in_order(
    pool: Executor, work: Callable[[Any], Any], items: Iterable[Any], ahead: int, alike: Callable[[Any], object]
) -> Iterator[Any]:
    """Results of ``work`` in the order of ``items``, at most ``ahead`` of them waiting in memory.

    Items that are not ``alike``, for which it gives something else, are never at work at the same time.
    """
    pending: deque[Future[Any]] = deque()
    kind = None
    for item in items:
        last, kind = kind, alike(item)
        while pending and (len(pending) > ahead or kind != last):
            yield pending.popleft().result()
        pending.append(pool.submit(work, item))
    while pending:
        yield pending.popleft().result()
