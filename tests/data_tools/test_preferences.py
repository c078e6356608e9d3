"""Pairs of answers: the chosen one first, then the rejected one, each with loss on itself alone."""

import json
from pathlib import Path
from typing import Any

import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.encoder import EncodedChunk
from finebridge.data_tools.indexed import IndexedReader
from finebridge.data_tools.preprocess import TokenizerSource, prepare
from random_chats import Chats, both_ways

QUESTION = {"role": "user", "content": "1"}
HISTORY = [QUESTION, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]


def encode(tokenizer: Any, rows: list[Any], template: str = "hunyuan_dense", **changes: Any) -> EncodedChunk:
    return both_ways(tokenizer, DataArguments(chat_template=template, **changes), rows, "preference", "preference")


def shown(tokenizer: Any, made: EncodedChunk) -> list[str]:
    """Every sample's text, {{ }} around what carries loss."""
    texts: list[str] = []
    for sample in made.samples():
        ((start, end),) = sample.spans.tolist()
        assert end == len(sample.ids)
        texts.append(tokenizer.decode(sample.ids[:start]) + "{{" + tokenizer.decode(sample.ids[start:]) + "}}")
    return [text.replace("<｜hy_place▁holder▁no▁2｜>", "|").replace("<｜hy_begin▁of▁sentence｜>", "") for text in texts]


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "1", "chosen": "good", "rejected": "bad"},
        {"messages": [QUESTION], "chosen": "good", "rejected": "bad"},
        {"instruction": "1", "chosen": "good", "rejected": "bad"},
        {
            "chosen": [QUESTION, {"role": "assistant", "content": "good"}],
            "rejected": [QUESTION, {"role": "assistant", "content": "bad"}],
        },
        {"conversations": [{"from": "human", "value": "1"}], "chosen": {"from": "gpt", "value": "good"},
         "rejected": {"from": "gpt", "value": "bad"}},
    ],
)  # fmt: skip
def test_every_way_to_write_a_pair_gives_the_same_tokens(tokenizers_by_template: dict[str, Any], row: Any) -> None:
    tokenizer = tokenizers_by_template["hunyuan_dense"]
    made = encode(tokenizer, [row])
    assert made.lines.tolist() == [1, 1]
    assert shown(tokenizer, made) == [
        "<｜hy_User｜>1<｜hy_Assistant｜>{{good|}}",
        "<｜hy_User｜>1<｜hy_Assistant｜>{{bad|}}",
    ]


def test_earlier_answers_carry_no_loss(tokenizers_by_template: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_template["hunyuan_dense"]
    made = encode(tokenizer, [{"prompt": HISTORY, "chosen": "4", "rejected": "5"}])
    before = "<｜hy_User｜>1<｜hy_Assistant｜>2|<｜hy_User｜>3<｜hy_Assistant｜>"
    assert shown(tokenizer, made) == [before + "{{4|}}", before + "{{5|}}"]


@pytest.mark.parametrize("policy", ["split_turns", "truncate_context"])
def test_both_answers_lose_the_same_earlier_turns(tokenizers_by_template: dict[str, Any], policy: Any) -> None:
    """The chosen answer fits behind the whole conversation, the rejected one does not: one prompt for both."""
    tokenizer = tokenizers_by_template["hunyuan_dense"]
    row = {"prompt": HISTORY, "chosen": "4", "rejected": "5" * 5}
    made = encode(tokenizer, [row, {**row, "chosen": "6" * 5, "rejected": "7"}], over_long=policy, max_seq_length=11)
    before = "<｜hy_User｜>3<｜hy_Assistant｜>"
    assert shown(tokenizer, made) == [before + answer for answer in ("{{4|}}", "{{55555|}}", "{{66666|}}", "{{7|}}")]
    assert made.shortened == 2


def test_a_pair_of_which_one_answer_never_fits_is_rejected_whole(tokenizers_by_template: dict[str, Any]) -> None:
    rows = [{"prompt": HISTORY, "chosen": "4", "rejected": "5" * 20}, {"prompt": "1", "chosen": "2", "rejected": "3"}]
    made = encode(tokenizers_by_template["hunyuan_dense"], rows, over_long="truncate_context", max_seq_length=11)
    assert [reject[0::2] for reject in made.rejects] == [(1, "over_long")]
    assert made.lines.tolist() == [2, 2]


@pytest.mark.parametrize("name", ["qwen3", "chatml", "hunyuan_dense", "hunyuan_a13b"])
def test_any_pair_is_two_samples_or_a_reject(tokenizers_by_template: dict[str, Any], name: str) -> None:
    """Where neither answer has a thought of its own both follow one prompt, to the token."""
    tokenizer = tokenizers_by_template[name]
    chats = Chats(21, sorted(tokenizer.all_special_tokens))
    rows = [
        {"prompt": row["messages"][:-1], "chosen": row["messages"][-1], "rejected": chats.answer()}
        for row in chats.rows(200)
    ]
    made = encode(tokenizer, rows, name)
    samples = made.samples()
    assert len(samples) > 150
    for line, chosen, rejected in zip(made.lines[::2].tolist(), samples[::2], samples[1::2], strict=True):
        row = rows[line - 1]
        prompts = [sample.ids[: sample.spans[0, 0]].tolist() for sample in (chosen, rejected)]
        thoughts = [
            "think>" in row[key]["content"] or bool((row[key].get("reasoning_content") or "").strip())
            for key in ("chosen", "rejected")
        ]
        assert prompts[0] == prompts[1] or any(thoughts)
        for key, sample in (("chosen", chosen), ("rejected", rejected)):
            answer = row[key]["content"].split("</think>")[-1].split("<answer>")[-1].removesuffix("</answer>").strip()
            said = tokenizer.decode(sample.ids[sample.spans[0, 0] :].tolist(), clean_up_tokenization_spaces=False)
            assert answer in said


def test_a_prepared_pair(tmp_path: Path, tokenizers_by_template: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_template["hunyuan_dense"]
    tokenizer.chat_template = None
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    rows = [{"prompt": "1", "chosen": "22", "rejected": "3"}, {"prompt": "1", "chosen": "2", "rejected": "2"}]
    rows.append({"prompt": "4", "chosen": "5", "rejected": "666"})
    (tmp_path / "pairs.jsonl").write_text("\n".join(map(json.dumps, rows)))
    args = DataArguments(chat_template="hunyuan_dense", max_rejects=0.5)
    folder = prepare(
        [str(tmp_path / "pairs.jsonl")], TokenizerSource(str(tmp_path / "tokenizer")), args, tmp_path / "c"
    )
    report = json.loads((folder / "report.json").read_text())
    assert (report["kind"], report["rows"], report["samples"], report["rejects"]) == (
        "preference",
        3,
        4,
        {"bad_pair": 1},
    )
    tokens = IndexedReader(folder / "text_document")
    answers = [
        tokenizer.decode(tokens[number].tolist()).rpartition("｜>")[0].rpartition("｜>")[2] for number in range(4)
    ]
    assert [answer.partition("<")[0] for answer in answers] == ["22", "3", "5", "666"]
