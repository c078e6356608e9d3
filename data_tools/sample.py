"""The rows that a mixture takes of its sources, written to a dated folder: one JSON-lines file a source.

    finebridge data sample mix.yaml --output DIR [--date NAME] [--epoch N] [--deduplicate ...]

No tokenizer is needed: every row that can be read and that the filters leave in is there to choose from. A row that is
taken twice is written twice. The folder, ``DIR/YYYY-MM-DD`` unless ``--date`` names it, appears whole or not at all, and
can be named as training data; ``_report.json`` has the figures of each source, ``_rejects.NAME.jsonl`` the rows left out of it.
"""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from datetime import date
from pathlib import Path
from typing import Any, BinaryIO

from ..storage.manifest import file_sha256, verify
from ..storage.once import mark
from ..storage.publish import publish
from .arguments import DataArguments
from .filters import FILTER_FLAGS, filter_settings
from .flags import add, add_data_flags, command_parser
from .formats import RowForm
from .mixture import Mixture, Source, mixture_file, read_mixture
from .mixture_index import placed, taken
from .preprocess import check_rejects, check_sources, useful_workers
from .readers import SAMPLE_REPORT, read_chunks
from .row_scan import Scanner, rows_at
from .sampling import Ints, rank_order, row_hashes, times_taken
from .schema import DataError

_FLAGS = ("data_format", "map_keys", "handler_name", "max_rejects", "preprocessing_num_workers", *FILTER_FLAGS)


def main(argv: Sequence[str]) -> int:
    """Write the sample and print its folder last; exit code 0. Raises DataError."""
    told = "The rows that a mixture of sources takes, written to a dated folder, which is the last line printed."
    parser = command_parser("sample", "MIXTURE --output DIR [flags]", told)
    parser.add_argument("mixture", metavar="MIXTURE", help="the YAML file")
    add(parser, "--output", "--output_dir", dest="output", required=True, help="where the dated folder goes")
    add(parser, "--date", help="the folder's name (default: today, YYYY-MM-DD)")
    add(parser, "--epoch", type=int, default=0, help="the draw of a later epoch, with reshuffle: true (default: 0)")
    add_data_flags(parser, _FLAGS)
    values = parser.parse_args(argv)
    file = mixture_file(values.mixture)
    if file is None:
        raise DataError(f"{values.mixture}: a mixture is a YAML file")
    args = DataArguments(**{e.name: getattr(values, e.name) for e in fields(DataArguments) if e.name in _FLAGS})
    name = values.date or date.today().isoformat()  # noqa: DTZ011 - the user's own day
    if Path(name).name != name:
        raise DataError(f"--date {name}: a name without folders is expected")
    print(sample(file, args, Path(values.output) / name, values.epoch))
    return 0


def sample(file: Path, args: DataArguments, target: Path, epoch: int = 0, say: Callable[[str], None] = print) -> Path:
    """Write the rows that a mixture takes into ``target``; it is left as it is when it holds this very sample.

    Raises DataError when it holds anything else, and what ``preprocess.prepare`` does for rows that are rejected.
    """
    mixture = read_mixture(file)
    if epoch < 0 or (epoch and not mixture.reshuffle):
        raise DataError(f"--epoch {epoch}: " + ("0 or more" if epoch < 0 else f"{file} has no reshuffle: true"))
    forms: list[RowForm] = []
    for source in mixture.sources:
        with placed(source):
            forms.append(_form(source, args))
    settings = _settings(mixture, args, epoch)
    if target.exists():
        made = verify(target)["made_from"] if (target / SAMPLE_REPORT).is_file() else {}
        if made.get("key") != settings["key"]:
            raise DataError(f"{target}: holds something else than this sample; remove it, or name another with --date")
        say(f"sample: reused {target}")
        return target
    before = _marks(mixture)
    with publish(target, kind="sample", made_from=settings) as folder:
        report = _write(folder, mixture, forms, args, epoch)
        if changed := [str(file) for file, now in _marks(mixture).items() if before[file] != now]:
            raise DataError(f"{changed[0]}: was written to while it was read; start again when it is whole")
        settings["statistics"] = report["sources"]
    for part in report["sources"]:
        rejects = "".join(f", {code} {count:,}" for code, count in part["rejects"].items())
        say(
            f"sample: {part['name']}: {part['taken']:,} rows of {part['eligible']:,} (ratio {part['ratio']:g}){rejects}"
        )
    return target


