"""What loading a model under ZeRO-3 costs each rank: our reader beside transformers', in memory and bytes read.

    python benchmarks/load_memory.py [--ranks 2] [--csv FILE]

A dense and a mixture-of-experts model of about 0.5 B parameters with random bf16 weights are saved in shards, then loaded by
``ranks`` processes that share this machine, once with each reader. Anonymous memory is the process's own (the parts it
keeps, and what it needs meanwhile); mapped is what it has in view of the files, which the kernel may take back at any
time. Both are peaks of a look every 5 ms, above what the process had before. The result is added to ``load_memory.csv``.
"""

import argparse
import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Sequence
from pathlib import Path
from typing import Any

from results import add_rows, circumstances

HERE = Path(__file__).resolve().parent
COMMON: dict[str, Any] = {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 64, "vocab_size": 32000}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {**COMMON, "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 26},
    "qwen3_moe": {
        **COMMON, "hidden_size": 1024, "intermediate_size": 1024, "moe_intermediate_size": 512, "num_hidden_layers": 16,
        "num_experts": 16,
    },
}  # fmt: skip
READERS = ("ours", "stock")
MIB = 2**20


def memory(process: int | str = "self") -> tuple[int, int]:
    """Resident bytes of a process: its own, and of mapped files; none of one that has ended."""
    lines = Path(f"/proc/{process}/status").read_text(encoding="utf-8").splitlines()
    values = {line.split(":")[0]: line.split()[1] for line in lines if line.startswith("Rss")}
    return int(values.get("RssAnon", 0)) * 1024, int(values.get("RssFile", 0)) * 1024


@contextlib.contextmanager
def peaks(told: dict[str, Any]) -> Generator[None]:
    """Peaks of memory above the start, and seconds, of what runs inside."""
    begin, start = memory(), time.perf_counter()
    highest = list(begin)
    done = threading.Event()

    def look() -> None:
        while not done.wait(0.005):
            for place, value in enumerate(memory()):
                highest[place] = max(highest[place], value)

    watcher = threading.Thread(target=look)
    watcher.start()
    try:
        yield
    finally:
        done.set()
        watcher.join()
    told["seconds"] = round(time.perf_counter() - start, 1)
    told["peak_anonymous_mib"] = round((highest[0] - begin[0]) / MIB)
    told["peak_mapped_mib"] = round((highest[1] - begin[1]) / MIB)


def rank(reader: str, folder: str) -> None:
    """One rank: load, and print what it cost as JSON."""
    import torch
    from finebridge.ds_configs.resolve import resolve
    from finebridge.train import runtime
    from finebridge.train.loading import streamed_loading
    from transformers import AutoModelForCausalLM
    from transformers.integrations.deepspeed import HfDeepSpeedConfig

    settings = resolve("ds_zero3_no_offload")
    numbers = {
        "reduce_bucket_size": 10**6,
        "stage3_prefetch_bucket_size": 10**6,
        "stage3_param_persistence_threshold": 0,
    }
    settings["zero_optimization"] |= numbers
    settings |= {"train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": 1.0}
    settings |= {"train_batch_size": runtime.world_size(), "bf16": {"enabled": True}, "fp16": {"enabled": False}}
    runtime.start(settings)
    keep = HfDeepSpeedConfig(settings)
    told: dict[str, Any] = {"rank": int(os.environ["RANK"])}
    with streamed_loading() if reader == "ours" else contextlib.nullcontext(), peaks(told):
        model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16)
    told["kept_mib"] = round(sum(p.ds_tensor.numel() * p.ds_tensor.element_size() for p in model.parameters()) / MIB)
    print("RESULT " + json.dumps(told), flush=True)
    del keep
    runtime.finish()
    os._exit(0)  # gloo's threads may abort an orderly exit


def measure(reader: str, folder: Path, ranks: int) -> list[dict[str, Any]]:
    """Every rank's figures."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, "--rank", reader, str(folder)], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            text=True, env={**os.environ, "RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(ranks),
                            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "OMP_NUM_THREADS": "1"},
        )
        for number in range(ranks)
    ]  # fmt: skip
    texts = [process.communicate()[0] for process in processes]
    return [json.loads(line[7:]) for text in texts for line in text.splitlines() if line.startswith("RESULT ")]


def build(model_type: str, folder: Path) -> int:
    """Save a model with random weights in shards of 200 MB; bytes of its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **MODELS[model_type])
    AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).save_pretrained(folder, max_shard_size="200MB")
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure both readers on both models, print, add to the CSV."""
    parser = argparse.ArgumentParser("load_memory.py", allow_abbrev=False, description="memory of loading under ZeRO-3")
    parser.add_argument("--ranks", type=int, default=2, help="processes (default %(default)s)")
    parser.add_argument("--csv", type=Path, default=HERE / "load_memory.csv", help="the file to add to")
    parser.add_argument("--rank", nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.rank:
        rank(*args.rank)
    common = circumstances(("torch", "transformers", "deepspeed", "safetensors"))
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as work:
        for model_type in MODELS:
            folder = Path(work) / model_type
            size = build(model_type, folder)
            for reader in READERS:
                for told in measure(reader, folder, args.ranks):
                    rows.append(
                        {**common, "model": model_type, "weights_mib": round(size / MIB), "reader": reader, **told}
                    )
                    print({key: rows[-1][key] for key in ("model", "weights_mib", "reader", *told)})
    add_rows(args.csv, rows)


if __name__ == "__main__":
    main()
