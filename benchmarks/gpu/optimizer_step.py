"""Milliseconds and bytes of an optimizer step on one GPU, for a billion parameters: DeepSpeed's own ZeRO, ours, plain torch.

    python benchmarks/gpu/optimizer_step.py [--parameters 1e9] [--steps 10] [--minutes 2.7] [--rows lean-stochastic,...]

Everything that follows a model's backward pass is measured: gradients come out of nothing, so that ``backward`` has what
reducing and summing them costs, and ``step`` norm, clip and update. ``held`` is the memory between two steps (weights,
masters, states), ``peak`` the most within one. A row that fails tells its error, and the next one begins. On a CPU it tries
itself: ``--parameters 1e5 --steps 2``.
"""

import argparse
import gc
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from results import add_rows, circumstances  # noqa: E402 - found through the line above

PACKAGES = ("torch", "deepspeed", "triton")
WARM, CLIP, RATE, SLOPE = 3, 1.0, 1e-5, 1e-3


@dataclass(frozen=True)
class Row:
    """What is measured: ``stage`` of ZeRO (None is plain torch), ours or DeepSpeed's own, which optimizer, which masters."""

    stage: int | None
    lean: bool
    optimizer: str
    pure: bool


# The most telling first; the last compiles DeepSpeed's kernel, half a minute and more.
ROWS: dict[str, Row] = {
    "plain-bf16": Row(None, lean=False, optimizer="fused", pure=True),  # the bound of pure bf16
    "lean-stochastic": Row(2, lean=True, optimizer="stochastic", pure=True),
    "lean-kahan": Row(2, lean=True, optimizer="kahan", pure=True),
    "lean-fp32": Row(2, lean=True, optimizer="fused", pure=False),
    "stock-fp32": Row(2, lean=False, optimizer="fused", pure=False),
    "stock-fp32-unfused": Row(2, lean=False, optimizer="unfused", pure=False),
    "stock-bf16": Row(2, lean=False, optimizer="fused", pure=True),
    "zero3-stochastic": Row(3, lean=True, optimizer="stochastic", pure=True),
    "zero3-fp32": Row(3, lean=True, optimizer="fused", pure=False),
    "plain-stochastic": Row(None, lean=False, optimizer="stochastic", pure=True),
    "stock-fp32-fusedadam": Row(2, lean=False, optimizer="deepspeed", pure=False),
}


def settings_of(row: Row) -> dict[str, Any]:
    """The shipped DeepSpeed settings of the row's stage with what the Trainer would fill in."""
    from finebridge.ds_configs.resolve import resolve
    from finebridge.train.masters import without_masters

    settings = resolve(f"ds_zero{row.stage}_no_offload") | {
        "train_batch_size": 1, "train_micro_batch_size_per_gpu": 1, "gradient_accumulation_steps": 1, "gradient_clipping": CLIP,
        "bf16": {"enabled": True}, "fp16": {"enabled": False}, "zero_allow_untested_optimizer": True,
    }  # fmt: skip
    zero = settings["zero_optimization"]
    settings["zero_optimization"] = {key: 5_000_000 if value == "auto" else value for key, value in zero.items()}
    return without_masters(settings) if row.pure else settings


