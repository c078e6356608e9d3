"""Every form of row: what it becomes, and every way to be wrong with its reason; nothing is dropped in silence."""

import json
import random
from pathlib import Path
from typing import Any

import pytest
from finebridge.data_tools.formats import COLUMNS, FORMS, Form, RowForm, detect_form, parse_row
from finebridge.data_tools.readers import Chunk, rows_of
from finebridge.data_tools.schema import DataError, Document, Preference, Rejected, Sample
from hypothesis import given
from hypothesis import strategies as st

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}
SYSTEM = {"role": "system", "content": "s"}
HUMAN = {"from": "human", "value": "q"}
GPT = {"from": "gpt", "value": "a"}
CALL = {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'}
SEEN = {"from": "observation", "value": "o"}
TEXTS = {"chosen": "good", "rejected": "bad"}


def sample(row: Any, form: Form = "messages", **how: Any) -> Sample:
    result = parse_row(row, RowForm(form, **how))
    assert isinstance(result, Sample)
    return result


def turns(result: Sample) -> list[str]:
    """Each turn as one letter of its role, its text, and a star when it is trained."""
    return [f"{m.role[0]}:{m.content}{'*' * m.trained}" for m in result.messages]


def refused(row: Any, code: str, detail: str = "", form: Form = "messages", **how: Any) -> None:
    with pytest.raises(Rejected) as caught:
        parse_row(row, RowForm(form, **how))
    assert caught.value.code == code
    assert detail in caught.value.detail
    assert len(caught.value.detail) < 400


# ---- messages


@pytest.mark.parametrize(
    ("row", "code", "detail"),
    [
        ([], "not_an_object", "JSON array"),
        (None, "not_an_object", "JSON null"),
        ({}, "no_messages", "the keys are none"),
        (
            {"message": [USER, ANSWER]},
            "no_messages",
            "there is no 'messages'; the keys are message; did you mean 'message'?",
        ),
        ({"messages": None}, "no_messages", "'messages' is null"),
        ({"messages": []}, "no_messages", "at least one turn"),
        ({"messages": {"role": "user"}}, "no_messages", "must be a list"),
        ({"messages": [USER]}, "no_assistant_turn", ""),
        ({"messages": [USER, ANSWER, USER]}, "no_answer", "ends with a user turn"),
        ({"messages": [ANSWER]}, "no_question", "begins with an assistant turn"),
        ({"messages": [SYSTEM, ANSWER]}, "no_question", ""),
        ({"messages": [{"role": "tool", "content": "s"}, ANSWER]}, "no_question", "tool"),
        ({"messages": [{"role": "system", "content": ""}]}, "no_assistant_turn", ""),
        ({"messages": [{"role": "system", "content": ""}, ANSWER]}, "no_question", ""),
        ({"messages": [USER, {"role": "asistant", "content": "a"}]}, "unknown_role", "did you mean 'assistant'"),
        ({"messages": [USER, {"role": "robot", "content": "a"}]}, "unknown_role", "known are"),
        ({"messages": [USER, {"role": ["user"], "content": "a"}]}, "unknown_role", "['user']"),
        ({"messages": [USER, {"content": "a"}]}, "unknown_role", "has no 'role'"),
        ({"messages": [USER, {"role": "assistant"}]}, "bad_content", "has no 'content'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "bad_content", "of type null"),
        ({"messages": [USER, {"role": "assistant", "content": 5}]}, "bad_content", "of type number"),
        ({"messages": [USER, {"role": "assistant", "content": None, "tool_calls": []}]}, "bad_content", "of type null"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "empty_answer", ""),
        ({"messages": [USER, {"role": "assistant", "content": "", "name": "x"}]}, "empty_answer", ""),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "bad_content", "parts"),
        ({"messages": [USER, {"role": "assistant", "contents": "a"}]}, "unknown_key", "'contents'"),
        ({"messages": [USER, {**ANSWER, "refusal": "no"}]}, "unknown_key", "'refusal'"),
        ({"messages": [USER, "a"]}, "bad_message", "message 2"),
        ({"messages": [USER, {**ANSWER, "loss": 1}]}, "bad_message", "'loss'"),
        ({"messages": [USER, {**ANSWER, "loss": False}]}, "no_trained_turn", ""),
        ({"messages": [USER, {**ANSWER, "weight": 0}]}, "no_trained_turn", ""),
        ({"messages": [USER, {**ANSWER, "weight": 0.5}]}, "bad_message", "0.5; only 0 and 1"),
        ({"messages": [USER, {**ANSWER, "weight": True}]}, "bad_message", "only 0 and 1"),
        ({"messages": [USER, {**ANSWER, "weight": [1]}]}, "bad_message", "only 0 and 1"),
        ({"messages": [USER, {**ANSWER, "weight": 1, "loss": False}]}, "bad_message", "contradict"),
        ({"messages": [USER, {**ANSWER, "name": 5}]}, "bad_message", "'name'"),
        ({"messages": [USER, {**ANSWER, "tool_calls": "f()"}]}, "bad_tool_calls", "list of objects"),
        ({"messages": [{**USER, "tool_calls": [{}]}, ANSWER]}, "bad_tool_calls", "user turn"),
        ({"messages": [USER, SYSTEM, ANSWER]}, "misplaced_system", "message 2"),
        ({"messages": [{**USER, "reasoning_content": "x"}, ANSWER]}, "bad_reasoning", ""),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": True}}, "bad_template_kwargs", ""),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": [1]}, "bad_template_kwargs", ""),
        ({"messages": [USER, ANSWER], "tools": {"type": "function"}}, "bad_tools", "list of objects"),
        ({"messages": [USER, ANSWER], "tools": "[{"}, "bad_tools", "column"),
        ({"messages": [USER, ANSWER], "system": "s"}, "unknown_key", "first message"),
        ({"messages": [USER, ANSWER], "tool": []}, "unknown_key", "did you mean 'tools'"),
        ({"messages": [USER, ANSWER], "functions": []}, "unknown_key", "'tools'"),
    ],
)
def test_messages_that_cannot_be_trained_on(row: Any, code: str, detail: str) -> None:
    refused(row, code, detail)


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert turns(sample({"messages": [USER, {"role": "assistant", "content": parts}]})) == ["u:q", "a:ab*"]


