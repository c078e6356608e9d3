"""What a run is and was: ``OUTPUT_DIR/run.json``, one entry a launch, kept from the start on and closed at the end.

From it, the Trainer's state and the checkpoints the report is made. Secrets in arguments are masked before they are
written. Nothing here imports torch.
"""

import json
import os
import platform
import re
import shlex
import socket
import time
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from ..data_tools.arguments import DataArguments
from ..storage.manifest import tool_versions
from ..storage.publish import write_text
from . import launched
from .arguments import HF_DEFAULTS, Arguments
from .hf_flags import hf_flags, hf_value
from .model_arguments import ModelArguments

RECORD_NAME = "run.json"
MASK = "***"
_NO_WORD = "running, or ended without a word"
_MINUTE, _HOUR, _DAY = 60, 3600, 86400
_SECRET_NAME = re.compile(r"(?:^|[_-])(?:token|(?:api)?key|secret|passw(?:or)?d|credentials?)$", re.IGNORECASE)
_SECRET_VALUE = re.compile(r"\b(?:hf_|sk-|ghp_|github_pat_|glpat-|xox[abp]-)[A-Za-z0-9_-]{8,}|\bAKIA[A-Z0-9]{16}\b")
_SECRET_PAIR = re.compile(r"""(["'][^"']*(?:token|key|secret|passw(?:or)?d)["']\s*:\s*)(["'])[^"']*\2""", re.IGNORECASE)


def masked(name: str, value: str) -> str:
    """A flag's value with secrets replaced by ``***``: by the flag's name, by keys inside JSON, by well-known forms."""
    if _SECRET_NAME.search(name):
        return MASK
    value = _SECRET_VALUE.sub(MASK, _SECRET_PAIR.sub(rf"\1\2{MASK}\2", value))
    for word in re.findall(r"\w+://[^\s/]+@", value):
        value = value.replace(word, f"{urlsplit(word).scheme}://{MASK}@")
    return value


def command_line(argv: Sequence[str], verb: str = "sft") -> str:
    """The flags as ``finebridge sft`` (or another verb) takes them, for as many ranks of a machine, quoted, secrets masked."""
    words: list[str] = []
    if (ranks := os.environ.get("LOCAL_WORLD_SIZE", "1")) != "1":
        words = ["--nproc_per_node", ranks]
    flag = ""
    for word in argv:
        if word.startswith("-") and word.lstrip("-")[:1].isalpha():
            flag, equals, value = word.partition("=")
            words.append(f"{flag}{equals}{masked(flag.lstrip('-'), value)}" if equals else word)
        else:
            words.append(masked(flag.lstrip("-"), word))
    return shlex.join(["finebridge", verb, *words])


def changed_arguments(args: Arguments) -> dict[str, str]:
    """Every argument that is not at its default, as text, secrets masked."""
    changed: dict[str, str] = {}
    for part in (args.model, args.data):
        changed |= {f.name: str(getattr(part, f.name)) for f in fields(part) if getattr(part, f.name) != f.default}
    changed |= {name: str(value) for name, value in args.hf.items() if value != default_of(name)}
    order = [f.name for cls in (ModelArguments, DataArguments) for f in fields(cls)] + list(hf_flags())
    return {name: masked(name, changed[name]) for name in order if name in changed}


def default_of(name: str) -> Any:
    """What a field of TrainingArguments is when it is not given; None where only transformers itself can tell."""
    try:
        return hf_value(HF_DEFAULTS, name)
    except ValueError:  # made when transformers is imported
        return None


def about_data(data: Any) -> dict[str, Any]:
    """What a training or evaluation set was prepared from and what of it is used; for packs too."""
    samples = getattr(data, "data", data)
    about: dict[str, Any] = {"samples": len(samples), "tokens": int(samples.lengths.sum())}
    if folder := getattr(samples, "folder", None):
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        told = ("rows", "samples", "tokens", "loss_tokens", "rejects", "files")
        about = {name: report[name] for name in told} | {
            "folder": str(folder),
            "over_long": len(samples.over_long_rows),
        }
    about["used"] = len(samples)
    return about if samples is data else {**about, "packs": len(data)}


class RunRecord:
    """One launch's entry in ``run.json``. An earlier launch's entries stay when this one goes on from its checkpoint.

    They stay too when this is a restart (--max_restarts), which tells its number and cause.
    """

    def __init__(self, output_dir: Path, *, resumed: bool) -> None:
        self._path = output_dir / RECORD_NAME
        self._restart = launched.restart()
        self._earlier = read_record(output_dir) if resumed or self._restart else []
        self._began = time.monotonic()
        self._entry: dict[str, Any] = {}

    def open(self, argv: Sequence[str], args: Arguments, about: Mapping[str, Any]) -> None:
        """Write what the launch is; ``about`` holds what only a started run knows: ranks, device, data, model."""
        if self._restart and self._earlier and self._earlier[-1].get("outcome") == _NO_WORD:
            self._earlier[-1]["outcome"] = self._restart["cause"]
        self._entry = {
            "started": datetime.now(UTC).isoformat(timespec="seconds"),
            "outcome": _NO_WORD,
            "seconds": None,
            "command": command_line(argv, "pretrain" if args.kind == "document" else "sft"),
            "folder": str(Path.cwd()),
            "host": f"{socket.gethostname()}, {platform.system()} {platform.machine()}, {os.cpu_count()} cores",
            **({"restart": self._restart} if self._restart else {}),
            **about,
            "arguments": changed_arguments(args),
            "tools": tool_versions(),
        }
        self._write()

    def close(self, outcome: str) -> None:
        """Note how it ended and how long it took."""
        self._entry |= {"outcome": outcome, "seconds": round(time.monotonic() - self._began, 1)}
        self._write()

    def _write(self) -> None:
        text = json.dumps({"launches": [*self._earlier, self._entry]}, indent=1, ensure_ascii=False)
        write_text(self._path, text + "\n")


def read_record(output_dir: Path) -> list[dict[str, Any]]:
    """The launches that ``run.json`` tells of, oldest first; none when there is no such file or it is not readable."""
    try:
        launches = json.loads((output_dir / RECORD_NAME).read_text(encoding="utf-8"))["launches"]
    except (OSError, ValueError, KeyError, TypeError):
        return []
    return launches if isinstance(launches, list) else []


def span(seconds: float) -> str:
    """Seconds as a person says them: ``45 s``, ``3 min 20 s``, ``2 h 5 min``, ``3 d 4 h``."""
    whole = round(seconds)
    for size, name, smaller, its_name in (
        (_DAY, "d", _HOUR, "h"),
        (_HOUR, "h", _MINUTE, "min"),
        (_MINUTE, "min", 1, "s"),
    ):
        if whole >= size:
            return f"{whole // size} {name} {whole % size // smaller} {its_name}"
    return f"{whole} s"
