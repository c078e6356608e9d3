"""The command lines of the data verbs: what --help shows, and what a user is told when a place cannot be written."""

import json
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
