"""Many samples at once as flat arrays: read from a prepared dataset, or written as one.

Whole files are rewritten by the file layouts; a block of some million tokens lets numpy do that work and keeps the
memory bounded, whatever the size of the files.
"""

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from .indexed import IndexedReader, IndexedWriter, Numbers
from .schema import DataError, Kind, TokenizedSample

_TOKENS = 1 << 20  # tokens of a block, unless one sample alone has more
_WINDOW = 1 << 16  # samples of a block at most


class PackIndex(Protocol):
    """Which samples share an item: pack p holds ``samples[offsets[p]:offsets[p + 1]]``; ``packing.Packs`` is one."""

    @property
    def samples(self) -> Numbers:
        """Sample numbers, int64, shape [samples that are used]."""
        ...

    @property
    def offsets(self) -> Numbers:
        """Where packs begin and end in ``samples``, int64, shape [packs + 1], from 0."""
        ...


@dataclass(frozen=True, slots=True)
class Block:
    """Some whole samples back to back.

    ``ids`` (int32) and ``trained`` (bool: has loss) have shape [tokens]; ``lengths`` and ``numbers`` (int64, shape
    [samples]) say how long each sample is and which one, counted from 0, of the file that it comes from.
    """

    ids: npt.NDArray[np.int32]
    trained: npt.NDArray[np.bool_]
    lengths: Numbers
    numbers: Numbers

    @property
    def ends(self) -> Numbers:
        """Position after the last token of each sample."""
        return np.cumsum(self.lengths, dtype=np.int64)

    def first_tokens(self) -> Numbers:
        """Positions of the first token of each sample that has any."""
        return (self.ends - self.lengths)[self.lengths > 0]

    def last_tokens(self) -> Numbers:
        """Positions of the last token of each sample that has any."""
        return self.ends[self.lengths > 0] - 1

    def labels(self, mask_id: int) -> npt.NDArray[np.int32]:
        """Unshifted labels, shape [tokens]: the token itself where it has loss, else ``mask_id``."""
        return np.where(self.trained, self.ids, np.int32(mask_id))

    def loss_counts(self) -> Numbers:
        """How many tokens of each sample are predicted with loss: its first one never is."""
        counted = self.trained.copy()
        counted[self.first_tokens()] = False
        before = np.concatenate([[0], np.cumsum(counted, dtype=np.int64)])
        return before[self.ends] - before[self.ends - self.lengths]

    def spans(self) -> tuple[npt.NDArray[np.int32], Numbers]:
        """Every stretch of tokens with loss as [start, end) in its sample, and how many stretches each sample has.

        Shapes [stretches, 2] and [samples]. Stretches that touch are one.
        """
        opens, closes = self.trained.copy(), self.trained.copy()
        opens[1:] &= ~self.trained[:-1]
        closes[:-1] &= ~self.trained[1:]
        opens[self.first_tokens()] = self.trained[self.first_tokens()]
        closes[self.last_tokens()] = self.trained[self.last_tokens()]
        starts, stops = np.flatnonzero(opens), np.flatnonzero(closes) + 1
        owner = np.searchsorted(self.ends, starts, side="right")
        zero = (self.ends - self.lengths)[owner]
        pairs = np.stack([starts - zero, stops - zero], axis=1).astype(np.int32)
        return pairs, np.bincount(owner, minlength=len(self.lengths)).astype(np.int64)

    def samples(self) -> Iterator[TokenizedSample]:
        """The samples that have tokens, one by one."""
        pairs, counts = self.spans()
        spans = np.split(pairs, np.cumsum(counts)[:-1])
        for ids, own in zip(np.split(self.ids, self.ends[:-1]), spans, strict=True):
            if ids.size:
                yield TokenizedSample(ids, own)

    def only(self, keep: npt.NDArray[np.bool_]) -> "Block":
        """The samples for which ``keep``, shape [samples], is true."""
        tokens = np.repeat(keep, self.lengths)
        return Block(self.ids[tokens], self.trained[tokens], self.lengths[keep], self.numbers[keep])


