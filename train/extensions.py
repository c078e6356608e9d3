"""DeepSpeed's compiled parts: built before training, once a machine, and only those that the settings need.

torch's own build lock is a plain file: a killed build leaves it, and every later run waits for ever without a word. The
build folder is finebridge's own and is only used under a lock of the kernel, so a file left there has no owner.
"""

import os
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..ds_configs.resolve import compiled_ops
from ..storage.once import locked

_BUILDERS = {
    "cpu_adam": "CPUAdamBuilder", "cpu_adagrad": "CPUAdagradBuilder", "cpu_lion": "CPULionBuilder",
    "fused_adam": "FusedAdamBuilder", "fused_lamb": "FusedLambBuilder", "fused_lion": "FusedLionBuilder",
    "async_io": "AsyncIOBuilder", "pin_memory": "PinMemoryBuilder",
}  # fmt: skip


class ExtensionError(ValueError):
    """A compiled part that the settings need cannot be had here; the message names it and what would do without."""


def prepare(settings: dict[str, Any], tell: Callable[[str], None]) -> list[str]:
    """Build and load what the settings need; their names. One process a machine compiles, the others wait and load.

    Raises ExtensionError.
    """
    needed = compiled_ops(settings)
    if needed:
        root = Path(os.environ.setdefault("TORCH_EXTENSIONS_DIR", str(folder())))
        venv = str(Path(sys.executable).parent)  # its ninja
        os.environ["PATH"] = f"{venv}{os.pathsep}{os.environ.get('PATH', '')}"
        plain_architectures(tell)
        with locked(root / ".finebridge.lock", tell):
            for op in needed:
                _load(op, root, tell)
    return needed


def plain_architectures(tell: Callable[[str], None]) -> None:
    """DeepSpeed's builder reads ``TORCH_CUDA_ARCH_LIST`` as numbers and dies of 9.0a, as some images set it."""
    given = os.environ.get("TORCH_CUDA_ARCH_LIST", "")
    plain = re.sub(r"(\d+\.\d+)[a-z]+", r"\1", given)
    if plain != given:
        os.environ["TORCH_CUDA_ARCH_LIST"] = plain
        tell(f"TORCH_CUDA_ARCH_LIST {given}: taken as {plain}, as DeepSpeed cannot build for the other")


def folder() -> Path:
    """Where the parts of this Python and torch lie: ``~/.cache/finebridge/torch_extensions/...``."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache"))
    versions = f"py{sys.version_info.major}{sys.version_info.minor}_{torch.__version__}"
    return cache / "finebridge" / "torch_extensions" / versions


def _load(op: str, root: Path, tell: Callable[[str], None]) -> None:
    from deepspeed.accelerator import get_accelerator

    accelerator: Any = get_accelerator()
    stale = root / op / "lock"
    if stale.exists():
        tell(f"a build of DeepSpeed's {op} was killed and left {stale}, on which torch would wait for ever: removed")
        stale.unlink()
    if not any((root / op).glob("*.so")):
        tell(f"compiling DeepSpeed's {op} into {root} (once, a few minutes on a small machine)")
    try:
        accelerator.create_op_builder(_BUILDERS[op]).load(verbose=False)
    except Exception as error:
        raise ExtensionError(
            f"--deepspeed needs DeepSpeed's compiled {op}, which cannot be built here: {error}. It needs a C++ compiler and "
            "ninja (on a GPU the CUDA toolkit of torch's version too); settings without offload and without an optimizer "
            "block need none, for example ds_zero3_no_offload"
        ) from error
