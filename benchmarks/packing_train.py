"""What packing saves in training: one epoch over the same chats, padded and packed, through the real command.

    python benchmarks/packing_train.py --chats FILE --tokenizer DIR [--layers N] [--out FOLDER]

The model has about the shape of Qwen3 0.6B and random weights (``--layers`` cuts it, to try the script on a CPU). Each run is a
process of its own on one device; counted is the time that the Trainer reports for the epoch, without loading. Padded
batches hold ``BATCH`` samples; packed ones ``BATCH / 4`` rows of ``--length`` tokens, which is about as many real tokens. The
result is added to ``packing_train.csv``.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from results import add_rows, circumstances

HERE = Path(__file__).resolve().parent
BATCH = 8
SHAPE = {
    "hidden_size": 1024, "intermediate_size": 3072, "num_attention_heads": 16, "num_key_value_heads": 8,

}  # fmt: skip
RUNS = {"padded": [], "packed": ["--packing"]}


def train(name: str, args: argparse.Namespace, folder: Path) -> dict[str, object]:
    """One epoch; what the Trainer says of it."""
    rows = BATCH if name == "padded" else BATCH // 4
    words = [sys.executable, "-m", "finebridge.finetune.cli", "sft", "--nproc_per_node", "1", *RUNS[name]]
    words += [
        "--config_name",
        "qwen3",
        "--tokenizer_name_or_path",
        str(args.tokenizer),
        "--num_layers",
        str(args.layers),
    ]
    words += [word for key, value in SHAPE.items() for word in (f"--{key}", str(value))]
    words += [
        "--train_data_file",
        str(args.chats),
        "--max_seq_length",
        str(args.length),
        "--output_dir",
        str(folder / name),
    ]
    words += ["--prepared_data_dir", str(folder / "prepared"), "--per_device_train_batch_size", str(rows)]
    words += ["--num_train_epochs", "1", "--save_strategy", "no", "--logging_steps", "10", "--bf16", "--disable_tqdm"]
    words += ["--activation_checkpointing", "--learning_rate", "1e-4", *args.more]
    subprocess.run(words, check=True)
    history = json.loads((folder / name / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]
    end = history[-1]
    return {"run": name, "steps": end["step"], "seconds": end["train_runtime"], "mean_loss": end["train_loss"]}


def device() -> str:
    """The GPU's name, or the processor's."""
    import torch

    return torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {len(os.sched_getaffinity(0))} cores"


def main(argv: Sequence[str] | None = None) -> None:
    """Train both ways, print the ratio, add to the CSV."""
    parser = argparse.ArgumentParser(
        "packing_train.py", allow_abbrev=False, description="padded beside packed training"
    )
    parser.add_argument("--chats", type=Path, required=True, help="a file of chats; make_chats.py makes one")
    parser.add_argument("--tokenizer", type=Path, required=True, help="a tokenizer with its chat template")
    parser.add_argument("--layers", type=int, default=28, help="layers of the model (default %(default)s)")
    parser.add_argument("--length", type=int, default=2048, help="tokens of the longest sample and of a packed row")
    parser.add_argument("--csv", type=Path, default=HERE / "packing_train.csv", help="the file to add to")
    parser.add_argument("more", nargs="*", help="flags for the training, after --")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as work:
        results = [train(name, args, Path(work)) for name in RUNS]
        (report,) = (Path(work) / "prepared").glob("*/report.json")
        told = json.loads(report.read_text(encoding="utf-8"))
    common = {"device": device(), **circumstances(("torch", "transformers"))}
    common |= {"layers": str(args.layers), "length": str(args.length), "samples": str(told["samples"])}
    add_rows(args.csv, [{**common, "flags": " ".join(args.more), **result} for result in results])
    for result in results:
        print(result)
    print(f"padded / packed: {results[0]['seconds'] / results[1]['seconds']:.2f}")  # pyright: ignore[reportOperatorIssue]


if __name__ == "__main__":
    main()
