"""Proof, turn by turn, that a training text is the inference prompt and then the answer as it stands.

All of it is done on texts, as the chat template renders them; ``tokenization.py`` and ``plans.py`` make ids of them.
"""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

from .schema import Message, Rejected
from .templates import Rendering
from .thinking import NO_THINK, TAG

_SPACE = re.compile(r"\s+")


@dataclass(frozen=True, slots=True)
class ProvenTurn:
    """An inference prompt and what the model must answer to it, up to the control token that ends the turn."""

    prompt: str
    completion: str


def prove_turn(template: Rendering, history: Sequence[Message], checked: int, kwargs: Mapping[str, Any]) -> ProvenTurn:
    """The last turn of ``history``, proven; messages before ``checked`` were seen in a prompt already.

    Raises Rejected when the training text does not continue the inference prompt with the whole answer and a control
    token that ends it, or when the template leaves a turn of the history out.
    """
    where = f"message {len(history)}"
    full = template.render(history, prompt=False, kwargs=kwargs)
    special = [match for match in template.token_pattern.finditer(full) if match[0] in template.special_tokens]
    if not special or full[special[-1].end() :].strip():
        raise Rejected(
            "no_terminator", f"{where}: the template ends the turn with no control token; it would never stop"
        )
    full, said = full[: special[-1].end()], full[: special[-1].start()]
    prompt = _prompt_of(template, history, said, kwargs)
    for number, message in enumerate(history[checked:-1], checked + 1):
        if message.role != "assistant" and not _occurs(message.content, prompt):
            raise Rejected("turn_dropped", f"message {number}: the template leaves this {message.role} turn out")
    return ProvenTurn(prompt, full[len(prompt) :])


def _prompt_of(template: Rendering, history: Sequence[Message], said: str, kwargs: Mapping[str, Any]) -> str:
    """The inference prompt that ``said`` (the text up to the terminator) continues with the whole answer.

    Inference may ask with thinking on (the template's default) or, where the template knows the switch and the row
    does not set it, off. A question marked ``/no_think`` is asked the default way; else the prompt after which
    exactly the answer's own text or call follows is preferred, so that an empty thought that only the template adds stays
    in the prompt, without loss.
    """
    answer = history[-1]
    question = next((message.content for message in reversed(history[:-1]) if message.role == "user"), "")
    exact = not question.startswith(NO_THINK) and not answer.reasoning
    calls = bool(answer.extra.get("tool_calls"))
    switches: list[dict[str, Any]] = [{}]
    if "enable_thinking" in template.source and "enable_thinking" not in kwargs:
        switches.append({"enable_thinking": False})
    found: list[str] = []
    for switch in switches:
        prompt = template.render(history[:-1], prompt=True, kwargs={**kwargs, **switch})
        if not (said.startswith(prompt) and _holds(said[len(prompt) :], answer)):
            continue
        own = said[len(prompt) :].strip()
        if not exact or own == answer.content.strip() or (calls and not TAG.match(own)):
            return prompt
        found.append(prompt)
    if found:
        return found[0]
    raise Rejected(
        "prompt_differs",
        f"message {len(history)}: the training text is not the inference prompt and then the answer as it stands "
        "(the template changes it; do the row's thinking settings and its thoughts agree?)",
    )


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
    return _SPACE.sub("", TAG.sub("", text))
