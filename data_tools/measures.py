"""Figures of a prepared dataset, read from its memory-mapped files in blocks: lengths, limits, packs, answers, duplicates.

Memory is bounded by a block of about a million tokens, and some 40 bytes a sample.
"""

import hashlib
import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import DataArguments, OverLong
from .blocks import Block, PreparedSource, runs
from .fitting import loss_remains
from .indexed import IndexedReader
from .schema import DataError, Kind, TokenizedSample
from .thinking import NO_THINK
from .tokenizer_files import vocabulary_size

_SHOWN = 3  # examples of each kind
_LOOKED_AT = 100  # duplicates among which examples from different rows are looked for
_SMALLEST_BIN = 16  # tokens; each further bin of the histogram is twice as wide
_TAG = re.compile(rb"<(/?)(think|answer)(?::[^<>]*)?>")
_OPENED = re.compile(rb"<think(?::[^<>]*)?>\s*(?:</think(?::[^<>]*)?>\s*)?\Z")  # a thought that the prompt opens
_OPENED_ROOM = 64  # bytes of the prompt's end in which it is looked for


@dataclass(frozen=True, slots=True)
class Example:
    """A row that a figure counts: ``where`` is its file:line, ``detail`` what is to be said of it."""

    where: str
    detail: str


@dataclass(frozen=True, slots=True)
class Reject:
    """Rows rejected for one reason, with the first of them."""

    code: str
    count: int
    first: list[Example]


@dataclass(frozen=True, slots=True)
class Bin:
    """Samples of ``first`` to ``last`` tokens."""

    first: int
    last: int
    samples: int


@dataclass(frozen=True, slots=True)
class Lengths:
    """Tokens a sample. ``p90`` is the smallest length that at least 90 % of the samples do not exceed (nearest rank)."""

    shortest: int
    mean: float
    p50: int
    p90: int
    p99: int
    longest: int
    histogram: list[Bin]


@dataclass(frozen=True, slots=True)
class Limit:
    """What ``--max_seq_length`` does under a policy: samples over it, those left out, those cut, and what remains."""

    max_seq_length: int
    over_long: OverLong
    over: int
    left_out: int
    cut: int
    samples: int
    tokens: int
    first: list[Example]


@dataclass(frozen=True, slots=True)
class Packing:
    """Rows of max_seq_length tokens that ``--packing`` makes, and the share of them that is filled."""

    packs: int
    fill: float


@dataclass(slots=True)
class Answers:
    """The trained answers by their think/answer form; the four forms add up to ``trained``.

    ``malformed`` holds answers with tags that are not in the order <think></think> or <think></think><answer></answer>;
    ``no_think`` counts answers, of any form, with /no_think in the text since the trained answer before.
    """

    trained: int = 0
    most_in_a_sample: int = 0
    thought: int = 0
    empty_thought: int = 0
    plain: int = 0
    malformed: int = 0
    no_think: int = 0
    malformed_first: list[Example] = field(default_factory=list[Example])


@dataclass(frozen=True, slots=True)
class Duplicates:
    """Samples (of preference data: pairs) with the same tokens as an earlier one, which the examples name."""

    count: int
    first: list[Example]


@dataclass(frozen=True, slots=True)
class Report:
    """All figures; ``packing`` is for conversations, ``answers`` for all but documents."""

    folder: str
    kind: Kind
    rows: int
    samples: int
    tokens: int
    loss_tokens: int
    neutralised_rows: int
    shortened_rows: int
    rejected: list[Reject]
    lengths: Lengths
    limit: Limit
    packing: Packing | None
    answers: Answers | None
    duplicates: Duplicates


