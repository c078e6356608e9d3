"""Which parameters train."""

from torch import nn

from .hf_flags import ArgumentsError


def train_only(model: nn.Module, part: str) -> None:
    """Freeze every parameter whose name does not contain ``part``.

    Raises ArgumentsError when none does. Source of the rule: the ``self_attn`` filter of the Hunyuan scripts.
    """
    if not any(part in name for name, _ in model.named_parameters()):
        raise ArgumentsError(f"--train_attention_params_only: no parameter of this model has {part!r} in its name")
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(part in name)
