"""Whole checkpoints from one form to another: planned from headers, streamed, published whole or not at all.

Every source is read as the canonical model and every target written from it, so each pair of forms is the same path.
Nothing is converted in silence: a tensor without a place, a name too many or a shape that does not fit stops the plan.
"""

import json
import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch

from ..storage.assets import carry, read_json
from ..storage.hashing import algorithm_of, file_digest
from ..storage.manifest import MANIFEST_NAME, read
from ..storage.publish import publish
from ..storage.safetensors_io import Spec, main_dtype
from ..storage.space import free_bytes
from .args import to_args, to_config
from .dialects import LANGUAGE, check_dialect, check_known
from .dist_format import DistCheckpoint, write_dist
from .errors import BridgeError
from .families import family_of
from .family import Family, of_text
from .hf import HFCheckpoint, write_hf
from .mapping import hf_shapes, mcore_shape
from .parallel import OUTPUT, Layout, is_carried
from .run_flags import run_notes
from .torch_format import TRACKER, TorchCheckpoint, tracked
from .torch_writer import write_torch

Form = Literal["hf", "torch", "torch_dist"]
_UNTIED = "untie_embeddings_and_output_weights"  # what Pai-Megatron-Patch sets for every model of several stages
_WEIGHTS = (".safetensors", ".bin", ".pt", ".distcp")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


# Canonical tensors of any form on disk: shapes and dtypes by name from headers, content one tensor at a time.
Checkpoint = HFCheckpoint | TorchCheckpoint | DistCheckpoint


@dataclass(frozen=True, slots=True)
class Target:
    """What to write. ``iteration`` None is Megatron's ``release``; ``dtype`` None keeps what the source has."""

    form: Form
    layout: Layout = field(default_factory=Layout)
    dialect: str = "mcore"
    dtype: str | None = None
    max_bytes: int = 5 * 10**9
    iteration: int | None = None
    divisible_by: int | None = None  # of the padded vocabulary, times TP; None is what the dialect has
    workers: int = 2

    def step(self) -> int:
        """What the rows of the vocabulary are divisible by, times TP. Raises BridgeError when the dialect does not pad them."""
        if check_dialect(self.dialect).padded:
            return self.divisible_by or 128
        if self.divisible_by:
            raise BridgeError(f"--make_vocab_size_divisible_by: --dialect {self.dialect} does not pad the vocabulary")
        return 1


def form_of(folder: Path) -> Form:
    """The form of a checkpoint's folder. Raises BridgeError when it is none that is known."""
    if not folder.is_dir():
        raise BridgeError(f"{folder}: no such folder")
    inside = tracked(folder)
    if (inside / ".metadata").is_file():
        return "torch_dist"
    if any(inside.glob("mp_rank_*")):
        return "torch"
    if any(folder.glob("*.safetensors")) or any(folder.glob("pytorch_model*.bin")):
        return "hf"
    raise BridgeError(
        f"{folder}: no checkpoint that is known: no {TRACKER} or .metadata, no mp_rank_* folders, no safetensors or .bin"
    )


