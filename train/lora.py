"""Wrap a model with a LoRA adapter (https://arxiv.org/abs/2106.09685), by PEFT."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from .hf_flags import ArgumentsError
from .model_arguments import ADAPTER_CONFIG, ModelArguments
from .moe import Experts, experts_of


def add_lora(model: PreTrainedModel, args: ModelArguments, say: Callable[[str], None] = print) -> Any:
    """The model with an adapter on ``args.lora_target``, or with that of ``args.init_from_checkpoint``; the rest is frozen.

    With ``args.lora_experts`` the experts get one too. Call after ``set_seed``: the A matrices are random. Raises
    ArgumentsError naming the linear modules that there are when a target matches none.
    """
    if args.init_from_checkpoint and (Path(args.init_from_checkpoint) / ADAPTER_CONFIG).is_file():
        return PeftModel.from_pretrained(model, args.init_from_checkpoint, is_trainable=True)
    targets: str | list[str] = args.lora_target
    if args.lora_target != "all-linear":
        targets = [name.strip() for name in args.lora_target.split(",") if name.strip()]
        modules = {name for name, _ in model.named_modules()}
        for target in targets:
            if not any(name == target or name.endswith(f".{target}") for name in modules):
                raise ArgumentsError(
                    f"--lora_target {target}: no module of that name; linear modules are {linear_names(model)}"
                )
    experts = _experts(model, args, say) if args.lora_experts else Experts()
    if experts.linear and isinstance(targets, list):
        targets = [*targets, *experts.linear]
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,  # pyright: ignore[reportArgumentType] - PEFT takes a float, its annotation says int
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        target_parameters=experts.fused or None,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def _experts(model: PreTrainedModel, args: ModelArguments, say: Callable[[str], None]) -> Experts:
    """What ``--lora_experts`` adapts, said in one line. Raises ArgumentsError when there are none or PEFT cannot."""
    found = experts_of(model)
    if not (found.fused or found.linear):
        raise ArgumentsError("--lora_experts: this model has no mixture-of-experts block; leave the flag out")
    if found.fused and args.lora_dropout:
        raise ArgumentsError(
            f"--lora_dropout {args.lora_dropout:g}: PEFT has no dropout for fused experts ({found.fused[0]}); set it to 0"
        )
    say(f"LoRA on experts: {', '.join(found.fused or sorted({name.rpartition('.')[2] for name in found.linear}))}")
    return found


def linear_names(model: nn.Module) -> str:
    """The last name parts of all linear modules, comma-separated."""
    return ", ".join(sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}))
