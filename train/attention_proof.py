"""A kernel is used when it has shown, on the device and for the sizes of the run, what plain products in fp32 give.

The trial is a row of samples of odd lengths, one of them of a single token, in which every other sample has values fifty
times as large: what leaks over a border is far over the rounding. Compared are the outputs and every gradient, token by
token.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch

from .attention_kernels import Kernel, Need, plain
from .flash import Borders, LackError

_LENGTHS = (67, 1, 129, 200, 31, 150)  # odd, and over a kernel's blocks of 64 and 128
_WINDOW = 96  # of the trial, for any that is wider
_LOUD = 50.0  # every other sample's values, times this
_OF_TOKEN, _OF_SAMPLE = 0.05, 0.03  # what bf16 may move: of a token's norm, and of the mean norm in its sample
_OF_TOKEN_FP32, _OF_SAMPLE_FP32 = 2e-3, 2e-3  # TF32 products
_BUSY = 8192  # rows and columns of a product that keeps a GPU busy
_TIMED = (1400, 900, 2500, 700, 4000, 300, 1100, 1900, 600, 2900)  # tokens of the samples that kernels are timed on


def refusal(kernel: Kernel, need: Need) -> str | None:
    """Why a kernel cannot be used for this need; None when it is proven. No random number of the run is drawn."""
    trial = replace(need, key_heads=min(need.key_heads, 2), window=min(need.window, _WINDOW) if need.window else None)
    trial = replace(trial, heads=trial.key_heads * (need.heads // need.key_heads), dropout=False)
    row, borders = _row(trial, _LENGTHS)
    # What the checkpointing of activations saves around this call is none of the trial's.
    keep = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
    with torch.enable_grad(), keep, torch.autocast(need.device.type, enabled=False):
        try:
            made = _outcome(kernel, row, borders, replace(trial, dropout=need.dropout))
        except LackError as error:
            return str(error)
        except Exception as error:  # noqa: BLE001 - kernels of other packages may raise anything
            return f"{type(error).__name__}: {error}".strip().splitlines()[0][:120]
        exact = [part.float() for part in row]
        expected = _outcome(
            Kernel("", flash=False, call=plain), exact, borders, replace(trial, dtype=torch.float32, dropout=False)
        )
    names = ("output", "gradient of queries", "of keys", "of values", "of sinks")
    for name, one, other in zip(names, made, expected, strict=False):
        if not bool(torch.isfinite(one).all()):
            return f"its {name} is not finite"
        if (off := _off(one, other, need.dtype)) > 1:
            return f"its {name} is wrong here ({off:.0f} times what rounding may move)"
    return None


def seconds(kernel: Kernel, need: Need) -> float:
    """Seconds of a forward and backward pass over rows whose samples' lengths change from call to call; inf when it fails.

    On a GPU they are its own: in training it has enough to do while the CPU makes a call ready.
    """
    taken: list[float] = []
    for turn in range(5):
        lengths = [length + 7 * turn for length in _TIMED[turn % 2 :]]
        row, borders = _row(need, lengths)
        keep = torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor, lambda tensor: tensor)
        with torch.enable_grad(), keep, torch.autocast(need.device.type, enabled=False):
            try:
                taken.append(_duration(lambda: _outcome(kernel, row, borders, need), need.device) / sum(lengths))  # noqa: B023
            except Exception:  # noqa: BLE001 - it did well on the small trial, and cannot do this one
                return float("inf")
    return sum(taken[2:]) / 3 * sum(_TIMED)  # the first two compile


def _duration(call: Callable[[], object], device: torch.device) -> float:
    """Seconds that a device works on a call, which may fail."""
    if device.type != "cuda":
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    busy = torch.ones(_BUSY, _BUSY, dtype=torch.bfloat16, device=device)
    first, last = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    for _ in range(20):  # some 30 ms, in which the CPU gets ahead
        busy @ busy  # pyright: ignore[reportUnusedExpression]
    first.record()
    call()
    last.record()
    last.synchronize()
    return first.elapsed_time(last) / 1e3


def _row(need: Need, lengths: Sequence[int]) -> tuple[list[torch.Tensor], Borders]:
    """Query, key, value, the output's gradient, and sinks if asked for, of a row of samples of these lengths."""
    draw = torch.Generator(need.device).manual_seed(0)
    tokens = sum(lengths)
    sizes = [
        (tokens, need.heads, need.width), (tokens, need.key_heads, need.width), (tokens, need.key_heads, need.value_width),
        (tokens, need.heads, need.value_width),
    ]  # fmt: skip
    row = [torch.randn(size, generator=draw, device=need.device) for size in sizes]
    loud = torch.tensor([_LOUD if n % 2 else 1.0 for n in range(len(lengths))])
    row[2] *= torch.repeat_interleave(loud, torch.tensor(lengths)).to(need.device)[:, None, None]
    if need.sinks:
        row.append(torch.randn(need.heads, generator=draw, device=need.device))
    starts = torch.tensor([0, *lengths]).cumsum(0).to(need.device, torch.int32)
    return [part.to(need.dtype) for part in row], Borders(starts, max(lengths))


def _outcome(kernel: Kernel, row: Sequence[torch.Tensor], borders: Borders, need: Need) -> list[torch.Tensor]:
    """Output and gradients of query, key, value and sinks."""
    query, key, value, outer, *sinks = (part.detach() for part in row)
    sources = [part.requires_grad_() for part in (query, key, value, *sinks)]
    out = kernel(query, key, value, borders, need, sinks[0] if sinks else None)
    return [out.detach(), *torch.autograd.grad(out, sources, outer)]


def _off(one: torch.Tensor, other: torch.Tensor, dtype: torch.dtype) -> float:
    """The largest error of a token, as a share of what rounding may move."""
    if one.shape != other.shape:
        return float("inf")
    of_token, of_sample = (_OF_TOKEN_FP32, _OF_SAMPLE_FP32) if dtype == torch.float32 else (_OF_TOKEN, _OF_SAMPLE)
    if one.dim() == 1:  # sinks
        return float((one.float() - other).norm() / other.norm() / of_token)
    sizes = [part.flatten(1).norm(dim=1) for part in other.split(_LENGTHS)]
    errors = [part.flatten(1).norm(dim=1) for part in (one.float() - other).split(_LENGTHS)]
    most = max(float(size.mean()) for size in sizes)
    worst = 0.0
    for size, error in zip(sizes, errors, strict=True):
        mean = size.mean() if len(size) > 1 else most  # of a single token some gradients are nothing but rounding
        worst = max(worst, float((error / (of_token * size + of_sample * mean)).max()))
    return worst
