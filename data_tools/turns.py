"""One turn of a conversation, checked: as OpenAI writes it (role/content) and as ShareGPT does (from/value)."""

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import orjson

from .schema import ROLES, Message, Rejected

_EXTRA = ("tool_calls", "tool_call_id", "name")
_NO_EXTRA: Mapping[str, Any] = {}
_JSON_NAMES: Mapping[type, str] = {
    type(None): "null",
    bool: "boolean",
    int: "number",
    float: "number",
    str: "string",
    list: "array",
    dict: "object",
}
CALL = "function_call"  # a ShareGPT role: an assistant's call of a tool, written as JSON


@dataclass(frozen=True, slots=True)
class TurnStyle:
    """How a turn is written: its keys for the speaker and the text, and what a speaker's name stands for in ROLES.

    ``calls`` names the speakers whose text is a tool call as JSON. ``strict`` asks for questions and answers in turn.
    """

    role: str
    content: str
    roles: Mapping[str, str]
    calls: frozenset[str] = frozenset()
    strict: bool = False


OPENAI = TurnStyle("role", "content", {role: role for role in ROLES})
SHAREGPT = TurnStyle(
    "from",
    "value",
    {
        "human": "user",
        "gpt": "assistant",
        "system": "system",
        "observation": "tool",
        CALL: "assistant",
        "user": "user",
        "assistant": "assistant",
        "tool": "tool",
    },
    calls=frozenset({CALL}),
    strict=True,
)


def read_turns(turns: object, column: str, style: TurnStyle) -> list[Message]:
    """A list of turns as messages, each checked for itself.

    Raises Rejected, naming the message by its number, counted from 1.
    """
    if not isinstance(turns, list) or not turns:
        raise Rejected("no_messages", f"{column!r} must be a list with at least one turn")
    return [read_turn(number, turn, style) for number, turn in enumerate(cast("list[object]", turns), 1)]


def read_turn(number: int, turn: object, style: TurnStyle) -> Message:
    """One turn as a message. Raises Rejected."""
    if not isinstance(turn, dict):
        raise Rejected("bad_message", f"message {number} is not an object")
    fields = cast("dict[str, Any]", turn)
    name = fields.get(style.role)
    role = style.roles.get(name) if isinstance(name, str) else None
    if role is None:
        raise _unknown_role(number, fields, style)
    content = fields.get(style.content)
    if len(fields) == 2 and type(content) is str and name not in style.calls:  # noqa: PLR2004 - speaker and text: most turns
        if role == "assistant" and (not content or content.isspace()):
            raise Rejected("empty_answer", f"message {number}: the assistant says nothing")
        return Message(role, content, None, role == "assistant", _NO_EXTRA)
    return _full_turn(number, fields, role, style)


def check_order(messages: Sequence[Message], style: TurnStyle = OPENAI) -> None:
    """Raises Rejected when no answer can be learned from these turns, of which there is at least one."""
    first = last = messages[0]
    trained = first.trained
    for number, message in enumerate(messages[1:], 2):
        if message.role == "system":
            raise Rejected("misplaced_system", f"message {number} is a system prompt; it may only come first")
        if style.strict and not _follows(last, message):
            raise Rejected("bad_order", f"message {number}: {a_turn(message.role)} after {a_turn(last.role)}")
        trained = trained or message.trained
        last = message
    if not trained:
        if any(message.role == "assistant" for message in messages):
            raise Rejected("no_trained_turn", "every assistant turn has 'loss': false")
        raise Rejected("no_assistant_turn", "no message is from the assistant: there is nothing to train on")
    if last.role != "assistant":
        raise Rejected("no_answer", f"the conversation ends with {a_turn(last.role)}; the answer is missing")
    opening = messages[1] if first.role == "system" else first
    if opening.role != "user":
        raise Rejected("no_question", f"the conversation begins with {a_turn(opening.role)} instead of a user turn")


def styled(style: TurnStyle, keys: Mapping[str, str], roles: Mapping[str, str]) -> TurnStyle:
    """A style with other keys (for "role" and "content") and more names of speakers."""
    if not roles and "role" not in keys and "content" not in keys:
        return style
    return replace(
        style,
        role=keys.get("role", style.role),
        content=keys.get("content", style.content),
        roles={**style.roles, **{name: "assistant" if role == CALL else role for name, role in roles.items()}},
        calls=(style.calls - roles.keys()) | {name for name, role in roles.items() if role == CALL},
    )


def style_of(turns: object, keys: Mapping[str, str], roles: Mapping[str, str]) -> TurnStyle:
    """The style of turns that may be of either kind: ShareGPT's when the first one has ``from``."""
    first: object = cast("list[object]", turns)[0] if isinstance(turns, list) and turns else None
    is_sharegpt = isinstance(first, dict) and "from" in first
    return styled(SHAREGPT if is_sharegpt else OPENAI, keys, roles)


def a_turn(role: str) -> str:
    """A turn of this role, for a message."""
    return f"{'an' if role == 'assistant' else 'a'} {role} turn"


def json_name(value: object) -> str:
    """JSON's name of a value's type; Python's for one that JSON does not have (a date in a table)."""
    return _JSON_NAMES.get(type(value), type(value).__name__)


def user_turn(text: str) -> Message:
    """A question."""
    return Message("user", text, None, False, _NO_EXTRA)


def answer_turn(text: str, where: str) -> Message:
    """An answer that is trained. Raises Rejected when it is empty; ``where`` tells the user which."""
    if not text or text.isspace():
        raise Rejected("empty_answer", f"{where}: the answer is empty")
    return Message("assistant", text, None, True, _NO_EXTRA)


