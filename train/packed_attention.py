"""Attention of packed rows: for each kind of layer the fastest kernel that is here and has proven itself on this device.

It takes the place of transformers' own implementations on CUDA devices, for models that follow the contract of its
FlashAttention (windows, soft caps and sinks are told by keyword, no mask is needed). The samples' borders come with the
batch, once a step. Each need (head sizes, window, dtype, ...) is met when it is first seen, which is in the passes of
``attention.IsolationProof``, before the first step; what a kernel lacks goes to the next one.
"""

from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import AttentionInterface

from .attention_kernels import KERNELS, PLAIN, Kernel, Need
from .attention_proof import refusal, seconds
from .flash import PAIRS, Borders, flash, remember

NAME = "packed"
_FASTER = 0.95  # of an earlier kernel's time, for a later one to be taken


class AttentionError(ValueError):
    """The model cannot train on packed samples; the message says why and what to do."""


class PackedAttention:
    """An attention function of transformers; remembers which kernel serves which need."""

    def __init__(
        self, say: Callable[[str], None], kernels: Sequence[Kernel] = KERNELS, *, only_flash: bool = False
    ) -> None:
        self.say, self.kernels, self.only_flash = say, kernels, only_flash
        self.chosen: dict[Need, Kernel] = {}
        self.compiled = ""  # which kernel compiled layers hold, by its name in ``PAIRS``

    def __call__(
        self,
        module: nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        dropout: float = 0.0,
        scaling: float | None = None,
        sliding_window: int | None = None,
        softcap: float | None = None,
        is_causal: bool | None = None,
        s_aux: torch.Tensor | None = None,
        position_bias: torch.Tensor | None = None,
        cu_seq_lens_q: torch.Tensor | None = None,
        max_length_q: int | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """Attend; all of [rows, heads, tokens, width], the result [rows, tokens, heads, width].

        Without ``cu_seq_lens_q`` each row is one sample: filling on the right, behind all real tokens, changes none of
        them. Raises AttentionError for what the contract does not have.
        """
        if attention_mask is not None or position_bias is not None or query.shape[2] != key.shape[2]:
            what = "a cache" if query.shape[2] != key.shape[2] else "a mask or a bias of the model's own"
            raise AttentionError(f"{type(module).__name__} attends with {what}, which packed rows have no place for")
        rows, heads, tokens, width = query.shape
        scale = width**-0.5 if scaling is None else float(scaling)
        causal = bool(getattr(module, "is_causal", True) if is_causal is None else is_causal)
        device = query.device
        dtype = torch.get_autocast_dtype(device.type) if torch.is_autocast_enabled(device.type) else value.dtype
        if torch.compiler.is_compiling() and cu_seq_lens_q is not None:
            query, key, value = (part.transpose(1, 2).flatten(0, 1).to(dtype) for part in (query, key, value))
            filled = functional.pad(value, (0, width - value.shape[-1]))
            out = flash(
                query, key, filled, cu_seq_lens_q, s_aux, self.compiled, scale, causal,
                sliding_window or None, softcap or None,
            )[0]  # fmt: skip
            return out[..., : value.shape[-1]].unflatten(0, (rows, tokens)), None
        need = Need(
            device=device, dtype=dtype, heads=heads, key_heads=key.shape[1], width=width, value_width=value.shape[3],
            scale=scale, causal=causal,
            window=sliding_window or None, softcap=softcap or None, sinks=s_aux is not None, dropout=dropout > 0,
        )  # fmt: skip
        kernel = self.chosen.get(need) or self._choose(need)
        query, key, value = (part.transpose(1, 2).flatten(0, 1).to(dtype) for part in (query, key, value))
        sinks = None if s_aux is None else s_aux.to(dtype)
        if cu_seq_lens_q is None or max_length_q is None:
            borders = _of_rows(rows, tokens, device)
        else:
            borders = remember(cu_seq_lens_q, max_length_q)
        out = kernel(query, key, value, borders, need, sinks, dropout)
        return out.unflatten(0, (rows, tokens)), None

    def for_compiled(self) -> str | None:
        """Settle on the kernel that compiled layers hold; why there is none."""
        names = {kernel.name for kernel in self.chosen.values()}
        self.compiled = name = next(iter(names), "")
        return None if len(names) == 1 and name in PAIRS else f"{' and '.join(sorted(names))} is no operator of torch"

    def _choose(self, need: Need) -> Kernel:
        """The fastest proven kernel. Raises AttentionError when only a flash kind will do and there is none."""
        proven: list[Kernel] = []
        refused: list[str] = []
        for kernel in self.kernels:
            if proven and not kernel.flash:
                break
            why = None if kernel is PLAIN else refusal(kernel, need)
            if why is None:
                proven.append(kernel)
            else:
                refused.append(f"{kernel.name}: {why}")
        lacking = "; ".join(refused)
        if self.only_flash and not proven[0].flash:
            raise AttentionError(f"--use_flash_attn: no flash kernel does what {_words(need)} need ({lacking})")
        best = proven[0]
        if len(proven) > 1:
            taken = {kernel.name: seconds(kernel, need) for kernel in proven}
            for kernel in proven[1:]:
                if taken[kernel.name] < _FASTER * taken[best.name]:
                    best = kernel
        if best not in self.chosen.values():
            self.say(f"attention: {best.name}, proven here for {_words(need)}" + (f" ({lacking})" if lacking else ""))
        self.chosen[need] = best
        return best


@lru_cache(maxsize=16)
def _of_rows(rows: int, tokens: int, device: torch.device) -> Borders:
    return Borders(torch.arange(0, (rows + 1) * tokens, tokens, dtype=torch.int32, device=device), tokens)


def _words(need: Need) -> str:
    """A need as a reader would put it."""
    told = [f"{need.heads} heads of {need.width}", f"{need.key_heads} for keys", str(need.dtype).removeprefix("torch.")]
    told += [f"window {need.window}"] if need.window else []
    told += [f"soft cap {need.softcap:g}"] if need.softcap else []
    told += ["sinks"] if need.sinks else []
    told += ["dropout"] if need.dropout else []
    return ", ".join(told if need.causal else [*told, "not causal"])


def take_packed(
    model: Any, device: torch.device, say: Callable[[str], None], *, packed: bool, only_flash: bool
) -> None:
    """Give the model this attention where it can have it. Raises AttentionError when a flash kind was asked for in vain.

    ``packed`` says that its rows hold several samples; other rows keep what transformers chose, unless a flash kind was
    asked for.
    """
    kinds = getattr(model.config.get_text_config(), "layer_types", None) or ()
    why = None
    if device.type != "cuda":
        why = "flash kernels need a CUDA GPU, and this run has none"
    elif "chunked_attention" in kinds or not (
        model._supports_flash_attn and model._can_set_attn_implementation()  # noqa: SLF001 - no public names
    ):
        why = f"{type(model).__name__} does not follow the contract of FlashAttention in transformers"
    if why is None and (packed or only_flash):
        give(model, PackedAttention(say, only_flash=only_flash))
    elif why and only_flash:
        raise AttentionError(f"--use_flash_attn: {why}; leave the flag out to use PyTorch's own attention")


def give(model: Any, attention: PackedAttention) -> None:
    """Make it the model's attention; what the model had before is kept in ``attention_before``."""
    AttentionInterface.register(NAME, attention)
    model.attention_before = model.config._attn_implementation  # noqa: SLF001
    model.set_attn_implementation(NAME)
