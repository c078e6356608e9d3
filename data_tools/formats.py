"""Rows to samples: eight forms of row, one result.

| form | columns | becomes |
|---|---|---|
| ``messages`` | ``messages``: turns with role and content, as OpenAI and the Hunyuan scripts write them | the turns |
| ``sharegpt`` | ``conversations``: turns with from and value (human, gpt, system, observation, function_call) | the turns |
| ``alpaca`` | instruction, input, output | user ``instruction`` + newline + ``input``, assistant ``output`` |
| ``instruction`` | instruction, input, output | system ``instruction``, user ``input``, assistant ``output`` |
| ``pai`` | instruction, input, output | user ``instruction`` + ``input`` with nothing between, assistant ``output`` |
| ``prompt_response`` | prompt, response (or completion) | user and assistant, or turns; only the response is trained |
| ``preference`` | chosen, rejected, beside prompt, messages, conversations or instruction | two answers to one conversation |
| ``text`` | text | a document for pretraining |

Three programs read the same columns instruction, input and output in three ways, so no row can tell which is meant:
``alpaca`` is the default, the two others are chosen by name. The three take earlier turns in ``history``
(``[[question, answer], ...]``) and a ``system`` prompt; ShareGPT rows a ``system`` and a ``tools`` column.

Beside its turns a row may carry ``tools``, ``reasoning_effort``, ``enable_thinking`` or ``chat_template_kwargs`` (handed to
the chat template). A turn may carry ``reasoning_content``, ``tool_calls``, ``tool_call_id``, ``name``, and
``"loss": false`` or OpenAI's ``"weight": 0`` (an assistant turn that is shown but not trained). Columns that no form knows
are left alone, unless the name looks like a misspelt one of a column that may be left out and that the row lacks. A null
is the same as nothing.
"""

import difflib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Literal, cast, get_args

from .schema import DataError, Document, Message, Preference, Rejected, Sample
from .turns import (
    OPENAI,
    SHAREGPT,
    TurnStyle,
    a_turn,
    answer_turn,
    check_order,
    json_name,
    read_tools,
    read_turn,
    read_turns,
    style_of,
    styled,
    untrained,
    user_turn,
)

Form = Literal["messages", "sharegpt", "alpaca", "instruction", "pai", "prompt_response", "preference", "text"]
FORMS: tuple[Form, ...] = get_args(Form)

_KWARGS = ("tools", "reasoning_effort", "enable_thinking")
_KWARGS_RESERVED = {"messages", "add_generation_prompt", "tokenize", "return_dict", "chat_template"}
_LONGEST_KEY = 40
_LEFT_OUT = frozenset(("input", "history", "system", "chat_template_kwargs", *_KWARGS))  # columns that a row may lack
_TRIPLE = ("instruction", "input", "output", "history", "system")
COLUMNS: dict[Form, tuple[str, ...]] = {
    "messages": ("messages", "system"),
    "sharegpt": ("conversations", "system"),
    "alpaca": _TRIPLE,
    "instruction": _TRIPLE,
    "pai": _TRIPLE,
    "prompt_response": ("prompt", "response", "completion", "system"),
    "preference": ("chosen", "rejected", "prompt", "messages", "conversations", *_TRIPLE),
    "text": ("text",),
}


@dataclass(frozen=True, slots=True)
class RowForm:
    """How to read a source's rows.

    ``keys`` renames: a column of COLUMNS (or "role" and "content" of a turn) to its name in the file, "" for none.
    ``roles`` adds names of speakers: a name in the file to user, assistant, system, tool or function_call.
    ``triples``: ShareGPT turns come as system, user, assistant, again and again. ``pattern`` makes a document of several
    columns, each in braces.
    """

    form: Form
    keys: Mapping[str, str] = field(default_factory=dict[str, str])
    roles: Mapping[str, str] = field(default_factory=dict[str, str])
    triples: bool = False
    pattern: str = ""


