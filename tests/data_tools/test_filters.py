"""Rows that are left out on purpose: each rule by itself, and as counted rejects of a build."""

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.duplicates import Seen, split_places
from finebridge.data_tools.filters import Filters, row_hash
from finebridge.data_tools.formats import RowForm, parse_row
from finebridge.data_tools.ngrams import EvaluationTexts, ngram_hashes, repetition, words_of
from finebridge.data_tools.preprocess import prepare
from finebridge.data_tools.schema import DataError, Document, Rejected
from finebridge.data_tools.tokenizer_files import TokenizerSource
from finebridge.finetune.cli import main

EXAMPLE = Path(__file__).resolve().parents[2] / "finetune" / "example_data"
SOURCE = TokenizerSource(str(EXAMPLE))
QUESTION = "A train leaves the station at nine and rides for three hours and twenty minutes to the sea"


def chat(question: str, answer: str, **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer, **more}]
    return {"messages": turns}


def rows_file(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def hashed(row: dict[str, Any]) -> bytes:
    return row_hash(parse_row(row, RowForm("messages")))


# ---- words and n-grams


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Don't stop, x_1!", ["don", "t", "stop", "x", "1"]),
        ("STRASSE Straße ＡＢＣ ﬁt", ["strasse", "strasse", "abc", "fit"]),
        ("今天天气 good 3.14", ["今", "天", "天", "气", "good", "3", "14"]),
        ("カタカナ 한국어 สวัส", ["カ", "タ", "カ", "ナ", "한국어", "ส", "ว", "ั", "ส"]),
        ("Привет, мир", ["привет", "мир"]),
        (" \n--- ", []),
    ],
)
def test_words(text: str, words: list[str]) -> None:
    assert words_of(text) == words


def test_the_fast_way_for_ascii_is_the_same() -> None:
    chance = random.Random(2)
    for _ in range(300):
        text = "".join(chr(chance.randrange(128)) for _ in range(60))
        assert words_of(text) == words_of(text + " \u00e9")[:-1]


def test_ngram_hashes_tell_runs_apart() -> None:
    numbers = np.array([1, 2, 3, 1, 2, 3, 2, 1], np.uint64)
    hashes = ngram_hashes(numbers, 3)
    assert len(hashes) == 6
    assert hashes[0] == hashes[3]
    assert len(set(hashes.tolist())) == 5
    assert not len(ngram_hashes(numbers, 9))


# ---- evaluation data


def test_thirteen_words_in_a_row_are_found_and_twelve_are_not() -> None:
    words = words_of(QUESTION)
    texts = EvaluationTexts([("eval.jsonl:1", QUESTION)])
    for first in range(len(words) - 12):
        found = texts.find(["So: " + " ".join(words[first : first + 13]).upper() + "!"])
        assert found is not None
        assert (found.where, found.words) == ("eval.jsonl:1", " ".join(words[first : first + 13]))
    for first in range(len(words) - 11):
        assert texts.find(["so " + " ".join(words[first : first + 12]) + " so"]) is None
    assert texts.find([" ".join(words[:7]), " ".join(words[7:])]) is None  # not over two texts


def test_short_evaluation_texts_are_looked_for_as_a_whole() -> None:
    eight = "one two three four five six seven eight"
    texts = EvaluationTexts([("e:1", eight), ("e:2", "only four words here")])
    assert (len(texts), texts.too_short) == (1, 1)
    assert texts.find([f"zero {eight} nine"]) is not None
    assert texts.find([eight.removeprefix("one ")]) is None


def test_random_texts_against_a_plain_search() -> None:
    chance = random.Random(3)
    words = [f"w{number}" for number in range(6)]
    held_out = [[chance.choice(words) for _ in range(chance.randint(8, 40))] for _ in range(40)]
    texts = EvaluationTexts([(str(number), " ".join(text)) for number, text in enumerate(held_out)])
    runs = {tuple(text[i : i + 13]) for text in held_out for i in range(len(text) - min(len(text), 13) + 1)}
    hits = 0
    for _ in range(300):
        row = [chance.choice(words) for _ in range(chance.randint(1, 60))]
        if chance.random() < 0.3:
            row[chance.randrange(len(row)) :] = chance.choice(held_out)
        wanted = any(tuple(row[i : i + n]) in runs for n in range(8, 14) for i in range(len(row) - n + 1))
        hits += wanted
        assert (texts.find([" ".join(row)]) is not None) == wanted
    assert 50 < hits < 250


# ---- repetition


