"""What the file layouts of ``layouts.py`` have in common: options, checks, and files that appear whole."""

import shutil
from abc import ABC, abstractmethod
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from ..storage.publish import fsync_path, stage
from .blocks import Block, PackIndex, PreparedSource
from .indexed import IndexedReader, Numbers
from .schema import DataError, Kind, TokenizedSample

_MAX_ID = 2**31 - 1

Pack = Literal["none", "pack", "neat"]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True, kw_only=True)
class LayoutOptions:
    """What a layout must be told beside the samples; which of it is needed depends on the layout.

    ``seq_length`` is the capacity of an item in tokens, ``pad_id`` fills it up. ``pack`` says how MindSpeed's
    attention mask marks the samples of one item: not at all (``pack``) or by number (``neat``). ``packs`` says which
    samples share an item; else each has one of its own. ``pairs``: samples are chosen and rejected answers by turns.
    ``over_long`` is for samples that fit into no item. ``json_key`` is a part of the file names of some layouts; None
    stands for what is usual there. ``replace`` permits to write over files that stand.
    """

    seq_length: int | None = None
    pad_id: int | None = None
    vocab_size: int | None = None
    pack: Pack = "none"
    packs: PackIndex | None = None
    pairs: bool = False
    over_long: Literal["error", "drop"] = "error"
    json_key: str | None = None
    replace: bool = False


@dataclass(frozen=True, slots=True)
class Exported:
    """What an export wrote: files, items (sequences), and which samples are in them, bool, shape [samples]."""

    files: tuple[Path, ...]
    items: int
    used: Flags


class Layout(ABC):
    """One system's files under a prefix."""

    name = ""
    kind: Kind = "chat"  # what samples that are no pairs are taken for when they are read
    unused: tuple[str, ...] = ()  # options that mean nothing here
    takes_pairs = False
    takes_packs = False

    def export(self, source: Path, prefix: Path, *, options: LayoutOptions) -> Exported:
        """Write the prepared dataset ``source`` as files that begin with ``prefix``.

        Raises DataError when an option is missing or meaningless, a sample does not fit, or a file stands already and
        ``options.replace`` is false.
        """
        self.check(options, writing=True)
        data = PreparedSource(source)
        used = self.choose(data, options)
        endings = self.endings(options)
        with whole_files(prefix, endings, replace=options.replace) as stem:
            items = self.write(data, used, stem, options)
        return Exported(tuple(Path(f"{prefix}{ending}") for ending in endings), items, used)

    def load(self, prefix: Path, *, options: LayoutOptions) -> Iterator[TokenizedSample]:
        """Every sample of the files under ``prefix``. Raises DataError naming file and sequence at the first fault."""
        for block in self.blocks(prefix, options=options):
            yield from block.samples()

    def blocks(self, prefix: Path, *, options: LayoutOptions) -> Iterator[Block]:
        """Like ``load``, many samples at once; ``Block.numbers`` are the sequences that they lie in."""
        self.check(options, writing=False)
        for ending in self.endings(options):
            if not Path(f"{prefix}{ending}").is_file():
                raise DataError(f"{prefix}{ending}: no such file; the prefix is the part of a name before {ending}")
        return self.read(prefix, options)

    def check(self, options: LayoutOptions, *, writing: bool) -> None:
        """Raises DataError for options that are missing, or that this layout has no place for."""
        for option in self.needs(options, writing=writing):
            if getattr(options, option) is None:
                raise DataError(f"layout {self.name}: --{option} is needed")
        for option in self.unused:
            if getattr(options, option) is not None:
                raise DataError(f"layout {self.name}: --{option} means nothing here")
        for option in ("seq_length", "vocab_size"):
            if (value := getattr(options, option)) is not None and not 1 <= value <= _MAX_ID:
                raise DataError(f"--{option} {value}: a positive number is expected")
        if options.pad_id is not None and not 0 <= options.pad_id < (options.vocab_size or _MAX_ID):
            raise DataError(f"--pad_id {options.pad_id}: it is no token id")
        if options.json_key is not None and (not options.json_key or "/" in options.json_key):
            raise DataError(f"--json_key {options.json_key}: it cannot be a part of a file's name")
        if options.pairs and not self.takes_pairs:
            raise DataError(f"layout {self.name}: it has no form for preference pairs")
        if (options.packs is not None or options.pack != "none") and (options.pairs or not self.takes_packs):
            raise DataError(f"layout {self.name}: {'pairs are' if options.pairs else 'its items are'} never packed")

    def choose(self, source: PreparedSource, options: LayoutOptions) -> Flags:
        """Which samples are written, shape [samples]. Raises DataError for one that does not fit, or a wrong pack."""
        longest = self.longest(options)
        if options.pairs and len(source) % 2:
            raise DataError(f"{source.folder}: {len(source)} samples are no pairs of chosen and rejected")
        if options.packs is not None:
            source.check_packs(options.packs, longest)
            used = np.zeros(len(source), dtype=bool)
            used[options.packs.samples] = True
            return used
        used = np.ones(len(source), dtype=bool) if longest is None else source.lengths <= longest
        if options.pairs:
            used = np.repeat(used.reshape(-1, 2).all(axis=1), 2)
        if options.over_long == "error" and not used.all():
            first = int((source.lengths > (longest or 0)).argmax())
            raise DataError(
                f"{source.folder}: samples of more than {longest} tokens do not fit, the first is that of "
                f"{source.origin(first)} ({source.lengths[first]} tokens); raise --seq_length or choose --over_long drop"
            )
        return used

    @abstractmethod
    def needs(self, options: LayoutOptions, *, writing: bool) -> tuple[str, ...]:
        """The options without which nothing can be written, or read."""

    def longest(self, options: LayoutOptions) -> int | None:
        """Tokens that fit into one item; None when there is no limit."""
        return options.seq_length

    @abstractmethod
    def endings(self, options: LayoutOptions) -> tuple[str, ...]:
        """What follows the prefix in the name of each file, indices last."""

    @abstractmethod
    def write(self, source: PreparedSource, used: Flags, stem: Path, options: LayoutOptions) -> int:
        """Write the files under ``stem``; the number of items."""

    @abstractmethod
    def read(self, prefix: Path, options: LayoutOptions) -> Iterator[Block]:
        """Read and check the files under ``prefix``, which are there."""