def test_row_fields_reach_the_template() -> None:
    tool = {"type": "function", "function": {"name": "f"}}
    row = {"messages": [USER, ANSWER], "reasoning_effort": "high", "chat_template_kwargs": {"x": 1}}
    assert sample(row).template_kwargs == {"reasoning_effort": "high", "x": 1}
    assert sample({**row, "tools": [tool]}).template_kwargs["tools"] == [tool]
    assert sample({**row, "tools": json.dumps([tool])}).template_kwargs["tools"] == [tool]
    assert "tools" not in sample({**row, "tools": ""}).template_kwargs


def test_openai_exports_and_tables_carry_nulls() -> None:
    answer = {**ANSWER, "refusal": None, "audio": None, "annotations": [], "tool_calls": None, "function_call": None}
    row = {
        "messages": [{**USER, "name": None, "weight": None}, {**answer, "loss": None}],
        "tools": None,
        "system": None,
    }
    result = sample({**row, "parallel_tool_calls": False, "id": 7})
    assert turns(result) == ["u:q", "a:a*"]
    assert result.messages[1].extra == {}
    assert result.template_kwargs == {}


def test_weights_and_calls_of_openai() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    asked = {"role": "assistant", "content": None, "tool_calls": [call], "weight": 0}
    seen = {"role": "tool", "tool_call_id": "1", "content": "o", "weight": 1}
    result = sample({"messages": [SYSTEM, USER, asked, seen, {**ANSWER, "weight": 1.0}]})
    assert turns(result) == ["s:s", "u:q", "a:", "t:o", "a:a*"]
    assert result.messages[2].extra == {"tool_calls": [call]}
    assert result.messages[3].extra == {"tool_call_id": "1"}


