"""Prove the masks of data and show its figures, before any GPU is used.

    finebridge data check data.jsonl --tokenizer_name_or_path MODEL [--max_seq_length N] [--json report.json] [--strict]

The data is prepared as training prepares it, which proves every mask, and kept in ``--output_dir`` for training to reuse.
In place of raw files a prepared folder can be named.
"""

import json
from argparse import ArgumentParser, Namespace
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from rich.console import Console

from .arguments import DataArguments
from .filters import FILTERED
from .flags import add, data_parser, read_arguments
from .measures import Answers, Example, Lengths, Limit, Measured, Report
from .mixture import mixture_file
from .mixture_index import MixtureFolders, first_duplicates, prepare_mixture, source_lines
from .output import counted, save, writable
from .preprocess import check_rejects, prepare
from .preview import Preview, print_row
from .schema import DataError, Origin
from .token_view import visible
from .tokenizer_files import TokenizerSource

_OUTPUT = "output/prepared_data"
_BAR = 40
_DESCRIPTION = (
    "Prepare data as training does, which proves every mask, and show its figures, before any GPU is used. "
    "FILE may be the folder of a prepared dataset, too. Exit code 2 when the data cannot be used."
)


def _flags(parser: ArgumentParser) -> None:
    add(
        parser, "--output_dir", default=_OUTPUT, help=f"where the prepared data is kept and reused (default: {_OUTPUT})"
    )
    add(parser, "--json", metavar="REPORT", help="write the figures as JSON, too")
    add(parser, "--count", type=int, default=2, help="samples (or pairs) to show in colour (default: 2)")
    add(parser, "--strict", action="store_true", help="exit code 2 when any row is rejected")


def main(argv: Sequence[str] | None = None) -> int:
    """Prepare, measure and print; exit code 0. Raises DataError when the data cannot be used for training."""
    parser = data_parser("check", _DESCRIPTION, _flags)
    values = parser.parse_args(argv)
    patterns, source, args = read_arguments(values)
    if values.count < 0:
        raise DataError(f"--count {values.count}: a number of samples is expected, or 0")
    target = writable(values.json, "--json")
    made = _prepare(patterns, source, args, Path(values.output_dir))
    source = replace(source, loaded=source.load())
    if isinstance(made, Path):
        report, problems = _check(made, source.loaded, args, values)
        figures = asdict(report)
    else:
        figures, problems = _check_mixture(made, source.loaded, args, values)
    if target:
        save(target, json.dumps({**figures, "problems": problems}, indent=1, ensure_ascii=False) + "\n")
    if problems:
        raise DataError("\n".join(problems))
    return 0


def _prepare(
    patterns: Sequence[str], source: TokenizerSource, args: DataArguments, cache: Path
) -> Path | MixtureFolders:
    """The prepared dataset, however many rows were rejected: the report tells them, and the limit is checked after it."""
    args = replace(args, max_rejects=1.0)
    try:
        if file := mixture_file(patterns[0]):
            return prepare_mixture(file, source, args, cache, start_method="fork")
        return prepare(patterns, source, args, cache, start_method="fork")
    except OSError as error:
        raise DataError(f"--output_dir {cache}: {error.strerror or error}") from None


def _check(folder: Path, tokenizer: Any, args: DataArguments, values: Namespace) -> tuple[Report, list[str]]:
    """Print samples and figures of a prepared dataset; the figures, and why it cannot be used."""
    data = Measured(folder)
    report = data.measure(tokenizer, args)
    _print_samples(Console(highlight=False, soft_wrap=True), data, tokenizer, args, values.count)
    for line in _lines(report):
        print(line)
    return report, _problems(report, data, values)


def _check_mixture(
    made: MixtureFolders, tokenizer: Any, args: DataArguments, values: Namespace
) -> tuple[dict[str, Any], list[str]]:
    """The same for each source of a mixture, and what is taken of all."""
    figures: dict[str, Any] = json.loads((made.index / "report.json").read_text(encoding="utf-8"))
    problems: list[str] = []
    checked: dict[str, Any] = {}
    for source, folder in zip(made.mixture.sources, made.parts, strict=True):
        print(f"\nsource {source.name}")
        report, found = _check(folder, tokenizer, args, values)
        checked[source.name] = asdict(report)
        problems += [f"{source.where}: {source.name}: {problem}" for problem in found]
    print()
    for line in source_lines(figures):
        print(_line("taken", line))
    for line in first_duplicates(made.index):
        print(visible(f"    {line}"))
    return {**figures, "checked": checked}, problems


