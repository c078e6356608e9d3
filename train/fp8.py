"""``--fp8``: the decoder's linear layers multiply in fp8 (torchao), with scales taken of each tensor as it comes.

Weights, gradients, optimizer and checkpoints stay as they are without it: torchao's layer holds the same bf16 parameter and
casts it where it is used. fp8 has 3 bits of mantissa (2 in gradients), so the loss is not that of bf16 to the last digit: see
``tests/train/test_fp8.py`` for how near it is, and compare a short run of your own before a long one.
"""

from collections.abc import Callable
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

from .hf_flags import ArgumentsError

if TYPE_CHECKING:
    from torch import nn

_ALIGNED = 16  # what the kernels ask of every dimension
_CAPABILITY = (8, 9)  # of the first GPUs with fp8 matrix units


def check_fp8(*, bf16_weights: bool, stage: int, use_lora: bool) -> None:
    """Refuse what cannot be trained in fp8, before torch is imported. Raises ArgumentsError."""
    if use_lora:
        raise ArgumentsError(
            "--fp8 is for full training: an adapter's own products are too thin for it, and leave little to gain"
        )
    if stage == 3:  # noqa: PLR2004
        raise ArgumentsError(
            "--fp8 keeps each layer's weight from its forward to its backward pass, so that under ZeRO-3 every rank would hold "
            "the whole model; take ZeRO-2, for example --deepspeed ds_zero2_no_offload"
        )
    if not bf16_weights:
        raise ArgumentsError(
            "--fp8 needs weights in bf16: --bf16 true with --deepspeed, or with --master_weights bf16_stochastic"
        )
    if find_spec("torchao") is None:
        raise ArgumentsError("--fp8 needs torchao: pip install finebridge[fp8]")


def check_device() -> None:
    """Raises ArgumentsError where no GPU multiplies in fp8."""
    import torch

    if not torch.cuda.is_available():
        raise ArgumentsError("--fp8: there is no GPU here; leave the flag out")
    found = torch.cuda.get_device_capability()
    if found < _CAPABILITY:
        name = torch.cuda.get_device_name()
        raise ArgumentsError(
            f"--fp8: {name} has compute capability {found[0]}.{found[1]} and no fp8 units, which begin with 8.9 (Ada, Hopper)"
        )


def use_fp8(model: Any, say: Callable[[str], None], *, emulate: bool = False) -> list[str]:
    """Swap the decoder's linear layers for torchao's, in place; the names of what was swapped, told in one line.

    MoE blocks stay (an expert may get no token), as do layers with a dimension that is no multiple of 16, weights that are
    not bf16, and all that is not in the decoder: the head first of all. ``emulate`` computes the same numbers without fp8
    units, slowly. Raises ArgumentsError when nothing is left.
    """
    from torch import bfloat16, nn
    from torchao.float8 import (  # pyright: ignore[reportMissingImports] - an extra
        Float8LinearConfig,
        convert_to_float8_training,
    )

    from .moe import moe_blocks

    decoder: nn.Module = model.get_decoder()
    blocks = tuple(f"{name}." for name in moe_blocks(decoder))
    wanted = [
        name
        for name, layer in _linears(decoder).items()
        if not name.startswith(blocks) and layer.weight.dtype == bfloat16 and not any(_odd(layer))
    ]
    if not wanted:
        raise ArgumentsError("--fp8: no linear layer of this model can be swapped; leave the flag out")
    # Rows of a batch are an inner dimension in backward: torchao fills them up where they are no multiple of 16.
    config = Float8LinearConfig(emulate=emulate, pad_inner_dim=True)
    chosen = set(wanted)

    def is_chosen(_: nn.Module, name: str) -> bool:
        return name in chosen

    convert_to_float8_training(decoder, module_filter_fn=is_chosen, config=config)
    stay = len(_linears(decoder)) - len(wanted)
    say(
        f"fp8: {len(wanted)} linear layers of the decoder multiply in fp8"
        + (f", {stay} stay in bf16 (experts, routers, odd sizes)" if stay else "")
    )
    return wanted


def _linears(model: "nn.Module") -> dict[str, Any]:
    from torch import nn

    return {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}


def _odd(layer: Any) -> tuple[int, int]:
    return layer.in_features % _ALIGNED, layer.out_features % _ALIGNED