def detect_form(row: object) -> RowForm:
    """The form of a file whose first row is this, by the columns that are not null.

    Turns in another column than their form's are found too (``conversations`` of role and content). Raises DataError when
    no form fits, or more than one.
    """
    if not isinstance(row, dict):
        raise DataError(f"the first row is a JSON {json_name(row)}; an object is expected")
    there = {str(key) for key, value in cast("dict[str, Any]", row).items() if value is not None}
    if {"chosen", "rejected"} <= there:
        return RowForm("preference")
    found: list[RowForm] = []
    for column in there & {"messages", "conversations"}:
        turns = cast("dict[str, Any]", row)[column]
        first: object = cast("list[object]", turns)[0] if isinstance(turns, list) and turns else None
        names = cast("dict[str, Any]", first) if isinstance(first, dict) else {}
        form: Form = (
            "sharegpt" if "from" in names or (column == "conversations" and "role" not in names) else "messages"
        )
        own = COLUMNS[form][0]
        found.append(RowForm(form, {} if own == column else {own: column}))
    if {"instruction", "output"} <= there:
        found.append(RowForm("alpaca"))
    if "prompt" in there and there & {"response", "completion"}:
        found.append(RowForm("prompt_response"))
    if "text" in there:
        found.append(RowForm("text"))
    if len(found) != 1:
        state = "fits " + " and ".join(how.form for how in found) if found else "fits no known form"
        raise DataError(
            f"the first row {state} (its columns: {', '.join(sorted(there)) or 'none'}); pass --data_format with one of "
            f"{', '.join(FORMS)}, and --map_keys where columns have other names"
        )
    return found[0]


def parse_row(row: object, how: RowForm) -> Sample | Preference | Document:
    """One parsed row as what it trains. Raises Rejected when it cannot be trained on.

    An empty system prompt is the same as none. Nothing of a row is repaired.
    """
    if not isinstance(row, dict):
        raise Rejected("not_an_object", f"the row is a JSON {json_name(row)}; an object is expected")
    fields = cast("dict[str, Any]", row)
    result = _PARSERS[how.form](fields, how)
    own = _KNOWN[how.form]
    for key in fields:
        if key not in own and (meant := _misspelt(key, how.form)) and not _intended(key, meant, fields, how):
            raise Rejected("unknown_key", f"the row has the key {key!r}; did you mean {meant!r}?")
    return result


def _intended(key: str, meant: str, fields: dict[str, Any], how: RowForm) -> bool:
    """Whether a column whose name is near that of ``meant`` is no misspelling.

    It is null, or named by the user, or ``meant`` is there itself, or the user said that there is none.
    """
    column = how.keys.get(meant, meant)
    return fields[key] is None or key in how.keys.values() or not column or fields.get(column) is not None


def _messages(fields: dict[str, Any], how: RowForm) -> Sample:
    column = how.keys.get("messages", "messages")
    if "system" not in how.keys and fields.get("system") is not None:
        raise Rejected("unknown_key", "the row has the key 'system'; the system prompt is the first message")
    style = styled(OPENAI, how.keys, how.roles)
    messages = read_turns(_there(fields, column), column, style)
    return _sample(_with_system(messages, fields, how), fields, style)


def _sharegpt(fields: dict[str, Any], how: RowForm) -> Sample:
    column = how.keys.get("conversations", "conversations")
    style = styled(SHAREGPT, how.keys, how.roles)
    messages = read_turns(_there(fields, column), column, style)
    if how.triples:
        messages = _join_triples(messages)
    return _sample(_with_system(messages, fields, how), fields, style)


