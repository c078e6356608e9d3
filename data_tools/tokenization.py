"""Samples to token ids and loss spans, each span proven.

For every trained turn three things hold, or the row is rejected with the reason: the tokens before the span are the
tokens of the *inference* prompt of that history; the span decodes to the answer; its last token is the control token
that ends the turn. Where a template changes earlier turns (drops their thoughts) a conversation becomes several
samples, one for each stretch in which this is true. Labels are unshifted.
"""

import json
import re
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import numpy as np

from .arguments import MaskCompat
from .plans import Plan
from .proof import prove_turn
from .schema import DataError, Document, Message, Rejected, Sample, TokenizedSample
from .templates import ChatTemplate

# Stand-ins for control tokens that are only text: private-use characters that no chat template looks at.
_STAND_IN_BASE = 0xF0000


@dataclass(frozen=True, slots=True)
class _Turn:
    """One proven turn: prompt ids, answer ids (terminator last)."""

    prompt: list[int]
    answer: list[int]


class TextEncoder:
    """Rendered texts to token ids by ``tokenizers``, with control tokens kept apart from words that look like them.

    ``pattern`` finds every control and added token; ``plain`` is the tokenizer without them, None for one that is not
    of the ``tokenizers`` library.
    """

    def __init__(self, tokenizer: Any, pattern: re.Pattern[str], control_tokens: frozenset[str]) -> None:
        self.tokenizer = tokenizer
        self.pattern = pattern
        self.control_tokens = control_tokens
        added = tokenizer.get_added_vocab()
        self.token_ids: dict[str, int] = {
            token: tokenizer.convert_tokens_to_ids(token) for token in control_tokens | set(added)
        }
        self.control_ids = {self.token_ids[token] for token in control_tokens}
        self.control_ids.discard(tokenizer.unk_token_id)  # what stands for any text is no control token

    @cached_property
    def plain(self) -> Any | None:
        """Made when it is first needed: it is a second tokenizer in memory."""
        return _plain_encoder(self.tokenizer)

    def neutralise(self, text: str, only_text: Container[str], marks: dict[str, str]) -> str:
        """The text with a stand-in for each control token that is only text; ``marks`` (token to stand-in) grows.

        Raises Rejected when the text holds what stand-ins are made of, or the tokenizer cannot keep them apart.
        """

        def stand_in(match: re.Match[str]) -> str:
            token = match[0]
            return marks.setdefault(token, chr(_STAND_IN_BASE + len(marks))) if token in only_text else token

        changed = self.pattern.sub(stand_in, text)
        if changed != text and self.plain is None:
            raise Rejected(
                "control_token_in_text",
                f"the text contains {next(iter(marks))!r}, which this tokenizer can only read as a control token",
            )
        return changed

    def encode(self, text: str, literals: Mapping[str, str]) -> list[int]:
        """Token ids of a rendered text; stand-ins become the plain sub-words of what they stand for."""
        ids = self._ids_of(text, literals)
        wanted = sum(match[0] in self.control_tokens for match in self.pattern.finditer(text))
        if sum(token in self.control_ids for token in ids) != wanted:
            raise Rejected("control_token_in_text", "the tokenizer reads a control token where the text has none")
        return ids

    def _ids_of(self, text: str, literals: Mapping[str, str]) -> list[int]:
        if not literals:
            return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
        harmless = "".join("x" if char in literals else char for char in text)
        if (
            self._by_pieces(harmless, {})
            != self.tokenizer(harmless, add_special_tokens=False, verbose=False)["input_ids"]
        ):
            raise Rejected(
                "control_token_in_text", "control tokens in the text cannot be kept apart with this tokenizer"
            )
        return self._by_pieces(text, literals)

    def _by_pieces(self, text: str, literals: Mapping[str, str]) -> list[int]:
        assert self.plain is not None
        ids: list[int] = []
        position = 0
        for match in [*self.pattern.finditer(text), None]:
            piece = text[position : match.start() if match else len(text)]
            if piece:
                ids += self.plain.encode(_restore(piece, literals), add_special_tokens=False).ids
            if match:
                ids.append(self.token_ids[match[0]])
                position = match.end()
        return ids


