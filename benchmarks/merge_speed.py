"""What a merge costs: finebridge's beside PEFT's and beside a plain copy of the same bytes.

    python benchmarks/merge_speed.py [--large] [--rounds N] [--out FOLDER]

Qwen3-like models with random bf16 weights of about 0.5, 1.5 and, with ``--large``, 8 GB, and an adapter of rank 16 on all
linear modules. The ways run in turn, each time in a fresh process: a copy of the base's folder, the same with every file
flushed to the device, ``finebridge merge`` (which hashes, flushes and proves what it writes), and PEFT's
``merge_and_unload`` with ``save_pretrained``. Wall and CPU seconds are of the work, those of imports stand beside them. Peak
memory is the anonymous memory of the whole process by a look every 5 ms: mapped files are not counted, as the system may take
them back at any time. Medians of the rounds are added to ``merge_speed.csv``; a ratio is to the row of that way.
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
from collections.abc import Callable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from load_memory import peaks
from results import add_rows, circumstances

HERE = Path(__file__).resolve().parent
MODELS: dict[str, dict[str, Any]] = {
    "tiny": {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2, "num_attention_heads": 4,
             "num_key_value_heads": 2, "head_dim": 16},
    "0.5GB": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 15, "num_attention_heads": 16,
              "num_key_value_heads": 8, "head_dim": 64},
    "1.5GB": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 12, "num_attention_heads": 16,
              "num_key_value_heads": 8, "head_dim": 128},
    "8GB": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 19, "num_attention_heads": 32,
            "num_key_value_heads": 8, "head_dim": 128},
}  # fmt: skip
FIGURES = ("wall_s", "cpu_s", "import_wall_s", "import_cpu_s", "peak_anonymous_mib")


def build(name: str, folder: Path) -> None:
    """Write the base, in shards of at most 2 GB, and the adapter; no more than a shard is in memory."""
    import torch
    from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
    from safetensors.torch import save_file
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model("qwen3", vocab_size=32000, tie_word_embeddings=False, **MODELS[name])
    config.architectures, config.dtype = ["Qwen3ForCausalLM"], torch.bfloat16
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    base, adapter = folder / "base", folder / "adapter"
    config.save_pretrained(base)
    weight_map: dict[str, str] = {}
    for number, shapes in enumerate(shards(model.state_dict()), 1):
        weight_map |= dict.fromkeys(shapes, f"model-{number:05d}.safetensors")
        save_file(filled(shapes, torch.bfloat16), base / f"model-{number:05d}.safetensors", {"format": "pt"})
    index = {"metadata": {}, "weight_map": weight_map}
    (base / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    lora = LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM")
    live: Any = get_peft_model(model, lora)
    live.peft_config["default"].save_pretrained(adapter)
    factors = get_peft_model_state_dict(live, save_embedding_layers=False)
    save_file(filled(factors, torch.float32), adapter / "adapter_model.safetensors", {"format": "pt"})


def shards(tensors: dict[str, Any]) -> list[dict[str, Any]]:
    """The tensors, in lists of at most 2 GB of bf16."""
    parts: list[dict[str, Any]] = [{}]
    for key, tensor in tensors.items():
        if sum(2 * other.numel() for other in parts[-1].values()) + 2 * tensor.numel() > 2 * 10**9:
            parts.append({})
        parts[-1][key] = tensor
    return parts


def filled(shapes: dict[str, Any], dtype: Any) -> dict[str, Any]:
    """Random matrices and the ones of norms, in the shapes of these tensors."""
    import torch

    generator = torch.Generator().manual_seed(0)
    made = {key: torch.ones(tensor.shape, dtype=dtype) for key, tensor in shapes.items()}
    for tensor in made.values():
        if tensor.ndim > 1:
            tensor.normal_(0, 0.02, generator=generator)
    return made


def copy(base: Path, _adapter: Path, out: Path) -> None:
    """The base's folder, copied."""
    shutil.copytree(base, out)