@contextmanager
def whole_files(prefix: Path, endings: Sequence[str], *, replace: bool) -> Generator[Path]:
    """Yield a stem in a temporary folder; what was written under it appears under ``prefix`` when the block ends.

    ``endings`` name the files, indices last. With ``replace`` the old indices go first, so that a reader never finds an
    index with the tokens of another export. Raises DataError when a file stands and ``replace`` is false.
    """
    targets = [Path(f"{prefix}{ending}") for ending in endings]
    standing = [target for target in targets if target.exists()]
    if standing and not replace:
        raise DataError(f"{standing[0]} exists already; give --replace or another prefix")
    staging = stage(prefix)
    try:
        yield staging / prefix.name
        written = [Path(f"{staging / prefix.name}{ending}") for ending in endings]
        for path in written:
            fsync_path(path)
        for target in standing:
            if target.suffix == ".idx":
                target.unlink()
        for path, target in zip(written, targets, strict=True):
            path.rename(target)
        fsync_path(prefix.absolute().parent)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


def refuse(bad: Flags, file: Path, numbers: Numbers, lengths: Numbers, what: str) -> None:
    """Raises DataError naming file, sequence and token when ``bad``, shape [sum of ``lengths``], holds anywhere."""
    if bad.any():
        item, token = _first(bad, lengths)
        raise DataError(f"{file}: sequence {numbers[item]}, token {token}: {what}")


def read_ids(reader: IndexedReader, numbers: Numbers, vocab_size: int | None) -> npt.NDArray[np.int32]:
    """The ids of these sequences back to back. Raises DataError for a value that is no id of the vocabulary."""
    values = reader.gather(numbers)
    if not np.issubdtype(values.dtype, np.integer):
        raise DataError(f"{reader.data}: {reader.dtype} values are no token ids")
    bad = (values < 0) | (values > _MAX_ID if vocab_size is None else values >= vocab_size)
    limit = "" if vocab_size is None else f" of a vocabulary of {vocab_size}"
    refuse(bad, reader.data, numbers, reader.lengths[numbers].astype(np.int64), f"the value is no token id{limit}")
    return values.astype(np.int32)


def check_vocabulary(block: Block, source: PreparedSource, vocab_size: int | None) -> None:
    """Raises DataError when a sample of the block, which is of ``source``, has an id beyond the vocabulary."""
    bad = block.ids < 0
    if vocab_size is not None:
        bad |= block.ids >= vocab_size
    if bad.any():
        item, token = _first(bad, block.lengths)
        what = "negative" if block.ids[bad.argmax()] < 0 else f"beyond --vocab_size {vocab_size}"
        raise DataError(
            f"{source.folder}: the sample of {source.origin(int(block.numbers[item]))}, token {token}: its id is {what}"
        )


def _first(bad: Flags, lengths: Numbers) -> tuple[int, int]:
    """Where the first true value is: which of the stretches of these lengths, and which place in it."""
    place = int(bad.argmax())
    ends = np.cumsum(lengths)
    item = int(np.searchsorted(ends, place, side="right"))
    return item, place - int(ends[item] - lengths[item])


def padded(values: npt.NDArray[Any], totals: Numbers, width: int, fill: int) -> npt.NDArray[np.int32]:
    """``values``, the items back to back, as rows filled up at the right: int32, shape [items, ``width``]."""
    rows = np.full((len(totals), width), fill, dtype=np.int32)
    rows[np.arange(width) < totals[:, np.newaxis]] = values
    return rows
