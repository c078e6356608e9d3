"""The cross entropy of a piece of logits and its gradient, which takes the logits' place: one pass to read, one to write.

On a GPU the few lines are compiled by torch. The first piece of a run is computed both ways, too; where torch cannot
compile them, or the results differ, one line says so and the lines run as they stand.
"""

from collections.abc import Callable
from typing import Any, cast

import torch

from . import runtime

_chosen: list[Callable[..., torch.Tensor]] = []  # what GPUs run, once the first piece has shown it
_SEEN = 64  # rows that are compared


def softmax_gradient(
    logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, smoothing: float = 0.0
) -> torch.Tensor:
    """Cross entropies, fp32, shape [rows]; ``logits`` [rows, words] become the gradient of their weighted sum.

    ``ids`` are int64 and ``weights`` fp32, both of shape [rows].
    """
    if logits.device.type != "cuda":
        return plainly(logits, ids, weights, smoothing)
    if not _chosen:
        _chosen.append(choose(compile_it(), logits.clone(), ids, weights, smoothing))
    return _chosen[0](logits, ids, weights, smoothing)


def plainly(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, smoothing: float) -> torch.Tensor:
    """What ``softmax_gradient`` does, line by line."""
    words = logits.shape[-1]
    logs = torch.log_softmax(logits.float(), -1)
    losses = -(1 - smoothing) * logs.gather(1, ids[:, None]).squeeze(1)
    if smoothing:
        losses = losses - smoothing * logs.mean(-1)
    hit = torch.arange(words, device=logits.device)[None] == ids[:, None]
    gradient = logs.exp() - torch.where(hit, 1 - smoothing + smoothing / words, smoothing / words)
    logits.copy_(gradient * weights[:, None])
    return losses


def compile_it() -> Callable[..., torch.Tensor]:
    """``plainly`` as torch compiles it: for any number of rows, one number of words."""
    made = cast("Callable[..., torch.Tensor]", torch.compile(plainly))

    def run(logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, smoothing: float) -> torch.Tensor:
        for tensor in (logits, ids, weights):
            cast("Any", torch)._dynamo.maybe_mark_dynamic(tensor, 0)  # noqa: SLF001 - its documented name
        return made(logits, ids, weights, smoothing)

    return run


def choose(
    run: Callable[..., torch.Tensor], logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor, smoothing: float
) -> Callable[..., torch.Tensor]:
    """``run`` if it does on these ``logits``, which are lost, what ``plainly`` does; else ``plainly``, told in one line."""
    seen = slice(0, _SEEN)
    plain = logits[seen].clone()
    expected = plainly(plain, ids[seen], weights[seen], smoothing)
    try:
        losses = run(logits, ids, weights, smoothing)
    except Exception as error:  # noqa: BLE001 - a compiler may raise anything, and nothing depends on it
        why = f"{type(error).__name__}: {error}".strip().splitlines()[0]
    else:
        off = max(_apart(losses[seen], expected), _apart(logits[seen], plain))
        if off <= (1e-4 if logits.dtype == torch.float32 else 1e-2):
            return run
        why = f"its results are {off:.1g} off"
    runtime.say(f"loss: its elementwise part is not compiled, which is slower: {why}")
    return plainly


def _apart(one: torch.Tensor, other: torch.Tensor) -> float:
    """The difference's norm as a share of the norm."""
    return float((one.float() - other.float()).norm() / other.float().norm().clamp_min(1e-30))
