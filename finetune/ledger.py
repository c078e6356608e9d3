"""Which stages of a run stand: a ledger in its output folder that tells what each artifact was made from.

``OUTPUT_DIR/stages.json`` has an entry a stage: the inputs that shape its artifact, as hashes and flags, the artifact, and
a digest of what lies there. A stage is not done again while its inputs are the same and the artifact is still that.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage.hashing import file_digest
from ..storage.manifest import MANIFEST_NAME, ManifestError
from ..storage.once import verify_once
from ..storage.publish import write_text
from ..storage.source_hashes import source_sha256

NAME = "stages.json"
_SHOWN = 8  # differences that a refusal lists
_LONG = 60  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class Standing:
    """What the ledger says of a stage: its artifact when it stands, whether it was begun with the same inputs."""

    artifact: Path | None
    begun: bool
    why: str = ""


class Ledger:
    """The stages of the run in ``output_dir``; ``memory`` is the folder that keeps the hashes of files."""

    def __init__(self, output_dir: Path, memory: Path) -> None:
        self._folder, self._path, self._memory = output_dir, output_dir / NAME, memory

    def look(self, stage: str, inputs: Mapping[str, Any]) -> Standing:
        """Whether a stage stands with these inputs. A ledger that is damaged knows nothing."""
        entry = self._read().get(stage)
        if not entry:
            return Standing(None, begun=False)
        if entry["inputs"] != _plain(inputs):
            return Standing(None, begun=False, why="; ".join(_differences(entry["inputs"], _plain(inputs))))
        if not entry["artifact"]:
            return Standing(None, begun=True)
        artifact = self._folder / entry["artifact"]
        try:
            whole = self._digest(artifact, entry["files"]) == entry["digest"]
        except (OSError, ManifestError) as error:
            return Standing(None, begun=True, why=str(error))
        return Standing(artifact, begun=True) if whole else Standing(None, begun=True, why=f"{artifact} was changed")

    def inputs(self, stage: str) -> Mapping[str, Any]:
        """What a stage was last made from, or begun with; empty for one that never was."""
        return self._read().get(stage, {"inputs": {}})["inputs"]

    def begin(self, stage: str, inputs: Mapping[str, Any]) -> None:
        """Note that a stage is being made from these inputs, and that what it made before stands no more."""
        self._write(stage, {"inputs": _plain(inputs), "artifact": None})

    def done(self, stage: str, inputs: Mapping[str, Any], artifact: Path, files: Sequence[Path] = ()) -> None:
        """Note that a stage is done; ``files`` where the artifact is no published folder. Raises ManifestError, OSError."""
        names = [str(file.absolute()) for file in files]
        self._write(
            stage,
            {
                "inputs": _plain(inputs), "artifact": self._name(artifact), "files": names,
                "digest": self._digest(artifact, names),
            },
        )  # fmt: skip

    def artifacts(self) -> list[Path]:
        """What the stages made so far."""
        return [self._folder / entry["artifact"] for entry in self._read().values() if entry["artifact"]]

    def _name(self, artifact: Path) -> str:
        """What lies in the output folder is named from there, so that the folder may be moved."""
        here = self._folder.absolute()
        whole = artifact.absolute()
        return str(whole.relative_to(here) if whole.is_relative_to(here) else whole)

    def _digest(self, artifact: Path, files: Sequence[str]) -> Any:
        if files:
            hashes = source_sha256([Path(name) for name in files], self._memory)
            return [hashes[Path(name)] for name in files]
        verify_once(artifact)
        return file_digest(artifact / MANIFEST_NAME)

    def _read(self) -> dict[str, Any]:
        try:
            found = json.loads(self._path.read_text(encoding="utf-8"))
            return {name: entry for name, entry in found.items() if {"inputs", "artifact"} <= entry.keys()}
        except (OSError, ValueError, AttributeError):
            return {}

    def _write(self, stage: str, entry: Mapping[str, Any]) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        write_text(self._path, json.dumps({**self._read(), stage: entry}, indent=1, ensure_ascii=False))


def _plain(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """As they come back from JSON."""
    return json.loads(json.dumps(inputs, default=str))


def _differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    names = [name for name in {**then, **now} if then.get(name) != now.get(name)]
    told = [f"{name} was {_short(then.get(name))}, is {_short(now.get(name))}" for name in names[:_SHOWN]]
    return [*told, f"and {len(names) - _SHOWN} more"] if len(names) > _SHOWN else told


def _short(value: Any) -> str:
    text = "not given" if value is None else str(value)
    return text if len(text) <= _LONG else f"{text[:_LONG]}..."