class Tokenization:
    """Turns samples into TokenizedSamples with one chat template.

    ``mask_compat="hunyuan"`` gives the loss of Tencent's scripts: the control token that opens the answer carries loss
    too. ``neutralised`` counts the rows in which a control token stood in plain text and was encoded as such.
    """

    def __init__(self, template: ChatTemplate, mask_compat: MaskCompat = "none") -> None:
        self.template = template
        self.tokenizer = template.tokenizer
        self.mask_compat = mask_compat
        self.neutralised = 0
        self.text = TextEncoder(self.tokenizer, template.token_pattern, template.control_tokens)
        self.special_ids = {template.token_ids[token] for token in template.special_tokens}

    def encode(self, sample: Sample) -> list[TokenizedSample]:
        """The samples of one conversation, at least one. Raises Rejected."""
        self.check_kwargs(sample)
        messages, literals = self._neutralise(sample)
        self.neutralised += bool(literals)
        stretches: list[tuple[list[int], list[tuple[int, int]]]] = []
        checked = 0
        for index, message in enumerate(messages):
            if not message.trained:
                continue
            turn = self._prove(messages[: index + 1], checked, sample.template_kwargs, literals)
            checked = index + 1
            start = len(turn.prompt)
            if self.mask_compat == "hunyuan":
                if not turn.prompt or turn.prompt[-1] not in self.special_ids:
                    raise Rejected(
                        "mask_compat", "the prompt does not end in a control token, as --mask_compat hunyuan needs"
                    )
                start -= 1
            ids = turn.prompt + turn.answer
            span = (start, len(ids))
            if stretches and turn.prompt[: len(stretches[-1][0])] == stretches[-1][0]:
                stretches[-1] = (ids, [*stretches[-1][1], span])
            else:
                stretches.append((ids, [span]))
        return [
            TokenizedSample(np.asarray(ids, dtype=np.int32), np.asarray(spans, dtype=np.int32))
            for ids, spans in stretches
        ]

    def _prove(
        self, history: Sequence[Message], checked: int, kwargs: Mapping[str, Any], literals: Mapping[str, str]
    ) -> _Turn:
        """The last turn of ``history`` as prompt and answer ids; messages before ``checked`` were seen in a prompt.

        Raises Rejected when a proof fails.
        """
        where = f"message {len(history)}"
        proven = prove_turn(self.template, history, checked, kwargs)
        prompt, completion = proven.prompt, proven.completion
        prompt_ids, both = self.text.encode(prompt, literals), self.text.encode(prompt + completion, literals)
        seam = both[: len(prompt_ids)] == prompt_ids
        answer_ids = both[len(prompt_ids) :] if seam else self.text.encode(completion, literals)
        if not answer_ids or answer_ids[-1] not in self.special_ids:
            raise Rejected("no_terminator", f"{where}: the turn's last token is not the control token that ends it")
        if not self._says(prompt_ids, answer_ids, _restore(completion, literals)):
            raise Rejected("not_reversible", f"{where}: the tokens of the answer do not decode to the answer")
        return _Turn(prompt_ids, answer_ids)

    def check_kwargs(self, sample: Sample) -> None:
        """Refuse what the template would ignore, and control tokens where they cannot be kept apart."""
        for name in sample.template_kwargs:
            if name not in self.template.source:
                raise Rejected("template_ignores", f"the chat template does not read the row's {name!r}")
        values = [*sample.template_kwargs.values(), *(value for m in sample.messages for value in m.extra.values())]
        if not values:
            return
        try:
            written = json.dumps(values, ensure_ascii=False)
        except (RecursionError, TypeError):
            raise Rejected("bad_template_kwargs", "a tool, a call or a template variable is no plain JSON") from None
        for match in self.template.token_pattern.finditer(written):
            if match[0] in self.template.control_tokens:
                raise Rejected(
                    "control_token_in_tools", f"{match[0]!r} stands in a tool, a call or a template variable"
                )

    def _neutralise(self, sample: Sample) -> tuple[list[Message], dict[str, str]]:
        """Messages with stand-ins for control tokens that are only text, and what each stand-in means."""
        marks: dict[str, str] = {}
        result: list[Message] = []
        for message in sample.messages:
            only_text = self.template.literals_of(message)
            text = self.text.neutralise(message.content, only_text, marks)
            thought = message.reasoning
            thought = self.text.neutralise(thought, only_text, marks) if thought is not None else None
            result.append(replace(message, content=text, reasoning=thought))
        if marks and any(map(_is_private, _texts(sample))):
            raise Rejected("private_characters", "control tokens stand beside private characters (U+F0000) in the text")
        return result, {mark: token for token, mark in marks.items()}

    def has_literals(self, sample: Sample) -> bool:
        """Whether a word that only looks like a control token stands in the conversation."""
        return any(
            match[0] in self.template.literals_of(message)
            for message in sample.messages
            for text in (message.content, message.reasoning or "")
            for match in self.template.token_pattern.finditer(text)
        )

    def _says(self, prompt: list[int], answer: list[int], text: str) -> bool:
        """Whether the answer's ids decode to the text, alone or after the prompt, up to the Unicode normaliser."""
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        wanted = {text, normalizer.normalize_str(text)} if normalizer is not None else {text}
        if self._decode(answer) in wanted:
            return True
        before = self._decode(prompt)  # decoders of the SentencePiece kind drop a leading space of what they are given
        together = self._decode(prompt + answer)
        return together.startswith(before) and together[len(before) :] in wanted

    def _decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)


