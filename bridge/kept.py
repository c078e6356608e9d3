"""Conversions that are kept: made once for the bytes of their sources and the flags that shape them, and found again."""

import hashlib
import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Self

from ..storage.assets import is_asset
from ..storage.manifest import ManifestError, read
from ..storage.once import build_once
from ..storage.progress import Say
from ..storage.source_hashes import source_sha256
from .convert import Target, check_target, plan, write_target
from .errors import BridgeError
from .source import Source, form_of
from .torch_format import tracked

FORMAT = 1  # raise when the same source would be converted otherwise
_WEIGHTS = (".safetensors", ".bin")


class Key(str):
    """A key that tells from which files it is made: their paths and SHA-256."""

    __slots__ = ("files",)
    files: Mapping[str, str]

    def __new__(cls, text: str, files: Mapping[str, str]) -> Self:
        """``text`` is the key itself."""
        key = super().__new__(cls, text)
        key.files = files
        return key


def key_of(load: Path, config: Path | None, target: Target, memory: Path, say: Say = print) -> Key:
    """A hash of all that shapes the conversion of ``load``: its files, those of ``config``, and the target.

    ``memory`` is the folder that keeps the hashes of files, so that one that has not changed is not read again. Raises
    BridgeError, OSError.
    """
    if form_of(load) == "hf":
        weights = {path for path in load.iterdir() if path.name.endswith((*_WEIGHTS, ".index.json"))}
    else:
        weights = {path for path in tracked(load).rglob("*") if path.is_file()}
    described = {path for folder in (load, config) if folder for path in folder.iterdir() if is_asset(path)}
    files = sorted(weights | described)
    hashes = source_sha256(files, memory, say)
    settings = [FORMAT, str(replace(target, workers=1)), [[file.name, hashes[file]] for file in files]]
    key = hashlib.sha256(json.dumps(settings).encode()).hexdigest()[:16]
    return Key(key, {str(file.absolute()): hashes[file] for file in files})


def convert_once(
    opened: Callable[[], Source],
    target: Target,
    save: Path,
    key: Key,
    say: Say = print,
    again: Callable[[], str] | None = None,
) -> bool:
    """Make sure that ``save`` holds the conversion with this key; True when this call made it.

    Safe to call from many processes: one converts, the others wait. Only what an earlier call left there is replaced.
    ``again`` tells the key anew, which must be the same when the source has been read. Raises BridgeError, ManifestError,
    ValueError, OSError with ENOSPC.
    """
    _check_place(save)
    written: dict[str, dict[str, Any]] = {}

    def build(folder: Path, tell: Say) -> Mapping[str, Any]:
        source = opened()
        with source.tensors:
            made = plan(source, target)
            for line in made.lines():
                tell(line)
            check_target(made, save, tell)
            written.update(write_target(folder, made, tell))
        if again and again() != key:
            raise BridgeError(
                f"the files of {save} were written to while they were read; start again when they are whole"
            )
        return {**made.made_from, "files": key.files}

    return build_once(save, build, kind=target.form, say=say, written=written, key=key)


def _check_place(save: Path) -> None:
    """Raise BridgeError when ``save`` holds anything but a kept conversion, for that would be lost."""
    if not save.exists() or (save.is_dir() and not any(save.iterdir())):
        return
    try:
        kept = "key" in read(save)["made_from"]
    except (ManifestError, NotADirectoryError):
        kept = False
    if not kept:
        raise BridgeError(f"{save}: holds something else than a conversion that is kept there; name another folder")
