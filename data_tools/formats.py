"""Rows to samples: ``{"messages": [{"role": ..., "content": ...}, ...]}`` as OpenAI and the Hunyuan scripts write it.

Beside ``messages`` a row may carry ``reasoning_effort``, ``tools``, ``enable_thinking`` or ``chat_template_kwargs``
(handed to the chat template); a message may carry ``reasoning_content``, ``tool_calls``, ``tool_call_id``, ``name`` and
``"loss": false`` (an assistant turn that is shown but not trained).
"""

import difflib
from typing import Any, cast

from .schema import ROLES, Message, Rejected, Sample

_ROW_KWARGS = ("tools", "reasoning_effort", "enable_thinking")
_ROW_KEYS = ("messages", "chat_template_kwargs", *_ROW_KWARGS)
_MESSAGE_EXTRA = ("tool_calls", "tool_call_id", "name")
_MESSAGE_KEYS = {"role", "content", "reasoning_content", "loss", *_MESSAGE_EXTRA}
_KWARGS_RESERVED = {"messages", "add_generation_prompt", "tokenize", "return_dict", "chat_template"}


def parse_row(row: object) -> Sample:
    """One parsed JSON row as a Sample. Raises Rejected when it is no conversation that can be trained on.

    An empty system prompt is the same as none. Roles other than system, user, assistant and tool are refused.
    """
    if not isinstance(row, dict):
        raise Rejected(
            "not_an_object", f"the row is a JSON {type(row).__name__}; an object with 'messages' is expected"
        )
    fields = cast("dict[str, Any]", row)
    turns = fields.get("messages")
    if not isinstance(turns, list) or not turns:
        near = difflib.get_close_matches("messages", fields, n=1, cutoff=0.6)
        hint = f"; did you mean to name {near[0]!r} 'messages'?" if near and turns is None else ""
        state = f"there is no 'messages'; the keys are {', '.join(map(str, fields)) or 'none'}"
        state = state if turns is None else "'messages' must be a list with at least one turn"
        raise Rejected("no_messages", state + hint)
    messages = [_message(number, turn) for number, turn in enumerate(cast("list[object]", turns), 1)]
    if messages[0].role == "system" and not messages[0].content:
        messages = messages[1:]
    _check_order(messages)
    for key in fields:
        near = difflib.get_close_matches(key, _ROW_KEYS, n=1, cutoff=0.8)
        if key == "system" or (near and key not in _ROW_KEYS):
            hint = "the system prompt is the first message" if key == "system" else f"did you mean {near[0]!r}?"
            raise Rejected("unknown_key", f"the row has the key {key!r}; {hint}")
    kwargs: dict[str, Any] = {key: fields[key] for key in _ROW_KWARGS if fields.get(key) is not None}
    extra = fields.get("chat_template_kwargs") or {}
    if not isinstance(extra, dict) or _KWARGS_RESERVED & set(cast("dict[str, Any]", extra)):
        raise Rejected("bad_template_kwargs", "'chat_template_kwargs' must be an object of template variables")
    return Sample(tuple(messages), {**kwargs, **cast("dict[str, Any]", extra)})


def _message(number: int, turn: object) -> Message:
    if not isinstance(turn, dict):
        raise Rejected("bad_message", f"message {number} is not an object")
    fields = cast("dict[str, Any]", turn)
    role = fields.get("role")
    if role not in ROLES:
        near = difflib.get_close_matches(str(role), ROLES, n=1, cutoff=0.5)
        hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(ROLES)}"
        raise Rejected("unknown_role", f"message {number} has the role {role!r}{hint}")
    if unknown := sorted(set(fields) - _MESSAGE_KEYS):
        raise Rejected("unknown_key", f"message {number} has the unknown key {unknown[0]!r}")
    reasoning = fields.get("reasoning_content")
    if reasoning is not None and not (isinstance(reasoning, str) and role == "assistant"):
        raise Rejected("bad_reasoning", f"message {number}: 'reasoning_content' is a string of an assistant turn")
    if not (reasoning or "").strip():
        reasoning = None  # many data sets write it empty on every turn
    loss = fields.get("loss", True)
    if not isinstance(loss, bool):
        raise Rejected("bad_message", f"message {number}: 'loss' is true or false")
    extra = {key: fields[key] for key in _MESSAGE_EXTRA if fields.get(key) is not None}
    calls = extra.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in cast("list[Any]", calls)):
        raise Rejected("bad_tool_calls", f"message {number}: 'tool_calls' is a list of objects")
    content = _text(number, fields, allow_none="tool_calls" in extra)
    if role == "assistant" and loss and not (content.strip() or (reasoning or "").strip() or "tool_calls" in extra):
        raise Rejected("empty_answer", f"message {number}: the assistant says nothing")
    return Message(role, content, reasoning, role == "assistant" and loss, extra)


def _text(number: int, fields: dict[str, Any], *, allow_none: bool) -> str:
    """A message's content: a string, or OpenAI's list of text parts."""
    content = fields.get("content")
    if isinstance(content, str):
        return content
    if content is None and allow_none:
        return ""
    if isinstance(content, list):
        parts = cast("list[Any]", content)
        if parts and all(
            isinstance(p, dict) and p.get("type") == "text" and isinstance(p.get("text"), str) for p in parts
        ):
            return "".join(part["text"] for part in parts)
        raise Rejected("bad_content", f"message {number}: content parts other than text are not supported")
    state = "has no 'content'" if "content" not in fields else f"has a content of type {type(content).__name__}"
    raise Rejected("bad_content", f"message {number} {state}")


def _check_order(messages: list[Message]) -> None:
    for number, message in enumerate(messages[1:], 2):
        if message.role == "system":
            raise Rejected("misplaced_system", f"message {number} is a system prompt; it may only come first")
    if not any(message.role == "assistant" for message in messages):
        raise Rejected("no_assistant_turn", "no message is from the assistant: there is nothing to train on")
    if not any(message.trained for message in messages):
        raise Rejected("no_trained_turn", "every assistant turn has 'loss': false")
    if messages[-1].role != "assistant":
        raise Rejected("no_answer", f"the conversation ends with a {messages[-1].role} turn; the answer is missing")
    if messages[0].role == "assistant" or (messages[0].role == "system" and messages[1].role == "assistant"):
        raise Rejected("no_question", "the assistant speaks before any user turn")
