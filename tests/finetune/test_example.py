"""The example's shipped files: made by the script beside them, and nothing held out is trained on."""

import json
import re
import subprocess
import sys
from pathlib import Path

from finebridge.finetune.example import FOLDER


def numbers(text: str) -> frozenset[str]:
    match = re.search(r"(\d+)\+(\d+)=\?", text)
    assert match, text
    return frozenset(match.groups())


def test_no_held_out_question_is_in_the_training_data() -> None:
    held_out = {numbers(json.loads(line)["question"]) for line in (FOLDER / "heldout.jsonl").read_text().splitlines()}
    rows = [
        json.loads(line)["messages"]
        for name in ("train_full.jsonl", "train_lora.jsonl")
        for line in (FOLDER / name).read_text().splitlines()
    ]
    trained = {numbers(turn["content"]) for row in rows for turn in row if turn["role"] == "user"}
    assert len(held_out) >= 99  # 100 questions; a pair of equal numbers counts once
    assert len(rows) == 4800
    assert not held_out & trained


def test_shipped_files_are_what_the_script_makes(tmp_path: Path) -> None:
    subprocess.run([sys.executable, str(FOLDER / "make_data.py"), str(tmp_path)], check=True)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (FOLDER / path.name).read_bytes(), path.name
    assert {path.name for path in tmp_path.iterdir()} >= {"train_full.jsonl", "heldout.jsonl", "tokenizer.json"}


def test_template_is_the_shipped_one() -> None:
    template = FOLDER.parents[1] / "data_tools" / "chat_templates" / "hunyuan_dense.jinja"
    assert (FOLDER / "chat_template.jinja").read_text() == template.read_text()
