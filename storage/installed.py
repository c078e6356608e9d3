"""What is installed on this machine, as far as the machines of one run must agree: versions, and our own code by file."""

import hashlib
import platform
import re
from collections.abc import Mapping
from importlib import metadata, util
from pathlib import Path

from .. import __version__

_PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "accelerate",
    "peft",
    "safetensors",
    "tokenizers",
    "numpy",
    "triton",
    "flash-attn",
    "nvidia-nccl-cu12",
    "nvidia-nccl-cu13",
)
_CODE = ("*.py", "*.json", "*/*.py", "*/*.jinja")  # of a room; deeper may lie what a run has made
_SHOWN = 3  # files that are named
Installed = dict[str, dict[str, str]]


def installed() -> Installed:
    """``versions`` by name, "" for what is not installed, and ``code``: file -> hash. No package is imported."""
    found = {name: _version(name) for name in _PACKAGES}
    return {
        "versions": {"Python": platform.python_version(), "finebridge": __version__, **found, "CUDA of torch": _cuda()},
        "code": _code(Path(__file__).parents[1]),
    }


def differences(theirs: Installed, wanted: Installed) -> list[str]:
    """How a machine differs from another, a sentence each."""
    said = [
        f"{name} {has or 'is not installed'}, not {version or 'there elsewhere'}"
        for name, version in wanted["versions"].items()
        if (has := theirs["versions"].get(name, "")) != version
    ]
    return [*said, *different_code(theirs["code"], wanted["code"])]


def different_code(theirs: Mapping[str, str], wanted: Mapping[str, str]) -> list[str]:
    """The files of finebridge that differ, in one sentence, or none."""
    files = sorted(name for name in {*theirs, *wanted} if theirs.get(name) != wanted.get(name))
    more = f" and {len(files) - _SHOWN} more" if len(files) > _SHOWN else ""
    return [f"finebridge's files differ: {', '.join(files[:_SHOWN])}{more}"] if files else []


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


def _cuda() -> str:
    """The CUDA (or ROCm) that torch was built for; read, as importing torch takes seconds."""
    spec = util.find_spec("torch")
    if spec is None or spec.origin is None:
        return ""
    text = (Path(spec.origin).parent / "version.py").read_text(encoding="utf-8")
    found = re.search(r"^(?:cuda|hip)\b[^=\n]*= '([^']+)'", text, re.MULTILINE)
    return found[1] if found else "none"


def _code(package: Path) -> dict[str, str]:
    """Hashes of the files of the package's rooms; a checkout has other folders beside them."""
    rooms = [folder for folder in package.iterdir() if (folder / "__init__.py").is_file()]
    files = [package / "__init__.py", *(file for room in rooms for pattern in _CODE for file in room.glob(pattern))]
    return {str(file.relative_to(package)): hashlib.sha256(file.read_bytes()).hexdigest()[:12] for file in files}
