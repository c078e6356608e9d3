"""``--enable_thinking`` with a template that has the switch: golden texts, both ways of tokenising."""

from typing import Any

import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.schema import DataError
from random_chats import both_ways

QUESTION = {"role": "user", "content": "q"}
PLAIN = {"role": "assistant", "content": "a"}
THOUGHT = {"role": "assistant", "content": "a", "reasoning_content": "hm"}
OFF = "<think>\n\n</think>\n\n{{a<|im_end|>}}"  # the empty thought belongs to the prompt
EMPTY = "{{<think>\n\n</think>\n\na<|im_end|>}}"
THINKS = "{{<think>\nhm\n</think>\n\na<|im_end|>}}"
EARLIER = "a<|im_end|>\n<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"  # its thought is not shown again


def thinking_of(tokenizer: Any, switch: Any, row: Any) -> list[str]:
    """What follows the first question's header in each sample of a row, loss in double braces; [] for a rejected row."""
    made = both_ways(tokenizer, DataArguments(chat_template="qwen3", enable_thinking=switch), [row])
    texts: list[str] = []
    for sample in made.samples():
        ((start, end),) = sample.spans.tolist()
        text = tokenizer.decode(sample.ids[:start]) + "{{" + tokenizer.decode(sample.ids[start:end]) + "}}"
        texts.append(text.removeprefix("<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"))
    return texts


@pytest.mark.parametrize(
    ("switch", "plain", "thought"),
    [(None, OFF, THINKS), ("none", OFF, THINKS), ("true", EMPTY, THINKS), ("false", OFF, OFF)],
)
def test_enable_thinking(tokenizers_by_template: dict[str, Any], switch: Any, plain: str, thought: str) -> None:
    tokenizer = tokenizers_by_template["qwen3"]
    assert thinking_of(tokenizer, switch, {"messages": [QUESTION, PLAIN]}) == [plain]
    assert thinking_of(tokenizer, switch, {"messages": [QUESTION, THOUGHT]}) == [thought]
    inline = {**PLAIN, "content": "<think>\nhm\n</think>\n\na"}
    assert thinking_of(tokenizer, switch, {"messages": [QUESTION, inline]}) == [thought]
    two = thinking_of(tokenizer, switch, {"messages": [QUESTION, THOUGHT, QUESTION, PLAIN]})
    assert two == [thought, EARLIER + plain]


@pytest.mark.parametrize("switch", [None, "none", "true", "false"])
def test_a_rows_own_enable_thinking_wins(tokenizers_by_template: dict[str, Any], switch: Any) -> None:
    tokenizer = tokenizers_by_template["qwen3"]
    assert thinking_of(tokenizer, switch, {"messages": [QUESTION, PLAIN], "enable_thinking": True}) == [EMPTY]
    assert thinking_of(tokenizer, switch, {"messages": [QUESTION, PLAIN], "enable_thinking": False}) == [OFF]


def test_a_row_that_thinks_keeps_its_thought(tokenizers_by_template: dict[str, Any]) -> None:
    row = {"messages": [QUESTION, THOUGHT], "enable_thinking": True}
    assert thinking_of(tokenizers_by_template["qwen3"], "false", row) == [THINKS]


@pytest.mark.parametrize("switch", ["true", "false"])
def test_enable_thinking_needs_a_template_with_the_switch(tokenizers_by_template: dict[str, Any], switch: Any) -> None:
    with pytest.raises(DataError, match=f"--enable_thinking {switch}: this chat template has no such switch"):
        both_ways(
            tokenizers_by_template["chatml"],
            DataArguments(chat_template="chatml", enable_thinking=switch),
            [{"messages": [QUESTION, PLAIN]}],
        )


@pytest.mark.parametrize(
    ("switch", "plain", "thought"),
    [
        ("true", "{{<think>\n\n</think>\n<answer>\na\n</answer>END}}", "{{<think>\nhm\n</think>\n<answer>\na\n</answer>END}}"),
        ("false", "<think>\n\n</think>\n{{<answer>\na\n</answer>END}}", "<think>\n\n</think>\n{{<answer>\na\n</answer>END}}"),
        ("none", "{{aEND}}", "{{<think>\nhm\n</think>\n<answer>\na\n</answer>END}}"),
    ],
)  # fmt: skip
def test_templates_with_thoughts_in_the_answer(
    tokenizers_by_template: dict[str, Any], switch: Any, plain: str, thought: str
) -> None:
    tokenizer = tokenizers_by_template["hunyuan_dense"]
    args = DataArguments(chat_template="hunyuan_dense", enable_thinking=switch)
    made = both_ways(tokenizer, args, [{"messages": [QUESTION, PLAIN]}, {"messages": [QUESTION, THOUGHT]}])
    texts: list[str] = []
    for sample in made.samples():
        ((start, end),) = sample.spans.tolist()
        prompt, answer = tokenizer.decode(sample.ids[:start]), tokenizer.decode(sample.ids[start:end])
        texts.append((prompt + "{{" + answer + "}}").partition("<｜hy_Assistant｜>")[2])
    assert [text.replace(tokenizer.eos_token, "END") for text in texts] == [plain, thought]