class DocumentTokenization:
    """Plain text to ids for pretraining, as Megatron-LM's ``tools/preprocess_data.py`` writes them.

    The tokenizer's own special tokens stand around each document (a begin token for Llama, none for Qwen); with
    ``append_eod`` the end-of-text token follows. A control token's name inside a document is only text. Every token
    carries loss. Raises DataError when ``append_eod`` is asked of a tokenizer without such a token.
    """

    def __init__(self, tokenizer: Any, *, append_eod: bool) -> None:
        added = frozenset(tokenizer.get_added_vocab())
        special = frozenset(str(token) for token in tokenizer.all_special_tokens)
        self.control_tokens = special | {
            str(token) for token in tokenizer.added_tokens_decoder.values() if token.special
        }
        longest_first = sorted(self.control_tokens | added, key=len, reverse=True)
        self.token_pattern = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")
        self.text = TextEncoder(tokenizer, self.token_pattern, self.control_tokens)
        self.neutralised = 0
        bare = tokenizer("a", add_special_tokens=False)["input_ids"]
        framed = tokenizer("a")["input_ids"]
        start = next(i for i in range(len(framed)) if framed[i : i + len(bare)] == bare)
        self.before: list[int] = framed[:start]
        self.after: list[int] = framed[start + len(bare) :]
        if append_eod:
            if tokenizer.eos_token_id is None:
                raise DataError("--append_eod: the tokenizer has no end-of-text token")
            self.after = [*self.after, tokenizer.eos_token_id]
        self.plan = Plan.of_document(self.before, self.after)

    def has_literals(self, document: Document) -> bool:
        """Whether the name of a control token or an added token stands in the text."""
        return self.token_pattern.search(document.text) is not None

    def encode(self, document: Document) -> list[TokenizedSample]:
        """The document as one sample. Raises Rejected."""
        if not document.text:
            raise Rejected("empty_text", "the document is empty")
        marks: dict[str, str] = {}
        text = self.text.neutralise(document.text, self.control_tokens, marks)
        if marks and _is_private(document.text):
            raise Rejected("private_characters", "control tokens stand beside private characters (U+F0000) in the text")
        self.neutralised += bool(marks)
        ids = self.text.encode(text, {mark: token for token, mark in marks.items()})
        if not ids:
            raise Rejected("empty_text", "the tokenizer makes no token of the document")
        ids = [*self.before, *ids, *self.after]
        return [TokenizedSample(np.asarray(ids, np.int32), np.asarray([[0, len(ids)]], np.int32))]


def _texts(sample: Sample) -> list[str]:
    """Every text of a conversation; its tools, calls and template variables as JSON."""
    texts = [text for message in sample.messages for text in (message.content, message.reasoning or "")]
    rest = [dict(sample.template_kwargs), *(dict(message.extra) for message in sample.messages)]
    return [*texts, json.dumps(rest, ensure_ascii=False)]


def _is_private(text: str) -> bool:
    return not text.isascii() and any(_STAND_IN_BASE <= ord(char) <= _STAND_IN_BASE + 0xFFFD for char in text)


def _plain_encoder(tokenizer: Any) -> Any | None:
    """The tokenizer without any added token, or None for a tokenizer that is not of the ``tokenizers`` library."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    settings = json.loads(backend.to_str())
    settings["added_tokens"] = []
    settings["post_processor"] = settings["truncation"] = settings["padding"] = None
    return type(backend).from_str(json.dumps(settings))


def _restore(text: str, literals: Mapping[str, str]) -> str:
    for mark, token in literals.items():
        text = text.replace(mark, token)
    return text
