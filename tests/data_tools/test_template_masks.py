"""With every shipped chat template each answer is proven: the inference prompt, the answer, its end token."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from chats import CALLS, EMPTY, ONE, TOOL, TWO, Turns, answer, render, system, user
from finebridge.data_tools.formats import RowForm, parse_row
from finebridge.data_tools.templates import ChatTemplate, shipped
from finebridge.data_tools.thinking import apply_mode
from finebridge.data_tools.tokenization import Tokenization

PLAIN = ["<s>", "</s>", "<pad>"]
IM = ["<|endoftext|>", "<|im_end|>", "<|pad|>", "<|im_start|>"]
GLM_TOKENS = [
    "[gMASK]",
    "<|endoftext|>",
    "<|pad|>",
    "<sop>",
    "<|user|>",
    "<|assistant|>",
    "<|system|>",
    "<|observation|>",
]
LLAMA = ["<|begin_of_text|>", "<|eot_id|>", "<|pad|>", "<|start_header_id|>", "<|end_header_id|>"]
CONTROL = {
    **dict.fromkeys(
        ("alpaca", "deepseek-v2", "empty", "human-assistant", "llama-2", "llama-2-chat", "mistral", "trl", "vicuna"), PLAIN
    ),
    **dict.fromkeys(("chatml", "chatml-empty-think", "chatml-idsys", "qwen2", "qwen2.5", "qwen3"), IM),
    **dict.fromkeys(("glm-4", "glm-4-chat"), GLM_TOKENS),
    **dict.fromkeys(("llama-3", "llama-3.1"), LLAMA),
    "deepseek-coder-v1.5": ["<｜begin▁of▁sentence｜>", "<|EOT|>", "<pad>"],
    "deepseek-v3": [
        "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜▁pad▁｜>", "<｜User｜>", "<｜Assistant｜>", "<｜tool▁sep｜>",
        *(f"<｜tool▁{part}▁{edge}｜>" for part in ("calls", "call", "outputs", "output") for edge in ("begin", "end")),
    ],
    "gemma": ["<bos>", "<end_of_turn>", "<pad>", "<start_of_turn>"],
    "hunyuan_a13b": ["<|startoftext|>", "<|eos|>", "<|pad|>", "<|extra_0|>", "<|extra_4|>"],
    "hunyuan_dense": [
        "<｜hy_begin▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>", "<｜hy_pad｜>", "<｜hy_User｜>", "<｜hy_Assistant｜>",
        "<｜hy_place▁holder▁no▁3｜>",
    ],
    "hy3": [
        f"<｜{name}:x｜>" for name in ("hy_begin_of_sentence", "hy_eos", "hy_pad", "hy_User", "hy_Assistant", "reasoning_mode")
    ],
    "llama-4": ["<|begin_of_text|>", "<|eot|>", "<|pad|>", "<|header_start|>", "<|header_end|>"],
    "mistral-tekken": ["<s>", "</s>", "<pad>", "[INST]", "[/INST]"],
    "zephyr": ["<s>", "</s>", "<pad>"],  # its headers are plain words
}  # fmt: skip


def byte_tokenizer(control: list[str]) -> Any:
    """Bytes, the control tokens (bos, eos, pad, others), and merges that cross the end of a prompt."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [("Ċ", "Ċ"), ("Ġ", "a"), (":", "a"), (":", "ĊĊ")]
    entries = [*sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(pair) for pair in merges)]
    backend = Tokenizer(models.BPE(vocab={entry: i for i, entry in enumerate(entries)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens(control)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=control[0], eos_token=control[1], pad_token=control[2]
    )


def spans(stage: Tokenization, turns: Turns, **fields: Any) -> list[tuple[list[int], list[int]]]:
    """For each trained answer the ids before it and the ids with loss."""
    sample = apply_mode(
        parse_row({"messages": turns, **fields}, RowForm("messages")), "keep", separate=stage.template.reads_reasoning
    )
    return [
        (tokens.ids[:start].tolist(), tokens.ids[start:end].tolist())
        for tokens in stage.encode(sample)
        for start, end in tokens.spans.tolist()
    ]


def assert_mask(stage: Tokenization, turns: Turns, **fields: Any) -> None:
    """Each answer follows the ids of an inference prompt, which begins once, and has its own end token within the loss."""
    found = spans(stage, turns, **fields)
    answers = [i for i, turn in enumerate(turns) if turn["role"] == "assistant"]
    assert len(found) == len(answers)
    source, tokenizer = stage.template.source, stage.tokenizer
    for index, (prompt, said) in zip(answers, found, strict=True):
        history = [turn for turn in turns[:index] if turn != system("")]  # in the data an empty one is none
        names = {"bos_token": tokenizer.bos_token, "eos_token": tokenizer.eos_token}
        asked = [
            render(source, history, prompt=True, **names, **switch, **fields)
            for switch in ({}, {"enable_thinking": False})
        ]
        assert prompt in tokenizer(asked, add_special_tokens=False)["input_ids"]
        assert prompt[:2] != [tokenizer.bos_token_id] * 2
        assert tokenizer.convert_ids_to_tokens(said[-1]) in stage.template.special_tokens
        assert turns[index]["content"].strip() in tokenizer.decode(said)


@pytest.mark.parametrize("name", shipped())
@pytest.mark.parametrize("turns", [ONE, TWO, EMPTY, [user("q"), answer("\nab\n\nc")]])
def test_every_answer_is_proven(name: str, turns: Turns) -> None:
    assert_mask(Tokenization(ChatTemplate(byte_tokenizer(CONTROL[name]), name)), turns)


@pytest.mark.parametrize("name", ["qwen3", "qwen2.5", "llama-3.1", "deepseek-v3"])
def test_tool_calls_are_proven(name: str) -> None:
    tools = {} if name == "deepseek-v3" else {"tools": [TOOL]}
    assert_mask(Tokenization(ChatTemplate(byte_tokenizer(CONTROL[name]), name)), CALLS, **tools)


def test_the_end_token_of_glm_opens_the_next_question() -> None:
    stage = Tokenization(ChatTemplate(byte_tokenizer(CONTROL["glm-4"]), "glm-4"))
    found = spans(stage, [user("q1"), answer("a1"), user("q2"), answer("a2")])
    assert [(stage.tokenizer.decode(prompt), stage.tokenizer.decode(said)) for prompt, said in found] == [
        ("[gMASK]<sop><|user|>\nq1<|assistant|>", "\na1<|user|>"),
        ("[gMASK]<sop><|user|>\nq1<|assistant|>\na1<|user|>\nq2<|assistant|>", "\na2<|user|>"),
    ]


@pytest.mark.parametrize(
    ("release", "names"),
    [
        ("llama2", ["llama-2", "mistral", "vicuna", "human-assistant"]),
        ("llama3_1", ["llama-3.1"]),
        ("deepseek_v3", ["deepseek-v3"]),
    ],
)
def test_every_answer_is_proven_with_real_tokenizers(
    npm_tokenizer: Callable[[str], Path], release: str, names: list[str]
) -> None:
    """Among them SentencePiece, which joins the space before an answer to its first word."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(npm_tokenizer(release))
    for name in names:
        stage = Tokenization(ChatTemplate(tokenizer, name))
        for turns in [ONE, TWO, EMPTY, [user("海水为什么是咸的"), answer("\n因为有盐。🌊")]]:
            assert_mask(stage, turns)
