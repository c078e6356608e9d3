"""A mixture: many sources, each with the share that is taken of it, read from a YAML file.

    seed: 7                          # another seed takes other rows; default 0
    reshuffle: true                  # each epoch goes on to other rows of a source; default false: the same rows
    categories:                      # defaults of the sources that name them
      math: {ratio: 0.3, max_samples: 20000}
    sources:
      gsm:                           # the name, a part of the choice: a source that is renamed takes other rows
        path: data/gsm.jsonl         # a file, folder, glob or prepared dataset, or a list; relative to the YAML file
        category: math
        ratio: 2.5                   # 0.3 keeps 30 %, 2.5 takes each row twice and half of them once more; default 1
        max_samples: 5000            # at most so many, repeats counted

A ratio is read as the decimal number or fraction (1/3) that is written, not as the nearest double. A ratio of 0 leaves
the source out. ``sampling.py`` says which rows are taken.
"""

import difflib
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import cast

import yaml

from .prepared import is_prepared
from .readers import HUB, files_of, resolve_files
from .schema import DataError

_SEEDS = 1 << 63
_NAME = re.compile(r"\w[\w.-]*")  # data sample names files after it
_TOP = ("seed", "reshuffle", "categories", "sources")
_DEFAULTS = ("ratio", "max_samples")
_SOURCE = ("path", "category", *_DEFAULTS)
_ENDINGS = (".yaml", ".yml")


@dataclass(frozen=True, slots=True)
class Source:
    """One source of a mixture.

    ``paths`` are the files that it names, or one prepared dataset, as ``preprocess.plan`` takes them; ``where`` is the
    file:line that names the source.
    """

    name: str
    paths: tuple[str, ...]
    ratio: Fraction
    max_samples: int | None
    category: str | None
    where: str

    def files(self) -> list[Path]:
        """The files that hold the source's rows, in the order that numbers them."""
        return [file for path in self.paths for file in files_of(Path(path))]

    @property
    def prepared(self) -> bool:
        """Whether the source is a prepared dataset."""
        return is_prepared(Path(self.paths[0]))


@dataclass(frozen=True, slots=True)
class Mixture:
    """What the YAML file says; sources with a ratio of 0 are not among ``sources``."""

    file: Path
    seed: int
    reshuffle: bool
    sources: tuple[Source, ...]


def mixture_file(name: str) -> Path | None:
    """The mixture that a name of ``--train_data_file`` means, None for data. Raises DataError when it is not there."""
    if not name.endswith(_ENDINGS):
        return None
    if not Path(name).is_file():
        raise DataError(f"{name}: no such file; a mixture of sources is a YAML file")
    return Path(name)


def read_mixture(file: Path) -> Mixture:
    """The mixture in a YAML file, whose paths are there. Raises DataError with file and line."""
    try:
        node = yaml.compose(file.read_text(encoding="utf-8"), Loader=yaml.SafeLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"{file}: {getattr(error, 'strerror', None) or f'not UTF-8: {error}'}") from None
    except yaml.YAMLError as error:
        raise DataError(f"{file}:{_line_of(error)}: not YAML: {' '.join(str(error).split())}") from None
    read = _Reader(file)
    top = read.mapping(node, "a mixture", _TOP)
    if "sources" not in top:
        raise DataError(f"{file}:1: no sources; a mixture names them under 'sources:'")
    seed = read.whole(top["seed"], "seed", 0) if "seed" in top else 0
    if seed >= _SEEDS:
        raise DataError(f"{read.at(top['seed'])}: seed {seed}: at most 2**63 - 1")
    reshuffle = read.truth(top["reshuffle"], "reshuffle") if "reshuffle" in top else False
    categories = read.categories(top.get("categories"))
    sources = tuple(read.source(name, value, categories) for name, value in read.named(top["sources"], "sources"))
    if not sources:
        raise DataError(f"{read.at(top['sources'])}: sources: none is named")
    _check_apart(sources)
    taken = tuple(source for source in sources if source.ratio)
    if not taken:
        raise DataError(f"{read.at(top['sources'])}: every source has the ratio 0, so nothing is taken")
    return Mixture(file, seed, reshuffle, taken)


