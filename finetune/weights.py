"""Megatron checkpoints at both ends of a run: the one that it starts from, and the one that it leaves.

The trainer reads and writes Hugging Face folders. What it is to start from is converted once, ahead of the ranks, into a
folder whose name is a hash of all that it is made from; what it leaves is merged, if it is an adapter, and converted.
"""

from argparse import ArgumentError, Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..bridge.convert_cli import parser, target_of
from ..storage.assets import is_tokenizer_asset, read_json
from ..storage.manifest import verify
from ..storage.megatron_folder import is_megatron
from ..train.arguments import Arguments
from ..train.hf_flags import hf_value

_ADAPTER = "adapter_config.json"
_AT_STEP = "iteration=step"
_EXPORT = ("--to", "mcore", "--load", "")
# Flags of a conversion that a run answers itself.
_NO_EXPORT = (
    "load", "save", "source", "target", "hf_config", "model_type_hf", "max_shard_size", "dry_run", "overwrite",
    "enable_hf2mg_convert", "mg_cache_dir", "adapter", "lora", "lora_alpha", "lora_r", "lora_target_modules",
)  # fmt: skip


class MegatronEnds:
    """What a run's launcher does before and after the ranks. Raises ValueError for flags that do not go together."""

    def __init__(
        self, args: Arguments, hf_config: str | None, converted_weights_dir: str | None, export_mcore: str | None
    ) -> None:
        self.model = Path(args.model.model_name_or_path) if args.model.model_name_or_path else None
        self.output_dir = Path(args.hf["output_dir"])
        self.config = Path(hf_config) if hf_config else None
        self.cache = Path(converted_weights_dir or self.output_dir / "converted_weights")
        self.flags = parse_export(export_mcore) if export_mcore else None
        self.adapter = args.model.use_lora
        self.comes = self.model is not None and is_megatron(self.model)
        if self.comes and not args.model.tokenizer_name_or_path:
            self._check_tokenizer()
        for name, given in (("hf_config", hf_config), ("converted_weights_dir", converted_weights_dir)):
            if given and not self.comes:
                raise ValueError(f"--{name} is for a Megatron checkpoint as --model_name_or_path")
        if self.config and not (self.config / "config.json").is_file():
            raise ValueError(f"--hf_config {self.config}: no config.json there")
        if self.flags and str(hf_value(args.hf, "save_strategy")) == "no":
            raise ValueError("--export_mcore needs a checkpoint; leave --save_strategy no out")
        if self.flags and self.adapter and not (self.model and self.model.is_dir()):
            raise ValueError(f"--export_mcore with --use_lora needs a folder as --model_name_or_path, not {self.model}")

    def _check_tokenizer(self) -> None:
        places = [folder for folder in (self.model, self.config) if folder and folder.is_dir()]
        if not any(is_tokenizer_asset(path.name) for folder in places for path in folder.iterdir()):
            raise ValueError(
                f"--model_name_or_path {self.model}: a Megatron checkpoint without tokenizer; name one with "
                "--tokenizer_name_or_path, or the Hugging Face folder of the model with --hf_config"
            )

    def before(self) -> Path | None:
        """Convert the weights to start from, where they are Megatron's; then the new folder.

        The export is planned here, so that its layout cannot fail after the training. Raises what ``from_megatron`` does.
        """
        if self.model and self.comes:
            self.model = from_megatron(self.model, self.config, self.cache)
        if self.flags and self.model and self.model.is_dir():
            _check_export(self.flags, self.model)
        elif self.flags:
            print("export: no folder holds the model yet, so the export is planned when it is trained", flush=True)
        return self.model if self.comes else None

    def after(self) -> None:
        """Export what the run left. Raises what ``export`` does."""
        if self.flags:
            export(self.flags, self.model if self.adapter else None, self.output_dir)


def from_megatron(model: Path, config: Path | None, cache: Path, say: Callable[[str], None] = print) -> Path:
    """A Hugging Face folder with the weights of a Megatron checkpoint, converted when it does not stand in ``cache`` yet.

    ``config`` is the folder of config.json and tokenizer where the checkpoint has none. Safe to call from many
    processes. Raises BridgeError, ManifestError, ValueError, OSError with ENOSPC.
    """
    from ..bridge.convert import Target
    from ..bridge.kept import convert_once, key_of
    from ..bridge.lora_source import LoraFlags, with_lora
    from ..bridge.source import Source, open_source

    wanted = Target("hf")

    def opened() -> Source:
        return with_lora(open_source(model, hf_config=config), wanted, LoraFlags())[0]

    key = key_of(model, config, wanted, cache, say)
    target = cache / key
    built = convert_once(opened, wanted, target, key, lambda line: say(f"weights: {line}"))
    say(f"weights: {model} is a Megatron checkpoint; {'converted to' if built else 'reused'} {target}")
    say("weights: nothing else of its run is taken: not its optimizer, random numbers and iteration")
    return target


