"""The think/answer form: parse and render, and the four modes."""

from typing import Any

import pytest
from finebridge.data_tools.formats import RowForm, parse_row
from finebridge.data_tools.schema import Rejected
from finebridge.data_tools.thinking import TAGS, ThinkAnswer, apply_mode, parse
from hypothesis import given
from hypothesis import strategies as st

MESSAGES = RowForm("messages")
TEXT = st.text().filter(lambda text: not any(tag in text for tag in TAGS))


@given(TEXT, TEXT)
def test_parse_gives_back_what_render_wrote(thought: str, answer: str) -> None:
    value = ThinkAnswer(thought, answer)
    assert parse(value.render()) == value


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("<think>\nt</think>\n<answer>\na\n</answer>", ThinkAnswer("t", "a")),  # the README's slow example
        ("<think>\n\n</think>\n<answer>\na\n</answer>", ThinkAnswer("", "a")),
        ("<think></think><answer>a</answer>", ThinkAnswer("", "a")),
        ("plain text", None),
        ("<think>\nt\n</think>\n\nno answer tags", None),
        ("about the <answer> tag", None),
    ],
)
def test_parse(content: str, expected: ThinkAnswer | None) -> None:
    assert parse(content) == expected


@pytest.mark.parametrize(
    "content",
    ["<think>never closed", "<think>t</think><answer>cut", "<think>a</think><think>b</think><answer>c</answer>"],
)
def test_broken_forms_are_rejected(content: str) -> None:
    with pytest.raises(Rejected, match="bad_think"):
        parse(content)


def turns(answer: str, question: str = "q", **extra: Any) -> Any:
    return parse_row(
        {"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": answer}], **extra},
        MESSAGES,
    )


SLOW = "<think>\nt\n</think>\n<answer>\na\n</answer>"
FAST = "<think>\n\n</think>\n<answer>\na\n</answer>"


@pytest.mark.parametrize(
    ("mode", "question", "answer", "expected_question", "expected_answer"),
    [
        ("keep", "q", "<think>\nt</think>\n<answer>\na\n</answer>", "q", SLOW),
        ("keep", "/no_thinkq", FAST, "/no_thinkq", FAST),
        ("keep", "q", "a", "q", "a"),
        ("fast", "q", SLOW, "/no_thinkq", FAST),
        ("fast", "/no_thinkq", FAST, "/no_thinkq", FAST),
        ("fast", "q", "a", "/no_thinkq", FAST),
        ("fast", "q", "<think>\nt\n</think>\n\na", "/no_thinkq", FAST),
        ("slow", "/no_think q", SLOW, "q", SLOW),
        ("mixed", "q", SLOW, "q", SLOW),
        ("mixed", "q", "a", "/no_thinkq", FAST),
    ],
)
def test_modes(mode: Any, question: str, answer: str, expected_question: str, expected_answer: str) -> None:
    user, assistant = apply_mode(turns(answer, question), mode, separate=False).messages
    assert (user.content, assistant.content, assistant.reasoning) == (expected_question, expected_answer, None)


def test_slow_mode_needs_a_thought() -> None:
    with pytest.raises(Rejected, match="no_thought"):
        apply_mode(turns(FAST), "slow", separate=False)


def test_thought_goes_where_the_template_reads_it() -> None:
    assistant = apply_mode(turns(SLOW), "keep", separate=True).messages[1]
    assert (assistant.content, assistant.reasoning) == ("a", "t")


@pytest.mark.parametrize(
    ("mode", "answer", "effort"), [("fast", SLOW, "no_think"), ("slow", SLOW, "high"), ("keep", SLOW, "low")]
)
def test_reasoning_effort_follows_the_mode(mode: Any, answer: str, effort: str) -> None:
    given_effort = "low" if mode != "slow" else "no_think"
    sample = apply_mode(turns(answer, reasoning_effort=given_effort), mode, separate=True)
    assert sample.template_kwargs["reasoning_effort"] == effort
