"""``--master_weights``: what runs without fp32 masters need, and DeepSpeed's settings for them. Nothing here imports torch."""

from collections.abc import Mapping
from typing import Any, Literal

from ..ds_configs.resolve import offloads_optimizer, zero_stage
from .hf_flags import ArgumentsError, hf_value

MasterWeights = Literal["fp32", "bf16_stochastic", "bf16_kahan"]
_ADAMW = ("adamw_torch", "adamw_torch_fused")


def check_masters(
    kind: MasterWeights, hf: Mapping[str, Any], settings: dict[str, Any] | None, *, use_lora: bool
) -> str | None:
    """Refuse what a run without fp32 masters cannot have; ``settings`` are DeepSpeed's, resolved. A warning, or None.

    Raises ArgumentsError.
    """
    zero = settings or {}
    if kind == "fp32":
        if zero.get("bf16", {}).get("bf16_master_weights_and_grads"):
            return (
                "--deepspeed keeps bf16 masters, rounded to nearest: updates below 1/256 of a weight are lost. "
                "--master_weights bf16_stochastic or bf16_kahan needs as little memory and loses none"
            )
        return None
    flag = f"--master_weights {kind}"
    optim = str(hf_value(hf, "optim"))
    if not hf.get("bf16"):
        raise ArgumentsError(f"{flag} needs --bf16 true")
    if use_lora:
        raise ArgumentsError(f"{flag} is for full training: the masters of a LoRA adapter are small; leave it out")
    if optim not in _ADAMW:
        raise ArgumentsError(f"{flag}: it is AdamW by itself; leave --optim {optim} out")
    if "optimizer" in zero:
        raise ArgumentsError(f"{flag}: remove the optimizer block of the --deepspeed settings; the flags say all of it")
    if settings is not None and offloads_optimizer(zero):
        raise ArgumentsError(
            f"{flag}: DeepSpeed's CPU Adam, which --deepspeed asks for by offload_optimizer, has fp32 masters; take settings "
            "without it, for example ds_zero3_no_offload"
        )
    if settings is not None and zero_stage(zero) == 0:
        raise ArgumentsError(f"{flag}: with --deepspeed it needs ZeRO stage 1, 2 or 3")
    return None


def without_masters(settings: dict[str, Any]) -> dict[str, Any]:
    """DeepSpeed's settings with masters and gradients in bf16."""
    half = {**settings.get("bf16", {}), "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    return {**settings, "bf16": half, "zero_allow_untested_optimizer": True}
