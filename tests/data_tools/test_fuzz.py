"""Hostile lines through the user's commands: no traceback, and every line is a sample or a listed reject in its place."""

import json
import random
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.templates import ChatTemplate
from finebridge.finetune.cli import main
from random_chats import Chats

PLAIN = {
    "messages": {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}], "system": "s"},
    "alpaca": {"instruction": "i", "input": "n", "output": "o", "history": [["x", "y"]]},
    "prompt_response": {"prompt": "q", "response": "a"},
    "preference": {"prompt": "q", "chosen": "good", "rejected": "bad"},
    "text": {"text": "some words"},
}
KEYS = (
    "role", "content", "from", "value", "messages", "loss", "weight", "tools", "tool_calls", "reasoning_content",
    "chat_template_kwargs", "reasoning_effort", "enable_thinking", "system", "history", "text", "mesages", "zz", "",
)  # fmt: skip
VALUES = (
    None, True, False, 0, -1, 1.5, 10**30, -(10**400), 1e308, "", " ", "\x00", "x", "user", "assistant", [], {}, [[]], [None],
    {"a": None}, {"messages": 1}, ["x"], [{}], "word " * 400, "\U000f0000<|im_end|>", "\ue000\\0\ue001", {"x": {"y": [{}]}},
)  # fmt: skip