def test_an_empty_system_prompt_is_none() -> None:
    assert turns(sample({"messages": [{"role": "system", "content": ""}, USER, ANSWER]})) == ["u:q", "a:a*"]


# ---- ShareGPT


def test_sharegpt_turns_with_calls() -> None:
    two = {"from": "function_call", "value": '[{"name":"f","arguments":{}},{"name":"g","arguments":{}}]'}
    row = {"conversations": [HUMAN, CALL, SEEN, GPT, HUMAN, two, SEEN, SEEN, GPT], "system": "s", "tools": "[]"}
    result = sample(row, "sharegpt")
    assert turns(result) == ["s:s", "u:q", "a:*", "t:o", "a:a*", "u:q", "a:*", "t:o", "t:o", "a:a*"]
    call = result.messages[2].extra["tool_calls"]
    assert call == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert len(result.messages[6].extra["tool_calls"]) == 2
    assert result.template_kwargs == {}


@pytest.mark.parametrize(
    ("conversation", "code", "detail"),
    [
        ([GPT, HUMAN, GPT], "no_question", "begins with an assistant turn"),
        ([HUMAN, HUMAN, GPT], "bad_order", "message 2: a user turn after a user turn"),
        ([HUMAN, GPT, GPT], "bad_order", "message 3: an assistant turn after an assistant turn"),
        ([HUMAN, GPT, SEEN, GPT], "bad_order", "message 3: a tool turn after an assistant turn"),
        ([HUMAN, GPT, HUMAN], "no_answer", ""),
        ([HUMAN, {"from": "bot", "value": "a"}], "unknown_role", "'bot'"),
        ([HUMAN, {"from": "gtp", "value": "a"}], "unknown_role", "did you mean 'gpt'"),
        ([HUMAN, ANSWER], "unknown_role", "message 2 has no 'from'"),
        ([HUMAN, {"from": "gpt"}], "bad_content", "has no 'value'"),
        ([HUMAN, {"from": "gpt", "value": None}], "bad_content", ""),
        ([HUMAN, {**CALL, "value": "f(1)"}], "bad_tool_calls", "column 1"),
        ([HUMAN, {**CALL, "value": '{"name": "f"}'}], "bad_tool_calls", '"arguments"'),
        ([HUMAN, {**CALL, "value": "[]"}], "bad_tool_calls", ""),
        ([HUMAN, {**CALL, "value": None}], "bad_tool_calls", ""),
        ([HUMAN, {**GPT, "text": "b"}], "unknown_key", "'text'"),
        ([HUMAN, GPT, {"from": "system", "value": "s"}], "misplaced_system", "message 3"),
    ],
)
def test_sharegpt_turns_that_cannot_be_trained_on(conversation: Any, code: str, detail: str) -> None:
    refused({"conversations": conversation}, code, detail, "sharegpt")


def test_sharegpt_system_prompts() -> None:
    first = {"from": "system", "value": "s"}
    assert turns(sample({"conversations": [first, HUMAN, GPT], "system": ""}, "sharegpt"))[0] == "s:s"
    empty = {"from": "system", "value": ""}
    assert turns(sample({"conversations": [empty, HUMAN, GPT], "system": "t"}, "sharegpt"))[0] == "s:t"
    refused({"conversations": [first, HUMAN, GPT], "system": "t"}, "two_systems", "", "sharegpt")
    refused({"conversations": [HUMAN, GPT], "system": ["t"]}, "bad_content", "of type array", "sharegpt")


def test_other_names_for_columns_and_speakers() -> None:
    row = {"talk": [{"who": "client", "says": "q"}, {"who": "bot", "says": "a"}], "sys": "s"}
    keys = {"conversations": "talk", "role": "who", "content": "says", "system": "sys"}
    roles = {"client": "user", "bot": "assistant", "do": "function_call"}
    assert turns(sample(row, "sharegpt", keys=keys, roles=roles)) == ["s:s", "u:q", "a:a*"]
    row["talk"][1] = {"who": "do", "says": CALL["value"]}
    assert sample(row, "sharegpt", keys=keys, roles=roles).messages[2].extra["tool_calls"]
    row = {"chat": [USER, ANSWER], "sys": "s"}
    assert turns(sample(row, "messages", keys={"messages": "chat", "system": "sys"})) == ["s:s", "u:q", "a:a*"]


