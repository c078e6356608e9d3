"""Rows that are left out on purpose: too short or long, repetitive, like evaluation data, or there before.

Every rule looks at one row alone and is the same wherever it runs; only what came before is known to whoever sees all rows
(``duplicates.py``), for whom the row's hash is made here. A row that is left out is a counted reject with its file and
line; it does not count for ``--max_rejects``, which is for rows that cannot be used.
"""

import hashlib
import unicodedata
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any, cast

import orjson

from ..storage.manifest import file_sha256
from .arguments import DataArguments
from .ngrams import SHORTEST, EvaluationTexts, repetition
from .readers import files_of, read_chunks, resolve_files, rows_of
from .schema import DataError, Document, Message, Preference, Rejected, Sample

FILTERED = ("too_short", "too_long", "repetitive", "contaminated", "duplicate")
FILTER_FLAGS = ("min_chars", "max_chars", "drop_repetitive", "decontaminate", "deduplicate")

Row = Sample | Preference | Document


@dataclass(frozen=True, slots=True)
class Filters:
    """The rules of one build; calling it with a row raises Rejected when a rule leaves it out."""

    min_chars: int | None
    max_chars: int | None
    drop_repetitive: bool
    evaluation: EvaluationTexts | None

    @classmethod
    def of(cls, args: DataArguments) -> "Filters | None":
        """The rules that these arguments ask for, None when they ask for none. Reads the evaluation files."""
        evaluation = _evaluation_texts(args.decontaminate, _digests(args.decontaminate)) if args.decontaminate else None
        if not (args.min_chars or args.max_chars or args.drop_repetitive or evaluation):
            return None
        return cls(args.min_chars, args.max_chars, args.drop_repetitive, evaluation)

    def __call__(self, row: Row) -> None:
        """Raises Rejected with a code of FILTERED; lengths are characters of all turns' contents and thoughts."""
        texts = list(_texts(row))
        size = sum(map(len, texts))
        if self.min_chars and size < self.min_chars:
            raise Rejected("too_short", f"{size} characters, --min_chars {self.min_chars}")
        if self.max_chars and size > self.max_chars:
            raise Rejected("too_long", f"{size} characters, --max_chars {self.max_chars}")
        if self.drop_repetitive:
            for text in _answers(row):
                if broken := repetition(text):
                    raise Rejected("repetitive", broken)
        if self.evaluation and (found := self.evaluation.find(texts)):
            raise Rejected("contaminated", f"it shares {found.words!r} with {found.where}")


def filter_settings(args: DataArguments) -> dict[str, Any] | None:
    """The filters as a manifest keeps them, evaluation files by their SHA-256; None when there are none. Raises DataError."""
    found = {name: getattr(args, name) for name in FILTER_FLAGS if getattr(args, name)}
    if args.decontaminate:
        found["decontaminate"] = sorted(_digests(args.decontaminate))
    return found or None


def unfiltered(args: DataArguments) -> DataArguments:
    """The arguments for evaluation data: filters are for what is trained."""
    plain = DataArguments()
    return replace(args, **{name: getattr(plain, name) for name in FILTER_FLAGS})


def row_hash(row: Row) -> bytes:
    """128 bits (BLAKE2b) of a row's normalised messages: equal for rows that say the same.

    Texts are in NFC, each run of white space is one space and none is at the ends. Roles, contents, thoughts, tool calls
    and what the row hands to the chat template count; which turns are trained does not.
    """
    if isinstance(row, Document):
        value: object = _normalised(row.text)
    elif isinstance(row, Preference):
        value = [_conversation(row.chosen), _conversation(row.rejected)]
    else:
        value = _conversation(row)
    return hashlib.blake2b(orjson.dumps(value, option=orjson.OPT_SORT_KEYS), digest_size=16).digest()


def _conversation(sample: Sample) -> object:
    turns = [
        [turn.role, _normalised(turn.content), _normalised(turn.reasoning or ""), dict(turn.extra)]
        for turn in sample.messages
    ]
    return [turns, dict(sample.template_kwargs)]


def _normalised(text: str) -> str:
    return " ".join(unicodedata.normalize("NFC", text).split())


def _turns(row: Row) -> Iterator[Message]:
    if isinstance(row, Sample):
        yield from row.messages
    elif isinstance(row, Preference):
        yield from row.chosen.messages
        yield row.rejected.messages[-1]


def _texts(row: Row) -> Iterator[str]:
    """All that a row says."""
    if isinstance(row, Document):
        yield row.text
    for turn in _turns(row):
        yield turn.content
        if turn.reasoning:
            yield turn.reasoning


def _answers(row: Row) -> Iterator[str]:
    """The texts that are trained."""
    if isinstance(row, Document):
        yield row.text
    for turn in _turns(row):
        if turn.role == "assistant" and turn.trained:
            yield turn.content
            if turn.reasoning:
                yield turn.reasoning


def _digests(names: str) -> tuple[str, ...]:
    return tuple(file_sha256(file) for file in _evaluation_files(names))


def _evaluation_files(names: str) -> list[Path]:
    try:
        return [file for source in resolve_files([names]) for file in files_of(source)]
    except DataError as error:
        raise DataError(f"--decontaminate: {error}") from None


def looked_for(names: str) -> str:
    """How many evaluation texts rows are compared with, in words. Raises DataError."""
    found = _evaluation_texts(names, _digests(names))
    short = f"; {found.too_short:,} of fewer than {SHORTEST} words are not" if found.too_short else ""
    return f"{len(found):,} texts of {names} are looked for in the rows{short}"


@lru_cache(1)
def _evaluation_texts(names: str, digests: tuple[str, ...]) -> EvaluationTexts:  # noqa: ARG001 - a part of the cache's key
    found = EvaluationTexts(_texts_of_rows(_evaluation_files(names)))
    if not len(found):
        raise DataError(f"--decontaminate {names}: no text has {SHORTEST} words, the fewest that are looked for")
    return found


def _texts_of_rows(files: Sequence[Path]) -> Iterator[tuple[str, str]]:
    """Every text of evaluation rows of any form, with its file:line; what system turns say is left out: data share it."""
    for file in files:
        for chunk in read_chunks(file):
            for origin, row in rows_of(chunk):
                if isinstance(row, Rejected):
                    raise DataError(f"--decontaminate {origin}: {row}")
                for text in _strings(row):
                    yield str(origin), text


def _strings(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, list):
        for part in cast("list[object]", value):
            yield from _strings(part)
    elif isinstance(value, dict):
        fields = cast("Mapping[str, object]", value)
        if "system" not in (fields.get("role"), fields.get("from")):
            for part in fields.values():
                yield from _strings(part)
