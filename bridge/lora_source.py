"""Checkpoints with LoRA as sources of a conversion: merged, beside the model, or LoRA alone.

What LoRA there is, PEFT's adapter or Megatron's factors, becomes pairs by the names of Hugging Face's weights first, and
is merged or written from them. The format tells the names: only MindSpeed-LLM reads LoRA from ``torch``, only
Megatron-Bridge from ``torch_dist`` (ms-swift's ``torch_dist`` holds gate and up of B by rank, so that it fits one TP only).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

from ..merge.adapter import CONFIG
from ..storage.assets import read_json
from ..storage.safe_load import open_weights
from .convert import Target, check_apart, check_weights
from .dist_format import DistCheckpoint
from .errors import BridgeError
from .families import family_of
from .family import Row
from .hf import HFCheckpoint
from .lora import Factor, Pair, factor_of, to_hf, to_mcore
from .lora_views import Beside, Merged
from .mapping import Copy
from .peft_files import is_adapter, read_adapter, write_adapter
from .source import Source, Stored, open_source

_FORMS = {"torch": "mindspeed", "torch_dist": "megatron-bridge"}


@dataclass(frozen=True, slots=True)
class LoraFlags:
    """What the user said of LoRA; ``alpha``, ``rank`` and ``targets`` are of that in a Megatron checkpoint."""

    adapter: Path | None = None
    how: str | None = None
    alpha: int | None = None
    rank: int | None = None
    targets: tuple[str, ...] = ()


def open_adapter(folder: Path, *, hf_config: Path | None = None, family: str | None = None) -> Source:
    """A PEFT adapter as a source without tensors. Raises BridgeError when the config of its base is nowhere."""
    said = read_json(folder / CONFIG).get("base_model_name_or_path")
    base = hf_config or (Path(said) if said else folder)
    if not (base / "config.json").is_file():
        raise BridgeError(f"{base}: no config.json; name the folder of the adapter's base with --hf_config")
    config = read_json(base / "config.json")
    table = family_of(config, family)
    if _has_weights(base):
        with open_weights(base) as weights:
            config = table.as_stored(config, weights.shapes, hf=True)
    return Source(folder, "hf", Beside(None, {}, ()), config, base, table)


def _has_weights(folder: Path) -> bool:
    return any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin"))


def with_lora(source: Source, target: Target, flags: LoraFlags) -> tuple[Source, dict[str, Pair] | None]:
    """The source with its LoRA as the flags say; and the pairs when they are to be written as a PEFT adapter.

    A source without LoRA is given back as it is. Raises BridgeError, AdapterError.
    """
    rows = source.rows()
    alone = isinstance(source.tensors, Beside)
    pairs = _of_peft(source.folder, rows, flags) if alone else _in_checkpoint(source, flags)
    if flags.adapter and pairs:
        raise BridgeError(f"--adapter {flags.adapter}: {source.folder} has LoRA already; convert one of them")
    if flags.adapter:
        pairs = _of_adapter(flags.adapter, source, flags)
    if not pairs:
        if given := [name for name in ("how", "alpha", "rank", "targets") if getattr(flags, name)]:
            flag = {"how": "lora", "targets": "lora_target_modules", "rank": "lora_r", "alpha": "lora_alpha"}[given[0]]
            raise BridgeError(f"--{flag}: there is no LoRA in {source.folder}; name it with --adapter")
        return source, None
    stored = source.stored
    base = stored if stored and any(not factor_of(name) for name in stored.shapes) else None
    how = _choice(flags.how, target, source.folder, has_base=base is not None)
    if how == "merge" and base:
        said = [
            f"LoRA on {len(pairs)} weights is merged into them" + ("" if flags.how else "; --lora only takes it alone")
        ]
        return replace(source, tensors=Merged(base, pairs, rows, said)), None
    if target.form == "hf":
        return replace(source, tensors=Beside(stored, {}, ())), pairs
    return _fused(source, stored if how == "keep" else None, pairs, rows, target), None


def write_lora(
    source: Source, pairs: Mapping[str, Pair], save: Path | None, *, dtype: str | None, overwrite: bool, dry: bool
) -> None:
    """Write pairs as a PEFT adapter, or only say what would be written. Raises BridgeError, FileExistsError, OSError."""
    if dtype:
        raise BridgeError(f"--dtype {dtype}: an adapter's factors stay as they are; leave it out")
    ranks = sorted({pair.rank for pair in pairs.values()})
    for line in source.tensors.said:
        print(line)
    print(f"LoRA on {len(pairs)} weights, rank {', '.join(map(str, ranks))}")
    if dry or save is None:
        return
    check_apart(save, source.folder, source.config_folder)
    check_weights(source.folder)
    made_from = {"source": str(source.folder), "form": source.form, "family": source.family.name}
    base = source.config_folder  # no model when it is a Megatron checkpoint with a config.json
    name = str(base) if base and _has_weights(base) else None
    write_adapter(save, pairs, source.rows(), base=name, made_from=made_from, overwrite=overwrite)
    print(f"wrote the adapter {save}")


def _choice(how: str | None, target: Target, folder: Path, *, has_base: bool) -> str:
    """What becomes of LoRA. Raises BridgeError for what cannot be, and when it is for the user to say."""
    if not has_base:
        if how not in (None, "only"):
            raise BridgeError(f"--lora {how}: {folder} holds LoRA alone; give the model as --load, this as --adapter")
        return "only"
    if how is None and target.form != "hf":
        raise BridgeError(f"{folder}: with LoRA: say with --lora merge, keep or only what is to be written")
    if how == "keep" and target.form == "hf":
        raise BridgeError("--lora keep: a Hugging Face folder holds a model or an adapter; --lora merge or only")
    if how == "keep" and target.form == "torch_dist":
        raise BridgeError("--lora keep: no trainer reads model and LoRA from one torch_dist; --lora merge or only")
    return how or "merge"


def _in_checkpoint(source: Source, flags: LoraFlags) -> dict[str, Pair]:
    """The pairs of LoRA in a Megatron checkpoint. Raises BridgeError when rank, alpha or targets are at odds."""
    tensors = source.tensors
    assert not isinstance(tensors, Merged | Beside), "an opened checkpoint"
    found = {name: factor for name in tensors.shapes if (factor := factor_of(name))}
    if not found:
        return {}
    if isinstance(tensors, HFCheckpoint):
        raise BridgeError(f"{source.folder}: LoRA among the weights of a Hugging Face folder; its table has none")
    _check_ranks(source.folder, tensors, found, flags)
    _check_targets(source.folder, [factor.weight for factor in found.values()], flags.targets)
    alpha = _same("lora_alpha", flags.alpha, tensors.args.get("lora_alpha"), source.folder)
    if not alpha:
        raise BridgeError(f"{source.folder}: LoRA's alpha is not among its arguments; give --lora_alpha")
    pairs = to_hf({name: tensors.get(name) for name in found}, source.rows(), alpha=Fraction(alpha))
    if not pairs:
        raise BridgeError(f"{source.folder}: all of its LoRA is zero")
    return pairs


def _check_ranks(folder: Path, tensors: Stored, found: Mapping[str, Factor], flags: LoraFlags) -> None:
    """Raise BridgeError for a factor of another rank than is said, and for one that ms-swift stored for one TP only."""
    args: Mapping[str, Any] = getattr(tensors, "args", {})
    rank = _same("lora_r", flags.rank, args.get("lora_r"), folder)
    tp = {args.get(f"{kind}_parallel_size") for kind in ("tensor_model", "expert_tensor")}
    for name, factor in found.items():
        shape = tensors.shapes[name]
        own = shape[0] if factor.kind == "A" else shape[-1]
        if rank and own != rank:
            raise BridgeError(f"{folder}: {name} {list(shape)} has rank {own}, its arguments or --lora_r say {rank}")
        if isinstance(tensors, DistCheckpoint) and ".linear_fc1.lora_B." in name and tp - {1, None}:
            raise BridgeError(
                f"{folder}: {name}: ms-swift stores gate and up of it by rank, and its run had TP {tp}; save the adapter "
                "there as safetensors"
            )


def _check_targets(folder: Path, weights: Iterable[str], targets: Sequence[str]) -> None:
    """Raise BridgeError unless the layers with LoRA are those that the user named."""
    modules = [f".{weight.removesuffix('.weight')}" for weight in weights]
    for target in targets:
        if not any(module.endswith(f".{target}") for module in modules):
            raise BridgeError(f"--lora_target_modules {target}: {folder} has no LoRA on it")
    ends = tuple(f".{target}" for target in targets)
    if targets and (other := next((module for module in modules if not module.endswith(ends)), None)):
        raise BridgeError(f"{folder}: LoRA on {other[1:]}, which --lora_target_modules does not name")


def _same(name: str, asked: int | None, said: object, folder: Path) -> int | float | None:
    """A number that the user or the checkpoint's arguments give. Raises BridgeError when they differ."""
    if said is not None and not isinstance(said, int | float):
        raise BridgeError(f"{folder}: args.{name} is {said!r}, a number is expected")
    if asked and said and asked != said:
        raise BridgeError(f"--{name} {asked}: the arguments in {folder} say {said}")
    return asked or said


