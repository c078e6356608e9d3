"""PEFT adapters on disk: what they change, by the name of the parameter in the model in memory.

Reads ``adapter_config.json`` and ``adapter_model.safetensors`` as PEFT and finebridge save them
(https://github.com/huggingface/peft). rsLoRA (scale alpha / sqrt(r)): https://arxiv.org/abs/2312.03732.
"""

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, Self, cast

import torch

from ..storage.assets import read_json
from ..storage.safetensors_io import Checkpoint
from .lora_delta import AdapterError, LowRank, Replacement, is_finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."
# Settings that do not change what the tensors mean here. Any other setting that is set stops the merge: a kind of
# adapter that is merged as plain LoRA without being one gives wrong weights.
_UNDERSTOOD = {
    "alora_invocation_tokens": None, "alpha_pattern": ..., "auto_mapping": ..., "base_model_name_or_path": ..., "bias": ...,
    "ensure_weight_tying": ..., "exclude_modules": ..., "fan_in_fan_out": ..., "inference_mode": ..., "layers_pattern": ...,
    "layers_to_transform": ..., "lora_alpha": ..., "lora_bias": ..., "lora_dropout": ..., "megatron_config": ...,
    "megatron_core": ..., "modules_to_save": ..., "peft_type": ..., "peft_version": ..., "qalora_group_size": ..., "r": ...,
    "rank_pattern": ..., "revision": ..., "runtime_config": ..., "target_modules": ..., "target_modules_to_tie": ...,
    "target_parameters": ..., "task_type": ..., "use_dora": ..., "use_rslora": ...,
}  # fmt: skip
# Starting values of A and B that leave the base as it is (others, such as pissa and olora, change the base's weights).
_INITIAL = (True, False, None, "gaussian", "orthogonal", "eva")
# PEFT's names of the tensors of one module, behind the module's own name; in old files the lengths end in ".weight".
_KINDS = re.compile(
    r"(?P<module>.*?)(?P<nested>(\.base_layer)*)\.lora_(?P<kind>A\.weight|B\.weight|B\.bias|embedding_A|embedding_B|"
    r"magnitude_vector)(\.weight)?"
)


@dataclass(slots=True)
class Factors:
    """The tensors of one adapted module. ``nested`` counts the parameters of it that were wrapped later."""

    module: str
    nested: int
    kinds: dict[str, torch.Tensor] = field(default_factory=dict[str, torch.Tensor])

    @property
    def key(self) -> str:
        """As PEFT names it, for messages."""
        return self.module + ".base_layer" * self.nested


