"""The command lines of the data verbs: what --help shows, and what a user is told when a place cannot be written."""

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from finebridge.finetune.cli import main

VERBS = ("build", "check", "preview", "export", "import")
EXAMPLE = Path(__file__).resolve().parents[2] / "finetune" / "example_data"


@pytest.mark.parametrize("verb", VERBS)
def test_help_shows_each_flag_once_with_what_it_means(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit) as done:
        main(["data", verb, "--help"])
    said = capsys.readouterr().out
    assert done.value.code == 0
    flags = [line for line in said.splitlines() if line.startswith("  --")]
    assert flags
    assert all("-" not in name.strip(",")[2:] for line in flags for name in line.split() if name.startswith("--"))
    lines = said.splitlines()
    for number, line in enumerate(lines):
        if line.startswith("  --"):
            meaning = line[34:].strip() if len(line) > 34 and line[33] == " " else lines[number + 1].strip()
            assert meaning, line
    assert said.count("--tokenizer_name_or_path, ") == (verb not in ("export", "import"))


@pytest.mark.parametrize("verb", ["build", "check"])
def test_defaults_are_shown(capsys: pytest.CaptureFixture[str], verb: str) -> None:
    with pytest.raises(SystemExit):
        main(["data", verb, "--help"])
    said = " ".join(capsys.readouterr().out.split())
    assert "see --over_long (default: 2048)" in said
    assert "slow or mixed (default: keep)" in said


@pytest.mark.parametrize(("spelling", "value"), [("--max-seq-length", "64"), ("--seq_length", "64")])
def test_other_spellings_are_taken(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, spelling: str, value: str
) -> None:
    words = [str(EXAMPLE / "train_lora.jsonl"), "--tokenizer-name-or-path", str(EXAMPLE), "--output-dir", str(tmp_path)]
    assert main(["data", "build", *words, spelling, value]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((folder / "report.json").read_text())["samples"] > 0


def test_a_place_that_cannot_be_written_is_named(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    words = [str(EXAMPLE / "train_lora.jsonl"), "--tokenizer_name_or_path", str(EXAMPLE)]
    assert main(["data", "build", *words, "--output_dir", str(tmp_path / "file")]) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {tmp_path / 'file'}")
    assert "Traceback" not in said


def test_a_template_that_writes_the_date_is_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    template = (EXAMPLE / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "dated.jinja").write_text("{%- set today = strftime_now('%d %b %Y') -%}" + template, encoding="utf-8")
    words = [str(EXAMPLE / "train_lora.jsonl"), "--tokenizer_name_or_path", str(EXAMPLE), "--output_dir", str(tmp_path)]
    assert main(["data", "build", *words, "--chat_template", str(tmp_path / "dated.jinja")]) == 0
    assert "writes today's date" in capsys.readouterr().out
    assert main(["data", "build", *words]) == 0
    assert "writes today's date" not in capsys.readouterr().out


def test_json_keys_go_with_a_handler_for_text(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"content": "some text"}\n')
    words = [str(tmp_path / "t.jsonl"), "--tokenizer_name_or_path", str(EXAMPLE), "--output_dir", str(tmp_path / "o")]
    assert main(["data", "build", *words, "--handler-name", "GeneralPretrainHandler", "--json-keys", "content"]) == 0
    folder = Path(capsys.readouterr().out.splitlines()[-1])
    assert json.loads((folder / "report.json").read_text())["kind"] == "document"


def test_flags_that_mean_nothing_to_these_rows_are_told(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "t.jsonl").write_text('{"text": "some text"}\n')
    words = ["--tokenizer_name_or_path", str(EXAMPLE), "--output_dir", str(tmp_path / "o")]
    assert main(["data", "build", str(tmp_path / "t.jsonl"), *words, "--think_mode", "fast"]) == 0
    said = capsys.readouterr().out
    assert "no effect on plain text for pretraining: --think_mode" in said
    assert "read as text" in said
    assert main(["data", "build", str(EXAMPLE / "train_lora.jsonl"), *words]) == 0
    folder = capsys.readouterr().out.splitlines()[-1]
    assert main(["data", "build", str(EXAMPLE / "train_lora.jsonl"), *words, "--append_eod"]) == 0
    said = capsys.readouterr().out
    assert "no effect on conversations: --append_eod" in said
    assert said.splitlines()[-1] == folder


def test_a_terminated_build_leaves_nothing(tmp_path: Path) -> None:
    rows = (EXAMPLE / "train_lora.jsonl").read_text(encoding="utf-8")
    (tmp_path / "many.jsonl").write_text(rows * 300, encoding="utf-8")
    words = [
        str(tmp_path / "many.jsonl"),
        "--tokenizer_name_or_path",
        str(EXAMPLE),
        "--output_dir",
        str(tmp_path / "o"),
    ]
    build = subprocess.Popen(
        [sys.executable, "-P", "-m", "finebridge.finetune.cli", "data", "build", *words, "--workers", "2"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("o/.*.tmp-*/*.bin")):
        assert build.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.02)
    build.send_signal(signal.SIGTERM)
    _, said = build.communicate(timeout=60)
    assert build.returncode == 130
    assert "Traceback" not in said
    assert not list(tmp_path.glob("o/.*.tmp-*"))
    assert not list(tmp_path.glob("o/*/manifest.json"))