def _of_peft(folder: Path, rows: Iterable[Row], flags: LoraFlags) -> dict[str, Pair]:
    if flags.alpha or flags.rank or flags.targets:
        raise BridgeError(
            f"--lora_alpha, --lora_r and --lora_target_modules are of LoRA in a Megatron checkpoint; {folder} tells its own"
        )
    return read_adapter(folder, rows)


def _of_adapter(adapter: Path, source: Source, flags: LoraFlags) -> dict[str, Pair]:
    """The pairs of ``--adapter``, a PEFT folder or a Megatron checkpoint with LoRA alone."""
    if not adapter.is_dir():
        raise BridgeError(f"--adapter {adapter}: no such folder")
    if is_adapter(adapter):
        check_weights(adapter)
        return _of_peft(adapter, source.rows(), flags)
    other = open_source(adapter, hf_config=source.config_folder, family=source.family.name)
    with other.tensors:
        if other.form == "hf" or not any(map(factor_of, other.tensors.shapes)):
            raise BridgeError(f"--adapter {adapter}: neither a PEFT adapter nor a Megatron checkpoint with LoRA")
        if name := next((name for name in other.tensors.shapes if not factor_of(name)), None):
            raise BridgeError(f"--adapter {adapter}: holds the model too ({name}); give it as --load alone")
        pairs = _in_checkpoint(other, flags)
        return {name: Pair(pair.a.clone(), pair.b.clone(), pair.scale) for name, pair in pairs.items()}


def _fused(
    source: Source, base: Stored | None, pairs: Mapping[str, Pair], rows: Iterable[Row], target: Target
) -> Source:
    """The source of a Megatron checkpoint with LoRA, beside ``base`` or alone."""
    fused = to_mcore(pairs, rows)
    tensors = fused.tensors(_FORMS[target.form])
    flags = f"--lora-r {fused.rank} --lora-alpha {fused.alpha} --lora-target-modules {' '.join(fused.targets)}"
    if target.form == "torch_dist":
        each = ", share_expert_adapters=False" if any(".local_experts." in name for name in tensors) else ""
        flags = f"LoRA(dim={fused.rank}, alpha={fused.alpha}, target_modules={fused.targets}{each})"
    said = [*fused.said, f"names of {_FORMS[target.form]}, which needs {flags}"]
    only = [Row(name, Copy(), (name,)) for name in tensors]
    args = {"lora_r": fused.rank, "lora_alpha": fused.alpha, "lora_target_modules": fused.targets}
    view = Beside(base, tensors, said)
    return replace(source, tensors=view, only=[*(rows if base else ()), *only], args=args)
