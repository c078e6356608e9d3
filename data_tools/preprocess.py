"""Raw files to a prepared dataset: tokens once, masks as spans, every bad row counted and listed.

The artifact is a folder: ``text_document.bin/.idx`` (Megatron's own format, unpadded, one sample a document),
``spans_document.bin/.idx`` (which tokens carry loss), ``rows.npy`` (file number and line of each sample),
``rejects.jsonl``, ``report.json`` and ``manifest.json``. Its name is a hash of everything that shapes it, so a second
run finds it and a changed file, template or tokenizer makes a new one. Sequence length is not part of it, unless long
conversations are cut at their turns: the limit is applied when the dataset is opened. Of a preference pair the chosen
answer comes first, then the rejected one.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any, cast

from ..storage.once import build_once
from ..storage.progress import Progress
from ..storage.source_hashes import source_sha256
from .arguments import DataArguments
from .encoder import RowEncoder
from .engine import EngineDiffers, fast_engine
from .filters import FILTERED, looked_for
from .formats import RowForm, detect_form
from .handlers import check_columns, handler_form, map_keys
from .prepared import KIND_NAMES, check_kind, open_prepared, prepared_folder, shaping
from .readers import Chunk, files_of, read_chunks, resolve_files, rows_of
from .schema import DataError, Kind, Rejected
from .tokenizer_files import TokenizerSource, tokenizer_sha256
from .workers import Job, StartMethod, encoding
from .writer import DatasetWriter, describe

FORMAT = 3  # raise when the same input would give other tokens or spans
UNREADABLE = ("not_utf8", "not_json", "line_too_long", "duplicate_key", "not_an_object")
_SMALL = 8 << 20  # bytes of data for which starting one more worker process pays
_MAX_WORKERS = 16
_DEFAULT_REJECTS = 0.05
_SHOWN = 10
_LOOKED_AT = 10_000  # rows of a file in which a column of --map_keys must show itself


@dataclass(frozen=True, slots=True)
class Preparation:
    """What is to be prepared from which files, and the folder that holds it when it is done.

    ``named`` says that the folder itself was named in place of raw files.
    """

    target: Path
    kind: Kind
    files: Sequence[Path] = ()
    forms: Sequence[RowForm] = ()
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    hashes: Mapping[Path, str] = field(default_factory=dict[Path, str])
    args: DataArguments = field(default_factory=DataArguments)
    named: bool = False


def plan(
    patterns: Sequence[str],
    tokenizer: TokenizerSource,
    args: DataArguments,
    cache: Path,
    say: Callable[[str], None] = print,
    wanted: Kind | None = None,
) -> Preparation:
    """What ``prepare`` would do. Reads the files for their hashes, once. Raises DataError, ManifestError."""
    if folder := prepared_folder(patterns):
        open_prepared(folder, tokenizer, args)
        kind: Kind = json.loads((folder / "report.json").read_text(encoding="utf-8"))["kind"]
        check_kind(kind, wanted, patterns)
        return Preparation(folder, kind, named=True)
    files, forms, kind = check_sources(patterns, args, wanted)
    told = sorted({form.form for form in forms} - {"messages"})
    if told and args.data_format == "auto" and not args.handler_name:
        say(f"data: by their columns the rows are read as {', '.join(told)} (--data_format says otherwise)")
    args = _effective(args, kind, say)
    hashes = source_sha256(files, cache, say)
    settings = {
        "format": FORMAT,
        "sources": [hashes[file] for file in files],  # a file that is named twice counts twice
        "forms": [asdict(form) for form in forms],
        "tokenizer": tokenizer_sha256(tokenizer.path, tokenizer.load),
        **shaping(args),
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return Preparation(cache / key, kind, files, forms, settings, hashes, args)


def prepare(
    patterns: Sequence[str],
    tokenizer: TokenizerSource,
    args: DataArguments,
    cache: Path,
    say: Callable[[str], None] = print,
    start_method: StartMethod = "spawn",
    wanted: Kind | None = None,
) -> Path:
    """The prepared dataset of these files, built when it does not stand yet; or the prepared dataset that is named.

    Safe to call from many processes at once: one builds, the others wait. ``fork`` starts workers faster; it is for a
    process whose threads hold no locks: a command, not a training rank. Raises DataError when a file is unusable, when
    its rows are not of the ``wanted`` kind, when no row can be trained on, or when more rows are rejected than
    ``args.max_rejects`` allows.
    """
    planned = plan(patterns, tokenizer, args, cache, say, wanted)
    target, files = planned.target, planned.files

    def build(folder: Path, tell: Callable[[str], None]) -> Mapping[str, Any]:
        _build(folder, files, planned.forms, planned.kind, tokenizer.load(), planned.args, tell, start_method)
        now = source_sha256(files, cache, say)
        if changed := [str(file) for file in files if now[file] != planned.hashes[file]]:
            raise DataError(f"{changed[0]}: was written to while it was read; start again when it is whole")
        return {**planned.settings, "files": {str(file.absolute()): planned.hashes[file] for file in files}}

    built = not planned.named and build_once(target, build, kind="dataset", say=say)
    report = json.loads((target / "report.json").read_text(encoding="utf-8"))
    say(f"data: {describe(report)}; {'prepared' if built else 'reused'} {target}")
    if not planned.named and not built and report["files"] != [str(file) for file in files]:
        say(
            f"data: the same bytes were prepared as {', '.join(report['files'])}; messages and rejects.jsonl name these"
        )
    if report["rejects"] and not planned.named:
        say(f"data: rejected rows are listed in {target / 'rejects.jsonl'}")
    check_rejects(report, target, args.max_rejects)
    return target


def check_sources(
    patterns: Sequence[str], args: DataArguments, wanted: Kind | None = None
) -> tuple[list[Path], list[RowForm], Kind]:
    """The files, the form of each one's rows, and their kind: what can be told by first rows and names of flags alone.

    Raises DataError.
    """
    files = [file for source in resolve_files(patterns) for file in files_of(source)]
    forms = row_forms(files, args)
    kind = rows_kind(forms)
    check_kind(kind, wanted, patterns)
    shaping(args)  # looks the template's name up
    return files, forms, kind


def _effective(args: DataArguments, kind: Kind, say: Callable[[str], None]) -> DataArguments:
    """The settings without those that mean nothing to rows of this kind, which is told."""
    plain = DataArguments()
    idle = _FOR_CHATS if kind == "document" else _FOR_TEXTS
    given = [name for name in idle if getattr(args, name) != getattr(plain, name)]
    if given:
        say(f"data: no effect on {KIND_NAMES[kind]}: {', '.join('--' + name for name in given)}")
    return replace(args, **{name: getattr(plain, name) for name in given})


_FOR_CHATS = ("chat_template", "think_mode", "enable_thinking", "mask_compat")
_FOR_TEXTS = ("append_eod",)


def row_forms(files: Sequence[Path], args: DataArguments) -> list[RowForm]:
    """How the rows of each file are read: as asked for, else told by the file's first row. Raises DataError."""
    if args.handler_name:
        if args.data_format != "auto":
            raise DataError("--handler_name and --data_format say the same thing; give one of them")
        forms = [handler_form(args.handler_name)] * len(files)
    elif args.data_format != "auto":
        forms = [RowForm(args.data_format)] * len(files)
    elif args.map_keys:
        raise DataError("--map_keys needs --data_format or --handler_name: which form the renamed columns make")
    else:
        forms = [_detected(file) for file in files]
    if not args.map_keys:
        return forms
    mapped = [map_keys(form, args.map_keys) for form in forms]
    for file, form in zip(files, mapped, strict=True):
        rows = (row for chunk in read_chunks(file) for _, row in rows_of(chunk) if isinstance(row, dict))
        check_columns(form, islice(cast("Iterator[dict[str, Any]]", rows), _LOOKED_AT))
    return mapped


