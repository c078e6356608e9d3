"""A mixture's sources to prepared datasets, and these to an index: which samples there are to choose from, in what order.

Each source is prepared by itself, so that another source, ratio or seed tokenises nothing anew. The index is a folder of
its own: ``ranked.npy`` (int64: of each source the numbers of its samples in rank order, see ``sampling.py``, one source
after the other), ``report.json`` (figures of each source), ``rejects.jsonl`` (with ``--deduplicate``: rows that an
earlier source has too) and ``manifest.json``. No token is copied.
"""

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ..storage.hashing import file_digest
from ..storage.manifest import MANIFEST_NAME, read
from ..storage.once import build_once
from .arguments import DataArguments
from .duplicates import Seen, split_places
from .mixture import Mixture, Source, read_mixture
from .preprocess import Preparation, check_sources, plan, prepare
from .sampling import Ints, amount, rank_order, row_hashes
from .schema import DataError, Kind
from .tokenizer_files import TokenizerSource
from .workers import StartMethod
from .writer import DIGESTS_NAME

FORMAT = 1  # raise when the same sources would give another order
_TOTALS = ("rows", "samples", "tokens", "loss_tokens", "neutralised", "shortened")
_SHOWN = 3

Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class MixturePlan:
    """What is to be made of a mixture: a prepared dataset a source, and the index in ``target``, under a hash of all."""

    mixture: Mixture
    target: Path
    parts: Sequence[Preparation]
    settings: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class MixtureFolders:
    """A mixture that is made: its index and the prepared dataset of each source."""

    mixture: Mixture
    index: Path
    parts: Sequence[Path]


def check_mixture(file: Path, args: DataArguments, wanted: Kind | None = None) -> None:
    """What can be told of a mixture before torch is imported. Raises DataError."""
    for source in read_mixture(file).sources:
        if not source.prepared:
            with placed(source):
                check_sources(source.paths, args, wanted)


def plan_mixture(
    file: Path,
    tokenizer: TokenizerSource,
    args: DataArguments,
    cache: Path,
    say: Say = print,
    wanted: Kind | None = None,
) -> MixturePlan:
    """What ``prepare_mixture`` would do. Reads the files for their hashes, once. Raises DataError, ManifestError."""
    mixture = read_mixture(file)
    parts: list[Preparation] = []
    for source in mixture.sources:
        with placed(source):
            parts.append(plan(source.paths, tokenizer, args, cache, naming(source, say), wanted))
    for source, part in zip(mixture.sources, parts, strict=True):
        if part.kind != parts[0].kind:
            raise DataError(
                f"{source.where}: its rows are of another kind ({part.kind}) than those of "
                f"{mixture.sources[0].name!r} ({parts[0].kind})"
            )
    settings = {
        "mixture_format": FORMAT,
        "seed": mixture.seed,
        "reshuffle": mixture.reshuffle,
        "deduplicate": args.deduplicate,
        "sources": [
            {"name": s.name, "ratio": str(s.ratio), "max_samples": s.max_samples, "data": _key(p)}
            for s, p in zip(mixture.sources, parts, strict=True)
        ],
    }
    key = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:16]
    return MixturePlan(mixture, cache / key, parts, settings)


def prepare_mixture(
    file: Path,
    tokenizer: TokenizerSource,
    args: DataArguments,
    cache: Path,
    say: Say = print,
    start_method: StartMethod = "spawn",
    wanted: Kind | None = None,
) -> MixtureFolders:
    """The prepared datasets of a mixture's sources and its index, built where they do not stand yet.

    Safe to call from many processes at once. Raises what ``preprocess.prepare`` does, and DataError when a source that is
    asked for has no sample to give.
    """
    planned = plan_mixture(file, tokenizer, args, cache, say, wanted)
    mixture = planned.mixture
    folders: list[Path] = []
    for source in mixture.sources:
        with placed(source):
            told = naming(source, say)
            folders.append(prepare(source.paths, tokenizer, args, cache, told, start_method, wanted))
    _check_templates(mixture, folders)

    def build(folder: Path, _tell: Say) -> Mapping[str, Any]:
        report = _build(folder, mixture, folders, args)
        files = {str(file.absolute()): known for part in planned.parts for file, known in part.hashes.items()}
        return {**planned.settings, "statistics": report["sources"], "files": files}

    built = build_once(planned.target, build, kind="mixture", say=say)
    report = json.loads((planned.target / "report.json").read_text(encoding="utf-8"))
    say(
        f"data: mixture of {len(folders)} sources, {report['samples']:,} samples; "
        f"{'prepared' if built else 'reused'} {planned.target}"
    )
    for line in source_lines(report):
        say(f"data: {line}")
    return MixtureFolders(mixture, planned.target, folders)


def source_lines(report: Mapping[str, Any]) -> list[str]:
    """A line for each source of a mixture's report: what there is, what is taken, what was left out."""
    lines: list[str] = []
    for part in report["sources"]:
        limit = f", at most {part['max_samples']:,}" if part["max_samples"] else ""
        line = f"{part['name']}: {part['taken']:,} of {part['eligible']:,} samples (ratio {part['ratio']:g}{limit})"
        line += f", {part['tokens']:,} tokens in {part['samples']:,} prepared"
        if part["rejects"]:
            line += ", rejected: " + ", ".join(f"{code} {count:,}" for code, count in part["rejects"].items())
        lines.append(line)
    return lines


