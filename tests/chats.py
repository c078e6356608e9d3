"""Conversations for the tests of chat templates, and how to render one."""

from typing import Any

from transformers.utils.chat_template_utils import render_jinja_template

Turns = list[dict[str, Any]]


def system(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


def user(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def answer(text: str, **extra: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **extra}


def result(text: str) -> dict[str, Any]:
    return {"role": "tool", "content": text}


def call(name: str, arguments: Any) -> dict[str, Any]:
    return {"type": "function", "function": {"name": name, "arguments": arguments}}


def render(source: str, turns: Turns, *, prompt: bool = False, **variables: Any) -> str:
    """The text as ``apply_chat_template`` makes it."""
    variables = {"bos_token": "<s>", "eos_token": "</s>", **variables}
    return render_jinja_template([turns], chat_template=source, add_generation_prompt=prompt, **variables)[0][0]


ONE: Turns = [user("q"), answer("a")]
TWO: Turns = [system("S"), user("q1"), answer("a1"), user("q2"), answer("a2")]
EMPTY: Turns = [system(""), *ONE]
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
CALLS: Turns = [
    system("S"), user("q"), answer("", tool_calls=[call("add", {"a": 1})]), result("2"), answer("It is 2."),
]  # fmt: skip
