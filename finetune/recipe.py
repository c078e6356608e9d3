"""YAML recipes and ``key=value`` overrides under the names of the command line.

A recipe is a flat mapping of flag names to values. What is given later wins: recipe, then ``key=value``, then flags.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from ..train.arguments import known_flags, read_flags
from ..train.hf_flags import nearest


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
            values |= read_recipe(Path(word))
            continue
        key, equals, value = word.partition("=")
        if not equals:
            raise RecipeError(f"{word!r}: a recipe (.yaml), key=value or --flag is expected here")
        _check_key(key, f"{word!r}")
        values[key] = value
    return values | read_flags(rest)


def read_recipe(path: Path) -> dict[str, Any]:
    """The flags that a recipe sets. Raises RecipeError naming file and line."""
    try:
        text = path.read_text(encoding="utf-8")
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        values = yaml.safe_load(text)
    except OSError as error:
        raise RecipeError(f"{path}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise RecipeError(f"{path}: not YAML: {error}") from None
    if not isinstance(node, yaml.MappingNode) or not isinstance(values, dict):
        raise RecipeError(f"{path}: a mapping of flag names to values is expected")
    for key, _ in node.value:
        _check_key(str(key.value), f"{path}:{key.start_mark.line + 1}")
    return {str(key): value for key, value in values.items() if value is not None}


def to_argv(values: dict[str, Any]) -> list[str]:
    """Values as ``--name=value`` words, the form in which ranks get them."""
    words: list[str] = []
    for name, value in values.items():
        if isinstance(value, bool):
            words.append(f"--{name}={str(value).lower()}")
        elif isinstance(value, list):
            words.append(f"--{name}={','.join(map(str, value))}")
        elif isinstance(value, dict):
            words.append(f"--{name}={json.dumps(value)}")
        else:
            words.append(f"--{name}={value}")
    return words


def _check_key(key: str, where: str) -> None:
    if key not in known_flags():
        raise RecipeError(f"{where}: unknown key {key!r}{nearest(key, known_flags()).replace('--', '')}")
