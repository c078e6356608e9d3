"""The fast way through plans and fastokens gives what ``tokenizers`` gives, and the masks keep their promise."""

import json
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.encoder import EncodedChunk, RowEncoder
from finebridge.data_tools.engine import EngineDiffers, fast_engine
from finebridge.data_tools.formats import RowForm, parse_row
from finebridge.data_tools.schema import Message, Rejected, Sample
from finebridge.data_tools.templates import ChatTemplate
from finebridge.data_tools.thinking import apply_mode
from random_chats import Chats, both_ways, encode_rows

REAL = ("qwen3", "llama3_1", "deepseek_v3")
SMALL = ("qwen3", "chatml", "hunyuan_dense", "hunyuan_a13b", "hy3")


@pytest.fixture(scope="module")
def real(npm_tokenizer: Callable[[str], Path]) -> Callable[[str], Any]:
    """A real tokenizer with the template that it came with."""
    from transformers import AutoTokenizer

    return cache(lambda name: AutoTokenizer.from_pretrained(npm_tokenizer(name)))


def control_of(tokenizer: Any) -> list[str]:
    """Names of control and added tokens, to be put into texts."""
    return sorted(set(tokenizer.all_special_tokens) | set(list(tokenizer.get_added_vocab())[:20]))


class Oracle:
    """What a mask must keep, said with transformers alone: ``apply_chat_template``, ids of texts, texts of ids."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        added = {str(token): token.special for token in tokenizer.added_tokens_decoder.values()}
        self.special = set(tokenizer.all_special_tokens) | {token for token, special in added.items() if special}
        tag = re.compile("</?(think|answer)(:[a-z]+)?>")
        control = self.special | {t for t in added if t in tokenizer.chat_template or tag.fullmatch(t)}
        self.pattern = re.compile("|".join(map(re.escape, sorted(control, key=len, reverse=True))))
        self.control_ids = set(tokenizer.convert_tokens_to_ids(sorted(control)))
        self.special_ids = set(tokenizer.convert_tokens_to_ids(sorted(self.special)))

    def prompts(self, history: Sequence[Message], variables: Mapping[str, Any]) -> list[str]:
        """What inference may feed the model for the next answer: the template's default, and thinking switched off."""
        turns = [message.as_dict() for message in history]
        return [
            self.tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True, **variables, **switch)
            for switch in ({}, {"enable_thinking": False})
            if not switch.keys() & variables.keys()
        ]

    def ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def text(self, ids: list[int]) -> str:
        """The text of ids in NFC, as some tokenizers normalise."""
        return nfc(self.tokenizer.decode(ids, clean_up_tokenization_spaces=False))

    def only_text(self, history: Sequence[Message], prompt: str) -> int:
        """How many names of control tokens in a prompt are somebody's words: all that users, systems and tools write,
        and the special ones in what an assistant wrote."""
        count = 0
        for message in history:
            own = message.role == "assistant"
            texts = message.content.split("</think>") if own else [message.content]  # templates leave thoughts out
            for text in (*texts, message.reasoning or ""):
                names = self.pattern.findall(text) if text.strip() in prompt else []
                count += sum(name in self.special for name in names) if own else len(names)
        return count


def nfc(text: str) -> str:
    return unicodedata.normalize("NFC", text)


def assert_prompt(oracle: Oracle, ids: list[int], history: Sequence[Message], variables: Mapping[str, Any]) -> None:
    """Before an answer stands an inference prompt; in it only the template's own control tokens are control tokens."""
    said = oracle.text(ids)
    asked = [prompt for prompt in oracle.prompts(history, variables) if nfc(prompt) == said]
    assert asked, said
    if any(oracle.pattern.search(text) for turn in history for text in (turn.content, turn.reasoning or "")):
        real = [len(oracle.pattern.findall(prompt)) - oracle.only_text(history, prompt) for prompt in asked]
        assert sum(token in oracle.control_ids for token in ids) in real, said
    else:
        assert any(ids == oracle.ids(prompt) for prompt in asked), said


def assert_answer(oracle: Oracle, ids: list[int], turn: Message) -> None:
    """What carries loss is the whole answer, its thought before it, and the token that ends the turn: that one last."""
    assert ids[-1] in oracle.special_ids
    said = oracle.text(ids[:-1]).strip()
    if "tool_calls" in turn.extra:
        assert nfc(turn.content).strip() in said
        for call in turn.extra["tool_calls"]:
            assert call["function"]["name"] in said
            for value in call["function"]["arguments"].values():
                assert nfc(json.dumps(value, ensure_ascii=False)) in said
        return
    assert sum(token in oracle.special_ids for token in ids) == 1
    thought, closed, text = turn.content.rpartition("</think>")
    if not (closed and turn.content.lstrip().startswith("<think>")):
        thought, text = "", turn.content
    assert said.endswith(nfc(text).strip())
    for part in (thought.removeprefix("<think>"), turn.reasoning or ""):
        assert nfc(part).strip() in said


def assert_masks(tokenizer: Any, args: DataArguments, rows: Sequence[Any], made: EncodedChunk) -> int:
    """Each answer of each row that became samples; returns how many were looked at."""
    oracle = Oracle(tokenizer)
    separate = "reasoning_content" in tokenizer.chat_template
    samples: dict[int, list[tuple[list[int], int, int]]] = {}
    for line, tokens in zip(made.lines.tolist(), made.samples(), strict=True):
        samples.setdefault(line, []).extend((tokens.ids.tolist(), *span) for span in tokens.spans.tolist())
    for line, spans in samples.items():
        parsed = parse_row(rows[line - 1], RowForm("messages"))
        assert isinstance(parsed, Sample)
        sample = apply_mode(parsed, args.think_mode, separate=separate)
        trained = [place for place, message in enumerate(sample.messages) if message.trained]
        for place, (ids, start, end) in zip(trained, spans, strict=True):
            assert_prompt(oracle, ids[:start], sample.messages[:place], sample.template_kwargs)
            assert_answer(oracle, ids[start:end], sample.messages[place])
    return sum(map(len, samples.values()))