def test_triples_share_one_system_prompt() -> None:
    system, empty = {"from": "system", "value": "s"}, {"from": "system", "value": ""}
    one = sample({"conversations": [system, HUMAN, GPT]}, "sharegpt", triples=True)
    assert turns(one) == ["s:s", "u:q", "a:a*"]
    two = sample({"conversations": [system, HUMAN, GPT, empty, HUMAN, GPT]}, "sharegpt", triples=True)
    assert turns(two) == ["s:s", "u:q", "a:a*", "u:q", "a:a*"]
    other = {"from": "system", "value": "t"}
    refused(
        {"conversations": [system, HUMAN, GPT, other, HUMAN, GPT]}, "misplaced_system", "4", "sharegpt", triples=True
    )
    refused({"conversations": [HUMAN, GPT]}, "bad_order", "message 1", "sharegpt", triples=True)
    refused({"conversations": [system, HUMAN]}, "no_answer", "2 turns", "sharegpt", triples=True)


# ---- instruction, input, output: three meanings


ROW = {"instruction": "i", "input": "n", "output": "o"}


@pytest.mark.parametrize(
    ("form", "row", "expected"),
    [
        ("alpaca", ROW, ["u:i\nn", "a:o*"]),
        ("instruction", ROW, ["s:i", "u:n", "a:o*"]),
        ("pai", ROW, ["u:in", "a:o*"]),
        ("alpaca", {**ROW, "input": ""}, ["u:i", "a:o*"]),
        ("alpaca", {**ROW, "input": None}, ["u:i", "a:o*"]),
        ("alpaca", {"instruction": "i", "output": "o"}, ["u:i", "a:o*"]),
        ("alpaca", {**ROW, "instruction": ""}, ["u:n", "a:o*"]),
        ("instruction", {**ROW, "instruction": ""}, ["u:n", "a:o*"]),
        ("pai", {**ROW, "input": ""}, ["u:i", "a:o*"]),
        ("alpaca", {**ROW, "history": [["x", "y"]], "system": "s"}, ["s:s", "u:x", "a:y*", "u:i\nn", "a:o*"]),
        ("instruction", {**ROW, "history": [["x", "y"]]}, ["s:i", "u:x", "a:y*", "u:n", "a:o*"]),
        ("pai", {**ROW, "history": [], "system": ""}, ["u:in", "a:o*"]),
    ],
)
def test_the_three_meanings_of_instruction_input_output(form: Form, row: Any, expected: list[str]) -> None:
    assert turns(sample(row, form)) == expected


@pytest.mark.parametrize(
    ("form", "row", "code", "detail"),
    [
        ("alpaca", {"input": "n", "output": "o"}, "no_column", "there is no 'instruction'"),
        (
            "alpaca",
            {"instructions": "i", "output": "o"},
            "no_column",
            "output; did you mean 'instructions'?",
        ),
        ("alpaca", {**ROW, "output": None}, "no_column", "'output' is null"),
        ("alpaca", {**ROW, "output": "\n"}, "empty_answer", "output"),
        ("alpaca", {**ROW, "output": ["o"]}, "bad_content", "of type array"),
        ("alpaca", {**ROW, "input": 5}, "bad_content", "'input' is of type number"),
        ("alpaca", {**ROW, "instruction": "", "input": " "}, "no_question", "empty"),
        ("instruction", {**ROW, "input": ""}, "no_question", "empty"),
        ("instruction", {**ROW, "system": "s"}, "two_systems", "'instruction'"),
        ("alpaca", {**ROW, "history": "x"}, "bad_history", "list"),
        ("alpaca", {**ROW, "history": [["x"]]}, "bad_history", "pair 1"),
        ("alpaca", {**ROW, "history": [["x", "y"], ["x", None]]}, "bad_history", "pair 2"),
        ("alpaca", {**ROW, "history": [None]}, "bad_history", "pair 1"),
        ("alpaca", {**ROW, "history": [["x", ""]]}, "empty_answer", "history, pair 1"),
        ("alpaca", {**ROW, "histroy": [["x", "y"]]}, "unknown_key", "did you mean 'history'"),
    ],
)
def test_instruction_rows_that_cannot_be_trained_on(form: Form, row: Any, code: str, detail: str) -> None:
    refused(row, code, detail, form)