@dataclass(slots=True)
class Source:
    """An opened checkpoint with what is known of its model: config.json's content and the table."""

    folder: Path
    form: Form
    tensors: Checkpoint
    config: dict[str, Any]
    config_folder: Path | None  # that config, tokenizer and code come from
    family: Family

    @property
    def names(self) -> str:
        """Whose names a Megatron checkpoint has, in words; empty for Hugging Face's."""
        if isinstance(self.tensors, HFCheckpoint):
            return ""
        return " or ".join(self.tensors.dialects) or "several dialects"


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
    config = table.without_mtp(config, mcore.shapes, hf=False)
    if table.tied(config) and OUTPUT in mcore.shapes and mcore.args.get(_UNTIED) is True:
        config |= {"tie_word_embeddings": False}
        mcore.said.append(f"config.json ties the embeddings, but the run untied them ({_UNTIED}): they stay so")
    source = Source(folder, form, mcore, config, config_folder, table)
    if dialect and dialect not in mcore.dialects:
        raise BridgeError(f"--dialect {dialect}: {folder} has the names of {source.names}")
    return source


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will write: canonical tensors with their final dtypes."""

    source: Source
    target: Target
    specs: list[Spec]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.size for spec in self.specs)

    def args(self) -> dict[str, Any]:
        """Megatron's arguments of the model. Raises BridgeError when Megatron-Core cannot compute it."""
        source, target = self.source, self.target
        main = max(self.specs, key=lambda spec: spec.size).dtype
        noted = check_dialect(target.dialect).config_in_args
        plain = {
            key: value for key, value in of_text(source.config).items() if isinstance(value, bool | int | float | str)
        }
        return {
            **(plain if noted else {}),
            **to_args(source.config, source.family, tp=target.layout.tp, divisible_by=target.step()),
            "params_dtype": main, "bf16": main == torch.bfloat16, "fp16": main == torch.float16,
        }  # fmt: skip

    def lines(self) -> list[str]:
        """The plan as a user reads it. Raises BridgeError as ``args`` does."""
        largest = max(self.specs, key=lambda spec: spec.size)
        layout = self.target.layout
        read = f", names of {self.source.names}" if self.source.names else ""
        written = "" if self.target.form == "hf" else f", names of {self.target.dialect}"
        said = [
            f"from {self.source.form} {self.source.folder}: family {self.source.family.name}, {len(self.specs)} tensors{read}",
            f"to {self.target.form}, {self.size / 1e9:.2f} GB{written}",
            f"the largest tensor is {largest.name} {list(largest.shape)}, {largest.size / 1e9:.2f} GB",
        ]
        if self.target.form == "torch":
            said.append(
                f"for TP {layout.tp}, PP {layout.pp}, VPP {layout.vpp or 1}, EP {layout.ep}, ETP {layout.expert_tp}"
            )
        if self.target.form == "torch_dist":
            said.append("one set of files for every TP, PP, VPP, EP and ETP")
        if self.target.form != "hf":
            said += run_notes(self.args())
            if carried := sum(is_carried(spec.name) for spec in self.specs):
                said.append(
                    f"{carried} tensors of a vision tower go along under their own names, the others below {LANGUAGE}"
                )
        return said + self.source.tensors.said


def plan(source: Source, target: Target) -> Plan:
    """Check that the source is the model of its config, tensor by tensor. Raises BridgeError naming the first that is not."""
    tensors, family = source.tensors, source.family
    if target.form != "hf":
        check_dialect(target.dialect, target.form)
        for name in tensors.shapes:
            check_known(name, target.dialect)
    wanted = {row.mcore: row for row in family.rows(source.config)}
    missing = [name for name in wanted if name not in tensors.shapes]
    left = [name for name in tensors.shapes if name not in wanted]
    if missing or left:
        said = [f"{len(missing)} tensors of the model are missing, the first is {missing[0]}"] if missing else []
        said += [f"{len(left)} tensors are in no table of {family.name}, the first is {left[0]}"] if left else []
        raise BridgeError(f"{source.folder}: {'; '.join(said)}")
    own = main_dtype(tensors.shapes, tensors.dtypes)
    asked = DTYPES[target.dtype] if target.dtype else None
    specs: list[Spec] = []
    for name, row in wanted.items():
        try:
            parts = hf_shapes(row.rule, tensors.shapes[name])
            shape = mcore_shape(row.rule, parts)  # a padded vocabulary is not written
        except BridgeError as error:
            raise BridgeError(f"{source.folder}: {name}: {error}") from None
        stored = tensors.dtypes[name]
        keeps = asked is None or not stored.is_floating_point or own.itemsize < stored.itemsize > asked.itemsize
        specs.append(Spec(name, stored if keeps or asked is None else asked, shape))
    return Plan(source, target, specs)


def convert(made: Plan, save: Path, *, overwrite: bool = False, say: Callable[[str], None] = print) -> None:
    """Write a plan's target to ``save``, with config, tokenizer and code beside it; it appears whole or not at all.

    Weights of a source that has a manifest are compared with it first. Raises BridgeError, ManifestError,
    FileExistsError, OSError with ENOSPC.
    """
    source, target = made.source, made.target
    for place in (source.folder, source.config_folder):
        if place and save.resolve() in (place.resolve(), *place.resolve().parents):
            raise BridgeError(f"--save {save} is or contains {place}; choose another folder")
    if made.size > free_bytes(save):
        raise OSError(28, f"No space left on device: {made.size:,} bytes are needed", str(save))
    for line in made.lines():
        say(line)
    _check_weights(source.folder)
    if isinstance(source.tensors, HFCheckpoint):
        source.tensors.check_copies()
    made_from = {"source": str(source.folder), "form": source.form, "family": source.family.name}
    written: dict[str, dict[str, Any]] = {}
    dtypes = {spec.name: spec for spec in made.specs}

    def get(name: str) -> torch.Tensor:
        spec = dtypes[name]
        value = source.tensors.get(name)
        if value.shape != spec.shape:
            value = value[: spec.shape[0]]  # padded rows of the vocabulary
        if value.dtype == spec.dtype:
            return value
        value = value.to(spec.dtype)
        if not math.isfinite(sum(map(float, value.aminmax()))):
            raise BridgeError(f"{name}: does not fit into {spec.dtype}; use bf16")
        return value

    with ExitStack() as stack:
        folder = stack.enter_context(
            publish(save, kind=target.form, made_from=made_from, replace=overwrite, written=written)
        )
        if target.form == "hf":
            rows, copies = list(source.family.rows(source.config)), source.family.copies(source.config)
            written |= write_hf(folder, rows, copies, dtypes, get, max_bytes=target.max_bytes, workers=target.workers)
        else:
            written |= _write_mcore(folder, made, get)
        _write_beside(folder, made)


