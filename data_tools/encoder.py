"""Rows to token ids and loss spans, a chunk at a time: one pure function, the same bytes wherever it runs.

Most rows take the fast way: a plan for their shape (``plans.py``), all texts of the chunk through the fast engine at once
(``engine.py``), the proof in arrays. Rows that no plan fits are rendered in full; rows with control tokens in their text,
or whose tokens do not split where prompt and answer meet, go through ``tokenization.py``, which is the truth: the first
rows of each file and a running sample are encoded both ways and must agree.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import DataArguments
from .engine import EngineDiffers, FastEngine
from .filters import Filters, row_hash
from .fitting import BUILD_TIME, fits, shorten
from .formats import RowForm, parse_row
from .plans import Plan, Planner, fill
from .readers import Chunk, rows_of
from .schema import Document, Kind, Origin, Preference, Rejected, Sample, TokenizedSample
from .templates import ChatTemplate
from .thinking import apply_mode, enable_thinking
from .tokenization import DocumentTokenization, Tokenization

_EARLY, _EVERY = 8, 4999  # rows that are encoded both ways: the first of a file, then one in so many

Ints = npt.NDArray[np.int32]


@dataclass(slots=True)
class EncodedChunk:
    """What became of a chunk's rows: samples one after the other, and the rows that were rejected.

    ``ids`` (int32) are all tokens, ``lengths`` (int32, one a sample) cut them; ``spans`` (int32, shape [s, 2]) count from
    each sample's own start, ``span_counts`` (int32) cut them; ``lines`` (int64) are the rows that samples come from.
    ``neutralised`` rows had control tokens in their text, ``shortened`` ones were split or lost their earliest exchanges.
    Only with ``--deduplicate``: ``offsets`` (int64), the bytes at which samples' rows start, and ``digests`` (uint64, shape
    [samples, 2]), the hashes of what these rows say.
    """

    file: Path
    rows: int = 0
    neutralised: int = 0
    shortened: int = 0
    ids: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    lengths: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    spans: Ints = field(default_factory=lambda: np.empty((0, 2), np.int32))
    span_counts: Ints = field(default_factory=lambda: np.empty(0, np.int32))
    lines: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    rejects: list[tuple[int, int, str, str]] = field(default_factory=list[tuple[int, int, str, str]])
    offsets: npt.NDArray[np.int64] = field(default_factory=lambda: np.empty(0, np.int64))
    digests: npt.NDArray[np.uint64] = field(default_factory=lambda: np.empty((0, 2), np.uint64))

    def samples(self) -> list[TokenizedSample]:
        """The samples one by one."""
        ids = np.split(self.ids, np.cumsum(self.lengths)[:-1])
        spans = np.split(self.spans, np.cumsum(self.span_counts)[:-1])
        return [TokenizedSample(i, s) for i, s in zip(ids, spans, strict=True)] if len(self.lengths) else []


class RowEncoder:
    """Chunks of rows to EncodedChunks, by the settings of one build.

    ``kind`` tells what the rows are. Without ``engine`` every row goes through ``tokenizers``. Raises EngineDiffers when
    the two ways disagree, DataError when tokenizer or template cannot be used.
    """

    def __init__(self, tokenizer: Any, args: DataArguments, kind: Kind, engine: FastEngine | None) -> None:
        self.tokenizer = tokenizer
        self.args = args
        self.kind: Kind = kind
        self.engine = engine
        self.template: ChatTemplate | None = None
        if kind == "document":
            self.tokenization = DocumentTokenization(tokenizer, append_eod=args.append_eod)
        else:
            self.template = ChatTemplate(tokenizer, args.chat_template)
            self.tokenization = Tokenization(self.template, args.mask_compat)
        self._planner = Planner(self.template) if engine and self.template else None
        self._longest = args.max_seq_length if args.over_long in BUILD_TIME else None
        self._shortened = 0
        self._filters = Filters.of(args)

    def __call__(self, chunk: Chunk, form: RowForm) -> EncodedChunk:
        """The chunk's rows in order. Never raises for a bad row: the reason is part of the result."""
        result = EncodedChunk(chunk.file)
        before = self._shortened
        batch = _Batch(self.engine, self.tokenization, self._truth, self._longest)
        for origin, value in rows_of(chunk):
            result.rows += 1
            try:
                if isinstance(value, Rejected):
                    raise value
                row = parse_row(value, form)
                if self._filters:
                    self._filters(row)
                self._add(batch, origin, row)
            except Rejected as reason:
                result.rejects.append((origin.line, origin.offset, reason.code, reason.detail))
        batch.finish(result)
        result.shortened = self._shortened - before
        return result

    def encode(self, row: Sample | Preference | Document) -> list[TokenizedSample]:
        """One row by the reference way. Raises Rejected."""
        if isinstance(row, Preference):
            return self._pair(row)
        return self._truth(self._in_mode(row))

    def _pair(self, row: Preference) -> list[TokenizedSample]:
        """The chosen answer, then the rejected one; where they are too long, both lose the same earlier turns."""
        assert isinstance(self.tokenization, Tokenization)
        encode = self.tokenization.encode
        chosen, rejected = (self._chat_in_mode(_last_turn_only(sample)) for sample in (row.chosen, row.rejected))
        samples = [*encode(chosen), *encode(rejected)]
        shortened = False
        if self._longest is not None and not fits(samples, self._longest):

            def both(part: Sample) -> list[TokenizedSample]:
                turns = (*part.messages[:-1], rejected.messages[-1])
                return [*encode(part), *encode(replace(rejected, messages=turns))]

            samples = shorten(chosen, both, self._longest, self.args.over_long)
            shortened = True
        if len(samples) != 2:  # noqa: PLR2004 - a pair
            raise Rejected("bad_preference", "an answer became several samples")
        self._shortened += shortened
        return samples

    def _truth(self, row: Sample | Document) -> list[TokenizedSample]:
        if isinstance(row, Document):
            assert isinstance(self.tokenization, DocumentTokenization)
            return self.tokenization.encode(row)
        assert isinstance(self.tokenization, Tokenization)
        samples = self.tokenization.encode(row)
        if self._longest is None or fits(samples, self._longest):
            return samples
        samples = shorten(row, self.tokenization.encode, self._longest, self.args.over_long)
        self._shortened += 1
        return samples

    def _in_mode(self, row: Sample | Document) -> Sample | Document:
        return row if isinstance(row, Document) else self._chat_in_mode(row)

    def _chat_in_mode(self, row: Sample) -> Sample:
        assert self.template is not None
        row = enable_thinking(row, self.args.enable_thinking, self.template)
        return apply_mode(row, self.args.think_mode, separate=self.template.reads_reasoning)

    def _add(self, batch: "_Batch", origin: Origin, row: Sample | Preference | Document) -> None:
        before = self.tokenization.neutralised
        digest = row_hash(row) if self.args.deduplicate else b""
        if self.engine is not None and not isinstance(row, Preference):
            row = self._in_mode(row)
            plan, blanks = self._plan(row)
            if plan is not None:
                check = origin.line <= _EARLY or origin.line % _EVERY == 0
                batch.add_planned(origin, plan, blanks, row, digest, check=check)
                return
            samples = self._truth(row)
        else:
            samples = self.encode(row)
        batch.add_encoded(origin, samples, digest, neutralised=self.tokenization.neutralised > before)

    def _plan(self, row: Sample | Document) -> tuple[Plan | None, Sequence[str]]:
        """The row as parts: from the plan of its shape, or rendered in full; None when control tokens are in its text."""
        if isinstance(row, Document):
            assert isinstance(self.tokenization, DocumentTokenization)
            if not row.text or self.tokenization.has_literals(row):
                return None, ()
            return self.tokenization.plan, (row.text,)
        assert isinstance(self.tokenization, Tokenization)
        assert self._planner is not None
        self.tokenization.check_kwargs(row)
        if found := self._planner.find(row):
            return found
        if self.tokenization.has_literals(row):
            return None, ()
        return self._planner.in_full(row), ()


