"""Plans: what a chat template does to conversations of one shape, learned once and then filled in like a form.

Rendering with Jinja costs more than tokenising. So the first conversations of a shape (roles, which turns are trained,
where tags and outer white space stand) are proven with *opaque* texts: strings that record everything the template asks
of them. A template that only places texts, strips them or looks for fixed words (``'</think>' in content``) must treat
every text without those words alike, so its rendering is a form with blanks. A template that does more (takes lengths,
slices, changes case) gets no plan, and a text that contains such a word has a shape of its own.
"""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Self

import numpy as np
import numpy.typing as npt
import orjson

from .opaque import BLANK, CLOSED, LOOSE, MARK, Log, Watched
from .proof import ProvenTurn, prove_turn
from .schema import Message, Rejected, Sample
from .templates import ChatTemplate, Rendering
from .thinking import NO_THINK, TAGS

_MAX_PLANS = 4096
_MAX_LITERALS = 12  # pieces of a text that are kept as they stand; a text with more is rendered in full

Form = tuple[str | int, ...]  # fixed words and numbers of blanks, in order
Stretch = tuple[str, list[tuple[int, int]]]  # a sample's text and the character spans that carry loss


Ints = npt.NDArray[np.int64]


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversation becomes: samples, each a row of parts, each part a control token or a text.

    ``kinds`` (int32) holds all samples' parts one after the other, ``part_counts`` of them each: a token's id, or -1 for a
    text; ``numbers`` says which of ``texts`` each text part shows, ``text_counts`` of them each. Spans with loss
    (``span_counts`` each) run from the end of ``tails[tail_numbers]``, the prompt's last words, in part ``firsts`` to
    before part ``ends``, counted within the sample.
    """

    kinds: npt.NDArray[np.int32]
    part_counts: Ints
    texts: tuple[Form, ...]
    numbers: Ints
    text_counts: Ints
    firsts: Ints
    ends: Ints
    tails: tuple[Form, ...]
    tail_numbers: Ints
    span_counts: Ints
    plain_tails: list[str] | None  # the tails where none has a blank

    @classmethod
    def of(cls, samples: "Sequence[_Parts]") -> Self:
        """The plan of these samples; what several of them show is kept once."""
        texts = {form: number for number, form in enumerate(dict.fromkeys(f for s in samples for f in s.texts))}
        spans = [span for sample in samples for span in sample.spans]
        tails = {tail: number for number, tail in enumerate(dict.fromkeys(tail for _, tail, _ in spans))}
        return cls(
            np.asarray([kind for sample in samples for kind in sample.kinds], np.int32),
            _ints(len(sample.kinds) for sample in samples),
            tuple(texts),
            _ints(texts[form] for sample in samples for form in sample.texts),
            _ints(len(sample.texts) for sample in samples),
            _ints(first for first, _, _ in spans),
            _ints(end for _, _, end in spans),
            tuple(tails),
            _ints(tails[tail] for _, tail, _ in spans),
            _ints(len(sample.spans) for sample in samples),
            [fill(tail, ()) for tail in tails]
            if all(isinstance(part, str) for tail in tails for part in tail)
            else None,
        )

    @classmethod
    def of_document(cls, before: Sequence[int], after: Sequence[int]) -> Self:
        """The plan of a text for pretraining between these tokens: all of it carries loss."""
        kinds = [*before, -1, *after]
        return cls.of([_Parts(kinds, [(0,)], [(0, (), len(kinds))])])


@dataclass(frozen=True, slots=True)
class _Parts:
    """One sample: ids of control tokens, -1 for a text; the texts; spans as first part, tail, end part."""

    kinds: list[int]
    texts: list[Form]
    spans: list[tuple[int, Form, int]]


_PLAIN = ("", "")  # the literals around a text that is one blank


def _ints(values: Iterable[int]) -> Ints:
    return np.fromiter(values, np.int64)


class Planner:
    """Finds the plan for a conversation, learning it when its shape is new.

    What is learned of a turn holds for every conversation that begins with the same shape up to that turn. It is compared
    with the official rendering of the conversation that it is learned from.
    """

    def __init__(self, template: ChatTemplate) -> None:
        self.template = template
        self._words = set(template.token_ids) | set(TAGS)
        self._plans: dict[Any, Plan | None] = {}
        self._turns: dict[Any, ProvenTurn | None] = {}
        self._loose = True  # until the template is seen to strip the end of a message's text
        self._set_words(frozenset())

    def find(self, sample: Sample) -> tuple[Plan, list[str]] | None:
        """The plan and the texts for its blanks; None when this conversation must be rendered in full.

        Raises Rejected when the conversation, whose shape is new, cannot be proven.
        """
        shape = self._shape(sample)
        if shape is None:
            return None
        key, literals, blanks = shape
        if key not in self._plans:
            if len(self._plans) >= _MAX_PLANS:
                self._plans.clear()
                self._turns.clear()
            plan, log = self._learn(sample, key, literals, blanks)
            if log is not None:
                self._loose = self._loose and not log.stripped
                self._set_words(frozenset(log.words))
                return None
            self._plans[key] = plan
        plan = self._plans[key]
        return None if plan is None else (plan, blanks)

    def _set_words(self, words: frozenset[str]) -> None:
        """Take on words that the template looks for; shapes and plans change with them."""
        self._words |= words
        longest_first = sorted(self._words, key=len, reverse=True)
        self._pattern = re.compile("|".join(map(re.escape, longest_first)))
        self._first = re.compile("[" + "".join(map(re.escape, sorted({word[0] for word in self._words}))) + "]")
        self._heads = {word[:n] for word in self._words for n in range(1, len(word))}
        self._tails = {word[n:] for word in self._words for n in range(1, len(word))}
        self._plans.clear()
        self._turns.clear()

    def _shape(self, sample: Sample) -> tuple[Any, list[list[tuple[str, ...] | None]], list[str]] | None:
        key: list[Any] = []
        blanks: list[str] = []
        literals: list[list[tuple[str, ...] | None]] = []
        for message in sample.messages:
            if message.extra:
                return None
            fields: list[tuple[str, ...] | None] = []
            for text in (message.content, message.reasoning):
                if text is None:
                    fields.append(None)
                    continue
                pieces = self._pieces(text, message, loose=self._loose and text is message.content)
                if pieces is None:
                    return None
                fields.append(pieces[0])
                blanks += pieces[1]
            key.append((message.role, message.trained, *fields))
            literals.append(fields)
        try:
            kwargs = (
                orjson.dumps(dict(sample.template_kwargs)) if sample.template_kwargs else b""
            )  # keys in the row's order, as templates write them
        except TypeError:  # nested deeper than it goes, or no JSON
            return None
        if MARK.encode() in kwargs:
            return None  # it could be taken for a blank
        return (kwargs, *key), literals, blanks

    def _pieces(self, text: str, message: Message, *, loose: bool) -> tuple[tuple[str, ...], list[str]] | None:
        """A text as words that matter to the template and the blanks between them; None when it has too many words.

        White space around words and at the text's ends counts as words; at its end not when it is ``loose``.
        """
        if (
            text
            and not self._first.search(text)
            and not text[0].isspace()
            and (loose or not text[-1].isspace())
            and not text.startswith(NO_THINK)
        ):
            return _PLAIN, [text]
        found = [match.span() for match in self._pattern.finditer(text)]
        if len(found) > _MAX_LITERALS:
            return None
        only_text = self.template.literals_of(message)
        if any(text[start:end] in only_text for start, end in found):
            return None  # a control token that is only text: the full rendering keeps it apart
        if text.startswith(NO_THINK):
            found = [(0, len(NO_THINK)), *((start, end) for start, end in found if end > len(NO_THINK))]
        if any(self._overlapped(text, start, end) for start, end in found):
            return None
        literals: list[str] = []
        blanks: list[str] = []
        literal, position = "", 0
        for start, end in [*found, (len(text), len(text))]:
            between = text[position:start]
            if core := between.strip():
                literals.append(literal + between[: len(between) - len(between.lstrip())])
                literal = between[len(between.rstrip()) :]
                if loose and end == len(text) == start:
                    core, literal = core + literal, ""
                blanks.append(core)
            else:
                literal += between
            literal += text[start:end]
            position = end
        return (*literals, literal), blanks

    def _overlapped(self, text: str, start: int, end: int) -> bool:
        """Whether another word begins within the one at ``start`` and goes on after its end."""
        return any(
            (match := self._pattern.match(text, place)) is not None and match.end() > end
            for place in range(start + 1, end)
            if text[place:end] in self._heads
        )

    def _learn(
        self,
        sample: Sample,
        key: tuple[Any, ...],
        literals: Sequence[Sequence[tuple[str, ...] | None]],
        blanks: Sequence[str],
    ) -> tuple[Plan | None, Log | None]:
        """The plan of a shape, None when there is none; a log when shapes must be told apart in another way first."""
        messages = _opaque_messages(sample, literals, loose=self._loose)
        turns: list[ProvenTurn] = []
        checked = 0
        for index, message in enumerate(messages):
            if not message.trained:
                continue
            turn_key = key[: index + 2]  # the template's variables come first
            if turn_key not in self._turns:
                log = Log()
                turn = self._learn_turn(sample, messages, index, checked, blanks, log)
                if (turn is not None and log.words - self._words) or (log.stripped and self._loose):
                    return None, log
                self._turns[turn_key] = turn
            known = self._turns[turn_key]
            if known is None:
                return None, None
            checked = index + 1
            turns.append(known)
        return self.planned(_joined(turns)), None

    def _learn_turn(
        self,
        sample: Sample,
        messages: Sequence[Message],
        index: int,
        checked: int,
        blanks: Sequence[str],
        log: Log,
    ) -> ProvenTurn | None:
        """One turn with blanks; None when the template does more with texts than a plan can say. Raises Rejected."""
        official = prove_turn(self.template, sample.messages[: index + 1], checked, sample.template_kwargs)
        try:
            turn = prove_turn(Watched(self.template, log), messages[: index + 1], checked, sample.template_kwargs)
        except Rejected:
            return None
        if log.unsafe or any(not word.strip() or MARK in word for word in log.words):
            return None
        for watched, text in ((turn.prompt, official.prompt), (turn.completion, official.completion)):
            form = self._form(watched, inside=True)
            if form is None or fill(form, blanks) != text:
                return None
        return turn

    def in_full(self, sample: Sample) -> Plan | None:
        """A conversation without control tokens in its text, rendered in full; None when it cannot be cut into parts.

        Raises Rejected when a turn cannot be proven.
        """
        stretches = stretches_of(self.template, sample.messages, sample.template_kwargs)
        return None if any(MARK in text for text, _ in stretches) else self.planned(stretches)

    def planned(self, stretches: Sequence[Stretch]) -> Plan | None:
        """Rendered stretches as a plan, with or without blanks; None when words could form across a blank's border."""
        samples = [self._parts(text, spans) for text, spans in stretches]
        return None if None in samples else Plan.of([sample for sample in samples if sample is not None])

    def _parts(self, text: str, spans: Sequence[tuple[int, int]]) -> _Parts | None:
        parts = _Parts([], [], [])
        starts: list[int] = []
        position = 0
        for match in [*self.template.token_pattern.finditer(text), None]:
            end = match.start() if match else len(text)
            if end > position:
                form = self._form(text[position:end])
                if form is None:
                    return None
                parts.kinds.append(-1)
                parts.texts.append(form)
                starts.append(position)
            if match:
                if self._could_grow(text, match):
                    return None
                parts.kinds.append(self.template.token_ids[match[0]])
                starts.append(match.start())
                position = match.end()
        starts.append(len(text))
        for start, end in spans:
            first = next(number for number, place in enumerate(starts) if place > start) - 1
            tail = self._form(text[starts[first] : start]) if starts[first] < start else ()
            if tail is None or (tail and parts.kinds[first] >= 0):
                return None
            parts.spans.append((first, tail, starts.index(end)))
        return parts

    def _could_grow(self, text: str, match: re.Match[str]) -> bool:
        """Whether a blank beside a control token could make a longer one of it."""
        token = match[0]
        after, before = text[match.end() : match.end() + 1] == MARK, text[: match.start()].endswith((CLOSED, LOOSE))
        return (after or before) and any(
            other != token and ((after and other.startswith(token)) or (before and other.endswith(token)))
            for other in self.template.token_ids
        )

    def _form(self, text: str, *, inside: bool = False) -> Form | None:
        """A text with blanks as a form; ``inside`` a turn, where control tokens stand, borders are not judged yet."""
        parts = BLANK.split(text)
        if any(MARK in word for word in parts[::2]):
            return None  # the template changed a text in a way that was not recorded
        form: list[str | int] = []
        for place, part in enumerate(parts):
            if place % 2:
                form.append(int(part))
                continue
            if inside:
                form.append(part)
                continue
            if 0 < place < len(parts) - 1 and (not part or any(part in word for word in self._words)):
                return None
            if place > 0 and any(part[:n] in self._tails for n in range(1, len(part) + 1)):
                return None
            if place < len(parts) - 1 and any(part[n:] in self._heads for n in range(len(part))):
                return None
            if part:
                form.append(part)
        return tuple(form)