def _marks(mixture: Mixture) -> dict[Path, list[int]]:
    return {file: mark(file.stat()) for source in mixture.sources for file in source.files()}


def _form(source: Source, args: DataArguments) -> RowForm:
    """How all rows of a source are read. Raises DataError when its files are of several forms, or prepared."""
    if source.prepared:
        raise DataError("a prepared dataset has no rows any more; name the raw files")
    _, forms, _ = check_sources(source.paths, args)
    if any(form != forms[0] for form in forms):
        raise DataError("its files hold rows of several forms; make each form a source of its own")
    return forms[0]


def _settings(mixture: Mixture, args: DataArguments, epoch: int) -> dict[str, Any]:
    """What the sample is made from; ``key`` is a hash of all that shapes it."""
    sources = [
        {
            "name": source.name,
            "ratio": str(source.ratio),
            "max_samples": source.max_samples,
            "files": [file_sha256(path) for path in source.files()],
        }
        for source in mixture.sources
    ]
    settings = {
        "seed": mixture.seed, "epoch": epoch, "sources": sources, "filters": filter_settings(args),
        "form": [args.data_format, args.map_keys, args.handler_name],
    }  # fmt: skip
    return {"key": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16], **settings}


@dataclass(frozen=True, slots=True)
class _Choice:
    """The rows of a source that are there to choose from, and how often each is taken: shape [rows] each."""

    files: Ints
    lines: Ints
    times: Ints


def _write(folder: Path, mixture: Mixture, forms: Sequence[RowForm], args: DataArguments, epoch: int) -> dict[str, Any]:
    """Write rows, rejects and report; the report."""
    reports: list[dict[str, Any]] = []
    workers = args.preprocessing_num_workers or useful_workers(
        [f for source in mixture.sources for f in source.files()]
    )
    with Scanner(args, workers) as scanner:
        for source, form in zip(mixture.sources, forms, strict=True):
            listed = folder / f"_rejects.{source.name}.jsonl"
            rows = scanner.scan(source.files(), form, listed)
            report = {"name": source.name, "category": source.category, "files": [str(f) for f in source.files()]}
            report |= {"rows": rows.count, "samples": len(rows.lines), "rejects": dict(rows.rejects.most_common())}
            with placed(source):
                check_rejects(report, folder, args.max_rejects, listed)
            count = taken(source, len(rows.lines))
            order = rank_order(row_hashes(mixture.seed, source.name, rows.files, rows.lines))
            choice = _Choice(rows.files, rows.lines, times_taken(order, count, epoch))
            with (folder / f"{source.name}.jsonl").open("wb") as stream:
                _copy(source, choice, stream)
            limits = {"ratio": float(source.ratio), "max_samples": source.max_samples}
            reports.append({**report, **limits, "eligible": len(rows.lines), "taken": count})
    result = {"mixture": str(mixture.file), "seed": mixture.seed, "epoch": epoch, "sources": reports}
    (folder / SAMPLE_REPORT).write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return result


def _copy(source: Source, choice: _Choice, stream: BinaryIO) -> None:
    """Write the rows that are taken, in the order of the files."""
    used = choice.times > 0
    files, lines, times = choice.files[used], choice.lines[used], choice.times[used]
    for number, file in enumerate(source.files()):
        own = files == number
        wanted = dict(zip(lines[own].tolist(), times[own].tolist(), strict=True))
        for chunk in read_chunks(file):
            stream.writelines(rows_at(chunk, wanted))
