"""Forward and backward of decoder layers with LoRA in Qwen3-8B's shape: frozen alone, by PEFT's own forward, by our products.

    python benchmarks/gpu/lora_products.py [--layers 4] [--tokens 4096,16384] [--repeats 10] [--ways ...] [--tiny]

Needs no download: weights are random, rank 16 on all seven linears, everything in bf16 as DeepSpeed trains it, rows of 1,024
tokens. ``frozen`` has no adapter and is what nothing can be below; ``peft`` and ``ours`` differ in the linears' forward alone,
``-compiled`` compiles each layer, ``-lean`` has the compiler compute again what needs no product (norms, SwiGLU) in place of
keeping it, ``-autocast`` has adapters in fp32 under autocast, as a run without DeepSpeed. Milliseconds are medians of a layer,
bytes those that a forward keeps for its backward (``kept``) and the most that is there at a time beside weights (``peak``), for
a layer and a token. ``off`` is how far the adapters' gradients are from those of the first way that has adapters. About a minute
and a half on an H100; ``--tiny`` tries the script on a CPU.
"""

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "benchmarks"), str(ROOT / "benchmarks" / "gpu")]

from results import add_rows, circumstances  # noqa: E402 - found through the line above
from speed import LORA, PACKAGES, device, environment, qwen3  # noqa: E402

ROW = 1024
WAYS = (
    "frozen",
    "peft",
    "ours",
    "peft-autocast",
    "ours-autocast",
    "peft-compiled",
    "ours-compiled",
    "ours-compiled-lean",
)
WARM = 3


def build(way: str, config: dict[str, Any], place: Any) -> Any:
    """A stack of layers; the same weights and adapters for every way."""
    import torch
    from finebridge.train.lora_products import take_products
    from peft import LoraConfig, get_peft_model
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    values = dict(config)
    set_seed(0)
    with place:
        shape = AutoConfig.for_model(values.pop("model_type"), **values, vocab_size=64)
        model: Any = AutoModelForCausalLM.from_config(shape, dtype=torch.bfloat16).requires_grad_(False)
    if way == "frozen":
        return model
    targets = str(LORA["lora_target"]).split(",")
    wanted = LoraConfig(r=16, lora_alpha=32, target_modules=targets, init_lora_weights=False)
    model = get_peft_model(model, wanted, autocast_adapter_dtype=way.endswith("autocast"))
    for module in model.modules():  # B is not zero in a run, nor as large as A
        for factor in getattr(module, "lora_B", {}).values():
            factor.weight.data.mul_(0.1)
    if way.startswith("ours"):
        take_products(model, place, lambda text: print(f"   {text}", flush=True))
    if "compiled" in way:
        for layer in model.get_base_model().model.layers:
            layer.compile()
    return model


