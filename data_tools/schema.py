"""Message, Sample and TokenizedSample: the one form that all stages meet in."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

ROLES = ("system", "user", "assistant", "tool")
Kind = Literal["chat", "preference", "document"]
"""What the rows of a prepared dataset are: conversations, pairs of answers, or plain text for pretraining."""


class Rejected(ValueError):  # noqa: N818 - it is an outcome of a row, like Sample, not a fault of the program
    """A row that is not trained on: ``code`` is counted, ``detail`` tells the user what is wrong with this row."""

    def __init__(self, code: str, detail: str) -> None:
        super().__init__(f"{code}: {detail}")
        self.code = code
        self.detail = detail

    def __reduce__(self) -> tuple[type["Rejected"], tuple[str, str]]:
        """Pickled by what it was made from: it travels between processes."""
        return type(self), (self.code, self.detail)


class DataError(ValueError):
    """The data as a whole cannot be used; the message names the file and what to do."""


@dataclass(frozen=True, slots=True)
class Origin:
    """Where a row comes from: a file, its line (or row of a table), counted from 1, and the byte at which a line starts.

    ``offset`` counts bytes of the decompressed file; it is -1 for the rows of tables (Parquet, Arrow, CSV).
    """

    file: Path
    line: int
    offset: int = -1

    def __str__(self) -> str:
        return f"{self.file}:{self.line}"


@dataclass(frozen=True, slots=True)
class Message:
    """One turn.

    ``reasoning`` is a thought kept apart from the content (``reasoning_content``). ``trained`` says whether an
    assistant turn carries loss. ``extra`` holds what only a chat template reads (tool calls, names), unchanged.
    """

    role: str
    content: str
    reasoning: str | None = None
    trained: bool = True
    extra: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def as_dict(self) -> dict[str, Any]:
        """The message as a chat template reads it."""
        value: dict[str, Any] = {"role": self.role, "content": self.content, **self.extra}
        if self.reasoning is not None:
            value["reasoning_content"] = self.reasoning
        return value


@dataclass(frozen=True, slots=True)
class Sample:
    """A conversation; ``template_kwargs`` are this row's own template variables (``reasoning_effort``, ``tools``)."""

    messages: tuple[Message, ...]
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])


@dataclass(frozen=True, slots=True)
class Preference:
    """Two answers to one conversation, of which ``chosen`` is the better one; both share every turn before the last."""

    chosen: Sample
    rejected: Sample


@dataclass(frozen=True, slots=True)
class Document:
    """Plain text for pretraining: every token carries loss."""

    text: str


@dataclass(frozen=True, slots=True)
class TokenizedSample:
    """Token ids (int32, shape [n]) and loss spans (int32, shape [s, 2], half-open [start, end) over the ids).

    Labels are not shifted: the token at position i is predicted from the tokens before i.
    """

    ids: npt.NDArray[np.int32]
    spans: npt.NDArray[np.int32]