def parse_export(text: str) -> Namespace:
    """``tp=2,pp=2,format=torch`` as flags of ``finebridge convert``; ``iteration=step`` is that of the run. Raises ValueError."""
    words = [*_EXPORT]
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals and words[-2] == "--num_layer_list":
            words[-1] += f",{part}"
        elif not equals:
            raise ValueError(f"--export_mcore {text}: {part!r}; pairs like tp=2,pp=2,format=torch are expected")
        elif part != _AT_STEP:
            words += [f"--{'ckpt_format' if key == 'format' else key}", value]
    flags = parser()
    flags.exit_on_error = False
    try:
        known, unknown = flags.parse_known_args(words)
    except ArgumentError as error:
        raise ValueError(f"--export_mcore {text}: {error}") from None
    if unknown:
        raise ValueError(f"--export_mcore {text}: {unknown[0].lstrip('-')} is none of the flags of finebridge convert")
    plain = flags.parse_args(_EXPORT)
    if given := [name for name in _NO_EXPORT if getattr(known, name) != getattr(plain, name)]:
        raise ValueError(f"--export_mcore {text}: {given[0]} is not for an export")
    known.at_step = _AT_STEP in text.split(",")
    return known


def _check_export(flags: Namespace, model: Path) -> None:
    from ..bridge.convert import plan
    from ..bridge.source import open_source

    try:
        source = open_source(model)
        with source.tensors:
            plan(source, target_of(flags, 0)).lines()
    except ValueError as error:
        raise ValueError(f"--export_mcore: {error}") from None


def export(flags: Namespace, base: Path | None, output_dir: Path, say: Callable[[str], None] = print) -> Path:
    """Convert the last checkpoint of the run, merged into ``base`` when it is an adapter, to ``output_dir/mcore-STEP``.

    Raises BridgeError, AdapterError, ManifestError, ValueError, OSError with ENOSPC.
    """
    from ..bridge.convert import check_weights, convert, plan
    from ..bridge.source import open_source

    model, step = _last(output_dir)
    if base and (model / _ADAPTER).is_file():
        check_weights(model)
        model = _merged(model, base, output_dir / f"merged-{step}", flags.dtype, say)
    save = output_dir / f"mcore-{step}"
    target = target_of(flags, 0)
    if flags.at_step:
        target = replace(target, iteration=step)
    source = open_source(model)
    with source.tensors:
        convert(plan(source, target), save, overwrite=True, say=lambda line: say(f"export: {line}"))
    say(
        f"export: wrote {save}: the weights alone, "
        + ("a release" if target.iteration is None else "which Megatron loads with --no-load-optim --no-load-rng")
    )
    return save


def _last(output_dir: Path) -> tuple[Path, int]:
    """The checkpoint with which the run ended and its step, as its own record tells: an older run may have left later ones.

    Its weights are compared with their checksums when they are read. Raises ManifestError, ValueError.
    """
    state = output_dir / "trainer_state.json"
    if not state.is_file():
        raise ValueError(f"--export_mcore: {state} is missing, which tells the step at which the run ended")
    step = int(read_json(state)["global_step"])
    verify(output_dir / f"checkpoint-{step}", hashes=False)
    return output_dir / f"checkpoint-{step}", step


def _merged(adapter: Path, base: Path, output: Path, dtype: str | None, say: Callable[[str], None]) -> Path:
    """Base and adapter in one, in the dtype of the base unless told."""
    from ..bridge.convert import DTYPES
    from ..merge.merge_lora import merge
    from ..storage.safe_load import open_weights
    from ..storage.safetensors_io import main_dtype

    if dtype is None:
        with open_weights(base) as weights:
            stored = main_dtype(weights.shapes, weights.dtypes)
        dtype = next((name for name, known in DTYPES.items() if known == stored), "fp32")
    proof = merge(base, [adapter], output, dtype, overwrite=True, say=say)
    for line in proof.lines(dtype):
        say(f"export: {line}")
    say(f"export: merged {adapter} into {output} ({dtype})")
    return output