class Adapter:
    """An adapter's folder, its factors in memory, its whole modules on disk; use it as a context manager.

    ``factors`` are by module; ``whole`` names the parameters that were trained whole; ``copies`` those whose own frozen
    weight PEFT stored beside its factors. Raises AdapterError when a file is missing, a setting is not understood, a
    tensor is of no known kind or not finite.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in (CONFIG, WEIGHTS):
            if not (folder / name).is_file():
                old = (folder / "adapter_model.bin").is_file()
                raise AdapterError(
                    f"{folder / name}: missing; "
                    + (
                        "adapter_model.bin is of an old PEFT, load and save it once with a new one"
                        if old
                        else "--adapter_model_path takes the folder that PEFT or finebridge saved"
                    )
                )
        self.config = read_json(folder / CONFIG)
        self._check_settings()
        self.file = Checkpoint(folder, [WEIGHTS])
        self.factors: dict[tuple[str, int], Factors] = {}
        self.whole: dict[str, str] = {}  # parameter in the model -> tensor of the file
        self.copies: dict[str, str] = {}
        with self.file:
            for key in self.file:
                self._sort(key)
        if not self.factors and not self.whole:
            raise AdapterError(f"{folder / WEIGHTS}: holds no LoRA factors and no trained modules")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self.file.__exit__(kind, error, where)

    @property
    def made_for(self) -> str:
        """The base that the adapter names, for messages; it may be empty."""
        return str(self.config.get("base_model_name_or_path") or "")

    @property
    def names(self) -> set[str]:
        """The weights that it may change, by name; of modules with several parameters only the module is known here."""
        return {f"{module}.weight" for module, _ in self.factors} | set(self.whole)

    def replacement(self, name: str) -> Replacement:
        """The whole trained parameter ``name``, as a matrix."""
        key = self.whole[name]
        shape = self.file.shapes[key]
        return Replacement(name, matrix(shape), lambda start, stop: self.file.read(key, start, stop))

    def linear(self, found: Factors, shape: tuple[int, ...], *, turned: bool) -> Iterator[tuple[str, LowRank]]:
        """What the factors of a linear or embedding module do to its weight of ``shape``, and to its bias, by name.

        A weight that lies as [in, out] is told by its shape; ``turned`` tells it of a square one. The config's
        ``fan_in_fan_out`` does not: PEFT sets it by the module that it wrapped last.
        """
        name, kinds = f"{found.module}.weight", found.kinds
        lengths = kinds.pop("magnitude_vector", None)
        if "embedding_A" in kinds:
            if lengths is not None:
                raise AdapterError(f"{name}: DoRA on an embedding is not merged; train it without --use_dora or LoRA")
            left, right = _pair(found, "embedding_A", "embedding_B")
            scale = self.scale(found.module, left.shape[0])
            yield name, LowRank(name, left.T.contiguous(), right.T.contiguous(), scale)
            return
        a, b = _pair(found, "A.weight", "B.weight")
        scale = self.scale(found.module, a.shape[0])
        bias = kinds.pop("B.bias", None)
        if bias is not None:
            yield f"{found.module}.bias", LowRank(f"{found.module}.bias", bias.unsqueeze(1), torch.ones(1, 1), scale)
        if turned or (shape == (a.shape[1], b.shape[0]) and b.shape[0] != a.shape[1]):
            if lengths is not None:
                raise AdapterError(f"{name}: DoRA on a weight that is stored as [in, out] is not merged")
            yield name, LowRank(name, a.T.contiguous(), b.T.contiguous(), scale)
        else:
            yield name, LowRank(name, b, a, scale, lengths)

    def experts(self, found: Factors, parameter: str, shape: tuple[int, ...], *, transposed: bool) -> list[LowRank]:
        """What factors on a parameter [experts, rows, cols] (or one matrix) do to each expert's matrix.

        A is [experts * rank, in] and B [out, rank * experts], expert by expert in A and interleaved in B; a matrix is
        [out, in], or [in, out] when the module says ``is_transposed`` (PEFT ``tuners/lora/layer.py``, ParamWrapper).
        """
        name = f"{found.module}.{parameter}"
        count = shape[0] if len(shape) == 3 else 1  # noqa: PLR2004
        a, b = _pair(found, "A.weight", "B.weight")
        if a.shape[0] % count:
            raise AdapterError(f"{name}: lora_A has {a.shape[0]} rows, which {count} experts cannot share")
        rank = a.shape[0] // count
        lefts = b.view(b.shape[0], rank, count).permute(2, 0, 1)
        rights = a.view(count, rank, a.shape[1])
        if transposed:
            lefts, rights = rights.transpose(1, 2), lefts.transpose(1, 2)
        scale = self.scale(name, rank)
        return [
            LowRank(name, left.contiguous(), right.contiguous(), scale)
            for left, right in zip(lefts, rights, strict=True)
        ]

    def _sort(self, key: str) -> None:
        """Enter one tensor of the file. Raises AdapterError when it is of no known kind or not finite."""
        name = key.removeprefix(_PREFIX)
        if not math.prod(self.file.shapes[key]):
            raise AdapterError(
                f"{key}: is empty {self.file.shapes[key]}; it was not gathered from the ranks when saved"
            )
        match = _KINDS.fullmatch(name)
        if match:
            value = self.file.get(key).float()
            if not is_finite(value):
                raise AdapterError(f"{key}: the adapter holds values that are not finite")
            place = match["module"], match["nested"].count("base_layer")
            self.factors.setdefault(place, Factors(*place)).kinds[match["kind"]] = value
        elif name == key or ".token_adapter." in name or ".lora_" in name:
            raise AdapterError(f"{self.folder / WEIGHTS}: {key} is not a tensor that the merge knows")
        elif ".base_layer." in name and not (name.endswith(".bias") and self.config.get("bias", "none") != "none"):
            self.copies[name.replace(".base_layer.", ".")] = key
        else:
            self.whole[name.replace(".base_layer.", ".")] = key

    def _check_settings(self) -> None:
        path = self.folder / CONFIG
        if self.config.get("peft_type") != "LORA":
            raise AdapterError(f"{path}: peft_type is {self.config.get('peft_type')!r}; only LORA adapters are merged")
        if (initial := self.config.get("init_lora_weights", True)) not in _INITIAL:
            raise AdapterError(
                f"{path}: init_lora_weights is {initial!r}, which changes the base; save such an adapter with PEFT's "
                "path_initial_model_for_weight_conversion, which makes a plain one of it"
            )
        for key, value in self.config.items():
            plain = _UNDERSTOOD.get(key)
            if plain is ... or key == "init_lora_weights" or value in (plain, None, False, [], {}):
                continue
            raise AdapterError(f"{path}: {key} is {value!r}; such adapters are not merged")
        for key in ("lora_alpha", "r"):
            if not _is_number(value := self.config.get(key)):
                raise AdapterError(f"{path}: {key} is {value!r}; a number is expected")
        for key in ("rank_pattern", "alpha_pattern"):
            value = self.config.get(key) or {}
            if not isinstance(value, dict) or not all(
                _is_pattern(name) and _is_number(number) for name, number in cast("dict[str, Any]", value).items()
            ):
                raise AdapterError(f"{path}: {key} is {value!r}; numbers by regular expressions are expected")
        value = self.config.get("target_parameters") or []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in cast("list[Any]", value)):
            raise AdapterError(f"{path}: target_parameters is {value!r}; a list of names is expected")

    def scale(self, name: str, rank: int) -> float:
        """Alpha / rank, or alpha / sqrt(rank), of a module. Raises AdapterError when the config says another rank."""
        return self.alpha(name, rank) / (math.sqrt(rank) if self.config.get("use_rslora") else rank)

    def alpha(self, name: str, rank: int) -> float:
        """The alpha of a module of this rank. Raises AdapterError when the config says another rank."""
        said = _of_pattern(self.config.get("rank_pattern"), name, self.config["r"])
        if rank != said:
            raise AdapterError(
                f"{name}: lora_A has rank {rank}, {CONFIG} says {said}; the two files do not belong together"
            )
        return float(_of_pattern(self.config.get("alpha_pattern"), name, self.config["lora_alpha"]))


def matrix(shape: tuple[int, ...]) -> tuple[int, int]:
    """A tensor's shape as rows and columns: a vector has one column, experts lie below each other."""
    return (math.prod(shape[:-1]), shape[-1]) if len(shape) > 1 else (math.prod(shape), 1)


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_pattern(text: str) -> bool:
    try:
        re.compile(text)
    except re.error:
        return False
    return True


def _of_pattern(pattern: Mapping[str, Any] | None, name: str, default: Any) -> Any:
    """The value whose key matches the end of ``name``, in the way of PEFT's ``get_pattern_key``."""
    return next((value for key, value in (pattern or {}).items() if re.match(rf"(.*\.)?({key})$", name)), default)


def _pair(found: Factors, first: str, second: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Both factors of a module, taken out of ``found``. Raises AdapterError when one lacks or they do not fit."""
    a, b = found.kinds.pop(first, None), found.kinds.pop(second, None)
    if a is None or b is None:
        raise AdapterError(f"{found.key}: the adapter has only one of lora_{first} and lora_{second}")
    if a.ndim != 2 or b.ndim != 2 or a.shape[0] != b.shape[1]:  # noqa: PLR2004
        raise AdapterError(f"{found.key}: lora_A {tuple(a.shape)} and lora_B {tuple(b.shape)} do not fit together")
    return a, b
