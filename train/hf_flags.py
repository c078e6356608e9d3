"""The flags of transformers' ``TrainingArguments``, read from its source without importing it.

Importing transformers' trainer takes seconds and pulls in torch; a wrong flag should be told in milliseconds. The
installed version's own file is parsed, so names, types and defaults are always the ones that will be used.
"""

import ast
import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any


class ArgumentsError(ValueError):
    """The command line or recipe is wrong; the message names the flag and what to do. The exit code is 2."""


@dataclass(frozen=True, slots=True)
class HFFlag:
    """One field of TrainingArguments: its annotation and default as written in the source."""

    name: str
    annotation: str
    default: str

    @property
    def kinds(self) -> set[str]:
        """The plain types that the annotation allows, for example {"float", "None"}."""
        return {part.strip().split("[")[0] for part in self.annotation.split("|")}


@cache
def hf_flags() -> dict[str, HFFlag]:
    """Every field of the installed transformers' TrainingArguments. Raises ArgumentsError when it is not installed."""
    try:
        source = Path(str(metadata.distribution("transformers").locate_file("transformers/training_args.py")))
    except metadata.PackageNotFoundError:
        raise ArgumentsError(
            "transformers is not installed; run bash finetune/finetune.sh once, it sets up .venv"
        ) from None
    tree = ast.parse(source.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "TrainingArguments")
    flags: dict[str, HFFlag] = {}
    for node in body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(node.value, ast.Call):
            keywords = {keyword.arg: keyword.value for keyword in node.value.keywords}
            default = keywords.get("default", keywords.get("default_factory"))
            written = ast.unparse(default) if default else ""
            flags[node.target.id] = HFFlag(node.target.id, ast.unparse(node.annotation), written)
    return flags


def convert(flag: HFFlag, raw: Any) -> Any:
    """A raw command-line or YAML value as the type that the field wants. Raises ArgumentsError."""
    kinds = flag.kinds
    if not isinstance(raw, str):
        if isinstance(raw, bool) and "bool" not in kinds:
            raise ArgumentsError(f"--{flag.name} takes a value ({flag.annotation}), not {raw}")
        return raw
    if raw.lower() in ("none", "null") and "None" in kinds and flag.default != repr(raw):
        return None  # unless the word itself is a value, as in --report_to none
    if "bool" in kinds and raw.lower() in ("true", "false", "1", "0", "yes", "no"):
        return raw.lower() in ("true", "1", "yes")
    for kind, parse in (("int", int), ("float", float)):
        if kind in kinds:
            try:
                return parse(raw)
            except ValueError:
                continue
    if kinds & {"dict", "list"} and raw[:1] in "{[":
        try:
            return json.loads(raw)
        except ValueError as error:
            raise ArgumentsError(f"--{flag.name}: not JSON: {error}") from None
    if "list" in kinds and "str" not in kinds:
        return raw.split(",")
    if kinds <= {"int", "float", "bool", "None"}:
        raise ArgumentsError(f"--{flag.name} {raw}: a value of type {flag.annotation} is expected")
    return raw


def hf_value(given: Mapping[str, Any], name: str) -> Any:
    """The value given for a field of TrainingArguments, else the installed transformers' default."""
    return given[name] if name in given else ast.literal_eval(hf_flags()[name].default)


def nearest(name: str, known: Any) -> str:
    """``; did you mean --x?`` for a mistyped flag, or nothing."""
    near = difflib.get_close_matches(name, list(known), n=1, cutoff=0.45)
    return f"; did you mean --{near[0]}?" if near else ""
