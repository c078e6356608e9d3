"""Find mixture-of-experts blocks by structure and make them ZeRO-3 leaf modules.

A block owns experts (one child with a weight per expert: a list of equal modules, or three-dimensional parameters) and
a router (a two-dimensional weight with one row per expert). No model names: a new family needs no change here.
DeepSpeed gathers a leaf's parameters all at once when the block is entered; they stay partitioned otherwise.
"""

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, cast

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .hf_flags import ArgumentsError


def moe_blocks(model: nn.Module) -> dict[str, nn.Module]:
    """Every MoE block of a model by name."""
    return {name: module for name, module in model.named_modules() if _is_block(module)}


def has_listed_experts(model: nn.Module) -> bool:
    """Whether any block keeps its experts as a list of modules, each fetched on its own when routed to.

    Under ZeRO-3 ranks that route differently then gather different parameters, and hang or fail, unless the block is
    a leaf.
    """
    return any(isinstance(child, nn.ModuleList) for block in moe_blocks(model).values() for child in block.children())


@dataclass(frozen=True)
class Experts:
    """The weights of all experts of a model: names of fused parameters, and of linear modules in lists."""

    fused: list[str] = field(default_factory=list[str])
    linear: list[str] = field(default_factory=list[str])


def experts_of(model: nn.Module) -> Experts:
    """Names as an adapter targets them: fused parameters by their last two parts, linear modules in full."""
    fused: set[str] = set()
    linear: list[str] = []
    for name, block in moe_blocks(model).items():
        for child_name, child in block.named_children():
            if isinstance(child, nn.ModuleList) and _expert_count(child):
                inside = (part for part, module in child.named_modules() if isinstance(module, nn.Linear))
                linear += [f"{name}.{child_name}.{part}" for part in inside]
            elif _expert_count(child):
                wanted = (part for part, p in child.named_parameters(recurse=False) if len(_shape(p)) == 3)  # noqa: PLR2004
                fused |= {f"{child_name}.{part}" for part in wanted}
    return Experts(sorted(fused), linear)


def make_leaf_modules(model: nn.Module, wanted: bool | None, say: Callable[[str], None]) -> None:
    """Mark every MoE block as a ZeRO-3 leaf, unless ``wanted`` is False. Call before the engine is prepared.

    ``wanted`` is --make_moe_param_leaf_module, None when it was not given. Raises ArgumentsError when it is True and the
    model has no such block, or False and a block keeps its experts in a list.
    """
    from deepspeed.utils import set_z3_leaf_modules

    blocks = moe_blocks(model)
    if not blocks:
        if wanted:
            raise ArgumentsError(
                "--make_moe_param_leaf_module: this model has no mixture-of-experts block; leave the flag out"
            )
        return
    if wanted is False:
        if has_listed_experts(model):
            raise ArgumentsError(
                f"--make_moe_param_leaf_module false: {next(iter(blocks))} keeps its experts in a list, and ranks that route "
                "to different experts would wait for each other for ever; leave the flag out"
            )
        return
    set_z3_leaf_modules(model, sorted({type(block).__name__ for block in blocks.values()}))
    say(f"ZeRO-3 leaf modules: {leaf_summary(model)}{'' if wanted else ' (set for you)'}")


def leaf_summary(model: nn.Module) -> str:
    """The MoE blocks that are ZeRO-3 leaf modules, by class. Raises RuntimeError naming a block that is none."""
    from deepspeed.utils import z3_leaf_module

    counts: Counter[str] = Counter()
    for name, block in moe_blocks(model).items():
        if not z3_leaf_module(block):
            raise RuntimeError(
                f"the MoE block {name} ({type(block).__name__}) is no ZeRO-3 leaf module: the run may hang"
            )
        counts[type(block).__name__] += 1
    return ", ".join(f"{count} x {kind}" for kind, count in counts.items())


class LeafCheck(TrainerCallback):
    """Looks again, when DeepSpeed has set its engine up, that every MoE block is still a leaf module."""

    def on_train_begin(
        self,
        args: TrainingArguments,  # noqa: ARG002 - the signature is the Trainer's
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        model: Any = None,
        **_: Any,
    ) -> None:
        """Raise RuntimeError naming a block that is none."""
        leaf_summary(model)


def _is_block(module: nn.Module) -> bool:
    children = list(module.children())
    for child in children:
        experts = _expert_count(child)
        if experts > 1 and any(_routes(other, experts) for other in children if other is not child):
            return True
    return False


def _expert_count(module: nn.Module) -> int:
    """Experts that a container holds: equal modules of a list, or the common first dimension of 3-D parameters."""
    while hasattr(module, "base_layer"):  # an adapter's wrapper around fused experts
        module = cast("nn.Module", module.base_layer)
    if isinstance(module, nn.ModuleList):
        shapes = {tuple(_shape(p) for p in child.parameters()) for child in module}
        return len(module) if len(shapes) == 1 and shapes != {()} else 0
    if isinstance(module, nn.Conv1d):  # its weight is three-dimensional too (Mamba, LFM2)
        return 0
    stacked = {_shape(p)[0] for p in module.parameters(recurse=False) if len(_shape(p)) == 3}  # noqa: PLR2004
    return stacked.pop() if len(stacked) == 1 else 0


def _routes(module: nn.Module, experts: int) -> bool:
    return any(len(_shape(p)) == 2 and _shape(p)[0] == experts for p in module.parameters())  # noqa: PLR2004


def _shape(parameter: Any) -> tuple[int, ...]:
    """A parameter's full shape, also when ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))
