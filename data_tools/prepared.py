"""A prepared dataset that is named in place of raw files: verified, and held against the flags of this run.

``finebridge data build`` and ``data import`` make such folders; ``preprocess.py`` says what is in them.
"""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..storage.once import verify_once
from .arguments import DataArguments
from .filters import filter_settings
from .fitting import BUILD_TIME
from .indexed import IndexedError, IndexedReader
from .schema import DataError, Kind
from .templates import template_source
from .tokenizer_files import TokenizerSource, tokenizer_sha256, vocabulary_size

_READING = ("data_format", "map_keys", "handler_name")  # flags that only raw rows need


def is_prepared(folder: Path) -> bool:
    """Whether a folder looks like a prepared dataset; ``open_prepared`` verifies it."""
    return os.path.isfile(folder / "text_document.idx")  # noqa: PTH113 - False, too, for names too long to be a path


def prepared_folder(patterns: Sequence[str]) -> Path | None:
    """The folder when a prepared dataset is named, which must then stand alone; None for raw files. Raises DataError."""
    found = [Path(name) for name in patterns if is_prepared(Path(name))]
    if found and len(patterns) > 1:
        raise DataError(f"{found[0]} is a prepared dataset; name it alone")
    return found[0] if found else None


def shaping(args: DataArguments) -> dict[str, Any]:
    """The settings of a run that shape tokens and spans, as the manifest keeps them. Raises DataError."""
    return {
        "chat_template": template_source(args.chat_template) if args.chat_template else None,
        "think_mode": args.think_mode,
        "enable_thinking": args.enable_thinking,
        "mask_compat": args.mask_compat,
        "append_eod": args.append_eod,
        "longest": [args.over_long, args.max_seq_length] if args.over_long in BUILD_TIME else None,
        **({"filters": filters} if (filters := filter_settings(args)) else {}),
    }


def open_prepared(folder: Path, tokenizer: TokenizerSource, args: DataArguments) -> dict[str, Any]:
    """The manifest of a prepared dataset that this run can use.

    A flag that would have shaped other tokens, another tokenizer, or (for imported files, whose tokenizer is not known) an
    id that this one does not have raises DataError; a damaged folder raises ManifestError.
    """
    manifest = verify_once(folder)
    made: dict[str, Any] = manifest["made_from"]
    plain, given = DataArguments(), shaping(args)
    for name in _READING:
        if getattr(args, name) != getattr(plain, name):
            raise DataError(f"--{name} tells how raw rows are read; {folder} is prepared already")
    standard = shaping(plain)
    for name, value in given.items():
        if value not in (standard.get(name), made.get(name)):
            flag = "over_long" if name == "longest" else ", --".join(value) if name == "filters" else name
            raise DataError(
                f"--{flag} shapes tokens, and those in {folder} were made otherwise; leave it out, or name the raw files"
            )
    if "tokenizer" in made:
        if made["tokenizer"] != tokenizer_sha256(tokenizer.path, tokenizer.load):
            raise DataError(
                f"{folder} was made with another tokenizer than {tokenizer.path}; name the raw files instead"
            )
    else:
        try:
            IndexedReader(folder / "text_document").check_ids(vocabulary_size(tokenizer.load()))
        except IndexedError as error:
            raise DataError(f"{error}; is this the tokenizer that the data was made with?") from None
    return manifest


def check_kind(kind: Kind, wanted: Kind | None, names: Sequence[str]) -> None:
    """Raises DataError when rows are not of the kind that is wanted."""
    if wanted not in (None, kind):
        told = f"{', '.join(names)}: these rows are {KIND_NAMES[kind]}; {KIND_NAMES[wanted]} are needed here"
        other = f"; {_TRAINED_BY[kind]} trains on them" if kind in _TRAINED_BY else ""
        raise DataError(f"{told} (--data_format says how rows are read){other}")


KIND_NAMES: Mapping[Kind | None, str] = {
    "chat": "conversations",
    "document": "plain text for pretraining",
    "preference": "pairs of answers",
}
_TRAINED_BY: Mapping[Kind, str] = {"chat": "finebridge sft", "document": "finebridge pretrain"}
