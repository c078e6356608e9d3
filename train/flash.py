"""FlashAttention over packed rows as an operator of torch, so that a compiled layer can hold it in one graph with all else.

A kernel is a pair of functions here: forward, which also gives each token's log-sum-exp, and backward. The samples' borders
are a tensor; how long the longest sample is, which kernels want as a number of Python, would be compiled into the graph, so
the operator looks it up: ``remember`` is told once a step.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from importlib import import_module
from itertools import pairwise
from typing import Any, NamedTuple

import torch


class LackError(ValueError):
    """A kernel does not have what is asked of it, or is not here."""


@dataclass(frozen=True)
class Borders:
    """Where the samples of a row begin: ``starts`` int32, [samples + 1], the last one the row's end; the longest sample."""

    starts: torch.Tensor
    longest: int
    kept: dict[Any, Any] = field(default_factory=dict[Any, Any])  # what a kernel makes of them, once for all layers

    def spans(self) -> list[tuple[int, int]]:
        """First token and end of each sample; the first call waits for the device."""
        if "spans" not in self.kept:
            self.kept["spans"] = [(a, b) for a, b in pairwise(self.starts.tolist()) if a < b]
        return self.kept["spans"]


class Rule(NamedTuple):
    """Which tokens of its sample a token attends to, and how: as in ``attention_kernels.Need``."""

    scale: float
    causal: bool
    window: int | None
    softcap: float | None

    @property
    def reach(self) -> tuple[int | None, int | None]:
        """Tokens behind and ahead of a token that it sees; None is all of them."""
        if self.window is None:
            return None, None
        return self.window - 1, 0 if self.causal else self.window - 1


# query, key, value, borders, rule, sinks -> output like query, log-sum-exp fp32 [heads, tokens]
Forward = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Borders, Rule, torch.Tensor | None], tuple[torch.Tensor, torch.Tensor]
]
# gradient of the output; query, key, value, output, log-sum-exp; borders, rule, sinks -> gradients of query, key, value, sinks
Backward = Callable[..., tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]]


class Pair(NamedTuple):
    """A kernel: both raise what they like when they cannot."""

    forward: Forward
    backward: Backward


_row: list[Borders] = []  # the row at hand, at most one


def remember(starts: torch.Tensor, longest: int) -> Borders:
    """The borders of the row at hand, made once for all layers and for what is computed again in backward."""
    found = _remembered(starts)
    if found is None:
        found = Borders(starts, int(longest))
        _row[:] = [found]
    return found


def _remembered(starts: torch.Tensor) -> Borders | None:
    """A graph hands on another tensor of the same memory, which lives as long as the row is remembered."""
    if not _row or _row[0].starts.data_ptr() != starts.data_ptr() or len(_row[0].starts) != len(starts):
        return None
    return _row[0] if _row[0].starts._version == starts._version else None  # noqa: SLF001 - no public name


def _borders(starts: torch.Tensor) -> Borders:
    found = _remembered(starts)
    return Borders(starts, int(starts.diff().max())) if found is None else found  # waits for the device


