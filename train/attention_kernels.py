"""The kernels that attention over packed rows can be made with, from the fastest to the one that can do everything.

==================== ============================================== ====================================================
kernel               from                                           lacks
==================== ============================================== ====================================================
FlashAttention-4     flash_attn.cute (``flash``)                    dropout
FlashAttention-3     flash_attn_interface                           dropout
torch's FA2          torch itself (``flash``)                       dropout, sinks, soft caps
FlashAttention-2     flash_attn                                     dropout, sinks
FlexAttention        torch itself, compiled                         dropout
SDPA by sample       torch itself                                   sinks, soft caps
plain, by sample     a few products; also what the others are held  nothing
                     against in ``attention_proof``
==================== ============================================== ====================================================

What a package really can do, and for which sizes and devices, is not listed here: the proof finds out. All take a row whose
samples lie one behind the other: query [tokens, heads, width], key and value [tokens, key heads, width]; they give
[tokens, heads, value width].
"""

import inspect
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

import torch
from torch.nn import functional

from .flash import Borders, LackError, flash, lacks, remember

_FLEX_BLOCK = 128  # tokens; rows are filled up to whole blocks


@dataclass(frozen=True, slots=True)
class Need:
    """What a layer asks of a kernel. ``window`` counts the token itself; it reaches ahead too without ``causal``."""

    device: torch.device
    dtype: torch.dtype
    heads: int
    key_heads: int
    width: int  # of queries and keys
    value_width: int
    scale: float
    causal: bool = True
    window: int | None = None
    softcap: float | None = None
    sinks: bool = False  # a learnt score in each head that no token takes
    dropout: bool = False


Call = Callable[
    [torch.Tensor, torch.Tensor, torch.Tensor, Borders, Need, torch.Tensor | None, float], torch.Tensor
]  # query, key, value, borders, need, sinks [heads], dropout


@dataclass(frozen=True)
class Kernel:
    """A kernel's name, whether it is of the flash kind, and how it is called (raises what it likes when it cannot)."""

    name: str
    flash: bool
    call: Call

    def __call__(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        borders: Borders,
        need: Need,
        sinks: torch.Tensor | None = None,
        dropout: float = 0.0,
    ) -> torch.Tensor:
        """Attend. Flash kernels want values as wide as keys: narrower ones are filled up."""
        if self.flash and need.value_width < need.width:
            value = functional.pad(value, (0, need.width - need.value_width))
        return self.call(query, key, value, borders, need, sinks, dropout)[..., : need.value_width]


def _package(module: str) -> Call:
    """``flash_attn_varlen_func`` of a package; all versions share its first words and differ in the others."""

    def call(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        borders: Borders,
        need: Need,
        sinks: torch.Tensor | None,
        dropout: float,  # noqa: ARG001 - see lacks
    ) -> torch.Tensor:
        lacks("dropout", need.dropout)
        function, takes = _function(module)
        given: dict[str, Any] = {"softmax_scale": need.scale, "causal": need.causal}
        if need.window:
            given["window_size"] = (need.window - 1, 0 if need.causal else need.window - 1)
        if need.softcap:
            given["softcap"] = need.softcap
        if sinks is not None:
            given["learnable_sink" if "learnable_sink" in takes else "s_aux"] = sinks
        for name in given:
            lacks(name, name not in takes)
        given |= {"cu_seqlens_q": borders.starts, "cu_seqlens_k": borders.starts}
        given |= {"max_seqlen_q": borders.longest, "max_seqlen_k": borders.longest}
        made = function(query, key, value, **{name: value for name, value in given.items() if name in takes})
        return made[0] if isinstance(made, tuple) else made

    return call


@cache
def _function(module: str) -> tuple[Callable[..., Any], frozenset[str]]:
    """A package's function and the names that it takes. Raises LackError."""
    try:
        function = import_module(module).flash_attn_varlen_func
    except (ImportError, AttributeError) as error:  # another version's package may have the same name
        raise LackError("not installed" if isinstance(error, ModuleNotFoundError) else str(error)) from error
    return function, frozenset(inspect.signature(function).parameters)


def by_operator(name: str) -> Call:
    """A kernel of ``flash.PAIRS``."""

    def call(
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        borders: Borders,
        need: Need,
        sinks: torch.Tensor | None,
        dropout: float,  # noqa: ARG001 - see lacks
    ) -> torch.Tensor:
        lacks("dropout", need.dropout)
        starts = remember(borders.starts, borders.longest).starts
        return flash(query, key, value, starts, sinks, name, need.scale, need.causal, need.window, need.softcap)[0]

    return call


