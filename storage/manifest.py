"""What an artifact is: its files, sizes, checksums, tensors, tools and sources; and the check that it is still that.

A *published* artifact is a folder with a ``manifest.json`` that was written last. Readers trust a folder only when its
manifest verifies; "newest" means the highest step that verifies, never the newest modification time.
"""

import json
import platform
import re
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import orjson

from .hashing import algorithm_of, file_digest, file_entry, text_digest
from .progress import Advance

MANIFEST_NAME = "manifest.json"
FORMAT = 2  # 1 had SHA-256 entries and no seal; it is still read
_SEAL = ',\n "checksum": "{}"\n}}\n'
_TOOLS = ("finebridge", "torch", "transformers", "deepspeed", "peft", "tokenizers", "safetensors", "numpy")
_MAX_HEADER = 100 * 1024 * 1024  # the safetensors format's own limit for its JSON header, bytes


class ManifestError(ValueError):
    """An artifact is not whole: a file is missing, changed, cut or unreadable. The message names the file."""


def file_sha256(path: Path, advance: Advance | None = None) -> str:
    """SHA-256 of a file's bytes as lower-case hex, for keys of what was made from it; ``advance`` as in ``file_digest``."""
    return file_digest(path, "sha256", advance)


def files_below(folder: Path) -> Iterator[Path]:
    """Every regular file below ``folder`` but the manifest, in sorted order.

    Raises ManifestError on a symbolic link: a manifest speaks for bytes that lie in the folder itself.
    """
    for path in sorted(folder.rglob("*")):
        if path.is_symlink():
            raise ManifestError(f"{path}: a published artifact holds no symbolic links")
        if path.is_file() and path != folder / MANIFEST_NAME:
            yield path


def safetensors_header(path: Path) -> dict[str, Any]:
    """The JSON header of a safetensors file: tensor name -> {dtype, shape, data_offsets}.

    Source: the safetensors format, 8 bytes little-endian length, then JSON. Raises ManifestError on a broken header.
    """
    with path.open("rb") as stream:
        length = int.from_bytes(stream.read(8), "little")
        if not len("{}") <= length <= min(_MAX_HEADER, path.stat().st_size - 8):
            raise ManifestError(f"{path}: not a safetensors file (its header claims {length} bytes)")
        try:
            header = orjson.loads(stream.read(length))
        except ValueError as error:
            raise ManifestError(f"{path}: the safetensors header is not JSON: {error}") from None
    if not isinstance(header, dict):
        raise ManifestError(f"{path}: the safetensors header is no JSON object")
    header.pop("__metadata__", None)
    try:
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except (KeyError, TypeError, IndexError):
        raise ManifestError(f"{path}: the safetensors header lacks a tensor's place") from None
    if end != path.stat().st_size:
        raise ManifestError(f"{path}: {path.stat().st_size} bytes, its header promises {end}; the file was cut")
    return header


def data_start(path: Path) -> int:
    """Where the bytes of a safetensors file's tensors begin: after its length field and header."""
    with path.open("rb") as stream:
        return 8 + int.from_bytes(stream.read(8), "little")


def describe(
    folder: Path, kind: str, made_from: Mapping[str, Any], written: Mapping[str, Mapping[str, Any]] | None = None
) -> dict[str, Any]:
    """The manifest of ``folder`` as it lies on disk.

    ``kind`` says what it is (``checkpoint``, ``merged``, ``dataset``); ``made_from`` is whatever its maker wants to be
    able to prove later (JSON values). ``written`` holds entries that were hashed while the files were written (see
    ``hashing.Ledger``); all other files are read. Raises ManifestError when a file has not the size that was written.
    """
    written = written or {}
    files: dict[str, Any] = {}
    tensors: dict[str, Any] = {}
    for path in files_below(folder):
        name = path.relative_to(folder).as_posix()
        entry = files[name] = dict(written[name]) if name in written else file_entry(path)
        if path.stat().st_size != entry["size"]:
            raise ManifestError(f"{path}: {path.stat().st_size} bytes on disk, {entry['size']} were written")
        if path.suffix == ".safetensors":
            header = safetensors_header(path)
            tensors[name] = {key: [entry["dtype"], *entry["shape"]] for key, entry in header.items()}
    return {
        "format": FORMAT,
        "kind": kind,
        "created": datetime.now(UTC).isoformat(timespec="seconds"),
        "files": files,
        "tensors": tensors,
        "made_from": dict(made_from),
        "tools": tool_versions(),
    }


