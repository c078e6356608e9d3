"""Raw files to a prepared dataset: tokens once, masks as spans, every bad row counted and listed.

The artifact is a folder: ``text_document.bin/.idx`` (Megatron's own format, unpadded, one sample a document),
``spans_document.bin/.idx`` (which tokens carry loss), ``rows.npy`` (file number and line of each sample),
``rejects.jsonl``, ``report.json`` and ``manifest.json``. Its name is a hash of everything that shapes it, so a second
run finds it and a changed file, template or tokenizer makes a new one. Sequence length is not part of it: the limit is
applied when the dataset is opened.
"""

import hashlib
import json
import multiprocessing
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.manifest import file_sha256
from ..storage.once import build_once
from .arguments import DataArguments
from .formats import parse_row
from .indexed import IndexedWriter
from .readers import parse_json, read_lines, resolve_files
from .schema import DataError, Origin, Rejected, TokenizedSample
from .templates import ChatTemplate
from .thinking import apply_mode
from .tokenization import Tokenization

FORMAT = 2  # raise when the same input would give other tokens or spans
_BATCH = 64
_SMALL = 2000  # rows below which starting worker processes costs more than it saves
_MAX_WORKERS = 16  # each holds a tokenizer and the libraries, some 300 MB
_SHOWN = 10


@dataclass(frozen=True, slots=True)
class Encoded:
    """What became of one row: samples, or the code and detail of its rejection."""

    origin: Origin
    samples: list[TokenizedSample]
    reject: tuple[str, str] | None
    neutralised: bool


class RowEncoder:
    """A line of a file to samples."""

    def __init__(self, tokenizer: Any, args: DataArguments) -> None:
        self.args = args
        self.tokenization = Tokenization(ChatTemplate(tokenizer, args.chat_template), args.mask_compat)

    def __call__(self, origin: Origin, line: bytes) -> Encoded:
        """Never raises for a bad row: the reason is part of the result."""
        before = self.tokenization.neutralised
        try:
            sample = parse_row(parse_json(line))
            separate = self.tokenization.template.reads_reasoning
            samples = self.tokenization.encode(apply_mode(sample, self.args.think_mode, separate=separate))
        except Rejected as reason:
            return Encoded(origin, [], (reason.code, reason.detail), neutralised=False)
        return Encoded(origin, samples, None, neutralised=self.tokenization.neutralised > before)


