"""The fast way through plans and fastokens gives what ``tokenizers`` gives, and the masks keep their promise."""

import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.encoder import RowEncoder
from finebridge.data_tools.engine import EngineDiffers, fast_engine
from finebridge.data_tools.formats import RowForm, parse_row
from finebridge.data_tools.schema import Rejected, Sample
from finebridge.data_tools.templates import ChatTemplate
from finebridge.data_tools.thinking import apply_mode
from random_chats import Chats, both_ways, encode_rows

REAL = ("qwen3", "llama3_1", "deepseek_v3")
SMALL = ("qwen3", "chatml", "hunyuan_dense", "hunyuan_a13b", "hy3")


@pytest.fixture(scope="module")
def real(npm_tokenizer: Callable[[str], Path]) -> Callable[[str], Any]:
    """A real tokenizer with the template that it came with."""
    from transformers import AutoTokenizer

    return lambda name: AutoTokenizer.from_pretrained(npm_tokenizer(name))


def control_of(tokenizer: Any) -> list[str]:
    return sorted(set(tokenizer.all_special_tokens) | set(list(tokenizer.get_added_vocab())[:20]))


def assert_masks(tokenizer: Any, args: DataArguments, rows: list[Any]) -> int:
    """Each span against transformers' own rendering; returns how many were looked at."""
    encoder = RowEncoder(tokenizer, args, "chat", fast_engine(tokenizer.backend_tokenizer))
    template = encoder.template
    assert template is not None
    control = set(control_of(tokenizer)) | template.control_tokens
    ids_of_control = {tokenizer.convert_tokens_to_ids(token) for token in control}
    special = {tokenizer.convert_tokens_to_ids(token) for token in template.special_tokens}
    seen = 0
    for row in rows:
        made = encode_rows(encoder, [row])
        if made.rejects:
            continue
        sample = apply_mode(parse_row(row, RowForm("messages")), args.think_mode, separate=template.reads_reasoning)
        assert isinstance(sample, Sample)
        trained = [number for number, message in enumerate(sample.messages) if message.trained]
        spans = [(tokens, *span) for tokens in made.samples() for span in tokens.spans.tolist()]
        assert len(spans) == len(trained)
        hostile = any(
            token in text for m in sample.messages for text in (m.content, m.reasoning or "") for token in control
        )
        for number, (tokens, start, end) in zip(trained, spans, strict=True):
            assert int(tokens.ids[end - 1]) in special
            answer = tokenizer.decode(tokens.ids[start : end - 1].tolist(), clean_up_tokenization_spaces=False)
            wanted = unicodedata.normalize("NFC", sample.messages[number].content.split("</think>")[-1].strip())
            assert unicodedata.normalize("NFC", answer).strip().endswith(wanted), (answer, wanted)
            seen += 1
            prompts = []
            for switch in ({}, {"enable_thinking": False}):
                history = [message.as_dict() for message in sample.messages[:number]]
                how = {"tokenize": False, "add_generation_prompt": True, **sample.template_kwargs, **switch}
                prompts.append(tokenizer.apply_chat_template(history, **how))
            mine = tokens.ids[:start].tolist()
            if not hostile:
                asked = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in prompts]
                assert any(mine == ids for ids in asked), (tokenizer.decode(mine), prompts)
            else:
                assert tokenizer.decode(mine, clean_up_tokenization_spaces=False) in {
                    text for prompt in prompts for text in (prompt, unicodedata.normalize("NFC", prompt))
                } | {_by_pieces(prompt, control) for prompt in prompts}
                clean = [message.as_dict() for message in sample.messages[:number]]
                for turn in clean:
                    for field in ("content", "reasoning_content"):
                        for token in sorted(control, key=len, reverse=True) if turn["role"] != "assistant" else ():
                            turn[field] = turn[field].replace(token, "x") if turn.get(field) else turn.get(field)
                if not any(token in (m.content, m.reasoning or "") for m in sample.messages for token in control):
                    counts = [
                        sum(i in ids_of_control for i in tokenizer(text, add_special_tokens=False)["input_ids"])
                        for text in [
                            tokenizer.apply_chat_template(clean, tokenize=False, add_generation_prompt=True,
                                                          **sample.template_kwargs, **switch)
                            for switch in ({}, {"enable_thinking": False})
                        ]
                    ]  # fmt: skip
                    assert sum(i in ids_of_control for i in mine) <= max(counts), (row, clean)
    return seen


def _by_pieces(text: str, control: set[str]) -> str:
    """NFC between control tokens, as tokenizers normalise."""
    import re

    pattern = re.compile("(" + "|".join(map(re.escape, sorted(control, key=len, reverse=True))) + ")")
    return "".join(part if part in control else unicodedata.normalize("NFC", part) for part in pattern.split(text))


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(real: Callable[[str], Any], name: str) -> None:
    tokenizer = real(name)
    rows = Chats(1, control_of(tokenizer), tools=True).rows(400)
    made = both_ways(tokenizer, DataArguments(), rows)
    assert len(made.lengths) > 200
    assert assert_masks(tokenizer, DataArguments(), rows[:150]) > 80


@pytest.mark.parametrize("mode", ["fast", "slow", "mixed"])
def test_think_modes(real: Callable[[str], Any], mode: Any) -> None:
    tokenizer = real("qwen3")
    rows = Chats(2, control_of(tokenizer)).rows(120)
    args = DataArguments(think_mode=mode)
    assert len(both_ways(tokenizer, args, rows).lengths) > 5
    assert assert_masks(tokenizer, args, rows[:60]) > 2