def test_renamed_columns() -> None:
    keys = {"instruction": "question", "input": "", "output": "answer", "system": "sys"}
    row = {"question": "q", "answer": "a", "sys": "s", "input": "not read", "": "not read"}
    assert turns(sample(row, "alpaca", keys=keys)) == ["s:s", "u:q", "a:a*"]
    assert turns(sample({"prompts": "q", "response": "a"}, "prompt_response", keys={"prompt": "prompts"})) == [
        "u:q",
        "a:a*",
    ]


# ---- prompt and response


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        ({"prompt": "q", "response": "a"}, ["u:q", "a:a*"]),
        ({"prompt": "q", "completion": "a", "system": "s"}, ["s:s", "u:q", "a:a*"]),
        ({"prompt": [USER], "completion": [ANSWER]}, ["u:q", "a:a*"]),
        ({"prompt": [SYSTEM, USER, ANSWER, USER], "completion": "b"}, ["s:s", "u:q", "a:a", "u:q", "a:b*"]),
        ({"prompt": [HUMAN, GPT, HUMAN], "completion": "b"}, ["u:q", "a:a", "u:q", "a:b*"]),
    ],
)
def test_prompt_and_response(row: Any, expected: list[str]) -> None:
    assert turns(sample(row, "prompt_response")) == expected


@pytest.mark.parametrize(
    ("row", "code", "detail"),
    [
        ({"prompt": "q"}, "no_column", "'response'"),
        ({"response": "a"}, "no_column", "'prompt'"),
        ({"prompt": "", "response": "a"}, "no_question", ""),
        ({"prompt": "q", "response": ""}, "empty_answer", ""),
        ({"prompt": "q", "response": {"a": 1}}, "bad_content", "of type object"),
        ({"prompt": "q", "response": "a", "completion": "b"}, "two_answers", ""),
        ({"prompt": [USER], "completion": [ANSWER, USER, ANSWER]}, "no_answer", "one assistant turn"),
        ({"prompt": [USER], "completion": [USER]}, "no_answer", ""),
        ({"prompt": [USER, ANSWER], "completion": "b"}, "bad_order", "assistant turn already"),
        ({"prompt": 5, "completion": "a"}, "no_messages", "'prompt'"),
    ],
)
def test_prompts_that_cannot_be_trained_on(row: Any, code: str, detail: str) -> None:
    refused(row, code, detail, "prompt_response")


# ---- preference pairs


