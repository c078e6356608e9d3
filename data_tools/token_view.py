"""Tokens of a sample as text: what each token adds, which of them carry loss, and nothing that a terminal would obey."""

from collections.abc import Container, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from .schema import TokenizedSample

_CONTEXT = (
    4  # tokens before a stretch that are decoded with it: some decoders drop the first space of what they are given
)
_LONGEST_PIECE = 8  # a character has four bytes; more tokens than these are never one character
_REPLACEMENT = "\ufffd"

# Characters that move a terminal's cursor or change the order in which text is shown: they are written out.
_UNSAFE = (
    *(code for code in range(0x20) if chr(code) not in "\n\t"),
    *range(0x7F, 0xA0),
    0x61C, 0x200E, 0x200F, *range(0x2028, 0x202F), *range(0x2066, 0x206A),
    *range(0xD800, 0xE000),
)  # fmt: skip
_WRITTEN = {code: f"<U+{code:04X}>" for code in _UNSAFE}


@dataclass(frozen=True, slots=True)
class Piece:
    """One token, or the few tokens that are a character only together; ``position`` is the place of the first.

    ``control`` tells a token that stands for itself (``<|im_end|>``) from plain text that looks like it.
    """

    position: int
    ids: tuple[int, ...]
    text: str
    trained: bool
    control: bool


def visible(text: str) -> str:
    """The text with control characters and marks of writing direction written out, as ``<U+001B>``."""
    return text.translate(_WRITTEN)


def stretches(tokenizer: Any, sample: TokenizedSample) -> list[tuple[str, bool]]:
    """A sample's text, cut where loss begins and ends, and whether each part carries loss; no part is empty."""
    ids: list[int] = sample.ids.tolist()
    return [(_added(tokenizer, ids, start, end), trained) for start, end, trained in _bounds(sample)]


def pieces(tokenizer: Any, sample: TokenizedSample) -> Iterator[Piece]:
    """A sample token by token."""
    ids: list[int] = sample.ids.tolist()
    added: Container[int] = tokenizer.added_tokens_decoder
    for first, last, trained in _bounds(sample):
        start = first
        for end in range(first + 1, last + 1):
            text = _added(tokenizer, ids, start, end)
            whole = text and not text.endswith(_REPLACEMENT)
            if whole or end == last or end - start == _LONGEST_PIECE:
                yield Piece(start, tuple(ids[start:end]), text, trained, ids[start] in added)
                start = end


def cut(sample: TokenizedSample, longest: int) -> TokenizedSample:
    """The first ``longest`` tokens of a sample, as training sees them under ``--over_long truncate``."""
    spans = sample.spans[sample.spans[:, 0] < longest].clip(max=longest)
    return TokenizedSample(sample.ids[:longest], spans)


def _bounds(sample: TokenizedSample) -> Iterator[tuple[int, int, bool]]:
    position = 0
    for start, end in sample.spans.tolist():
        if position < start:
            yield position, start, False
        yield start, end, True
        position = end
    if position < len(sample.ids):
        yield position, len(sample.ids), False


def _added(tokenizer: Any, ids: Sequence[int], start: int, end: int) -> str:
    """The text that tokens ``start`` to before ``end`` add to what stands before them."""
    context = ids[max(0, start - _CONTEXT) : start]
    before, both = _decode(tokenizer, context), _decode(tokenizer, [*context, *ids[start:end]])
    return both[len(before) :] if both.startswith(before) else _decode(tokenizer, ids[start:end])


def _decode(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
