"""A mixture as training reads it: sample numbers of one dataset, whose tokens stay in those of its sources.

An epoch has the same number of samples each time. Sample ``number`` of it belongs to epoch ``number // len`` where each
epoch draws anew (``reshuffle``), so that a loader's worker needs to know nothing but the number.
"""

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np

from ..storage.manifest import read
from .arguments import DataArguments, OverLong
from .dataset import Item, PackedDataset, PreparedDataset
from .mixture import mixture_file
from .mixture_index import MixtureFolders, naming, placed, prepare_mixture, taken
from .packing import Packs, pack
from .preprocess import prepare
from .sampling import Ints, ranks_taken, spread
from .tokenizer_files import TokenizerSource

Say = Callable[[str], None]


class MixtureDataset:
    """The samples that a mixture takes of its sources, in the sources' order; a ``Samples``.

    Of each source the samples that ``PreparedDataset`` keeps are there to choose from: so counts are exact for what is
    trained. ``lengths`` are those of the first epoch. Raises DataError, naming the YAML file's line, when a source has none.
    """

    def __init__(
        self, folders: MixtureFolders, max_length: int, over_long: OverLong = "drop", say: Say = print
    ) -> None:
        self.folder, self.mixture = folders.index, folders.mixture
        self.reshuffle = folders.mixture.reshuffle
        report = json.loads((folders.index / "report.json").read_text(encoding="utf-8"))
        bounds = spread([part["eligible"] for part in report["sources"]])
        ranked: Ints = np.load(folders.index / "ranked.npy", mmap_mode="r", allow_pickle=False)
        self._parts: list[PreparedDataset] = []
        self._orders: list[Ints] = []  # of each source, its dataset's samples in rank order
        self._counts: list[int] = []
        for number, (source, folder) in enumerate(zip(folders.mixture.sources, folders.parts, strict=True)):
            with placed(source):
                part = PreparedDataset(folder, max_length, over_long, naming(source, say))
            place = np.full(part.prepared, -1, np.int64)
            place[part.numbers] = np.arange(len(part))
            order = place[ranked[bounds[number] : bounds[number + 1]]]
            order = order[order >= 0]
            self._parts.append(part)
            self._orders.append(order)
            self._counts.append(taken(source, len(order)))
        self._bounds = spread(self._counts)
        self.lengths = self.lengths_of(0)
        self.key = self._key()
        self.terminators = sorted({token for part in self._parts for token in part.terminators})
        self.over_long_rows = [row for part in self._parts for row in part.over_long_rows]
        self._tell(say)

    def __len__(self) -> int:
        return int(self._bounds[-1])

    def __getitem__(self, index: int) -> Item:
        part, own = self._place(index)
        return part[own]

    def name_of(self, index: int) -> str:
        """File and line of a sample."""
        part, own = self._place(index)
        return part.name_of(own)

    def cost_of(self, epoch: int) -> Ints:
        """What every sample of an epoch costs: its tokens."""
        return self.lengths_of(epoch)

    def lengths_of(self, epoch: int) -> Ints:
        """Tokens of every sample of an epoch, int64, shape [samples]."""
        parts = zip(self._parts, self._orders, self._counts, strict=True)
        drawn = epoch if self.reshuffle else 0
        return np.concatenate([part.lengths[order[ranks_taken(len(order), n, drawn)]] for part, order, n in parts])

    def _place(self, number: int) -> tuple[PreparedDataset, int]:
        """The dataset of a sample's source, and its number there."""
        epoch, number = divmod(number, len(self)) if self.reshuffle else (0, number)
        if not 0 <= number < len(self):
            raise IndexError(number)
        source = int(np.searchsorted(self._bounds, number, side="right")) - 1
        order, count = self._orders[source], self._counts[source]
        rank, more = number - int(self._bounds[source]), count % len(order)
        if rank >= count - more:  # as ``sampling.ranks_taken``
            rank = rank - (count - more) + epoch * more
        return self._parts[source], int(order[rank % len(order)])

    def _key(self) -> str:
        """A hash of the tokens and of what is taken of them."""
        taken_of = [
            (part.key, hashlib.sha256(order.astype("<i8").tobytes()).hexdigest(), count)
            for part, order, count in zip(self._parts, self._orders, self._counts, strict=True)
        ]
        return hashlib.sha256(json.dumps([self.reshuffle, taken_of]).encode()).hexdigest()[:16]

    def _tell(self, say: Say) -> None:
        total = int(self.lengths.sum())
        for source, order, count, begin, end in zip(
            self.mixture.sources, self._orders, self._counts, self._bounds[:-1], self._bounds[1:], strict=True
        ):
            tokens = int(self.lengths[begin:end].sum())
            say(
                f"mixture: {source.name}: {count:,} of {len(order):,} samples, {tokens:,} tokens ({tokens / total:.1%})"
            )


