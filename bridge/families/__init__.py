"""One table a model family; a new family is a new file here."""

import importlib
import pkgutil
from collections.abc import Mapping
from typing import Any

from ..errors import BridgeError
from ..family import Family


def families() -> dict[str, Family]:
    """Every family, by its name."""
    found = [importlib.import_module(f"{__name__}.{module.name}").FAMILY for module in pkgutil.iter_modules(__path__)]
    return {family.name: family for family in found}


def family_of(config: Mapping[str, Any], name: str | None = None) -> Family:
    """The family of a config.json by its ``model_type``, or the one called ``name``. Raises BridgeError."""
    known = families()
    if name is not None:
        if name not in known:
            raise BridgeError(f"--model_type_hf {name}: families are {', '.join(sorted(known))}")
        return known[name]
    model_type = config.get("model_type")
    for family in known.values():
        if model_type in family.model_types:
            return family
    types = sorted(one for family in known.values() for one in family.model_types)
    raise BridgeError(
        f"config.json: model_type {model_type!r} has no table yet; those that have are {', '.join(types)}"
    )