def dump(manifest: Mapping[str, Any]) -> str:
    """A manifest as the text of its file, sealed by a checksum of the text itself."""
    body = json.dumps(manifest, indent=1, ensure_ascii=False).removesuffix("\n}")
    return body + _SEAL.format(text_digest(body.encode()))


def _is_sealed(data: bytes) -> bool:
    body, found, _ = data.rpartition(_SEAL.partition("{}")[0].encode())
    return bool(found) and data == body + _SEAL.format(text_digest(body)).encode()


def tool_versions() -> dict[str, str]:
    """Version of Python and of every installed library that shapes an artifact."""
    versions = {"python": platform.python_version()}
    for name in _TOOLS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return versions


def read(folder: Path) -> dict[str, Any]:
    """The manifest of a published artifact. Raises ManifestError when there is none or it is not readable."""
    path = folder / MANIFEST_NAME
    try:
        data = path.read_bytes()
        manifest = json.loads(data.decode())
    except FileNotFoundError:
        raise ManifestError(
            f"{folder}: no {MANIFEST_NAME}; it was never completed, or something else made it"
        ) from None
    except ValueError as error:
        raise ManifestError(f"{path}: not JSON: {error}") from None
    if not isinstance(manifest, dict) or manifest.get("format") not in (1, FORMAT):
        raise ManifestError(f"{path}: not a manifest of format {FORMAT}")
    if manifest["format"] == FORMAT and not _is_sealed(data):
        raise ManifestError(f"{path}: damaged, its text does not fit its own checksum")
    files = manifest.get("files")
    if not isinstance(files, dict) or not all(
        isinstance(entry, dict) and "size" in entry and algorithm_of(entry) for entry in files.values()
    ):
        raise ManifestError(f"{path}: damaged, it does not list files with size and a known checksum")
    return manifest


def verify(folder: Path, *, hashes: bool = True) -> dict[str, Any]:
    """The manifest of ``folder`` after checking the files against it.

    With ``hashes`` false only presence and size are checked. Raises ManifestError naming the first file that is
    missing, cut, changed or not listed.
    """
    manifest = read(folder)
    for fault in faults(folder, manifest, hashes=hashes):
        raise ManifestError(fault)
    return manifest


def faults(folder: Path, manifest: Mapping[str, Any], *, hashes: bool = True) -> Iterator[str]:
    """A sentence for each file of ``folder`` that is not what its manifest says. Raises ManifestError on a symbolic link."""
    present = {path.relative_to(folder).as_posix(): path for path in files_below(folder)}
    for name, entry in manifest["files"].items():
        path = present.pop(name, None)
        algorithm = str(algorithm_of(entry))
        if path is None:
            yield f"{folder / name}: missing"
        elif (size := path.stat().st_size) != entry["size"]:
            yield f"{path}: {size} bytes, the manifest says {entry['size']}"
        elif hashes and file_digest(path, algorithm) != entry[algorithm]:
            yield f"{path}: its checksum ({algorithm}) is not the manifest's; the file was changed or is damaged"
    for path in present.values():
        yield f"{path}: not listed in the manifest; it was added later"


def steps(parent: Path, prefix: str = "checkpoint-") -> list[tuple[int, Path]]:
    """Every ``{prefix}{step}`` folder of ``parent`` as (step, path), highest step first, verified or not."""
    if not parent.is_dir():
        return []
    pattern = re.compile(re.escape(prefix) + r"(\d+)$")
    found = [(int(m.group(1)), path) for path in parent.iterdir() if path.is_dir() and (m := pattern.match(path.name))]
    return sorted(found, reverse=True)


def newest_verified(parent: Path, prefix: str = "checkpoint-") -> tuple[Path | None, list[str]]:
    """The verified artifact of the highest step, and why each higher one was passed over."""
    passed_over: list[str] = []
    for _, path in steps(parent, prefix):
        try:
            verify(path)
        except ManifestError as error:
            passed_over.append(str(error))
        else:
            return path, passed_over
    return None, passed_over
