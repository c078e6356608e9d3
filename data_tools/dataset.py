"""Map-style dataset over a prepared dataset, and random samples for speed tests."""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from ..storage.manifest import read
from .arguments import OverLong
from .fitting import loss_remains
from .indexed import IndexedReader
from .packing import Packs
from .prepared import check_kind
from .schema import DataError, Origin

IGNORE_INDEX = -100
_SHOWN = 5

Item = dict[str, npt.NDArray[np.int64]]


class Samples(Protocol):
    """What a dataset of samples offers: ``lengths`` (int64, shape [samples]) tell each sample's tokens without reading it."""

    key: str
    terminators: list[int]

    @property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Tokens of every sample."""
        ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int) -> Item: ...

    def name_of(self, index: int) -> str:
        """Where a sample comes from, for messages."""
        ...


class PreparedDataset:
    """Samples of a prepared dataset as ``{"input_ids", "labels"}``, int64, shape [length], labels unshifted.

    Samples over ``max_length`` tokens are dropped (listed by ``over_long_rows``), cut at the end, or an error; a cut
    sample that has no loss token left is dropped. Raises DataError when nothing remains.
    """

    def __init__(
        self, folder: Path, max_length: int, over_long: OverLong = "drop", say: Callable[[str], None] = print
    ) -> None:
        self.folder, self.max_length = folder, max_length
        self.key = _content_key(folder)
        self._tokens = IndexedReader(folder / "text_document")
        self._spans = IndexedReader(folder / "spans_document")
        self._rows = np.load(folder / "rows.npy", allow_pickle=False)
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        check_kind(report["kind"], "chat", report["files"])
        self.terminators: list[int] = report["terminators"]  # ids that end the trained answers
        self._files = [Path(name) for name in report["files"]]
        if not len(self._tokens) == len(self._spans) == len(self._rows):
            raise DataError(f"{folder}: tokens, spans and rows differ in number; delete the folder and run again")
        too_long = np.flatnonzero(self._tokens.lengths > max_length)
        gone = too_long
        if over_long == "truncate":
            spans, counts = self._spans.gather(too_long).reshape(-1, 2), self._spans.lengths[too_long] // 2
            gone = too_long[~loss_remains(spans, counts, max_length)]
        self.over_long_rows = [(self.origin_of(i), int(self._tokens.lengths[i])) for i in gone.tolist()]
        if len(too_long):
            shown = ", ".join(f"{self.origin_of(int(i))} ({self._tokens.lengths[i]})" for i in too_long[:_SHOWN])
            message = f"{len(too_long)} of {len(self._tokens)} samples are over --max_seq_length {max_length}: {shown}"
            message += " ..." if len(too_long) > _SHOWN else ""
            if over_long == "error":
                raise DataError(f"{message}; raise the limit or choose --over_long drop")
            fate = (
                "dropped"
                if over_long == "drop"
                else f"cut at the end ({len(gone)} without any loss token left: dropped)"
            )
            say(f"data: {message}; {fate}")
        keep = np.ones(len(self._tokens), dtype=bool)
        keep[gone] = False
        self._index = np.flatnonzero(keep)
        if not len(self._index):
            raise DataError(f"every sample is over --max_seq_length {max_length}; raise it")
        self.lengths = np.minimum(self._tokens.lengths[self._index].astype(np.int64), max_length)

    @property
    def numbers(self) -> npt.NDArray[np.intp]:
        """The samples of the prepared dataset that are used, of ``prepared`` in all; shape [samples]."""
        return self._index

    @property
    def prepared(self) -> int:
        """The samples of the prepared dataset."""
        return len(self._tokens)

    def origin_of(self, number: int) -> Origin:
        """File and line of a sample of the prepared dataset (its number there, not after dropping)."""
        file, line = self._rows[number]
        return Origin(self._files[int(file)], int(line))

    def name_of(self, index: int) -> str:
        """File and line of a sample."""
        return str(self.origin_of(int(self._index[index])))

    def __len__(self) -> int:
        return len(self._index)

    def __getitem__(self, index: int) -> Item:
        number = int(self._index[index])
        ids = np.asarray(self._tokens[number][: self.max_length], dtype=np.int64)
        labels = np.full_like(ids, IGNORE_INDEX)
        for start, end in np.asarray(self._spans[number]).reshape(-1, 2):
            labels[start:end] = ids[start:end]
        return {"input_ids": ids, "labels": labels}


def _content_key(folder: Path) -> str:
    """A hash of the tokens and spans of a prepared dataset: the same text made from another folder is the same data."""
    files: dict[str, Any] = read(folder)["files"]
    entries = [files[name] for name in sorted(files) if name.endswith((".bin", ".idx"))]
    return hashlib.sha256(json.dumps(entries, sort_keys=True).encode()).hexdigest()[:16]


class DummyDataset:
    """``count`` random samples of ``length`` tokens, all with loss; the same for the same seed."""

    def __init__(self, vocab_size: int, length: int, count: int = 1000, seed: int = 0) -> None:
        self.vocab_size, self.length, self.count, self.seed = vocab_size, length, count, seed
        self.key = f"dummy-{vocab_size}-{length}-{count}-{seed}"
        self.terminators: list[int] = []
        self.lengths = np.full(count, length, dtype=np.int64)

    def name_of(self, index: int) -> str:
        """The number of a random sample."""
        return f"random sample {index}"

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> Item:
        if not 0 <= index < self.count:
            raise IndexError(index)
        ids = np.random.default_rng([self.seed, index]).integers(0, self.vocab_size, self.length, dtype=np.int64)
        return {"input_ids": ids, "labels": ids.copy()}


class PackedDataset:
    """Packs of another dataset's samples as ``{"input_ids", "labels", "lengths"}``, all int64.

    The first two have the shape [tokens of the pack]; ``lengths`` (shape [samples of the pack]) cuts them. The first
    label of every sample is -100: a model shifts labels by one, so the last token of the sample before would predict it.
    """

    def __init__(self, data: Samples, packs: Packs) -> None:
        self.data, self.packs = data, packs
        self.key, self.terminators = data.key, data.terminators
        self.lengths = packs.tokens(data.lengths)
        self.cost = packs.cost(data.lengths)

    def name_of(self, index: int) -> str:
        """Files and lines of a pack's first samples."""
        return self.names(self.packs[index])

    def names(self, numbers: npt.NDArray[np.int64]) -> str:
        """Files and lines of the first of these samples."""
        more = f" and {len(numbers) - _SHOWN} more" if len(numbers) > _SHOWN else ""
        return ", ".join(self.data.name_of(number) for number in numbers[:_SHOWN].tolist()) + more

    def __len__(self) -> int:
        return len(self.packs)

    def __getitem__(self, index: int) -> Item:
        return self.joined(self.packs[index])

    def joined(self, numbers: npt.NDArray[np.int64]) -> Item:
        """These samples as one item."""
        items = [self.data[int(number)] for number in numbers]
        lengths = np.fromiter((len(item["input_ids"]) for item in items), np.int64, len(items))
        labels = np.concatenate([item["labels"] for item in items])
        labels[np.cumsum(lengths) - lengths] = IGNORE_INDEX
        return {
            "input_ids": np.concatenate([item["input_ids"] for item in items]),
            "labels": labels,
            "lengths": lengths,
        }
