"""``finebridge plan`` beside real runs: the rows of ``speed.py`` are foretold, trained for some steps, and both are told.

    python benchmarks/gpu/plan_check.py [--rows 0.6b,4b,...] [--steps 8] [--gpu_memory 80] [-- FLAGS]

A row ``NAME:auto`` is trained with ``--gradient_checkpointing auto``, whose number of layers is told, too. Rows go into
``plan_check.csv``. ``--rows tiny`` tries the script itself on a CPU, where the memory of the whole process is all that is
measured, so that nothing is compared.
"""

import argparse
import json
import re
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import speed

AUTO = ":auto"


def foretold(words: Sequence[str], vocabulary: int, gpu_memory: float) -> dict[str, Any]:
    """What the plan says of a run with these flags on one GPU, whose tokenizer has so many words."""
    from finebridge.ds_configs.resolve import resolve
    from finebridge.finetune import plan
    from finebridge.train.zero_memory import read_zero

    given = dict(zip(words[::2], words[1::2], strict=True))
    config = json.loads(Path(given.pop("--config_name")).read_text(encoding="utf-8"))
    file = Path(given.pop("--tokenizer_name_or_path")) / "config.json"
    file.write_text(json.dumps({**config, "vocab_size": vocabulary}), encoding="utf-8")
    args = plan.arguments_of(file, [word for pair in given.items() for word in pair])
    settings = args.hf.get("deepspeed")
    task = plan.task_of(args, 1, plan.limit_of(gpu_memory, 1), deepspeed=bool(settings))
    hidden = plan.config_of(args).get_text_config().hidden_size
    choice = plan.choose("", task, read_zero(resolve(str(settings)) if settings else None, hidden))
    return {
        "planned_gib": round(max(choice.passes, choice.step) / 2**30, 3), "planned_layers": choice.recomputed,
        "planned_held_gib": round(choice.held.device / 2**30, 3), "planned_seconds": round(choice.seconds, 3),
        "tokens": task.accumulation * sum(task.lengths),
    }  # fmt: skip


def checked(name: str, folder: Path, args: argparse.Namespace, until: float) -> dict[str, object]:
    """One row: the plan, the run, and how far they are apart."""
    row = name.removesuffix(AUTO)
    more = [*(["--gradient_checkpointing", "auto"] if name.endswith(AUTO) else []), *args.more]
    entry = ["-m", "finebridge.finetune.cli", "sft", "--nproc_per_node", "1"]
    steps = ["--max_steps", str(args.steps), "--logging_steps", "1"]
    words = speed.command(row, folder, None, [*more, *steps], entry)
    flags = words[1 + len(entry) :]
    told = foretold(flags, speed.ROWS[row].words, args.gpu_memory)
    tokens = told.pop("tokens")
    (folder / row).mkdir(exist_ok=True)
    done = speed.follow(words, folder / row, until - time.monotonic(), until)
    lines = done.lines[len(done.lines) // 2 :]
    found = re.search(r"^recompute: (\d+) of", done.text, re.MULTILINE)
    measured = lines[-1].get("memory_gib", "") if lines else ""
    rates = [line["tokens_per_second"] for line in lines if "tokens_per_second" in line]
    off = round(told["planned_gib"] / measured - 1, 4) if measured and speed.device() != "CPU" else ""
    return {
        "row": name, "measured_gib": measured, **told, "off": off, "layers": found[1] if found else "",
        "seconds": round(tokens / max(rates), 3) if rates else "",
        "error": "" if lines else f"exit code {done.code}: " + " | ".join(done.text.strip().splitlines()[-3:])[-300:],
    }  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    """Check row by row; 1 when one failed or is more than a tenth off."""
    parser = argparse.ArgumentParser("plan_check.py", allow_abbrev=False, description="the plan beside real runs")
    parser.add_argument("--rows", default="0.6b,4b,8b-lora-gc,4b-gc:auto,8b-lora-gc:auto", help="comma-separated")
    parser.add_argument("--steps", type=int, default=8, help="of each row (default %(default)s)")
    parser.add_argument("--minutes", type=float, default=8, help="for all rows together (default %(default)g)")
    parser.add_argument("--gpu_memory", type=float, default=80, help="GiB that the plan may fill (default %(default)g)")
    parser.add_argument("--csv", type=Path, default=speed.ROOT / "benchmarks" / "plan_check.csv", help="to add to")
    parser.add_argument("more", nargs="*", help="more flags for every run, after --")
    args = parser.parse_args(argv)
    names = str(args.rows).split(",")
    if unknown := {name.removesuffix(AUTO) for name in names} - speed.ROWS.keys():
        parser.error(f"--rows: no {', '.join(sorted(unknown))}; there are {', '.join(speed.ROWS)}")
    until = time.monotonic() + 60 * args.minutes
    common = {"device": speed.device(), **speed.circumstances(speed.PACKAGES), "flags": " ".join(args.more)}
    failed = False
    for number, name in enumerate(names):
        with tempfile.TemporaryDirectory() as work:
            folder = Path(work) / "runs"
            folder.mkdir()
            sys.path.insert(0, speed.environment(Path(work))["PYTHONPATH"].split(":")[0])
            share = (until - time.monotonic()) / (len(names) - number)
            row = checked(name, folder, args, time.monotonic() + share)
        print(f"== {name}: " + ", ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
        speed.add_rows(args.csv, [{**common, **row}])
        failed |= bool(row["error"]) or (row["off"] != "" and abs(float(str(row["off"]))) > 0.1)  # noqa: PLR2004
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
