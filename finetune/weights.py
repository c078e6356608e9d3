"""The weights that a run starts from: a Hugging Face folder as it is, or a Megatron checkpoint, converted once.

The trainer reads Hugging Face folders. A Megatron checkpoint is converted ahead of the ranks into a folder whose name is a
hash of all that it is made from.
"""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from ..storage.assets import is_asset, is_tokenizer_asset
from ..storage.megatron_folder import is_megatron
from ..storage.source_hashes import source_sha256
from ..train.arguments import Arguments
from .arguments import RunArguments

if TYPE_CHECKING:
    from ..bridge.convert import Target

Say = Callable[[str], None]
_WEIGHTS = (".safetensors", ".bin", ".index.json")
_STATES = ("training_args.bin",)


def identity(folder: Path, memory: Path, say: Say = print) -> str:
    """A hash of the model in a Hugging Face folder, or of the adapter in a PEFT folder: weights, configs, tokenizer, code.

    ``memory`` keeps the hashes of files, so that one that has not changed is not read again. Raises OSError.
    """
    weights = {path for path in folder.iterdir() if path.name.endswith(_WEIGHTS) and path.name not in _STATES}
    files = sorted(weights | {path for path in folder.iterdir() if is_asset(path)})
    hashes = source_sha256(files, memory, say)
    return hashlib.sha256(json.dumps([[file.name, hashes[file]] for file in files]).encode()).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Start:
    """What a run starts from. ``model`` is None for a new model and for a name on the Hub, which the ranks load.

    ``config`` is the folder of config.json and tokenizer of a Megatron checkpoint that has none beside it, ``cache`` where its
    conversion is kept.
    """

    model: Path | None
    config: Path | None
    cache: Path

    @property
    def megatron(self) -> bool:
        """Whether it must be converted first."""
        return self.model is not None and is_megatron(self.model)

    def key(self, say: Say = print) -> str:
        """A hash of all that shapes the conversion. Raises BridgeError, OSError."""
        from ..bridge.kept import key_of

        assert self.model is not None
        return key_of(self.model, self.config, _target(), self.cache, say)

    def folder(self, say: Say = print) -> Path | None:
        """The Hugging Face folder that the ranks load, whether it stands already or not."""
        return self.cache / self.key(say) if self.megatron else self.model

    def make(self, say: Say = print) -> Path | None:
        """Convert what must be, when it does not stand yet; the folder that the ranks load.

        Safe to call from many processes. Raises BridgeError, ManifestError, ValueError, OSError with ENOSPC.
        """
        return from_megatron(self.model, self.config, self.cache, say) if self.model and self.megatron else self.model


def start_of(args: Arguments, run: RunArguments) -> Start:
    """What a run starts from. Raises ValueError for flags that do not go together."""
    named = args.model.model_name_or_path
    model = Path(named) if named and Path(named).is_dir() else None
    cache = Path(run.converted_weights_dir or Path(args.hf["output_dir"]) / "converted_weights")
    start = Start(model, Path(run.hf_config) if run.hf_config else None, cache)
    if run.converted_weights_dir and not start.megatron:
        raise ValueError("--converted_weights_dir is for a Megatron checkpoint as --model_name_or_path")
    if start.config and not (start.megatron or run.enable_hf2mg_convert):
        raise ValueError("--hf_config is for a Megatron checkpoint as --model_name_or_path")
    if start.config and not (start.config / "config.json").is_file():
        raise ValueError(f"--hf_config {start.config}: no config.json there")
    if start.megatron and not args.model.tokenizer_name_or_path and not tokenizer_folder(start):
        raise ValueError(
            f"--model_name_or_path {model}: a Megatron checkpoint without tokenizer; name one with "
            "--tokenizer_name_or_path, or the Hugging Face folder of the model with --hf_config"
        )
    return start


def tokenizer_folder(start: Start) -> Path | None:
    """The folder beside the weights that holds a tokenizer: what comes with a conversion."""
    places = [folder for folder in (start.model, start.config) if folder and folder.is_dir()]
    return next((place for place in places if any(is_tokenizer_asset(path.name) for path in place.iterdir())), None)


def from_megatron(model: Path, config: Path | None, cache: Path, say: Say = print) -> Path:
    """A Hugging Face folder with the weights of a Megatron checkpoint, converted when it does not stand in ``cache`` yet.

    Raises what ``Start.make`` does.
    """
    from ..bridge.kept import convert_once, key_of
    from ..bridge.lora_source import LoraFlags, with_lora
    from ..bridge.source import Source, open_source

    wanted = _target()

    def opened() -> Source:
        return with_lora(open_source(model, hf_config=config), wanted, LoraFlags())[0]

    def key_now() -> str:
        return key_of(model, config, wanted, cache, say)

    key = key_of(model, config, wanted, cache, say)
    target = cache / key
    built = convert_once(opened, wanted, target, key, lambda line: say(f"weights: {line}"), key_now)
    say(f"weights: {model} is a Megatron checkpoint; {'converted to' if built else 'reused'} {target}")
    say("weights: nothing else of its run is taken: not its optimizer, random numbers and iteration")
    return target


def _target() -> "Target":
    from ..bridge.convert import Target

    return Target("hf")
