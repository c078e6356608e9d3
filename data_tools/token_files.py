"""Megatron's token files named in place of raw text: ``PREFIX``, ``PREFIX.bin`` or ``PREFIX.idx``.

Whoever wrote them, their tokenizer is not known. So all ids are read once and held against the vocabulary of this run;
that it was done stands in the cache, as a prepared dataset does.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ..storage.once import build_once
from ..storage.source_hashes import source_sha256
from .arguments import DataArguments
from .filters import FILTER_FLAGS
from .indexed import IndexedError, IndexedReader
from .schema import DataError
from .tokenizer_files import TokenizerSource, vocabulary_size

_ENDINGS = (".bin", ".idx")
_READING = ("data_format", "map_keys", "handler_name", "append_eod", *FILTER_FLAGS)  # flags that only raw text needs
_WEIGHTED = re.compile(r"\s*\d*\.?\d+\s+\S+\s+\d*\.?\d+\s+\S")  # 0.3 one 0.7 other


def token_prefix(name: str) -> Path | None:
    """The prefix of the token files that a name means, None when it means raw files.

    Raises DataError when one of the two files is missing, and for several data sets with weights.
    """
    if _WEIGHTED.match(name) and not os.path.exists(name):  # noqa: PTH110 - False, too, for names too long to be a path
        raise DataError(f"{name}: several data sets with weights cannot be mixed yet; name one")
    stem = name[:-4] if name.endswith(_ENDINGS) else name
    there = [os.path.isfile(stem + ending) for ending in _ENDINGS]  # noqa: PTH113 - the same
    if all(there):
        return Path(stem)
    if name.endswith(_ENDINGS) or (any(there) and not os.path.exists(name)):  # noqa: PTH110
        lacking = ", ".join(stem + ending for ending, found in zip(_ENDINGS, there, strict=True) if not found)
        several = "; name one data set: token files are not joined" if "," in name else ""
        raise DataError(f"{lacking}: no such file; tokens are a .bin and an .idx of the same name{several}")
    if os.path.isfile(f"{name}_text_document.idx"):  # noqa: PTH113
        raise DataError(f"{name}: no such file; did you mean {name}_text_document?")
    return None


def check_reading(prefix: Path, args: DataArguments) -> None:
    """Raises DataError for a flag that says how raw text becomes tokens, beside token files."""
    plain = DataArguments()
    for name in _READING:
        if getattr(args, name) != getattr(plain, name):
            raise DataError(f"--{name} is for raw text; {prefix} holds tokens already")


def read_tokens(prefix: Path) -> IndexedReader:
    """Token files whose documents lie one after the other. Raises DataError, IndexedError."""
    reader = IndexedReader(prefix)
    if not np.issubdtype(reader.dtype, np.integer):
        raise DataError(f"{reader.index}: its values are {reader.dtype}, no token ids")
    if reader.has_modes or not reader.is_plain:
        raise DataError(f"{reader.index}: modes, gaps or shared tokens; plain text has none of them")
    if not reader.tokens.size:
        raise DataError(f"{reader.data}: no tokens")
    return reader


def check_tokens(
    reader: IndexedReader, tokenizer: TokenizerSource, cache: Path, say: Callable[[str], None] = print
) -> str:
    """A hash of the files, all of whose ids are in the tokenizer's vocabulary. Raises DataError naming the document.

    Safe to call from many processes at once: one reads the tokens, the others wait. Unchanged files are not read again.
    """
    vocabulary = vocabulary_size(tokenizer.load())
    hashes = source_sha256([reader.data, reader.index], cache, say)
    settings = {"token_files": list(hashes.values()), "vocabulary": vocabulary}
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]

    def build(folder: Path, _tell: Callable[[str], None]) -> Mapping[str, Any]:
        try:
            reader.check_ids(vocabulary)
        except IndexedError as error:
            raise DataError(f"{error}; is {tokenizer.path} the tokenizer that it was made with?") from None
        (folder / "report.json").write_text(json.dumps(settings) + "\n", encoding="utf-8")
        return {**settings, "files": {str(file.absolute()): known for file, known in hashes.items()}}

    build_once(cache / key, build, kind="checked_tokens", say=say)
    return key
