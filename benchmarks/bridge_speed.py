"""What a conversion costs: each direction of ``finebridge convert`` beside a plain copy of the same bytes.

    python benchmarks/bridge_speed.py [--models 0.5GB 1.5GB] [--rounds N] [--out FOLDER] [--mbridge_python mb/bin/python]

The models of ``merge_speed.py``. The ways run in turn, each time in a fresh process: a copy of the model's folder, without and
with every file flushed to the device, and the conversions Hugging Face to ``torch_dist`` and to ``torch`` (TP 1) and back, which
hash and flush what they write. With ``--mbridge_python``, an interpreter that has mbridge, its two ways run in the same turn (see
``mbridge_way.py``), and what it wrote must be the same model by ``finebridge convert verify``. Wall and CPU seconds are of the
work, imports stand beside them; memory is the peak of the process's anonymous memory. Medians of the rounds are added to
``bridge_speed.csv``; a ratio is to the row of that way.
"""

import argparse
import json
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
PEERS = {"mbridge_to_torch_dist": "hf_to_torch_dist", "mbridge_to_hf": "torch_dist_to_hf"}  # and our way beside each
_PYTHON = "mbridge_python"  # the file in the folder of a run that tells each measurement the interpreter
FIGURES = ("wall_s", "cpu_s", "import_wall_s", "peak_anonymous_mib")


def convert(source: Path, out: Path, flags: list[str]) -> None:
    """The user's command."""
    from finebridge.bridge.convert_cli import main

    main(["--load", str(source), "--save", str(out), *flags])


def mbridge(way: str, folder: Path) -> None:
    """One measurement of mbridge, which reads what we wrote; exits when it wrote another model."""
    words = [way.removeprefix("mbridge_"), "base", "out", "torch_dist/release"]
    python = (folder / _PYTHON).read_text(encoding="utf-8")
    command = [python, "-W", "ignore", str(HERE / "mbridge_way.py"), *words]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(done.stdout + done.stderr)
    from finebridge.bridge.convert_cli import main as convert_main

    if convert_main(["verify", str(folder / "out"), str(folder / "base"), "--hf_config", str(folder / "base")]):
        sys.exit(f"error: {way} wrote another model")
    print(done.stdout)


def one(way: str, folder: Path) -> None:
    """One measurement, in this process: print it as JSON."""
    if way in PEERS:
        mbridge(way, folder)
        return
    source, flags = WAYS[way]
    told: dict[str, Any] = {}
    with peaks(told):
        start = time.perf_counter()
        if flags:
            import finebridge.bridge.convert  # noqa: F401 - what the command imports
        if way == "hf_to_torch_dist":
            import torch.distributed.checkpoint.filesystem  # noqa: F401 - what it imports to write that
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


def rows_of(name: str, rounds: int, folder: Path, mbridge_python: str | None) -> list[dict[str, Any]]:
    """A line for each way."""
    merge_speed.build(name, folder)
    if mbridge_python:
        (folder / _PYTHON).write_text(str(Path(mbridge_python).absolute()), encoding="utf-8")
    size = sum(path.stat().st_size for path in (folder / "base").iterdir())
    for form in ("torch_dist", "torch"):
        convert(folder / "base", folder / form, ["--to", "mcore", "--ckpt_format", form])
    ways = [*WAYS, *(PEERS if mbridge_python else ())]
    medians = merge_speed.medians_of(ways, FIGURES, rounds, folder, __file__)
    rows: list[dict[str, Any]] = []
    for way, figures in medians.items():
        row: dict[str, Any] = {"model": name, "bytes": size, "rounds": rounds, "way": way}
        row |= {figure: round(value, 2) for figure, value in figures.items()}
        row |= {
            f"wall_to_{other}": round(figures["wall_s"] / medians[other]["wall_s"], 2)
            for other in ("copy", "copy_fsync")
        }
        rows.append(row)
    for peer, way in PEERS.items() if mbridge_python else ():
        for figure in ("wall_s", "cpu_s", "peak_anonymous_mib"):
            print(f"{name} {peer}: {medians[peer][figure] / medians[way][figure]:.1f} times our {figure}")
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
    parser.add_argument("--mbridge_python", help="an interpreter with mbridge; without it mbridge is left out")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        one(args.one[0], Path(args.one[1]))
        return
    if not args.mbridge_python:
        print("mbridge is left out: --mbridge_python is not given")
    common = circumstances(
        ("torch", "safetensors", "xxhash"), args.mbridge_python, ("mbridge", "megatron-core", "transformers")
    )
    for name in args.models:
        with tempfile.TemporaryDirectory(dir=args.out) as work:
            rows = rows_of(name, args.rounds, Path(work), args.mbridge_python)
        for row in rows:
            print({key: value for key, value in row.items() if key not in ("bytes", "rounds")}, flush=True)
        add_rows(args.csv, [{**common, **row} for row in rows])


if __name__ == "__main__":
    main()
