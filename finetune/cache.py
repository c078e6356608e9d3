"""``finebridge cache list|verify|prune``: what was built once to be reused: look at it, prove it, remove it.

    finebridge cache list [FOLDER...] [--json]
    finebridge cache verify [FOLDER...] [--sources]
    finebridge cache prune [FOLDER...] [--older_than 30d] [--damaged] [--stale] [--leftovers] [--all] [--dry_run]

Caches are prepared data, converted weights, kept Megatron conversions, checked token files and reshaped checkpoints, and what
killed writers left. Checkpoints, merges and exports are none. Without FOLDER: ./output, or the current folder if there is
none.
"""

import argparse
import json
import re
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import datetime
from pathlib import Path
from typing import Any, NoReturn

from ..storage.inventory import Found, discard, find, source_states, sources_of
from ..storage.manifest import ManifestError, faults, file_sha256, read
from ..storage.once import note_verified, remembered
from ..train.hf_flags import nearest

_USAGE = "finebridge cache list|verify|prune [FOLDER...]; each tells more with --help"
_AGE = re.compile(r"(\d+(?:\.\d+)?)([dh])")
_SECONDS = {"d": 86400.0, "h": 3600.0}
_SHOWN = 2  # sources that a line of the table names


def label(manifest: Mapping[str, Any]) -> str | None:
    """What kind of cache a manifest speaks of; None when it is none: somebody asked for that artifact by name."""
    made = manifest["made_from"]
    match manifest["kind"]:
        case "dataset" if {"sources", "tokenizer"} <= made.keys():
            return "prepared data"
        case "mixture":
            return "mixture"
        case "checked_tokens":
            return "checked tokens"
        case "reshaped":
            return "reshaped checkpoint"
        case "hf" if "key" in made:
            return "converted weights"
        case "torch" | "torch_dist" if "key" in made:
            return "Megatron conversion"
        case _:
            return None


def main(words: Sequence[str]) -> int:
    """Run one verb; exit code 0, or 1 when something is damaged or could not be removed. Raises ValueError for bad input."""
    verbs = {"list": _list, "verify": _verify, "prune": _prune}
    if words and words[0] in ("-h", "--help"):
        print(f"{__doc__}\n{_USAGE}")
        return 0
    if not words or words[0] not in verbs:
        near = nearest(words[0], verbs).replace("--", "") if words else ""
        raise ValueError((f"cache {words[0]}: no such verb{near}; " if words else "") + _USAGE)
    return verbs[words[0]](words[1:])


class _Parser(argparse.ArgumentParser):
    """Refuses with one message and the nearest name; argparse would print the usage and exit."""

    def __init__(self, verb: str, description: str) -> None:
        super().__init__(f"finebridge cache {verb}", description=description, allow_abbrev=False)
        self.add_argument(
            "folder", nargs="*", type=Path, help="walked without following links (default: ./output or .)"
        )

    def error(self, message: str) -> NoReturn:
        word = message.removeprefix("unrecognized arguments: ").split()[0]
        known = [name[2:] for name in self._option_string_actions if name.startswith("--")]
        near = nearest(word[2:], known) if word.startswith("--") else ""
        raise ValueError(message + (near or f" ({self.prog} --help tells more)"))


def _found(folders: Sequence[Path]) -> list[Found]:
    """What lies below the folders. Raises ValueError when one is not there."""
    for folder in folders:
        if not folder.is_dir():
            raise ValueError(f"{folder}: no such folder")
    output = Path("output")
    roots = folders or [output if output.is_dir() else Path()]
    return list(find(roots, label, _warn))


def _warn(text: str) -> None:
    print(text, file=sys.stderr)