class Measured:
    """A prepared dataset that is being measured. Raises DataError when its files contradict each other."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.source = PreparedSource(folder)
        self.report = self.source.report
        self.kind: Kind = self.report["kind"]
        self.lengths = self.source.lengths
        if not len(self.lengths):
            raise DataError(f"{folder}: the prepared dataset holds no sample")
        if len(self.source.rows) != len(self.lengths):
            raise DataError(
                f"{folder}: {len(self.lengths)} samples, but {len(self.source.rows)} rows; delete it and build again"
            )

    def origin(self, number: int) -> str:
        """File and line of a sample."""
        return self.source.origin(number)

    def sample(self, number: int) -> TokenizedSample:
        """One sample."""
        block = self.source.read(np.asarray([number]))
        return TokenizedSample(block.ids, block.spans()[0])

    def measure(self, tokenizer: Any, args: DataArguments) -> Report:
        """All figures, for ``args.max_seq_length`` and ``args.over_long``."""
        limit, kept = self._limit(args)
        forms = _AnswerForms(tokenizer) if self.kind != "document" else None
        digests: list[bytes] = []
        for start, stop in runs(self.lengths):
            block = self.source.read(np.arange(start, stop))
            digests.append(_digests(block))
            if forms:
                for number in forms.count(block):
                    forms.found.malformed_first.append(Example(self.origin(number), "tags out of order"))
        return Report(
            folder=str(self.folder),
            kind=self.kind,
            rows=self.report["rows"],
            samples=len(self.lengths),
            tokens=int(self.lengths.sum(dtype=np.int64)),
            loss_tokens=self.report["loss_tokens"],
            neutralised_rows=self.report["neutralised"],
            shortened_rows=self.report.get("shortened", 0),
            rejected=self._rejected(),
            lengths=_lengths(self.lengths),
            limit=limit,
            packing=_packing(kept, args.max_seq_length) if self.kind == "chat" else None,
            answers=forms.found if forms else None,
            duplicates=self._duplicates(b"".join(digests)),
        )

    def _limit(self, args: DataArguments) -> tuple[Limit, npt.NDArray[np.int64]]:
        """What the limit does, and the lengths of the samples that remain."""
        longest = args.max_seq_length
        over = np.flatnonzero(self.lengths > longest)
        keep = np.ones(len(self.lengths), np.bool_)
        if args.over_long == "truncate":
            spans = IndexedReader(self.folder / "spans_document")
            keep[over] = loss_remains(spans.gather(over).reshape(-1, 2), spans.lengths[over] // 2, longest)
        else:
            keep[over] = False
        kept = np.minimum(self.lengths[keep].astype(np.int64), longest)
        gone = int(len(keep) - len(kept))
        examples = [Example(self.origin(i), f"{self.lengths[i]:,} tokens") for i in over[:_SHOWN].tolist()]
        total = int(kept.sum())
        return Limit(longest, args.over_long, len(over), gone, len(over) - gone, len(kept), total, examples), kept

    def _rejected(self) -> list[Reject]:
        found = {code: Reject(code, count, []) for code, count in self.report["rejects"].items()}
        with (self.folder / "rejects.jsonl").open(encoding="utf-8") as stream:
            for line in stream:
                row = json.loads(line)
                first = found[row["code"]].first
                if len(first) < _SHOWN:
                    first.append(Example(f"{row['file']}:{row['line']}", row["detail"]))
        return list(found.values())

    def _duplicates(self, digests: bytes) -> Duplicates:
        """Samples that came before, by their hashes, 16 bytes each; a pair's two hashes are taken as one."""
        each = 2 if self.kind == "preference" else 1
        keys = np.frombuffer(digests, "<u8").reshape(-1, 2 * each)
        order = np.lexsort(keys.T)  # stable: equal ones stay in the order of the files
        same = np.append(False, (keys[order[1:]] == keys[order[:-1]]).all(axis=1))
        first = np.maximum.accumulate(np.where(same, 0, np.arange(len(order))))
        places = np.flatnonzero(same)
        places = places[np.argsort(order[places])][:_LOOKED_AT]
        pairs = zip(order[places].tolist(), order[first[places]].tolist(), strict=True)
        examples = [Example(self.origin(a * each), f"the same as {self.origin(b * each)}") for a, b in pairs]
        return Duplicates(
            int(same.sum()), list(dict.fromkeys(examples))[:_SHOWN]
        )  # a row may have made several samples


