"""What was chosen for the user: the defaults that shape a run and that nobody gave, told once before the first step."""

from collections.abc import Iterator
from typing import Any

from .arguments import Arguments
from .hf_flags import hf_value
from .recompute import asks_for_budget

# Flags that shape every run, by what they are about.
_GROUPS: dict[str, tuple[str, ...]] = {
    "optimizer": ("optim", "learning_rate", "lr_scheduler_type", "warmup_steps", "weight_decay", "max_grad_norm"),
    "batches": ("num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps", "seed"),
    "data": ("max_seq_length", "over_long", "packing"),
    "output": ("output_dir", "logging_steps", "save_steps", "save_total_limit", "report_to"),
}
# Flag -> another one that takes its place: who says how many steps asks for no epochs.
_INSTEAD = {"num_train_epochs": "max_steps", "logging_steps": "logging_strategy", "save_steps": "save_strategy"}


def default_lines(args: Arguments, model: Any) -> Iterator[str]:
    """A heading and a line for each group of flags that were not given, with what the loaded model has instead."""
    given = args.given | {name.removeprefix("no_") for name in args.given}  # --no_packing gives --packing
    yield "defaults, as not given:"
    for group, names in _GROUPS.items():
        told = [f"--{name} {_value(args, name)}" for name in names if not {name, _INSTEAD.get(name)} & given]
        if told:
            yield f"  {group:<9}  {', '.join(told)}"
    if told := list(_memory(args, given, model)):
        yield f"  memory     {', '.join(told)}"


def _memory(args: Arguments, given: frozenset[str], model: Any) -> Iterator[str]:
    """What decides on memory and speed, where no flag did."""
    if not {"bf16", "fp16"} & given:
        yield f"{str(next(model.parameters()).dtype).removeprefix('torch.')} weights (no --bf16 or --fp16)"
    if "use_flash_attn" not in given:
        yield f"{getattr(model.config, '_attn_implementation', None)} attention (no --use_flash_attn)"
    if "activation_checkpointing" not in given:
        auto = asks_for_budget(args.hf, args.model.memory_budget_gib)
        yield f"gradient checkpointing {'auto' if auto else 'off'}"
    if "deepspeed" not in given:
        yield "no ZeRO (no --deepspeed)"


def _value(args: Arguments, name: str) -> str:
    part = next((part for part in (args.model, args.data) if hasattr(part, name)), None)
    value = hf_value(args.hf, name) if part is None else getattr(part, name)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)
