"""Read a checkpoint into a model: streamed, each tensor checked; under ZeRO-3 each rank keeps only its own part.

transformers reads a whole checkpoint on rank 0 and sends every parameter to all ranks when DeepSpeed partitions it. Here
every rank maps the files into memory and copies its part of each parameter: nothing is sent, and only the pages of that
part are read where a tensor is stored as the model has it. Tensors that are converted (experts that lie apart on disk and
are one parameter in the model) are read and converted a group at a time, by transformers' own rules.
"""

# transformers has no public door between "build the model" and "read its files"; from_pretrained does all the rest.
# ruff: noqa: SLF001
# pyright: reportPrivateUsage=false

import ctypes
from collections.abc import Callable, Collection, Generator
from contextlib import contextmanager, suppress
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    build_glob_alternation,
    dot_natural_key,
    rename_source_key,
)
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.utils.loading_report import LoadStateDictInfo

from ..storage.manifest import safetensors_header
from ..storage.safe_load import load_tensors
from .precision import asked_in_fp32
from .runtime import gather


class ModelError(ValueError):
    """The weights on disk are not the model; the message names the tensor and its file."""


@dataclass
class Group:
    """Tensors of the checkpoint that become one or more tensors of the model together."""

    transform: Any
    sources: list[str] = field(default_factory=list[str])


@contextmanager
def streamed_loading() -> Generator[None]:
    """``from_pretrained`` inside reads with this module. Quantized checkpoints stay with transformers' own reader."""
    stock = PreTrainedModel._load_pretrained_model

    def load(
        model: Any, state_dict: Any, checkpoint_files: Any, load_config: Any, expected_keys: Any = None
    ) -> tuple[Any, Any]:
        if state_dict is not None or not checkpoint_files or load_config.hf_quantizer is not None:
            return stock(model, state_dict, checkpoint_files, load_config, expected_keys)
        return _load(model, [Path(name) for name in checkpoint_files], load_config), None

    PreTrainedModel._load_pretrained_model = staticmethod(load)
    try:
        yield
    finally:
        PreTrainedModel._load_pretrained_model = staticmethod(stock)


def _load(model: Any, files: list[Path], load_config: Any) -> LoadStateDictInfo:
    """Fill the model from the files; what was missing and unexpected. Raises ModelError on every rank when one met it."""
    error: str | None = None
    info: Any = None
    try:
        info = _Loader(model, files, load_config).run()
    except (ModelError, ValueError, OSError, SafetensorError) as caught:
        error = str(caught)
    if error := next(filter(None, gather(error)), None):
        raise ModelError(error)
    return info