@pytest.mark.parametrize("name", REAL)
def test_real_tokenizers(real: Callable[[str], Any], name: str) -> None:
    tokenizer = real(name)
    rows = Chats(1, control_of(tokenizer), tools=True).rows(250)
    made = both_ways(tokenizer, DataArguments(), rows)
    assert assert_masks(tokenizer, DataArguments(), rows, made) > 150
    begin = tokenizer.bos_token_id  # the template writes it; the tokenizer must not put another one before
    assert all(sample.ids.tolist().count(begin) == (begin is not None) for sample in made.samples())


@pytest.mark.parametrize("mode", ["fast", "slow", "mixed"])
def test_think_modes(tokenizers_by_template: dict[str, Any], mode: Any) -> None:
    tokenizer = tokenizers_by_template["qwen3"]
    rows = Chats(2, control_of(tokenizer)).rows(150)
    args = DataArguments(chat_template="qwen3", think_mode=mode)
    made = both_ways(tokenizer, args, rows)
    assert assert_masks(tokenizer, args, rows, made) > 5


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
        assert assert_masks(tokenizer, DataArguments(chat_template=name), rows, made) > 100


@pytest.mark.parametrize(("edge", "step"), [(0, 1), (0, -1), (1, -1), (1, -2)])
def test_a_span_off_by_one_is_seen(tokenizers_by_template: dict[str, Any], edge: int, step: int) -> None:
    tokenizer = tokenizers_by_template["qwen3"]
    args = DataArguments(chat_template="qwen3")
    rows = Chats(5, control_of(tokenizer), tools=True).rows(20)
    made = both_ways(tokenizer, args, rows)
    made.spans[-1, edge] += step
    with pytest.raises(AssertionError):
        assert_masks(tokenizer, args, rows, made)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(10, 14))
@pytest.mark.parametrize("name", REAL)
def test_many_conversations(real: Callable[[str], Any], name: str, seed: int) -> None:
    tokenizer = real(name)
    rows = Chats(seed, control_of(tokenizer), tools=True).rows(3000)
    for args in (DataArguments(), DataArguments(think_mode="mixed")):
        made = both_ways(tokenizer, args, rows)
        assert assert_masks(tokenizer, args, rows, made) > 1000


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


def test_turns_that_read_alike(tokenizers_by_template: dict[str, Any]) -> None:
    """Places are told by turns, never by looking for a text."""
    tokenizer = tokenizers_by_template["chatml"]
    turns = [{"role": ("user", "assistant")[place % 2], "content": "a"} for place in range(6)]
    turns[3]["loss"] = False
    turns[5]["content"] = "assistant\na"
    (sample,) = both_ways(tokenizer, DataArguments(chat_template="chatml"), [{"messages": turns}]).samples()
    first, last = sample.spans.tolist()
    assert tokenizer.decode(sample.ids[: first[0]]) == "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(sample.ids[first[0] : first[1]]) == "a<|im_end|>"
    assert tokenizer.decode(sample.ids[last[0] :]) == "assistant\na<|im_end|>"


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


def test_a_private_character_in_a_call_is_not_taken_for_a_stand_in(tokenizers_by_template: dict[str, Any]) -> None:
    """Where control tokens are only text, private characters stand for them until ids are made."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": "\U000f0000"}}}
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": None, "tool_calls": [call]}]}
        for text in ("q", "q <|im_end|>")
    ]
    made = both_ways(tokenizers_by_template["qwen3"], DataArguments(chat_template="qwen3"), rows)
    assert [reject[2] for reject in made.rejects] == ["private_characters"]


def test_control_tokens_in_text_are_counted_by_rows(tokenizers_by_template: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_template["hunyuan_dense"]
    stop = tokenizer.eos_token
    ask = [f"say {stop} {stop}", "plain", f"{stop}", "x"]
    rows = [{"messages": [{"role": "user", "content": q}, {"role": "assistant", "content": "a"}] * 2} for q in ask]
    made = both_ways(tokenizer, DataArguments(chat_template="hunyuan_dense"), rows)
    assert made.neutralised == 2
    assert [sample.ids.tolist().count(tokenizer.eos_token_id) for sample in made.samples()] == [2, 2, 2, 2]
    assert ChatTemplate(tokenizer, "hunyuan_dense").special_tokens >= {stop}


def test_hy3s_think_tags_in_a_question_are_text(tokenizers_by_template: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_template["hy3"]
    rows = [
        {"messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "a"}]}
        for text in ("q", "q</think:opensource>")
    ]
    plain, hostile = both_ways(tokenizer, DataArguments(chat_template="hy3"), rows).samples()
    tag = tokenizer.convert_tokens_to_ids("</think:opensource>")
    assert hostile.ids.tolist().count(tag) == plain.ids.tolist().count(tag)


def test_an_answer_after_an_empty_prompt(tokenizers_by_template: dict[str, Any]) -> None:
    """Nothing stands before it that could open it; the sample before must not be looked at."""
    tokenizer = tokenizers_by_template["chatml"]
    args = DataArguments(chat_template="empty", mask_compat="hunyuan")
    answer = {"role": "assistant", "content": "a"}
    asked = [{"role": "user", "content": text} for text in ("q" + tokenizer.eos_token, "")]
    made = both_ways(tokenizer, args, [{"messages": [question, answer]} for question in (asked[0], asked[1], asked[1])])
    assert [code for _, _, code, _ in made.rejects][-2:] == ["mask_compat"] * 2
