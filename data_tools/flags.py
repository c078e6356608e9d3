"""Flags of the data verbs: one set, taken from DataArguments, with MindSpeed-LLM's names beside."""

import argparse
import difflib
import json
import types
from collections.abc import Callable, Collection, Mapping
from dataclasses import Field, fields
from pathlib import Path
from typing import Any, Literal, NoReturn, Union, get_args, get_origin, get_type_hints

from .arguments import DataArguments
from .schema import DataError
from .tokenizer_files import TokenizerSource

_NOT_HERE = (
    "train_data_file",
    "eval_data_file",
    "prepared_data_dir",
    "use_dummy_data",
    "model_size",
    "complex_data",
    "packing",
    "cross_document_attention",
)
_OTHER_NAMES = {
    "preprocessing_num_workers": ("--workers",),
    "chat_template": ("--prompt_type",),
    "max_seq_length": ("--seq_length", "--model_max_length"),
}


class _Help(argparse.HelpFormatter):
    """One line of names a flag, spelt with underscores; the wide form of argparse repeats the value after each name."""

    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=34, width=110)

    def _format_action_invocation(self, action: argparse.Action) -> str:
        if not action.option_strings:
            return super()._format_action_invocation(action)
        names = [name for name in action.option_strings if "-" not in name[2:]]
        takes = (
            "" if action.nargs == 0 else " " + self._format_args(action, self._get_default_metavar_for_optional(action))
        )
        return ", ".join(names) + takes

    def _get_default_metavar_for_optional(self, action: argparse.Action) -> str:
        return _METAVARS.get(action.type, "TEXT")


class _Parser(argparse.ArgumentParser):
    """Refuses like everything here: one message, with the nearest name; argparse would print the usage and exit."""

    def error(self, message: str) -> NoReturn:
        words = message.removeprefix("unrecognized arguments: ").split()
        names = [name for name in self._option_string_actions if name.startswith("--")]
        near = difflib.get_close_matches(words[0], names, n=1) if words[0].startswith("--") else []
        raise DataError(message + (f"; did you mean {near[0]}?" if near else f" ({self.prog} --help tells more)"))


_METAVARS: Mapping[Any, str] = {int: "N", float: "SHARE", Path: "PATH"}
_SPELLING = "Every flag may also be spelt with dashes (--max-seq-length)."


def command_parser(verb: str, usage: str, description: str) -> argparse.ArgumentParser:
    """A parser for ``finebridge data VERB``; flags are added to it with ``add``."""
    name = f"finebridge data {verb}"
    return _Parser(name, f"{name} {usage}", description, _SPELLING, formatter_class=_Help, allow_abbrev=False)


def data_parser(verb: str, description: str, own: Callable[[argparse.ArgumentParser], None]) -> argparse.ArgumentParser:
    """A parser with the flags that ``own`` adds, the data files, the tokenizer and every flag of DataArguments."""
    parser = command_parser(verb, "FILE... --tokenizer_name_or_path MODEL [flags]", description)
    parser.add_argument("files", nargs="*", metavar="FILE", help="data files, folders or globs")
    add(
        parser,
        "--tokenizer_name_or_path",
        "--model_name_or_path",
        dest="tokenizer",
        required=True,
        help="the folder or Hub name that the tokenizer comes from",
    )
    own(parser)
    add(parser, "--data_path", "--input", dest="data_path", help="the same as FILE, comma-separated")
    add(parser, "--trust_remote_code", action="store_true", help="run the tokenizer's own .py files")
    add(parser, "--json_keys", help="pretraining text: the column that holds it (default: text)")
    add_data_flags(parser, [entry.name for entry in fields(DataArguments) if entry.name not in _NOT_HERE])
    return parser


def add_data_flags(parser: argparse.ArgumentParser, wanted: Collection[str]) -> None:
    """The flags of these fields of DataArguments."""
    hints = get_type_hints(DataArguments)
    for entry in fields(DataArguments):
        if entry.name in wanted:
            names = (f"--{entry.name}", *_OTHER_NAMES.get(entry.name, ()))
            add(parser, *names, dest=entry.name, **_argument(entry, hints[entry.name]))


def add(parser: argparse.ArgumentParser, *names: str, **settings: Any) -> None:
    """A flag under all its names, spelt with underscores and with dashes."""
    both = [spelling for name in names for spelling in dict.fromkeys((name, "--" + name[2:].replace("_", "-")))]
    parser.add_argument(*both, **settings)


def read_arguments(values: argparse.Namespace) -> tuple[list[str], TokenizerSource, DataArguments]:
    """Files, tokenizer and DataArguments of a parsed command line. Raises DataError."""
    given = {entry.name: getattr(values, entry.name) for entry in fields(DataArguments) if hasattr(values, entry.name)}
    if values.json_keys:
        if given["map_keys"]:
            raise DataError("--json_keys and --map_keys both name columns; give one of them")
        if not values.handler_name:
            given["data_format"] = "text"
        given["map_keys"] = json.dumps({"text": values.json_keys})
    files = [*values.files, *([values.data_path] if values.data_path else [])]
    if not files:
        raise DataError("FILE is missing: name at least one data file, folder or glob")
    source = TokenizerSource(values.tokenizer, trust_remote_code=values.trust_remote_code)
    return files, source, DataArguments(**given)


def _argument(entry: "Field[Any]", kind: Any) -> dict[str, Any]:
    """What argparse needs to read a field of DataArguments."""
    told = entry.metadata["help"].replace("%", "%%")
    shown = f" (default: {entry.default})" if entry.default not in (None, False) else ""
    result: dict[str, Any] = {"help": told + shown, "default": entry.default}
    if get_origin(kind) in (Union, types.UnionType):
        kind = next(part for part in get_args(kind) if part is not type(None))
    if kind is bool:
        return {**result, "action": "store_true"}
    if get_origin(kind) is Literal:
        return {**result, "choices": get_args(kind)}
    return {**result, "type": kind}