def _join_triples(messages: list[Message]) -> list[Message]:
    """System, user, assistant, repeated: the later triples are further turns under the one system prompt."""
    for number, message in enumerate(messages):
        if message.role != ("system", "user", "assistant")[number % 3]:
            raise Rejected("bad_order", f"message {number + 1}: {a_turn(message.role)}; system, user, assistant repeat")
        if number and number % 3 == 0 and message.content not in ("", messages[0].content):
            raise Rejected(
                "misplaced_system",
                f"message {number + 1} is another system prompt than the first; make each triple a row of its own",
            )
    if len(messages) % 3:
        raise Rejected("no_answer", f"{len(messages)} turns are no whole triples of system, user, assistant")
    return [message for number, message in enumerate(messages) if number == 0 or number % 3]


def _instruction(fields: dict[str, Any], how: RowForm) -> Sample:
    """The forms ``alpaca``, ``instruction`` and ``pai``."""
    messages = _asked(fields, how)
    messages.append(answer_turn(_string(fields, how, "output"), how.keys.get("output", "output")))
    return _sample(messages, fields)


def _asked(fields: dict[str, Any], how: RowForm) -> list[Message]:
    """The turns before the answer of a row with instruction, input, history and system."""
    instruction, given = _string(fields, how, "instruction"), _string(fields, how, "input", needed=False)
    system = _string(fields, how, "system", needed=False)
    if how.form == "instruction":
        if system:
            raise Rejected("two_systems", "'system' beside 'instruction', which is the system prompt of this form")
        system, question = instruction, given
    elif how.form == "pai":
        question = instruction + given
    else:
        question = f"{instruction}\n{given}" if instruction and given else instruction or given
    if not question.strip():
        raise Rejected("no_question", "the question is empty")
    messages = [Message("system", system, None, trained=False)] if system else []
    history: object = fields.get(how.keys.get("history", "history")) or []
    if not isinstance(history, list):
        raise Rejected("bad_history", "'history' is a list of [question, answer]")
    for number, pair in enumerate(cast("list[Any]", history), 1):
        texts = cast("list[Any]", pair) if isinstance(pair, list) else []
        if len(texts) != 2 or not all(isinstance(text, str) for text in texts):  # noqa: PLR2004 - question and answer
            raise Rejected("bad_history", f"'history', pair {number}: two strings are expected, question and answer")
        messages += [user_turn(texts[0]), answer_turn(texts[1], f"history, pair {number}")]
    messages.append(user_turn(question))
    return messages


def _prompt_response(fields: dict[str, Any], how: RowForm) -> Sample:
    column = how.keys.get("response", "response")
    if "response" not in how.keys and fields.get("completion") is not None:
        if fields.get("response") is not None:
            raise Rejected("two_answers", "the row has both 'response' and 'completion'")
        column = "completion"
    response: object = _there(fields, column)
    if isinstance(response, list):
        turns = read_turns(cast("list[object]", response), column, styled(OPENAI, how.keys, how.roles))
        if len(turns) != 1 or turns[0].role != "assistant":
            raise Rejected("no_answer", f"{column!r} must be a text or a list with one assistant turn")
        answer = turns[0]
    elif isinstance(response, str):
        answer = answer_turn(response, column)
    else:
        raise Rejected("bad_content", f"{column!r} is of type {json_name(response)}; a text is expected")
    return _sample([*_asking(_prompt(fields, how)), answer], fields)


def _prompt(fields: dict[str, Any], how: RowForm) -> list[Message]:
    """The untrained turns of a ``prompt`` column: a text, or turns."""
    column = how.keys.get("prompt", "prompt")
    prompt: object = _there(fields, column)
    if isinstance(prompt, str):
        if not prompt.strip():
            raise Rejected("no_question", f"{column!r} is empty")
        return _with_system([user_turn(prompt)], fields, how)
    turns = read_turns(prompt, column, style_of(prompt, how.keys, how.roles))
    return _with_system([untrained(turn) for turn in turns], fields, how)


