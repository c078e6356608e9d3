"""Documents to rows of equal length, for pretraining: an index over tokens that stay where they are.

The documents, shuffled, are one stream of tokens, and each row is the next ``length`` tokens of it. A row holds the end of
one document, whole ones and the beginning of another; these pieces never read one another, unless that is asked for.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import DataArguments
from .dataset import IGNORE_INDEX, Item
from .indexed import IndexedReader, Numbers
from .packing import shuffled
from .preprocess import prepare
from .schema import DataError, Origin
from .token_files import check_reading, check_tokens, read_tokens, token_prefix
from .tokenizer_files import TokenizerSource

_STREAM = 4  # of the seed; packing.py and batches.py have others
_SHOWN = 5
_ENDS = 1000  # documents that are asked how they end


class TextDataset:
    """Rows of ``length`` tokens as ``{"input_ids", "labels", "lengths"}``, int64; only the last row is shorter.

    The first two have the shape [tokens of the row]; ``lengths`` (shape [pieces of the row]) cuts them into pieces of
    documents. The first label of every piece is -100: what comes before it is another document, or in another row. With
    ``across`` a row is one piece, so its documents read those before them, as in Megatron-LM.

    Every token is in exactly one row. Rows in which no token carries loss are left out, which is told. ``seed`` None
    keeps the order of the documents. ``origin`` says where a document comes from. Memory: 20 bytes a document and 16 a
    row. Raises DataError when there is nothing to train on.
    """

    def __init__(
        self,
        tokens: IndexedReader,
        key: str,
        length: int,
        origin: Callable[[int], Origin],
        *,
        seed: int | None = None,
        across: bool = False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.key = f"{key} across documents" if across else key
        self.terminators: list[int] = []
        self._tokens, self._origin, self._across = tokens, origin, across
        ends = _summed(tokens.lengths)[tokens.documents]
        kept = np.flatnonzero(ends[1:] > ends[:-1])
        if not len(kept):
            raise DataError(f"{tokens.data}: no document has a token")
        order = kept if seed is None else kept[shuffled(len(kept), seed, _STREAM)]
        self._documents = order.astype(np.int32) if len(ends) <= np.iinfo(np.int32).max else order
        self._starts = ends[order]  # where each document begins in the files
        self._bounds = _summed(ends[order + 1] - self._starts)  # where each begins in the stream, and the last one ends
        total = int(self._bounds[-1])
        begins = np.arange(0, total, length)
        lengths = np.minimum(total - begins, length)
        pieces = self._document_at(begins + lengths - 1) - self._document_at(begins) + 1
        trained = lengths - (1 if across else pieces)
        self._begins, self.lengths = begins[trained > 0], lengths[trained > 0]
        empty, idle = len(ends) - 1 - len(kept), int(lengths[trained == 0].sum())
        if not len(self._begins):
            raise DataError(f"{tokens.data}: no document has two tokens, one to read and one to predict")
        say(
            f"data: {len(kept):,} documents, {total:,} tokens -> {len(self.lengths):,} rows of {length:,} tokens"
            + (f", the last has {self.lengths[-1]:,}" if self.lengths[-1] < length else "")
            + (f"; {empty:,} documents are empty" if empty else "")
            + (f"; {idle:,} tokens are left out, in rows where none can be predicted" if idle else "")
        )

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Item:
        _, starts, sizes = self._pieces(index)
        ids = np.empty(int(sizes.sum()), np.int64)
        ends = np.cumsum(sizes)
        for start, size, end in zip(starts.tolist(), sizes.tolist(), ends.tolist(), strict=True):
            ids[end - size : end] = self._tokens.tokens[start : start + size]
        lengths = ends[-1:] if self._across else sizes
        labels = ids.copy()
        labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX
        return {"input_ids": ids, "labels": labels, "lengths": lengths}

    def name_of(self, index: int) -> str:
        """Where the first documents of a row come from: file and line, or number in the token files, counted from 1."""
        documents = self._pieces(index)[0].tolist()
        more = f" and {len(documents) - _SHOWN} more" if len(documents) > _SHOWN else ""
        return ", ".join(str(self._origin(number)) for number in documents[:_SHOWN]) + more

    def _pieces(self, index: int) -> tuple[Numbers, Numbers, Numbers]:
        """Of each piece of a row: its document, where it begins in the files, its tokens."""
        begin, length = int(self._begins[index]), int(self.lengths[index])
        first, last = self._document_at(np.array([begin, begin + length - 1])).tolist()
        bounds = self._bounds[first : last + 2]
        starts = np.maximum(bounds[:-1], begin)
        sizes = np.minimum(bounds[1:], begin + length) - starts
        documents = slice(first, last + 1)
        return self._documents[documents].astype(np.int64), self._starts[documents] + starts - bounds[:-1], sizes

    def _document_at(self, places: Numbers) -> Numbers:
        """Which document of the stream each token lies in."""
        return np.searchsorted(self._bounds, places, side="right") - 1


def _summed(lengths: npt.NDArray[np.integer[Any]]) -> Numbers:
    """Where pieces of these lengths begin, one after the other, and where the last one ends; int64, shape [pieces + 1]."""
    return np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths, dtype=np.int64)])


def open_text(
    name: str,
    tokenizer: TokenizerSource,
    args: DataArguments,
    cache: Path,
    say: Callable[[str], None] = print,
    seed: int | None = None,
) -> TextDataset:
    """The rows of raw text, of a prepared dataset or of Megatron's token files, whichever the name means.

    Raises DataError when it is not plain text, or when the flags ask for what cannot be done with it.
    """
    tokenizer = replace(tokenizer, loaded=tokenizer.load())  # once
    if prefix := token_prefix(name):
        check_reading(prefix, args)
        say(f"data: token files {prefix}")
        tokens = read_tokens(prefix)
        key = check_tokens(tokens, tokenizer, cache, say)
        origin = partial(_numbered, tokens.data)
    else:
        folder = prepare([name], tokenizer, args, cache, say, wanted="document")
        tokens, key = read_tokens(folder / "text_document"), folder.name
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        rows: Numbers = np.load(folder / "rows.npy", mmap_mode="r", allow_pickle=False)
        origin = partial(_listed, report["files"], rows)
    _tell_ends(name, tokens, tokenizer, say)
    across = args.cross_document_attention
    return TextDataset(tokens, key, args.max_seq_length, origin, seed=seed, across=across, say=say)


def _tell_ends(name: str, tokens: IndexedReader, tokenizer: TokenizerSource, say: Callable[[str], None]) -> None:
    """Say it when documents have no end token: the model would not learn where texts end."""
    eos = tokenizer.load().eos_token_id
    last = tokens.documents[1:][:: max(1, (len(tokens.documents) - 1) // _ENDS)] - 1
    filled = last[tokens.lengths[last] > 0]
    ends = tokens.tokens[tokens.pointers[filled] // tokens.dtype.itemsize + tokens.lengths[filled] - 1]
    if eos is not None and not (ends == eos).any():
        say(f"data: documents of {name} have no end-of-text token behind them; --append_eod puts it there for raw text")


def _numbered(file: Path, number: int) -> Origin:
    return Origin(file, number + 1)


def _listed(files: Sequence[str], rows: Numbers, number: int) -> Origin:
    return Origin(Path(files[int(rows[number, 0])]), int(rows[number, 1]))
