"""PEFT's adapter folders as pairs of factors by the names of Hugging Face's weights, and back.

LoRA on all experts of a block at once (``target_parameters``) is taken apart by expert, and put together again where the
pairs allow it, as transformers 5 holds experts so.
"""

import json
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch

from ..merge.adapter import CONFIG, WEIGHTS, Adapter, Factors
from ..storage.hashing import Ledger
from ..storage.publish import publish
from ..storage.safetensors_io import write_tensors
from .errors import BridgeError
from .family import Row
from .lora import Pair

_EXPERT = re.compile(r"(.+\.experts)\.(\d+)\.\w+\.weight")
_STACKS = ("gate_up_proj", "down_proj")  # the parameters of an experts module, in the order in which PEFT wraps them
_PREFIX = "base_model.model."


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds a PEFT adapter."""
    return (folder / CONFIG).is_file()


def read_adapter(folder: Path, rows: Iterable[Row]) -> dict[str, Pair]:
    """The pairs of a PEFT adapter, by the names of the weights on disk.

    Raises AdapterError, and BridgeError naming what is no plain LoRA: rsLoRA, DoRA, biases, embeddings, modules that were
    trained whole.
    """
    with Adapter(folder) as adapter:
        if adapter.config.get("use_rslora"):
            raise BridgeError(
                f"{folder / CONFIG}: use_rslora: its scale alpha / sqrt(r) is none of Megatron's trainers; "
                "merge the adapter with finebridge merge and convert the result"
            )
        if whole := sorted([*adapter.whole, *adapter.copies]):
            raise BridgeError(
                f"{folder / WEIGHTS}: {whole[0]} is held whole, Megatron's LoRA has no place for it; merge the adapter with "
                "finebridge merge and convert the result"
            )
        dtypes = {adapter.file.dtypes[key] for key in adapter.file}
        dtype = dtypes.pop() if len(dtypes) == 1 else torch.float32
        blocks = _blocks(rows)
        nested: defaultdict[str, list[Factors]] = defaultdict(list)
        for place in sorted(adapter.factors):
            nested[place[0]].append(adapter.factors[place])
        pairs: dict[str, Pair] = {}
        for module, found in nested.items():
            for factors in found:
                _check_kinds(factors)
            if module in blocks:
                pairs |= _experts(adapter, module, found, blocks[module], dtype)
            elif len(found) > 1 or found[0].nested:
                raise BridgeError(f"{found[-1].key}: LoRA on a parameter of this module is not converted")
            else:
                pairs[f"{module}.weight"] = _plain(adapter, found[0], dtype)
        return pairs


def _check_kinds(factors: Factors) -> None:
    """Raise BridgeError unless these are A and B alone."""
    reasons = {
        "magnitude_vector": "DoRA scales rows of the whole weight, which Megatron's trainers do not",
        "embedding_A": "LoRA on embeddings has no place in Megatron",
        "embedding_B": "LoRA on embeddings has no place in Megatron",
        "B.bias": "a bias of lora_B has no place in Megatron",
    }
    for kind, reason in reasons.items():
        if kind in factors.kinds:
            raise BridgeError(
                f"{factors.key}: lora_{kind}: {reason}; merge the adapter with finebridge merge and convert the result"
            )


def _plain(adapter: Adapter, found: Factors, dtype: torch.dtype) -> Pair:
    (_, change), *_ = adapter.linear(found, (), turned=False)
    alpha = adapter.alpha(found.module, change.right.shape[0])
    return Pair(change.right.to(dtype), change.left.to(dtype), Fraction(alpha) / change.right.shape[0])


def _blocks(rows: Iterable[Row]) -> dict[str, dict[int, list[Row]]]:
    """The rows of each module of experts, by expert."""
    blocks: defaultdict[str, defaultdict[int, list[Row]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        if found := _EXPERT.fullmatch(row.hf[0]):
            blocks[found[1]][int(found[2])].append(row)
    return {module: dict(experts) for module, experts in blocks.items()}


def _of_stack(experts: Mapping[int, list[Row]], parameter: str) -> list[Row]:
    """Of each expert the row that is its part of a stacked parameter."""
    size = 2 if parameter == _STACKS[0] else 1
    return [row for expert in sorted(experts) for row in experts[expert] if len(row.hf) == size]


def _experts(
    adapter: Adapter, module: str, nested: list[Factors], experts: Mapping[int, list[Row]], dtype: torch.dtype
) -> dict[str, Pair]:
    """The pairs of single experts, of LoRA on their stacked weights; each was wrapped around the one before it."""
    targets = [target.rpartition(".") for target in adapter.config.get("target_parameters") or []]
    named = {parameter for owner, _, parameter in targets if f".{module}".endswith(f".{owner}")}
    stacks = [parameter for parameter in _STACKS if parameter in named]
    if len(stacks) != len(nested) or len(named) != len(stacks):
        raise BridgeError(
            f"{module}: the adapter has {len(nested)} pairs of factors for it, target_parameters name {sorted(named)}; "
            f"{' and '.join(_STACKS)} are known"
        )
    pairs: dict[str, Pair] = {}
    for found, parameter in zip(reversed(nested), stacks, strict=True):
        changes = adapter.experts(found, parameter, (len(experts), 0, 0), transposed=False)
        rank = changes[0].right.shape[0]
        scale = Fraction(adapter.alpha(f"{module}.{parameter}", rank)) / rank
        for row, change in zip(_of_stack(experts, parameter), changes, strict=True):
            parts = change.left.to(dtype).chunk(len(row.hf))
            pairs |= {name: Pair(change.right.to(dtype), b, scale) for name, b in zip(row.hf, parts, strict=True)}
    return pairs


def write_adapter(
    save: Path,
    pairs: Mapping[str, Pair],
    rows: Iterable[Row],
    *,
    base: str | None,
    made_from: Mapping[str, Any],
    overwrite: bool,
) -> None:
    """Write pairs as the PEFT adapter ``save``; it appears whole or not at all. Raises FileExistsError, OSError."""
    rows = list(rows)
    plain, stacks = _stacked(pairs, rows)
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, Pair] = {}  # a pair with the rank and scale, by the name that PEFT's patterns are compared with
    modules = {weight.removesuffix(".weight"): pair for weight, pair in plain.items()}
    for module, pair in modules.items():
        ranks[module] = pair
        tensors |= _named(module, pair.a, pair.b)
    for module, parameters in stacks.items():
        for depth, (parameter, experts) in enumerate(reversed(parameters.items())):
            ranks[f"{module}.{parameter}"] = experts[0]
            a, b = torch.cat([one.a for one in experts]), torch.stack([one.b for one in experts], dim=2).flatten(1)
            tensors |= _named(module + ".base_layer" * depth, a, b)
    config = _config(ranks, rows, list(modules), stacks, base)
    written: dict[str, dict[str, Any]] = {}
    with publish(save, kind="adapter", made_from=made_from, replace=overwrite, written=written) as folder:
        Ledger(folder, written).write(folder / WEIGHTS, lambda stream: write_tensors(stream, tensors))
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _named(module: str, a: torch.Tensor, b: torch.Tensor) -> dict[str, torch.Tensor]:
    return {f"{_PREFIX}{module}.lora_{kind}.weight": value.contiguous() for kind, value in (("A", a), ("B", b))}


def _stacked(
    pairs: Mapping[str, Pair], rows: Iterable[Row]
) -> tuple[dict[str, Pair], dict[str, dict[str, list[Pair]]]]:
    """The pairs of plain modules, and by module of experts and parameter those of its experts.

    Experts are stacked when each has them, of one rank, gate and up with the same A.
    """
    plain, stacks = dict(pairs), dict[str, dict[str, list[Pair]]]()
    for module, experts in _blocks(rows).items():
        found: dict[str, list[Pair]] = {}
        for parameter in _STACKS:
            parts = [[pairs.get(name) for name in row.hf] for row in _of_stack(experts, parameter)]
            if not any(one for part in parts for one in part):
                continue
            joined = [_joined([one for one in part if one]) for part in parts if all(part)]
            kept = [one for one in joined if one]
            if len(kept) < len(parts) or len({one.rank for one in kept}) > 1:
                found = {}
                break
            found[parameter] = kept
        if found:
            stacks[module] = found
            for row in (row for parameter in found for row in _of_stack(experts, parameter)):
                for name in row.hf:
                    plain.pop(name)
    return plain, stacks


def _joined(parts: list[Pair]) -> Pair | None:
    """One pair for weights below each other, when they have the same A."""
    if any(part.a.shape != parts[0].a.shape or not part.a.equal(parts[0].a) for part in parts):
        return None
    return Pair(parts[0].a, torch.cat([part.b for part in parts]), parts[0].scale)


def _config(
    ranks: Mapping[str, Pair],
    rows: Iterable[Row],
    modules: list[str],
    stacks: Mapping[str, Mapping[str, object]],
    base: str | None,
) -> dict[str, Any]:
    """adapter_config.json of these modules: the most common rank is ``r``, others are patterns."""
    common = Counter(pair.rank for pair in ranks.values()).most_common(1)[0][0]
    scale = next(iter(ranks.values())).scale
    ends: defaultdict[str, set[int]] = defaultdict(set)
    for name, pair in ranks.items():
        ends[name.rpartition(".")[2]].add(pair.rank)
    other = {
        end if len(ends[end]) == 1 else re.escape(name): pair.rank
        for name, pair in ranks.items()
        if pair.rank != common and (end := name.rpartition(".")[2])
    }
    names = {name.removesuffix(".weight") for row in rows for name in row.hf if name.endswith(".weight")}
    whole = {end for end in ends if not (_ending(names, end) - set(modules))}
    targets = {end if (end := name.rpartition(".")[2]) in whole else name for name in modules}
    return {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": base, "r": common,
        "lora_alpha": _number(scale * common), "rank_pattern": other,
        "alpha_pattern": {name: _number(scale * rank) for name, rank in other.items()}, "lora_dropout": 0.0, "bias": "none",
        "use_rslora": False, "use_dora": False, "fan_in_fan_out": False, "init_lora_weights": True, "inference_mode": True,
        "target_modules": sorted(targets), "modules_to_save": None,
        "target_parameters": sorted(f"{module}.{parameter}" for module, found in stacks.items() for parameter in found) or None,
    }  # fmt: skip


def _ending(names: Iterable[str], end: str) -> set[str]:
    return {name for name in names if name.endswith(f".{end}")}


def _number(value: Fraction) -> int | float:
    return int(value) if value.denominator == 1 else float(value)
