"""Which parameters train."""

from torch import nn

from .hf_flags import ArgumentsError


def train_only(model: nn.Module, part: str) -> int:
    """Freeze every parameter whose name does not contain ``part``; how many scalars still train.

    Raises ArgumentsError when none does. Source of the rule: the ``self_attn`` filter of the Hunyuan scripts.
    """
    count = 0
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
        if part in name:
            count += int(getattr(parameter, "ds_numel", parameter.numel()))
    if count == 0:
        raise ArgumentsError(f"--train_attention_params_only: no parameter of this model has {part!r} in its name")
    return count
