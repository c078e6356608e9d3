"""Conversations over the limit: what each policy leaves of them, by hand, and that it is told.

With the template of the Hunyuan dense models and the tests' tokenizer every digit is a token and so is every control token:
a conversation has 1 token (2 with a system prompt, and its digits), each exchange 3 and its digits.
"""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.dataset import PreparedDataset
from finebridge.data_tools.encoder import EncodedChunk
from finebridge.data_tools.preprocess import TokenizerSource, prepare
from finebridge.data_tools.schema import DataError
from random_chats import Chats, both_ways

TEMPLATE = "hunyuan_dense"
Row = dict[str, Any]


def chat(*turns: str, system: str = "") -> Row:
    """Questions and answers by turns; an answer that begins with - carries no loss."""
    messages: list[Row] = [{"role": "system", "content": system}] * bool(system)
    for place, text in enumerate(turns):
        role = ("user", "assistant")[place % 2]
        messages.append({"role": role, "content": text.lstrip("-"), **({"loss": False} if text[0] == "-" else {})})
    return {"messages": messages}


ROWS = [
    chat("1", "2"),  # 6 tokens
    chat("1", "2", "3", "4", "5", "6"),  # 16
    chat("1", "2" * 30),  # 35
    chat("1", "2" * 30, "3", "4"),  # 40
    chat("1", "2", "3", "4", system="9"),  # 13
    chat("1", "-2", "3", "4"),  # 11
]


def encode(tokenizer: Any, longest: int, policy: Any, rows: Sequence[Row] = ROWS) -> EncodedChunk:
    args = DataArguments(chat_template=TEMPLATE, over_long=policy, max_seq_length=longest)
    return both_ways(tokenizer, args, rows)


def shown(tokenizer: Any, made: EncodedChunk) -> list[tuple[int, str]]:
    """The row and the text of every sample: digits alone, | for the end of a turn, what carries loss in braces."""
    result: list[tuple[int, str]] = []
    for line, sample in zip(made.lines.tolist(), made.samples(), strict=True):
        words = [tokenizer.decode([number]) for number in sample.ids.tolist()]
        for start, end in sample.spans.tolist():
            words[start] = "{" + words[start]
            words[end - 1] += "}"
        result.append((line, re.sub("<[^>]*no▁[23]｜>", "|", "".join(words))))
    return [(line, re.sub("<｜[^>]*｜>", "", text)) for line, text in result]


@pytest.fixture
def tokenizer(tokenizers_by_template: dict[str, Any]) -> Any:
    return tokenizers_by_template[TEMPLATE]


@pytest.mark.parametrize("policy", ["drop", "truncate", "error"])
def test_policies_of_reading_leave_the_prepared_data_alone(tokenizer: Any, policy: Any) -> None:
    made = encode(tokenizer, 8, policy)
    assert made.lengths.tolist() == [6, 16, 35, 40, 13, 11]
    assert made.rejects == []
    assert made.shortened == 0


def test_split_turns(tokenizer: Any) -> None:
    made = encode(tokenizer, 8, "split_turns")
    assert shown(tokenizer, made) == [
        (1, "1{2|}"),
        (2, "1{2|}"), (2, "3{4|}"), (2, "5{6|}"),
        (5, "9|1{2|}"), (5, "9|3{4|}"),
        (6, "3{4|}"),
    ]  # fmt: skip
    assert [reject[0::2] for reject in made.rejects] == [(3, "over_long"), (4, "over_long")]
    assert made.shortened == 3


def test_split_turns_keeps_as_many_exchanges_together_as_fit(tokenizer: Any) -> None:
    made = encode(
        tokenizer, 11, "split_turns", [chat("1", "2", "3", "4", "5", "6"), chat("1", "22", "3", "4", "5", "6")]
    )
    assert shown(tokenizer, made) == [(1, "1{2|}3{4|}"), (1, "5{6|}"), (2, "1{22|}"), (2, "3{4|}5{6|}")]


def test_split_turns_keeps_exchanges_without_loss_as_context(tokenizer: Any) -> None:
    rows = [
        chat("1", "-2", "3", "-4", "5", "6"),  # the last is trained
        chat("1", "-2", "3", "4", "5", "-6", "7", "8"),
        chat("1", "2", "3", "-4", "5", "-6"),  # nothing is learnt from what follows the last trained answer
        chat("1", "-2", "3", "4", "5", "6"),
    ]
    assert shown(tokenizer, encode(tokenizer, 11, "split_turns", rows)) == [
        (1, "34|5{6|}"),
        (2, "12|3{4|}"), (2, "56|7{8|}"),
        (3, "1{2|}"),
        (4, "12|3{4|}"), (4, "5{6|}"),
    ]  # fmt: skip


def test_split_turns_of_a_conversation_whose_last_turn_alone_is_trained(tokenizer: Any) -> None:
    row = chat(*(text for n in range(10) for text in ("1" * 20, "2" * 20 if n == 9 else "-" + "2" * 20)))
    both = [encode(tokenizer, 240, policy, [row]) for policy in ("split_turns", "truncate_context")]
    assert [made.lengths.tolist() for made in both] == [[216], [216]]  # 5 exchanges of 43 tokens
    assert both[0].ids.tolist() == both[1].ids.tolist()


