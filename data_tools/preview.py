"""Show what of each row is trained, token by token.

    finebridge data preview data.jsonl --tokenizer_name_or_path MODEL [--line N] [--tokens] [--html page.html]

Text with loss is green and stands in {{ }}, so that it can be told apart without colours too.
"""

from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.text import Text

from .arguments import DataArguments
from .encoder import RowEncoder
from .fitting import loss_remains
from .flags import add, data_parser, read_arguments
from .formats import RowForm
from .html_view import RowView, SampleView, page
from .output import save, writable
from .preprocess import row_forms, rows_kind
from .readers import Chunk, files_of, read_chunks, resolve_files, rows_of
from .schema import DataError, Kind, Origin, Rejected, TokenizedSample
from .token_view import cut, pieces, stretches, visible

_NEUTRALISED = "control tokens in its text are encoded as plain text"


@dataclass(frozen=True, slots=True)
class Preview:
    """A row as it is trained: its samples, or the reason (code and detail) why it is rejected."""

    origin: Origin
    samples: list[TokenizedSample]
    reject: tuple[str, str] | None
    neutralised: bool


def _flags(parser: ArgumentParser) -> None:
    add(parser, "--count", type=int, default=3, help="rows to show (default: the first 3)")
    add(parser, "--line", "--row", type=int, help="only the row on this line of the file (or row of a table), from 1")
    add(parser, "--tokens", action="store_true", help="list every token: place, id, whether it has loss, text")
    add(parser, "--html", metavar="PAGE", help="write a page for the browser instead, with the tokens' borders")


def main(argv: Sequence[str] | None = None) -> int:
    """Show rows on the terminal, or write them as a page; exit code 0. Raises DataError."""
    told = "Show what of each row is trained: text with loss is green and stands in {{ }}."
    parser = data_parser("preview", told, _flags)
    values = parser.parse_args(argv)
    patterns, source, args = read_arguments(values)
    if values.count < 1:
        raise DataError(f"--count {values.count}: a positive number of rows is expected")
    target = writable(values.html, "--html")
    files = [file for found in resolve_files(patterns) for file in files_of(found)]
    forms = row_forms(files, args)
    kind = rows_kind(forms)
    rows = _chosen(files, forms, values.line, values.count)
    tokenizer = source.load()
    encoder = RowEncoder(tokenizer, args, kind, None)
    shown = (_preview(encoder, *row) for row in rows)
    if target:
        views = [row_view(tokenizer, row, args, kind) for row in shown]
        title = f"{source.path}, {args.chat_template or 'its own'} chat template" if kind != "document" else source.path
        save(target, page("What is trained", f"Tokenizer {title}", views))
        print(f"data: {len(views):,} rows shown in {target}")
        return 0
    console = Console(highlight=False, soft_wrap=True)
    for row in shown:
        print_row(console, tokenizer, row, args, kind, tokens=values.tokens)
    return 0


def print_row(
    console: Console, tokenizer: Any, row: Preview, args: DataArguments, kind: Kind, *, tokens: bool = False
) -> None:
    """A row on the terminal: its samples as text, or token by token."""
    if row.reject:
        console.print(Text(visible(f"{row.origin}: rejected, {row.reject[0]}: {row.reject[1]}"), style="red"))
    if row.neutralised:
        console.print(Text(visible(f"{row.origin}: {_NEUTRALISED}"), style="yellow"))
    for number, sample in enumerate(row.samples):
        trained, note = as_trained(sample, args)
        heading = f"{row.origin}: {_label(kind, number, len(row.samples))}{_size(trained)}"
        console.print(Text(visible(heading), style="bold"))
        if note:
            console.print(Text(note, style="yellow"))
        console.print(_token_list(tokenizer, trained) if tokens else coloured(tokenizer, trained))


def coloured(tokenizer: Any, sample: TokenizedSample) -> Text:
    """A sample's text with every stretch that carries loss in ``{{ }}`` and green."""
    view = Text()
    for text, trained in stretches(tokenizer, sample):
        view.append("{{" + visible(text) + "}}" if trained else visible(text), style="green" if trained else "")
    return view


