"""Whole checkpoints from one form to another: planned from headers, streamed, published whole or not at all.

Every source is read as the canonical model and every target written from it, so each pair of forms is the same path.
Nothing is converted in silence: a tensor without a place, a name too many or a shape that does not fit stops the plan.
"""

import ctypes
import json
import math
from collections.abc import Callable, Generator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from ..storage.assets import carry
from ..storage.hashing import algorithm_of, file_digest
from ..storage.manifest import MANIFEST_NAME, read
from ..storage.megatron_folder import TRACKER
from ..storage.progress import Progress, Say
from ..storage.publish import publish
from ..storage.safetensors_io import Spec, main_dtype
from ..storage.space import free_bytes
from ..storage.threads import usable_cores
from .args import to_args
from .dialects import LANGUAGE, check_dialect, check_known
from .dist_format import write_dist
from .errors import BridgeError
from .family import Support, of_text
from .hf import HFCheckpoint, write_hf
from .lora import factor_of
from .mapping import MinusOne, hf_dtype, hf_shapes, mcore_shape
from .parallel import Layout, check_layout, is_carried, model_of
from .run_flags import run_notes
from .shapes import check_shapes
from .source import Checkpoint, Form, Source
from .torch_writer import write_torch

_M_MMAP_THRESHOLD = -3  # of mallopt: from how many bytes on memory is the system's own again once it is freed
_WEIGHTS = (".safetensors", ".bin", ".pt", ".distcp")
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


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
    workers: int = field(default_factory=usable_cores)
    allow_patched_attention: bool = False  # models that stock Megatron-Core computes otherwise

    def step(self) -> int:
        """What the rows of the vocabulary are divisible by, times TP. Raises BridgeError when the dialect does not pad them."""
        if check_dialect(self.dialect).padded:
            return self.divisible_by or 128
        if self.divisible_by:
            raise BridgeError(f"--make_vocab_size_divisible_by: --dialect {self.dialect} does not pad the vocabulary")
        return 1