def _list(words: Sequence[str]) -> int:
    parser = _Parser(
        "list",
        "What is kept, of which size, made when and from what, last used when, and in which state. Nothing is hashed: whole "
        "means that all files have their sizes, stale that a source has gone or changed, as far as that is known.",
    )
    parser.add_argument("--json", action="store_true", help="one JSON object: bytes and found")
    args = parser.parse_args(words)
    found = _found(args.folder)
    total = sum(entry.size for entry in found)
    if args.json:
        print(json.dumps({"bytes": total, "found": [_as_json(entry) for entry in found]}, ensure_ascii=False, indent=1))
        return 0
    rows = [["KIND", "SIZE", "MADE", "LAST USED", "FROM", "PATH", "STATE"], *map(_row, found)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]) - 1)]
    for row in rows if found else ():
        print("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    print(f"{len(found)} found, {_size(total)}")
    return 0


def _row(found: Found) -> list[str]:
    state = f"{found.state}: {found.detail}" if found.detail else found.state
    kind = "leftover" if found.state == "leftover" else found.kind
    times = (_time(found.made), _time(found.used))
    return [kind, _size(found.size), *times, _from(found), str(found.path), " ".join(state.split())]


def _from(found: Found) -> str:
    names = [path.name for path in sources_of(found.manifest)] if found.manifest else []
    if "source" in found.manifest.get("made_from", {}):
        names = [Path(found.manifest["made_from"]["source"]).name]
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return ", ".join(names[:_SHOWN]) + more or "-"


def _as_json(found: Found) -> dict[str, Any]:
    return {
        "path": str(found.path),
        "kind": None if found.kind == "-" else found.kind,
        "state": found.state,
        "detail": found.detail,
        "bytes": found.size,
        "made": _stamp(found.made),
        "used": _stamp(found.used),
        "sources": [str(path) for path in sources_of(found.manifest)] if found.manifest else [],
    }


def _verify(words: Sequence[str]) -> int:
    parser = _Parser(
        "verify",
        "Read every file of what is kept and compare it with its checksum. What is damaged is named, and built again by whoever "
        "needs it next. Exit code 1 when anything is damaged.",
    )
    parser.add_argument(
        "--sources", action="store_true", help="also read what each was made from: has it the same bytes?"
    )
    args = parser.parse_args(words)
    bad = False
    for found in _found(args.folder):
        if found.state == "leftover":
            continue
        if found.state == "being made":
            print(f"being made: {found.path} {found.detail}")
            continue
        try:
            wrong = [f"damaged: {text}" for text in _damage(found)]
            if args.sources and not wrong:
                wrong = [f"stale: {found.path}: {text}" for text in _changed(found)]
        except OSError as error:
            wrong = [f"unreadable: {error.filename or found.path}: {error.strerror}"]
        for text in wrong:
            _warn(text)
        bad = bad or bool(wrong)
        if not wrong:
            print(f"whole: {found.path} ({found.kind}, {_size(found.size)})", flush=True)
    return int(bad)


def _damage(found: Found) -> list[str]:
    """A sentence for each file that is not as it was written, which those who use it will know too. Raises OSError."""
    try:
        damage = list(faults(found.path, read(found.path)))
    except ManifestError as error:
        damage = [str(error)]
    note_verified(found.path, whole=not damage)
    return damage


def _changed(found: Found) -> list[str]:
    """A sentence for each source that has gone or has other bytes."""
    told: list[str] = []
    sources = sources_of(found.manifest)
    for path, same in source_states(found.path, found.manifest):
        digest = sources[path]
        if same is False and not path.exists():
            told.append(f"{path} has gone")
        elif digest is None or not path.is_absolute():
            print(f"unknown: {found.path}: what {path} held is not recorded")
        elif file_sha256(path) != digest:
            told.append(f"{path} has changed")
    return told


def _prune(words: Sequence[str]) -> int:
    parser = _Parser(
        "prune",
        "Remove what is kept. Without a flag that selects: leftovers of dead writers, and what is damaged, nothing else. Never "
        "what somebody is building, nor what a living process uses, on this machine or, where the disk carries locks, on "
        "another. Everything here can be built again from its sources, as long as they are there.",
    )
    add = parser.add_argument
    add("--older_than", "--older-than", metavar="30d", type=_age, help="of what is selected (alone: of all artifacts), "
        "only what was not used for so many days (30d) or hours (12h)")  # fmt: skip
    add("--damaged", action="store_true", help="artifacts that are not whole")
    add("--stale", action="store_true", help="artifacts of which a source has gone or changed")
    add("--leftovers", action="store_true", help="what killed writers and failed builds left")
    add("--all", action="store_true", help="everything")
    add("--dry_run", "--dry-run", action="store_true", help="only say what would be removed")
    args = parser.parse_args(words)
    done = "would remove" if args.dry_run else "removed"
    freed, gone, kept, failed = 0, 0, 0, 0
    for found in _found(args.folder):
        try:
            reason = _reason(found, args)
            stays = found.detail if not found.removable else ""
            if found.state == "being made":
                stays = f"being made {found.detail}"
            elif reason and not (stays or args.dry_run):
                stays = discard(found, _warn)
        except OSError as error:
            failed += 1
            _warn(f"cannot be removed: {error.filename or found.path}: {error.strerror}")
            continue
        if stays and reason:
            kept += 1
            _warn(f"kept: {found.path}: {stays}")
        elif reason:
            freed, gone = freed + found.size, gone + 1
            print(f"{done} {found.path} ({_size(found.size)}): {reason}")
    print(f"{done} {gone}, {_size(freed)}; selected and kept: {kept + failed}")
    return int(failed > 0)


def _reason(found: Found, args: argparse.Namespace) -> str:
    """Why it is to be removed; empty when it is not. Raises OSError."""
    selecting = args.damaged or args.stale or args.leftovers or args.all
    plain = not selecting and args.older_than is None
    everything = args.all or not (selecting or plain)
    since = found.used or found.made or 0.0
    if args.older_than is not None and time.time() - since < args.older_than:
        return ""
    match found.state:
        case "being made":
            return found.state
        case "leftover":
            return found.detail if plain or args.leftovers or args.all else ""
        case "damaged":
            return f"damaged: {found.detail}" if plain or args.damaged or everything else ""
        case _:
            pass
    if (plain or args.damaged) and not remembered(found.path) and (damage := _damage(found)):
        return f"damaged: {damage[0]}"
    if found.state == "stale" and (args.stale or everything):
        return f"stale: {found.detail}"
    return f"last used {_time(since)}" if everything else ""


def _age(text: str) -> float:
    """Seconds of ``30d`` or ``12h``."""
    match = _AGE.fullmatch(text)
    if not match:
        raise argparse.ArgumentTypeError(f"{text!r}; days or hours are expected, as 30d or 12h")
    return float(match[1]) * _SECONDS[match[2]]


def _size(count: float) -> str:
    for unit in ("B", "KB", "MB", "GB"):
        if count < 1000:  # noqa: PLR2004
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"


def _time(seconds: float | None) -> str:
    return datetime.fromtimestamp(seconds).astimezone().strftime("%Y-%m-%d %H:%M") if seconds else "-"


def _stamp(seconds: float | None) -> str | None:
    return datetime.fromtimestamp(seconds).astimezone().isoformat(timespec="seconds") if seconds else None