def _print_samples(console: Console, data: Measured, tokenizer: Any, args: DataArguments, count: int) -> None:
    each = 2 if data.kind == "preference" else 1
    for first in range(0, min(each * count, len(data.lengths)), each):
        file, _, line = data.origin(first).rpartition(":")
        samples = [data.sample(number) for number in range(first, first + each)]
        print_row(
            console,
            tokenizer,
            Preview(Origin(Path(file), int(line)), samples, None, neutralised=False),
            args,
            data.kind,
        )


def _problems(report: Report, data: Measured, values: Namespace) -> list[str]:
    """Why the data cannot be used; empty when it can."""
    problems: list[str] = []
    try:
        check_rejects(data.report, data.folder, values.max_rejects)
    except DataError as error:
        problems.append(str(error))
    rejected = sum(reject.count for reject in report.rejected if reject.code not in FILTERED)
    if values.strict and rejected:
        problems.append(f"--strict: {rejected:,} of {report.rows:,} rows are rejected")
    limit = report.limit
    if limit.over and limit.over_long == "error":
        over = f"{counted(limit.over, 'sample')} {'is' if limit.over == 1 else 'are'} over"
        problems.append(f"{over} --max_seq_length {limit.max_seq_length} (--over_long error)")
    elif not limit.samples:
        problems.append(f"no sample is left under --max_seq_length {limit.max_seq_length}; raise it")
    return problems


def _lines(report: Report) -> Iterator[str]:
    """The figures as text."""
    rejected = sum(reject.count for reject in report.rejected)
    yield ""
    yield _line("rows", f"{report.rows:,}: {counted(report.samples, 'sample')} ({report.kind}), {rejected:,} rejected")
    yield _line(
        "tokens", f"{report.tokens:,}: {report.loss_tokens:,} with loss ({report.loss_tokens / report.tokens:.1%})"
    )
    yield from _length_lines(report.lengths, report.samples)
    yield from _limit_lines(report.limit)
    if report.packing:
        packs, fill, longest = report.packing.packs, report.packing.fill, report.limit.max_seq_length
        yield _line("packing", f"{counted(packs, 'pack')} of {longest:,} tokens, {fill:.1%} filled (with --packing)")
    if report.answers:
        yield from _answer_lines(report.answers, report.samples)
    what = "pair" if report.kind == "preference" else "sample"
    yield _line("duplicates", f"{counted(report.duplicates.count, what)} with the same tokens as an earlier one")
    yield from map(_example, report.duplicates.first)
    if report.shortened_rows:
        yield _line("shortened", f"{counted(report.shortened_rows, 'row')} split or cut at their turns (--over_long)")
    yield _line("control tokens", f"in the text of {counted(report.neutralised_rows, 'row')}, encoded as plain text")
    yield _line("rejected", counted(rejected, "row"))
    for reject in report.rejected:
        yield f"  {reject.code:<24}{reject.count:>10,}"
        yield from map(_example, reject.first)


def _length_lines(lengths: Lengths, samples: int) -> Iterator[str]:
    yield _line(
        "length",
        f"p50 {lengths.p50:,}, p90 {lengths.p90:,}, p99 {lengths.p99:,}, max {lengths.longest:,}, "
        f"min {lengths.shortest:,}, mean {lengths.mean:,.1f} tokens a sample",
    )
    most = max(part.samples for part in lengths.histogram)
    for part in lengths.histogram:
        bar = "#" * -(-part.samples * _BAR // most)
        name = f"{part.first:,} to {part.last:,}"
        yield f"  {name:<24}{part.samples:>10,}  {part.samples / samples:>6.1%}  {bar}".rstrip()


def _limit_lines(limit: Limit) -> Iterator[str]:
    fate = ""
    if limit.over and limit.over_long != "error":
        fate = f": {limit.left_out:,} left out, {limit.cut:,} cut; {limit.samples:,} samples, {limit.tokens:,} tokens remain"
    yield _line("over the limit", f"{counted(limit.over, 'sample')} over {limit.max_seq_length:,} tokens{fate}")
    yield from map(_example, limit.first)


def _answer_lines(answers: Answers, samples: int) -> Iterator[str]:
    total = answers.trained
    yield _line(
        "answers", f"{total:,} trained, {total / samples:.2f} a sample, at most {answers.most_in_a_sample:,} in one"
    )
    for name, count in (
        ("with a thought", answers.thought),
        ("with an empty thought", answers.empty_thought),
        ("without think tags", answers.plain),
        ("with tags out of order", answers.malformed),
        ("asked with /no_think", answers.no_think),
    ):
        yield f"  {name:<24}{count:>10,}  {count / total:>6.1%}"
    yield from map(_example, answers.malformed_first)


def _line(name: str, text: str) -> str:
    return f"{name:<16}{text}"


def _example(example: Example) -> str:
    return visible(f"    {example.where}: {example.detail}").replace("\n", " ")
