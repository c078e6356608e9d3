"""``finebridge data preview``, as a user calls it: on the terminal and as a page that hostile rows cannot break."""

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.output import save
from finebridge.data_tools.preview import as_trained
from finebridge.data_tools.schema import DataError, TokenizedSample
from finebridge.data_tools.token_view import cut, pieces, stretches, visible
from finebridge.finetune.cli import main

BOS, USER, ASSISTANT, END = (
    "<｜hy_begin▁of▁sentence｜>",
    "<｜hy_User｜>",
    "<｜hy_Assistant｜>",
    "<｜hy_place▁holder▁no▁2｜>",
)
HOSTILE = """</pre><script>alert(1)</script><img src=x onerror="alert(2)">'&amp;{{<b title='x'>&lt;<!-- ]]>"""


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory, tokenizers_by_template: dict[str, Any]) -> Path:
    from finebridge.data_tools.templates import ChatTemplate

    folder = tmp_path_factory.mktemp("model")
    ChatTemplate(tokenizers_by_template["hunyuan_dense"], "hunyuan_dense")
    tokenizers_by_template["hunyuan_dense"].save_pretrained(folder)
    return folder


def chat(*turns: str) -> dict[str, Any]:
    return {"messages": [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]}


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(
        tmp_path_factory.mktemp("rows") / "rows.jsonl",
        [
            chat("1", "22", "3", "4"),
            {"messages": [{"role": "user", "content": "1"}, {"role": "asistant", "content": "2"}]},
            "{broken",
            "",
            chat(f"what is {USER}?", "日 😀"),
            chat("1", "5"),
        ],
    )


def preview(*words: object) -> int:
    return main(["data", "preview", *map(str, words)])