def _lengths(values: npt.NDArray[np.int32]) -> Lengths:
    ordered = np.sort(values)
    count = len(ordered)

    def percentile(share: int) -> int:
        return int(ordered[-(-count * share // 100) - 1])

    ends = [0, _SMALLEST_BIN]
    while ends[-1] < ordered[-1]:
        ends.append(2 * ends[-1])
    below = np.searchsorted(ordered, ends, side="right")
    below[0] = 0
    bins = [Bin(ends[i] + 1, ends[i + 1], int(below[i + 1] - below[i])) for i in range(len(ends) - 1)]
    mean = float(ordered.mean(dtype=np.float64))
    return Lengths(int(ordered[0]), mean, percentile(50), percentile(90), percentile(99), int(ordered[-1]), bins)


def _packing(lengths: npt.NDArray[np.int64], longest: int) -> Packing | None:
    from .packing import pack  # late: it brings a compiler

    if not len(lengths):
        return None
    packs = len(pack(lengths, longest, 0))
    return Packing(packs, int(lengths.sum()) / (packs * longest))


def _digests(block: Block) -> bytes:
    """BLAKE2b of each sample's token ids, 16 bytes each, one after the other."""
    ids = np.ascontiguousarray(block.ids, "<i4").data
    ends = block.ends.tolist()
    starts = [0, *ends[:-1]]
    return b"".join(
        hashlib.blake2b(ids[start:end], digest_size=16).digest() for start, end in zip(starts, ends, strict=True)
    )


class _AnswerForms:
    """Counts the forms of answers in their text, which is put together from the text of each token alone.

    Characters that several tokens share are not readable that way; tags are ASCII, so they are.
    """

    def __init__(self, tokenizer: Any) -> None:
        self.found = Answers()
        self._tokenizer = tokenizer
        size = vocabulary_size(tokenizer)
        self._known = np.zeros(size, np.bool_)
        self._starts = np.zeros(size, np.int64)
        self._sizes = np.zeros(size, np.int64)
        self._words = np.empty(0, np.uint8)

    def count(self, block: Block) -> list[int]:
        """Add a block's answers; the numbers of the samples of the first malformed answers that are still to be named."""
        data, at = self._text(block.ids)
        spans, counts = block.spans()
        self.found.trained += len(spans)
        self.found.most_in_a_sample = max(self.found.most_in_a_sample, int(counts.max(initial=0)))
        zero = np.repeat(block.ends - block.lengths, counts)
        begins, ends = at[zero + spans[:, 0]].tolist(), at[zero + spans[:, 1]].tolist()
        before = at[zero].tolist()
        owners = np.repeat(block.numbers, counts).tolist()
        malformed: list[int] = []
        owner = -1
        previous = 0
        for begin, end, first, number in zip(begins, ends, before, owners, strict=True):
            previous = first if number != owner else previous
            owner = number
            self.found.no_think += data.find(NO_THINK.encode(), previous, begin) >= 0
            opened = _OPENED.search(data, max(previous, begin - _OPENED_ROOM), begin)
            if not self._add(data, opened.start() if opened else begin, end):
                malformed.append(number)
            previous = end
        return malformed[: max(0, _SHOWN - len(self.found.malformed_first))]

    def _add(self, data: bytes, begin: int, end: int) -> bool:
        """Count one answer; false when it is malformed."""
        tags = list(_TAG.finditer(data, begin, end))
        names = [match[1] + match[2] for match in tags]
        if not tags:
            self.found.plain += 1
        elif data[begin : tags[0].start()].strip() or names not in (
            [b"think", b"/think"],
            [b"think", b"/think", b"answer", b"/answer"],
        ):
            self.found.malformed += 1
            return False
        elif data[tags[0].end() : tags[1].start()].strip():
            self.found.thought += 1
        else:
            self.found.empty_thought += 1
        return True

    def _text(self, ids: npt.NDArray[np.int32]) -> tuple[bytes, npt.NDArray[np.int64]]:
        """The bytes of all tokens, and where each begins (int64, shape [tokens + 1])."""
        self._learn(ids)
        sizes = self._sizes[ids]
        at = np.append(0, np.cumsum(sizes))
        place = np.repeat(self._starts[ids] - at[:-1], sizes)
        place += np.arange(len(place))
        return self._words[place].tobytes(), at

    def _learn(self, ids: npt.NDArray[np.int32]) -> None:
        """Decode the tokens that were not seen before, each alone."""
        seen = np.zeros_like(self._known)
        seen[ids] = True
        new: list[int] = np.flatnonzero(seen & ~self._known).tolist()
        if not new:
            return
        backend = getattr(self._tokenizer, "backend_tokenizer", None)
        if backend is not None:
            texts = backend.decode_batch([[number] for number in new], skip_special_tokens=False)
        else:
            texts = [self._tokenizer.decode([number], skip_special_tokens=False) for number in new]
        words = [text.encode("utf-8", "replace") for text in texts]
        sizes = np.asarray([len(word) for word in words])
        self._known[new] = True
        self._sizes[new] = sizes
        self._starts[new] = len(self._words) + np.cumsum(sizes) - sizes
        self._words = np.append(self._words, np.frombuffer(b"".join(words), np.uint8))
