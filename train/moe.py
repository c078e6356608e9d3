"""Find mixture-of-experts blocks by structure and make them ZeRO-3 leaf modules.

A block owns experts (one child with a weight per expert: a list of equal modules, or three-dimensional parameters) and
a router (a two-dimensional weight with one row per expert). No model names: a new family needs no change here.
DeepSpeed gathers a leaf's parameters all at once when the block is entered; they stay partitioned otherwise.
"""

from typing import Any

from torch import nn

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


def make_leaf_modules(model: nn.Module) -> list[str]:
    """Mark every MoE block as a ZeRO-3 leaf; the class names marked. Call before the Trainer prepares the engine.

    Raises ArgumentsError when the model has no such block.
    """
    from deepspeed.utils import set_z3_leaf_modules

    classes = sorted({type(block).__name__ for block in moe_blocks(model).values()})
    if not classes:
        raise ArgumentsError(
            "--make_moe_param_leaf_module: this model has no mixture-of-experts block; leave the flag out"
        )
    set_z3_leaf_modules(model, classes)
    return classes


def _is_block(module: nn.Module) -> bool:
    children = list(module.children())
    for child in children:
        experts = _expert_count(child)
        if experts > 1 and any(_routes(other, experts) for other in children if other is not child):
            return True
    return False


def _expert_count(module: nn.Module) -> int:
    """Experts that a container holds: equal modules of a list, or the common first dimension of 3-D parameters."""
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