class PreparedSource:
    """A prepared dataset, read in blocks. Raises DataError when its files contradict each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._tokens, self._spans = (IndexedReader(folder / name) for name in ("text_document", "spans_document"))
        if len(self._tokens) != len(self._spans):
            raise DataError(f"{folder}: {len(self._tokens)} samples, but spans for {len(self._spans)}")
        if len(self._tokens) and not self._tokens.lengths.min():
            raise DataError(f"{folder}: sample {int(self._tokens.lengths.argmin())} is empty")
        self.lengths = self._tokens.lengths  # tokens of each sample, int32

    def __len__(self) -> int:
        return len(self.lengths)

    @cached_property
    def rows(self) -> Numbers:
        """Which file and which line each sample comes from, int64, shape [samples, 2], memory-mapped."""
        return np.load(self.folder / "rows.npy", mmap_mode="r", allow_pickle=False)

    @cached_property
    def report(self) -> Mapping[str, Any]:
        """The ``report.json`` of the dataset."""
        return json.loads((self.folder / "report.json").read_text(encoding="utf-8"))

    def origin(self, number: int) -> str:
        """File and line of a sample."""
        file, line = self.rows[number].tolist()
        return f"{self.report['files'][file]}:{line}"

    def read(self, numbers: Numbers) -> Block:
        """These samples in this order. Raises DataError for spans that are not ascending stretches of their sample."""
        lengths = self.lengths[numbers].astype(np.int64)
        ids = self._tokens.gather(numbers).astype(np.int32)
        ends = np.cumsum(lengths)
        span_values = self._spans.lengths[numbers].astype(np.int64)
        flat = self._spans.gather(numbers).astype(np.int64)
        odd = span_values % 2 == 1
        if odd.any():
            raise DataError(f"{self.folder}: sample {int(numbers[odd.argmax()])} has a span without an end")
        owner = np.repeat(np.arange(len(numbers)), span_values // 2)
        starts, stops = flat[0::2], flat[1::2]
        bad = (starts < 0) | (stops <= starts) | (stops > lengths[owner])
        bad[1:] |= (starts[1:] < stops[:-1]) & (owner[1:] == owner[:-1])
        if bad.any():
            place = int(bad.argmax())
            raise DataError(
                f"{self.folder}: sample {int(numbers[owner[place]])} has no tokens [{starts[place]}, {stops[place]}), "
                "or spans that overlap"
            )
        zero = (ends - lengths)[owner]
        change = np.zeros(len(ids) + 1, dtype=np.int8)
        change[zero + starts] += 1  # starts are distinct, and so are stops
        change[zero + stops] -= 1
        return Block(ids, np.cumsum(change[:-1], dtype=np.int8).astype(bool), lengths, numbers)

    def items(
        self, used: npt.NDArray[np.bool_], packs: PackIndex | None, width: int | None = None
    ) -> Iterator[tuple[Block, Numbers]]:
        """Samples that fill whole items, and how many each item has.

        Without ``packs`` each sample for which ``used``, shape [samples], is true has an item of its own, in order. An
        item is taken for ``width`` tokens when that is given, else for those it has.
        """
        if packs is not None:
            totals = (
                np.add.reduceat(self.lengths[packs.samples], packs.offsets[:-1]) if packs.samples.size else self.lengths
            )
            for start, stop in runs(totals, width):
                numbers = packs.samples[int(packs.offsets[start]) : int(packs.offsets[stop])]
                yield self.read(numbers), np.diff(packs.offsets[start : stop + 1])
            return
        for start, stop in runs(self.lengths, width):
            numbers = start + np.flatnonzero(used[start:stop])
            if numbers.size:
                yield self.read(numbers), np.ones(numbers.size, dtype=np.int64)

    def pairs(self, used: npt.NDArray[np.bool_]) -> Iterator[tuple[Block, Block]]:
        """Chosen and rejected samples: those of even numbers, each with the one that follows it."""
        for start, stop in runs(self.lengths[0::2].astype(np.int64) + self.lengths[1::2]):
            chosen = 2 * (start + np.flatnonzero(used[2 * start : 2 * stop : 2]))
            if chosen.size:
                yield self.read(chosen), self.read(chosen + 1)

    def check_packs(self, packs: PackIndex, longest: int | None) -> None:
        """Raises DataError for packs that name no sample of this dataset, are empty or are over ``longest`` tokens."""
        samples, offsets = packs.samples, packs.offsets
        if offsets[0] != 0 or offsets[-1] != len(samples) or (np.diff(offsets) < 1).any():
            raise DataError(f"{self.folder}: the packs do not divide their {len(samples)} samples among them")
        if samples.size and (samples.min() < 0 or samples.max() >= len(self)):
            raise DataError(f"{self.folder}: the packs name samples beyond the {len(self)} of this dataset")
        totals = np.add.reduceat(self.lengths[samples], offsets[:-1], dtype=np.int64) if samples.size else np.zeros(1)
        if longest is not None and totals.max() > longest:
            raise DataError(f"{self.folder}: pack {int(totals.argmax())} has {totals.max()} tokens, {longest} fit")


def by_turns(chosen: Block, rejected: Block) -> Block:
    """Both blocks' samples in one: the first of ``chosen``, the first of ``rejected``, the second of ``chosen`` ..."""
    lengths = np.stack([chosen.lengths, rejected.lengths], axis=1).reshape(-1)
    starts = np.stack([chosen.ends - chosen.lengths, rejected.ends - rejected.lengths + chosen.ids.size], axis=1)
    ends = np.cumsum(lengths)
    place = np.repeat(starts.reshape(-1) - ends + lengths, lengths) + np.arange(ends[-1] if len(ends) else 0)
    ids = np.concatenate([chosen.ids, rejected.ids])
    trained = np.concatenate([chosen.trained, rejected.trained])
    return Block(ids[place], trained[place], lengths, np.repeat(chosen.numbers, 2))