def make_model(parameters: int, device: Any) -> Any:
    """Weights as a language model has them: one large table, many matrices, small vectors; forward reads none of them."""
    import torch

    class Slope(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, weight: Any) -> Any:
            ctx.save_for_backward(weight)
            return weight.new_zeros(())

        @staticmethod
        def backward(ctx: Any, _: Any) -> Any:
            return torch.full_like(ctx.saved_tensors[0], SLOPE)

    class Weights(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            wide = max(16, int((parameters / 64) ** 0.5) // 16 * 16)
            sizes = [(parameters // 6 // wide, wide)]
            while sum(a * b for a, b in sizes) < parameters:
                sizes += [(wide, wide), (1, wide)]
            self.table = torch.nn.ParameterList(
                torch.nn.Parameter(torch.randn(size, device=device, dtype=torch.bfloat16).mul_(0.02)) for size in sizes
            )

        def forward(self) -> Any:
            return torch.stack([Slope.apply(weight) for weight in self.table]).sum()

    return Weights()


def make_optimizer(row: Row, model: Any) -> Any:
    """The row's optimizer over the model's weights, with one group."""
    import torch
    from finebridge.train.optimizers import BF16AdamW

    weights = list(model.parameters())
    if row.optimizer in ("stochastic", "kahan"):
        return BF16AdamW(weights, lr=RATE, kahan=row.optimizer == "kahan")
    if row.optimizer == "deepspeed":
        from deepspeed.ops.adam import FusedAdam
        from finebridge.train.extensions import plain_architectures

        plain_architectures(print)
        return FusedAdam(weights, lr=RATE)
    return torch.optim.AdamW(weights, lr=RATE, fused=row.optimizer == "fused")


def ways(row: Row, parameters: int, device: Any) -> tuple[Callable[[], Any], Callable[[], Any], Callable[[], None]]:
    """What makes gradients, what steps, and what takes it all down."""
    model = make_model(parameters, device)
    if row.stage is None:
        from finebridge.train.optimizers import clip_scale, total_norm
        from torch.nn.utils import clip_grad_norm_

        optimizer = make_optimizer(row, model)

        def step() -> None:
            if row.optimizer == "fused":
                clip_grad_norm_(model.parameters(), CLIP)
            else:
                optimizer.grad_scale = clip_scale(total_norm([w.grad for w in model.parameters()]), CLIP)
            optimizer.step()
            optimizer.zero_grad()

        return (lambda: model().backward()), step, (lambda: None)
    import deepspeed
    from finebridge.train import lean_zero

    if row.lean:
        lean_zero.install()
    else:
        lean_zero.uninstall()
    engine = deepspeed.initialize(model=model, optimizer=make_optimizer(row, model), config=settings_of(row))[0]
    return (lambda: engine.backward(engine())), engine.step, engine.destroy


def measure(row: Row, parameters: int, steps: int) -> dict[str, object]:
    """Median milliseconds of backward and step, and GiB above what was there before."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    before = _memory()
    backward, step, end = ways(row, parameters, device)
    times: list[tuple[float, float]] = []
    for number in range(WARM + steps):
        if number == WARM and device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
        times.append((_timed(backward), _timed(step)))
    counted = sorted(times[WARM:])
    held, peak = _memory() - before, (torch.cuda.max_memory_allocated() if device.type == "cuda" else 0) - before
    end()
    middle = len(counted) // 2
    return {
        "backward_ms": round(counted[middle][0] * 1e3, 2),
        "step_ms": round(sorted(step for _, step in counted)[middle] * 1e3, 2),
        "held_gib": round(held / 2**30, 2), "peak_gib": round(peak / 2**30, 2), "error": "",
    }  # fmt: skip


def _timed(work: Callable[[], Any]) -> float:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def _memory() -> int:
    import torch

    gc.collect()
    return torch.cuda.memory_allocated() if torch.cuda.is_available() else 0


def rows(names: Sequence[str], parameters: int, steps: int, until: float) -> Iterator[dict[str, object]]:
    """Measure each row; those that no time is left for say so."""
    import torch

    empty = dict.fromkeys(("backward_ms", "step_ms", "held_gib", "peak_gib"), "")
    for name in names:
        began = time.monotonic()
        if began > until:
            yield {"row": name, "parameters": parameters, **empty, "error": "no time was left"}
            continue
        try:
            told = measure(ROWS[name], parameters, steps)
        except Exception as error:  # noqa: BLE001 - the next row may work
            told = {**empty, "error": f"{type(error).__name__}: {error}".replace("\n", " ")[:300]}
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        print(f"   {name}: {time.monotonic() - began:.1f} s", file=sys.stderr, flush=True)
        yield {"row": name, "parameters": parameters, **told}


def main(argv: Sequence[str] | None = None) -> int:
    """Measure row by row; 1 when a row failed."""
    parser = argparse.ArgumentParser("optimizer_step.py", allow_abbrev=False, description="optimizer steps on one GPU")
    parser.add_argument("--parameters", type=lambda text: int(float(text)), default=10**9)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--minutes", type=float, default=2.7, help="no row begins later (default %(default)g)")
    parser.add_argument("--rows", default=",".join(ROWS), help="comma-separated (default: all)")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "optimizer_step.csv")
    args = parser.parse_args(argv)
    names = [name.strip() for name in args.rows.split(",")]
    if unknown := sorted(set(names) - ROWS.keys()):
        parser.error(f"--rows {', '.join(unknown)}: choose of {', '.join(ROWS)}")
    until = time.monotonic() + args.minutes * 60
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "finebridge").symlink_to(ROOT)
        sys.path.insert(0, folder)
        import torch
        from finebridge.train import runtime

        runtime.start({})
        device = runtime.device_name(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
        common = {"device": device, **circumstances(PACKAGES)}
        columns = ("row", "backward_ms", "step_ms", "held_gib", "peak_gib", "error")
        print("  ".join(f"{column:>12}" for column in columns), flush=True)
        failed = False
        for row in rows(names, args.parameters, args.steps, until):
            print("  ".join(f"{row[column]!s:>12}" for column in columns), flush=True)
            add_rows(args.csv, [{**common, **row}])
            failed |= bool(row["error"])
        runtime.finish()
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
