"""Run on each rank: a small model trained by DeepSpeed's own ZeRO and by ours; the numbers of the two are compared."""

from collections.abc import Sequence
from typing import Any

import deepspeed
import torch
from finebridge.train import lean_zero, runtime
from finebridge.train.optimizers import BF16AdamW

BYTES = {"stochastic": 6, "kahan": 8}  # a parameter, without its gradient


def choose(*, lean: bool) -> None:
    (lean_zero.install if lean else lean_zero.uninstall)()


def settings_of(stage: int, accumulation: int, *, bf16: bool, pure: bool = False, **more: Any) -> dict[str, Any]:
    zero = {
        "stage": stage, "reduce_bucket_size": 900, "allgather_bucket_size": 900, "overlap_comm": True,
        "contiguous_gradients": True, "reduce_scatter": True, "stage3_param_persistence_threshold": 0,
    }  # fmt: skip
    half = {"enabled": bf16, "bf16_master_weights_and_grads": pure, "bf16_optimizer_states": pure}
    return {
        "train_micro_batch_size_per_gpu": 2, "gradient_accumulation_steps": accumulation, "gradient_clipping": 0.05,
        "zero_optimization": zero, "bf16": half, "zero_allow_untested_optimizer": True, "steps_per_print": 10**9, **more,
    }  # fmt: skip


def make(settings: dict[str, Any], kind: str) -> Any:
    """An engine with two groups of parameters, the first matrix larger than a bucket."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(16, 64), torch.nn.Tanh(), torch.nn.Linear(64, 9), torch.nn.Linear(9, 4))
    groups = [
        {"params": [p for p in model.parameters() if p.ndim > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.ndim < 2], "weight_decay": 0.0},
    ]
    if kind == "adamw":
        optimizer: Any = torch.optim.AdamW(groups, lr=1e-3, fused=True)
    else:
        optimizer = BF16AdamW(groups, lr=1e-3, kahan=kind == "kahan", seed=(1, runtime.place()[0]))
    return deepspeed.initialize(model=model, optimizer=optimizer, config=settings)[0]


def train(engine: Any, steps: int, accumulation: int) -> list[float]:
    """Gradient norms of so many steps on random data of this rank."""
    dtype = next(engine.module.parameters()).dtype
    draw = torch.Generator().manual_seed(7 + runtime.place()[0])
    norms: list[float] = []
    for _ in range(steps):
        for _ in range(accumulation):
            inputs = torch.randn(2, 16, generator=draw).to(dtype)
            engine.backward(engine(inputs).float().square().mean())
            engine.step()
        norms.append(float(engine.get_global_grad_norm()))
    return norms


def weights(engine: Any) -> torch.Tensor:
    with deepspeed.zero.GatheredParameters(list(engine.module.parameters())):
        return torch.cat([p.detach().float().reshape(-1) for p in engine.module.parameters()])


def masters(engine: Any) -> list[torch.Tensor]:
    zero = engine.optimizer
    return [*getattr(zero, "single_partition_of_fp32_groups", getattr(zero, "fp32_partitioned_groups_flat", ()))]


def bytes_held(engine: Any) -> int:
    """Bytes of all storages that weights, masters and optimizer states lie in, each counted once."""
    zero = engine.optimizer
    parts = getattr(zero, "bit16_groups_flat", None) or zero.fp16_partitioned_groups_flat
    states = [
        v for state in zero.optimizer.state.values() for v in state.values() if torch.is_tensor(v) and v.numel() > 1
    ]
    held = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in [*parts, *masters(engine), *states]}
    return sum(held.values())


def alike(argv: Sequence[str]) -> int:
    """``argv``: the stages to compare."""
    runtime.start({})
    for stage in map(int, argv):
        for bf16, accumulation in ((False, 1), (True, 1), (True, 2)):
            compare(stage, accumulation, bf16=bf16)
    runtime.finish()
    return 0


def pure(argv: Sequence[str]) -> int:
    """``argv``: a folder. Pure bf16 under each stage: the bytes held, and a checkpoint that goes on bit for bit."""
    runtime.start({})
    for stage in (1, 2, 3):
        for kind in BYTES:
            go_on(stage, kind, argv[0])
    runtime.finish()
    return 0


def quick(argv: Sequence[str]) -> int:
    """``argv``: the folder and stage of one comparison and one checkpoint."""
    runtime.start({})
    stage, folder = int(argv[0]), argv[1]
    compare(stage, 2, bf16=True)
    go_on(stage, "kahan", folder)
    spoil(stage)
    runtime.finish()
    return 0


def compare(stage: int, accumulation: int, *, bf16: bool) -> None:
    """Train by DeepSpeed's own ZeRO and by ours."""
    told: list[tuple[list[float], torch.Tensor]] = []
    for lean in (False, True):
        choose(lean=lean)
        engine = make(settings_of(stage, accumulation, bf16=bf16), "adamw")
        assert type(engine.optimizer).__name__.startswith("Lean") == lean
        norms = train(engine, 3, accumulation)
        told.append((norms, weights(engine) if stage == 3 else torch.cat(masters(engine)).detach().clone()))
        engine.destroy()
    (norms, stock), (ours, lean_weights) = told
    assert torch.allclose(torch.tensor(norms), torch.tensor(ours), rtol=1e-5), (stage, bf16, norms, ours)
    near = 2e-7 if stage < 3 or not bf16 else 1e-3  # of weights of 0.25, rounded to bf16
    assert (stock - lean_weights).abs().max() < near, (stage, bf16, accumulation)
    print(f"alike: {stage} {bf16} {accumulation} {norms}")


def spoil(stage: int) -> None:
    """A gradient that is no number on one rank changes no weight on any, and the norm tells of it."""
    choose(lean=True)
    engine = make(settings_of(stage, 1, bf16=True), "adamw")
    train(engine, 1, 1)
    before = weights(engine)
    inputs = torch.ones(2, 16, dtype=torch.bfloat16)
    loss = engine(inputs).float().square().mean()
    engine.backward(loss * float("nan") if runtime.is_main() else loss)
    engine.step()
    assert float(engine.get_global_grad_norm()) == float("inf")
    assert weights(engine).equal(before)
    assert all(norm < 10 for norm in train(engine, 1, 1))
    print(f"spoilt: {stage}")


def go_on(stage: int, kind: str, folder: str) -> None:
    """Count the bytes that pure bf16 holds; a loaded checkpoint goes on as the run that wrote it."""
    choose(lean=True)
    world = runtime.place()[1]
    settings = settings_of(stage, 1, bf16=True, pure=True)
    straight = make(settings, kind)
    train(straight, 2, 1)
    straight.save_checkpoint(folder, tag=f"{stage}{kind}")
    part = -(-sum(getattr(p, "ds_numel", p.numel()) for p in straight.module.parameters()) // world)
    others = 0 if stage == 3 else 2 * (world - 1) * part  # weights of other ranks
    over = bytes_held(straight) - BYTES[kind] * part - others
    assert 0 <= over < 100 * world, (stage, kind, over)  # what fills up the last part
    norms = train(straight, 2, 1)
    resumed = make(settings, kind)
    resumed.load_checkpoint(folder, tag=f"{stage}{kind}")
    assert train(resumed, 2, 1) == norms
    assert weights(resumed).equal(weights(straight)), (stage, kind)
    print(f"pure: {stage} {kind} {over} bytes over")