def runs(lengths: npt.NDArray[np.integer[Any]], width: int | None = None) -> Iterator[tuple[int, int]]:
    """Ranges [start, stop) that cover all sequences; each holds a bounded number of tokens, but at least one sequence.

    Each sequence is taken for ``width`` tokens when that is given.
    """
    for first in range(0, len(lengths), _WINDOW):
        costs = lengths[first : first + _WINDOW]
        ends = np.cumsum(costs if width is None else np.full(len(costs), width), dtype=np.int64)
        start = 0
        while start < len(ends):
            before = int(ends[start - 1]) if start else 0
            stop = max(start + 1, int(np.searchsorted(ends, before + _TOKENS, side="right")))
            yield first + start, first + stop
            start = stop


def write_prepared(folder: Path, blocks: Iterable[Block], file: Path, *, kind: Kind = "chat") -> Mapping[str, Any]:
    """Write what ``finebridge`` prepares from raw files, out of samples that are tokens already; returns the report.

    ``file`` is where they come from; the line of a sample is its number there, counted from 1. A sample that is empty
    or trains no token is listed in ``rejects.jsonl``; of a preference pair (chosen and rejected answers by turns) both
    are listed. No terminators are recorded: labels do not say where an answer's end token is (they may go on to a
    line break after it, or mark every word of a text), and generation would stop at whatever stands there.
    """
    total = Counter(rows=0, samples=0, tokens=0, loss_tokens=0, neutralised=0)
    rejects: Counter[str] = Counter()
    lines: list[Numbers] = []
    with (
        IndexedWriter(folder / "text_document") as tokens,
        IndexedWriter(folder / "spans_document") as spans,
        (folder / "rejects.jsonl").open("w", encoding="utf-8") as listed,
    ):
        for block in blocks:
            keep = block.loss_counts() > 0
            if kind == "preference":
                keep = np.repeat(keep.reshape(-1, 2).all(axis=1), 2)
            for length, number in zip(block.lengths[~keep].tolist(), block.numbers[~keep].tolist(), strict=True):
                code, detail = ("no_loss", "no token of it, or of its partner, has loss") if length else ("empty", "")
                rejects[code] += 1
                entry = {"file": str(file), "line": number + 1, "code": code, "detail": detail}
                listed.write(json.dumps(entry, ensure_ascii=False) + "\n")
            kept = block.only(keep)
            stretches, counts = kept.spans()
            tokens.add_many(kept.ids, kept.lengths)
            spans.add_many(stretches, 2 * counts)
            lines.append(kept.numbers + 1)
            total.update(
                rows=len(keep), samples=len(kept.lengths), tokens=kept.ids.size, loss_tokens=int(kept.trained.sum())
            )
    numbers = np.concatenate(lines) if lines else np.empty(0, dtype=np.int64)
    np.save(folder / "rows.npy", np.stack([np.zeros_like(numbers), numbers], axis=1), allow_pickle=False)
    report = {
        "kind": kind,
        **total,
        "rejects": dict(rejects),
        "files": [str(file)],
        "terminators": [],
    }
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report