def first_duplicates(index: Path) -> list[str]:
    """The first rows of a mixture that an earlier source has too, as file:line and what it is the same as."""
    with (index / "rejects.jsonl").open(encoding="utf-8") as stream:
        rows = [json.loads(line) for line in islice(stream, _SHOWN)]
    return [f"{row['file']}:{row['line']}: {row['detail']}" for row in rows]


@contextmanager
def placed(source: Source) -> Generator[None]:
    """A DataError of the work on one source names the line of the YAML file, too."""
    try:
        yield
    except DataError as error:
        raise DataError(f"{source.where}: {source.name}: {error}") from None


def naming(source: Source, say: Say) -> Say:
    """``say`` for lines on one source, which name it."""
    return lambda line: say(line.replace("data: ", f"data: {source.name}: ", 1))


def _key(part: Preparation) -> str:
    return file_digest(part.target / MANIFEST_NAME) if part.named else part.target.name


def _check_templates(mixture: Mixture, folders: Sequence[Path]) -> None:
    """Raises DataError when prepared datasets were made with different chat templates."""
    templates = [read(folder)["made_from"].get("chat_template") for folder in folders]
    for source, template in zip(mixture.sources, templates, strict=True):
        if template != templates[0]:
            first = mixture.sources[0].name
            raise DataError(f"{source.where}: {source.name} was made with another chat template than {first!r}")


def _build(folder: Path, mixture: Mixture, parts: Sequence[Path], args: DataArguments) -> dict[str, Any]:
    """Write the index; its report."""
    reports = [json.loads((part / "report.json").read_text(encoding="utf-8")) for part in parts]
    rows: list[Ints] = [np.load(part / "rows.npy", allow_pickle=False) for part in parts]
    eligible = [np.ones(len(places), np.bool_) for places in rows]
    listed: list[dict[str, Any]] = []
    if args.deduplicate:
        eligible, listed = _new_in_each(mixture, parts, reports, rows)
    ranked: list[Ints] = []
    for source, places, kept in zip(mixture.sources, rows, eligible, strict=True):
        numbers = np.flatnonzero(kept)
        hashes = row_hashes(mixture.seed, source.name, places[numbers, 0], places[numbers, 1])
        ranked.append(numbers[rank_order(hashes)])
    np.save(folder / "ranked.npy", np.concatenate(ranked), allow_pickle=False)
    lines = "".join(json.dumps(entry, ensure_ascii=False) + "\n" for entry in listed)
    (folder / "rejects.jsonl").write_text(lines, encoding="utf-8")
    again = Counter(entry["source"] for entry in listed)
    report = _report(mixture, parts, reports, [len(order) for order in ranked], again)
    (folder / "report.json").write_text(json.dumps(report, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    return report


def _report(
    mixture: Mixture,
    parts: Sequence[Path],
    reports: Sequence[Mapping[str, Any]],
    eligible: Sequence[int],
    again: Mapping[str, int],
) -> dict[str, Any]:
    """Figures of each source and of all; ``again`` counts the rows of a source that an earlier one has."""
    sources: list[dict[str, Any]] = []
    for source, part, found, count in zip(mixture.sources, parts, reports, eligible, strict=True):
        rejects = Counter(found["rejects"]) + Counter({"duplicate": again.get(source.name, 0)})
        sources.append(
            {
                "name": source.name,
                "category": source.category,
                "ratio": float(source.ratio),
                "max_samples": source.max_samples,
                "folder": str(part),
                "files": found["files"],
                **{name: found.get(name, 0) for name in _TOTALS},
                "rejects": dict(rejects),
                "eligible": count,
                "taken": taken(source, count),
            }
        )
    return {
        "kind": reports[0]["kind"],
        **{name: sum(part[name] for part in sources) for name in _TOTALS},
        "rejects": dict(sum((Counter(part["rejects"]) for part in sources), Counter[str]())),
        "files": [file for part in sources for file in part["files"]],
        "sources": sources,
    }


def taken(source: Source, rows: int) -> int:
    """How many of a source's ``rows`` are taken. Raises DataError when that is none."""
    count = amount(source.ratio, source.max_samples, rows)
    if not count:
        raise DataError(
            f"{source.where}: {source.name}: ratio {float(source.ratio):g} of {rows:,} rows is none; raise it, or leave the "
            "source out (ratio: 0)"
        )
    return count


def _new_in_each(
    mixture: Mixture, parts: Sequence[Path], reports: Sequence[Mapping[str, Any]], rows: Sequence[Ints]
) -> tuple[list[npt.NDArray[np.bool_]], list[dict[str, Any]]]:
    """For each source which of its samples no earlier source has, and an entry for each row that one has.

    What of the earlier source is taken does not matter: so a ratio changes no other source's rows.
    """
    seen, eligible, listed = Seen(), list[npt.NDArray[np.bool_]](), list[dict[str, Any]]()
    for number, (source, part) in enumerate(zip(mixture.sources, parts, strict=True)):
        places = rows[number]
        hashes = np.fromfile(part / DIGESTS_NAME, "<u8").reshape(-1, 2)
        owners, samples = split_places(seen.add(hashes, np.full(len(places), number), np.arange(len(places))))
        again = (owners >= 0) & (owners != number)  # the samples of one row share a hash
        eligible.append(~again)
        for file, line, owner, sample in {
            (*places[i].tolist(), int(owners[i]), int(samples[i])): None for i in np.flatnonzero(again).tolist()
        }:
            first_file, first_line = rows[owner][sample].tolist()
            detail = f"the same as {reports[owner]['files'][first_file]}:{first_line}"
            name = reports[number]["files"][file]
            listed.append({"source": source.name, "file": name, "line": line, "code": "duplicate", "detail": detail})
    return eligible, listed
