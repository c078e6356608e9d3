"""Which parameters train: chosen by their names."""

from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from .hf_flags import ArgumentsError
from .model_arguments import ModelArguments

ATTENTION = "*self_attn*"  # what --train_attention_params_only trains; the filter of the Hunyuan scripts


def patterns(text: str | None) -> list[str]:
    """The patterns of a comma-separated list."""
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def choose_trained(model: nn.Module, args: ModelArguments) -> None:
    """Freeze what ``--train_only`` (or ``--train_attention_params_only``) does not name, then what ``--freeze`` names.

    Raises ArgumentsError when a pattern matches no parameter or nothing is left to train.
    """
    only = [("train_attention_params_only", ATTENTION)] if args.train_attention_params_only else []
    only += [("train_only", pattern) for pattern in patterns(args.train_only)]
    frozen = [("freeze", pattern) for pattern in patterns(args.freeze)]
    if only:
        kept = _matching(model, only)
        for parameter in model.parameters():
            parameter.requires_grad_(id(parameter) in kept)
    if frozen:
        gone = _matching(model, frozen)
        for parameter in model.parameters():
            if id(parameter) in gone:
                parameter.requires_grad_(False)
    if not any(parameter.requires_grad for parameter in model.parameters()):
        flags = ", ".join(f"--{flag} {pattern}" for flag, pattern in only + frozen)
        raise ArgumentsError(f"{flags}: no parameter is left to train")


def _matching(model: nn.Module, wanted: Sequence[tuple[str, str]]) -> set[int]:
    """Ids of the parameters that a pattern names; a tied weight goes by each of its names."""
    named = list(model.named_parameters(remove_duplicate=False))
    found: set[int] = set()
    for flag, pattern in wanted:
        hits = {id(parameter) for name, parameter in named if fnmatchcase(name, pattern)}
        if not hits:
            example = next(name for name, _ in reversed(named))
            raise ArgumentsError(
                f"--{flag} {pattern}: no parameter of this model has such a name; names are like {example}, and a pattern "
                "covers the whole name (*mlp.gate*)"
            )
        found |= hits
    return found
