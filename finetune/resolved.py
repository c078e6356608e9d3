"""The resolved recipe: every flag of a run with its value, as a recipe that does the same again."""

from dataclasses import fields
from typing import Any

import yaml

from .. import __version__
from ..data_tools.arguments import DataArguments
from ..train.arguments import Arguments
from ..train.model_arguments import ARCHITECTURE, ModelArguments
from ..train.record import masked
from .arguments import RunArguments


def resolved(run: RunArguments, args: Arguments) -> dict[str, Any]:
    """Name -> value of all flags of a run; without secrets, and without those of a new model that were not given."""
    found: dict[str, Any] = {}
    for part, cls in ((args.model, ModelArguments), (args.data, DataArguments), (run, RunArguments)):
        found |= {f.name: getattr(part, f.name) for f in fields(cls)}
    found |= args.hf
    del found["dry_run"]
    plain = {
        name: value
        for name, value in found.items()
        if value is not None and (name not in ARCHITECTURE or name in args.given)
    }
    return {name: value for name, value in plain.items() if masked(name, str(value)) == str(value)}


def recipe_text(run: RunArguments, args: Arguments) -> str:
    """The resolved recipe as YAML."""
    head = f"# finebridge {__version__}: every flag of this run but those about nodes; finebridge run THIS_FILE does the same\n"
    return head + yaml.safe_dump(resolved(run, args), sort_keys=False, allow_unicode=True, width=1000)
