"""How fast lengths become packs and packs become batches: ours beside TRL's, in one run.

    python benchmarks/packing.py [--samples N] [--capacity L] [--trl_python PYTHON]

PYTHON is the interpreter of another environment in which trl is installed; without it TRL is left out.

Lengths are log-normal (median 600, sigma 0.9, from 16 to the capacity), the same for all. CPU seconds are user and
system time of one process; loading libraries and compiling or loading the kernels are not counted.

Ours makes an index of all samples at once and moves no token; that is done while reading, in each epoch. TRL moves the
tokens while it packs, most of its time. So what its code spends in pyarrow's ``take``, ``filter`` and ``list_slice`` is
measured apart, told in the note and not part of ``cpu_s``: that is the search for packs alone, the same work as ours.
``_pack_bfd`` is its packer on all samples at once. ``pack_dataset`` is what its trainer calls, in batches of 1,000; its
``cpu_s`` holds the passing of batches too. Its samples have one byte a token.

Reading is ``PackedDataset`` and ``FlatteningCollator`` over files in the page cache, rows in random order, up to the
tensors of a batch. The balance is the costliest rank's attention (sum of squared lengths) over the mean of ranks,
averaged over optimizer steps of 8 ranks x 1 row x 8 accumulated. The result is added to ``packing.csv``.
"""

import argparse
import importlib
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from results import add_rows, circumstances

HERE = Path(__file__).resolve().parent
READ_SAMPLES = 60_000
COLUMNS = ("tool", "samples", "capacity", "packs", "fill", "cpu_s", "wall_s", "mtok_per_cpu_s", "note")


def lengths_of(samples: int, capacity: int) -> np.ndarray[Any, np.dtype[np.int64]]:
    """Tokens of each sample, int64, shape [samples]."""
    drawn = np.exp(np.random.default_rng(0).normal(np.log(600), 0.9, samples))
    return np.clip(drawn, 16, capacity).astype(np.int64)


def line(tool: str, lengths: np.ndarray[Any, Any], capacity: int, packs: int, **more: Any) -> dict[str, Any]:
    """A line of the result."""
    fill = int(lengths.sum()) / (packs * capacity)
    return {"tool": tool, "samples": len(lengths), "capacity": capacity, "packs": packs, "fill": f"{fill:.5f}", **more}


def measure_ours(samples: int, capacity: int) -> list[dict[str, Any]]:
    """Packing, and how even ranks are before and after balancing."""
    from finebridge.data_tools.batches import Window, deal
    from finebridge.data_tools.packing import pack, shuffled

    lengths = lengths_of(samples, capacity)
    pack(lengths[:100], capacity, 0)  # compiles or loads the kernels
    window = Window(8, 1, 8)
    deal(np.arange(64), np.arange(64), window)
    began, cpu = time.perf_counter(), time.process_time()
    packs = pack(lengths, capacity, 0)
    times = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - began}
    results = [line("finebridge pack", lengths, capacity, len(packs), **times)]
    cost, order = packs.cost(lengths), shuffled(len(packs), 0)
    order = order[: len(order) // window.size * window.size]  # whole steps
    began, cpu = time.perf_counter(), time.process_time()
    even = deal(order, cost, window).ravel()
    times = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - began}

    def slowest(order: np.ndarray[Any, Any]) -> float:
        ranks = cost[order].reshape(-1, window.accumulation, window.ranks).sum(1)
        return float((ranks.max(1) / ranks.mean(1)).mean())

    note = f"slowest rank / mean: {slowest(order):.3f} shuffled, {slowest(even):.3f} dealt by cost"
    results.append(line("finebridge deal", lengths, capacity, len(packs), note=note, **times))
    return results


