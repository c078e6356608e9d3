"""What it costs to choose rows for a mixture, and to filter them.

    python benchmarks/sampling.py [--rows N] [--chats N] [--csv FILE]

``choose`` is all that a mixture does for N row ids of one source, ratio 2.5: their hashes, the rank order, how often each
is taken. ``known`` enters N/10 random 128-bit hashes into the table that finds duplicates. Each filter is measured alone
on chats of ``make_chats.py``, parsed before; the evaluation data of the decontamination are 2,000 of their questions, so that
common words are known but few rows are found. CPU seconds are user and system time of this process; kernels are compiled or
loaded before. The result is added to ``sampling.csv``.
"""

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import make_chats
import numpy as np
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.duplicates import Seen
from finebridge.data_tools.filters import Filters, row_hash
from finebridge.data_tools.formats import RowForm, parse_row
from finebridge.data_tools.sampling import amount, rank_order, row_hashes, times_taken
from results import add_rows, circumstances

HERE = Path(__file__).resolve().parent
QUESTIONS = 2000


def measured(what: str, rows: int, work: Callable[[], Any], note: str = "") -> dict[str, Any]:
    """A line of the result."""
    began, cpu = time.perf_counter(), time.process_time()
    work()
    spent, wall = time.process_time() - cpu, time.perf_counter() - began
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    return {
        "what": what, "rows": rows, "cpu_s": f"{spent:.3f}", "wall_s": f"{wall:.3f}", "us_per_row": f"{spent / rows * 1e6:.2f}",
        "peak_gib": f"{peak:.2f}", "note": note,
    }  # fmt: skip


def choose(rows: int) -> None:
    """The rows that a ratio of 2.5 takes."""
    hashes = row_hashes(7, "source", np.zeros(rows, np.int64), np.arange(1, rows + 1))
    times_taken(rank_order(hashes), amount(Fraction("2.5"), None, rows))


def filters(chats: int) -> list[dict[str, Any]]:
    """Each filter alone."""
    with tempfile.TemporaryDirectory() as work:
        file, held_out = Path(work) / "chats.jsonl", Path(work) / "eval.jsonl"
        make_chats.write_chats(file, chats + QUESTIONS, make_chats.SEED)
        lines = file.read_text(encoding="utf-8").splitlines()
        found = [json.loads(line)["messages"] for line in lines[chats:]]
        questions = [next(turn["content"] for turn in turns if turn["role"] == "user") for turns in found]
        held_out.write_text("".join(json.dumps({"text": text}) + "\n" for text in questions), encoding="utf-8")
        rows = [parse_row(json.loads(line), RowForm("messages")) for line in lines[:chats]]
        result = [measured("row_hash", chats, lambda: [row_hash(row) for row in rows])]
        for what, args in (
            ("repetition", DataArguments(drop_repetitive=True)),
            ("decontamination", DataArguments(decontaminate=str(held_out))),
        ):
            rules = Filters.of(args)
            assert rules is not None
            left_out = 0

            def work_all(rules: Filters = rules) -> None:
                nonlocal left_out
                for row in rows:
                    try:
                        rules(row)
                    except ValueError:
                        left_out += 1

            line = measured(what, chats, work_all)
            result.append({**line, "note": f"{left_out} left out"})
    return result


def main() -> None:
    """Measure and add the lines."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rows", type=int, default=10_000_000)
    parser.add_argument("--chats", type=int, default=5_000)
    parser.add_argument("--csv", type=Path, default=HERE / "sampling.csv")
    values = parser.parse_args()
    about = circumstances(("numpy", "numba"))
    hashes = np.random.default_rng(0).integers(0, 2**63, (values.rows // 10, 2)).astype(np.uint64)
    places = np.arange(len(hashes))
    Seen().add(hashes[:10], places[:10], places[:10])
    lines = [
        measured("choose", values.rows, lambda: choose(values.rows), "the goal is 5 CPU seconds for 10 million"),
        measured("known", len(hashes), lambda: Seen().add(hashes, np.zeros_like(places), places)),
        *filters(values.chats),
    ]
    add_rows(values.csv, [{**line, **about} for line in lines])
    for line in lines:
        print(line)


if __name__ == "__main__":
    main()
