"""Samples to token ids and loss spans, each span proven.

For every trained turn three things hold, or the row is rejected with the reason: the tokens before the span are the
tokens of the *inference* prompt of that history; the span decodes to the answer; its last token is the control token
that ends the turn. Where a template changes earlier turns (drops their thoughts) a conversation becomes several
samples, one for each stretch in which this is true. Labels are unshifted.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from .arguments import MaskCompat
from .schema import Message, Rejected, Sample, TokenizedSample
from .templates import ChatTemplate
from .thinking import NO_THINK

_SPACE = re.compile(r"\s+")
_TAG = re.compile(r"</?(?:think|answer)(?::[^<>]*)?>")  # Hy3's tags carry a suffix: <think:opensource>
# Stand-ins for control tokens that are only text: private-use characters that no chat template looks at.
_STAND_IN_BASE = 0xF0000


@dataclass(frozen=True, slots=True)
class _Turn:
    """One proven turn: prompt ids, answer ids (terminator last)."""

    prompt: list[int]
    answer: list[int]


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
        self._plain = _plain_encoder(self.tokenizer)
        tokens = sorted(template.control_tokens | set(self.tokenizer.get_added_vocab()), key=len, reverse=True)
        self._split = re.compile("|".join(map(re.escape, tokens)) or "(?!)")
        self._ids: dict[str, int] = {token: self.tokenizer.convert_tokens_to_ids(token) for token in tokens}
        self._special_ids = {self._ids[token] for token in template.special_tokens if token in self._ids}

    def encode(self, sample: Sample) -> list[TokenizedSample]:
        """The samples of one conversation, at least one. Raises Rejected."""
        messages, literals = self._neutralise(sample.messages)
        self.neutralised += bool(literals)
        stretches: list[tuple[list[int], list[tuple[int, int]]]] = []
        for index, message in enumerate(messages):
            if not message.trained:
                continue
            turn = self._prove(messages[: index + 1], sample.template_kwargs, literals, index)
            start = len(turn.prompt)
            if self.mask_compat == "hunyuan":
                if turn.prompt[-1] not in self._special_ids:
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
        self, history: Sequence[Message], kwargs: Mapping[str, Any], literals: Mapping[str, str], index: int
    ) -> _Turn:
        """The last turn of ``history`` as prompt and answer ids. Raises Rejected when a proof fails."""
        where = f"message {index + 1}"
        full = self.template.render(history, prompt=False, kwargs=kwargs)
        prompt, completion = self._cut(history, full, kwargs, where)
        pieces = list(self._split.finditer(completion))
        ends = [piece.end() for piece in pieces if piece[0] in self.template.special_tokens]
        if not ends or completion[ends[-1] :].strip():
            raise Rejected(
                "no_terminator", f"{where}: the template ends the turn with no control token; it would never stop"
            )
        completion = completion[: ends[-1]]
        prompt_ids = self._encode(prompt, literals)
        both = self._encode(prompt + completion, literals)
        answer_ids = (
            both[len(prompt_ids) :] if both[: len(prompt_ids)] == prompt_ids else self._encode(completion, literals)
        )
        if not answer_ids or answer_ids[-1] not in self._special_ids:
            raise Rejected("no_terminator", f"{where}: the turn's last token is not the control token that ends it")
        if not self._says(answer_ids, _restore(completion, literals)):
            raise Rejected("not_reversible", f"{where}: the tokens of the answer do not decode to the answer")
        return _Turn(prompt_ids, answer_ids)

    def _cut(self, history: Sequence[Message], full: str, kwargs: Mapping[str, Any], where: str) -> tuple[str, str]:
        """The inference prompt that ``full`` continues, and the continuation.

        Inference may ask with thinking on (the template's default) or off. A question marked ``/no_think`` is asked
        the default way; else the prompt after which exactly the answer's own text follows is preferred, so that an
        empty thought that only the template adds stays in the prompt, without loss.
        """
        answer = history[-1]
        found: list[tuple[str, str]] = []
        for switch in ({}, {"enable_thinking": False}):
            prompt = self.template.render(history[:-1], prompt=True, kwargs={**kwargs, **switch})
            if full.startswith(prompt) and len(prompt) < len(full):
                completion = full[len(prompt) :]
                if _holds(completion, answer):
                    found.append((prompt, completion))
        if not found:
            raise Rejected(
                "prompt_differs",
                f"{where}: the training text does not continue the inference prompt with the whole answer "
                "(the template changes or drops part of it; do the row's thinking settings and its thoughts agree?)",
            )
        question = next((message.content for message in reversed(history[:-1]) if message.role == "user"), "")
        if not question.startswith(NO_THINK):
            for prompt, completion in found:
                if _SPACE.sub("", completion).startswith(_SPACE.sub("", answer.content)) and not answer.reasoning:
                    return prompt, completion
        return found[0]

    def _neutralise(self, messages: Sequence[Message]) -> tuple[list[Message], dict[str, str]]:
        """Messages with stand-ins for control tokens that are only text, and what each stand-in means."""
        marks: dict[str, str] = {}

        result: list[Message] = []
        for message in messages:
            only_text = self.template.literals_of(message)
            text, thought = message.content, message.reasoning
            if any(_STAND_IN_BASE <= ord(c) <= _STAND_IN_BASE + 0xFFFD for c in text + (thought or "")):
                raise Rejected(
                    "private_characters", "the text uses the private-use plane U+F0000, which is reserved here"
                )

            def stand_in(match: re.Match[str], only_text: frozenset[str] = only_text) -> str:
                token = match[0]
                return marks.setdefault(token, chr(_STAND_IN_BASE + len(marks))) if token in only_text else token

            text = self._split.sub(stand_in, text)
            thought = self._split.sub(stand_in, thought) if thought is not None else None
            result.append(Message(message.role, text, thought, message.trained, message.extra))
        if marks and self._plain is None:
            raise Rejected(
                "control_token_in_text",
                f"the text contains {next(iter(marks))!r}, which this tokenizer can only read as a control token",
            )
        return result, {mark: token for token, mark in marks.items()}

    def _encode(self, text: str, literals: Mapping[str, str]) -> list[int]:
        """Token ids of a rendered text; stand-ins become the plain sub-words of what they stand for."""
        if not literals:
            return self.tokenizer(text, add_special_tokens=False)["input_ids"]
        harmless = "".join("x" if char in literals else char for char in text)
        if self._by_pieces(harmless, {}) != self.tokenizer(harmless, add_special_tokens=False)["input_ids"]:
            raise Rejected(
                "control_token_in_text", "control tokens in the text cannot be kept apart with this tokenizer"
            )
        return self._by_pieces(text, literals)

    def _by_pieces(self, text: str, literals: Mapping[str, str]) -> list[int]:
        assert self._plain is not None
        ids: list[int] = []
        position = 0
        for match in [*self._split.finditer(text), None]:
            piece = text[position : match.start() if match else len(text)]
            if piece:
                ids += self._plain.encode(_restore(piece, literals), add_special_tokens=False).ids
            if match:
                ids.append(self._ids[match[0]])
                position = match.end()
        return ids

    def _says(self, ids: list[int], text: str) -> bool:
        """Whether ids decode to the text, up to the tokenizer's own Unicode normaliser."""
        decoded = self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
        if decoded == text:
            return True
        normalizer = getattr(getattr(self.tokenizer, "backend_tokenizer", None), "normalizer", None)
        return normalizer is not None and decoded == normalizer.normalize_str(text)


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


def _holds(completion: str, answer: Message) -> bool:
    """Whether a rendered turn says all of the answer: thought and text in this order, and every tool called."""
    calls: list[Any] = answer.extra.get("tool_calls", [])
    names = [str((call.get("function") or call).get("name")) for call in calls]
    said = _letters((answer.reasoning or "") + answer.content)
    return _letters(completion).startswith(said) and all(name in completion for name in names)


def _letters(text: str) -> str:
    """A text without think/answer tags and white space: what a template may not change."""
    return _SPACE.sub("", _TAG.sub("", text))
