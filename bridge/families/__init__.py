"""One table a model family; a new family is a new file here."""

import difflib
import importlib
import pkgutil
from collections.abc import Iterable, Mapping
from typing import Any

from ..errors import BridgeError
from ..family import Family


def families() -> dict[str, Family]:
    """Every family, by its name."""
    found = [importlib.import_module(f"{__name__}.{module.name}").FAMILY for module in pkgutil.iter_modules(__path__)]
    return {family.name: family for family in found}


def family_of(config: Mapping[str, Any], name: str | None = None) -> Family:
    """The family of a config.json by its ``model_type``, or the one called ``name``, also by others (``aliases``).

    Raises BridgeError naming what is nearest, and for a name that the config contradicts.
    """
    by_type = {model_type: family for family in families().values() for model_type in family.model_types}
    model_type = config.get("model_type")
    if name is None:
        if model_type in by_type:
            return by_type[model_type]
        raise BridgeError(
            f"config.json: model_type {model_type!r} has no table yet; those that have are {', '.join(sorted(by_type))}"
            + _nearest(str(model_type), by_type)
        )
    by_name = {alias: family for family in families().values() for alias in (family.name, *family.aliases)}
    found, told = by_name.get(name) or by_type.get(name), by_type.get(str(model_type))
    if found is None:
        raise BridgeError(
            f"--model_type_hf {name}: families are {', '.join(sorted(by_name))}" + _nearest(name, by_name)
        )
    if told and told.name != found.name:
        raise BridgeError(f"--model_type_hf {name}: config.json has model_type {model_type}, family {told.name}")
    return found


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name.lower(), known, n=1)
    return f"; the nearest is {close[0]}" if close else ""