@pytest.mark.parametrize("name", SMALL)
@pytest.mark.parametrize("compat", ["none", "hunyuan"])
def test_small_tokenizers(tokenizers_by_template: dict[str, Any], name: str, compat: Any) -> None:
    tokenizer = tokenizers_by_template[name]
    rows = Chats(3, control_of(tokenizer)).rows(400)
    made = both_ways(tokenizer, DataArguments(chat_template=name, mask_compat=compat), rows)
    assert len(made.lengths) > 100 or (name, compat) in {
        ("qwen3", "hunyuan"),
        ("chatml", "hunyuan"),
        ("hy3", "hunyuan"),
    }
    if compat == "none":
        assert assert_masks(tokenizer, DataArguments(chat_template=name), rows[:150]) > 80


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
@pytest.mark.parametrize("name", REAL)
def test_many_conversations(real: Callable[[str], Any], name: str, seed: int) -> None:
    tokenizer = real(name)
    rows = Chats(seed, control_of(tokenizer), tools=True).rows(3000)
    for args in (DataArguments(), DataArguments(think_mode="mixed")):
        both_ways(tokenizer, args, rows)
    assert_masks(tokenizer, DataArguments(), rows[:600])


def test_plans_are_used(tokenizers_by_template: dict[str, Any]) -> None:
    """Most rows take the fast way, whatever stands in them: else this file would compare the reference with itself."""
    tokenizer = tokenizers_by_template["hunyuan_dense"]
    encoder = RowEncoder(
        tokenizer, DataArguments(chat_template="hunyuan_dense"), "chat", fast_engine(tokenizer.backend_tokenizer)
    )
    calls: list[Sample] = []
    truth = encoder.tokenization.encode
    encoder.tokenization.encode = lambda row: (calls.append(row), truth(row))[1]  # type: ignore[method-assign]
    rows = Chats(4).rows(500)
    made = encode_rows(encoder, rows)
    assert len(made.lengths) > 300
    assert len(calls) < 200


def test_rows_that_read_alike_but_are_not(tokenizers_by_template: dict[str, Any]) -> None:
    """Tools with the same keys in another order; a text like a blank of ours; JSON nested deeper than parsers go."""
    tokenizer = tokenizers_by_template["qwen3"]
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    blank = [{"role": "user", "content": "\ue000\\7\ue001", "name": "x"}, turns[1]]
    deep: Any = []
    for _ in range(900):
        deep = [deep]
    rows = [{"messages": turns}] * 9 + [
        {"messages": turns, "tools": [{"name": "f", "type": "t"}]},
        {"messages": turns, "tools": [{"type": "t", "name": "f"}]},
        {"messages": blank},
        {"messages": turns, "tools": [{"a": deep}]},
    ]
    made = both_ways(tokenizer, DataArguments(chat_template="qwen3"), rows)
    texts = [tokenizer.decode(sample.ids.tolist()) for sample in made.samples()]
    assert '{"name": "f", "type": "t"}' in texts[9]
    assert '{"type": "t", "name": "f"}' in texts[10]
    assert "\ue000\\7\ue001" in texts[11]


def test_a_wrong_engine_is_found_out(tokenizers_by_template: dict[str, Any]) -> None:
    """Right bytes but other ids, which only the comparison can tell."""
    tokenizer = tokenizers_by_template["hunyuan_dense"]
    engine = fast_engine(tokenizer.backend_tokenizer)
    assert engine is not None
    honest = engine.encode

    def letter_by_letter(texts: Any) -> Any:
        import numpy as np

        parts = [honest(list(text))[0] if text else np.empty(0, np.int32) for text in texts]
        return np.concatenate(parts), np.append(0, np.cumsum([len(part) for part in parts]))

    engine.encode = letter_by_letter  # type: ignore[method-assign]
    encoder = RowEncoder(tokenizer, DataArguments(chat_template="hunyuan_dense"), "chat", engine)
    rows = [{"messages": [{"role": "user", "content": "the answer"}, {"role": "assistant", "content": "think"}]}]
    with pytest.raises(EngineDiffers, match=r"rows\.jsonl:1"):
        encode_rows(encoder, rows)


def test_a_row_that_only_the_reference_rejects_is_a_difference(
    tokenizers_by_template: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer = tokenizers_by_template["hunyuan_dense"]
    encoder = RowEncoder(
        tokenizer, DataArguments(chat_template="hunyuan_dense"), "chat", fast_engine(tokenizer.backend_tokenizer)
    )

    def refuse(_: Any) -> Any:
        raise Rejected("prompt_differs", "no")

    monkeypatch.setattr(encoder.tokenization, "encode", refuse)
    rows = [{"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}]
    with pytest.raises(EngineDiffers, match="prompt_differs"):
        encode_rows(encoder, rows)


def test_control_tokens_in_text_are_counted_by_rows(tokenizers_by_template: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_template["hunyuan_dense"]
    stop = tokenizer.eos_token
    ask = [f"say {stop} {stop}", "plain", f"{stop}", "x"]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "a"}] * 2} for q in ask]
    made = both_ways(tokenizer, DataArguments(chat_template="hunyuan_dense"), rows)
    assert made.neutralised == 2
    assert [sample.ids.tolist().count(tokenizer.eos_token_id) for sample in made.samples()] == [2, 2, 2, 2]
    assert ChatTemplate(tokenizer, "hunyuan_dense").special_tokens >= {stop}
