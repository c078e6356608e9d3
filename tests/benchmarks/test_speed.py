"""The script that measures training speed on a GPU, tried on a CPU: rows are measured, failures told, nothing is left behind."""

import csv
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = ROOT / "benchmarks" / "gpu" / "speed.py"
sys.path.insert(0, str(SCRIPT.parent))

import speed  # noqa: E402 - found through the line above


def test_a_row_tells_the_median_behind_the_warm_lines() -> None:
    lines = [
        {"loss": 9.0 - n, "tokens_per_second": rate, "memory_gib": 1.5} for n, rate in enumerate((1, 2, 10, 30, 20))
    ]
    text = "attention: FlexAttention, proven\nloss: of the tokens with loss alone\nstep 4/100\n"
    row = speed.result("tiny", speed.Told(143, text, lines), 12.34)
    assert (row["tokens_per_second"], row["lines"], row["peak_gib"], row["error"]) == (20, 3, 1.5, "")
    assert (row["first_loss"], row["last_loss"], row["seconds"]) == (9.0, 5.0, 12.3)
    assert row["attention"] == "attention: FlexAttention, proven"
    assert row["loss"] == "loss: of the tokens with loss alone"


def test_a_row_that_failed_says_why() -> None:
    row = speed.result("tiny", speed.Told(1, "a\nb\nTraceback\nOutOfMemoryError: no\n"), 3.0)
    assert row["error"] == "exit code 1: b | Traceback | OutOfMemoryError: no"
    assert row["tokens_per_second"] == ""


@pytest.mark.parametrize("hears", [True, False])
def test_a_run_is_stopped_behind_its_window(tmp_path: Path, hears: bool) -> None:
    """It is asked to end; when its time is over before any line came, too."""
    folder = tmp_path / "row"
    folder.mkdir()
    steps = "print('\\nstep 4/9\\nstep 8/9', flush=True)\n" if hears else ""
    state = json.dumps({"log_history": [{"loss": 1.0}, {"eval_loss": 2.0}]})
    code = (
        "import pathlib, signal, sys, time\n"
        f"def end(*_): pathlib.Path({str(folder / 'trainer_state.json')!r}).write_text({state!r}); sys.exit(143)\n"
        f"signal.signal(signal.SIGTERM, end)\n{steps}time.sleep(60)\n"
    )
    began = time.monotonic()
    told = speed.follow([sys.executable, "-c", code], folder, 0.1, began + (50 if hears else 1.5))
    assert time.monotonic() - began < 40
    assert told.code == 143
    assert told.lines == [{"loss": 1.0}]


@pytest.mark.slow
def test_the_whole_script_on_a_tiny_model(tmp_path: Path) -> None:
    out = tmp_path / "speed.csv"
    words = [sys.executable, str(SCRIPT), "--rows", "tiny", "--seconds", "2", "--minutes", "3", "--csv", str(out)]
    good = subprocess.run(words, capture_output=True, text=True, check=False)
    assert good.returncode == 0, good.stdout + good.stderr
    bad = subprocess.run([*words, "--", "--lerning_rate", "1"], capture_output=True, text=True, check=False)
    assert bad.returncode == 1
    with out.open() as stream:
        first, second = csv.DictReader(stream)
    assert float(first["tokens_per_second"]) > 0
    assert float(first["first_loss"]) == pytest.approx(8.3, abs=0.2)  # ln(4000): the model is untrained
    assert (first["error"], first["flags"], second["flags"]) == ("", "", "--lerning_rate 1")
    assert "did you mean --learning_rate" in second["error"]
    listed = subprocess.run([*words, "--profile"], capture_output=True, text=True, check=False)
    assert "Self CPU" in listed.stdout, listed.stdout + listed.stderr
