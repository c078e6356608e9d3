"""Checkpoints of any form, opened: told apart by their files, with their config and the table of their family."""

from collections.abc import Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..storage.assets import read_json
from ..storage.megatron_folder import TRACKER
from .dist_format import DistCheckpoint
from .errors import BridgeError
from .families import family_of
from .family import Family, Row, of_text
from .hf import HFCheckpoint
from .lora_views import Beside, Merged
from .parallel import OUTPUT
from .plain_config import to_config
from .torch_format import TorchCheckpoint, tracked

Form = Literal["hf", "torch", "torch_dist"]
_UNTIED = "untie_embeddings_and_output_weights"  # what Pai-Megatron-Patch sets for every model of several stages

# Canonical tensors of any form on disk: shapes and dtypes by name from headers, content one tensor at a time.
Stored = HFCheckpoint | TorchCheckpoint | DistCheckpoint
Checkpoint = Stored | Merged | Beside


def form_of(folder: Path) -> Form:
    """The form of a checkpoint's folder. Raises BridgeError when it is none that is known."""
    if not folder.is_dir():
        raise BridgeError(f"{folder}: no such folder")
    inside = tracked(folder)
    if (inside / ".metadata").is_file():
        return "torch_dist"
    if any(inside.glob("mp_rank_*")):
        return "torch"
    if (folder / "adapter_config.json").is_file():
        raise BridgeError(f"{folder}: a LoRA adapter, no model; convert takes it as --load or --adapter")
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return "hf"
    raise BridgeError(
        f"{folder}: no checkpoint that is known: no {TRACKER} or .metadata, no mp_rank_* folders, no safetensors or .bin"
    )


@dataclass(slots=True)
class Source:
    """An opened checkpoint with what is known of its model: config.json's content and the table.

    ``only`` names the tensors that there are when it is not the model alone, see ``lora_source``; ``args`` are Megatron
    arguments that follow from them.
    """

    folder: Path
    form: Form
    tensors: Checkpoint
    config: dict[str, Any]
    config_folder: Path | None  # that config, tokenizer and code come from
    family: Family
    only: Sequence[Row] | None = None
    args: dict[str, Any] = field(default_factory=dict[str, Any])
    known: tuple[Row, ...] | None = None  # see whole()

    def rows(self) -> list[Row]:
        """What is to be converted."""
        return list(self.whole() if self.only is None else self.only)

    def whole(self) -> Collection[Row]:
        """What the whole model has; the table of a large one takes a quarter of a second."""
        if self.known is None:
            stored = self.stored
            known = stored.rows.values() if isinstance(stored, HFCheckpoint) else self.family.rows(self.config)
            self.known = tuple(known)
        return self.known

    @property
    def names(self) -> str:
        """Whose names a Megatron checkpoint has, in words; empty for Hugging Face's."""
        stored = self.stored
        if stored is None or isinstance(stored, HFCheckpoint):
            return ""
        return " or ".join(stored.dialects) or "several dialects"

    @property
    def stored(self) -> Stored | None:
        """What is on disk, below a view of it; None where all tensors were made."""
        return self.tensors.base if isinstance(self.tensors, Merged | Beside) else self.tensors


def open_source(
    folder: Path, *, hf_config: Path | None = None, family: str | None = None, dialect: str | None = None
) -> Source:
    """Open a checkpoint of any form. A Megatron checkpoint without a config.json gets one from its args.

    With ``dialect`` it must have its names. Raises BridgeError, FileNotFoundError, ValueError for what is wrong on disk.
    """
    form = form_of(folder)
    config_folder = next((place for place in (hf_config, folder) if place and (place / "config.json").is_file()), None)
    if hf_config and config_folder != hf_config:
        raise BridgeError(f"--hf_config {hf_config}: no config.json there")
    if form == "hf":
        if dialect:
            raise BridgeError(f"--dialect {dialect}: {folder} is a checkpoint of Hugging Face, which has no dialects")
        if config_folder is None:
            raise BridgeError(f"{folder}: no config.json; name the folder that has it with --hf_config")
        config = read_json(config_folder / "config.json")
        table = family_of(config, family)
        tensors = HFCheckpoint(folder, config, table)
        return Source(folder, form, tensors, tensors.config, config_folder, table)
    known = read_json(config_folder / "config.json") if config_folder else None
    if form == "torch_dist":
        mcore = DistCheckpoint(tracked(folder))
    else:  # the arguments' own vocab_size may be the tokenizer's, below the rows that the model was made with
        mcore = TorchCheckpoint(folder, vocab_size=of_text(known).get("vocab_size") if known else None)
    config = known or to_config(mcore.args)
    table = family_of(config, family)
    config = table.as_stored(config, mcore.shapes, hf=False)
    if table.tied(config) and OUTPUT in mcore.shapes and mcore.args.get(_UNTIED) is True:
        config |= {"tie_word_embeddings": False}
        mcore.said.append(f"config.json ties the embeddings, but the run untied them ({_UNTIED}): they stay so")
    source = Source(folder, form, mcore, config, config_folder, table)
    if dialect and dialect not in mcore.dialects:
        raise BridgeError(f"--dialect {dialect}: {folder} has the names of {source.names}")
    return source
