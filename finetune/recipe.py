"""YAML recipes and ``key=value`` overrides under the names of the command line.

A recipe is a flat mapping of flag names to values. What is given later wins: recipe, then ``key=value``, then flags.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from ..train.arguments import as_word, known_flags, read_flags
from ..train.hf_flags import nearest
from .arguments import OTHER_NAMES, RUN_FLAGS
from .cluster import NODE_FLAGS

SHIPPED = Path(__file__).parent / "recipes"


class RecipeError(ValueError):
    """A recipe or override is wrong; the message names file and line, or the override."""


def is_recipe(word: str) -> bool:
    """Whether a word of the command line names a recipe file."""
    return word.endswith((".yaml", ".yml"))


def gather(words: Sequence[str]) -> dict[str, Any]:
    """Raw values by flag name from ``[recipe.yaml ...] [key=value ...] [--flag value ...]``.

    Raises RecipeError for an unknown key (with the nearest name) or a file that is no flat YAML mapping.
    """
    values: dict[str, Any] = {}
    rest = list(words)
    while rest and not rest[0].startswith("-"):
        word = rest.pop(0)
        if is_recipe(word):
            _give(values, read_recipe(Path(word)))
            continue
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeError(f"{word!r}: a recipe (.yaml), key=value or --flag is expected here")
        _check_key(key, f"{word!r}")
        _give(values, {key: value})
    flags = read_flags(rest)
    for key in flags:
        if key not in _known() and key.removeprefix("no_") not in _known():
            raise RecipeError(f"unknown flag --{key}{nearest(key, _known())}")
    _give(values, flags)
    return values


def _give(values: dict[str, Any], more: Mapping[str, Any]) -> None:
    """Add what is given later, at the end: two names of one flag are told apart by their order."""
    for key, value in more.items():
        values.pop(key, None)
        values[key] = value


def find_recipe(path: Path) -> Path:
    """The file that a recipe's name means: one that is there, else the shipped one of this name. Raises RecipeError."""
    shipped = SHIPPED / path.name
    if path.exists() or (len(path.parts) == 1 and shipped.is_file()):
        return path if path.exists() else shipped
    names = ", ".join(sorted(file.name for file in SHIPPED.glob("*.yaml")))
    raise RecipeError(f"{path}: No such file (the current folder is {Path.cwd()}; shipped are {names})")


def read_recipe(path: Path) -> dict[str, Any]:
    """The flags that a recipe sets. Raises RecipeError naming file and line."""
    path = find_recipe(path)
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        raise RecipeError(f"{path}: not UTF-8: {error}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise RecipeError(f"{path}: a mapping of flag names to values is expected")
    for key, _ in node.value:
        _check_key(str(key.value), f"{path}:{key.start_mark.line + 1}")
    return {str(key): value for key, value in values.items() if value is not None}


def to_argv(values: dict[str, Any]) -> list[str]:
    """Values as ``--name=value`` words, the form in which ranks get them."""
    words = ((name, as_word(name, value)) for name, value in values.items())
    return [f"--{name}={str(word).lower() if isinstance(word, bool) else word}" for name, word in words]


def _check_key(key: str, where: str) -> None:
    if key not in _known():
        raise RecipeError(f"{where}: unknown key {key!r}{nearest(key, _known()).replace('--', '')}")


def _known() -> list[str]:
    return [*known_flags(), *RUN_FLAGS, *OTHER_NAMES, *NODE_FLAGS]