def _last_turn_only(sample: Sample) -> Sample:
    *history, answer = sample.messages
    return replace(sample, messages=(*(replace(turn, trained=False) for turn in history), answer))


@dataclass(slots=True)
class _Row:
    """A row of the batch: its samples as encoded already, or how many planned ones it has (from ``first`` on)."""

    origin: Origin
    encoded: list[TokenizedSample] | None
    row: Sample | Document | None = None
    first: int = 0
    count: int = 0
    check: bool = False
    neutralised: bool = False
    digest: bytes = b""


class _Batch:
    """The rows of one chunk: texts are collected, encoded together, proven and put in order."""

    def __init__(
        self,
        engine: FastEngine | None,
        tokenization: Tokenization | DocumentTokenization,
        truth: Callable[[Sample | Document], list[TokenizedSample]],
        longest: int | None,
    ) -> None:
        self._engine = engine
        self._tokenization = tokenization
        self._truth = truth
        self._longest = longest
        self._rows: list[_Row] = []
        self._plans: list[Plan] = []
        self._samples = 0
        self._texts: list[str] = []  # each text of a row once, however many of its samples show it
        self._tails: list[str] = []

    def add_encoded(self, origin: Origin, samples: list[TokenizedSample], digest: bytes, *, neutralised: bool) -> None:
        self._rows.append(_Row(origin, samples, neutralised=neutralised, digest=digest))

    def add_planned(
        self, origin: Origin, plan: Plan, blanks: Sequence[str], row: Sample | Document, digest: bytes, *, check: bool
    ) -> None:
        assert self._engine is not None
        normalize = self._engine.normalize
        self._rows.append(_Row(origin, None, row, self._samples, len(plan.part_counts), check, digest=digest))
        self._samples += len(plan.part_counts)
        self._plans.append(plan)
        self._texts += [normalize(fill(form, blanks)) for form in plan.texts]
        if plan.plain_tails is not None:
            self._tails += map(normalize, plan.plain_tails)
        else:
            self._tails += [normalize(fill(tail, blanks)) for tail in plan.tails]

    def finish(self, result: EncodedChunk) -> None:
        """Encode what was collected and fill in the chunk's arrays. Raises EngineDiffers."""
        planned = self._encode() if self._plans else None
        ids: list[Ints] = []
        lengths: list[Ints] = []
        spans: list[Ints] = []
        counts: list[Ints] = []
        lines: list[tuple[int, int, int]] = []
        digests: list[bytes] = []
        run: list[int] | None = None  # planned samples that follow one another are copied in one piece

        def flush() -> None:
            nonlocal run
            if run is not None and planned is not None:
                part = planned.slice(*run)
                for target, value in zip((ids, lengths, spans, counts), part, strict=True):
                    target.append(value)
            run = None

        for row in self._rows:
            try:
                samples = self._settled(row, planned)
            except Rejected as reason:
                result.rejects.append((row.origin.line, row.origin.offset, reason.code, reason.detail))
                continue
            digests.append(row.digest)
            if samples is None:
                lines.append((row.origin.line, row.origin.offset, row.count))
                if run is not None and run[1] == row.first:
                    run[1] = row.first + row.count
                else:
                    flush()
                    run = [row.first, row.first + row.count]
                continue
            flush()
            result.neutralised += row.neutralised
            lines.append((row.origin.line, row.origin.offset, len(samples)))
            ids += [sample.ids for sample in samples]
            lengths.append(np.asarray([sample.ids.size for sample in samples], np.int32))
            spans += [sample.spans for sample in samples]
            counts.append(np.asarray([len(sample.spans) for sample in samples], np.int32))
        flush()
        result.rejects.sort()
        if lines:
            result.ids, result.lengths = np.concatenate(ids), np.concatenate(lengths)
            result.spans, result.span_counts = np.concatenate(spans), np.concatenate(counts)
            numbers, offsets, repeats = np.asarray(lines, np.int64).T
            result.lines = np.repeat(numbers, repeats)
            if digests[0]:
                result.offsets = np.repeat(offsets, repeats)
                result.digests = np.repeat(np.frombuffer(b"".join(digests), "<u8").reshape(-1, 2), repeats, axis=0)

    def _settled(self, row: _Row, planned: "_Planned | None") -> list[TokenizedSample] | None:
        """The row's samples when they do not come from the arrays; None when they do. Raises Rejected, EngineDiffers."""
        if row.encoded is not None:
            return row.encoded
        assert planned is not None
        assert row.row is not None
        own = slice(row.first, row.first + row.count)
        fits = self._longest is None or (planned.lengths[own] <= self._longest).all()
        if not (planned.proven[own].all() and fits):
            return self._truth(row.row)
        if row.check:
            try:
                truth = self._truth(row.row)
            except Rejected as reason:
                raise EngineDiffers(f"{row.origin} ({reason})") from None
            mine = [planned.sample(number) for number in range(own.start, own.stop)]
            same = len(truth) == len(mine) and all(
                np.array_equal(a.ids, b.ids) and np.array_equal(a.spans, b.spans)
                for a, b in zip(truth, mine, strict=True)
            )
            if not same:
                raise EngineDiffers(str(row.origin))
        return None

    def _encode(self) -> "_Planned":
        """All planned samples as arrays, and which of them are proven."""
        from .kernels import copy_texts

        assert self._engine is not None
        plans = self._plans
        kinds = np.concatenate([plan.kinds for plan in plans])
        ids, offsets = self._engine.encode(self._texts)
        good = self._engine.holds(ids, offsets, self._texts) & _without(
            self._tokenization.text.control_ids, ids, offsets
        )
        shown = _shifted([plan.numbers for plan in plans], [len(plan.texts) for plan in plans])
        part_len = np.ones(len(kinds), np.int64)
        part_len[kinds < 0] = np.diff(offsets)[shown]
        bounds = np.append(0, np.cumsum(part_len))
        flat = np.empty(int(bounds[-1]), np.int32)
        flat[bounds[:-1][kinds >= 0]] = kinds[kinds >= 0]
        copy_texts(flat, bounds[:-1][kinds < 0], ids, offsets, shown)
        part_counts = np.concatenate([plan.part_counts for plan in plans])
        first_part = np.cumsum(part_counts) - part_counts
        starts = bounds[first_part]
        proven = np.ones(len(starts), np.bool_)
        owner = np.repeat(np.arange(len(starts)), np.concatenate([plan.text_counts for plan in plans]))
        proven[owner[~good[shown]]] = False
        span_counts = np.concatenate([plan.span_counts for plan in plans])
        owner = np.repeat(np.arange(len(starts)), span_counts)
        spans = self._place(flat, bounds, first_part[owner], owner, proven) - starts[owner][:, None]
        lengths = np.append(starts[1:], len(flat)) - starts
        return _Planned(flat, starts, lengths.astype(np.int32), spans.astype(np.int32), span_counts, proven)

    def _place(
        self,
        flat: Ints,
        bounds: npt.NDArray[np.int64],
        base: npt.NDArray[np.int64],
        owner: npt.NDArray[np.int64],
        proven: npt.NDArray[np.bool_],
    ) -> npt.NDArray[np.int64]:
        """Token spans of all answers; a sample whose prompt would be tokenised otherwise alone is not proven.

        ``base`` is the number of the first part of each span's sample, ``owner`` the number of that sample.
        """
        assert self._engine is not None
        plans = self._plans
        first = base + np.concatenate([plan.firsts for plan in plans])
        end = base + np.concatenate([plan.ends for plan in plans])
        start = bounds[first]
        tails = {tail: number for number, tail in enumerate(dict.fromkeys(self._tails))}
        known = np.asarray([tails[tail] for tail in self._tails])
        tail_of = known[_shifted([plan.tail_numbers for plan in plans], [len(plan.tails) for plan in plans])]
        tail_ids, tail_at = self._engine.encode(list(tails))
        for number in range(len(tails)):
            wanted = tail_ids[tail_at[number] : tail_at[number + 1]]
            mine = np.flatnonzero(tail_of == number)
            agree = bounds[first[mine] + 1] - start[mine] >= len(wanted)  # it must end within its part
            fits = mine[agree]
            agree[agree] = (flat[start[fits, None] + np.arange(len(wanted))] == wanted).all(axis=1)
            proven[owner[mine[~agree]]] = False
            start[mine] += len(wanted)
        if isinstance(self._tokenization, Tokenization) and self._tokenization.mask_compat == "hunyuan":
            before = flat[np.maximum(start - 1, 0)]
            opened = np.isin(before, list(self._tokenization.special_ids)) & (start > bounds[base])
            proven[owner[~opened]] = False
            start = start - 1
        return np.stack([start, bounds[end]], axis=1)