def _preference(fields: dict[str, Any], how: RowForm) -> Preference:
    columns = [how.keys.get(name, name) for name in ("chosen", "rejected")]
    chosen, rejected = (_answers(_there(fields, column), column, how) for column in columns)
    if len(chosen) > 1 or len(rejected) > 1:  # whole conversations
        before = [untrained(turn) for turn in chosen[:-1]]
        for number, (one, other) in enumerate(zip(before, map(untrained, rejected[:-1]), strict=False), 1):
            if one != other:
                raise Rejected("bad_pair", f"message {number} differs: both answers must follow the same turns")
        if len(chosen) != len(rejected):
            raise Rejected(
                "bad_pair", f"{len(chosen)} turns against {len(rejected)}: both must differ in the last only"
            )
        _check_context(fields, how, before, chosen)
        before = _with_system(before, fields, how)
    else:
        before = _context(fields, how)
    for column, turns in zip(columns, (chosen, rejected), strict=True):
        if turns[-1].role != "assistant":
            raise Rejected("no_answer", f"{column!r} ends with {a_turn(turns[-1].role)}; the answer is missing")
    if chosen[-1] == rejected[-1]:
        raise Rejected("bad_pair", "'chosen' and 'rejected' are the same answer")
    before = _asking(before)
    return Preference(_sample([*before, chosen[-1]], fields), _sample([*before, rejected[-1]], fields))


def _asking(turns: list[Message]) -> list[Message]:
    """The turns before an answer, which may not end with another answer."""
    if turns[-1].role == "assistant":
        raise Rejected("bad_order", "the turns before the answer end with an assistant turn already")
    return turns


def _answers(value: object, column: str, how: RowForm) -> list[Message]:
    """What ``chosen`` or ``rejected`` holds: a text, a turn, or turns of which the last is the answer."""
    if isinstance(value, str):
        return [answer_turn(value, column)]
    if isinstance(value, dict):
        return [read_turn(1, cast("object", value), style_of([value], how.keys, how.roles))]
    return read_turns(value, column, style_of(value, how.keys, how.roles))


def _context(fields: dict[str, Any], how: RowForm) -> list[Message]:
    """The turns before the two answers: from instruction, prompt, messages or conversations, whichever is there."""
    names = ("prompt", "messages", "conversations", "instruction")
    columns = {how.keys.get(name, name): name for name in reversed(names)}
    there = [name for column, name in columns.items() if fields.get(column) is not None]
    if len(there) != 1:
        state = f"both {there[0]!r} and {there[1]!r}" if there else f"none of {', '.join(names)}"
        raise Rejected("no_question", f"beside 'chosen' and 'rejected' the row has {state}; one says what was asked")
    if there[0] == "instruction":
        return [untrained(turn) for turn in _asked(fields, how)]
    if there[0] == "prompt":
        return _prompt(fields, how)
    column = how.keys.get(there[0], there[0])
    turns = read_turns(fields[column], column, style_of(fields[column], how.keys, how.roles))
    return _with_system([untrained(turn) for turn in turns], fields, how)


def _check_context(fields: dict[str, Any], how: RowForm, before: list[Message], chosen: list[Message]) -> None:
    """What stands beside whole conversations must say the same as they do."""
    prompt: object = fields.get(how.keys.get("prompt", "prompt"))
    same = not isinstance(prompt, str) or prompt == before[-1].content
    for name in ("prompt", "messages", "conversations"):
        value: object = fields.get(how.keys.get(name, name))
        if isinstance(value, list) and value:
            turns = [
                untrained(turn)
                for turn in read_turns(cast("object", value), name, style_of(value, how.keys, how.roles))
            ]
            same = same and turns in (before, [*before, untrained(chosen[-1])])
    if not same:
        raise Rejected("bad_pair", "the prompt beside 'chosen' and 'rejected' is not the one in their turns")


def _text(fields: dict[str, Any], how: RowForm) -> Document:
    text = how.pattern.format_map(_Strings(fields)) if how.pattern else _string(fields, how, "text")
    if not text:  # white space alone is a text, as it is to Megatron-LM
        raise Rejected("empty_text", "the text is empty")
    return Document(text)