def _check_weights(folder: Path) -> None:
    """Compare weight files with the manifest beside them, if any: nothing else finds a flipped bit in most of them.

    Configs and tokenizers are left out: users edit them.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return
    for name, entry in read(folder)["files"].items():
        path, algorithm = folder / name, str(algorithm_of(entry))
        weights = path.suffix in _WEIGHTS or path.name == ".metadata"
        if weights and path.is_file() and file_digest(path, algorithm) != entry[algorithm]:
            raise BridgeError(f"{path}: its checksum is not the manifest's; the file was changed or is damaged")


def _write_mcore(folder: Path, made: Plan, get: Callable[[str], torch.Tensor]) -> dict[str, dict[str, Any]]:
    target, args = made.target, made.args()
    if target.form == "torch":
        return write_torch(
            folder, made.specs, get, target.layout, args=args, iteration=target.iteration, dialect=target.dialect,
            make_vocab_size_divisible_by=target.step(), workers=target.workers,
        )  # fmt: skip
    inside = folder / ("release" if target.iteration is None else f"iter_{target.iteration:07d}")
    inside.mkdir()
    entries = write_dist(
        inside, made.specs, get, args=args, iteration=target.iteration or 0, uniform=is_uniform(made.specs),
        dialect=target.dialect, workers=target.workers,
    )  # fmt: skip
    (folder / TRACKER).write_text("release" if target.iteration is None else str(target.iteration), encoding="utf-8")
    return {f"{inside.name}/{name}": entry for name, entry in entries.items()}


def is_uniform(specs: Sequence[Spec]) -> bool:
    """Whether all layers hold the same tensors: Megatron then stacks them in ``torch_dist``."""
    layers: dict[str, set[tuple[str, tuple[int, ...]]]] = {}
    for spec in specs:
        if spec.name.startswith("decoder.layers."):
            number, _, rest = spec.name.removeprefix("decoder.layers.").partition(".")
            layers.setdefault(number, set()).add((rest, spec.shape))
    return len({frozenset(names) for names in layers.values()}) == 1


def _write_beside(folder: Path, made: Plan) -> None:
    """config.json with the dtype that was written, tokenizer, template and code."""
    source = made.source
    config = dict(source.config)
    main = max(made.specs, key=lambda spec: spec.size).dtype
    config.pop("quantization_config", None)  # what was fp8 is written whole
    config.pop("torch_dtype", None)
    config["dtype"] = str(main).removeprefix("torch.")
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    if source.config_folder:
        carry(source.config_folder, folder, skip={TRACKER})


def same(one: Checkpoint, other: Checkpoint) -> list[str]:
    """Differences of two checkpoints, tensor by tensor, bit for bit; a line each, none when they are the same model."""
    for checkpoint in (one, other):
        if isinstance(checkpoint, HFCheckpoint):
            checkpoint.check_copies()
    found = [f"{name}: only in the first" for name in one.shapes if name not in other.shapes]
    found += [f"{name}: only in the second" for name in other.shapes if name not in one.shapes]
    for name, shape in one.shapes.items():
        if name not in other.shapes:
            continue
        first, second = one.get(name), other.get(name)
        if (
            first.dim()
            and first.shape[0] != second.shape[0]
            and name.endswith(("word_embeddings.weight", "output_layer.weight"))
        ):
            rows = min(first.shape[0], second.shape[0])  # padding of one of them
            first, second = first[:rows], second[:rows]
        if first.dtype != second.dtype or first.shape != second.shape:
            found.append(f"{name}: {first.dtype} {shape} and {second.dtype} {tuple(second.shape)}")
        elif not torch.equal(first.contiguous().view(torch.uint8), second.contiguous().view(torch.uint8)):
            found.append(f"{name}: {int((first != second).sum())} of {first.numel()} values differ")
    return found