def _shifted(numbers: Sequence[npt.NDArray[np.int64]], sizes: Sequence[int]) -> npt.NDArray[np.int64]:
    """Numbers that count from 0 in each plan, as numbers that count over all plans."""
    begins = np.cumsum(sizes, dtype=np.int64) - np.asarray(sizes, np.int64)
    return np.concatenate(numbers) + np.repeat(begins, [len(part) for part in numbers])


def _without(tokens: set[int], ids: Ints, offsets: npt.NDArray[np.int64]) -> npt.NDArray[np.bool_]:
    """For each text whether none of its ids is one of ``tokens``."""
    table = np.zeros(max(int(ids.max(initial=0)), *tokens, 0) + 1, np.bool_)
    table[list(tokens)] = True
    hits = np.append(0, np.cumsum(table[ids]))
    return hits[offsets[1:]] == hits[offsets[:-1]]


@dataclass(slots=True)
class _Planned:
    flat: Ints
    starts: npt.NDArray[np.int64]
    lengths: Ints
    spans: Ints
    span_counts: npt.NDArray[np.int64]
    proven: npt.NDArray[np.bool_]
    _span_ends: npt.NDArray[np.int64] = field(init=False)

    def __post_init__(self) -> None:
        self._span_ends = np.append(0, np.cumsum(self.span_counts))

    def slice(self, first: int, last: int) -> tuple[Ints, Ints, Ints, Ints]:
        """Ids, lengths, spans and span counts of samples ``first`` to before ``last``."""
        end = int(self.starts[last - 1]) + int(self.lengths[last - 1])
        return (
            self.flat[int(self.starts[first]) : end],
            self.lengths[first:last],
            self.spans[self._span_ends[first] : self._span_ends[last]],
            self.span_counts[first:last].astype(np.int32),
        )

    def sample(self, number: int) -> TokenizedSample:
        ids, _, spans, _ = self.slice(number, number + 1)
        return TokenizedSample(ids, spans)
