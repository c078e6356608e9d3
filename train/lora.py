"""Wrap a model with a LoRA adapter (https://arxiv.org/abs/2106.09685), by PEFT."""

from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from .arguments import ADAPTER_CONFIG, ModelArguments
from .hf_flags import ArgumentsError


def add_lora(model: PreTrainedModel, args: ModelArguments) -> Any:
    """The model with an adapter on ``args.lora_target``, or with that of ``args.init_from_checkpoint``; the rest is frozen.

    Call after ``set_seed``: the A matrices are random. Raises ArgumentsError naming the linear modules that there are
    when a target matches none.
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
    config = LoraConfig(
        r=args.lora_rank,
        lora_alpha=args.lora_alpha,  # pyright: ignore[reportArgumentType] - PEFT takes a float, its annotation says int
        lora_dropout=args.lora_dropout,
        target_modules=targets,
        bias="none",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(model, config)


def linear_names(model: nn.Module) -> str:
    """The last name parts of all linear modules, comma-separated."""
    return ", ".join(sorted({name.rpartition(".")[2] for name, m in model.named_modules() if isinstance(m, nn.Linear)}))