class Files:
    """The tensors of weight files, each file opened when needed and closed after its last tensor."""

    def __init__(self, files: list[Path]) -> None:
        self.where: dict[str, Path] = {}
        self._left: dict[Path, set[str]] = {}
        self._open: dict[Path, Any] = {}
        for path in files:
            for name in self._names(path):
                if name in self.where:
                    raise ModelError(f"{path}: tensor {name} is in {self.where[name]} too")
                self.where[name] = path

    def get(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, a view of the mapped file."""
        path = self.where[name]
        if path.suffix == ".safetensors":
            if path not in self._open:
                self._open[path] = safe_open(path, framework="pt").__enter__()
            return self._open[path].get_tensor(name)
        if path not in self._open:
            self._open[path] = load_tensors(path)
        return self._open[path][name]

    def done(self, name: str) -> None:
        """No more of this tensor; its file is closed when it was the last."""
        path = self.where[name]
        self._left.setdefault(path, {key for key, file in self.where.items() if file == path}).discard(name)
        if not self._left[path] and path in self._open:
            handle = self._open.pop(path)
            if path.suffix == ".safetensors":
                handle.__exit__(None, None, None)

    def _names(self, path: Path) -> list[str]:
        if path.suffix == ".safetensors":
            return list(safetensors_header(path))
        return list(load_tensors(path, content=False))


class _Loader:
    """One pass over the groups of a checkpoint."""

    def __init__(self, model: Any, files: list[Path], load_config: Any) -> None:
        self.model = model
        self.files = Files(files)
        self.targets: dict[str, torch.Tensor] = model.state_dict(keep_vars=True)
        self.partitioned = is_deepspeed_zero3_enabled()
        self._fp32 = asked_in_fp32(model, load_config.dtype) if self.partitioned else set[str]()
        self._mapping = load_config.weight_mapping or []
        self._dtype_of = _dtypes(load_config.dtype_plan or {})
        self._missing = set(self.targets)
        self._checks: list[tuple[str, Group, torch.Tensor]] = []

    def run(self) -> LoadStateDictInfo:
        groups, unexpected = self._plan()
        with torch.no_grad():
            for first, group in groups.items():
                self._fill(first, group)
                for name in group.sources:
                    self.files.done(name)
                if len(group.sources) > 1:
                    _give_back()
        self._finite()
        self.model._weight_conversions = [rule for rule in self._mapping if rule.was_used()]
        return _info(self._missing, {f"{name} in {self.files.where[name]}" for name in unexpected})

    def _plan(self) -> tuple[dict[str, Group], set[str]]:
        """Groups by their first target, in the natural order of names, and the tensors that the model has no place for.

        The rules are those of transformers' ``convert_and_load_state_dict_in_model``.
        """
        renamings = [rule for rule in self._mapping if isinstance(rule, WeightRenaming)]
        converters = [rule for rule in self._mapping if isinstance(rule, WeightConverter)]
        by_pattern = {pattern: rule for rule in converters for pattern in rule.source_patterns}
        prefix: str = self.model.base_model_prefix
        groups: dict[str, Group] = {}
        unexpected: dict[str, str] = {}
        for name in sorted(self.files.where, key=dot_natural_key):
            target, pattern = rename_source_key(name, renamings, converters, prefix, self.targets)
            if target not in self.targets and name in self.targets:
                target, pattern = rename_source_key(name, [], [], prefix, self.targets)
            if target not in self.targets:
                unexpected[target] = name
                continue
            if target not in groups:
                groups[target] = Group(deepcopy(by_pattern[pattern]) if pattern else WeightRenaming(name, target))
            groups[target].sources.append(name)
            groups[target].transform.add_tensor(target, name, pattern or name, self._reader(name, target))
        info = _info(unexpected=set(unexpected))
        self.model._adjust_missing_and_unexpected_keys(info)  # what the class itself says may be there
        return groups, {unexpected[target] for target in info.unexpected_keys}

    def _reader(self, name: str, target: str) -> Callable[[], torch.Tensor]:
        """Reads one tensor when its group's turn comes; cast before it is converted unless only a part is kept."""
        place = self.targets[target]

        def read() -> torch.Tensor:
            tensor = self.files.get(name)
            # Copied, as a view of the mapped file may not be written to and would be read from disk again and again.
            return tensor if self.partitioned else tensor.to(self._dtype_of(target) or place.dtype, copy=True)

        return read

    def _fill(self, first: str, group: Group) -> None:
        try:
            made = group.transform.convert(first, model=self.model, config=self.model.config)
        except (RuntimeError, IndexError, KeyError) as error:
            raise ModelError(
                f"{self._origin(group)}: {first} cannot be made from {len(group.sources)} tensors: {error}"
            ) from error
        for target, value in made.items():
            tensor = value[0] if isinstance(value, list) else value
            if target not in self.targets:
                raise ModelError(f"{self._origin(group)}: becomes {target}, which the model has not")
            place: Any = self.targets[target]
            shape = tuple(getattr(place, "ds_shape", place.shape))
            if tuple(tensor.shape) != shape:
                raise ModelError(
                    f"{self._origin(group)}: shape {tuple(tensor.shape)}"
                    + (f" of the {len(group.sources)} tensors that become {target}" if len(group.sources) > 1 else "")
                    + f", but the model has {shape}"
                )
            self._missing.discard(target)
            self._checks.append((target, group, torch.isfinite(self._put(target, place, tensor)).all()))

    def _put(self, target: str, place: Any, tensor: torch.Tensor) -> torch.Tensor:
        """Store a tensor in the model; what this rank keeps of it."""
        if hasattr(place, "ds_id"):
            place._is_hf_initialized = True
            if target in self._fp32:
                place.data, place.ds_tensor = place.data.float(), None  # DeepSpeed makes its part anew, in this dtype
            return keep_own_part(place, tensor)
        if self.partitioned:
            place.copy_(tensor)
            place._is_hf_initialized = True
            return place
        owner = self.model.get_submodule(target.rpartition(".")[0])
        name = target.rpartition(".")[2]
        stored: Any = tensor
        if name in owner._parameters:
            stored = torch.nn.Parameter(tensor, requires_grad=tensor.is_floating_point())
        stored._is_hf_initialized = True  # transformers makes up anew what lacks this mark
        setattr(owner, name, stored)
        return stored

    def _finite(self) -> None:
        """Look at all results at once: one wait for the device, not one a tensor. Raises ModelError."""
        flags = torch.stack([flag.cpu() for _, _, flag in self._checks]) if self._checks else torch.ones(0)
        for (target, group, _), fine in zip(self._checks, flags.tolist(), strict=True):
            if not fine:
                bad = [name for name in group.sources if not torch.isfinite(self.files.get(name)).all()]
                if bad:
                    raise ModelError(f"{self.files.where[bad[0]]}: tensor {bad[0]} has values that are NaN or infinite")
                raise ModelError(
                    f"{self._origin(group)}: values too large for the dtype that {target} is trained in; use --bf16, or neither"
                )

    def _origin(self, group: Group) -> str:
        return f"{self.files.where[group.sources[0]]}: tensor {group.sources[0]}"


def keep_own_part(parameter: Any, tensor: torch.Tensor) -> torch.Tensor:
    """Store a full tensor, which every rank has at hand, in a parameter that ZeRO-3 has partitioned; this rank's part.

    DeepSpeed's own ``partition`` copies the part (and casts it, and moves it to where parameters live).
    """
    from deepspeed.runtime.zero.offload_config import OffloadDeviceEnum

    if (
        getattr(parameter.ds_tensor, "final_location", None) == OffloadDeviceEnum.nvme
    ):  # DeepSpeed's files: through its own door
        from deepspeed.runtime.zero.partition_parameters import GatheredParameters

        with GatheredParameters([parameter], modifier_rank=0):
            parameter.data.copy_(tensor)
        return tensor
    placeholder = parameter.data
    parameter.data = tensor if parameter.ds_tensor is not None else tensor.to(placeholder.dtype)
    parameter.ds_status = type(parameter.ds_status).AVAILABLE
    parameter.partition(has_been_updated=True)
    parameter.data = placeholder
    kept: Any = parameter.ds_tensor
    start = kept.ds_numel * parameter.ds_zero_partition_rank
    return kept.narrow(0, 0, max(0, min(kept.ds_numel, parameter.ds_numel - start)))


def _give_back() -> None:
    """Return freed memory to the system: glibc keeps holes between what lives on, and groups of tensors leave many."""
    with suppress(OSError, AttributeError):  # another C library
        ctypes.CDLL("libc.so.6").malloc_trim(0)


def _info(missing: Collection[str] = (), unexpected: Collection[str] = ()) -> LoadStateDictInfo:
    return LoadStateDictInfo(
        missing_keys=set(missing), unexpected_keys=set(unexpected), mismatched_keys=set(), error_msgs=[],
        conversion_errors={}, skipped_pp_keys=set(),
    )  # fmt: skip


def _dtypes(plan: dict[str, torch.dtype]) -> Callable[[str], torch.dtype | None]:
    """The dtype that the model asks for by name (``_keep_in_fp32_modules``), or None."""
    if not plan:
        return lambda _: None
    pattern, keys, _ = build_glob_alternation(list(plan))

    def find(name: str) -> torch.dtype | None:
        match = pattern.search(name)
        return plan[keys[str(match.lastgroup)]] if match else None

    return find
