"""Bad rows and files: each is refused with its reason; nothing is dropped in silence."""

import json
from pathlib import Path
from typing import Any

import pytest
from finebridge.data_tools.formats import parse_row
from finebridge.data_tools.readers import MAX_LINE_BYTES, parse_json, read_lines, resolve_files
from finebridge.data_tools.schema import DataError, Rejected
from hypothesis import given
from hypothesis import strategies as st

USER = {"role": "user", "content": "q"}
ANSWER = {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    ("row", "code", "detail"),
    [
        ([], "not_an_object", "JSON list"),
        ({}, "no_messages", "the keys are none"),
        ({"message": [USER, ANSWER]}, "no_messages", "'message'"),
        ({"messages": []}, "no_messages", ""),
        ({"messages": [USER]}, "no_assistant_turn", ""),
        ({"messages": [USER, ANSWER, USER]}, "no_answer", "ends with a user turn"),
        ({"messages": [ANSWER]}, "no_question", ""),
        ({"messages": [{"role": "system", "content": "s"}, ANSWER]}, "no_question", ""),
        ({"messages": [USER, {"role": "asistant", "content": "a"}]}, "unknown_role", "did you mean 'assistant'"),
        ({"messages": [USER, {"role": "robot", "content": "a"}]}, "unknown_role", "known are"),
        ({"messages": [USER, {"role": "assistant"}]}, "bad_content", "has no 'content'"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "bad_content", "NoneType"),
        ({"messages": [USER, {"role": "assistant", "content": "  "}]}, "empty_answer", ""),
        ({"messages": [USER, {"role": "assistant", "content": [{"type": "image_url"}]}]}, "bad_content", "parts"),
        ({"messages": [USER, {"role": "assistant", "contents": "a"}]}, "unknown_key", "'contents'"),
        ({"messages": [USER, "a"]}, "bad_message", ""),
        ({"messages": [USER, {**ANSWER, "loss": 1}]}, "bad_message", "'loss'"),
        ({"messages": [USER, {**ANSWER, "loss": False}]}, "no_trained_turn", ""),
        ({"messages": [USER, {"role": "system", "content": "s"}, ANSWER]}, "misplaced_system", ""),
        ({"messages": [{**USER, "reasoning_content": "x"}, ANSWER]}, "bad_reasoning", ""),
        ({"messages": [USER, ANSWER], "chat_template_kwargs": {"tokenize": True}}, "bad_template_kwargs", ""),
        ({"messages": [{"role": "system", "content": ""}]}, "", ""),
    ],
)
def test_rows_that_cannot_be_trained_on(row: Any, code: str, detail: str) -> None:
    with pytest.raises(Rejected) as caught:
        parse_row(row)
    assert caught.value.code == code or not code
    assert detail in caught.value.detail


def test_text_parts_are_joined() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]
    assert parse_row({"messages": [USER, {"role": "assistant", "content": parts}]}).messages[1].content == "ab"


def test_row_fields_reach_the_template() -> None:
    sample = parse_row({"messages": [USER, ANSWER], "reasoning_effort": "high", "chat_template_kwargs": {"x": 1}})
    assert sample.template_kwargs == {"reasoning_effort": "high", "x": 1}


JSON_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["messages", "role", "content", "x"]), inner)
    ),
    max_leaves=12,
)


@given(JSON_VALUES)
def test_any_json_value_is_a_sample_or_a_rejection(value: Any) -> None:
    try:
        sample = parse_row(value)
    except Rejected as reason:
        assert reason.code  # noqa: PT017 - the other outcome is a sample
    else:
        assert sample.messages


@pytest.mark.parametrize(
    "line", [b"{", b"\xff\xfe{}", b'{"a": NaN}', b'{"a": "\\ud800"}', b"[" * 100_000, b"x" * (MAX_LINE_BYTES + 1)]
)
def test_lines_that_are_no_json(line: bytes) -> None:
    with pytest.raises(Rejected):
        parse_json(line)


def test_lines_keep_their_numbers(tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_bytes(b"\xef\xbb\xbf{}\n\n  \n{}\r\n" + b"x" * (MAX_LINE_BYTES + 10) + b"\n{}")
    rows = list(read_lines(file))
    assert [origin.line for origin, _ in rows] == [1, 4, 5, 6]
    assert [line.strip()[:2] for _, line in rows] == [b"{}", b"{}", b"xx", b"{}"]
    assert str(rows[1][0]) == f"{file}:4"


def test_files_are_found_in_order(tmp_path: Path) -> None:
    for name in ("b.jsonl", "a.jsonl", "c.jsonl"):
        (tmp_path / name).write_text("{}\n")
    assert resolve_files([f"{tmp_path}/c.jsonl,{tmp_path}/[ab].jsonl"]) == [tmp_path / f"{n}.jsonl" for n in "cab"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [("gone.jsonl", None, "no such data file"), ("a.csv", "x", "only .jsonl"), ("empty.jsonl", "", "is empty")],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, content: str | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(DataError, match=message):
        resolve_files([str(tmp_path / name)])


def test_a_folder_is_refused_with_the_glob_to_use(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"\*\.jsonl"):
        resolve_files([json.dumps(str(tmp_path)).strip('"')])