def _flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    need: Need,
    sinks: torch.Tensor | None,
    dropout: float,  # noqa: ARG001 - see lacks
) -> torch.Tensor:
    from torch.nn.attention.flex_attention import AuxRequest

    lacks("dropout", need.dropout)
    lacks("a backward pass on a CPU", query.device.type == "cpu")
    tokens, cap = len(query), need.softcap
    filled = (_pad_tokens(value, -tokens % _FLEX_BLOCK) for value in (query, key, value))

    def capped(score: torch.Tensor, *_: Any) -> torch.Tensor:
        return cap * torch.tanh(score / cap) if cap else score

    out, told = _compiled_flex()(
        *filled, score_mod=capped if cap else None, block_mask=_block_mask(borders, tokens, need), scale=need.scale,
        enable_gqa=need.heads != need.key_heads, return_aux=AuxRequest(lse=True),
    )  # fmt: skip
    if sinks is not None:  # of the weight that all tokens and the sink share, the tokens' part
        out = out * torch.sigmoid(told.lse - sinks.float()[None, :, None])[..., None].to(out.dtype)
    return out[0].transpose(0, 1)[:tokens]


def _pad_tokens(values: torch.Tensor, more: int) -> torch.Tensor:
    """[tokens, heads, width] with zeros for more tokens, as [1, heads, tokens, width]."""
    return functional.pad(values, (0, 0, 0, 0, 0, more)).transpose(0, 1)[None]


@cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)


def _block_mask(borders: Borders, tokens: int, need: Need) -> Any:
    """FlexAttention's mask of a row that is filled up to whole blocks: what is filled up is a sample of its own."""
    from torch.nn.attention.flex_attention import create_block_mask

    which = (need.causal, need.window)
    if which not in borders.kept:
        size = tokens + -tokens % _FLEX_BLOCK
        places = torch.arange(size, device=borders.starts.device, dtype=borders.starts.dtype)
        sample = torch.searchsorted(borders.starts, places, right=True)

        def seen(_: Any, __: Any, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
            mask = sample[query] == sample[key]
            if need.causal:
                mask = mask & (query >= key)
            return mask & ((query - key).abs() < need.window) if need.window else mask

        borders.kept[which] = create_block_mask(seen, None, None, size, size, device=sample.device)
    return borders.kept[which]


def _sdpa(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    need: Need,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    lacks("sinks", sinks is not None)
    lacks("softcap", need.softcap is not None)
    parts: list[torch.Tensor] = []
    for one_query, one_key, one_value in _samples(query, key, value, borders, need):
        made = functional.scaled_dot_product_attention(
            one_query, one_key, one_value, dropout_p=dropout, scale=need.scale,
            is_causal=need.causal and not need.window,
            attn_mask=_seen(one_query, need) if need.window else None,
        )  # fmt: skip
        parts.append(made[0].transpose(0, 1))
    return torch.cat(parts)


def plain(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    borders: Borders,
    need: Need,
    sinks: torch.Tensor | None,
    dropout: float,
) -> torch.Tensor:
    """Attention as it is written down, one sample at a time; the softmax in fp32."""
    parts: list[torch.Tensor] = []
    for one_query, one_key, one_value in _samples(query, key, value, borders, need):
        scores = (one_query @ one_key.mT).float() * need.scale
        if need.softcap:
            scores = need.softcap * torch.tanh(scores / need.softcap)
        scores = scores.masked_fill(~_seen(one_query, need), -math.inf)
        if sinks is not None:
            column = sinks.float()[None, :, None, None].expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., : one_key.shape[-2]].to(value.dtype)
        parts.append((functional.dropout(weights, dropout) @ one_value)[0].transpose(0, 1))
    return torch.cat(parts)


def _samples(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, borders: Borders, need: Need
) -> Iterator[list[torch.Tensor]]:
    """Each sample's query, key and value, [1, heads, tokens, width], key heads repeated."""
    groups = need.heads // need.key_heads
    for start, end in borders.spans():
        sample = [query[start:end]]
        sample += [part[start:end].repeat_interleave(groups, dim=1) for part in (key, value)]
        yield [part.transpose(0, 1)[None] for part in sample]


def _seen(query: torch.Tensor, need: Need) -> torch.Tensor:
    """Which tokens of a sample a token attends to; bool, [tokens, tokens]."""
    places = torch.arange(query.shape[-2], device=query.device)
    back = places[:, None] - places[None]
    seen = back >= 0 if need.causal else torch.ones_like(back, dtype=torch.bool)
    return seen & (back.abs() < need.window) if need.window else seen


PLAIN = Kernel("plain products, sample by sample", flash=False, call=plain)
KERNELS: tuple[Kernel, ...] = (
    Kernel("FlashAttention-4", flash=True, call=by_operator("FlashAttention-4")),
    Kernel("FlashAttention-3", flash=True, call=_package("flash_attn_interface")),
    Kernel("torch's own FlashAttention-2", flash=True, call=by_operator("torch's own FlashAttention-2")),
    Kernel("FlashAttention-2", flash=True, call=_package("flash_attn")),
    Kernel("FlexAttention", flash=False, call=_flex),
    Kernel("SDPA, sample by sample", flash=False, call=_sdpa),
    PLAIN,
)
