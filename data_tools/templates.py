"""Choose the chat template and render with it.

Rendering is transformers' own ``apply_chat_template``, so a training text is what inference renders. Which control
tokens a template uses, and whether it reads ``reasoning_content``, is read from its source: no list of model names.
"""

import difflib
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from .schema import DataError, Message, Rejected
from .template_names import ALIASES, resolve
from .thinking import TAG

FOLDER = Path(__file__).parent / "chat_templates"
_SCAFFOLD = re.compile(r"<[|｜][^<>]*[|｜]>")  # words that look like control tokens
_PLAIN_WORDS = "Plain words, no tokens:"


def shipped() -> list[str]:
    """Names of the chat templates that come with finebridge."""
    return sorted(path.stem for path in FOLDER.glob("*.jinja"))


def template_source(name_or_path: str) -> str:
    """The Jinja source of a shipped template, of another system's name for one, or of the user's own file.

    Raises DataError with the nearest name.
    """
    own = Path(name_or_path)
    if os.path.isfile(own):  # noqa: PTH113 - False, too, for a name too long to be a path
        return own.read_text(encoding="utf-8")
    name = resolve(name_or_path) or name_or_path
    if name in shipped():
        return (FOLDER / f"{name}.jinja").read_text(encoding="utf-8")
    near = difflib.get_close_matches(name_or_path, [*shipped(), *ALIASES], n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"shipped are {', '.join(shipped())}"
    raise DataError(f"--chat_template {name_or_path}: no such file and no shipped template of that name; {hint}")


class Rendering(Protocol):
    """What a proof needs of a chat template; see ChatTemplate, which is the real one."""

    source: str
    special_tokens: frozenset[str]
    token_pattern: re.Pattern[str]

    def render(self, messages: Sequence[Message], *, prompt: bool, kwargs: Mapping[str, Any]) -> str:
        """The text of a conversation; with ``prompt`` the inference prompt for the next assistant turn."""
        ...


class ChatTemplate:
    """A tokenizer with the template that it renders with.

    ``chosen`` is a shipped name, a file or None for the tokenizer's own. After construction the tokenizer carries the
    template, so it is saved with every checkpoint. Raises DataError when there is no template or it does not render.
    """

    def __init__(self, tokenizer: Any, chosen: str | None) -> None:
        if chosen is not None:
            tokenizer.chat_template = template_source(chosen)
        if isinstance(tokenizer.chat_template, dict):
            tokenizer.chat_template = tokenizer.chat_template.get("default")
        if not tokenizer.chat_template:
            raise DataError(
                f"the tokenizer {tokenizer.name_or_path} has no chat template; choose one with --chat_template "
                f"({', '.join(shipped())}, or the path of a .jinja file)"
            )
        self.tokenizer = tokenizer
        self.source: str = tokenizer.chat_template
        self.reads_reasoning = "reasoning_content" in self.source
        added: dict[str, int] = tokenizer.get_added_vocab()
        special = {str(token) for token in tokenizer.all_special_tokens}
        special |= {str(token) for token in tokenizer.added_tokens_decoder.values() if token.special}
        self.special_tokens = frozenset(special)
        shown = self.source + self._probe(chosen)  # a template may join a token's name from pieces
        self.control_tokens = self.special_tokens | {token for token in added if token in shown or TAG.fullmatch(token)}
        tokens = sorted(self.control_tokens | set(added), key=len, reverse=True)
        self.token_pattern = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self.token_ids: dict[str, int] = {token: tokenizer.convert_tokens_to_ids(token) for token in tokens}

    def render(self, messages: Sequence[Message], *, prompt: bool, kwargs: Mapping[str, Any]) -> str:
        """The text of a conversation; with ``prompt`` the inference prompt that asks for the next assistant turn.

        Raises Rejected when the template refuses the conversation.
        """
        try:
            return self.tokenizer.apply_chat_template(
                [message.as_dict() for message in messages], tokenize=False, add_generation_prompt=prompt, **kwargs
            )
        except Exception as error:  # noqa: BLE001 - a template is a program of its own: whatever it raises is its word
            raise Rejected("template_error", f"{type(error).__name__}: {error}") from None

    def literals_of(self, message: Message) -> frozenset[str]:
        """The control tokens that are plain words in this message's text.

        In an assistant's text the think/answer tags and non-special tokens (``<tool_call>``) are meant; all else that
        looks like a control token, and every one in other roles' texts, is only text.
        """
        if message.role != "assistant":
            return self.control_tokens
        return frozenset(token for token in self.special_tokens if not TAG.fullmatch(token))

    def _probe(self, chosen: str | None) -> str:
        """A plain question and answer as rendered. Raises DataError: now, with the template's name, not once a row."""
        name = chosen or "of the tokenizer"
        question = [Message("user", "q")]
        try:
            text = self.render([*question, Message("assistant", "a")], prompt=False, kwargs={})
            text += self.render(question, prompt=True, kwargs={})
        except Rejected as error:
            raise DataError(
                f"the chat template {name} does not render a plain question and answer with {self.tokenizer.name_or_path}: "
                f"{error.detail}; choose the template of this model's family with --chat_template"
            ) from None
        if chosen is None:
            return text  # the tokenizer's own may well write such words as plain text
        words = set(_SCAFFOLD.findall(text)) - set(
            _SCAFFOLD.findall(self.source.partition(_PLAIN_WORDS)[2].partition("#}")[0])
        )
        if lacking := sorted(words - set(self.tokenizer.get_added_vocab()) - self.special_tokens):
            raise DataError(
                f"the tokenizer {self.tokenizer.name_or_path} has no token {lacking[0]}, which the chat template {name} "
                "writes; choose the template of this model's family with --chat_template (a template of your own says "
                f"{{#- {_PLAIN_WORDS} {lacking[0]} -#}} where the model knows it as plain text)"
            )
        return text
