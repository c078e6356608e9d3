"""``finebridge data check``, as a user calls it: every figure against one worked out by hand.

With the template of the Hunyuan dense models and the tests' tokenizer every digit is a token and so is every control token,
so a conversation has 1 token, and for each exchange 3 and its digits; loss is on the answer's digits and one token more.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.blocks import Block, write_prepared
from finebridge.data_tools.measures import Measured
from finebridge.finetune.cli import main

Row = dict[str, Any]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizers_by_template: dict[str, Any]) -> Path:
    """A folder with a tokenizer and its chat template, no model."""
    from finebridge.data_tools.templates import ChatTemplate

    folder = tmp_path_factory.mktemp("model")
    ChatTemplate(tokenizers_by_template["hunyuan_dense"], "hunyuan_dense")
    tokenizers_by_template["hunyuan_dense"].save_pretrained(folder)
    return folder


def chat(*turns: str) -> Row:
    """Questions and answers by turns."""
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def write(path: Path, rows: list[Row]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


DIGITS = [
    chat("1", "22"),  # 7 tokens, 3 with loss
    chat("1", "222222"),  # 11, 7
    {"messages": [{"role": "user", "content": "1"}, {"role": "asistant", "content": "2"}]},
    chat("1", "22"),  # 7, 3: the same as line 1
    chat("12", "3" * 14),  # 20, 15
    chat("1", "2", "3", "4"),  # 11, 4
]


@pytest.fixture(scope="module")
def digits(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("digits") / "digits.jsonl", DIGITS)


@pytest.fixture(scope="module")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


def check(*words: object) -> int:
    return main(["data", "check", *map(str, words)])


def test_the_report_says_what_is_worked_out_by_hand(
    model: Path, digits: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code = check(
        digits, "--tokenizer_name_or_path", model, "--output_dir", cache, "--max_rejects", 0.2, "--max_seq_length", 18
    )
    assert code == 0
    said = capsys.readouterr().out
    assert (
        f"{digits}:1: 7 tokens, 3 with loss\n<｜hy_begin▁of▁sentence｜><｜hy_User｜>1<｜hy_Assistant｜>{{{{22" in said
    )
    assert said[said.index("\nrows ") + 1 :] == (
        f"""\
rows            6: 5 samples (chat), 1 rejected
tokens          56: 32 with loss (57.1%)
length          p50 11, p90 20, p99 20, max 20, min 7, mean 11.2 tokens a sample
  1 to 16                          4   80.0%  {"#" * 40}
  17 to 32                         1   20.0%  {"#" * 10}
over the limit  1 sample over 18 tokens: 1 left out, 0 cut; 4 samples, 36 tokens remain
    {digits}:5: 20 tokens
packing         2 packs of 18 tokens, 100.0% filled (with --packing)
answers         6 trained, 1.20 a sample, at most 2 in one
  with a thought                   0    0.0%
  with an empty thought            0    0.0%
  without think tags               6  100.0%
  with tags out of order           0    0.0%
  asked with /no_think             0    0.0%
duplicates      1 sample with the same tokens as an earlier one
    {digits}:4: the same as {digits}:1
control tokens  in the text of 0 rows, encoded as plain text
rejected        1 row
  unknown_role                     1
    {digits}:3: message 2 has the role 'asistant'; did you mean 'assistant'?