def prepare(
    patterns: Sequence[str], tokenizer: Any, args: DataArguments, cache: Path, say: Callable[[str], None] = print
) -> Path:
    """The prepared dataset of these files, built when it does not stand yet.

    Safe to call from many processes at once: one builds, the others wait. Raises DataError when a file is unusable, when
    no row can be trained on, or when more than ``args.max_bad_ratio`` of the rows are rejected.
    """
    files = resolve_files(patterns)
    encoder = RowEncoder(tokenizer, args)
    hashes = {file: file_sha256(file) for file in files}
    settings = {
        "format": FORMAT,
        "sources": [hashes[file] for file in files],  # a file that is named twice counts twice
        "tokenizer": tokenizer_sha256(tokenizer),
        "chat_template": encoder.tokenization.template.source,
        "think_mode": args.think_mode,
        "mask_compat": args.mask_compat,
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    target = cache / key

    def build(folder: Path) -> Mapping[str, Any]:
        _write(folder, files, _encode_all(files, encoder, args.preprocessing_num_workers))
        return {**settings, "files": {str(file): value for file, value in hashes.items()}}

    built = build_once(target, build, kind="dataset", say=say)
    report = json.loads((target / "report.json").read_text(encoding="utf-8"))
    say(f"data: {describe(report)}; {'prepared' if built else 'reused'} {target}")
    if report["rejects"]:
        say(f"data: rejected rows are listed in {target / 'rejects.jsonl'}")
    _check(report, target, args.max_bad_ratio)
    return target


def describe(report: Mapping[str, Any]) -> str:
    """One line on what a prepared dataset holds."""
    line = (
        f"{report['rows']:,} rows -> {report['samples']:,} samples, {report['tokens']:,} tokens, "
        f"{report['loss_tokens']:,} with loss"
    )
    if report["rejects"]:
        line += ", rejected: " + ", ".join(f"{code} {count:,}" for code, count in report["rejects"].items())
    if report["neutralised"]:
        line += f"; control tokens written as plain text in {report['neutralised']:,} rows"
    return line


def tokenizer_sha256(tokenizer: Any) -> str:
    """A hash of what a tokenizer does to text, without its chat template."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    return hashlib.sha256(f"{type(tokenizer).__name__}\n{special}\n{words}".encode()).hexdigest()


def _check(report: Mapping[str, Any], folder: Path, max_bad_ratio: float) -> None:
    if not report["rows"]:
        raise DataError(f"{', '.join(report['files'])}: no rows, only blank lines")
    bad = sum(report["rejects"].values())
    if report["samples"] and bad <= max_bad_ratio * report["rows"]:
        return
    with (folder / "rejects.jsonl").open(encoding="utf-8") as stream:
        first = [json.loads(line) for line in islice(stream, _SHOWN)]
    lines = "\n".join(f"  {row['file']}:{row['line']}: {row['code']}: {row['detail']}" for row in first)
    more = f"\n  ... all {bad} in {folder / 'rejects.jsonl'}" if bad > len(first) else ""
    limit = f"more than --max_bad_ratio {max_bad_ratio:g} allows" if report["samples"] else "none is left to train on"
    raise DataError(f"{bad} of {report['rows']} rows are rejected, {limit}:\n{lines}{more}")


def _encode_all(files: Sequence[Path], encoder: RowEncoder, workers: int | None) -> Iterator[Encoded]:
    """Every row of the files in order, encoded here or by worker processes."""
    rows = (row for file in files for row in read_lines(file))
    head = list(islice(rows, _SMALL))
    if workers is None:
        # Code that came with the tokenizer cannot be imported by a fresh process before transformers has fetched it.
        remote = type(encoder.tokenization.tokenizer).__module__.startswith("transformers_modules")
        workers = 1 if remote or len(head) < _SMALL else min(_MAX_WORKERS, len(os.sched_getaffinity(0)))
    everything = chain(head, rows)
    if workers == 1:
        for origin, line in everything:
            yield encoder(origin, line)
        return
    batches = iter(lambda: list(islice(everything, _BATCH)), [])
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, _set_encoder, (encoder.tokenization.tokenizer, encoder.args)) as pool:
        waiting = deque(pool.submit(_encode_in_worker, batch) for batch in islice(batches, 4 * workers))
        while waiting:
            yield from waiting.popleft().result()
            waiting.extend(pool.submit(_encode_in_worker, batch) for batch in islice(batches, 1))


def _write(folder: Path, files: Sequence[Path], rows: Iterable[Encoded]) -> None:
    numbers = {file: files.index(file) for file in files}
    rejects: Counter[str] = Counter()
    total = Counter(rows=0, samples=0, tokens=0, loss_tokens=0, neutralised=0)
    origins: list[tuple[int, int]] = []
    terminators: set[int] = set()
    with (
        IndexedWriter(folder / "text_document") as tokens,
        IndexedWriter(folder / "spans_document") as spans,
        (folder / "rejects.jsonl").open("w", encoding="utf-8") as listed,
    ):
        for row in rows:
            total["rows"] += 1
            total["neutralised"] += row.neutralised
            if row.reject:
                code, detail = row.reject
                rejects[code] += 1
                entry = {"file": str(row.origin.file), "line": row.origin.line, "code": code, "detail": detail}
                listed.write(json.dumps(entry, ensure_ascii=False) + "\n")
            for sample in row.samples:
                tokens.add(sample.ids)
                spans.add(sample.spans.reshape(-1))
                origins.append((numbers[row.origin.file], row.origin.line))
                terminators.update(sample.ids[sample.spans[:, 1] - 1].tolist())
                total["samples"] += 1
                total["tokens"] += sample.ids.size
                total["loss_tokens"] += int((sample.spans[:, 1] - sample.spans[:, 0]).sum())
    np.save(folder / "rows.npy", np.asarray(origins, dtype=np.int64).reshape(-1, 2), allow_pickle=False)
    report: dict[str, Any] = {**total, "rejects": dict(rejects.most_common()), "files": [str(file) for file in files]}
    report["terminators"] = sorted(terminators)  # ids that end an answer: generation must stop at them
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


_worker_encoder: RowEncoder | None = None


def _set_encoder(tokenizer: Any, args: DataArguments) -> None:
    global _worker_encoder  # noqa: PLW0603 - the one way to hand a pool's workers their state
    _worker_encoder = RowEncoder(tokenizer, args)


def _encode_in_worker(batch: Sequence[tuple[Origin, bytes]]) -> list[Encoded]:
    assert _worker_encoder is not None
    return [_worker_encoder(origin, line) for origin, line in batch]
