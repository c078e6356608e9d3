"""What a safe save costs: finebridge's beside the stock Trainer's, alternating in one process (or two ranks).

    python benchmarks/save_cost.py --tokenizer DIR [--layers N] [--rounds N] [--out FOLDER]

A Qwen3-like model with random weights trains one step, so that AdamW has its states; then the same trainer saves by both
ways in turn. Ours writes the same files, hashes each while it is written, fsyncs all, writes the manifest and renames; the
stock save does none of it. Wall seconds are those of the slowest rank, CPU seconds of all ranks together; the medians of the
rounds and their ratio are added to ``save_cost.csv``.
"""

import argparse
import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

from results import add_rows, circumstances

HERE = Path(__file__).resolve().parent
KINDS = {"plain": ("", 1), "zero2": ("ds_zero2_no_offload", 2), "zero3": ("ds_zero3_no_offload", 2)}


def rank_main(words: Sequence[str], rounds: int, result: Path) -> None:
    """One rank: train a step, save ``rounds`` times by each way, write the seconds of every save."""
    import torch.distributed as dist
    from finebridge.train.arguments import parse
    from finebridge.train.assemble import assemble
    from transformers import Trainer

    trainer = assemble(parse(words)).trainer
    trainer.train()
    ours, home = type(trainer), Path(str(trainer.args.output_dir))
    seconds: dict[str, list[tuple[float, float]]] = {"stock": [], "ours": []}
    for number in range(rounds + 1):
        for name, kind in (("stock", Trainer), ("ours", ours)):
            trainer.__class__ = kind
            trainer.args.output_dir = str(home / name)
            if trainer.args.process_index == 0:
                shutil.rmtree(home / name, ignore_errors=True)
                (home / name).mkdir()
            os.sync()  # what an earlier save left to the system is no part of this one
            if dist.is_initialized():
                dist.barrier()
            wall, cpu = time.perf_counter(), time.process_time()
            trainer._save_checkpoint(trainer.model, None)  # noqa: SLF001
            if number:  # the first round warms up
                seconds[name].append((time.perf_counter() - wall, time.process_time() - cpu))
    size = sum(path.stat().st_size for path in (home / "ours").rglob("*") if path.is_file())
    result.with_suffix(f".{trainer.args.process_index}").write_text(json.dumps([seconds, size]), encoding="utf-8")
    os._exit(0)  # gloo's threads may abort an orderly exit


def run(kind: str, args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """All ranks of one kind; the medians."""
    settings, world = KINDS[kind]
    words = [
        "--config_name", "qwen3", "--tokenizer_name_or_path", str(args.tokenizer), "--num_layers", str(args.layers),
        "--hidden_size", "512", "--intermediate_size", "1536", "--num_attention_heads", "8", "--num_key_value_heads", "4",
        "--vocab_size", "32000", "--use_dummy_data", "--max_seq_length", "16", "--per_device_train_batch_size", "1",
        "--max_steps", "1", "--save_strategy", "no", "--disable_tqdm", "true", "--report_to", "none",
        "--output_dir", str(folder / kind),
    ]  # fmt: skip
    words += ["--deepspeed", settings] if settings else []
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    result = folder / f"{kind}.json"
    ranks = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", str(result), "--rounds", str(args.rounds), "--", *words],
            env={
                **os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world),
                "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
            },
        )
        for rank in range(world)
    ]  # fmt: skip
    codes = [rank.wait() for rank in ranks]
    if any(codes):
        sys.exit(f"error: a rank of {kind} failed")
    told = [json.loads(result.with_suffix(f".{rank}").read_text(encoding="utf-8")) for rank in range(world)]
    shutil.rmtree(folder / kind)
    row: dict[str, object] = {"kind": kind, "ranks": world, "rounds": args.rounds, "bytes": told[0][1]}
    for name in ("stock", "ours"):
        rounds = list(zip(*(seconds[name] for seconds, _ in told), strict=True))
        row[f"{name}_wall_s"] = round(statistics.median(max(wall for wall, _ in ranks) for ranks in rounds), 3)
        row[f"{name}_cpu_s"] = round(statistics.median(sum(cpu for _, cpu in ranks) for ranks in rounds), 3)
    for unit in ("wall", "cpu"):
        row[f"{unit}_ratio"] = round(float(str(row[f"ours_{unit}_s"])) / float(str(row[f"stock_{unit}_s"])), 2)
    return row


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every kind, print, add to the CSV."""
    parser = argparse.ArgumentParser("save_cost.py", allow_abbrev=False, description="the cost of a safe save")
    parser.add_argument("--tokenizer", type=Path, help="a tokenizer's folder; it is saved with every checkpoint")
    parser.add_argument("--layers", type=int, default=12, help="layers of the model (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=7, help="saves of each way (default %(default)s)")
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS), help="what to measure (default all)")
    parser.add_argument("--out", type=Path, help="where to write; default a temporary folder")
    parser.add_argument("--csv", type=Path, default=HERE / "save_cost.csv", help="the file to add to")
    parser.add_argument("--rank", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("words", nargs="*", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank:
        rank_main(args.words, args.rounds, args.rank)
    if not args.tokenizer:
        parser.error("--tokenizer is missing")
    common = circumstances(("torch", "transformers", "deepspeed", "xxhash"))
    with tempfile.TemporaryDirectory(dir=args.out) as work:
        for kind in args.kinds:
            row = run(kind, args, Path(work))
            print(row, flush=True)
            add_rows(args.csv, [{**common, **row}])


if __name__ == "__main__":
    main()
