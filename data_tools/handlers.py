"""MindSpeed-LLM's names for forms of rows: ``--handler-name``, and ``--map-keys`` for columns with other names."""

import difflib
import json
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any, cast

from .formats import COLUMNS, RowForm
from .schema import DataError
from .turns import CALL

_NO_RL = "it prepares prompts for reinforcement learning, which is not done here; to fine-tune on the same rows use"
_MOSS = "its column 'chat' is not read; write the turns as conversations for SharegptStyleInstructionHandler"

HANDLERS: Mapping[str, RowForm | str] = {
    "GeneralPretrainHandler": RowForm("text"),
    "StackOverflowPythonPretrainHandler": RowForm(
        "text",
        pattern="In python, {title}\n### Question:\n{question_body}\n### Response:\n{answer_body}\n",
    ),
    "AlpacaStyleInstructionHandler": RowForm("alpaca"),
    "GeneralInstructionHandler": RowForm("alpaca"),
    "SharegptStyleInstructionHandler": RowForm("sharegpt"),
    "OpenAIInstructionHandler": RowForm("messages"),
    "HunyuanInstructionHandler": RowForm("sharegpt", triples=True),
    "AlpacaStylePairwiseHandler": RowForm("preference"),
    "SharegptStylePairwiseHandler": RowForm("preference"),
    "AlpacaPretrainHandler": "it writes '###None' into rows without input; use AlpacaStyleInstructionHandler",
    "SharegptPretrainHandler": "documents of turns without their speakers are not made; use SharegptStyleInstructionHandler",
    "LlamaFactoryInstructionHandler": (
        "it takes the form of the rows from dataset_info.json, which is not read; use AlpacaStyleInstructionHandler, "
        "SharegptStyleInstructionHandler or OpenAIInstructionHandler"
    ),
    "AlpacaStyleProcessRewardHandler": "reward models are not trained here; use AlpacaStyleInstructionHandler",
    "PPOAlpacaStyleInstructionHandler": f"{_NO_RL} AlpacaStyleInstructionHandler",
    "R1AlpacaStyleInstructionHandler": f"{_NO_RL} AlpacaStyleInstructionHandler",
    "R1SharegptStyleInstructionHandler": f"{_NO_RL} SharegptStyleInstructionHandler",
    "BelleMultiTurnInstructionHandler": (
        "it cuts turns out of running text at 'Human:' and 'Assistant:', which an answer may hold too; write the turns as "
        "conversations for SharegptStyleInstructionHandler"
    ),
    "MOSSMultiTurnHandler": _MOSS,
    "MOSSInstructionHandler": _MOSS,
    "LeetcodePythonInstructionHandler": (
        "it cuts the question at the first code block; write instruction and output for AlpacaStyleInstructionHandler"
    ),
}
"""Every handler's form, or why there is none and what to use.

GeneralInstructionHandler ends a question without input with a newline; here it has none.
"""

_COLUMN_NAMES = {"prompt": "instruction", "query": "input", "response": "output", "messages": "conversations"}
_TAGS = {"role_tag": "role", "content_tag": "content"}
_ROLE_TAGS = {
    "user_tag": "user",
    "assistant_tag": "assistant",
    "system_tag": "system",
    "observation_tag": "tool",
    "function_tag": CALL,
}
_OPTIONAL = ("input", "history", "system")


def handler_form(name: str) -> RowForm:
    """The form that a handler of MindSpeed-LLM reads.

    Raises DataError for a handler that has none here, saying what to use, and for an unknown name.
    """
    how = HANDLERS.get(name)
    if isinstance(how, RowForm):
        return how
    if how is not None:
        raise DataError(f"--handler-name {name}: {how}")
    near = difflib.get_close_matches(name, HANDLERS, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known are {', '.join(HANDLERS)}"
    raise DataError(f"--handler-name {name}: there is no such handler; {hint}")


def map_keys(how: RowForm, text: str) -> RowForm:
    """The form with the names that ``--map-keys`` gives: a JSON object, a form's own column to the column in the file.

    MindSpeed-LLM's names (prompt, query, response, messages) stand for the columns of its two forms, and ``tags`` (an
    object) for the keys and speakers of turns. The empty string says that there is no such column. Raises DataError for a
    name that the form does not have.
    """
    try:
        given: object = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"--map-keys {text[:80]!r} is no JSON: {error}") from None
    if not isinstance(given, dict):
        raise DataError(f"--map-keys {text[:80]!r}: a JSON object of names is expected")
    if how.pattern:
        raise DataError("--map-keys: the columns of this handler have fixed names")
    keys, roles = dict(how.keys), dict(how.roles)
    for name, value in cast("dict[str, Any]", given).items():
        if name == "tags":
            _map_tags(how, value, keys, roles)
            continue
        column = name if name in COLUMNS[how.form] else _COLUMN_NAMES.get(name, name)
        if how.form == "preference" and name == "prompt" and ("query" in given or value == "instruction"):
            column = "instruction"  # MindSpeed-LLM's meaning, where an input belongs to it
        if column not in COLUMNS[how.form]:
            raise _unknown(name, [*COLUMNS[how.form], "tags"])
        if not isinstance(value, str) or (not value and column not in _OPTIONAL):
            raise DataError(f"--map-keys: {name!r} is the name of a column, not {value!r:.40}")
        keys[column] = value
    return replace(how, keys=keys, roles=roles)


def check_columns(form: RowForm, rows: Iterable[dict[str, Any]]) -> None:
    """Raises DataError when a column that ``--map-keys`` names is in none of these rows.

    A column that rows may lack would else be left out of every row without a word. A form's own name for a column is no
    claim that it is there, nor is the empty string; without rows nothing is said.
    """
    names = {
        name: column for name, column in form.keys.items() if name in COLUMNS[form.form] and column not in ("", name)
    }
    there: dict[str, None] = {}  # in the order of the rows
    wanted = set(names.values())
    for row in rows if wanted else ():
        there.update(dict.fromkeys(row))
        if wanted <= there.keys():
            return  # mostly after the first row
    for name, column in names.items() if there else ():
        if column not in there:
            near = difflib.get_close_matches(column, there, n=1, cutoff=0.6)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DataError(
                f"--map-keys: no row has the column {column!r}, which is named for {name!r}; "
                f"the columns are {', '.join(there)[:200]}{hint}"
            )


def _map_tags(how: RowForm, tags: object, keys: dict[str, str], roles: dict[str, str]) -> None:
    if "conversations" not in COLUMNS[how.form] and how.form != "messages":
        raise DataError(f"--map-keys: 'tags' name the keys of turns; rows of the form {how.form!r} have none")
    if not isinstance(tags, dict):
        raise DataError("--map-keys: 'tags' is a JSON object")
    for tag, name in cast("dict[str, Any]", tags).items():
        if tag not in _TAGS and tag not in _ROLE_TAGS:
            raise _unknown(tag, [*_TAGS, *_ROLE_TAGS])
        if not isinstance(name, str) or not name:
            raise DataError(f"--map-keys: {tag!r} is a name, not {name!r:.40}")
        if tag in _TAGS:
            keys[_TAGS[tag]] = name
        elif roles.setdefault(name, _ROLE_TAGS[tag]) != _ROLE_TAGS[tag]:
            raise DataError(f"--map-keys: {name!r} stands for two speakers")


def _unknown(name: str, known: list[str]) -> DataError:
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.6)
    hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(known)}"
    return DataError(f"--map-keys: unknown name {name!r}; {hint}")