def copy_fsync(base: Path, adapter: Path, out: Path) -> None:
    """The same, and on the device when it ends."""
    copy(base, adapter, out)
    for path in [*out.iterdir(), out]:
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def finebridge(base: Path, adapter: Path, out: Path) -> None:
    """The user's command, with its defaults."""
    from finebridge.merge.merge_lora import main

    words = {"--base_model_path": base, "--adapter_model_path": adapter, "--output_path": out, "--save_dtype": "bf16"}
    code = main([str(word) for pair in words.items() for word in pair])
    if code:
        sys.exit(code)


def peft(base: Path, adapter: Path, out: Path) -> None:
    """PEFT's own way, as its documentation shows it."""
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
    PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(out)


WAYS: dict[str, tuple[Callable[[Path, Path, Path], None], list[str]]] = {
    "copy": (copy, []),
    "copy_fsync": (copy_fsync, []),
    "finebridge": (finebridge, ["torch", "safetensors", "finebridge.merge.merge_lora"]),
    "peft": (peft, ["torch", "peft", "transformers.models.qwen3.modeling_qwen3"]),
}


def one(way: str, folder: Path) -> None:
    """One measurement, in this process: print it as JSON."""
    work, modules = WAYS[way]
    told: dict[str, Any] = {}
    with peaks(told):
        times = [(time.perf_counter(), time.process_time())]
        for module in modules:
            __import__(module)
        times.append((time.perf_counter(), time.process_time()))
        work(folder / "base", folder / "adapter", folder / "out")
        times.append((time.perf_counter(), time.process_time()))
    (told["import_wall_s"], told["import_cpu_s"]), (told["wall_s"], told["cpu_s"]) = (
        (after[0] - before[0], after[1] - before[1]) for before, after in pairwise(times)
    )
    print("RESULT " + json.dumps(told), flush=True)


def measure(way: str, folder: Path) -> dict[str, float]:
    """One measurement in a process of its own; nothing that an earlier one left to the system is part of it."""
    shutil.rmtree(folder / "out", ignore_errors=True)
    os.sync()
    done = subprocess.run(
        [sys.executable, __file__, "--one", way, str(folder)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        sys.exit(f"error: {way} failed\n{done.stdout}{done.stderr}")
    return json.loads(done.stdout.rpartition("RESULT ")[2])


def rows_of(name: str, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """A line for each way."""
    build(name, folder)
    size = sum(path.stat().st_size for path in (folder / "base").iterdir())
    measure("copy", folder)  # so that no way is the first to read the base
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
        for other in ("copy", "copy_fsync", "peft"):
            for unit in ("wall_s", "cpu_s"):
                row[f"{unit.removesuffix('_s')}_to_{other}"] = round(figures[unit] / medians[other][unit], 2)
        row["peak_to_peft"] = round(figures["peak_anonymous_mib"] / medians["peft"]["peak_anonymous_mib"], 3)
        rows.append(row)
    return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure every model, print, add to the CSV."""
    parser = argparse.ArgumentParser("merge_speed.py", allow_abbrev=False, description="the cost of a merge")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=["0.5GB", "1.5GB"], help="default %(default)s")
    parser.add_argument("--large", action="store_true", help="the model of 8 GB too; PEFT needs as much memory")
    parser.add_argument("--rounds", type=int, default=5, help="merges of each way (default %(default)s)")
    parser.add_argument("--out", type=Path, help="where to write; default a temporary folder")
    parser.add_argument("--csv", type=Path, default=HERE / "merge_speed.csv", help="the file to add to")
    parser.add_argument("--one", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.one:
        one(args.one[0], Path(args.one[1]))
        return
    common = circumstances(("torch", "transformers", "peft", "safetensors", "xxhash"))
    for name in [*args.models, *["8GB"] * args.large]:
        with tempfile.TemporaryDirectory(dir=args.out) as work:
            rows = rows_of(name, args.rounds, Path(work))
        for row in rows:
            print({key: value for key, value in row.items() if key not in ("bytes", "rounds")}, flush=True)
        add_rows(args.csv, [{**common, **row} for row in rows])


if __name__ == "__main__":
    main()