NORMAL = " ".join(f"{number * 7919 % 1000}x{number * 104729 % 997}" for number in range(120))


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("The same line again\n" * 20, "lines that came before"),
        (NORMAL + " ha ha" * 60, "the 2 words 'ha ha'"),
        (NORMAL + " a rather long sentence that comes twice with all of its many words" * 9, "runs of|the [234] words"),
        ("好的" * 40, "the 2 words"),
    ],
)
def test_text_that_repeats_itself(text: str, told: str) -> None:
    assert re.search(told, repetition(text) or "")


@pytest.mark.parametrize(
    "text", [NORMAL, "ha ha ha ha", "", "".join(chr(0x4E00 + number * 37) for number in range(200)), "1\n" * 49]
)
def test_text_that_does_not(text: str) -> None:
    assert repetition(text) is None


# ---- the rules on rows


def test_each_rule_has_its_code(tmp_path: Path) -> None:
    rows_file(tmp_path / "eval.jsonl", [{"question": QUESTION, "choices": ["a", {"label": 3}]}])
    args = DataArguments(min_chars=10, max_chars=2000, drop_repetitive=True, decontaminate=str(tmp_path / "eval.jsonl"))
    filters = Filters.of(args)
    assert filters is not None
    for row, code in (
        (chat("1+1=", "2"), "too_short"),
        (chat("?" * 1999, "no"), "too_long"),
        (chat("Say it.", "ha ha " * 200), "repetitive"),
        (chat(f"Please: {QUESTION}.", "At twenty past twelve."), "contaminated"),
        (chat("Hm?", QUESTION), "contaminated"),
    ):
        with pytest.raises(Rejected) as told:
            filters(parse_row(row, RowForm("messages")))
        assert told.value.code == code
    filters(parse_row(chat("ha ha " * 200, "Funny, is it?"), RowForm("messages")))  # only what is trained is judged
    filters(parse_row(chat("ha ha?", "ha ha " * 200, loss=False) | {"messages": [
        {"role": "user", "content": "a"}, {"role": "assistant", "content": "ha ha " * 200, "loss": False},
        {"role": "user", "content": "b"}, {"role": "assistant", "content": "Enough of it."}]}, RowForm("messages")))  # fmt: skip
    assert Filters.of(DataArguments(deduplicate=True)) is None


def test_what_system_turns_of_evaluation_data_say_is_not_looked_for(tmp_path: Path) -> None:
    shared = "You are an assistant who answers every question in a short and friendly way, always"
    row = {"messages": [{"role": "system", "content": shared}, {"role": "user", "content": QUESTION}]}
    file = rows_file(tmp_path / "eval.jsonl", [row])
    filters = Filters.of(DataArguments(decontaminate=str(file)))
    assert filters is not None
    row = chat("Hm?", "Yes.")
    row["messages"].insert(0, {"role": "system", "content": shared})
    filters(parse_row(row, RowForm("messages")))
    with pytest.raises(Rejected):
        filters(Document("See: " + QUESTION))


def test_hashes_of_rows_that_say_the_same() -> None:
    plain = hashed(chat("What  is\n1+1?", "It is 2."))
    assert len(plain) == 16
    assert hashed(chat(" What is 1+1? ", "It is\t2.")) == plain
    assert hashed(chat("caf\u00e9", "x")) == hashed(chat("cafe\u0301", "x"))
    assert hashed(chat("What is 1+1?", "It is 2.") | {"id": 7}) == plain
    for other in (chat("What is 1+1?", "it is 2."), chat("What is 1 +1?", "It is 2."), chat("What", "is 1+1? It is 2."),
                  chat("What is 1+1?", "It is 2.", reasoning_content="Hm.")):  # fmt: skip
        assert hashed(other) != plain


def test_seen_against_a_dictionary() -> None:
    chance = np.random.default_rng(5)
    seen, known = Seen(), dict[tuple[int, int], tuple[int, int]]()
    for number in range(40):
        hashes = chance.integers(0, 60, (400, 2)).astype(np.uint64) * np.uint64(1 << 58)
        owners, lines = split_places(seen.add(hashes, np.full(400, number), np.arange(400)))
        for line, (a, b) in enumerate(hashes.tolist()):
            before = known.setdefault((a, b), (number, line))
            expected = (-1, -1) if before == (number, line) else before
            assert (owners[line], lines[line] if owners[line] >= 0 else -1) == expected


# ---- in a build