def measure(way: str, model: Any, tokens: int, row: int, repeats: int, place: Any) -> tuple[dict[str, Any], list[Any]]:
    """Figures of a layer, and the gradients of the adapters."""
    import torch

    inner = (model if way == "frozen" else model.get_base_model()).model
    draw = torch.Generator().manual_seed(0)
    shape = (tokens // row, row, inner.config.hidden_size)
    x, up = (torch.randn(shape, generator=draw).to(place, torch.bfloat16) for _ in range(2))
    x.requires_grad_()
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = place.type == "cuda"
    times: list[tuple[float, float]] = []
    kept = peak = 0
    for _ in range(WARM + repeats):
        for tensor in (x, *trained):
            tensor.grad = None
        before = torch.cuda.memory_allocated() if on_gpu else 0
        if on_gpu:
            torch.cuda.reset_peak_memory_stats()
        marks = [_now(place)]
        with torch.autocast(place.type, torch.bfloat16, enabled=way.endswith("autocast")):
            out = inner(inputs_embeds=x).last_hidden_state
        kept = torch.cuda.memory_allocated() - before if on_gpu else 0
        marks.append(_now(place))
        out.backward(up)
        marks.append(_now(place))
        peak = torch.cuda.max_memory_allocated() - before if on_gpu else 0
        del out
        times.append(_between(marks, place))
    layers = inner.config.num_hidden_layers
    forward, backward = (statistics.median(pair[side] for pair in times[WARM:]) / layers for side in (0, 1))
    figures = {
        "way": way, "tokens": tokens, "layers": layers, "forward_ms": round(forward, 3), "backward_ms": round(backward, 3),
        "both_ms": round(forward + backward, 3), "kept_bytes": round(kept / tokens / layers),
        "peak_bytes": round(peak / tokens / layers),
    }  # fmt: skip
    return figures, [parameter.grad.float().cpu() for parameter in trained]


def _now(place: Any) -> Any:
    import torch

    if place.type != "cuda":
        return time.perf_counter()
    event = torch.cuda.Event(enable_timing=True)
    event.record()
    return event


def _between(marks: Sequence[Any], place: Any) -> tuple[float, float]:
    """Milliseconds of forward and of backward."""
    import torch

    first, middle, last = marks
    if place.type != "cuda":
        return 1e3 * (middle - first), 1e3 * (last - middle)
    torch.cuda.synchronize()
    return first.elapsed_time(middle), middle.elapsed_time(last)


def main(argv: Sequence[str] | None = None) -> int:
    """Measure every way in turn, print a table, add to the CSV."""
    parser = argparse.ArgumentParser("lora_products.py", allow_abbrev=False, description="LoRA's products on one GPU")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument(
        "--tokens", default="4096,16384", help="of a micro-batch, comma-separated (default %(default)s)"
    )
    parser.add_argument(
        "--repeats", type=int, default=10, help="behind three that are not counted (default %(default)d)"
    )
    parser.add_argument("--ways", default=",".join(WAYS), help="comma-separated (default %(default)s)")
    parser.add_argument("--tiny", action="store_true", help="a small shape, for a CPU")
    parser.add_argument(
        "--csv", type=Path, default=ROOT / "benchmarks" / "gpu_lora_products.csv", help="the file to add to"
    )
    args = parser.parse_args(argv)
    ways = str(args.ways).split(",")
    if unknown := set(ways) - set(WAYS):
        parser.error(f"--ways: no {', '.join(sorted(unknown))}; there are {', '.join(WAYS)}")
    with tempfile.TemporaryDirectory() as work:
        sys.path.insert(0, environment(Path(work))["PYTHONPATH"].partition(":")[0])
        common = {"device": device(), **circumstances(PACKAGES)}
        print(f"{common['device']}; {common['versions']}", flush=True)
        add_rows(args.csv, [{**common, **row} for row in table(ways, args)])
    return 0


def table(ways: Sequence[str], args: argparse.Namespace) -> list[dict[str, Any]]:
    """A row for each number of tokens and each way, printed as it is done."""
    import torch
    from torch._functorch import config as partitioner

    place = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = (
        qwen3(64, 128, args.layers, 8, tied=False) if args.tiny else qwen3(4096, 12288, args.layers, 32, tied=False)
    )
    rows: list[dict[str, Any]] = []
    theirs: dict[int, list[Any]] = {}
    for way in ways:
        model = build(way, config, place)
        for tokens in map(int, str(args.tokens).split(",")):
            with partitioner.patch(ban_recompute_materialized_backward=not way.endswith("lean")):
                figures, gradients = measure(way, model, tokens, min(ROW, tokens), args.repeats, place)
            expected = theirs.setdefault(tokens, gradients) if way != "frozen" else []
            off = max((float((a - b).norm() / b.norm()) for a, b in zip(gradients, expected, strict=True)), default=0.0)
            rows.append({**figures, "off": round(off, 5)})
            print("  ".join(f"{key} {value}" for key, value in rows[-1].items()), flush=True)
        del model
        torch.compiler.reset()
        if place.type == "cuda":
            torch.cuda.empty_cache()
    return rows


if __name__ == "__main__":
    sys.exit(main())