class _Strings(dict[str, Any]):
    """A row whose columns must be strings when a pattern asks for them."""

    def __getitem__(self, key: str) -> str:
        value = self.get(key)
        if not isinstance(value, str):
            state = f"is of type {json_name(value)}" if key in self else "is not there"
            raise Rejected("bad_content", f"the column {key!r} {state}; a text is expected")
        return value


def _sample(messages: list[Message], fields: dict[str, Any], style: TurnStyle = OPENAI) -> Sample:
    """The turns, checked, with what the row says to the chat template."""
    check_order(messages, style)
    if messages[0].role == "system" and not messages[0].content:
        messages = messages[1:]
    kwargs: dict[str, Any] = {}
    for key in _KWARGS:
        if (value := fields.get(key)) is not None:
            kwargs[key] = value
    if "tools" in kwargs and (tools := read_tools(kwargs.pop("tools"))):
        kwargs["tools"] = tools
    extra = fields.get("chat_template_kwargs")
    if extra is not None:
        if not isinstance(extra, dict) or not _KWARGS_RESERVED.isdisjoint(cast("dict[str, Any]", extra)):
            raise Rejected("bad_template_kwargs", "'chat_template_kwargs' must be an object of template variables")
        kwargs |= cast("dict[str, Any]", extra)
    return Sample(tuple(messages), kwargs)


def _with_system(messages: list[Message], fields: dict[str, Any], how: RowForm) -> list[Message]:
    """The turns behind the prompt of a ``system`` column, where there is one."""
    system = _string(fields, how, "system", needed=False)
    if not system:
        return messages
    if messages[0].role == "system":
        if messages[0].content:
            raise Rejected("two_systems", "a system prompt in the turns and another in the column beside them")
        messages = messages[1:]
    return [Message("system", system, None, trained=False), *messages]


def _there(fields: dict[str, Any], column: str) -> Any:
    value = fields.get(column)
    if value is None:
        raise _missing(fields, column)
    return value


def _string(fields: dict[str, Any], how: RowForm, name: str, *, needed: bool = True) -> str:
    """A column's text. One that is not needed may be missing or null: the empty string."""
    column = how.keys.get(name, name)
    value = fields.get(column) if column else None
    if isinstance(value, str):
        return value
    if value is None:
        if needed and column:
            raise _missing(fields, column)
        return ""
    raise Rejected("bad_content", f"{column!r} is of type {json_name(value)}; a text is expected")


def _missing(fields: dict[str, Any], column: str) -> Rejected:
    code = "no_messages" if column in ("messages", "conversations") else "no_column"
    if column in fields:
        return Rejected(code, f"{column!r} is null")
    near = difflib.get_close_matches(column, fields, n=1, cutoff=0.6)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return Rejected(code, f"there is no {column!r}; the keys are {', '.join(fields)[:200] or 'none'}{hint}")


_PARSERS: dict[Form, Callable[[dict[str, Any], RowForm], Sample | Preference | Document]] = {
    "messages": _messages,
    "sharegpt": _sharegpt,
    "alpaca": _instruction,
    "instruction": _instruction,
    "pai": _instruction,
    "prompt_response": _prompt_response,
    "preference": _preference,
    "text": _text,
}
_KNOWN = {form: frozenset((*COLUMNS[form], "chat_template_kwargs", *_KWARGS)) for form in FORMS}


@lru_cache(maxsize=4096)
def _misspelt(key: str, form: Form) -> str:
    """The column that a key may be a misspelling of, "" when there is none.

    Only columns that may be left out: a row without one of the others has been rejected for that. A document reads no other
    column, and the name of an id says what it is.
    """
    if len(key) > _LONGEST_KEY or form == "text" or key.endswith("_id"):
        return ""
    if key == "functions":  # OpenAI's old form
        return "tools"
    near = difflib.get_close_matches(key, _LEFT_OUT & _KNOWN[form], n=1, cutoff=0.8)
    return near[0] if near else ""
