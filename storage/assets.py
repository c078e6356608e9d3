"""Carry what lies beside the weights: tokenizer, chat template, generation config, processor, remote code, auto_map.

Nothing is named after a model: every file that is neither a weight nor a trainer's own state belongs to the model.
"""

import json
import shutil
from collections.abc import Collection
from pathlib import Path
from typing import Any

_WEIGHTS = (".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".distcp", ".npz")
_NOT_ASSETS = {
    "manifest.json", "trainer_state.json", "training_args.bin", "latest", "rejects.jsonl", "README.md",
    "zero_to_fp32.py", "zero_to_torch.py",
}  # fmt: skip
_TEMPLATES = "additional_chat_templates"  # where transformers keeps named templates
_TOKENIZER_STEMS = ("tokenizer", "special_tokens_map", "added_tokens", "vocab", "merges", "chat_template", _TEMPLATES)


def is_asset(path: Path) -> bool:
    """Whether a file in a model folder describes the model rather than holds its weights or a run's state."""
    name = path.name
    if name in _NOT_ASSETS or name.startswith((".", "adapter_", "events.out")):
        return False
    return path.is_file() and not name.endswith(_WEIGHTS) and not name.endswith(".index.json")


def is_tokenizer_asset(name: str) -> bool:
    """Whether a file name belongs to the tokenizer (its data, settings or chat template)."""
    return name.startswith(_TOKENIZER_STEMS) or name.endswith((".tiktoken", ".model", ".jinja"))


def carry(source: Path, target: Path, *, skip: Collection[str] = ()) -> list[str]:
    """Copy every asset of ``source`` that ``target`` lacks; the names copied.

    Files that the writer of ``target`` made itself (its config.json, its tokenizer) are never overwritten. When the
    source's config names remote code in ``auto_map`` and the target's does not, the entry is added: without it the
    copied ``.py`` files could not be found.
    """
    copied: list[str] = []
    for path in sorted(source.iterdir()):
        if is_asset(path) and path.name not in skip and not (target / path.name).exists():
            shutil.copyfile(path, target / path.name)
            copied.append(path.name)
    templates = source / _TEMPLATES
    if templates.is_dir() and _TEMPLATES not in skip and not (target / _TEMPLATES).exists():
        shutil.copytree(templates, target / _TEMPLATES)
        copied.append(_TEMPLATES)
    for name in ("config.json", "tokenizer_config.json"):
        _carry_auto_map(source / name, target / name)
    return copied


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file. Raises ValueError naming the file when it is something else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is expected")  # noqa: TRY004
    return value


def _carry_auto_map(source: Path, target: Path) -> None:
    if not (source.is_file() and target.is_file()):
        return
    auto_map = read_json(source).get("auto_map")
    settings = read_json(target)
    if auto_map and "auto_map" not in settings:
        settings["auto_map"] = auto_map
        target.write_text(json.dumps(settings, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