def test_what_is_trained_stands_in_braces(model: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview(rows, "--tokenizer_name_or_path", model, "--count", 4) == 0
    said = capsys.readouterr().out
    assert said == (
        f"{rows}:1: 12 tokens, 5 with loss\n"
        f"{BOS}{USER}1{ASSISTANT}{{{{22{END}}}}}{USER}3{ASSISTANT}{{{{4{END}}}}}\n"
        f"{rows}:2: rejected, unknown_role: message 2 has the role 'asistant'; did you mean 'assistant'?\n"
        f"{rows}:3: rejected, not_json: {said.split('not_json: ')[1].splitlines()[0]}\n"
        f"{rows}:5: control tokens in its text are encoded as plain text\n"
        f"{rows}:5: {said.split(':5: ')[2].splitlines()[0]}\n"
        f"{BOS}{USER}what is {USER}?{ASSISTANT}{{{{日 😀{END}}}}}\n"
    )


def test_one_line(model: Path, rows: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert preview(rows, "--tokenizer_name_or_path", model, "--line", 6) == 0
    said = capsys.readouterr().out
    assert said == f"{rows}:6: 6 tokens, 2 with loss\n{BOS}{USER}1{ASSISTANT}{{{{5{END}}}}}\n"
    assert preview(rows, "--tokenizer_name_or_path", model, "--row", 6) == 0
    assert capsys.readouterr().out == said


def test_a_line_far_into_a_file(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "long.jsonl", [chat("1", "x" * 999)] * 3000 + [chat("1", "5")])  # several chunks
    assert preview(data, "--tokenizer_name_or_path", model, "--line", 3001) == 0
    assert capsys.readouterr().out.startswith(f"{data}:3001: 6 tokens, 2 with loss\n")


def test_token_by_token(
    model: Path, rows: Path, capsys: pytest.CaptureFixture[str], tokenizers_by_template: dict[str, Any]
) -> None:
    assert preview(rows, "--tokenizer_name_or_path", model, "--line", 6, "--tokens") == 0
    ids = tokenizers_by_template["hunyuan_dense"].convert_tokens_to_ids([BOS, USER, "1", ASSISTANT, "5", END])
    said = capsys.readouterr().out.splitlines()[1:]
    assert [line.split() for line in said] == [
        ["0", str(ids[0]), "-", f"'{BOS}'", "control"],
        ["1", str(ids[1]), "-", f"'{USER}'", "control"],
        ["2", str(ids[2]), "-", "'1'"],
        ["3", str(ids[3]), "-", f"'{ASSISTANT}'", "control"],
        ["4", str(ids[4]), "loss", "'5'"],
        ["5", str(ids[5]), "loss", f"'{END}'", "control"],
    ]
    assert preview(rows, "--tokenizer_name_or_path", model, "--line", 5, "--tokens") == 0
    said = capsys.readouterr().out.splitlines()
    assert sum("'日'" in line for line in said) == 1
    assert [line.split()[2] for line in said if "'日'" in line] == ["loss"]
    assert not any(f"'{USER}'" in line and "control" not in line for line in said)  # as plain text it is many tokens


def test_documents_and_pairs(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    texts = write(tmp_path / "texts.jsonl", [{"text": f"12 {END}"}])
    assert preview(texts, "--tokenizer_name_or_path", model) == 0
    assert capsys.readouterr().out.endswith(f"{{{{12 {END}}}}}\n")
    pairs = write(tmp_path / "pairs.jsonl", [{"prompt": "1", "chosen": "22", "rejected": "333"}])
    assert preview(pairs, "--tokenizer_name_or_path", model) == 0
    assert capsys.readouterr().out == (
        f"{pairs}:1: chosen answer: 7 tokens, 3 with loss\n{BOS}{USER}1{ASSISTANT}{{{{22{END}}}}}\n"
        f"{pairs}:1: rejected answer: 8 tokens, 4 with loss\n{BOS}{USER}1{ASSISTANT}{{{{333{END}}}}}\n"
    )


@pytest.mark.parametrize(
    ("policy", "longest", "note", "shown"),
    [
        ("drop", 8, "over --max_seq_length 8: left out of training (--over_long drop)", f"{{{{2222222{END}}}}}"),
        ("error", 8, "over --max_seq_length 8: training stops here (--over_long error)", f"{{{{2222222{END}}}}}"),
        ("truncate", 8, "over --max_seq_length 8: cut after 8 of 12 tokens (--over_long truncate)", "{{2222}}"),
        ("truncate", 3, "no token with loss is left after the cut", f"{{{{2222222{END}}}}}"),
    ],
)
def test_long_samples(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], policy: str, longest: int, note: str, shown: str
) -> None:
    data = write(tmp_path / "rows.jsonl", [chat("1", "2222222")])
    words = ("--tokenizer_name_or_path", model, "--max_seq_length", longest, "--over_long", policy)
    assert preview(data, *words) == 0
    heading, told, text = capsys.readouterr().out.splitlines()
    size = "8 tokens, 4 with loss" if shown == "{{2222}}" else "12 tokens, 8 with loss"
    assert heading == f"{data}:1: {size}"
    assert note in told
    assert text == f"{BOS}{USER}1{ASSISTANT}{shown}"


def test_loss_on_the_first_token_alone_is_no_loss() -> None:
    sample = TokenizedSample(np.arange(20, dtype=np.int32), np.asarray([[0, 1], [10, 11]], np.int32))
    left = [as_trained(sample, DataArguments(max_seq_length=n, over_long="truncate")) for n in (10, 11)]
    assert [len(short.ids) for short, _ in left] == [20, 11]
    assert "left out of training, for no token with loss is left" in left[0][1]
    assert "cut after 11 of 20 tokens" in left[1][1]


def test_several_samples_of_one_conversation(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(tmp_path / "rows.jsonl", [chat("1", "22", "3", "44")])
    words = ("--tokenizer_name_or_path", model, "--max_seq_length", 8, "--over_long", "split_turns")
    assert preview(data, *words) == 0
    said = capsys.readouterr().out
    assert f"{data}:1: sample 1 of 2: 7 tokens, 3 with loss\n{BOS}{USER}1" in said
    assert f"{data}:1: sample 2 of 2: 7 tokens, 3 with loss\n{BOS}{USER}3" in said


def test_a_terminal_obeys_nothing_of_a_row(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write(
        tmp_path / "rows.jsonl", [chat("\x1b]0;title\x07 [red]x[/red]", "a\u202eb\r\x9bc\td"), {"messages": "\x1b[2J"}]
    )
    assert preview(data, "--tokenizer_name_or_path", model) == 0
    said = capsys.readouterr().out
    assert "<U+001B>]0;title<U+0007> [red]x[/red]" in said
    assert "a<U+202E>b<U+000D><U+009B>c" in said
    assert not set(said) & set("\x1b\x07\x9b\r\u202e")


class _Page(HTMLParser):
    """What a browser would make of a page: elements, attributes, text of the samples."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.attributes: set[str] = set()
        self.texts: list[str] = []
        self.trained: list[str] = []
        self._open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.attributes |= {name for name, _ in attrs}
        if tag != "meta":
            self._open.append(tag)
        if tag == "pre":
            self.texts.append("")
            self.trained.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        if "pre" in self._open and "u" not in self._open:
            self.texts[-1] += data
            self.trained[-1] += data if "b" in self._open else ""


def test_page_of_hostile_rows(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    answer = f"{HOSTILE}\n\u202e\x1b日😀"
    data = write(
        tmp_path / "a<script>&.jsonl",
        [
            chat(f"{HOSTILE} {USER}", answer),
            {"messages": [{"role": HOSTILE, "content": "x"}, {"role": "assistant", "content": "y"}]},
        ],
    )
    target = tmp_path / "page.html"
    assert preview(data, "--tokenizer_name_or_path", model, "--html", target) == 0
    assert capsys.readouterr().out == f"data: 2 rows shown in {target}\n"
    text = target.read_text(encoding="utf-8")
    page = _Page(text)
    assert page.tags == {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "pre", "b", "span", "i", "u",
    }  # fmt: skip
    assert page.attributes == {"lang", "charset", "http-equiv", "content", "name", "title", "class"}
    assert page.texts == [f"{BOS}{USER}{HOSTILE} {USER}{ASSISTANT}{visible(answer)}{END}"]
    assert page.trained == [visible(answer) + END]
    assert "rejected, unknown_role" in text
    assert "control tokens in its text are encoded as plain text" in text
    assert "\x1b" not in text
    assert "http" not in text.replace("http-equiv", "")
    assert [path.name for path in tmp_path.iterdir() if path.name.startswith(".")] == []


def test_page_shows_places_ids_and_control_tokens(
    model: Path, rows: Path, tmp_path: Path, tokenizers_by_template: dict[str, Any]
) -> None:
    target = tmp_path / "page.html"
    target.write_text("an older page")
    assert preview(rows, "--tokenizer_name_or_path", model, "--line", 6, "--html", target) == 0
    text = target.read_text(encoding="utf-8")
    five, end = tokenizers_by_template["hunyuan_dense"].convert_tokens_to_ids(["5", END])
    assert f'<b title="token 4, id {five}">5</b>' in text
    assert (
        f'<b title="token 5, id {end}, a control token"><i>{END.replace("<", "&lt;").replace(">", "&gt;")}</i></b>'
        in text
    )
    assert '<span title="token 2, id' in text


def test_pieces_are_the_text_to_the_last_character(tokenizers_by_template: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_template["hunyuan_dense"]
    text = f"{BOS}the answer 日本語 👨\u200d👩 \ufffd\ufffd e\u0301 {END}"
    ids = np.asarray(tokenizer(text, add_special_tokens=False)["input_ids"], np.int32)
    sample = TokenizedSample(ids, np.asarray([[2, 5], [5, 9], [len(ids) - 1, len(ids)]], np.int32))
    found = list(pieces(tokenizer, sample))
    assert [token for piece in found for token in piece.ids] == ids.tolist()
    assert [piece.position for piece in found] == np.cumsum([0, *(len(piece.ids) for piece in found)])[:-1].tolist()
    places = {
        place for piece in found if piece.trained for place in range(piece.position, piece.position + len(piece.ids))
    }
    assert places == {2, 3, 4, 5, 6, 7, 8, len(ids) - 1}
    whole = TokenizedSample(ids, np.asarray([[0, len(ids)]], np.int32))
    assert "".join(piece.text for piece in pieces(tokenizer, whole)) == text
    assert stretches(tokenizer, whole) == [(text, True)]
    assert "日" in [piece.text for piece in pieces(tokenizer, whole)]


def test_decoders_that_drop_the_first_space() -> None:
    """Tokenizers of the SentencePiece kind: each token alone would lose its space."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    backend = Tokenizer(models.WordLevel({"▁one": 0, "▁two": 1, "▁three": 2}, unk_token="▁one"))
    backend.pre_tokenizer, backend.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    sample = TokenizedSample(np.asarray([0, 1, 2], np.int32), np.asarray([[1, 2]], np.int32))
    assert [piece.text for piece in pieces(tokenizer, sample)] == ["one", " two", " three"]
    assert stretches(tokenizer, sample) == [("one", False), (" two", True), (" three", False)]


def test_cut_keeps_the_spans_that_are_left() -> None:
    sample = TokenizedSample(np.arange(9, dtype=np.int32), np.asarray([[1, 3], [4, 7], [8, 9]], np.int32))
    short = cut(sample, 5)
    assert short.ids.tolist() == [0, 1, 2, 3, 4]
    assert short.spans.tolist() == [[1, 3], [4, 5]]


def test_wrong_input_is_refused_before_the_tokenizer_is_loaded(
    rows: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    nowhere = ("--tokenizer_name_or_path", tmp_path / "nowhere")
    blank = tmp_path / "blank.jsonl"
    blank.write_text("\n\n")
    for words, message in (
        ((tmp_path / "no.jsonl",), f"{tmp_path / 'no.jsonl'}: no such data file"),
        ((rows, "--line", "4"), f"{rows}:4: there is no row"),
        ((rows, "--line", "99"), f"{rows}:99: there is no row"),
        ((rows, "--line", "0"), f"{rows}:0: there is no row"),
        ((rows, rows, "--line", "1"), "--line 1: of which file? 2 are named"),
        ((rows, "--count", "0"), "--count 0: a positive number of rows is expected"),
        ((rows, "--html", tmp_path / "no" / "page.html"), f"there is no folder {tmp_path / 'no'}"),
        ((rows, "--html", tmp_path), f"--html {tmp_path}: a folder"),
        ((blank, "--data_format", "messages"), f"{blank}: there is no row"),
    ):
        assert preview(*words, *nowhere) == 2, words
        said = capsys.readouterr()
        assert message in said.err
        assert said.out == ""


def test_a_file_that_cannot_be_written_is_told(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"x\.html: cannot be written: File name too long"):
        save(tmp_path / ("x" * 300 + "x.html"), "text")
    assert not list(tmp_path.iterdir())
