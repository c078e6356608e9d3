"""The script that times LoRA's products, tried on a CPU: every way trains the same adapters, and its rows are added."""

import csv
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "lora_products.py"
sys.path.insert(0, str(SCRIPT.parent))

import lora_products  # noqa: E402 - found through the line above


@pytest.mark.slow
def test_a_row_for_each_way(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, ways = tmp_path / "out.csv", "frozen,peft,ours,peft-autocast,ours-autocast"
    words = ["--tiny", "--layers", "1", "--tokens", "16,32", "--repeats", "1", "--csv", str(out), "--ways", ways]
    assert lora_products.main(words) == 0
    rows = list(csv.DictReader(out.open(encoding="utf-8")))
    assert [(row["way"], row["tokens"]) for row in rows] == [(way, n) for way in ways.split(",") for n in ("16", "32")]
    assert all(float(row["forward_ms"]) > 0 and float(row["backward_ms"]) > 0 for row in rows)
    assert all(float(row["off"]) < 0.03 for row in rows)
    assert any(float(row["off"]) for row in rows if row["way"] == "ours")
    assert capsys.readouterr().out.count("thin products of 7 linears") == 2
    with pytest.raises(SystemExit, match="2"):
        lora_products.main(["--ways", "mine"])
