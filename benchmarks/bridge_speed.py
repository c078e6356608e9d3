"""What a conversion costs: each direction of ``finebridge convert`` beside a plain copy of the same bytes.

    python benchmarks/bridge_speed.py [--models 0.5GB 1.5GB] [--rounds N] [--out FOLDER]

The models of ``merge_speed.py``. The ways run in turn, each time in a fresh process: a copy of the model's folder, without and
with every file flushed to the device, and the conversions Hugging Face to ``torch_dist`` and to ``torch`` (TP 1) and back, which
hash and flush what they write. Wall and CPU seconds are of the work, imports stand beside them; memory is the peak of the
process's anonymous memory. Medians of the rounds are added to ``bridge_speed.csv``; a ratio is to the row of that way.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import merge_speed
from load_memory import peaks
from results import add_rows, circumstances

HERE = Path(__file__).resolve().parent
WAYS: dict[str, tuple[str, list[str]]] = {  # what is read, flags of the conversion
    "copy": ("base", []),
    "copy_fsync": ("base", []),
    "hf_to_torch_dist": ("base", ["--to", "mcore"]),
    "torch_dist_to_hf": ("torch_dist", ["--to", "hf"]),
    "hf_to_torch": ("base", ["--to", "mcore", "--ckpt_format", "torch"]),
    "torch_to_hf": ("torch", ["--to", "hf"]),
}
FIGURES = ("wall_s", "cpu_s", "import_wall_s", "peak_anonymous_mib")


def convert(source: Path, out: Path, flags: list[str]) -> None:
    """The user's command."""
    from finebridge.bridge.convert_cli import main

    main(["--load", str(source), "--save", str(out), *flags])


def one(way: str, folder: Path) -> None:
    """One measurement, in this process: print it as JSON."""
    source, flags = WAYS[way]
    told: dict[str, Any] = {}
    with peaks(told):
        start = time.perf_counter()
        if flags:
            import finebridge.bridge.convert  # noqa: F401 - what the command imports
        begin, cpu = time.perf_counter(), time.process_time()
        if flags:
            convert(folder / source, folder / "out", flags)
        else:
            merge_speed.WAYS[way][0](folder / source, folder, folder / "out")
        told |= {
            "wall_s": time.perf_counter() - begin,
            "cpu_s": time.process_time() - cpu,
            "import_wall_s": begin - start,
        }
    print("RESULT " + json.dumps(told), flush=True)


def measure(way: str, folder: Path) -> dict[str, float]:
    """One measurement in a process of its own; nothing that an earlier one left to the system is part of it."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    words = [sys.executable, __file__, "--one", way, str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: {way} failed\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.rpartition("RESULT ")[2])


def rows_of(name: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A line for each way."""
    merge_speed.build(name, folder)
    size = sum(path.stat().st_size for path in (folder / "base").iterdir())
    for form in ("torch_dist", "torch"):
        convert(folder / "base", folder / form, ["--to", "mcore", "--ckpt_format", form])
    told: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
    for _ in range(rounds):
        for way in WAYS:
            told[way].append(measure(way, folder))
    medians = {
        way: {figure: statistics.median(each[figure] for each in results) for figure in FIGURES}
        for way, results in told.items()
    }
    rows: list[dict[str, Any]] = []
    for way, figures in medians.items():
        row: dict[str, Any] = {"model": name, "bytes": size, "rounds": rounds, "way": way}
        row |= {figure: round(value, 2) for figure, value in figures.items()}
        row |= {
            f"wall_to_{other}": round(figures["wall_s"] / medians[other]["wall_s"], 2)
            for other in ("copy", "copy_fsync")
        }
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every model, print, add to the CSV."""
    parser = argparse.ArgumentParser("bridge_speed.py", allow_abbrev=False, description="the cost of a conversion")
    parser.add_argument(
        "--models", nargs="+", choices=merge_speed.MODELS, default=["1.5GB"], help="default %(default)s"
    )
    parser.add_argument("--rounds", type=int, default=5, help="conversions of each way (default %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write; default a temporary folder")
    parser.add_argument("--csv", type=Path, default=HERE / "bridge_speed.csv", help="the file to add to")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        one(args.one[0], Path(args.one[1]))
        return
    common = circumstances(("torch", "safetensors", "xxhash"))
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.out) as work:
            rows = rows_of(name, args.rounds, Path(work))
        for row in rows:
            print({key: value for key, value in row.items() if key not in ("bytes", "rounds")}, flush=True)
        add_rows(args.csv, [{**common, **row} for row in rows])


if __name__ == "__main__":
    main()