GOOD, BAD = {"role": "assistant", "content": "good"}, {"role": "assistant", "content": "bad"}


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"prompt": "q", **TEXTS}, ["u:q"]),
        ({"prompt": [SYSTEM, USER], "chosen": [GOOD], "rejected": [BAD]}, ["s:s", "u:q"]),
        ({"chosen": [USER, GOOD], "rejected": [USER, BAD]}, ["u:q"]),
        ({"chosen": [SYSTEM, USER, ANSWER, USER, GOOD], "rejected": [SYSTEM, USER, ANSWER, USER, BAD]}, "suaq"),
        ({"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER, GOOD]}, ["u:q"]),
        ({"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "good"}, "rejected": BAD}, ["u:q"]),
        ({"conversations": [HUMAN, GPT, HUMAN], "system": "s", **TEXTS}, ["s:s", "u:q", "a:a", "u:q"]),
        ({"messages": [USER], **TEXTS, "score": 1}, ["u:q"]),
        ({"instruction": "i", "input": "n", **TEXTS}, ["u:i\nn"]),
        ({"instruction": "i", "history": [["x", "y"]], "system": "s", **TEXTS}, ["s:s", "u:x", "a:y", "u:i"]),
        (
            {"chosen": [HUMAN, {"from": "gpt", "value": "good"}], "rejected": [HUMAN, {"from": "gpt", "value": "bad"}]},
            ["u:q"],
        ),
    ],
)
def test_preference_pairs_share_all_but_the_answer(row: Any, before: Any) -> None:
    pair = parse_row(row, RowForm("preference"))
    assert isinstance(pair, Preference)
    expected = ["s:s", "u:q", "a:a", "u:q"] if before == "suaq" else before
    assert turns(pair.chosen) == [*expected, "a:good*"]
    assert turns(pair.rejected) == [*expected, "a:bad*"]


@pytest.mark.parametrize(
    ("row", "code", "detail"),
    [
        (TEXTS, "no_question", "none of prompt"),
        ({"prompt": "q", "chosen": "a"}, "no_column", "'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": "a"}, "bad_pair", "the same answer"),
        ({"prompt": "q", "chosen": "a", "rejected": ""}, "empty_answer", "rejected"),
        ({"prompt": "q", "chosen": "a", "rejected": 5}, "no_messages", "'rejected'"),
        ({"prompt": "q", "chosen": "a", "rejected": []}, "no_messages", "'rejected'"),
        ({"prompt": "q", "messages": [USER], **TEXTS}, "no_question", "both"),
        ({"prompt": "q", "chosen": [GOOD], "rejected": [USER]}, "no_answer", "'rejected' ends with a user"),
        ({"chosen": [USER, GOOD], "rejected": [{**USER, "content": "r"}, BAD]}, "bad_pair", "message 1 differs"),
        ({"chosen": [USER, GOOD], "rejected": [BAD]}, "bad_pair", "2 turns against 1"),
        ({"prompt": "r", "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "bad_pair", "the prompt beside"),
        ({"messages": [USER, BAD], "chosen": [USER, GOOD], "rejected": [USER, BAD]}, "bad_pair", "the prompt beside"),
        ({"messages": [USER, ANSWER], **TEXTS}, "bad_order", "assistant turn already"),
        ({"chosen": [USER, ANSWER, GOOD], "rejected": [USER, ANSWER, BAD]}, "bad_order", "assistant turn already"),
    ],
)
def test_pairs_that_cannot_be_trained_on(row: Any, code: str, detail: str) -> None:
    refused(row, code, detail, "preference")


# ---- documents


def test_documents() -> None:
    assert parse_row({"text": " a\n"}, RowForm("text")) == Document(" a\n")
    assert parse_row({"body": "a", "text": 5}, RowForm("text", {"text": "body"})) == Document("a")
    how = RowForm("text", pattern="{title}\n{body}")
    assert parse_row({"title": "{body}", "body": "b", "texts": "x"}, how) == Document("{body}\nb")
    refused({"title": "t"}, "bad_content", "'body' is not there", "text", pattern="{title}\n{body}")
    refused({"title": "t", "body": None}, "bad_content", "'body' is of type null", "text", pattern="{title}{body}")
    assert parse_row({"text": " \n"}, RowForm("text")) == Document(" \n")  # Megatron-LM keeps it
    refused({"text": ""}, "empty_text", "", "text")
    refused({"text": ["a"]}, "bad_content", "of type array", "text")
    refused({"texts": "a"}, "no_column", "the keys are texts; did you mean 'texts'?", "text")


# ---- which form


@pytest.mark.parametrize(
    ("row", "how"),
    [
        ({"messages": [USER, ANSWER], "id": 1}, RowForm("messages")),
        ({"messages": [HUMAN, GPT]}, RowForm("sharegpt", {"conversations": "messages"})),
        ({"conversations": [HUMAN, GPT], "text": None}, RowForm("sharegpt")),
        ({"conversations": [USER, ANSWER]}, RowForm("messages", {"messages": "conversations"})),
        ({"conversations": []}, RowForm("sharegpt")),
        (ROW, RowForm("alpaca")),
        ({"prompt": "q", "completion": "a"}, RowForm("prompt_response")),
        ({"prompt": "q", "messages": [USER, ANSWER]}, RowForm("messages")),
        ({"prompt": "q", "messages": [USER], **TEXTS}, RowForm("preference")),
        ({"instruction": "i", **TEXTS}, RowForm("preference")),
        ({"text": "t", "meta": {}}, RowForm("text")),
    ],
)
def test_the_form_shows_in_the_first_row(row: Any, how: RowForm) -> None:
    assert detect_form(row) == how


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"question": "q", "answer": "a"}, "fits no known form.*answer, question.*--data_format"),
        ({}, "its columns: none"),
        ({"messages": [USER, ANSWER], "text": "t"}, "fits messages and text"),
        ({**ROW, "text": "t"}, "fits alpaca and text"),
        (["a"], "JSON array"),
    ],
)
def test_a_first_row_of_no_form_or_of_two_is_refused(row: Any, message: str) -> None:
    with pytest.raises(DataError, match=message):
        detect_form(row)