def fill(form: Form, blanks: Sequence[str]) -> str:
    """The words of a form with its blanks filled in."""
    if len(form) == 1:
        part = form[0]
        return part if isinstance(part, str) else blanks[part]
    return "".join([part if isinstance(part, str) else blanks[part] for part in form])


def _with_blanks(literals: Sequence[str], number: int, last: str) -> tuple[str, int]:
    """A text of literals with blanks between, numbered from ``number`` on; ``last`` closes a blank at its end."""
    text = literals[0]
    for place, literal in enumerate(literals[1:], 2):
        text += f"{MARK}\\{number}" + (last if place == len(literals) and not literal else CLOSED) + literal
        number += 1
    return text, number


def stretches_of(template: Rendering, messages: Sequence[Message], kwargs: Mapping[str, Any]) -> list[Stretch]:
    """Texts and character spans of the samples that a conversation becomes: a new one where the history changes.

    Raises Rejected when a turn cannot be proven.
    """
    turns: list[ProvenTurn] = []
    checked = 0
    for index, message in enumerate(messages):
        if message.trained:
            turns.append(prove_turn(template, messages[: index + 1], checked, kwargs))
            checked = index + 1
    return _joined(turns)


def _joined(turns: Sequence[ProvenTurn]) -> list[Stretch]:
    stretches: list[Stretch] = []
    for turn in turns:
        text = turn.prompt + turn.completion
        span = (len(turn.prompt), len(text))
        if stretches and turn.prompt.startswith(stretches[-1][0]):
            stretches[-1] = (text, [*stretches[-1][1], span])
        else:
            stretches.append((text, [span]))
    return stretches


def _opaque_messages(
    sample: Sample, literals: Sequence[Sequence[tuple[str, ...] | None]], *, loose: bool
) -> list[Message]:
    """The conversation with a numbered blank for each text between its literal words."""
    number = 0
    messages: list[Message] = []
    for message, (content, reasoning) in zip(sample.messages, literals, strict=True):
        assert content is not None
        text, number = _with_blanks(content, number, LOOSE if loose else CLOSED)
        thought = None
        if reasoning is not None:
            thought, number = _with_blanks(reasoning, number, CLOSED)
        messages.append(replace(message, content=text, reasoning=thought))
    return messages