def _detected(file: Path) -> RowForm:
    first = ""
    for chunk in read_chunks(file, 1 << 16):
        for origin, row in rows_of(chunk):
            if not isinstance(row, Rejected):
                try:
                    return detect_form(row)
                except DataError as error:
                    raise DataError(f"{origin}: {error}") from None
            else:
                first = first or f"; line {origin.line}: {row}"
    raise DataError(f"{file}: no row can be read, so their form is unknown (--data_format names it){first}")


def rows_kind(forms: Sequence[RowForm]) -> Kind:
    """What the rows of these files are. Raises DataError when they are not of one kind."""
    kinds: set[Kind] = {_KINDS.get(form.form, "chat") for form in forms}
    if len(kinds) > 1:
        raise DataError(f"the files hold rows of different kinds ({', '.join(sorted(kinds))}); build them one by one")
    return kinds.pop()


_KINDS: Mapping[str, Kind] = {"text": "document", "preference": "preference"}


def check_rejects(
    report: Mapping[str, Any], folder: Path, max_rejects: float | None, passing: Path | None = None
) -> None:
    """Raises DataError, with the first rejected rows, when no sample is left or more rows are rejected than are allowed.

    ``report`` is the ``report.json`` of the prepared dataset in ``folder``; see ``DataArguments.max_rejects``. Rejects are
    listed in ``rejects.jsonl`` there, or in ``passing``, a file that does not stay.
    """
    if not report["rows"]:
        raise DataError(f"{', '.join(report['files'])}: no rows, only blank lines")
    aside = FILTERED if report["samples"] else ()  # left out as was asked for
    bad = sum(count for code, count in report["rejects"].items() if code not in aside)
    unreadable = sum(report["rejects"].get(code, 0) for code in UNREADABLE)
    allowed = (_DEFAULT_REJECTS if max_rejects is None else max_rejects) * report["rows"]
    broken = max_rejects is None and unreadable > 0
    if report["samples"] and bad <= allowed and not broken:
        return
    with (passing or folder / "rejects.jsonl").open(encoding="utf-8") as stream:
        rows = (row for row in map(json.loads, stream) if row["code"] not in aside)
        first = list(islice((row for row in rows if not broken or row["code"] in UNREADABLE), _SHOWN))
    lines = "\n".join(f"  {row['file']}:{row['line']}: {row['code']}: {row['detail']}" for row in first)
    more = "" if bad <= len(first) else "\n  ..." if passing else f"\n  ... all {bad} in {folder / 'rejects.jsonl'}"
    if not report["samples"]:
        limit = "none is left to train on"
    elif broken:
        limit = f"{unreadable} of them cannot be read at all; --max_rejects SHARE allows some (for example 0.001)"
    else:
        limit = f"more than --max_rejects {allowed / report['rows']:g} allows"
    raise DataError(f"{bad} of {report['rows']} rows are rejected, {limit}:\n{lines}{more}")


