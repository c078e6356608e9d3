"""Conversations that are over the limit: cut at whole turns, so that every sample is proven like any other."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from .arguments import OverLong
from .schema import Message, Rejected, Sample, TokenizedSample

BUILD_TIME: tuple[OverLong, ...] = (
    "split_turns",
    "truncate_context",
)  # the other policies are applied when data is read

Encode = Callable[[Sample], list[TokenizedSample]]


def fits(samples: Sequence[TokenizedSample], longest: int) -> bool:
    """Whether every sample has at most ``longest`` tokens."""
    return all(sample.ids.size <= longest for sample in samples)


def loss_remains(
    spans: npt.NDArray[np.integer[Any]], counts: npt.NDArray[np.integer[Any]], longest: int
) -> npt.NDArray[np.bool_]:
    """Whether a token that is predicted with loss is left of each sample when it is cut after ``longest`` tokens.

    ``spans`` are those of all samples, [start, end) with shape [spans, 2]; ``counts``, shape [samples], says how many each
    has. The first token of a sample is never predicted.
    """
    first = np.maximum(spans[:, 0], 1)
    predicted = (first < spans[:, 1]) & (first < longest)
    owners = np.repeat(np.arange(len(counts)), counts)
    return np.bincount(owners[predicted], minlength=len(counts)) > 0


def shorten(sample: Sample, encode: Encode, longest: int, policy: OverLong) -> list[TokenizedSample]:
    """The samples of a conversation that is too long, each at most ``longest`` tokens; ``policy`` is one of BUILD_TIME.

    ``truncate_context`` drops the earliest exchanges and keeps the last ones whole; ``split_turns`` makes several
    conversations of it, each of whole exchanges that follow one another. The system prompt stays in front of each. An
    exchange is a user turn with all that follows up to the next one. For ``split_turns`` one without a trained turn is
    context of the next that has one: as many as fit stay with it, the earliest go first. Raises Rejected (``over_long``)
    when a single exchange does not fit.
    """
    head = sample.messages[: sample.messages[0].role == "system"]
    exchanges = _exchanges(sample.messages[len(head) :])

    def fitting(part: Sequence[Sequence[Message]]) -> list[TokenizedSample]:
        """The samples of some exchanges; none when one is too long, or nothing is trained."""
        messages = (*head, *(turn for exchange in part for turn in exchange))
        if not any(message.trained for message in messages):
            return []
        made = encode(replace(sample, messages=messages))
        return made if fits(made, longest) else []

    def cut_to(first: int, end: int) -> tuple[int, list[TokenizedSample]]:
        """Where the exchanges that fit begin, at ``first`` or later, and their samples."""
        for start in range(first, end):
            if made := fitting(exchanges[start:end]):
                return start, made
        raise Rejected("over_long", f"an exchange of this conversation is over {longest} tokens by itself")

    if policy == "truncate_context":
        return cut_to(1, len(exchanges))[1]
    ends = [number for number, turns in enumerate(exchanges, 1) if any(turn.trained for turn in turns)]
    result: list[TokenizedSample] = []
    first = 0
    while ends:
        first, made = cut_to(first, ends[0])
        taken = 1
        while taken < len(ends) and (longer := fitting(exchanges[first : ends[taken]])):
            made, taken = longer, taken + 1
        result += made
        first, ends = ends[taken - 1], ends[taken:]
    return result


def _exchanges(messages: Sequence[Message]) -> list[list[Message]]:
    exchanges: list[list[Message]] = []
    before = "assistant"
    for message in messages:
        if message.role == "user" and before != "user":
            exchanges.append([])
        exchanges[-1].append(message)
        before = message.role
    return exchanges