class RepackedDataset(PackedDataset):
    """Packs of a mixture that draws anew: other samples, so other packs, in each of ``epochs`` epochs.

    All epochs have as many packs as the one that needs most; in the others the packs of most samples are cut in two.
    """

    reshuffle = True

    def __init__(self, data: MixtureDataset, capacity: int, seed: int, epochs: int) -> None:
        drawn = [pack(data.lengths_of(epoch), capacity, seed) for epoch in range(epochs)]
        most = max(len(packs) for packs in drawn)
        self._drawn = [in_packs(packs, most) for packs in drawn]
        self._samples = data
        super().__init__(data, self._drawn[0])

    def __getitem__(self, index: int) -> Item:
        return self.joined(self._numbers(index))

    def name_of(self, index: int) -> str:
        """Files and lines of a pack's first samples."""
        return self.names(self._numbers(index))

    def lengths_of(self, epoch: int) -> Ints:
        """Tokens of every pack of an epoch, int64, shape [packs]."""
        return self._drawn[epoch].tokens(self._samples.lengths_of(epoch))

    def cost_of(self, epoch: int) -> Ints:
        """What the attention of every pack of an epoch costs; see ``Packs.cost``."""
        return self._drawn[epoch].cost(self._samples.lengths_of(epoch))

    def _numbers(self, index: int) -> Ints:
        epoch, number = divmod(index, len(self.packs))
        return self._drawn[epoch][number] + epoch * len(self._samples)


def in_packs(packs: Packs, count: int) -> Packs:
    """The same samples in ``count`` packs, at most one a sample: those of most samples are cut in two, the first ones first."""
    offsets = packs.offsets
    while len(offsets) <= count:
        sizes = np.diff(offsets)
        most = np.argsort(-sizes, kind="stable")[: count + 1 - len(offsets)]
        most = most[sizes[most] > 1]
        offsets = np.sort(np.append(offsets, offsets[most] + sizes[most] // 2))
    return Packs(packs.samples, offsets, packs.capacity)


def prepare_chats(
    name: str, tokenizer: TokenizerSource, args: DataArguments, cache: Path, say: Say = print
) -> Path | MixtureFolders:
    """What ``--train_data_file`` names, prepared: a dataset, or a mixture of some. Raises what both ``prepare`` do."""
    if file := mixture_file(name):
        return prepare_mixture(file, tokenizer, args, cache, say, wanted="chat")
    return prepare([name], tokenizer, args, cache, say, wanted="chat")


def open_chats(
    made: Path | MixtureFolders, max_length: int, over_long: OverLong, say: Say = print
) -> PreparedDataset | MixtureDataset:
    """The samples of what ``prepare_chats`` made. Raises DataError."""
    kind = PreparedDataset if isinstance(made, Path) else MixtureDataset
    return kind(made, max_length, over_long, say)  # pyright: ignore[reportArgumentType] - each has its own


def template_of(made: Path | MixtureFolders) -> str | None:
    """The chat template that it was made with; all sources of a mixture share one."""
    folder = made if isinstance(made, Path) else made.parts[0]
    return read(folder)["made_from"].get("chat_template")
