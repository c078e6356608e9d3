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
from typing import Any, cast

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
        self._control_ids = {self._ids[token] for token in template.control_tokens if token in self._ids}
        self._control_ids.discard(self.tokenizer.unk_token_id)  # what stands for any text is no control token

    def encode(self, sample: Sample) -> list[TokenizedSample]:
        """The samples of one conversation, at least one. Raises Rejected."""
        self._check_kwargs(sample)
        messages, literals = self._neutralise(sample.messages)
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
        self, history: Sequence[Message], checked: int, kwargs: Mapping[str, Any], literals: Mapping[str, str]
    ) -> _Turn:
        """The last turn of ``history`` as prompt and answer ids; messages before ``checked`` were seen in a prompt.

        Raises Rejected when a proof fails.
        """
        where = f"message {len(history)}"
        full = self.template.render(history, prompt=False, kwargs=kwargs)
        special = [match for match in self._split.finditer(full) if match[0] in self.template.special_tokens]
        if not special or full[special[-1].end() :].strip():
            raise Rejected(
                "no_terminator", f"{where}: the template ends the turn with no control token; it would never stop"
            )
        full, said = full[: special[-1].end()], full[: special[-1].start()]
        prompt = self._prompt_of(history, said, kwargs, where)
        for number, message in enumerate(history[checked:-1], checked + 1):
            if message.role != "assistant" and not _occurs(message.content, prompt):
                raise Rejected("turn_dropped", f"message {number}: the template leaves this {message.role} turn out")
        completion = full[len(prompt) :]
        prompt_ids, both = self._encode(prompt, literals), self._encode(full, literals)
        seam = both[: len(prompt_ids)] == prompt_ids
        answer_ids = both[len(prompt_ids) :] if seam else self._encode(completion, literals)
        if not answer_ids or answer_ids[-1] not in self._special_ids:
            raise Rejected("no_terminator", f"{where}: the turn's last token is not the control token that ends it")
        if not self._says(prompt_ids, answer_ids, _restore(completion, literals)):
            raise Rejected("not_reversible", f"{where}: the tokens of the answer do not decode to the answer")
        return _Turn(prompt_ids, answer_ids)

    def _prompt_of(self, history: Sequence[Message], said: str, kwargs: Mapping[str, Any], where: str) -> str:
        """The inference prompt that ``said`` (the text up to the terminator) continues with the whole answer.

        Inference may ask with thinking on (the template's default) or, where the template knows the switch and the row
        does not set it, off. A question marked ``/no_think`` is asked the default way; else the prompt after which
        exactly the answer's own text follows is preferred, so that an empty thought that only the template adds stays
        in the prompt, without loss.
        """
        answer = history[-1]
        switches: list[dict[str, Any]] = [{}]
        if "enable_thinking" in self.template.source and "enable_thinking" not in kwargs:
            switches.append({"enable_thinking": False})
        prompts = [self.template.render(history[:-1], prompt=True, kwargs={**kwargs, **switch}) for switch in switches]
        found = [prompt for prompt in prompts if said.startswith(prompt) and _holds(said[len(prompt) :], answer)]
        if not found:
            raise Rejected(
                "prompt_differs",
                f"{where}: the training text is not the inference prompt and then the answer as it stands "
                "(the template changes it; do the row's thinking settings and its thoughts agree?)",
            )
        question = next((message.content for message in reversed(history[:-1]) if message.role == "user"), "")
        if not question.startswith(NO_THINK) and not answer.reasoning:
            for prompt in found:
                if said[len(prompt) :].strip() == answer.content.strip():
                    return prompt
        return found[0]

    def _check_kwargs(self, sample: Sample) -> None:
        """Refuse what the template would ignore, and control tokens where they cannot be kept apart."""
        for name in sample.template_kwargs:
            if name not in self.template.source:
                raise Rejected("template_ignores", f"the chat template does not read the row's {name!r}")
        values = [*sample.template_kwargs.values(), *(value for m in sample.messages for value in m.extra.values())]
        for match in self._split.finditer(json.dumps(values, ensure_ascii=False)):
            if match[0] in self.template.control_tokens:
                raise Rejected(
                    "control_token_in_tools", f"{match[0]!r} stands in a tool, a call or a template variable"
                )

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
        ids = self._ids_of(text, literals)
        wanted = sum(match[0] in self.template.control_tokens for match in self._split.finditer(text))
        if sum(token in self._control_ids for token in ids) != wanted:
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


def _holds(said: str, answer: Message) -> bool:
    """Whether a rendered turn says the answer and nothing else.

    The text must stand at its end, to the letter but for white space at its ends; before it only the thought may stand,
    with tags and white space as the template likes them. Tools called must be there with every string of their arguments.
    """
    calls: list[Any] = answer.extra.get("tool_calls", [])
    if calls:
        wanted = [text for call in calls for text in _strings(call.get("function") or call)]
        return answer.content.strip() in said and all(said.count(text) >= wanted.count(text) for text in wanted)
    ways = [(answer.reasoning or "", answer.content)]
    thought, closed, text = answer.content.partition("</think>")
    if closed and thought.lstrip().startswith("<think>"):
        ways.append((thought, text))  # a template may render the thought of the content in its own way
    return any(
        said.rstrip().endswith(text.strip()) and _letters(said.rstrip().removesuffix(text.strip())) == _letters(thought)
        for thought, text in ways
    )


def _strings(value: Any) -> list[str]:
    """Every string in a tool call, JSON texts opened: names and arguments."""
    if isinstance(value, dict):
        return [
            text for key, inner in cast("dict[str, Any]", value).items() if key != "type" for text in _strings(inner)
        ]
    if isinstance(value, list):
        return [text for inner in cast("list[Any]", value) for text in _strings(inner)]
    if isinstance(value, str) and value.lstrip().startswith("{"):
        try:
            return _strings(json.loads(value))
        except ValueError:
            return [value]
    return [json.dumps(value, ensure_ascii=False)[1:-1]] if isinstance(value, str) else []


def _occurs(content: str, text: str) -> bool:
    """Whether a turn's text stands in a rendered text, as it is or as a JSON string, white space aside."""
    bare = _SPACE.sub("", text)
    as_json = json.dumps(content, ensure_ascii=False)[1:-1]
    return _SPACE.sub("", content) in bare or _SPACE.sub("", as_json) in bare


def _letters(text: str) -> str:
    """A text without think/answer tags and white space: what a template may not change."""
    return _SPACE.sub("", _TAG.sub("", text))
