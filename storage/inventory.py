"""What lies below some folders that was built once to be reused, who is at work on it, and what dead builders left.

An artifact is told by what its manifest says of itself, never by a name alone; what nobody here made is not seen, so it
cannot be discarded. Folders are walked without following links, without those whose name begins with a dot, and not
below an artifact.
"""

import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from .assets import read_json
from .holds import alone
from .manifest import MANIFEST_NAME, ManifestError, faults, read
from .once import builder_of, claimed, memory_of, named, note_of
from .owner import lives
from .publish import is_dead, is_moved_aside, last_change, remove, writer_of
from .source_hashes import has_hash

State = Literal["whole", "damaged", "stale", "being made", "leftover"]
Label = Callable[[Mapping[str, Any]], str | None]
_NOTE = re.compile(r"\.(?P<name>.+)\.(?:lock(?:\.[0-9a-f]{8})?|failed|verified)")
_QUIET = 600.0  # seconds after which a builder that nobody can ask is not waited for by anyone
_FAR = 86400.0  # seconds without a change after which the same is believed of a writer without a lock


@dataclass(frozen=True, slots=True)
class Found:
    """Something on disk; sizes in bytes, times in seconds since 1970. ``target`` is the artifact that it is or belongs to."""

    path: Path
    target: Path
    kind: str
    state: State
    detail: str = ""
    size: int = 0
    made: float | None = None
    used: float | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict[str, Any])
    removable: bool = True


def find(roots: Sequence[Path], label: Label, warn: Callable[[str], None]) -> Iterator[Found]:
    """Everything below the roots, each once. ``label`` names the kind of an artifact by its manifest, or None: not one of these.

    A folder that cannot be read is told to ``warn``. Files are not hashed.
    """
    seen: set[Path] = set()
    for found in _walk([root.resolve() for root in roots], label, warn):
        if found.path not in seen:
            seen.add(found.path)
            yield found


def _walk(roots: Sequence[Path], label: Label, warn: Callable[[str], None]) -> Iterator[Found]:
    waiting, seen = list(reversed(roots)), set[Path]()
    while waiting:
        folder = waiting.pop()
        if folder in seen:
            continue
        seen.add(folder)
        try:
            if (folder / MANIFEST_NAME).is_file():
                if folder in roots:  # named itself, so what lies beside it is looked at here
                    yield from (found for found in _beside(folder.parent, warn) if found.target == folder)
                if artifact := _artifact(folder, label):
                    yield artifact
                continue
            waiting += sorted(_folders(folder), reverse=True)
        except FileNotFoundError:  # it was removed just now
            continue
        except OSError as error:
            warn(f"{folder}: not looked into: {error.strerror}")
            continue
        yield from _beside(folder, warn)


def _folders(folder: Path) -> list[Path]:
    with os.scandir(folder) as entries:
        return [
            Path(entry.path)
            for entry in entries
            if entry.is_dir(follow_symlinks=False) and not entry.name.startswith(".")
        ]


def _artifact(folder: Path, label: Label) -> Found | None:
    """A published folder of a kind that is looked for."""
    builder = builder_of(folder)
    try:
        manifest = read(folder)
    except ManifestError as error:
        return _unreadable(folder, str(error), label)
    kind = label(manifest)
    if kind is None:
        return None
    state, detail = _state(folder, manifest)
    if builder:
        state, detail = "being made", _told(builder)
    made = datetime.fromisoformat(manifest["created"]).timestamp()
    return Found(folder, folder, kind, state, detail, _size(folder), made, _used(folder), manifest)


def _unreadable(folder: Path, error: str, label: Label) -> Found | None:
    """One whose manifest is damaged: it is shown when it is of this kind still, or was checked by ``once`` in better days."""
    try:
        manifest = read_json(folder / MANIFEST_NAME)
        kind = label(manifest)
    except (ValueError, KeyError, TypeError, AttributeError):
        kind, manifest = None, {}
    if kind is None and (manifest or not memory_of(folder).is_file()):
        return None
    known = kind is not None
    detail = error if known else f"{error}; nobody knows what it is, so it is not removed here"
    return Found(
        folder, folder, kind or "unknown", "damaged", detail, _size(folder), None, _used(folder), manifest, known
    )


def _state(folder: Path, manifest: Mapping[str, Any]) -> tuple[State, str]:
    try:
        damage = next(faults(folder, manifest, hashes=False), None)
    except ManifestError as error:
        damage = str(error)
    if damage:
        return "damaged", damage
    changed = [(path, same) for path, same in source_states(folder, manifest) if same is not True]
    for path, same in changed:
        if same is False:
            return "stale", f"{path} {'has changed' if path.exists() else 'has gone'}"
    if changed or not sources_of(manifest):
        return "whole", "whether its sources changed is unknown"
    return "whole", ""


def sources_of(manifest: Mapping[str, Any]) -> dict[Path, str | None]:
    """What an artifact was made from, as far as its manifest tells: paths, and SHA-256 where they are files."""
    made = manifest["made_from"]
    files: dict[Path, str | None] = {Path(path): str(digest) for path, digest in made.get("files", {}).items()}
    return files or {Path(made[name]): None for name in ("source", "checkpoint") if name in made}


