r"""The think/answer form of the Hunyuan models: slow think, fast think, ``/no_think``.

    <think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>

Fast think is the same with an empty thought and ``/no_think`` in front of the user's text. Real data often lacks the
line break before ``</think>``; it is normalised. Source: Tencent-Hunyuan/Hunyuan-7B ``finetune/README_CN.md``.
"""

import re
from dataclasses import dataclass, replace
from typing import Literal, Protocol

from .schema import DataError, Message, Rejected, Sample

EnableThinking = Literal["true", "false", "none"]
ThinkMode = Literal["keep", "fast", "slow", "mixed"]
NO_THINK = "/no_think"
TAGS = ("<think>", "</think>", "<answer>", "</answer>")
TAG = re.compile(r"</?(?:think|answer)(?::[^<>]*)?>")  # Hy3's tags carry a suffix: <think:opensource>

_OPENS = re.compile(r"\s*<think>")
_FORM = re.compile(r"\s*<think>\n?(.*?)\n?</think>\s*<answer>\n?(.*?)\n?</answer>\s*", re.DOTALL)


class HasSource(Protocol):
    """A chat template, as far as its Jinja source is asked for."""

    source: str


@dataclass(frozen=True, slots=True)
class ThinkAnswer:
    """A thought (may be empty) and the answer that follows it."""

    thought: str
    answer: str

    def render(self) -> str:
        """The canonical text; ``parse`` gives the same value back."""
        return f"<think>\n{self.thought}\n</think>\n<answer>\n{self.answer}\n</answer>"


def parse(content: str) -> ThinkAnswer | None:
    """The think/answer value of an assistant text; None when the text is not of that form.

    Raises Rejected when it begins as one (``<think>`` first, ``<answer>`` somewhere) but is cut or has repeated tags.
    """
    if "</answer>" not in content and not _OPENS.match(content):
        return None
    match = _FORM.fullmatch(content) if "</answer>" in content else None
    if match and not any(tag in part for tag in TAGS for part in match.groups()):
        return ThinkAnswer(match[1], match[2])
    if _OPENS.match(content):
        if "</think>" not in content:
            raise Rejected("bad_think", "the thought is never closed with </think>")
        if match or "<answer>" in content or "</answer>" in content:
            raise Rejected("bad_think", "not <think>...</think><answer>...</answer> with each tag once")
    return None


def enable_thinking(sample: Sample, switch: EnableThinking | None, template: HasSource) -> Sample:
    """The sample under MindSpeed-LLM's ``--enable-thinking``, for templates with such a switch (Qwen3, Hunyuan).

    ``false`` takes every thought away and asks without thinking, so the empty thought stands in the prompt, without loss;
    ``true`` asks with thinking, so a turn without a thought answers with an empty one, which carries loss; ``none`` (and
    not given) asks with thinking where there is a thought. A row's own ``enable_thinking`` wins. Raises DataError.
    """
    given = switch not in (None, "none")
    if "enable_thinking" not in template.source:
        if given:
            raise DataError(f"--enable_thinking {switch}: this chat template has no such switch; see --think_mode")
        return sample
    if not given and "enable_thinking" not in sample.template_kwargs:
        return sample
    kwargs = {"enable_thinking": switch == "true", **sample.template_kwargs}
    without = switch == "false" and not kwargs["enable_thinking"]
    inside = "reasoning_content" not in template.source
    messages = [
        _switched(turn, without=without, inside=inside) if turn.role == "assistant" else turn
        for turn in sample.messages
    ]
    return Sample(tuple(messages), kwargs)


def _switched(message: Message, *, without: bool, inside: bool) -> Message:
    """An answer ``without`` its thought; ``inside`` says that the template wants the thought, even an empty one, in it."""
    if not (without or inside):
        return message
    value = parse(message.content)
    formed = value is not None or inside
    if value is None:
        value = _plain(message) if message.reasoning is None else ThinkAnswer(message.reasoning, message.content)
    if without:
        value = replace(value, thought="")
    return replace(message, content=value.render() if formed else value.answer, reasoning=None)


def apply_mode(sample: Sample, mode: ThinkMode, *, separate: bool) -> Sample:
    """The sample in one thinking mode, every think/answer text in canonical form.

    ``keep`` leaves the choice to the data; ``fast`` drops every thought and puts ``/no_think`` before the question;
    ``slow`` takes ``/no_think`` away and needs a thought in every trained turn (a turn without loss may lack it);
    ``mixed`` trains turns with a thought as slow and turns without one as fast. ``separate`` says that the chat template
    reads ``reasoning_content``: thoughts go there, else into the content. A row's ``reasoning_effort`` follows the mode.
    Raises Rejected (``no_thought``) in slow mode.
    """
    messages = list(sample.messages)
    thoughts = 0
    for index, message in enumerate(messages):
        if message.role != "assistant":
            continue
        inline = None if message.reasoning is not None else parse(message.content)
        value = inline or (ThinkAnswer(message.reasoning, message.content) if message.reasoning is not None else None)
        if mode != "keep":
            value = value or _plain(message)
            if mode == "slow" and not message.trained and not value.thought.strip():
                continue  # nothing is learned from it, so it may stay without a thought
            slow = mode == "slow" or (mode == "mixed" and bool(value.thought.strip()))
            if slow and not value.thought.strip():
                raise Rejected("no_thought", f"message {index + 1} has no thought, which --think_mode slow needs")
            if not slow:
                value = replace(value, thought="")
            thoughts += slow and message.trained
            _mark_question(messages, index, fast=not slow)
        if value is not None:
            content, reasoning = (value.answer, value.thought) if separate else (value.render(), None)
            messages[index] = replace(message, content=content, reasoning=reasoning)
    kwargs = dict(sample.template_kwargs)
    if (
        mode != "keep"
        and "reasoning_effort" in kwargs
        and (thoughts == 0) != (kwargs["reasoning_effort"] == "no_think")
    ):
        kwargs["reasoning_effort"] = "high" if thoughts else "no_think"
    return Sample(tuple(messages), kwargs)


def _plain(message: Message) -> ThinkAnswer:
    """A text without the form as answer alone; a bare ``<think>`` block is kept as its thought."""
    head, found, tail = message.content.partition("</think>")
    if found and head.lstrip().startswith("<think>"):
        return ThinkAnswer(head.lstrip().removeprefix("<think>").strip("\n"), tail.lstrip("\n"))
    return ThinkAnswer("", message.content)


def _mark_question(messages: list[Message], answer: int, *, fast: bool) -> None:
    """Put ``/no_think`` before the user turn that the assistant turn at ``answer`` replies to, or take it away."""
    for index in range(answer - 1, -1, -1):
        if messages[index].role == "user":
            text = messages[index].content
            bare = text.removeprefix(NO_THINK).lstrip(" ") if text.startswith(NO_THINK) else text
            messages[index] = replace(messages[index], content=NO_THINK + bare if fast else bare)
            return
