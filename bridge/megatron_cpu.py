"""What stands in for CUDA and Transformer Engine where Megatron-Core takes them for granted; for megatron-core 0.16.

Each of it is needed to build or to run a GPTModel of local layer specs on the CPU. Nothing here changes what is computed.
"""

# pyright: reportMissingImports=false
from collections.abc import Generator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

_ABSENT = object()


@contextmanager
def without_gpu() -> Generator[None]:
    """Within this block Megatron-Core builds and runs models on the CPU; afterwards all is as before."""
    before = [(owner, name, getattr(owner, name, _ABSENT)) for owner, name, _ in _stand_ins()]
    for owner, name, value in _stand_ins():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in before:
            if value is _ABSENT:
                delattr(owner, name)
            else:
                setattr(owner, name, value)


def _stand_ins() -> list[tuple[Any, str, Any]]:
    import megatron.core.transformer.moe.moe_utils
    import megatron.core.transformer.multi_latent_attention as latent
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    return [
        # Rotary positions, routers and attention make their buffers on "the current device".
        (torch.cuda, "current_device", _cpu),
        # Attention forks CUDA's random numbers around its dropout, which does nothing in a model that is evaluated.
        (CudaRNGStatesTracker, "fork", _no_random_state),
        # A name that is bound by the import of Transformer Engine alone and asked for by the router.
        (megatron.core.transformer.moe.moe_utils, "te_general_gemm", None),
        # isinstance() is asked with them, and they are None without Transformer Engine.
        (latent, "TELinear", type("TELinear", (), {})),
        (latent, "TEColumnParallelLinear", type("TEColumnParallelLinear", (), {})),
        # Masks are made on CUDA; true is what a token does not see.
        (fused_softmax, "get_default_causal_mask", _mask),
        (fused_softmax, "get_sliding_window_causal_mask", _window_mask),
    ]


def _cpu() -> torch.device:
    return torch.device("cpu")


def _no_random_state(*_: Any) -> AbstractContextManager[None]:
    return nullcontext()


def _mask(size: int) -> Tensor:
    return torch.ones(size, size, dtype=torch.bool).triu(1)


def _window_mask(rows: int, columns: int, window: tuple[int, int]) -> Tensor:
    past = columns - rows
    return ~torch.ones(rows, columns, dtype=torch.bool).triu(past - window[0]).tril(past + window[1])


class LatentCore(nn.Module):
    """Core attention for latent attention, whose keys and values differ in size: Megatron's local one refuses that."""

    def __init__(self, config: Any, softmax_scale: float, **_: Any) -> None:
        super().__init__()
        self.config, self.scale = config, softmax_scale

    def forward(self, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> Tensor:
        """States [sequence, batch, heads, size] to [sequence, batch, heads * size]; a token sees those before it."""
        query, key, value = (state.permute(1, 2, 0, 3) for state in (query, key, value))
        seen = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
        return seen.permute(2, 0, 1, 3).flatten(2)