def as_trained(sample: TokenizedSample, args: DataArguments) -> tuple[TokenizedSample, str]:
    """The sample as ``--over_long`` leaves it, and what is to be told about that; "" when it fits."""
    longest = args.max_seq_length
    if sample.ids.size <= longest:
        return sample, ""
    over = f"over --max_seq_length {longest}: "
    if args.over_long == "error":
        return sample, over + "training stops here (--over_long error)"
    if args.over_long != "truncate":
        return sample, over + f"left out of training (--over_long {args.over_long})"
    if not loss_remains(sample.spans, np.asarray([len(sample.spans)]), longest)[0]:
        return sample, over + "left out of training, for no token with loss is left after the cut"
    return cut(sample, longest), over + f"cut after {longest} of {sample.ids.size} tokens (--over_long truncate)"


def row_view(tokenizer: Any, row: Preview, args: DataArguments, kind: Kind) -> RowView:
    """A row as the page shows it."""
    samples: list[SampleView] = []
    for number, sample in enumerate(row.samples):
        trained, note = as_trained(sample, args)
        heading = _label(kind, number, len(row.samples)) + _size(trained)
        samples.append(SampleView(heading, note, tuple(pieces(tokenizer, trained))))
    rejected = f"rejected, {row.reject[0]}: {row.reject[1]}" if row.reject else ""
    return RowView(str(row.origin), rejected, _NEUTRALISED if row.neutralised else "", tuple(samples))


def _label(kind: Kind, number: int, count: int) -> str:
    if kind == "preference":
        return ("chosen answer: ", "rejected answer: ")[number % 2]
    return f"sample {number + 1} of {count}: " if count > 1 else ""


def _size(sample: TokenizedSample) -> str:
    trained = int((sample.spans[:, 1] - sample.spans[:, 0]).sum())
    return f"{sample.ids.size:,} tokens, {trained:,} with loss"


def _token_list(tokenizer: Any, sample: TokenizedSample) -> Text:
    view = Text()
    for piece in pieces(tokenizer, sample):
        for place, token in enumerate(piece.ids):
            last = place == len(piece.ids) - 1
            text = repr(piece.text) + " control" * piece.control if last else "(a part of the next)"
            line = f"{piece.position + place:>6} {token:>8} {'loss' if piece.trained else '-':>5}  {text}"
            view.append(line + "\n", style="green" if piece.trained else "")
    view.rstrip()
    return view


def _preview(encoder: RowEncoder, origin: Origin, value: object, form: RowForm) -> Preview:
    """One row through the encoder of the build, by its reference way."""
    if isinstance(value, Rejected):
        return Preview(origin, [], (value.code, value.detail), neutralised=False)
    done = encoder(Chunk(origin.file, origin.line, origin.offset, [value]), form)
    reject = done.rejects[0][2:] if done.rejects else None
    return Preview(origin, done.samples(), reject, bool(done.neutralised))


def _chosen(
    files: Sequence[Path], forms: Sequence[RowForm], line: int | None, count: int
) -> Iterator[tuple[Origin, object, RowForm]]:
    """The rows to show, at least one. Raises DataError when there is none, or none on the line asked for."""
    if line is not None and len(files) > 1:
        raise DataError(f"--line {line}: of which file? {len(files)} are named")
    rows = _rows(files, forms, line or 1)
    first = next(rows, None) if line is None or line > 0 else None
    if first is None or (line is not None and first[0].line != line):
        where = f"{files[0]}:{line}" if line is not None else ", ".join(map(str, files))
        raise DataError(f"{where}: there is no row")
    return islice(chain([first], rows), count if line is None else 1)


def _rows(files: Sequence[Path], forms: Sequence[RowForm], first: int) -> Iterator[tuple[Origin, object, RowForm]]:
    """Rows from line ``first`` on; chunks before it are not parsed."""
    for file, form in zip(files, forms, strict=True):
        for chunk in read_chunks(file):
            lines = chunk.data.count(b"\n") + 1 if isinstance(chunk.data, bytes) else len(chunk.data)
            if chunk.line + lines > first:
                yield from ((origin, value, form) for origin, value in rows_of(chunk) if origin.line >= first)
