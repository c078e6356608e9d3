"""What every result says of the machine and the versions, and the CSV files that results are added to."""

import contextlib
import csv
import datetime as dt
import importlib.metadata
import os
import platform
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any


def circumstances(
    packages: Sequence[str], peer_python: str | None = None, peer_packages: Sequence[str] = ("trl", "pyarrow")
) -> dict[str, str]:
    """Date, hardware, load before the run, and the versions that decide the figures, also of a peer's interpreter."""
    known = [f"python {platform.python_version()}"]
    for name in packages:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            known.append(f"{name} {importlib.metadata.version(name)}")
    if peer_python:
        ask = "import sys, importlib.metadata as m; print('; '.join(f'{name} {m.version(name)}' for name in sys.argv[1:]))"
        command = [peer_python, "-c", ask, *peer_packages]
        known.append(subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip())
    return {
        "date": dt.datetime.now(dt.UTC).date().isoformat(),
        "hardware": _hardware(),
        "load_before": f"{os.getloadavg()[0]:.1f}",
        "versions": "; ".join(known),
    }


def add_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> None:
    """Add lines to a CSV; the head is written when the file is new. Raises ValueError when it has other columns."""
    new = not path.exists()
    if not new and (head := path.read_text(encoding="utf-8").partition("\n")[0]) != ",".join(rows[0]):
        raise ValueError(f"{path}: has the columns {head}, the results have {','.join(rows[0])}; take another file")
    with path.open("a", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, list(rows[0]), lineterminator="\n")
        if new:
            writer.writeheader()
        writer.writerows(rows)


def _hardware() -> str:
    """The processor's name and how many of its cores this process may use."""
    name = platform.machine()
    with contextlib.suppress(OSError):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        name = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), name)
    return f"{name}, {len(os.sched_getaffinity(0))} cores"