@dataclass(frozen=True)
class Plan:
    """What a conversion will write: canonical tensors with their final dtypes."""

    source: Source
    target: Target
    specs: list[Spec]

    @property
    def size(self) -> int:
        """Bytes of all tensors."""
        return sum(spec.size for spec in self.specs)

    @property
    def made_from(self) -> dict[str, str]:
        """What the manifest of the target tells of its source."""
        return {"source": str(self.source.folder), "form": self.source.form, "family": self.source.family.name}

    @cached_property
    def args(self) -> dict[str, Any]:
        """Megatron's arguments of the model. Raises BridgeError when Megatron-Core cannot compute it, or spread it so."""
        source, target = self.source, self.target
        main = max(self.specs, key=lambda spec: spec.size).dtype
        names = {row.mcore for row in source.whole()}
        args = to_args(source.config, source.family, tp=target.layout.tp, divisible_by=target.step(), names=names)
        check_layout(target.layout, args)
        support = _support(source, target)
        patched = {"patched_attention": support.reason} if support.kind == "needs_patch" else {}  # read by to_config
        noted = check_dialect(target.dialect).config_in_args
        plain = {
            key: value for key, value in of_text(source.config).items() if isinstance(value, bool | int | float | str)
        }
        return {
            **(plain if noted else {}), **args, **patched,
            "params_dtype": main, "bf16": main == torch.bfloat16, "fp16": main == torch.float16, **source.args,
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
            said += run_notes(self.args)
            if carried := sum(is_carried(spec.name) for spec in self.specs):
                said.append(
                    f"{carried} tensors of a vision tower go along under their own names, the others below {LANGUAGE}"
                )
        elif rounded := self._rounded():
            said.append(
                f"{len(rounded)} norms that Megatron-Core keeps as distances from one are rounded when one is added, the "
                f"first is {rounded[0]}"
            )
        if (support := _support(self.source, self.target)).reason:
            patched = "only for a Megatron-Core that was changed: " if support.kind == "needs_patch" else ""
            said.append(patched + support.reason)
        return said + self.source.tensors.said

    def _rounded(self) -> list[str]:
        """Tensors for whose Hugging Face form the type that they have is too narrow."""
        rules = {row.mcore: row.rule for row in self.source.rows()}
        main = max(self.specs, key=lambda spec: spec.size).dtype
        narrow = (spec for spec in self.specs if isinstance(rules[spec.name], MinusOne))
        return [spec.name for spec in narrow if hf_dtype(rules[spec.name], spec.dtype, main) == spec.dtype]


def plan(source: Source, target: Target) -> Plan:
    """Check that the source is the model of its config, tensor by tensor. Raises BridgeError naming the first that is not.

    Raises BridgeError too for a model that Megatron-Core does not compute, unless the target allows it or neither side is
    Megatron's.
    """
    tensors, family = source.tensors, source.family
    if target.form != "hf":
        check_dialect(target.dialect, target.form)
        for name in tensors.shapes:
            check_known(name, target.dialect)
    _support(source, target)
    wanted = {row.mcore: row for row in source.rows()}
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
    made = Plan(source, target, specs)
    if not source.form == target.form == "hf":
        names = {name: ", ".join(row.hf) if source.form == "hf" else name for name, row in wanted.items()}
        check_shapes(specs, made.args, lambda name: f"{source.folder}: {names[name]}")
    return made


def _support(source: Source, target: Target) -> Support:
    """Whether Megatron-Core computes the model; of no meaning when neither side is its. Raises BridgeError when it may not be."""
    if source.form == target.form == "hf":
        return Support("stock")
    support, name = source.family.support(source.config), source.family.name
    if support.kind == "none":
        raise BridgeError(f"{source.folder}: {name} has no form in Megatron-Core: {support.reason}")
    if support.kind == "needs_patch" and not target.allow_patched_attention:
        raise BridgeError(
            f"{source.folder}: stock Megatron-Core computes {name} otherwise: {support.reason}. For a Megatron-Core that was "
            "changed give --allow_patched_attention"
        )
    return support


def convert(made: Plan, save: Path, *, overwrite: bool = False, say: Say = print) -> None:
    """Write a plan's target to ``save``, with config, tokenizer and code beside it; it appears whole or not at all.

    Weights of a source that has a manifest are compared with it first. Raises BridgeError, ManifestError,
    FileExistsError, OSError with ENOSPC.
    """
    for line in made.lines():
        say(line)
    check_target(made, save, say)
    written: dict[str, dict[str, Any]] = {}
    with publish(save, kind=made.target.form, made_from=made.made_from, replace=overwrite, written=written) as folder:
        written |= write_target(folder, made, say)


def check_target(made: Plan, save: Path, say: Say = print) -> None:
    """Look at what can hinder a conversion to ``save``: places and room, then the source's checksums and copies.

    Raises BridgeError, ManifestError, OSError with ENOSPC.
    """
    source = made.source
    check_apart(save, source.folder, source.config_folder)
    if made.size > free_bytes(save):
        raise OSError(28, f"No space left on device: {made.size:,} bytes are needed", str(save))
    check_weights(source.folder, made.target.workers, say)
    if isinstance(source.stored, HFCheckpoint):
        source.stored.check_copies()


def write_target(folder: Path, made: Plan, say: Say = print) -> dict[str, dict[str, Any]]:
    """Write a plan's target into an empty folder; the manifest's entries of what was hashed while it was written."""
    source, target = made.source, made.target
    specs = {spec.name: spec for spec in made.specs}

    def get(name: str) -> torch.Tensor:
        spec = specs[name]
        value = source.tensors.get(name)
        if value.shape != spec.shape:
            value = value[: spec.shape[0]]  # padded rows of the vocabulary
        if value.dtype == spec.dtype:
            return value
        value = value.to(spec.dtype)
        if not math.isfinite(sum(map(float, value.aminmax()))):
            raise BridgeError(f"{name}: does not fit into {spec.dtype}; use bf16")
        return value

    with _sparingly():
        if target.form == "hf":
            rows, copies = source.rows(), source.family.copies(source.config)
            written = write_hf(
                folder, rows, copies, specs, get, max_bytes=target.max_bytes, workers=target.workers, say=say
            )
        else:
            written = _write_mcore(folder, made, get, say)
    _write_beside(folder, made)
    return written


def check_apart(save: Path, *sources: Path | None) -> None:
    """Raise BridgeError when writing ``save`` would replace one of the sources."""
    for place in sources:
        if place and save.resolve() in (place.resolve(), *place.resolve().parents):
            raise BridgeError(f"--save {save} is or contains {place}; choose another folder")


@contextmanager
def _sparingly() -> Generator[None]:
    """The workers are the threads: torch's own below them would mostly wait for each other, which costs CPU time.

    And the C library gives the memory of a tensor back when it is freed; else it keeps some 50 MB for each thread.
    """
    with suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def check_weights(folder: Path, workers: int | None = None, say: Say = print) -> None:
    """Compare weight files with the manifest beside them, if any: nothing else finds a flipped bit in most of them.

    Configs and tokenizers are left out: users edit them.
    """
    if not (folder / MANIFEST_NAME).is_file():
        return

    def check(path: Path) -> None:
        entry = files[path]
        algorithm = str(algorithm_of(entry))
        if file_digest(path, algorithm, progress.advance) != entry[algorithm]:
            raise BridgeError(f"{path}: its checksum is not the manifest's; the file was changed or is damaged")

    listed = {folder / name: entry for name, entry in read(folder)["files"].items()}
    weights = (path for path in listed if path.suffix in _WEIGHTS or path.name == ".metadata")
    files = {path: listed[path] for path in weights if path.is_file()}
    size = sum(path.stat().st_size for path in files)
    with ThreadPoolExecutor(workers or usable_cores()) as pool, Progress("checksums", size, "read", say) as progress:
        list(pool.map(check, files))


def _write_mcore(folder: Path, made: Plan, get: Callable[[str], torch.Tensor], say: Say) -> dict[str, dict[str, Any]]:
    target, args = made.target, made.args
    # Of the whole model: maybe more than is written.
    names = [row.mcore for row in made.source.whole()]
    if target.form == "torch":
        return write_torch(
            folder, made.specs, get, target.layout, args=args, iteration=target.iteration, dialect=target.dialect,
            make_vocab_size_divisible_by=target.step(), workers=target.workers, model=model_of(names), say=say,
        )  # fmt: skip
    inside = folder / ("release" if target.iteration is None else f"iter_{target.iteration:07d}")
    inside.mkdir()
    entries = write_dist(
        inside, made.specs, get, args=args, iteration=target.iteration or 0,
        uniform=is_uniform([*made.specs, *(Spec(name, torch.float32, ()) for name in names)]),
        dialect=target.dialect, tower=model_of(names).tower, workers=target.workers, say=say,
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
    if not all(factor_of(spec.name) for spec in made.specs):  # else LoRA alone: config.json is of the base, as it is
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