# ---- columns with a name near a known one


@pytest.mark.parametrize(
    ("row", "how"),
    [
        ({"prompt": "q", **TEXTS, "prompt_id": 1, "response_id": 2, "message": "m"}, RowForm("preference")),
        ({"conversations": [HUMAN, GPT], "conversation_id": 1, "conversation": 2}, RowForm("sharegpt")),
        ({"messages": [USER, ANSWER], "message": "m", "message_id": 3, "system_id": 4}, RowForm("messages")),
        ({"instruction": "i", "output": "o", "instruction_id": 1, "outputs": ["o"]}, RowForm("alpaca")),
        ({**ROW, "inputs": "x", "history": [], "histories": 5}, RowForm("alpaca")),
        ({"instruction": "i", "output": "o", "inputs": "x"}, RowForm("alpaca", {"input": ""})),
        ({"instruction": "i", "output": "o", "c": "n", "inputs": "x"}, RowForm("alpaca", {"input": "c"})),
        ({"prompt": "q", "completion": "a", "responses": ["a", "b"]}, RowForm("prompt_response")),
        ({"messages": [USER, ANSWER], "tools": [{}], "tool": "x"}, RowForm("messages")),
        ({"text": "t", "texts": 1, "tool": 2, "inputs": 3, "functions": 4}, RowForm("text")),
    ],
)
def test_metadata_with_a_name_near_that_of_a_column_is_left_alone(row: Any, how: RowForm) -> None:
    assert parse_row(row, how)


@pytest.mark.parametrize(
    ("row", "how", "near"),
    [
        ({"instruction": "i", "output": "o", "inputs": "x"}, RowForm("alpaca"), "input"),
        ({"instruction": "i", "output": "o", "input": None, "inputs": "x"}, RowForm("alpaca"), "input"),
        ({**ROW, "inputs": "x"}, RowForm("alpaca", {"input": "c"}), "input"),
        ({"conversations": [HUMAN, GPT], "sytem": "s"}, RowForm("sharegpt"), "system"),
        ({"messages": [USER, ANSWER], "enable_thinkin": True}, RowForm("messages"), "enable_thinking"),
    ],
)
def test_a_misspelt_column_that_rows_may_lack_is_told(row: Any, how: RowForm, near: str) -> None:
    with pytest.raises(Rejected, match=f"unknown_key: .*did you mean '{near}'"):
        parse_row(row, how)


def test_a_misspelt_name_in_a_mapping_is_told_the_right_way_round() -> None:
    row = {"question": "q", "output": "a"}
    told = "there is no 'questio'; the keys are question, output; did you mean 'question'?"
    refused(row, "no_column", told, "alpaca", keys={"instruction": "questio"})


@pytest.mark.parametrize(
    ("value", "name"),
    [(None, "null"), ([], "array"), ("x", "string"), (5, "number"), (0.5, "number"), (True, "boolean")],
)
def test_types_have_the_names_of_json(value: Any, name: str) -> None:
    refused(value, "not_an_object", f"the row is a JSON {name};")
    with pytest.raises(DataError, match=f"^the first row is a JSON {name};"):
        detect_form(value)


