"""The file layouts of other systems: a prepared dataset written as one, and one read as samples.

``LAYOUTS`` names them: ``megatron`` (tokens only), ``mindspeed`` (three files, labels unshifted), ``pai`` (tokens and
shifted labels in one sequence of twice the length) and ``autoalign`` (one index over two token files). Spans that touch
become one: no layout can tell them apart.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from .blocks import Block, PreparedSource, by_turns, runs
from .indexed import IndexedReader, IndexedWriter, Numbers, optimal_dtype
from .layout_base import Exported, Flags, Layout, LayoutOptions, check_vocabulary, padded, read_ids, refuse
from .schema import DataError

IGNORE_INDEX = -100


class Megatron(Layout):
    """``PREFIX_{json_key}_document.bin/.idx``: plain tokens, as Megatron-LM's ``tools/preprocess_data.py`` writes them.

    ``json_key`` is the column that held the texts, ``text`` when none is given. There is no place for loss spans: when it
    is read, every token has loss, as in pretraining. A document is a sample, however many sequences it has. With
    ``vocab_size`` the dtype is Megatron's choice for it, else int32.
    """

    name = "megatron"
    kind = "document"
    unused = ("seq_length", "pad_id")

    def needs(self, options: LayoutOptions, *, writing: bool) -> tuple[str, ...]:  # noqa: ARG002
        return ()

    def endings(self, options: LayoutOptions) -> tuple[str, ...]:
        stem = self.stem(options)
        return (f"{stem}.bin", f"{stem}.idx")

    def stem(self, options: LayoutOptions) -> str:
        """What follows the prefix in both names."""
        return f"_{options.json_key or 'text'}_document"

    def write(self, source: PreparedSource, used: Flags, stem: Path, options: LayoutOptions) -> int:
        items = 0
        with IndexedWriter(Path(f"{stem}{self.stem(options)}"), optimal_dtype(options.vocab_size)) as writer:
            for block, sizes in source.items(used, None):
                check_vocabulary(block, source, options.vocab_size)
                writer.add_many(block.ids, block.lengths)
                items += len(sizes)
        return items

    def read(self, prefix: Path, options: LayoutOptions) -> Iterator[Block]:
        reader = IndexedReader(Path(f"{prefix}{self.stem(options)}"))
        lengths = np.diff(np.concatenate([[0], np.cumsum(reader.lengths, dtype=np.int64)])[reader.documents])
        for start, stop in runs(lengths):
            ids = read_ids(reader, np.arange(reader.documents[start], reader.documents[stop]), options.vocab_size)
            yield Block(ids, np.ones(ids.size, dtype=bool), lengths[start:stop], np.arange(start, stop))


class MindSpeed(Layout):
    """``PREFIX_packed_{input_ids,attention_mask,labels}_document``, int32, one sequence a document.

    Labels are unshifted, -100 where there is no loss. The attention mask is 1; in neat packs it is 1, 2, 3 ... a sample
    and 0 for padding. Packs of both forms are filled up to ``seq_length``. One token of it stays for padding, and
    without packs too a sample is shorter than ``seq_length``. Pairs have the keys ``chosen_input_ids``,
    ``chosen_labels`` and the same for rejected. "packed" is in the names always. Where samples meet in a plain pack is
    not stored: such files are read with ``pack="pack"``, each item as one sample without its padding.
    Source: MindSpeed-LLM ``tasks/preprocess/data_handler.py`` and ``mtf_dataset.py``.
    """

    name = "mindspeed"
    unused = ("json_key",)
    takes_pairs = True
    takes_packs = True

    def needs(self, options: LayoutOptions, *, writing: bool) -> tuple[str, ...]:
        if writing:
            return () if options.pack == "none" else ("seq_length", "pad_id")
        return ("pad_id",) if options.pack == "pack" else ()

    def check(self, options: LayoutOptions, *, writing: bool) -> None:
        super().check(options, writing=writing)
        if options.pack == "none" and (options.packs is not None or options.pad_id is not None):
            raise DataError("layout mindspeed: packs and --pad_id need --pack or --neat_pack")

    def longest(self, options: LayoutOptions) -> int | None:
        return None if options.seq_length is None else options.seq_length - 1

    def endings(self, options: LayoutOptions) -> tuple[str, ...]:
        return tuple(f"_packed_{key}_document.{kind}" for kind in ("bin", "idx") for key in self.keys(options))

    def keys(self, options: LayoutOptions) -> tuple[str, ...]:
        """What stands between ``_packed_`` and ``_document`` in the names."""
        if options.pairs:
            return ("chosen_input_ids", "chosen_labels", "rejected_input_ids", "rejected_labels")
        return ("input_ids", "attention_mask", "labels")

    def export(self, source: Path, prefix: Path, *, options: LayoutOptions) -> Exported:
        own = {f"{prefix.name}{ending}" for ending in self.endings(options)}
        found = {path.name for path in prefix.absolute().parent.glob("*") if _is_key_of(path.name, prefix.name)}
        if found - own:  # MindSpeed takes every file of this form for a column
            raise DataError(
                f"{prefix.parent / min(found - own)} would be read as part of this dataset; choose another prefix"
            )
        return super().export(source, prefix, options=options)

    def write(self, source: PreparedSource, used: Flags, stem: Path, options: LayoutOptions) -> int:
        items = 0
        with ExitStack() as stack:
            files = [
                stack.enter_context(IndexedWriter(Path(f"{stem}_packed_{key}_document"))) for key in self.keys(options)
            ]
            columns = self._pairs(source, used) if options.pairs else self._items(source, used, options)
            for values in columns:
                for file, (tokens, lengths) in zip(files, values, strict=True):
                    file.add_many(tokens, lengths)
                items += len(values[0][1])
        return items

    def _pairs(self, source: PreparedSource, used: Flags) -> Iterator[Sequence[tuple[npt.NDArray[Any], Numbers]]]:
        """Values and lengths for each of the four files."""
        for blocks in source.pairs(used):
            yield [(values, block.lengths) for block in blocks for values in (block.ids, block.labels(IGNORE_INDEX))]

    def _items(
        self, source: PreparedSource, used: Flags, options: LayoutOptions
    ) -> Iterator[Sequence[tuple[npt.NDArray[Any], Numbers]]]:
        """Values and lengths for each of the three files."""
        width = options.seq_length if options.pack != "none" else None
        for block, sizes in source.items(used, options.packs, width):
            columns, lengths = (block.ids, np.ones_like(block.ids), block.labels(IGNORE_INDEX)), block.lengths
            if width is not None:
                firsts = np.cumsum(sizes) - sizes
                totals = np.add.reduceat(block.lengths, firsts)
                fill = (options.pad_id or 0, 1, IGNORE_INDEX)
                if options.pack == "neat":
                    place = np.arange(len(block.lengths)) - np.repeat(firsts, sizes)
                    columns = (columns[0], np.repeat(place + 1, block.lengths), columns[2])
                    fill = (fill[0], 0, IGNORE_INDEX)
                columns = tuple(padded(c, totals, width, f) for c, f in zip(columns, fill, strict=True))
                lengths = np.full(len(sizes), width)
            yield [(column, lengths) for column in columns]

    def read(self, prefix: Path, options: LayoutOptions) -> Iterator[Block]:
        readers = [IndexedReader(Path(f"{prefix}_packed_{key}_document")) for key in self.keys(options)]
        if options.pairs:
            same_lengths(*readers[:2])
            same_lengths(*readers[2:])
            if len(readers[0]) != len(readers[2]):
                raise DataError(
                    f"{readers[2].index}: {len(readers[2])} rejected answers, {len(readers[0])} chosen ones"
                )
            for start, stop in runs(readers[0].lengths.astype(np.int64) + readers[2].lengths):
                numbers = np.arange(start, stop)
                chosen = unshifted(readers[0], readers[1], numbers, options, IGNORE_INDEX)
                yield by_turns(chosen, unshifted(readers[2], readers[3], numbers, options, IGNORE_INDEX))
            return
        same_lengths(readers[0], readers[1])
        same_lengths(readers[0], readers[2])
        for start, stop in runs(readers[0].lengths):
            numbers = np.arange(start, stop)
            block = unshifted(readers[0], readers[2], numbers, options, IGNORE_INDEX)
            yield self._split(block, readers[1], options)

    def _split(self, items: Block, masks: IndexedReader, options: LayoutOptions) -> Block:
        """The samples of whole items, told apart by their attention masks and without the padding."""
        mask = masks.gather(items.numbers).astype(np.int64)
        first = np.zeros(mask.size, dtype=bool)
        first[items.first_tokens()] = True
        before = np.concatenate([[0], mask[:-1]])
        follows = (mask == before) | ((mask == before + 1) & (before > 0)) | (mask == 0)
        refuse(
            np.where(first, mask != 1, ~follows), masks.data, items.numbers, items.lengths,
            "an attention mask is 1, or numbers the samples 1, 2, 3 ... and is 0 for padding at the end",
        )  # fmt: skip
        real = mask > 0
        if options.pack == "pack":
            refuse(mask != 1, masks.data, items.numbers, items.lengths, "in a plain pack the attention mask is 1")
            places = np.where(items.trained | (items.ids != options.pad_id), np.arange(mask.size), -1)
            last = np.maximum.reduceat(places, items.first_tokens()) if mask.size else places
            real = np.arange(mask.size) <= np.repeat(last, items.lengths)
            refuse(first & ~real, masks.data, items.numbers, items.lengths, "the whole item is padding")
        refuse(~real & items.trained, masks.data, items.numbers, items.lengths, "padding has a label")
        starts = np.flatnonzero(real & (first | (mask != before)))
        places = np.cumsum(real)[starts] - 1
        lengths = np.diff(np.append(places, np.count_nonzero(real)))
        numbers = np.repeat(items.numbers, items.lengths)[starts]
        return Block(items.ids[real], items.trained[real], lengths, numbers)


class Pai(Layout):
    """``PREFIX_text_document.bin/.idx``, every item ``seq_length`` tokens followed by as many labels, int32.

    Labels are shifted left within each sample (the label at i is the token at i + 1), -100 where there is no loss and
    at each sample's last token; that token is stored as -1 - id, which marks the end. The rest is ``pad_id``. The first
    token of a sample is never predicted, so a loss on it is not stored. The original stores small vocabularies as
    uint16, into which neither -100 nor the marks fit; here it is int32 always.
    Source: Pai-Megatron-Patch ``toolkits/sft_data_preprocessing/build_idxmap_sft_dataset.py``.
    """

    name = "pai"
    unused = ("json_key",)
    takes_packs = True

    def needs(self, options: LayoutOptions, *, writing: bool) -> tuple[str, ...]:  # noqa: ARG002
        return ("seq_length", "pad_id") if writing else ()

    def check(self, options: LayoutOptions, *, writing: bool) -> None:
        super().check(options, writing=writing)
        if options.pack == "neat":
            raise DataError("layout pai: it marks samples by their last token; choose --pack")

    def endings(self, options: LayoutOptions) -> tuple[str, ...]:  # noqa: ARG002
        return ("_text_document.bin", "_text_document.idx")

    def write(self, source: PreparedSource, used: Flags, stem: Path, options: LayoutOptions) -> int:
        width, pad = options.seq_length or 0, options.pad_id or 0  # both are there: needs()
        items = 0
        with IndexedWriter(Path(f"{stem}_text_document")) as writer:
            for block, sizes in source.items(used, options.packs, 2 * width):
                check_vocabulary(block, source, options.vocab_size)
                last = block.last_tokens()
                labels = np.append(block.labels(IGNORE_INDEX)[1:], np.int32(IGNORE_INDEX))
                labels[last] = IGNORE_INDEX
                tokens = block.ids.copy()
                tokens[last] = -1 - tokens[last]
                totals = np.add.reduceat(block.lengths, np.cumsum(sizes) - sizes)
                rows = padded(tokens, totals, width, pad), padded(labels, totals, width, IGNORE_INDEX)
                writer.add_many(np.concatenate(rows, axis=1), np.full(len(sizes), 2 * width))
                items += len(sizes)
        return items

    def read(self, prefix: Path, options: LayoutOptions) -> Iterator[Block]:
        reader = IndexedReader(Path(f"{prefix}_text_document"))
        if not np.issubdtype(reader.dtype, np.signedinteger):
            raise DataError(f"{reader.index}: {reader.dtype} holds neither -100 nor end marks; prepare the data again")
        width = options.seq_length or (int(reader.lengths[0]) // 2 if len(reader) else 0)
        odd = reader.lengths != 2 * width
        if odd.any() or (len(reader) and not width):
            number = int(odd.argmax())
            raise DataError(
                f"{reader.index}: sequence {number} has {reader.lengths[number]} values, not 2 x {width} "
                "(tokens and labels)"
            )
        for start, stop in runs(reader.lengths):
            yield self._split(reader, np.arange(start, stop), width, options)

    def _split(self, reader: IndexedReader, numbers: Numbers, width: int, options: LayoutOptions) -> Block:
        """The samples of whole items, told apart by the marks of their last tokens and without the padding."""
        rows = reader.gather(numbers).astype(np.int64).reshape(-1, 2 * width)
        tokens, labels = rows[:, :width], rows[:, width:]
        ends = tokens < 0
        real = np.flip(np.logical_or.accumulate(np.flip(ends, axis=1), axis=1), axis=1)  # up to the last mark

        def check(bad: Flags, what: str) -> None:
            refuse(bad.reshape(-1), reader.data, numbers, np.full(len(numbers), width), what)

        check(~real & ~real.any(axis=1, keepdims=True), "no token of the item is marked as a sample's last")
        pad = tokens[:, -1:] if options.pad_id is None else np.int64(options.pad_id)
        check(~real & ((tokens != pad) | (labels != IGNORE_INDEX)), "padding holds another token, or a label")
        ids = np.where(ends, -1 - tokens, tokens)
        check(ids >= (options.vocab_size or 2**31), "the value is no token id")
        following = np.concatenate([ids[:, 1:], np.full((len(ids), 1), IGNORE_INDEX)], axis=1)
        trains = labels != IGNORE_INDEX
        check(trains & (ends | (labels != following)), "its label is neither -100 nor the next token of its sample")
        trained = np.concatenate([np.zeros((len(ids), 1), dtype=bool), trains[:, :-1]], axis=1)
        lengths = np.diff(np.flatnonzero(ends[real]) + 1, prepend=0)
        return Block(ids[real].astype(np.int32), trained[real], lengths, np.repeat(numbers, ends.sum(axis=1)))


class AutoAlign(Layout):
    """``PREFIX_{json_key}_maxlen_{seq_length}_conv_input.bin``, ``..._conv_label.bin`` and one ``..._conv.idx`` for both.

    Labels are unshifted, ``vocab_size`` + 1 where there is no loss, so the vocabulary must be that of the training: it
    is the same number that AutoAlign computes there (with its ``--extra-vocab-size``). Never packed. AutoAlign demands
    that a sample's first token has no loss, which it could not train either. Pairs have the files ``..._chosen_*`` and
    ``..._rejected_*``. Source: AutoAlign ``autoalign_megatron/patch/data/indexed_dataset_{sft_conv,dpo}.py``.
    """

    name = "autoalign"
    unused = ("pad_id",)
    takes_pairs = True

    def needs(self, options: LayoutOptions, *, writing: bool) -> tuple[str, ...]:  # noqa: ARG002
        return ("seq_length", "vocab_size")

    def endings(self, options: LayoutOptions) -> tuple[str, ...]:
        return tuple(f"{stem}{kind}" for kind in ("_input.bin", "_label.bin", ".idx") for stem in self.stems(options))

    def stems(self, options: LayoutOptions) -> list[str]:
        """What follows the prefix in the names, one an index."""
        parts = ("chosen", "rejected") if options.pairs else ("conv",)
        return [f"_{options.json_key or 'conversations'}_maxlen_{options.seq_length}_{part}" for part in parts]

    def write(self, source: PreparedSource, used: Flags, stem: Path, options: LayoutOptions) -> int:
        vocabulary = options.vocab_size or 0  # it is there: needs()
        blocks = source.pairs(used) if options.pairs else ((block,) for block, _ in source.items(used, None))
        dtype, items = optimal_dtype(vocabulary), 0
        with ExitStack() as stack:
            files = []
            for name in self.stems(options):
                base = Path(f"{stem}{name}")
                inputs = stack.enter_context(IndexedWriter(base, dtype, data=Path(f"{base}_input.bin")))
                files.append((inputs, stack.enter_context(Path(f"{base}_label.bin").open("wb"))))
            for group in blocks:
                for block, (inputs, labels) in zip(group, files, strict=True):
                    check_vocabulary(block, source, vocabulary)
                    values = block.labels(vocabulary + 1)
                    values[block.first_tokens()] = vocabulary + 1
                    inputs.add_many(block.ids, block.lengths)
                    labels.write(values.astype(inputs.dtype).data)
                items += len(group[0].lengths)
        return items

    def read(self, prefix: Path, options: LayoutOptions) -> Iterator[Block]:
        vocabulary = options.vocab_size or 0
        readers: list[tuple[IndexedReader, IndexedReader]] = []
        for name in self.stems(options):
            base = Path(f"{prefix}{name}")
            pair = [IndexedReader(base, data=Path(f"{base}_{kind}.bin")) for kind in ("input", "label")]
            readers.append((pair[0], pair[1]))
        costs = np.zeros(len(readers[0][0]), dtype=np.int64)
        for inputs, labels in readers:
            same_lengths(inputs, labels)
            if len(inputs) != len(costs):
                raise DataError(f"{inputs.index}: {len(inputs)} rejected answers, {len(costs)} chosen ones")
            costs += inputs.lengths
        for start, stop in runs(costs):
            numbers = np.arange(start, stop)
            blocks = [unshifted(*pair, numbers, options, vocabulary + 1) for pair in readers]
            yield by_turns(*blocks) if options.pairs else blocks[0]


def unshifted(
    inputs: IndexedReader, labels: IndexedReader, numbers: Numbers, options: LayoutOptions, mask_id: int
) -> Block:
    """These sequences with their unshifted labels. Raises DataError for a label that is neither mask nor token."""
    ids = read_ids(inputs, numbers, options.vocab_size)
    values = labels.gather(numbers)
    lengths = inputs.lengths[numbers].astype(np.int64)
    trained = values != mask_id
    refuse(trained & (values != ids), labels.data, numbers, lengths, f"its label is neither {mask_id} nor the token")
    return Block(ids, trained, lengths, numbers)


def same_lengths(first: IndexedReader, other: IndexedReader) -> None:
    """Raises DataError when two columns differ in number or length of their sequences, or one is empty."""
    if len(first) != len(other):
        raise DataError(f"{other.index}: {len(other)} sequences, {first.index.name} has {len(first)}")
    bad = np.flatnonzero(first.lengths != other.lengths)
    if bad.size:
        at = int(bad[0])
        raise DataError(
            f"{other.index}: sequence {at} has {other.lengths[at]} values, {first.index.name} {first.lengths[at]}"
        )
    if len(first) and not first.lengths.min():
        raise DataError(f"{first.index}: sequence {int(first.lengths.argmin())} is empty")


def _is_key_of(name: str, prefix: str) -> bool:
    """Whether MindSpeed's reader would take the file ``name`` for a column of the dataset ``prefix``."""
    return name.startswith(f"{prefix}_packed_") and "_document" in name


LAYOUTS: Mapping[str, Layout] = {layout.name: layout for layout in (Megatron(), MindSpeed(), Pai(), AutoAlign())}