class _Reader:
    """Nodes of the YAML file to values; each error names the line."""

    def __init__(self, file: Path) -> None:
        self.file = file

    def at(self, node: yaml.Node) -> str:
        return f"{self.file}:{node.start_mark.line + 1}"

    def named(self, node: yaml.Node, what: str) -> Iterator[tuple[yaml.ScalarNode, yaml.Node]]:
        """The names of a mapping, each once, and what stands under them."""
        if not isinstance(node, yaml.MappingNode):
            raise DataError(f"{self.at(node)}: {what}: names with a colon are expected (name: ...)")
        lines: dict[str, int] = {}
        for key, value in cast("list[tuple[yaml.Node, yaml.Node]]", node.value):
            if not isinstance(key, yaml.ScalarNode) or not key.value:
                raise DataError(f"{self.at(key)}: {what}: a name is expected")
            if key.value in lines:
                raise DataError(f"{self.at(key)}: {key.value!r} stands in line {lines[key.value]} already")
            lines[key.value] = key.start_mark.line + 1
            yield key, value

    def mapping(self, node: yaml.Node | None, what: str, known: Collection[str]) -> dict[str, yaml.Node]:
        if node is None:
            raise DataError(f"{self.file}:1: the file is empty; a mixture names its sources under 'sources:'")
        found: dict[str, yaml.Node] = {}
        for key, value in self.named(node, what):
            if key.value not in known:
                raise DataError(f"{self.at(key)}: unknown key {key.value!r}{_nearest(key.value, known)}")
            found[key.value] = value
        return found

    def categories(self, node: yaml.Node | None) -> dict[str, Mapping[str, yaml.Node]]:
        if node is None:
            return {}
        return {
            key.value: {"ratio": value}
            if isinstance(value, yaml.ScalarNode)
            else self.mapping(value, key.value, _DEFAULTS)
            for key, value in self.named(node, "categories")
        }

    def source(
        self, key: yaml.ScalarNode, node: yaml.Node, categories: Mapping[str, Mapping[str, yaml.Node]]
    ) -> Source:
        where, own = self.at(key), self.mapping(node, key.value, _SOURCE)
        if not _NAME.fullmatch(key.value):
            raise DataError(
                f"{where}: {key.value!r}: a name has letters, digits, . _ and -, and a letter or digit first"
            )
        if "path" not in own:
            raise DataError(f"{where}: the source {key.value!r} has no path")
        category = self.text(own["category"], "category") if "category" in own else None
        if category is not None and category not in categories:
            told = _nearest(category, categories) or f" (known: {', '.join(categories) or 'none'})"
            raise DataError(f"{self.at(own['category'])}: no category {category!r}{told}")
        values = {**(categories[category] if category else {}), **own}
        ratio = self.ratio(values["ratio"]) if "ratio" in values else Fraction(1)
        limit = self.whole(values["max_samples"], "max_samples", 1) if "max_samples" in values else None
        return Source(key.value, self.paths(own["path"]), ratio, limit, category, where)

    def text(self, node: yaml.Node, what: str) -> str:
        if not isinstance(node, yaml.ScalarNode) or not node.value:
            raise DataError(f"{self.at(node)}: {what}: a text is expected")
        return node.value

    def ratio(self, node: yaml.Node) -> Fraction:
        try:
            value = Fraction(self.text(node, "ratio"))
        except (ValueError, ZeroDivisionError):
            value = Fraction(-1)
        if value < 0:
            given = self.text(node, "ratio")
            raise DataError(f"{self.at(node)}: ratio {given}: a number from 0 on is expected (0.3 keeps 30 %)")
        return value

    def whole(self, node: yaml.Node, what: str, least: int) -> int:
        given = self.text(node, what)
        if not given.isdecimal() or int(given) < least:
            raise DataError(f"{self.at(node)}: {what} {given}: a whole number from {least} on is expected")
        return int(given)

    def truth(self, node: yaml.Node, what: str) -> bool:
        given = self.text(node, what)
        if given not in ("true", "false"):
            raise DataError(f"{self.at(node)}: {what} {given}: true or false is expected")
        return given == "true"

    def paths(self, node: yaml.Node) -> tuple[str, ...]:
        """The files of a source, all there, or its prepared dataset."""
        parts = cast("list[yaml.Node]", node.value) if isinstance(node, yaml.SequenceNode) else [node]
        found: list[str] = []
        for part in parts:
            name = self.text(part, "path")
            path = name if name.startswith(HUB) else str(self.file.parent / name)
            if is_prepared(Path(path)):
                found.append(path)
                continue
            try:
                found += [str(file) for file in resolve_files([path])]
            except DataError as error:
                listed = "; several paths are a list: [a.jsonl, b.jsonl]" if "," in name else ""
                raise DataError(f"{self.at(part)}: {error}{listed}") from None
        if len(found) > 1 and any(is_prepared(Path(path)) for path in found):
            raise DataError(f"{self.at(node)}: a prepared dataset is a source of its own; give each its name")
        if not found:
            raise DataError(f"{self.at(node)}: path: none is named")
        return tuple(found)


def _check_apart(sources: Collection[Source]) -> None:
    """Raises DataError when a file belongs to two sources, or twice to one: its rows would count twice."""
    owners: dict[Path, Source] = {}
    for source in sources:
        for file in [Path(source.paths[0])] if source.prepared else source.files():
            before = owners.get(file.resolve())
            if before:
                raise DataError(
                    f"{source.where}: {file} belongs to the source {before.name!r} ({before.where}) already; "
                    "a ratio over 1 repeats rows"
                )
            owners[file.resolve()] = source


def _nearest(name: str, known: Collection[str]) -> str:
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {near[0]!r}?" if near else ""


def _line_of(error: yaml.YAMLError) -> int:
    mark = getattr(error, "problem_mark", None)
    return mark.line + 1 if mark else 1
