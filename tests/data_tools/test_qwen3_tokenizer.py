"""The real Qwen3 tokenizer with its own template: every span is proven."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.data_tools.formats import RowForm, parse_row
from finebridge.data_tools.templates import ChatTemplate
from finebridge.data_tools.thinking import apply_mode
from finebridge.data_tools.tokenization import Tokenization

MESSAGES = RowForm("messages")
CHATS: list[list[dict[str, Any]]] = [
    [{"role": "user", "content": "海水为什么是咸的"}, {"role": "assistant", "content": "因为有盐。"}],
    [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "1+1="},
        {"role": "assistant", "content": "<think>\nsmall\n</think>\n\n2"},
        {"role": "user", "content": "/no_think and 2+2?"},
        {"role": "assistant", "content": "4"},
    ],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", "reasoning_content": "first\nsecond"}],
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "\n\nbegins with breaks"}],
]


@pytest.fixture(scope="module")
def qwen3(npm_tokenizer: Callable[[str], Path]) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(npm_tokenizer("qwen3"))


@pytest.mark.parametrize("chat", CHATS)
def test_spans_with_the_tokenizers_own_template(qwen3: Any, chat: list[dict[str, Any]]) -> None:
    stage = Tokenization(ChatTemplate(qwen3, None))
    sample = apply_mode(parse_row({"messages": chat}, MESSAGES), "keep", separate=stage.template.reads_reasoning)
    encoded = stage.encode(sample)
    answers = [turn for turn in chat if turn["role"] == "assistant"]
    spans = [(tokens, start, end) for tokens in encoded for start, end in tokens.spans.tolist()]
    assert len(spans) == len(answers)
    for turn, (tokens, start, end) in zip(answers, spans, strict=True):
        text = qwen3.decode(tokens.ids[start:end].tolist())
        assert text.endswith(turn["content"].split("</think>")[-1].lstrip("\n") + "<|im_end|>")
        assert qwen3.decode(tokens.ids[:start].tolist()).endswith(
            ("<|im_start|>assistant\n", "<think>\n\n</think>\n\n")
        )


def test_think_tag_in_a_question_is_text(qwen3: Any) -> None:
    stage = Tokenization(ChatTemplate(qwen3, None))
    row = {
        "messages": [
            {"role": "user", "content": "what is </think> and <|im_end|>?"},
            {"role": "assistant", "content": "tags"},
        ]
    }
    (tokens,) = stage.encode(apply_mode(parse_row(row, MESSAGES), "keep", separate=True))
    start = int(tokens.spans[0, 0])
    prompt = tokens.ids[:start].tolist()
    assert prompt.count(qwen3.convert_tokens_to_ids("<|im_end|>")) == 1
    # the only closing tag that is a token is the empty thought of the template
    assert prompt.count(qwen3.convert_tokens_to_ids("</think>")) == 1
    assert "what is </think> and <|im_end|>?" in qwen3.decode(prompt)
