"""Load a tokenizer from a folder or the Hub, with one clear message when that fails; and tell two of them apart."""

import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..storage.assets import is_tokenizer_asset, read_json
from ..storage.manifest import file_sha256
from .schema import DataError


def load_tokenizer(path: str, *, trust_remote_code: bool = False, cache_dir: str | None = None) -> Any:
    """The tokenizer of a folder or Hub name, by transformers. Raises DataError naming the path and what is wrong."""
    folder = Path(path)
    if folder.is_dir() and not any(is_tokenizer_asset(file.name) for file in folder.iterdir()):
        raise DataError(f"{path}: no tokenizer there (no tokenizer.json, tokenizer_config.json or vocabulary)")
    if not folder.exists() and (len(folder.parts) != 2 or folder.parent.is_dir() or path.startswith((".", "/"))):  # noqa: PLR2004
        raise DataError(f"{path}: no such folder (the current folder is {Path.cwd()})")
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code, cache_dir=cache_dir)
    except Exception as error:
        hint = remote_code_hint(folder, allowed=trust_remote_code)
        raise DataError(f"the tokenizer of {path} does not load: {type(error).__name__}: {error}{hint}") from error


def vocabulary_size(tokenizer: Any) -> int:
    """One more than the largest id of a tokenizer, added tokens included; ``len(tokenizer)`` is less where ids are left out."""
    return 1 + max((*tokenizer.get_vocab().values(), *tokenizer.added_tokens_decoder), default=-1)


def remote_code_hint(folder: Path, *, allowed: bool) -> str:
    """A line for the user when a folder's configs name Python code of their own that may not run."""
    names = ("config.json", "tokenizer_config.json")
    if allowed or not any((folder / name).is_file() and "auto_map" in read_json(folder / name) for name in names):
        return ""
    return f"\n{folder} comes with Python code of its own; read it, then allow it with --trust_remote_code"


@dataclass(frozen=True, slots=True)
class TokenizerSource:
    """Where a tokenizer comes from; it is loaded only when something must be built and ``loaded`` is not given."""

    path: str
    trust_remote_code: bool = False
    cache_dir: str | None = None
    loaded: Any = None

    def load(self) -> Any:
        """The tokenizer, by transformers. Raises DataError."""
        return self.loaded or load_tokenizer(
            self.path, trust_remote_code=self.trust_remote_code, cache_dir=self.cache_dir
        )


def tokenizer_sha256(path: str, load: Callable[[], Any]) -> str:
    """A hash of a tokenizer: of its files (chat template, settings, code) for a folder, else of what is loaded."""
    digest = hashlib.sha256()
    if os.path.isdir(path):  # noqa: PTH112 - a Hub name is no path
        for file in sorted(Path(path).iterdir()):
            if file.is_file() and (is_tokenizer_asset(file.name) or file.suffix == ".py"):
                digest.update(f"{file.name}\n{file_sha256(file)}\n".encode())
        return digest.hexdigest()
    tokenizer = load()
    backend = getattr(tokenizer, "backend_tokenizer", None)
    words = backend.to_str() if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)
    special = json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}, sort_keys=True)
    digest.update(f"{type(tokenizer).__name__}\n{special}\n{words}\n{tokenizer.chat_template}".encode())
    return digest.hexdigest()