def test_every_form_is_known_everywhere() -> None:
    assert set(COLUMNS) == set(FORMS)
    for form in FORMS:
        refused({}, "no_messages" if form in ("messages", "sharegpt") else "no_column", "", form)


# ---- anything at all


KEYS = sorted({name for columns in COLUMNS.values() for name in columns} | {"role", "content", "from", "value", "loss"})
JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.sampled_from(["user", "gpt", "", "a"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(KEYS), inner),
    max_leaves=12,
)


@given(JSON_VALUES, st.sampled_from(FORMS))
def test_any_json_value_trains_or_is_rejected(value: Any, form: Form) -> None:
    try:
        result = parse_row(value, RowForm(form))
    except Rejected as reason:
        assert reason.code  # noqa: PT017 - the other outcome is a sample
    else:
        assert result


SEEDS: list[tuple[RowForm, Any]] = [
    (RowForm("messages"), {"messages": [SYSTEM, USER, {**ANSWER, "loss": True, "tool_calls": [{}]}], "tools": [{}]}),
    (RowForm("sharegpt"), {"conversations": [HUMAN, CALL, SEEN, {**GPT, "weight": 1}], "system": "s", "tools": "[]"}),
    (RowForm("sharegpt", triples=True), {"conversations": [{"from": "system", "value": "s"}, HUMAN, GPT]}),
    (RowForm("alpaca"), {**ROW, "history": [["x", "y"]], "system": "s"}),
    (RowForm("instruction"), {**ROW, "history": [["x", "y"]]}),
    (RowForm("pai", {"output": "o"}), {"instruction": "i", "input": "n", "o": "a"}),
    (RowForm("prompt_response"), {"prompt": [SYSTEM, USER], "completion": [ANSWER], "reasoning_effort": "low"}),
    (RowForm("preference"), {"prompt": "q", "chosen": [USER, GOOD], "rejected": [USER, BAD], "messages": [USER]}),
    (RowForm("preference"), {"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "b"}}),
    (RowForm("text"), {"text": "t"}),
]


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a value, its own included."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [path, *(place for key, one in inner for place in places(one, (*path, key)))]


def mutated(rng: random.Random, row: Any) -> Any:
    """A copy of the row with one value replaced, dropped, doubled or renamed."""
    row = json.loads(json.dumps(row))
    path = rng.choice(places(row))
    if not path:
        return rng.choice([None, [], "x", 5, [row], row])
    *above, key = path
    holder = row
    for step in above:
        holder = holder[step]
    match rng.randrange(4):
        case 0:
            holder[key] = rng.choice([None, "", " ", 0, 1, -1.5, True, [], {}, [[]], [None], {"a": None}, "x" * 99])
        case 1:
            del holder[key]
        case 2 if isinstance(holder, list):
            holder.insert(0, holder[key])
        case _ if isinstance(holder, dict):
            holder[rng.choice([*KEYS, key + "s", "tools", "chat_template_kwargs"])] = holder.pop(key)
        case _:
            holder[key] = [holder[key]]
    return row


def test_mutated_rows_come_out_as_samples_or_rejections() -> None:
    rng = random.Random(0)
    outcomes = {"trained": 0, "rejected": 0, "unread": 0}
    for how, seed in SEEDS * 400:
        row = seed
        for _ in range(rng.randrange(4)):
            row = mutated(rng, row) if isinstance(row, dict) else row
        line = bytearray(json.dumps(row, ensure_ascii=rng.random() < 0.5).encode())
        if rng.random() < 0.2:
            line[rng.randrange(len(line))] = rng.choice(b'\x00\x80\xff"{}[],:\\a ')
        value = next((row for _, row in rows_of(Chunk(Path("a.jsonl"), 1, 0, bytes(line)))), None)
        if isinstance(value, Rejected):
            outcomes["unread"] += 1
            continue
        try:
            assert parse_row(value, how)
            outcomes["trained"] += 1
        except Rejected as reason:
            assert len(str(reason)) < 500  # noqa: PT017 - both outcomes are counted
            outcomes["rejected"] += 1
    assert min(outcomes.values()) > 300