def test_a_build_counts_and_lists_them(tmp_path: Path) -> None:
    folder = tmp_path / "data"
    folder.mkdir()
    rows_file(
        folder / "a.jsonl", [chat("1+1=", "2"), chat(QUESTION, "At noon."), chat("1+1= ", "2"), chat("2+2=", "4")]
    )
    rows_file(folder / "b.jsonl", [chat("2+2=", " 4"), chat("3+3=", "6")])
    rows_file(tmp_path / "eval.jsonl", [{"text": QUESTION}])
    args = DataArguments(deduplicate=True, decontaminate=str(tmp_path / "eval.jsonl"))
    said: list[str] = []
    made = prepare(
        [str(folder)], SOURCE, args, tmp_path / "cache", said.append
    )  # 3 of 6 are over --max_rejects' default
    report = json.loads((made / "report.json").read_text())
    assert report["rejects"] == {"contaminated": 1, "duplicate": 2}
    assert (report["rows"], report["samples"]) == (6, 3)
    listed = [json.loads(line) for line in (made / "rejects.jsonl").read_text().splitlines()]
    assert [(Path(row["file"]).name, row["line"], row["code"]) for row in listed] == [
        ("a.jsonl", 2, "contaminated"), ("a.jsonl", 3, "duplicate"), ("b.jsonl", 1, "duplicate")]  # fmt: skip
    assert listed[1]["detail"] == f"the same as {folder / 'a.jsonl'}:1"
    assert listed[2] | {"file": ""} == {"file": "", "line": 1, "offset": 0, "code": "duplicate",
                                        "detail": f"the same as {folder / 'a.jsonl'}:4"}  # fmt: skip
    assert listed[1]["offset"] == sum(map(len, (folder / "a.jsonl").read_bytes().splitlines(keepends=True)[:2]))
    assert np.fromfile(made / "digests.bin", "<u8").reshape(-1, 2).shape == (3, 2)
    assert "1 texts of" in " ".join(said)
    assert np.load(made / "rows.npy").tolist() == [[0, 1], [0, 4], [1, 2]]
    alone = prepare([str(folder)], SOURCE, DataArguments(), tmp_path / "cache", said.append)
    assert alone != made
    assert json.loads((alone / "report.json").read_text())["rejects"] == {}


def test_evaluation_files_are_a_part_of_the_key(tmp_path: Path) -> None:
    data = rows_file(tmp_path / "a.jsonl", [chat("1+1=", "2")])
    held_out = rows_file(tmp_path / "eval.jsonl", [{"text": QUESTION}])
    args = DataArguments(decontaminate=str(held_out))
    first = prepare([str(data)], SOURCE, args, tmp_path / "cache", lambda _: None)
    rows_file(held_out, [{"text": QUESTION + " again"}])
    assert prepare([str(data)], SOURCE, args, tmp_path / "cache", lambda _: None) != first
    with pytest.raises(DataError, match="--decontaminate shapes tokens"):
        prepare([str(first)], SOURCE, args, tmp_path / "cache", lambda _: None)


def test_when_nothing_is_left_the_filters_are_named(tmp_path: Path) -> None:
    data = rows_file(tmp_path / "a.jsonl", [chat("1+1=", "2")])
    with pytest.raises(DataError, match=r"none is left to train on:\n.*a\.jsonl:1: too_short: 5 characters"):
        prepare([str(data)], SOURCE, DataArguments(min_chars=9), tmp_path / "cache", lambda _: None)


def test_strict_is_for_rows_that_cannot_be_used(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = rows_file(tmp_path / "a.jsonl", [chat("1+1=", "2"), chat("What is 2+2?", "It is 4.")])
    words = [
        "data",
        "check",
        str(data),
        "--tokenizer_name_or_path",
        str(EXAMPLE),
        "--output_dir",
        str(tmp_path / "out"),
    ]
    assert main([*words, "--min_chars", "9", "--strict"]) == 0
    assert "a.jsonl:1: 5 characters, --min_chars 9" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (["--min_chars", "0"], "--min_chars 0: at least 1"),
        (["--min_chars", "9", "--max_chars", "8"], "--min_chars 9 is over --max_chars 8"),
        (["--decontaminate", "none.jsonl"], "--decontaminate: none.jsonl"),
        (["--decontaminate", "short.jsonl"], "no text has 8 words"),
        (["--decontaminate", "broken.jsonl"], "--decontaminate broken.jsonl:2: not_json"),
    ],
)
def test_bad_flags(
    flags: list[str], told: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path / "a.jsonl", [chat("1+1=", "2")])
    rows_file(tmp_path / "short.jsonl", [{"text": "too few words"}])
    (tmp_path / "broken.jsonl").write_text(json.dumps({"text": QUESTION}) + "\n{broken\n")
    words = ["data", "build", "a.jsonl", "--tokenizer_name_or_path", str(EXAMPLE), "--output_dir", "out", *flags]
    assert main(words) == 2
    assert told in capsys.readouterr().err
