"""Write a prepared dataset as the files of another system, or prepare a dataset from such files.

    finebridge data export PREPARED --layout mindspeed --output_prefix out/alpaca [--seq_length N ...]
    finebridge data import out/alpaca --layout mindspeed --output_dir PREPARED

PREPARED is a folder as ``finebridge`` makes it from raw files; the messages of a run name it.
"""

from argparse import ArgumentParser, Namespace
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.manifest import file_sha256, verify
from ..storage.publish import publish
from .blocks import PackIndex, PreparedSource, write_prepared
from .flags import add, command_parser
from .layout_base import Exported, Layout, LayoutOptions
from .layouts import LAYOUTS
from .output import counted
from .prepared import is_prepared
from .schema import DataError

_SHOWN = 5
_EXPORT = "Write a prepared dataset as the files of another system."
_IMPORT = "Prepare a dataset from the files of another system."


def export_parser() -> ArgumentParser:
    """The command line of ``finebridge data export``."""
    parser = command_parser("export", "PREPARED --layout NAME --output_prefix PATH [flags]", _EXPORT)
    parser.add_argument("source", type=Path, metavar="PREPARED", help="the folder of a prepared dataset")
    add(parser, "--output_prefix", type=Path, required=True, help="what the names of the files begin with")
    _shared(parser)
    add(parser, "--over_long", choices=("error", "drop"), default="error", help="samples that do not fit")
    add(parser, "--seed", type=int, default=0, help="order of packs (default: 0)")
    add(parser, "--replace", action="store_true", help="write over files that stand")
    return parser


def import_parser() -> ArgumentParser:
    """The command line of ``finebridge data import``."""
    parser = command_parser("import", "PREFIX --layout NAME --output_dir FOLDER [flags]", _IMPORT)
    parser.add_argument("prefix", type=Path, metavar="PREFIX", help="what the names of the files begin with")
    add(parser, "--output_dir", type=Path, required=True, help="the folder to prepare; it must not be there yet")
    _shared(parser)
    return parser


def export_main(argv: Sequence[str] | None = None) -> int:
    """Run ``export``; exit code 0."""
    export(argv)
    return 0


def export(argv: Sequence[str] | None = None) -> list[Path]:
    """Write the files and say what is in them; the files. Raises ValueError for bad input."""
    args = export_parser().parse_args(argv)
    layout = LAYOUTS[args.layout]
    if not is_prepared(args.source):
        inside = [str(folder) for folder in sorted(args.source.glob("*/")) if is_prepared(folder)]
        raise DataError(f"{args.source}: no prepared dataset" + (f"; it holds {', '.join(inside)}" if inside else ""))
    verify(args.source)
    values = _options(args) | {"over_long": args.over_long, "replace": args.replace}
    if args.pack or args.neat_pack:
        values["packs"] = _packs(layout, args.source, LayoutOptions(**values), args.seed)
    options = LayoutOptions(**values)
    done = layout.export(args.source, args.output_prefix, options=options)
    _say(layout, done, args.source, options)
    return list(done.files)


def import_main(argv: Sequence[str] | None = None) -> int:
    """Prepare a dataset from the files and say what is in it; exit code 0. Raises ValueError for bad input."""
    args = import_parser().parse_args(argv)
    layout, options = LAYOUTS[args.layout], LayoutOptions(**_options(args))
    blocks = layout.blocks(args.prefix, options=options)
    if args.output_dir.exists():
        raise DataError(f"{args.output_dir} exists already; choose another --output_dir, or delete it")
    files = [Path(f"{args.prefix}{ending}") for ending in layout.endings(options)]
    made_from: dict[str, Any] = {"layout": layout.name, "options": _options(args)}
    made_from["files"] = {str(file): file_sha256(file) for file in files}
    with publish(args.output_dir, kind="dataset", made_from=made_from) as folder:
        report = write_prepared(folder, blocks, files[0], kind="preference" if options.pairs else layout.kind)
        if not report["samples"]:
            raise DataError(f"{args.prefix}: none of its {report['rows']} samples has a token to train on")
    print(
        f"data: {counted(report['samples'], 'sample')}, {report['tokens']:,} tokens, {report['loss_tokens']:,} with loss; "
        f"prepared {args.output_dir}"
    )
    for code, count in report["rejects"].items():
        print(f"data: left out, {code}: {count:,}; listed in {args.output_dir / 'rejects.jsonl'}")
    return 0


def _shared(parser: ArgumentParser) -> None:
    add(parser, "--layout", choices=sorted(LAYOUTS), required=True, help="whose files")
    add(parser, "--seq_length", type=int, help="tokens of an item")
    add(
        parser,
        "--vocab_size",
        type=int,
        help="ids must be below it; autoalign: its vocabulary, extra ids included",
    )
    add(parser, "--pad_id", type=int, help="token id that fills items up (pai, mindspeed with packs)")
    add(parser, "--pack", action="store_true", help="several samples an item (mindspeed, pai)")
    add(parser, "--neat_pack", action="store_true", help="mindspeed: the same, the attention mask tells them apart")
    add(parser, "--pairs", action="store_true", help="samples are chosen and rejected answers by turns")
    add(parser, "--json_key", help="megatron, autoalign: a part of the names (default: text, conversations)")


def _options(args: Namespace) -> dict[str, Any]:
    return {
        "seq_length": args.seq_length,
        "vocab_size": args.vocab_size,
        "pad_id": args.pad_id,
        "pack": "neat" if args.neat_pack else "pack" if args.pack else "none",
        "pairs": args.pairs,
        "json_key": args.json_key,
    }


def _packs(layout: Layout, source: Path, options: LayoutOptions, seed: int) -> PackIndex:
    """Packs of all samples that fit. Raises DataError for one that does not when those are not to be dropped."""
    from .packing import pack  # late: it brings a compiler

    layout.check(options, writing=True)
    data = PreparedSource(source)
    numbers = np.flatnonzero(layout.choose(data, options))
    found = pack(data.lengths[numbers], layout.longest(options) or 0, seed)
    return replace(found, samples=numbers[found.samples])


def _say(layout: Layout, done: Exported, source: Path, options: LayoutOptions) -> None:
    data = PreparedSource(source)
    tokens = int(data.lengths[done.used].sum(dtype=np.int64))
    line = (
        f"data: {counted(int(done.used.sum()), 'sample')}, {counted(tokens, 'token')} in {counted(done.items, 'item')}"
    )
    if options.packs is not None and done.items:
        line += f", {tokens / done.items / (layout.longest(options) or 1):.2%} of each filled"
    print(line + "; wrote " + ", ".join(str(file) for file in done.files))
    if layout.name == "megatron" and data.report["kind"] != "document":
        print("data: this layout holds tokens only; which of them have loss stays behind")
    gone = np.flatnonzero(~done.used)
    if gone.size:
        shown = ", ".join(f"{data.origin(i)} ({data.lengths[i]} tokens)" for i in gone[:_SHOWN].tolist())
        more = " ..." if gone.size > _SHOWN else ""
        print(f"data: left out because they do not fit: {counted(gone.size, 'sample')}: {shown}{more}")
