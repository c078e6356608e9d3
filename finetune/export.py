"""What a run leaves beside its checkpoints: the model alone, and a Megatron checkpoint.

``OUTPUT_DIR/hf-STEP`` holds the trained model as Hugging Face reads it, an adapter merged into its base; where all weights
were trained it shares the files of the checkpoint, as hard links. ``OUTPUT_DIR/mcore-STEP`` is made from it.
"""

import os
import shutil
from argparse import ArgumentError, Namespace
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from ..bridge.convert_cli import parser, target_of
from ..storage.assets import is_asset, read_json
from ..storage.manifest import read, verify
from ..storage.publish import publish

Say = Callable[[str], None]
_ADAPTER = "adapter_config.json"
_AT_STEP = "iteration=step"
_EXPORT = ("--to", "mcore", "--load", "")
# Flags of a conversion that a run answers itself.
_NO_EXPORT = (
    "load", "save", "source", "target", "hf_config", "model_type_hf", "max_shard_size", "dry_run", "overwrite",
    "enable_hf2mg_convert", "mg_cache_dir", "adapter", "lora", "lora_alpha", "lora_r", "lora_target_modules",
)  # fmt: skip


def parse_export(text: str) -> Namespace:
    """``tp=2,pp=2,format=torch`` as flags of ``finebridge convert``; ``iteration=step`` is that of the run. Raises ValueError."""
    words = [*_EXPORT, *export_words(text)]
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


def export_words(text: str) -> list[str]:
    """``tp=2,format=torch`` as words of a command line; ``iteration=step`` is none of them. Raises ValueError."""
    words: list[str] = []
    for part in text.split(","):
        key, equals, value = part.partition("=")
        if not equals and words[-2:-1] == ["--num_layer_list"]:
            words[-1] += f",{part}"
        elif not equals:
            raise ValueError(f"--export_mcore {text}: {part!r}; pairs like tp=2,pp=2,format=torch are expected")
        elif part != _AT_STEP:
            words += [f"--{'ckpt_format' if key == 'format' else key}", value]
    return words


def check_export(flags: Namespace, model: Path) -> None:
    """Plan the export with the weights that the run starts from, so that its layout cannot fail after the training.

    Raises ValueError.
    """
    from ..bridge.convert import plan
    from ..bridge.source import open_source

    try:
        source = open_source(model)
        with source.tensors:
            plan(source, target_of(flags, 0)).lines()
    except ValueError as error:
        raise ValueError(f"--export_mcore: {error}") from None


def last_checkpoint(output_dir: Path) -> tuple[Path, int]:
    """The checkpoint with which the run ended and its step, as its own record tells: an older run may have left later ones.

    Its files are looked at, not read. Raises ManifestError, ValueError.
    """
    state = output_dir / "trainer_state.json"
    if not state.is_file():
        raise ValueError(f"{state} is missing, which tells the step at which the run ended")
    step = int(read_json(state)["global_step"])
    verify(output_dir / f"checkpoint-{step}", hashes=False)
    return output_dir / f"checkpoint-{step}", step


def leave_model(checkpoint: Path, base: Path | None, output: Path, dtype: str | None, say: Say = print) -> None:
    """Make ``output`` the model of a checkpoint alone: merged into ``base`` when it is an adapter, else its own files.

    ``dtype`` is that of merged weights, None for the base's. What ``output`` held is replaced. Raises AdapterError,
    ManifestError, ValueError, OSError with ENOSPC.
    """
    if (checkpoint / _ADAPTER).is_file():
        if base is None:
            raise ValueError(f"{checkpoint} is an adapter; a folder is needed that holds its base")
        _merged(checkpoint, base, output, dtype, say)
        return
    manifest = read(checkpoint)
    parts = [name for name in manifest["files"] if _is_model(checkpoint / name)]
    written = {name: manifest["files"][name] for name in parts}
    linked = True
    with publish(
        output, kind="model", made_from={"checkpoint": checkpoint.name}, replace=True, written=written
    ) as folder:
        for name in parts:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            linked = _link(checkpoint / name, folder / name) and linked
    how = "shares the files of" if linked else "is a copy of the model in"
    say(f"model: wrote {output}, which {how} {checkpoint}")


def _is_model(path: Path) -> bool:
    weights = path.suffix == ".safetensors" or path.name.endswith(".index.json")
    return weights or is_asset(path)


def _link(source: Path, target: Path) -> bool:
    """Whether ``target`` is the same file now; on file systems without hard links it is a copy."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
        return False
    return True


def _merged(adapter: Path, base: Path, output: Path, dtype: str | None, say: Say) -> None:
    from ..bridge.convert import DTYPES, check_weights
    from ..merge.merge_lora import merge
    from ..storage.safe_load import open_weights
    from ..storage.safetensors_io import main_dtype

    check_weights(adapter)
    if dtype is None:
        with open_weights(base) as weights:
            stored = main_dtype(weights.shapes, weights.dtypes)
        dtype = next((name for name, known in DTYPES.items() if known == stored), "fp32")
    proof = merge(base, [adapter], output, dtype, overwrite=True, say=say)
    for line in proof.lines(dtype):
        say(f"model: {line}")
    say(f"model: wrote {output}: {adapter} merged into {base} ({dtype})")


def export(flags: Namespace, model: Path, output: Path, step: int, say: Say = print) -> None:
    """Convert a Hugging Face model to a Megatron checkpoint in ``output``, replacing what it held.

    Raises BridgeError, ManifestError, ValueError, OSError with ENOSPC.
    """
    from ..bridge.convert import convert, plan
    from ..bridge.source import open_source

    target = target_of(flags, 0)
    if flags.at_step:
        target = replace(target, iteration=step)
    source = open_source(model)
    with source.tensors:
        convert(plan(source, target), output, overwrite=True, say=lambda line: say(f"export: {line}"))
    say(
        f"export: wrote {output}: the weights alone, "
        + ("a release" if target.iteration is None else "which Megatron loads with --no-load-optim --no-load-rng")
    )


def export_last(flags: Namespace, base: Path | None, output_dir: Path, say: Say = print) -> Path:
    """Export the checkpoint with which a run ended, an adapter merged into ``base`` first; the Megatron checkpoint.

    Raises what ``last_checkpoint``, ``leave_model`` and ``export`` do.
    """
    model, step = last_checkpoint(output_dir)
    if (model / _ADAPTER).is_file():
        leave_model(model, base, output_dir / f"hf-{step}", flags.dtype, say)
        model = output_dir / f"hf-{step}"
    export(flags, model, output_dir / f"mcore-{step}", step, say)
    return output_dir / f"mcore-{step}"
