"""Tokenise data once, ahead of training.

finebridge data build data.jsonl --tokenizer_name_or_path MODEL --output_dir prepared [--output_prefix out/name]
"""

import json
from argparse import ArgumentParser
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from .arguments import DataArguments
from .fitting import BUILD_TIME
from .flags import add, data_parser, read_arguments
from .layouts_cli import export
from .mixture import mixture_file
from .mixture_index import prepare_mixture
from .preprocess import prepare
from .schema import DataError, Kind
from .tokenizer_files import TokenizerSource


def _flags(parser: ArgumentParser) -> None:
    add(parser, "--output_dir", help="where the prepared folder goes (the --prepared_data_dir of a training run)")
    add(parser, "--output_prefix", help="write the files MindSpeed-LLM and Megatron-LM read, under this prefix, too")
    add(parser, "--pack", action="store_true", help="with --output_prefix: packed, as MindSpeed-LLM's --pack")
    add(parser, "--neat_pack", action="store_true", help="with --output_prefix: packed, samples kept apart")
    add(parser, "--replace", action="store_true", help="with --output_prefix: write over files that stand")
    add(parser, "--n_subs", type=int, help="accepted and not needed: memory is bounded")


def main(argv: Sequence[str]) -> int:
    """Prepare data and print its folder last; exit code 0. Raises DataError."""
    told = "Tokenise data once, ahead of training. The last line printed is the prepared folder."
    parser = data_parser("build", told, _flags)
    standard = {name: parser.get_default(name) for name in ("max_seq_length", "over_long")}
    parser.set_defaults(**dict.fromkeys(standard))
    values = parser.parse_args(argv)
    given = [name for name in standard if getattr(values, name) is not None]
    vars(values).update({name: value for name, value in standard.items() if name not in given})
    if not values.output_dir and not values.output_prefix:
        raise DataError("--output_dir is missing: the folder that the prepared data goes into")
    if (values.pack or values.neat_pack) and not values.output_prefix:
        raise DataError(
            "--pack and --neat_pack shape the files of --output_prefix; to train on packed rows: sft --packing"
        )
    if values.replace and not values.output_prefix:
        raise DataError("--replace is for the files of --output_prefix; a prepared folder is reused or built by itself")
    files, tokenizer, args = read_arguments(values)
    output = Path(values.output_dir or Path(values.output_prefix).parent / "prepared_data")
    if mixture := mixture_file(files[0]):
        if len(files) > 1 or values.output_prefix:
            raise DataError(f"{mixture}: a mixture is built alone, and without --output_prefix")
        folders = prepare_mixture(mixture, tokenizer, args, output, start_method="fork")
        print(folders.index)
        return 0
    folder = prepare(files, tokenizer, args, output, start_method="fork")
    kind: Kind = json.loads((folder / "report.json").read_text(encoding="utf-8"))["kind"]
    if values.output_prefix:
        export_tokens(
            folder, values.output_prefix, tokenizer, args, limited=bool(given), replace=values.replace,
            pack="neat" if values.neat_pack else "pack" if values.pack else "none", json_key=values.json_keys,
        )  # fmt: skip
    elif kind == "chat":
        from .dataset import PreparedDataset  # late: it brings a compiler

        PreparedDataset(folder, args.max_seq_length, args.over_long)  # tells, as training does, what is over the limit
    print(folder)
    return 0


def export_tokens(
    folder: Path,
    prefix: str,
    tokenizer: TokenizerSource,
    args: DataArguments,
    *,
    pack: Literal["none", "pack", "neat"] = "none",
    limited: bool = False,
    replace: bool = False,
    json_key: str | None = None,
) -> list[Path]:
    """Write the files that MindSpeed-LLM and Megatron-LM read from a prepared folder; the files.

    ``limited``: a length, or what to do with longer samples, was asked for. ``json_key`` is a part of the names of plain
    text. Raises DataError.
    """
    kind: Kind = json.loads((folder / "report.json").read_text(encoding="utf-8"))["kind"]
    words = [str(folder), "--output_prefix", prefix, *["--replace"] * replace]
    words += ["--layout", "megatron" if kind == "document" else "mindspeed"]
    words += ["--pairs"] * (kind == "preference")
    if kind == "document" and json_key:
        words += [f"--json_key={json_key}"]
    packed = pack != "none"
    if packed:  # MindSpeed-LLM wants both flags for a neat pack
        loaded = tokenizer.load()
        pad_id = loaded.eos_token_id if loaded.pad_token_id is None else loaded.pad_token_id
        words += ["--neat_pack" if pack == "neat" else "--pack", "--pad_id", str(pad_id)]
    if packed or (limited and kind != "document"):
        words += ["--seq_length", str(args.max_seq_length)]
        # What is cut at its turns may have just as many tokens, and MindSpeed-LLM takes one less.
        words += ["--over_long", "drop"] * (args.over_long in ("drop", *BUILD_TIME))
    return export(words)
