"""The script that measures an optimizer step on a GPU, tried on a CPU: rows are measured, and one that fails ends no other."""

import csv
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "optimizer_step.py"
BREAK = (
    "import sys; sys.path.insert(0, sys.argv[1]); import optimizer_step as script\n"
    "script.ROWS['broken'] = script.Row(2, lean=True, optimizer='none', pure='')\n"
    "plain = script.make_optimizer\n"
    "def make(row, model):\n"
    "    if row.optimizer == 'none': raise ValueError('no such optimizer')\n"
    "    return plain(row, model)\n"
    "script.make_optimizer = make\n"
    "sys.exit(script.main(sys.argv[2:]))\n"
)


@pytest.mark.slow
def test_rows_on_a_cpu(tmp_path: Path) -> None:
    table = tmp_path / "steps.csv"
    words = [
        "--parameters",
        "5e4",
        "--steps",
        "1",
        "--csv",
        str(table),
        "--rows",
        "plain-bf16,broken,lean-kahan,stock-bf16",
    ]
    command = [sys.executable, "-c", BREAK, str(SCRIPT.parent), *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 1, done.stderr[-2000:]
    with table.open(newline="") as stream:
        rows = {row["row"]: row for row in csv.DictReader(stream)}
    assert rows["broken"]["error"] == "ValueError: no such optimizer"
    for name in ("plain-bf16", "lean-kahan", "stock-bf16"):
        assert not rows[name]["error"]
        assert float(rows[name]["step_ms"]) > 0