def _build(
    folder: Path,
    files: Sequence[Path],
    forms: Sequence[RowForm],
    kind: Kind,
    tokenizer: Any,
    args: DataArguments,
    say: Callable[[str], None],
    start_method: StartMethod,
) -> None:
    """Write the dataset with the fast engine where it can be trusted, else, or when it is found out, with the other."""
    if args.decontaminate:
        say(f"data: {looked_for(args.decontaminate)}")
    backend = getattr(tokenizer, "backend_tokenizer", None)
    engine = fast_engine(backend, say) if backend is not None else None
    workers = args.preprocessing_num_workers or _workers(files, tokenizer, start_method)
    for chosen in (engine, None):
        encoder = RowEncoder(tokenizer, args, kind, chosen)
        if chosen is engine and encoder.template and "strftime_now" in encoder.template.source:
            say("data: the chat template writes today's date; the same rows give other tokens on another day")
        try:
            with (
                encoding(encoder, workers, start_method) as encode,  # before the bar, which has a thread
                DatasetWriter(folder, files, kind, deduplicate=args.deduplicate) as writer,
                Progress("data", sum(file.stat().st_size for file in files), "read", say) as progress,
            ):
                for chunk in encode(_jobs(files, forms, progress)):
                    writer.add(chunk)
        except EngineDiffers as error:
            say(f"data: {error}: the fast engine differs from tokenizers here; building with tokenizers alone")
        else:
            return


def _jobs(files: Sequence[Path], forms: Sequence[RowForm], progress: Progress) -> Iterator[Job]:
    for number, (file, form) in enumerate(zip(files, forms, strict=True)):
        for chunk in _told(file, progress):
            yield number, chunk, form


def _told(file: Path, progress: Progress) -> Iterator[Chunk]:
    """The chunks of a file, whose progress is told. A table's or archive's is known only when all of it has been read."""
    left = file.stat().st_size
    for chunk in read_chunks(file):
        yield chunk
        if isinstance(chunk.data, bytes) and len(chunk.data) <= left:
            left -= len(chunk.data)
            progress.advance(len(chunk.data))
    progress.advance(left)


def _workers(files: Sequence[Path], tokenizer: Any, start_method: StartMethod) -> int:
    # Code that came with the tokenizer cannot be imported by a fresh process before transformers has fetched it.
    remote = type(tokenizer).__module__.startswith("transformers_modules") and start_method == "spawn"
    return 1 if remote else useful_workers(files)


def useful_workers(files: Sequence[Path]) -> int:
    """How many processes these files are worth: one a core, when they are large."""
    useful = sum(file.stat().st_size for file in files) // _SMALL
    return max(1, min(_MAX_WORKERS, len(os.sched_getaffinity(0)), useful))