@torch.library.custom_op("finebridge::flash", mutates_args=())
def flash(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    starts: torch.Tensor,
    sinks: torch.Tensor | None,
    kernel: str,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend by a kernel of ``PAIRS``: the output, like ``query``, and the log-sum-exp; has gradients.

    query [tokens, heads, width], key and value [tokens, key heads, width], starts as in ``Borders``, sinks [heads].
    """
    rule = Rule(scale, causal, window, softcap)
    return PAIRS[kernel].forward(query, key, value, _borders(starts), rule, sinks)


@flash.register_fake
def _(query: torch.Tensor, *_: Any) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty_like(query), query.new_empty((query.shape[1], query.shape[0]), dtype=torch.float32)


@torch.library.custom_op("finebridge::flash_backward", mutates_args=())
def flash_backward(
    outer: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    starts: torch.Tensor,
    sinks: torch.Tensor | None,
    kernel: str,
    scale: float,
    causal: bool,
    window: int | None,
    softcap: float | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of query, key, value and sinks; of sinks that are not there it is empty."""
    rule = Rule(scale, causal, window, softcap)
    *made, of_sinks = PAIRS[kernel].backward(
        outer.contiguous(), query, key, value, out, sums, _borders(starts), rule, sinks
    )
    return made[0], made[1], made[2], query.new_empty(0) if of_sinks is None else of_sinks


@flash_backward.register_fake
def _(
    outer: torch.Tensor,  # noqa: ARG001 - the operator's arguments, in their places
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,  # noqa: ARG001
    sums: torch.Tensor,  # noqa: ARG001
    starts: torch.Tensor,  # noqa: ARG001
    sinks: torch.Tensor | None,
    *_: Any,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    of_sinks = query.new_empty(0) if sinks is None else torch.empty_like(sinks)
    return torch.empty_like(query), torch.empty_like(key), torch.empty_like(value), of_sinks


def _keep(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    query, key, value, starts, sinks, *ctx.how = inputs
    ctx.save_for_backward(query, key, value, *output, starts, sinks)


def _differentiate(ctx: Any, outer: torch.Tensor, _: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
    *saved, sinks = ctx.saved_tensors
    *made, of_sinks = flash_backward(outer, *saved, sinks, *ctx.how)
    return (*made, None, None if sinks is None else of_sinks, None, None, None, None, None)


flash.register_autograd(_differentiate, setup_context=_keep)


def _check_torch(query: torch.Tensor, rule: Rule, sinks: torch.Tensor | None) -> None:
    lacks("sinks", sinks is not None)
    lacks("softcap", rule.softcap is not None)
    lacks("CUDA", query.device.type != "cuda")


def _torch_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    rule: Rule,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_torch(query, rule, sinks)
    starts, longest, (left, right) = borders.starts, borders.longest, rule.reach
    made = torch.ops.aten._flash_attention_forward(  # noqa: SLF001 - torch's wrapper of it repeats keys for grouped heads
        query, key, value, starts, starts, longest, longest, 0.0, rule.causal, False,
        scale=rule.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return made[0], made[1]


def _torch_backward(
    outer: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    borders: Borders,
    rule: Rule,
    _: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
    starts, longest, (left, right) = borders.starts, borders.longest, rule.reach
    state = torch.zeros(2, dtype=torch.uint64, device=query.device)  # of random numbers, which there are none of
    made = torch.ops.aten._flash_attention_backward(  # noqa: SLF001
        outer, query, key, value, out, sums, starts, starts, longest, longest, 0.0, rule.causal, state, state[:0],
        scale=rule.scale, window_size_left=left, window_size_right=right,
    )  # fmt: skip
    return made[0], made[1], made[2], None


@cache
def _cute() -> tuple[Callable[..., Any], Callable[..., Any]]:
    """FlashAttention-4's functions below its autograd. Raises LackError."""
    try:
        module = import_module("flash_attn.cute.interface")
        forward, backward = module._flash_attn_fwd, module._flash_attn_bwd  # noqa: SLF001 - no public door
    except (ImportError, AttributeError) as error:  # another version's package may have the same name
        raise LackError("not installed" if isinstance(error, ModuleNotFoundError) else str(error)) from error
    for function, names in ((forward, ("return_lse", "learnable_sink")), (backward, ("learnable_sink",))):
        if missing := [name for name in names if name not in inspect.signature(function).parameters]:
            raise LackError(f"this version has no {missing[0]}")
    return forward, backward


def _cute_words(borders: Borders, rule: Rule, sinks: torch.Tensor | None) -> dict[str, Any]:
    left, right = rule.reach
    return {
        "softmax_scale": rule.scale, "causal": rule.causal, "window_size_left": left, "window_size_right": right,
        "cu_seqlens_q": borders.starts, "cu_seqlens_k": borders.starts, "max_seqlen_q": borders.longest,
        "max_seqlen_k": borders.longest, "softcap": rule.softcap or 0.0, "learnable_sink": sinks,
    }  # fmt: skip


def _cute_forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    rule: Rule,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    made = _cute()[0](query, key, value, return_lse=True, **_cute_words(borders, rule, sinks))
    return made[0], made[1]


def _cute_backward(
    outer: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    sums: torch.Tensor,
    borders: Borders,
    rule: Rule,
    sinks: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    made = _cute()[1](query, key, value, out, outer, sums, **_cute_words(borders, rule, sinks))
    return made[0], made[1], made[2], made[3] if sinks is not None else None


def lacks(what: str, asked: bool) -> None:
    """Raises LackError when a kernel is asked for what it has not."""
    if asked:
        raise LackError(f"has no {what}")


PAIRS = {
    "FlashAttention-4": Pair(_cute_forward, _cute_backward),
    "torch's own FlashAttention-2": Pair(_torch_forward, _torch_backward),
}