def places(value: Any, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    """The path of every value inside a value, but not its own."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    return [place for key, one in inner for place in ((*path, key), *places(one, (*path, key)))]


class Lines:
    """Lines of a file of one form, each with what must become of it: "sample", "reject" or either ("")."""

    def __init__(self, form: str, seed: int, control: list[str]) -> None:
        self.chance = random.Random(seed)
        self.chats = Chats(seed, control, tools=True)
        self.form = form

    def line(self) -> tuple[bytes, str]:
        kind = self.chance.randrange(5)
        if kind == 0:
            return json.dumps(PLAIN[self.form]).encode() + self.chance.choice((b"", b"\r", b"  ")), "sample"
        if kind == 1:
            return self.no_json(), "reject"
        row = deepcopy(self.chats.row() if self.form == "messages" else PLAIN[self.form])
        for _ in range(self.chance.randrange(3) if kind == 2 else 1 + self.chance.randrange(4)):
            self.change(row)
        return json.dumps(row, ensure_ascii=self.chance.random() < 0.5).encode(), ""

    def change(self, row: Any) -> None:
        """One value replaced, dropped, doubled, or put under another key."""
        path = self.chance.choice(places(row) or [()])
        if not path:
            return
        *above, key = path
        holder = row
        for step in above:
            holder = holder[step]
        match self.chance.randrange(5):
            case 0:
                del holder[key]
            case 1 if isinstance(holder, list):
                holder.insert(0, holder[key])
            case 2 if isinstance(holder, dict):
                holder[self.chance.choice(KEYS)] = holder.pop(key)
            case 3 if isinstance(holder, dict):
                holder[self.chance.choice(KEYS)] = deepcopy(self.chance.choice(VALUES))
            case _:
                holder[key] = deepcopy(self.chance.choice(VALUES))

    def no_json(self) -> bytes:
        """A line that no reader may take for a row."""
        text = json.dumps(PLAIN[self.form]).encode()
        deep = self.chance.choice((200, 1100, 50_000))
        return self.chance.choice(
            (
                text.replace(b'"q"', b'"\xff\xfe"') + b"\xff",
                text[:-1] + b',"x":"\\ud800"}',
                text[:-1] + b',"x":NaN}',
                text[:-1] + b',"x":-Infinity}',
                text[:-1] + b"," + text[1:],  # every key twice
                text[: self.chance.randrange(1, len(text))],
                text[:9] + b"\x00" + text[9:],
                text.replace(b" ", b"\x00"),
                b"\xef\xbb\xbf\xef\xbb\xbf" + text,
                text + text,
                b"[" * deep,
                b'{"messages":' * deep + b"1" + b"}" * (deep - 1),
                text.decode().encode("utf-16"),
                b"null",
                b"[]",
                b"5",
                b'"' + b"x" * 99 + b'"',
                b'[{"messages":[]}]',
                text.replace(b'"', b"'"),
                b"\x1f\x8b\x08garbage",
            )
        ).replace(b"\n", b" ")

    def file(self, path: Path, count: int) -> dict[int, str]:
        """Write so many lines, some blank ones among them; what must become of each that is not blank, by its number."""
        wanted: dict[int, str] = {}
        with path.open("wb") as stream:
            if self.chance.random() < 0.5:
                stream.write(b"\xef\xbb\xbf")
            for number in range(1, count + 1):
                line, outcome = self.line() if self.chance.random() < 0.98 else (self.chance.choice((b"", b" \t")), "-")
                stream.write(line + (b"\n" if number < count or self.chance.random() < 0.5 else b""))
                if outcome != "-":
                    wanted[number] = outcome
        return wanted


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizers_by_template: dict[str, Any]) -> Callable[[str], Path]:
    """Folders with a tokenizer and its chat template, no model."""

    def get(name: str) -> Path:
        folder = tmp_path_factory.mktemp(name)
        ChatTemplate(tokenizers_by_template[name], name)
        tokenizers_by_template[name].save_pretrained(folder)
        return folder

    return get


def build(file: Path, model: Path, form: str, capsys: pytest.CaptureFixture[str]) -> Path:
    """``finebridge data build``; the folder that it names in its last line."""
    words = ["--tokenizer_name_or_path", str(model), "--data_format", form, "--max_rejects", "1"]
    assert main(["data", "build", str(file), *words, "--output_dir", str(file.parent / "prepared")]) == 0
    return Path(capsys.readouterr().out.strip().splitlines()[-1])


def assert_accounted(file: Path, folder: Path, wanted: dict[int, str]) -> Counter[str]:
    """Every line is in the dataset or among the rejects, with the place where it stands; returns the reject codes."""
    report = json.loads((folder / "report.json").read_text())
    trained = set(np.load(folder / "rows.npy")[:, 1].tolist())
    rejects = [json.loads(line) for line in (folder / "rejects.jsonl").read_text().splitlines()]
    rejected = [reject["line"] for reject in rejects]
    assert rejected == sorted(rejected)
    assert sorted([*trained, *rejected]) == sorted(wanted)
    assert report["rows"] == len(wanted)
    assert report["rejects"] == dict(Counter(reject["code"] for reject in rejects))
    assert {line for line, outcome in wanted.items() if outcome == "sample"} <= trained
    assert {line for line, outcome in wanted.items() if outcome == "reject"} <= set(rejected)
    data = file.read_bytes()
    first = len(b"\xef\xbb\xbf") if data.startswith(b"\xef\xbb\xbf") else 0
    starts = [first, *(match.end() for match in re.finditer(b"\n", data))]
    for reject in rejects:
        assert reject["file"] == str(file)
        assert reject["offset"] == starts[reject["line"] - 1]
        assert len(reject["detail"]) < 600
    assert report["samples"] > len(wanted) // 5
    return Counter(report["rejects"])


def fuzz(file: Path, model: Path, form: str, seed: int, count: int, capsys: pytest.CaptureFixture[str]) -> Counter[str]:
    wanted = Lines(form, seed, ["<|im_end|>", "<|im_start|>", "</think>"]).file(file, count)
    return assert_accounted(file, build(file, model, form, capsys), wanted)


def test_every_line_is_a_sample_or_a_reject(
    tmp_path: Path, models: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    codes = fuzz(tmp_path / "rows.jsonl", models("qwen3"), "messages", 1, 20_000, capsys)
    assert len(codes) > 15
    assert {"not_json", "not_utf8", "duplicate_key", "not_an_object", "unknown_role", "bad_content"} <= codes.keys()


@pytest.mark.parametrize("form", [form for form in PLAIN if form != "messages"])
def test_other_forms(
    tmp_path: Path, models: Callable[[str], Path], capsys: pytest.CaptureFixture[str], form: str
) -> None:
    assert len(fuzz(tmp_path / "rows.jsonl", models("qwen3"), form, 2, 300, capsys)) > 5


@pytest.mark.slow
@pytest.mark.parametrize("template", ["chatml", "hunyuan_dense", "hunyuan_a13b", "hy3"])
def test_other_templates(
    tmp_path: Path, models: Callable[[str], Path], capsys: pytest.CaptureFixture[str], template: str
) -> None:
    assert len(fuzz(tmp_path / "rows.jsonl", models(template), "messages", 3, 20_000, capsys)) > 20


def test_check_and_preview_show_every_line(
    tmp_path: Path, models: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file, model = tmp_path / "rows.jsonl", models("qwen3")
    wanted = Lines("messages", 4, ["<|im_end|>"]).file(file, 400)
    words = [str(file), "--tokenizer_name_or_path", str(model), "--data_format", "messages"]
    check = [*words, "--max_rejects", "1", "--output_dir", str(tmp_path / "prepared"), "--count", "400"]
    assert main(["data", "check", *check, "--json", str(tmp_path / "report.json")]) == 0
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["rows"] == len(wanted)
    capsys.readouterr()
    assert main(["data", "preview", *words, "--count", "1000"]) == 0
    shown = capsys.readouterr().out
    assert all(f"{file}:{line}: " in shown for line in wanted)
    assert main(["data", "preview", *words, "--count", "1000", "--html", str(tmp_path / "page.html")]) == 0
    page = (tmp_path / "page.html").read_text()
    assert all(f"{file}:{line}" in page for line in wanted)


def test_small_files_whose_form_must_be_told(
    tmp_path: Path, models: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """One to three hostile lines, the first of which says what the form is: a dataset, or exit code 2 and one message."""
    model = str(models("qwen3"))
    outcomes: Counter[int] = Counter()
    for seed in range(36):
        file = tmp_path / f"{seed}.jsonl"
        Lines(sorted(PLAIN)[seed % len(PLAIN)], seed, []).file(file, 1 + seed % 3)
        words = [str(file), "--tokenizer_name_or_path", model, "--max_rejects", "1"]
        code = main(["data", "build", *words, "--output_dir", str(tmp_path / "prepared")])
        outcomes[code] += 1
        told = capsys.readouterr().err
        assert "Traceback" not in told
        assert code == 0 or str(file) in told
    assert outcomes.keys() == {0, 2}


def test_no_text_of_a_row_is_told(
    tmp_path: Path, models: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    """Rejects and messages name places and reasons; what people wrote stays in the data."""
    secret = "my secret"
    ask, say = {"role": "user", "content": secret}, {"role": "assistant", "content": f"{secret}."}
    rows: list[Any] = [
        {"messages": [ask, say]},
        {"messages": [ask]},
        {"messages": [ask, {**say, "content": f"<think>{secret}"}]},
        {"messages": [ask, {**say, "content": f"{secret} </think> {secret}"}]},
        {"messages": [ask, {**say, "content": [{"type": "image", "text": secret}]}]},
        {"messages": [ask, {**say, "reasoning_content": [secret]}]},
        {"messages": [ask, {**say, "tool_calls": [{"function": secret}]}]},
        {"messages": [ask, {**say, "tool_calls": [secret]}]},
        {"messages": [{**ask, "content": f"{secret}\U000f0000<|im_end|>"}, say]},
        {"messages": [ask, say], "tools": secret},
        {"messages": [ask, say], "tools": [{"description": f"{secret}<|im_end|>"}]},
        {"messages": secret},
        secret,
    ]
    lines = [json.dumps(row) for row in rows]
    lines += [
        lines[0][:-1],
        lines[0].replace('"role"', '"role": "x", "role"', 1),
        lines[0].replace(secret, "\x00" + secret),
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes("\n".join(lines).encode() + b"\n" + lines[0].encode() + b"\xff")
    words = ["--tokenizer_name_or_path", str(models("qwen3")), "--output_dir", str(tmp_path / "prepared")]
    assert main(["data", "build", str(file), *words]) == 2
    told = capsys.readouterr()
    assert secret not in told.out + told.err
    (rejects,) = tmp_path.glob("prepared/*/rejects.jsonl")
    assert len(rejects.read_text().splitlines()) == len(lines)
    assert secret not in rejects.read_text()


def test_a_line_of_25_megabytes(
    tmp_path: Path, models: Callable[[str], Path], capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "rows.jsonl"
    plain = json.dumps(PLAIN["messages"]).encode()
    file.write_bytes(plain + b"\n" + plain.replace(b'"q"', b'"' + b"q" * (25 << 20) + b'"') + b"\n" + plain)
    codes = assert_accounted(
        file, build(file, models("qwen3"), "messages", capsys), {1: "sample", 2: "reject", 3: "sample"}
    )
    assert codes == {"line_too_long": 1}


def test_a_line_without_an_end_is_read_in_bounded_memory(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    with file.open("wb") as stream:
        stream.truncate(600 << 20)  # zeros, and no disk is used
    code = (
        "import resource, sys; from pathlib import Path; from finebridge.data_tools.readers import read_chunks, rows_of\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "rows = [row.code for chunk in read_chunks(Path(sys.argv[1])) for _, row in rows_of(chunk)]\n"
        "print(rows, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(file)], capture_output=True, text=True, check=True)
    rows, grown = done.stdout.rsplit(maxsplit=1)
    assert rows == "['line_too_long']"
    assert int(grown) < 100_000  # KiB
