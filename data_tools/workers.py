"""Chunks to encoded chunks, in this process or in several, in the order of the chunks.

A forked process inherits locks and thread pools of its parent in whatever state they are, and engines that find them so
may wait for ever. So workers are forked before anything was encoded in the parent, and in them everything is done: the
check of the fast engine, too. A process that has encoded already, or has other threads (a training rank), spawns them.
"""

import gc
import multiprocessing
import os
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from typing import Any, Literal

from .arguments import DataArguments
from .encoder import EncodedChunk, RowEncoder
from .engine import FastEngine, fast_engine
from .formats import RowForm
from .readers import Chunk
from .schema import DataError, Kind

StartMethod = Literal["fork", "spawn"]
Job = tuple[int, Chunk, RowForm]
Encode = Callable[[Iterable[Job]], Iterator[tuple[int, EncodedChunk]]]


@contextmanager
def encoding(encoder: RowEncoder, workers: int, start_method: StartMethod) -> Generator[Encode]:
    """A function from jobs (file number, chunk, form of its rows) to file numbers and encoded chunks, in order.

    Raises EngineDiffers when the encoder's fast engine fails its check, DataError when a worker process is killed.
    """
    before = gc.get_threshold()
    _collect_seldom()
    try:
        if workers == 1:
            _check(encoder)
            yield lambda jobs: ((number, encoder(chunk, form)) for number, chunk, form in jobs)
        else:
            with _pool(encoder, workers, start_method) as pool:
                yield lambda jobs: _through(pool, iter(jobs), 3 * workers)
    finally:
        gc.set_threshold(*before)
        gc.unfreeze()


def _collect_seldom() -> None:
    """Rows make many objects and hardly a cycle: looking for cycles as often as Python does costs a twentieth of the time."""
    gc.freeze()  # what is loaded by now stays; forked workers need not copy it
    gc.set_threshold(100_000, 20, 20)


@contextmanager
def _pool(encoder: RowEncoder, workers: int, start_method: StartMethod) -> Generator[ProcessPoolExecutor]:
    """Worker processes that have the encoder."""
    global _encoder  # noqa: PLW0603 - forked workers inherit it
    fork = start_method == "fork" and not FastEngine.used
    state = None if fork else (encoder.tokenizer, encoder.args, encoder.kind, encoder.engine is not None)
    _encoder = encoder if fork else None
    os.environ["FASTOKENS_BPE_THREADS"] = "1"  # one tokenizing thread a worker
    context = multiprocessing.get_context("fork" if fork else "spawn")
    try:
        with ProcessPoolExecutor(workers, context, _begin, (state,)) as pool:
            pool.submit(_check_in_worker).result()  # all workers are forked by now
            yield pool
    except BrokenProcessPool:
        raise DataError(
            "a tokenising process was killed (out of memory?); try a smaller --preprocessing_num_workers"
        ) from None
    finally:
        del os.environ["FASTOKENS_BPE_THREADS"]
        _encoder = None


def _through(pool: ProcessPoolExecutor, jobs: Iterator[Job], ahead: int) -> Iterator[tuple[int, EncodedChunk]]:
    """Results in the order of the jobs, of which ``ahead`` are under way."""
    waiting = [(number, pool.submit(_encode, chunk, form)) for number, chunk, form in islice(jobs, ahead)]
    while waiting:
        number, future = waiting.pop(0)
        yield number, future.result()
        waiting += [(n, pool.submit(_encode, chunk, form)) for n, chunk, form in islice(jobs, 1)]


def _check(encoder: RowEncoder) -> None:
    if encoder.engine is not None:
        encoder.engine.check(encoder.tokenizer.backend_tokenizer)


_encoder: RowEncoder | None = None


def _begin(state: tuple[Any, DataArguments, Kind, bool] | None) -> None:
    global _encoder  # noqa: PLW0603 - the one way to hand a pool's workers their state
    end_with_parent()
    if state is not None:
        _collect_seldom()
        tokenizer, args, kind, fast = state
        engine = fast_engine(tokenizer.backend_tokenizer, lambda _: None) if fast else None
        _encoder = RowEncoder(tokenizer, args, kind, engine)


def end_with_parent() -> None:
    """From now on this worker ends when the process that started it is killed: a forked one holds its locks with it."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


def _check_in_worker() -> None:
    assert _encoder is not None
    _check(_encoder)


def _encode(chunk: Chunk, form: RowForm) -> EncodedChunk:
    assert _encoder is not None
    return _encoder(chunk, form)