def measure_reading(capacity: int) -> dict[str, Any]:
    """Tokens of packed batches a CPU second, from prepared files to tensors."""
    from finebridge.data_tools.collator import FlatteningCollator
    from finebridge.data_tools.dataset import PackedDataset, PreparedDataset
    from finebridge.data_tools.indexed import IndexedWriter
    from finebridge.data_tools.packing import pack, shuffled
    from finebridge.storage.manifest import MANIFEST_NAME, describe, dump

    lengths, rng = lengths_of(READ_SAMPLES, capacity), np.random.default_rng(1)
    with tempfile.TemporaryDirectory(prefix="packing_") as work:
        folder = Path(work)
        with IndexedWriter(folder / "text_document") as tokens, IndexedWriter(folder / "spans_document") as spans:
            for length in lengths:
                tokens.add(rng.integers(0, 150_000, length, dtype=np.int32))
                spans.add(np.array([length // 3, length // 2, length * 2 // 3, length], dtype=np.int32))
        np.save(folder / "rows.npy", np.zeros((len(lengths), 2), np.int64))
        report = {"kind": "chat", "terminators": [], "files": ["made up"]}
        (folder / "report.json").write_text(json.dumps(report), encoding="utf-8")
        (folder / MANIFEST_NAME).write_text(dump(describe(folder, "dataset", {})), encoding="utf-8")
        samples = PreparedDataset(folder, capacity)
        data = PackedDataset(samples, pack(samples.lengths, capacity, 0))
        collator = FlatteningCollator(borders=True)
        order = shuffled(len(data), 1).tolist()
        for number in order:
            data[number]  # into the page cache
        began, cpu = time.perf_counter(), time.process_time()
        total = sum(collator([data[number]])["input_ids"].numel() for number in order)
        times = {"cpu_s": time.process_time() - cpu, "wall_s": time.perf_counter() - began}
    rate = total / 1e6 / times["cpu_s"]
    return line("finebridge reading", lengths, capacity, len(data), mtok_per_cpu_s=f"{rate:.1f}", **times)


class Watched:
    """Stands for ``pyarrow.compute`` and adds up the CPU seconds of the calls that move values."""

    def __init__(self, compute: Any) -> None:
        self.compute, self.seconds = compute, 0.0

    def __getattr__(self, name: str) -> Any:
        call = getattr(self.compute, name)
        return self._timed(call) if name in ("take", "filter", "list_slice") else call

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            before = time.process_time()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.process_time() - before

        return timed


def measure_trl(samples: int, capacity: int) -> list[dict[str, Any]]:
    """TRL's packer on all samples at once, and as its trainer calls it; moving tokens is measured apart."""
    trl, datasets, arrow = (importlib.import_module(name) for name in ("trl.data_utils", "datasets", "pyarrow"))
    datasets.disable_progress_bars()
    datasets.disable_caching()  # no fingerprint of a million samples, no file
    lengths = lengths_of(samples, capacity)
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    ids = arrow.LargeListArray.from_arrays(offsets, arrow.array(np.zeros(offsets[-1], np.int8)))
    table = arrow.table({"input_ids": ids})
    watched = trl.pc = Watched(trl.pc)  # pyright: ignore[reportAttributeAccessIssue]
    trl._pack_bfd(table.slice(0, 100), capacity)  # noqa: SLF001 - what is loaded late is loaded now
    ways = {
        "TRL _pack_bfd, all at once": lambda: trl._pack_bfd(table, capacity),  # noqa: SLF001
        "TRL pack_dataset, by 1,000": lambda: trl.pack_dataset(datasets.Dataset(table), capacity, "bfd"),
    }
    results: list[dict[str, Any]] = []
    for tool, work in ways.items():
        watched.seconds = 0.0
        began, cpu = time.perf_counter(), time.process_time()
        packs = len(work())
        total, wall = time.process_time() - cpu, time.perf_counter() - began
        times = {"cpu_s": total - watched.seconds, "wall_s": wall}
        note = f"and {watched.seconds:.1f} CPU s moving tokens; wall_s holds both"
        results.append(line(tool, lengths, capacity, packs, note=note, **times))
    return results


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser("packing.py", allow_abbrev=False, description="measure packing and reading")
    result.add_argument("--samples", type=int, default=1_000_000, help="lengths to pack (default %(default)s)")
    result.add_argument("--capacity", type=int, default=8192, help="tokens a row (default %(default)s)")
    result.add_argument("--trl_python", help="the Python of an environment with trl; without it TRL is left out")
    result.add_argument(
        "--csv", type=Path, default=HERE / "packing.csv", help="the file to add to (default: beside this)"
    )
    result.add_argument(
        "--peer", action="store_true", help="only TRL, in this process: prints JSON (used by the script)"
    )
    return result


def main(argv: Sequence[str] | None = None) -> None:
    """Measure all, print a table, add to the CSV."""
    args = parser().parse_args(argv)
    if args.peer:
        print(json.dumps(measure_trl(args.samples, args.capacity)))
        return
    common = circumstances(("finebridge", "numpy", "numba", "torch"), args.trl_python)
    results = [*measure_ours(args.samples, args.capacity), measure_reading(args.capacity)]
    if args.trl_python:
        peer = [args.trl_python, __file__, "--peer", "--samples", str(args.samples), "--capacity", str(args.capacity)]
        done = subprocess.run(peer, stdout=subprocess.PIPE, text=True, check=True)
        results += json.loads(done.stdout.strip().splitlines()[-1])
    else:
        print("TRL is left out: --trl_python names no Python that has it")
    rows = [{name: row.get(name, "") for name in COLUMNS} for row in results]
    for row in rows:
        row |= {name: f"{row[name]:.3f}" for name in ("cpu_s", "wall_s")}
    add_rows(args.csv, [{**common, **row} for row in rows])
    for row in rows:
        print("  ".join(f"{row[name]!s:>{26 if name == 'tool' else 9}}" for name in COLUMNS))


if __name__ == "__main__":
    sys.exit(main())
