"""The models' own chat templates, from real tokenizers: ours render the same; each difference is meant and stands here."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chats import CALLS, EMPTY, ONE, TOOL, TWO, Turns, answer, call, render, result, system, user
from finebridge.data_tools.templates import template_source
from jinja2 import TemplateError

TEXT_CHATS: list[Turns] = [
    ONE,
    TWO,
    EMPTY,
    [user("q1"), answer("a1"), user("q2"), answer("a2"), user("q3"), answer("a3")],
    [user("海水为什么是咸的"), answer("因为有盐。🌊")],
    [system("多行\n系统"), user("line 1\n\nline 2"), answer("```py\nprint('<b>&amp;</b>')\n```\n\nend")],
    [user("  spaces around  "), answer("a")],
    [user("q"), answer("\n\nbegins with breaks")],
    [user("q"), answer("ends with breaks\n\n")],
    [user("quotes \" ' \\ {{ x }} {% y %}"), answer("{# not a comment #}")],
    [user("/no_think and 2+2?"), answer("4")],
    [user("1+1="), answer("<think>\nsmall\n</think>\n\n2"), user("2+2?"), answer("4")],
]
THOUGHT_CHATS: list[Turns] = [
    [user("q"), answer("a", reasoning_content="first\nsecond")],
    [user("q"), answer("a", reasoning_content="\n\nt\n\n")],
    [user("q"), answer("a", reasoning_content="")],
    [user("q1"), answer("a1", reasoning_content="t1"), user("q2"), answer("a2", reasoning_content="t2")],
    [user("q"), answer("<think>t</think><answer>a</answer>")],
    [user("q"), answer("a</think>b</think>c")],
    [user("q1"), user("q2"), answer("a")],
]
TOOL_CHATS: list[Turns] = [
    CALLS,
    CALLS[1:],
    [user("q"), answer("I call.", tool_calls=[call("add", '{"a": "é"}')]), result("2"), answer("2")],
    [user("q"), answer("", tool_calls=[call("add", {"a": 1}), call("add", {"a": [1, "二"]})]), result("1"), result("2"),
     answer("both", reasoning_content="now")],
    [user("q"), answer("", reasoning_content="must add", tool_calls=[call("add", {})]), result("x"),
     answer("", reasoning_content="again", tool_calls=[{"name": "add", "arguments": {}}]), result("y"), answer("done"),
     user("q2"), answer("a2")],
    [user("q"), answer("a"), user("<tool_response>\nx\n</tool_response>"), answer("b", reasoning_content="t")],
]  # fmt: skip


def own_template(folder: Path) -> str:
    return json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]


def assert_same(ours: str, theirs: str, turns: Turns, **options: Any) -> None:
    """Both templates render the conversation alike, whole and as the prompt of each answer."""
    source = template_source(ours)
    assert render(source, turns, **options) == render(theirs, turns, **options)
    for index, turn in enumerate(turns):
        if turn["role"] == "assistant":
            prompt = turns[:index]
            assert render(source, prompt, prompt=True, **options) == render(theirs, prompt, prompt=True, **options)


@pytest.mark.parametrize("options", [{}, {"enable_thinking": False}, {"tools": [TOOL, TOOL]}])
def test_qwen3_renders_what_the_model_renders(npm_tokenizer: Callable[[str], Path], options: dict[str, Any]) -> None:
    theirs = own_template(npm_tokenizer("qwen3"))
    for turns in [*TEXT_CHATS, *THOUGHT_CHATS, *TOOL_CHATS]:
        assert_same("qwen3", theirs, turns, **options)


def test_qwen3_differs_where_the_model_leaves_a_turn_out(npm_tokenizer: Callable[[str], Path]) -> None:
    turns = [user("q"), {"role": "gpt", "content": "lost"}]
    assert "lost" not in render(own_template(npm_tokenizer("qwen3")), turns)
    with pytest.raises(TemplateError, match="no role gpt"):
        render(template_source("qwen3"), turns)


@pytest.mark.parametrize("release", ["llama3", "llama3_1"])
def test_llama_3_renders_what_the_model_renders(npm_tokenizer: Callable[[str], Path], release: str) -> None:
    theirs = own_template(npm_tokenizer(release))
    for turns in TEXT_CHATS:
        if release == "llama3_1":
            assert_same("llama-3", theirs, turns)
        else:  # the first release asks for an answer always, so training texts would end in an open turn
            asked = render(theirs, turns)
            ours = template_source("llama-3")
            assert asked == render(ours, turns, prompt=True)
            assert asked == render(ours, turns) + "<|start_header_id|>assistant<|end_header_id|>\n\n"


def test_gemma_renders_what_the_model_renders(npm_tokenizer: Callable[[str], Path]) -> None:
    theirs = own_template(npm_tokenizer("gemma3"))
    for turns in TEXT_CHATS:
        assert_same("gemma", theirs, turns)
    with pytest.raises(TemplateError, match="must alternate"):
        render(theirs, [user("q1"), *ONE])


def test_deepseek_v3_renders_what_the_model_renders(npm_tokenizer: Callable[[str], Path]) -> None:
    theirs = own_template(npm_tokenizer("deepseek_v3"))
    for turns in [*TEXT_CHATS, [user("q1"), user("q2"), answer("a")], [system("S"), system("T"), *ONE]]:
        assert_same("deepseek-v3", theirs, turns)


def test_deepseek_v3_closes_its_tool_calls_where_the_model_does_not(npm_tokenizer: Callable[[str], Path]) -> None:
    theirs, ours = own_template(npm_tokenizer("deepseek_v3")), template_source("deepseek-v3")
    end = "<｜tool▁calls▁end｜><｜end▁of▁sentence｜>"

    def both(*calls: dict[str, Any], content: str | None = None, **options: Any) -> tuple[str, str]:
        turns = [user("q"), answer(content, tool_calls=list(calls)), *[result("r")] * len(calls)]
        turns = turns if options else turns[:2]
        return render(ours, turns, **options), render(theirs, turns, **options)

    one, two = call("add", '{"a": 1}'), call("add", '{"b": 2}')
    mine, own = both(one)
    assert (mine, own.endswith(end)) == (own + end, False)  # a single call is never closed
    mine, own = both(one, two)
    assert mine == own
    mine, own = both(one, two, one)
    assert own.count(end) == 2  # and from the second on each call closes the list
    assert mine == own.replace(end, "", 1)
    mine, own = both(one, two, prompt=True)
    assert mine == own
    mine, own = both(one, content="")
    assert mine.count("add") == 1
    assert own.count("add") == 0  # a call beside a text, even an empty one, is lost
    twice = [user("q"), *[answer(None, tool_calls=[one, two]), result("r"), result("r")] * 2]
    begins = [render(source, twice).count("<｜tool▁calls▁begin｜>") for source in (ours, theirs)]
    assert begins == [2, 1]  # its second list of calls has no opening