def untrained(message: Message) -> Message:
    """The same turn without loss."""
    return replace(message, trained=False) if message.trained else message


def read_tools(value: object) -> list[Any]:
    """The tools of a row: a list of objects, or the same as JSON text. Raises Rejected."""
    if isinstance(value, str):
        try:
            value = orjson.loads(value) if value.strip() else []
        except orjson.JSONDecodeError as error:
            raise Rejected("bad_tools", f"'tools' is no JSON: column {error.colno}: {error.msg}") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in cast("list[Any]", value)):
        raise Rejected("bad_tools", "'tools' is a list of objects")
    return cast("list[Any]", value)


def _follows(last: Message, message: Message) -> bool:
    if message.role == "assistant":
        return last.role != "assistant"
    if message.role == "tool":  # an answer to each of the calls of one turn
        return last.role == "tool" or "tool_calls" in last.extra
    return last.role in ("system", "assistant")


def _full_turn(number: int, fields: dict[str, Any], role: str, style: TurnStyle) -> Message:
    """A turn with more than a speaker and a text."""
    known = (style.role, style.content, "reasoning_content", "loss", "weight", *_EXTRA)
    for key, value in fields.items():
        if key not in known and value is not None and value != []:  # OpenAI exports carry refusal, audio, annotations
            raise Rejected("unknown_key", f"message {number} has the unknown key {key!r}")
    reasoning = fields.get("reasoning_content")
    if reasoning is not None and not (isinstance(reasoning, str) and role == "assistant"):
        raise Rejected("bad_reasoning", f"message {number}: 'reasoning_content' is a string of an assistant turn")
    if reasoning is not None and not reasoning.strip():
        reasoning = None  # many data sets write it empty on every turn
    trained = _loss(number, fields)
    extra = {key: fields[key] for key in _EXTRA if fields.get(key) not in (None, [])}
    for key in extra.keys() - {"tool_calls"}:
        if not isinstance(extra[key], str):
            raise Rejected("bad_message", f"message {number}: {key!r} is a string")
    calls = extra.get("tool_calls", [])
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in cast("list[Any]", calls)):
        raise Rejected("bad_tool_calls", f"message {number}: 'tool_calls' is a list of objects")
    if calls and role != "assistant":
        raise Rejected("bad_tool_calls", f"message {number}: 'tool_calls' in {a_turn(role)}; only the assistant calls")
    if fields[style.role] in style.calls:
        content, extra["tool_calls"] = "", _calls(number, fields.get(style.content))
    else:
        content = _text(number, fields, style.content, allow_none="tool_calls" in extra)
    if role == "assistant" and trained and not (content.strip() or reasoning or "tool_calls" in extra):
        raise Rejected("empty_answer", f"message {number}: the assistant says nothing")
    return Message(role, content, reasoning, role == "assistant" and trained, extra)


def _loss(number: int, fields: dict[str, Any]) -> bool:
    """Whether a turn is trained on: our ``"loss": true|false`` or OpenAI's ``"weight": 1|0``."""
    loss, weight = fields.get("loss"), fields.get("weight")
    if loss is not None and not isinstance(loss, bool):
        raise Rejected("bad_message", f"message {number}: 'loss' is true or false")
    if weight is not None and (isinstance(weight, bool) or weight not in (0, 1)):
        raise Rejected("bad_message", f"message {number}: 'weight' is {weight!r:.40}; only 0 and 1 are known")
    if loss is not None and weight is not None and loss != bool(weight):
        raise Rejected("bad_message", f"message {number}: 'loss' and 'weight' contradict each other")
    return loss if loss is not None else weight != 0


def _text(number: int, fields: dict[str, Any], key: str, *, allow_none: bool) -> str:
    """A message's content: a string, or OpenAI's list of text parts."""
    content = fields.get(key)
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
    state = f"has no {key!r}" if key not in fields else f"has a {key} of type {json_name(content)}"
    raise Rejected("bad_content", f"message {number} {state}")


def _calls(number: int, text: object) -> list[dict[str, Any]]:
    """ShareGPT's ``{"name": ..., "arguments": {...}}``, or a list of such, as OpenAI's ``tool_calls``."""
    advice = f'message {number}: a {CALL} is JSON: {{"name": ..., "arguments": {{...}}}}'
    try:
        value: object = orjson.loads(text) if isinstance(text, str) else text
    except orjson.JSONDecodeError as error:
        raise Rejected("bad_tool_calls", f"{advice}; column {error.colno}: {error.msg}") from None
    calls = cast("list[Any]", value if isinstance(value, list) else [value])
    result: list[dict[str, Any]] = []
    for call in calls:
        fields = cast("dict[str, Any]", call) if isinstance(call, dict) else {}
        if not isinstance(fields.get("name"), str) or not isinstance(fields.get("arguments"), dict):
            raise Rejected("bad_tool_calls", advice)
        function = {"name": fields["name"], "arguments": fields["arguments"]}
        result.append({"type": "function", "function": function})
    if not result:
        raise Rejected("bad_tool_calls", advice)
    return result


def _unknown_role(number: int, fields: dict[str, Any], style: TurnStyle) -> Rejected:
    if style.role not in fields:
        return Rejected("unknown_role", f"message {number} has no {style.role!r}")
    name = str(fields[style.role])[:80]
    near = difflib.get_close_matches(name, style.roles, n=1, cutoff=0.5)
    hint = f"; did you mean {near[0]!r}?" if near else f"; known are {', '.join(style.roles)}"
    return Rejected("unknown_role", f"message {number} has the role {name!r}{hint}")