"""
    )


def test_figures_as_json(model: Path, digits: Path, cache: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    words = (digits, "--tokenizer_name_or_path", model, "--output_dir", cache, "--max_rejects", 0.2, "--json", report)
    assert check(*words, "--max_seq_length", 18, "--over_long", "truncate") == 0
    figures = json.loads(report.read_text())
    assert {name: figures[name] for name in ("kind", "rows", "samples", "tokens", "loss_tokens", "problems")} == {
        "kind": "chat", "rows": 6, "samples": 5, "tokens": 56, "loss_tokens": 32, "problems": [],
    }  # fmt: skip
    assert figures["lengths"] == {
        "shortest": 7, "mean": 11.2, "p50": 11, "p90": 20, "p99": 20, "longest": 20,
        "histogram": [{"first": 1, "last": 16, "samples": 4}, {"first": 17, "last": 32, "samples": 1}],
    }  # fmt: skip
    assert figures["limit"] == {
        "max_seq_length": 18, "over_long": "truncate", "over": 1, "left_out": 0, "cut": 1, "samples": 5, "tokens": 54,
        "first": [{"where": f"{digits}:5", "detail": "20 tokens"}],
    }  # fmt: skip
    assert figures["packing"] == {"packs": 3, "fill": 1.0}
    assert figures["duplicates"] == {
        "count": 1, "first": [{"where": f"{digits}:4", "detail": f"the same as {digits}:1"}],
    }  # fmt: skip
    detail = "message 2 has the role 'asistant'; did you mean 'assistant'?"
    assert figures["rejected"] == [
        {"code": "unknown_role", "count": 1, "first": [{"where": f"{digits}:3", "detail": detail}]}
    ]


def test_a_cut_before_the_first_loss_token_leaves_a_sample_out(
    model: Path, digits: Path, cache: Path, tmp_path: Path
) -> None:
    """Answers begin at token 4, that of line 5 at token 5: 5 tokens leave one trained token of each other sample."""
    report = tmp_path / "report.json"
    words = (digits, "--tokenizer_name_or_path", model, "--output_dir", cache, "--max_rejects", 0.2, "--json", report)
    assert check(*words, "--max_seq_length", 5, "--over_long", "truncate") == 0
    limit = json.loads(report.read_text())["limit"]
    assert (limit["over"], limit["left_out"], limit["cut"], limit["samples"], limit["tokens"]) == (5, 1, 4, 4, 20)


def test_a_cut_that_leaves_loss_on_the_first_token_alone(
    tmp_path: Path, tokenizers_by_template: dict[str, Any]
) -> None:
    trained = np.zeros(20, np.bool_)
    trained[[0, 10]] = True  # the first token is never predicted
    block = Block(np.arange(20, dtype=np.int32), trained, np.asarray([20]), np.asarray([0]))
    write_prepared(tmp_path, [block], Path("raw"))
    figures = [
        Measured(tmp_path).measure(
            tokenizers_by_template["hunyuan_dense"], DataArguments(max_seq_length=longest, over_long="truncate")
        )
        for longest in (10, 11)
    ]
    assert [(figure.limit.left_out, figure.limit.cut, figure.limit.tokens) for figure in figures] == [
        (1, 0, 0),
        (0, 1, 11),
    ]


def test_forms_of_answers(model: Path, tmp_path: Path) -> None:
    slow, fast = (
        "<think>\none and one\n</think>\n<answer>\n2\n</answer>",
        "<think>\n\n</think>\n<answer>\n2\n</answer>",
    )
    rows = [
        chat("1+1=", slow),
        chat("/no_think1+1=", fast),
        chat("/no_think1+1=", fast, "and 2+2?", slow),  # the second question is asked without the mark
        chat("say <think>", "2"),  # tags in a question do not count
        chat("1+1=", "<think>\none\n</think>\n\n2"),  # a thought without answer tags
        chat("1+1=", "two, </think> or <think>"),  # line 6
        chat("1+1=", "<think>\none\n</think>\n\nsee <think>"),  # line 7
    ]
    data, report = write(tmp_path / "forms.jsonl", rows), tmp_path / "report.json"
    assert check(data, "--tokenizer_name_or_path", model, "--output_dir", tmp_path / "c", "--json", report) == 0
    figures = json.loads(report.read_text())
    assert figures["answers"] == {
        "trained": 8, "most_in_a_sample": 2, "thought": 3, "empty_thought": 2, "plain": 1, "malformed": 2, "no_think": 2,
        "malformed_first": [{"where": f"{data}:{line}", "detail": "tags out of order"} for line in (6, 7)],
    }  # fmt: skip
    assert figures["neutralised_rows"] == 0


def test_a_thought_that_the_prompt_opens(tmp_path: Path, tokenizers_by_template: dict[str, Any]) -> None:
    """Qwen3 asks without thinking by an empty thought in the prompt; its tags are tokens of their own."""
    tokenizers_by_template["qwen3"].save_pretrained(tmp_path / "model")
    rows = [chat("1+1=", "2"), chat("1+1=", "<think>\none\n</think>\n\n2")]
    data, report = write(tmp_path / "rows.jsonl", rows), tmp_path / "report.json"
    words = (data, "--tokenizer_name_or_path", tmp_path / "model", "--chat_template", "qwen3")
    assert check(*words, "--output_dir", tmp_path / "c", "--json", report) == 0
    answers = json.loads(report.read_text())["answers"]
    assert (answers["trained"], answers["thought"], answers["empty_thought"], answers["plain"]) == (2, 1, 1, 0)


def test_control_tokens_in_texts_are_counted(model: Path, tmp_path: Path) -> None:
    data = write(tmp_path / "rows.jsonl", [chat("what is <｜hy_User｜>?", "a token"), chat("q", "a")])
    report = tmp_path / "report.json"
    assert check(data, "--tokenizer_name_or_path", model, "--output_dir", tmp_path / "c", "--json", report) == 0
    assert json.loads(report.read_text())["neutralised_rows"] == 1


def test_documents(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "texts.jsonl", [{"text": "1234"}, {"text": "12"}, {"text": "1234"}])
    report = tmp_path / "report.json"
    assert check(data, "--tokenizer_name_or_path", model, "--output_dir", tmp_path / "c", "--json", report) == 0
    figures = json.loads(report.read_text())
    assert (figures["kind"], figures["tokens"], figures["loss_tokens"]) == ("document", 10, 10)
    assert (figures["packing"], figures["answers"], figures["duplicates"]["count"]) == (None, None, 1)
    assert "answers" not in (said := capsys.readouterr().out)
    assert "{{1234}}" in said


def test_pairs_are_compared_as_pairs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pair = {"prompt": "1", "chosen": "22", "rejected": "333"}
    rows = [pair, {**pair, "rejected": "44"}, pair]
    data, report = write(tmp_path / "pairs.jsonl", rows), tmp_path / "report.json"
    assert check(data, "--tokenizer_name_or_path", model, "--output_dir", tmp_path / "c", "--json", report) == 0
    figures = json.loads(report.read_text())
    assert (figures["kind"], figures["rows"], figures["samples"], figures["packing"]) == ("preference", 3, 6, None)
    assert figures["tokens"] == (7 + 8) + (7 + 7) + (7 + 8)
    assert figures["duplicates"] == {
        "count": 1, "first": [{"where": f"{data}:3", "detail": f"the same as {data}:1"}],
    }  # fmt: skip
    said = capsys.readouterr().out
    assert f"{data}:1: chosen answer: 7 tokens, 3 with loss" in said
    assert f"{data}:1: rejected answer: 8 tokens, 4 with loss" in said
    assert "1 pair with the same tokens" in said


def test_a_prepared_folder_gives_the_same_report(
    model: Path, digits: Path, cache: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ("--tokenizer_name_or_path", model, "--max_rejects", 0.2, "--count", 0)
    assert check(digits, *words, "--output_dir", cache) == 0
    raw = capsys.readouterr().out
    folder = next(path for path in cache.iterdir() if path.is_dir() and not path.name.startswith("."))
    assert check(folder, *words) == 0
    prepared = capsys.readouterr().out
    assert prepared[prepared.index("\nrows ") :] == raw[raw.index("\nrows ") :]
    assert check(folder, *words, "--think_mode", "fast") == 2
    assert "--think_mode shapes tokens" in capsys.readouterr().err
    assert check(folder, digits, *words) == 2
    assert "is a prepared dataset; name it alone" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "1 of 6 rows are rejected, more than --max_rejects 0.05 allows"),
        (("--max_rejects", "0.2", "--strict"), "--strict: 1 of 6 rows are rejected"),
        (
            ("--max_rejects", "0.2", "--max_seq_length", "18", "--over_long", "error"),
            "1 sample is over --max_seq_length 18",
        ),
        (("--max_rejects", "0.2", "--max_seq_length", "6"), "no sample is left under --max_seq_length 6"),
    ],
)
def test_unusable_data_ends_with_2_after_the_report(
    model: Path,
    digits: Path,
    cache: Path,
    tmp_path: Path,
    words: tuple[str, ...],
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    report = tmp_path / "report.json"
    code = check(digits, "--tokenizer_name_or_path", model, "--output_dir", cache, "--json", report, *words)
    said = capsys.readouterr()
    assert code == 2
    assert message in said.err
    assert "rows            6: 5 samples (chat), 1 rejected" in said.out
    assert message in "\n".join(json.loads(report.read_text())["problems"])


def test_wrong_input_is_refused_before_the_tokenizer_is_loaded(
    digits: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = ("--tokenizer_name_or_path", tmp_path / "nowhere", "--output_dir", tmp_path / "c")
    assert check(tmp_path / "no.jsonl", *nowhere) == 2
    assert f"{tmp_path / 'no.jsonl'}: no such data file" in capsys.readouterr().err
    texts = write(tmp_path / "texts.jsonl", [{"text": "1"}])
    assert check(digits, texts, *nowhere) == 2
    assert "different kinds (chat, document)" in capsys.readouterr().err
    assert check(digits, *nowhere, "--json", tmp_path / "no" / "r.json") == 2
    assert f"there is no folder {tmp_path / 'no'}" in capsys.readouterr().err
    assert check(digits, *nowhere, "--count", -1) == 2
    assert "--count -1" in capsys.readouterr().err
    assert not (tmp_path / "c").exists()


def test_another_tokenizers_folder_is_refused(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    data = write(tmp_path / "rows.jsonl", [chat("1", "2")])
    assert check(data, "--tokenizer_name_or_path", model, "--output_dir", tmp_path / "c") == 0
    folder = next(path for path in (tmp_path / "c").iterdir() if path.is_dir())
    backend = Tokenizer(models.BPE({"a": 0, "b": 1}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel()
    PreTrainedTokenizerFast(tokenizer_object=backend).save_pretrained(tmp_path / "small")
    capsys.readouterr()
    assert check(folder, "--tokenizer_name_or_path", tmp_path / "small") == 2
    assert "was made with another tokenizer" in capsys.readouterr().err


def test_a_changed_folder_is_not_trusted(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "rows.jsonl", [chat("1", "2")])
    assert check(data, "--tokenizer_name_or_path", model, "--output_dir", tmp_path / "c") == 0
    folder = next(path for path in (tmp_path / "c").iterdir() if path.is_dir())
    with (folder / "text_document.bin").open("ab") as stream:
        stream.write(b"more")
    assert check(folder, "--tokenizer_name_or_path", model) == 2
    assert "text_document.bin: 28 bytes, the manifest says 24" in capsys.readouterr().err


def test_duplicates_of_many_samples(model: Path, tmp_path: Path) -> None:
    """Blocks do not matter: the same count as by comparing every sample with every other."""
    numbers = np.random.default_rng(0).integers(0, 40, 200).tolist()
    data = write(tmp_path / "rows.jsonl", [chat(str(number), "1") for number in numbers])
    report = tmp_path / "report.json"
    assert check(data, "--tokenizer_name_or_path", model, "--output_dir", tmp_path / "c", "--json", report) == 0
    found = json.loads(report.read_text())["duplicates"]
    assert found["count"] == 200 - len(set(numbers))
    again = [(i, numbers.index(number)) for i, number in enumerate(numbers) if numbers.index(number) < i][:3]
    assert found["first"] == [{"where": f"{data}:{i + 1}", "detail": f"the same as {data}:{j + 1}"} for i, j in again]
    folder = next(path for path in (tmp_path / "c").iterdir() if path.is_dir())
    assert Measured(folder).origin(199) == f"{data}:200"


def test_a_vocabulary_with_a_hole(tmp_path: Path) -> None:
    """Ids 0, 1 and 900: ``len`` of this tokenizer is far below its largest id."""
    from finebridge.data_tools.tokenizer_files import vocabulary_size
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"u": 0, "?": 1, "a": 900}, unk_token="?"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Split("", "isolated"), decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="?")
    assert (len(tokenizer), vocabulary_size(tokenizer)) == (3, 901)
    block = Block(np.asarray([0, 900], np.int32), np.asarray([False, True]), np.asarray([2]), np.asarray([0]))
    write_prepared(tmp_path, [block], Path("raw"))
    report = Measured(tmp_path).measure(tokenizer, DataArguments())
    assert report.answers is not None
    assert (report.answers.trained, report.answers.plain) == (1, 1)


def test_no_deepspeed_and_no_gpu_is_touched(model: Path, digits: Path, cache: Path) -> None:
    code = (
        "import sys; from finebridge.finetune.cli import main; code = main(sys.argv[1:]); "
        "torch = sys.modules.get('torch'); "
        "print(code, 'deepspeed' in sys.modules, torch is not None and torch.cuda.is_initialized())"
    )
    words = ["data", "check", digits, "--tokenizer_name_or_path", model, "--output_dir", cache, "--max_rejects", "0.2"]
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, words)], capture_output=True, text=True, check=False, env=os.environ
    )
    assert done.stdout.splitlines()[-1] == "0 False False", done.stderr