def source_states(folder: Path, manifest: Mapping[str, Any]) -> Iterator[tuple[Path, bool | None]]:
    """For each source of an artifact whether it is as it was; None when that cannot be told without reading it.

    A relative path, as older versions recorded it, is not looked for: it was relative to a place that nobody knows.
    """
    memories = (folder.parent, folder.with_name(f".{folder.name}.sources"))
    for path, digest in sources_of(manifest).items():
        if not path.is_absolute():
            yield path, None
        elif not path.exists():
            yield path, False
        elif digest is None:
            yield path, None
        else:
            answers = [has_hash(path, digest, memory) for memory in memories]
            yield path, next((answer for answer in answers if answer is not None), None)


def _beside(folder: Path, warn: Callable[[str], None]) -> Iterator[Found]:
    """What builders, living and dead, have in a folder beside the artifacts."""
    try:
        hidden = sorted(path for path in folder.iterdir() if path.name.startswith("."))
    except OSError as error:
        warn(f"{folder}: not looked into: {error.strerror}")
        return
    made: set[Path] = set()
    for path in hidden:
        try:
            found = _work(path, made)
        except FileNotFoundError:  # its writer was done just now
            continue
        except OSError as error:
            warn(f"{path}: not looked into: {error.strerror}")
            continue
        if found:
            yield found


def _work(path: Path, made: set[Path]) -> Found | None:
    """What a hidden file or folder is: a build that goes on, something left, or None: of a living writer, or of somebody else."""
    writer = writer_of(path)
    match = _NOTE.fullmatch(path.name)
    if path.is_symlink() or not (writer or (match and path.is_file())):
        return None
    target = writer[0] if writer else path.with_name(str(match and match["name"]))
    if target not in made and not target.is_dir() and (builder := builder_of(target)):
        made.add(target)
        size = sum(_size(part) for part in target.parent.iterdir() if (writer_of(part) or (None,))[0] == target)
        return Found(target, target, "-", "being made", _told(builder), size, last_change(path))
    left = _left_staging(path, target, writer[1]) if writer else _left_note(path, target)
    if left is None:
        return None
    detail, removable = left
    return Found(path, target, "-", "leftover", detail, _size(path), last_change(path), removable=removable)


def _left_staging(path: Path, target: Path, owner: str) -> tuple[str, bool] | None:
    """What to say of a temporary sibling, and whether it may go; None when its writer lives."""
    if owner.count("-") < 3 or lives(owner):  # noqa: PLR2004 - HOST-PLACE-PID-START
        return None
    far = not is_dead(path, owner)
    if far and builder_of(target):
        return None
    if is_moved_aside(path) and not target.exists():
        return f"moved aside by {named(owner)}, which is dead; whoever writes {target.name} next puts it back", False
    if far and time.time() - last_change(path) < _FAR:
        return (
            f"of a writer that cannot be asked from here ({named(owner)}); kept until it stands still for a day",
            False,
        )
    return f"left by {named(owner)}, which is dead or stands still", True


def _left_note(path: Path, target: Path) -> tuple[str, bool] | None:
    """What to say of a small file beside a target, and that it may go; None when it is needed."""
    if path.name.endswith(".verified"):
        return ("its artifact has gone", True) if not target.exists() and _is_memory(path) else None
    note = note_of(path)
    if note is None or (builder_of(target) and not path.name.endswith(".failed")):
        return None
    owner = str(note["owner"])
    if lives(owner) is not False and time.time() - path.stat().st_mtime < _QUIET:
        return None
    failed = f"the build by {named(owner)} failed: {note['error']}" if "error" in note else ""
    return failed or f"left by {named(owner)}, which is dead or stands still", True


def _is_memory(path: Path) -> bool:
    try:
        marks = read_json(path)
    except ValueError:
        return False
    return bool(marks) and all(isinstance(mark, list) for mark in marks.values())


def _told(builder: Mapping[str, Any]) -> str:
    return f"by {named(str(builder['owner']))} since {builder['since']}: {builder.get('told', 'at work')}"


def _size(path: Path) -> int:
    return sum(part.lstat().st_size for part in (path, *path.rglob("*")) if part.is_symlink() or part.is_file())


def _used(folder: Path) -> float | None:
    try:
        return memory_of(folder).stat().st_mtime
    except OSError:
        return None


def discard(found: Found, say: Callable[[str], None]) -> str:
    """Remove it with what lies beside it; an empty text, or why it stays. Raises OSError.

    Nobody can begin to build or use it meanwhile, and a kill leaves at most something that is a leftover again.
    """
    with claimed(found.target, say) as mine:
        if not mine:
            return "somebody is building it"
        if found.state == "leftover":
            if found.path == memory_of(found.target) and found.target.exists():
                return "its artifact is back"
            _delete(found.path)
            return ""
        try:
            unchanged = read(found.path) == found.manifest
        except ManifestError:
            unchanged = found.state == "damaged"
        if not unchanged:
            return "it was built anew meanwhile"
        with alone(found.path) as unused:
            if not unused:
                return "a process that lives uses it"
            remove(found.path)
        for name in (f".{found.path.name}.verified", f".{found.path.name}.failed", f".{found.path.name}.recipe.yaml"):
            found.path.with_name(name).unlink(missing_ok=True)
    return ""


def _delete(path: Path) -> None:
    with suppress(FileNotFoundError):  # the next writer of this target was faster
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink()
