"""``data sample``: the rows that a mixture takes, in a dated folder, the same however many processes look for them."""

import gzip
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.mixture_dataset import MixtureDataset
from finebridge.data_tools.mixture_index import prepare_mixture
from finebridge.data_tools.readers import Chunk, read_chunks, resolve_files
from finebridge.data_tools.row_scan import rows_at
from finebridge.data_tools.sample import sample
from finebridge.data_tools.schema import DataError
from finebridge.data_tools.tokenizer_files import TokenizerSource
from finebridge.finetune.cli import main
from finebridge.storage.manifest import verify

ROOT = Path(__file__).resolve().parents[2]
SOURCE = TokenizerSource(str(ROOT / "finetune" / "example_data"))
MIX = """seed: 5
reshuffle: true
sources:
  big: {path: [one.jsonl, two.jsonl.gz], ratio: 0.3}
  table: {path: table.csv, ratio: 2.5}
  whole: {path: whole.json}
"""

Row = dict[str, Any]


def chat(name: str, number: int) -> Row:
    turns = [{"role": "user", "content": f"{name} {number}?"}, {"role": "assistant", "content": str(number)}]
    return {"messages": turns, "id": f"{name}-{number}"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rows in files of four kinds; the first has several chunks, rows of different length and a blank line."""
    folder = tmp_path_factory.mktemp("sample")
    rows = [chat("one", number) | {"note": "x" * (number % 90)} for number in range(12_000)]
    lines = [json.dumps(row) for row in rows]
    (folder / "one.jsonl").write_text("\n".join([lines[0], "", *lines[1:]]))
    (folder / "two.jsonl.gz").write_bytes(
        gzip.compress("\r\n".join(json.dumps(chat("two", n)) for n in range(50)).encode())
    )
    table = "".join(f'"{number}+1=","{number + 1}"\n' for number in range(40))
    (folder / "table.csv").write_text("prompt,response\n" + table)
    (folder / "whole.json").write_text(json.dumps([chat("whole", 1), chat("whole", 2), chat("one", 7)]))
    (folder / "mix.yaml").write_text(MIX)
    return folder


@pytest.fixture(scope="module")
def good(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return sample(folder / "mix.yaml", DataArguments(), tmp_path_factory.mktemp("good") / "day", say=lambda _: None)


def rows(file: Path) -> list[Row]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_counts_are_exact(good: Path) -> None:
    assert [len(rows(good / f"{name}.jsonl")) for name in ("big", "table", "whole")] == [3615, 100, 3]
    assert max(Counter(row["id"] for row in rows(good / "big.jsonl")).values()) == 1
    assert sorted(Counter(row["prompt"] for row in rows(good / "table.jsonl")).values()) == [2] * 20 + [3] * 20
    statistics = verify(good)["made_from"]["statistics"]
    assert [(part["name"], part["rows"], part["taken"]) for part in statistics] == [
        ("big", 12_050, 3615), ("table", 40, 100), ("whole", 3, 3)]  # fmt: skip
    names = ("big", "table", "whole")
    files = {
        "_report.json",
        "manifest.json",
        *(f"{begin}{name}.jsonl" for begin in ("", "_rejects.") for name in names),
    }
    assert {path.name for path in good.iterdir()} == files


def test_rows_stay_as_they_stand(folder: Path, good: Path) -> None:
    there = set((folder / "one.jsonl").read_bytes().splitlines())
    taken = [line for line in (good / "big.jsonl").read_bytes().splitlines() if b'"one-' in line]
    assert set(taken) <= there
    order = [int(json.loads(line)["id"].removeprefix("one-")) for line in taken]
    assert order == sorted(order)


@pytest.mark.parametrize("workers", [2, 5])
def test_workers_do_not_matter(folder: Path, good: Path, tmp_path: Path, workers: int) -> None:
    args = DataArguments(preprocessing_num_workers=workers)
    made = sample(folder / "mix.yaml", args, tmp_path / "day", say=lambda _: None)
    for file in good.glob("*.jsonl"):
        assert (made / file.name).read_bytes() == file.read_bytes()


def test_training_takes_the_same_rows(folder: Path, good: Path, tmp_path: Path) -> None:
    file = folder / "small.yaml"
    file.write_text(MIX.replace("  big: {path: [one.jsonl, two.jsonl.gz], ratio: 0.3}\n", ""))
    made = prepare_mixture(file, SOURCE, DataArguments(), tmp_path, lambda _: None, "fork")
    data = MixtureDataset(made, 2048, say=lambda _: None)
    tokenizer = SOURCE.load()
    texts = Counter(tokenizer.decode(data[number]["input_ids"]) for number in range(100))
    assert len(data) == 103
    taken = rows(good / "table.jsonl")
    assert sum(texts[text] for text in texts if any(row["prompt"] in text for row in taken)) == 100
    for row in taken:
        count = sum(1 for other in taken if other["prompt"] == row["prompt"])
        assert [n for text, n in texts.items() if f"｜>{row['prompt']}<" in text] == [count]


def test_other_epochs_take_other_rows(folder: Path, good: Path, tmp_path: Path) -> None:
    later = sample(folder / "mix.yaml", DataArguments(), tmp_path / "one", epoch=1, say=lambda _: None)
    first, second = ({row["id"] for row in rows(part / "big.jsonl")} for part in (good, later))
    assert len(second) == 3615
    assert not first & second
    assert (later / "whole.jsonl").read_bytes() == (good / "whole.jsonl").read_bytes()


def test_duplicates_and_filters_are_counted(folder: Path, tmp_path: Path) -> None:
    file = folder / "few.yaml"
    file.write_text("sources:\n  whole: {path: whole.json}\n  more: {path: more.jsonl}\n")
    found = [chat("whole", 2), chat("new", 1), chat("new", 1), chat("a question that is too long for this", 3)]
    (folder / "more.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    args = DataArguments(deduplicate=True, max_chars=30)
    made = sample(file, args, tmp_path / "day", say=lambda _: None)
    assert [row["id"] for row in rows(made / "more.jsonl")] == ["new-1"]
    rejects = [(row["line"], row["code"]) for row in rows(made / "_rejects.more.jsonl")]
    assert rejects == [(1, "duplicate"), (3, "duplicate"), (4, "too_long")]
    assert rows(made / "_rejects.more.jsonl")[0]["detail"] == f"the same as {folder / 'whole.json'}:2"


def test_the_folder_is_dated_and_never_replaced(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = folder / "two.yaml"
    file.write_text("sources:\n  whole: {path: whole.json}\n")
    before = datetime.now().astimezone().date().isoformat()
    assert main(["data", "sample", str(file), "--output", str(tmp_path)]) == 0
    made = Path(capsys.readouterr().out.splitlines()[-1])
    assert before <= made.name <= datetime.now().astimezone().date().isoformat()
    assert main(["data", "sample", str(file), "--output", str(tmp_path), "--date", made.name]) == 0
    assert "reused" in capsys.readouterr().out
    file.write_text("sources:\n  whole: {path: whole.json, ratio: 2}\n")
    assert main(["data", "sample", str(file), "--output", str(tmp_path), "--date", made.name]) == 2
    assert "holds something else than this sample" in capsys.readouterr().err
    assert len(rows(made / "whole.jsonl")) == 3
    assert main(["data", "sample", str(file), "--output", str(tmp_path), "--date", "again"]) == 0
    assert len(rows(tmp_path / "again" / "whole.jsonl")) == 6
    assert resolve_files([str(tmp_path / "again")]) == [
        tmp_path / "again" / "whole.jsonl"
    ]  # it is training data as it is


@pytest.mark.parametrize(
    ("text", "flags", "told"),
    [
        ("sources:\n  a: {path: one.jsonl, ratio: .nan}\n", [], "bad.yaml:2: ratio .nan"),
        ("sources:\n  a: {path: broken.jsonl}\n", [], "bad.yaml:2: a: 1 of 2 rows are rejected"),
        ("sources:\n  a: {path: whole.json, ratio: 0.01}\n", [], "bad.yaml:2: a: ratio 0.01 of 3 rows is none"),
        ("sources:\n  a: {path: [whole.json, table.csv]}\n", [], "bad.yaml:2: a: its files hold rows of several forms"),
        ("sources:\n  a: {path: whole.json}\n", ["--epoch", "1"], "has no reshuffle: true"),
        ("sources:\n  a: {path: whole.json}\n", ["--date", "a/b"], "--date a/b"),
        ("sources:\n  a: {path: whole.json}\n", ["--deduplicat"], "did you mean --deduplicate?"),
    ],
)
def test_bad_input_leaves_nothing(
    folder: Path, tmp_path: Path, text: str, flags: list[str], told: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "broken.jsonl").write_text(json.dumps(chat("x", 1)) + "\n{broken\n")
    (folder / "bad.yaml").write_text(text)
    assert main(["data", "sample", str(folder / "bad.yaml"), "--output", str(tmp_path / "out"), *flags]) == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())


def test_a_worker_that_is_killed_is_one_message(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "finebridge.data_tools.row_scan.scan_chunk", lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    )
    with pytest.raises(DataError, match="was killed"):
        sample(folder / "mix.yaml", DataArguments(preprocessing_num_workers=2), tmp_path / "day", say=lambda _: None)
    assert not list(tmp_path.iterdir())


def test_a_file_that_is_written_to_meanwhile_is_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "mix.yaml"
    file.write_text("sources:\n  a: {path: a.jsonl}\n")
    (tmp_path / "a.jsonl").write_text(json.dumps(chat("x", 1)) + "\n")

    def touch(chunk: Chunk, times: dict[int, int]) -> list[bytes]:
        os.utime(tmp_path / "a.jsonl")
        return list(rows_at(chunk, times))

    monkeypatch.setattr("finebridge.data_tools.sample.rows_at", touch)
    with pytest.raises(DataError, match=r"a\.jsonl: was written to while it was read"):
        sample(file, DataArguments(), tmp_path / "day", say=lambda _: None)
    assert not (tmp_path / "day").exists()


def test_lines_of_text_become_rows(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes("eins\r\n\nzw\u00f6lf\n".encode())
    (chunk,) = read_chunks(tmp_path / "a.txt")
    assert list(rows_at(chunk, {1: 1, 3: 2})) == [b'{"text":"eins"}\n', '{"text":"zw\u00f6lf"}\n'.encode() * 2]


def test_the_script_of_the_seed(folder: Path, tmp_path: Path) -> None:
    script = ROOT / "data_tools" / "sample_with_ratio.sh"
    file = folder / "script.yaml"
    file.write_text("sources:\n  whole: {path: whole.json}\n")
    words = ["bash", script, file, "--output", tmp_path, "--date", "d"]
    done = subprocess.run(words, env={**os.environ, "FINEBRIDGE_PYTHON": sys.executable}, check=False)
    assert done.returncode == 0
    assert len(rows(tmp_path / "d" / "whole.jsonl")) == 3