def test_truncate_context(tokenizer: Any) -> None:
    made = encode(tokenizer, 11, "truncate_context")
    assert shown(tokenizer, made) == [
        (1, "1{2|}"),
        (2, "3{4|}5{6|}"),
        (4, "3{4|}"),
        (5, "9|3{4|}"),
        (6, "1{2|}3{4|}".replace("{2|}", "2|")),
    ]  # fmt: skip
    assert [reject[0::2] for reject in made.rejects] == [(3, "over_long")]
    assert made.shortened == 3


def test_two_questions_in_a_row_are_one_exchange(tokenizer: Any) -> None:
    row = chat("1", "2", "3", "4")
    row["messages"].insert(2, {"role": "user", "content": "77"})
    assert shown(tokenizer, encode(tokenizer, 10, "truncate_context", [row])) == [(1, "773{4|}")]


def test_a_template_that_drops_earlier_thoughts(tokenizers_by_template: dict[str, Any]) -> None:
    """Each answer is a sample of its own there, and each must fit; the exchanges after a cut are rendered anew."""
    tokenizer = tokenizers_by_template["qwen3"]
    turns = [{"role": ("user", "assistant")[place % 2], "content": text} for place, text in enumerate("123456")]
    for place in (1, 3, 5):
        turns[place]["reasoning_content"] = "7" * 9
    for policy in ("split_turns", "truncate_context"):
        args = DataArguments(chat_template="qwen3", over_long=policy, max_seq_length=70)
        made = both_ways(tokenizer, args, [{"messages": turns}])
        assert made.shortened == 1
        assert made.lengths.max() <= 70
        texts = [tokenizer.decode(sample.ids.tolist()) for sample in made.samples()]
        ends = [text.rpartition("\n")[2] for text in texts]
        assert ends == [f"{n}<|im_end|>" for n in ((2, 4, 6) if policy == "split_turns" else (4, 6))]


@pytest.mark.parametrize("policy", ["split_turns", "truncate_context"])
def test_an_answer_keeps_its_end_and_its_start(tokenizer: Any, policy: Any) -> None:
    """Of any conversation each sample holds whole exchanges: every span is a whole answer of the row with its terminator."""
    rows = Chats(11).rows(150)
    made = encode(tokenizer, 90, policy, rows)
    plain = encode(tokenizer, 90, "drop", rows)
    assert made.lengths.max() <= 90
    assert made.shortened > 10

    def answers(chunk: EncodedChunk) -> dict[int, list[list[int]]]:
        found: dict[int, list[list[int]]] = {}
        for line, sample in zip(chunk.lines.tolist(), chunk.samples(), strict=True):
            found.setdefault(line, []).extend(sample.ids[start:end].tolist() for start, end in sample.spans)
        return found

    whole = answers(plain)
    for line, spans in answers(made).items():
        assert spans == whole[line][len(whole[line]) - len(spans) :]
        if policy == "split_turns":
            assert len(spans) == len(whole[line])


# ---- told to the user


@pytest.fixture
def source(tokenizer: Any, tmp_path: Path) -> TokenizerSource:
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return TokenizerSource(str(tmp_path / "tokenizer"))


def test_what_is_split_or_cut_is_counted(tmp_path: Path, source: TokenizerSource) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    said: list[str] = []
    args = DataArguments(chat_template=TEMPLATE, over_long="split_turns", max_seq_length=8, max_rejects=1)
    folder = prepare([str(file)], source, args, tmp_path / "cache", said.append)
    report = json.loads((folder / "report.json").read_text())
    assert (report["rows"], report["samples"], report["shortened"], report["rejects"]) == (6, 7, 3, {"over_long": 2})
    assert "3 conversations over --max_seq_length split or cut at their turns" in said[0]
    with pytest.raises(DataError, match=r"rows\.jsonl:3: over_long: an exchange of this conversation is over 8 tokens"):
        prepare([str(file)], source, DataArguments(**{**vars(args), "max_rejects": None}), tmp_path / "cache")


@pytest.mark.parametrize(
    ("policy", "told", "lengths"),
    [
        ("drop", "5 of 6 samples are over --max_seq_length 8: .*; dropped", [6]),
        ("truncate", r"5 of 6 .*; cut at the end \(1 without any loss token left: dropped\)", [6, 8, 8, 8, 8]),
    ],
)
def test_policies_of_reading_tell_what_they_do(
    tmp_path: Path, source: TokenizerSource, policy: Any, told: str, lengths: list[int]
) -> None:
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    folder = prepare([str(file)], source, DataArguments(chat_template=TEMPLATE), tmp_path / "cache")
    said: list[str] = []
    data = PreparedDataset(folder, 8, policy, said.append)
    assert [len(data[number]["input_ids"]) for number in range(len(data))] == lengths
    assert re.search(told, said[0])
    assert f"{file}:2 (16)" in said[0]
    with pytest.raises(DataError, match=rf"5 of 6 samples are over --max_seq_length 8: {file}:2"):
        PreparedDataset(folder, 8, "error")
