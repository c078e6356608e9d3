"""An adapter in the form that vLLM loads, LoRA on fused experts above all.

PEFT stores LoRA on all experts of a block in two stacked pairs (``target_parameters``). vLLM reads two forms
(``vllm/lora/model_manager.py``; ``pack_moe`` of ``vllm/lora/lora_weights.py``):

- one pair a weight of each expert, ``...mlp.experts.3.gate_proj.lora_A.weight``, by the names that the base has on disk;
  every weight of every expert must have one. Model classes whose files hold experts one by one take this form.
- the stacked pairs, the first matrix under ``experts.base_layer`` and the second under ``experts``; both must be there.
  Model classes with ``is_3d_moe_weight``, whose files hold fused experts, take this one.

So the base's files tell which is written; ``vllm serve --enable-mixed-moe-lora-format`` takes either, told which. vLLM knows
one scale an adapter, ``lora_alpha / r`` of the config (``vllm/lora/peft_helper.py``): others are multiplied into lora_B.
"""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..storage.assets import carry
from ..storage.hashing import Ledger
from ..storage.publish import publish
from ..storage.safe_load import open_weights
from ..storage.safetensors_io import write_tensors
from .adapter import CONFIG, WEIGHTS, Adapter, Factors
from .lora_delta import AdapterError, LowRank
from .placement import STACK, Placement
from .plan import targeted

_PREFIX = "base_model.model."
_STACKED = 2  # parameters of an experts module that vLLM's stacked form has: into the experts and out of them


def export_adapter(
    adapter: Path,
    base: Path,
    output: Path,
    *,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    say: Callable[[str], None] = print,
) -> None:
    """Write ``adapter``, made for ``base``, to the new folder ``output`` in vLLM's form; it appears whole or not at all.

    What is no LoRA on fused experts is copied; ``say`` is told what was changed and what vLLM will refuse. Raises
    AdapterError or PlacementError (a tensor has no place, a form that vLLM has not), FileExistsError,
    FileNotFoundError, ValueError.
    """
    for name, folder in (("base", base), ("adapter", adapter)):
        if output.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(
                f"the folder for the exported adapter, {output}, is or contains the {name}; choose another"
            )
    with open_weights(base) as weights, Adapter(adapter) as loaded:
        placement = Placement(base, weights.shapes, shapes=weights.shapes, trust_remote_code=trust_remote_code)
        export = _Export(loaded, placement)
        export.run()
        for line in export.said:
            say(line)
        written: dict[str, dict[str, Any]] = {}
        made_from = {"adapter": str(adapter), "base": str(base)}
        with publish(output, kind="adapter", made_from=made_from, replace=overwrite, written=written) as folder:
            Ledger(folder, written).write(folder / WEIGHTS, lambda stream: write_tensors(stream, export.tensors))
            (folder / CONFIG).write_text(json.dumps(export.config(), indent=2) + "\n", encoding="utf-8")
            carry(adapter, folder)


class _Export:
    """The tensors and the config of the exported adapter, put together module by module."""

    def __init__(self, adapter: Adapter, placement: Placement) -> None:
        self.adapter, self.placement = adapter, placement
        self.tensors: dict[str, torch.Tensor] = {}
        self.said: list[str] = []
        self._modules: dict[str, None] = {}  # that are copied
        self._leaves: set[str] = set()  # of single experts' modules
        self._stacks: set[str] = set()  # parameters that stay stacked
        self._apart: set[str] = set()  # parameters that were taken apart
        self._ranks: dict[str, int] = {}  # pattern of names -> rank, where it is not the config's
        self._rank = int(adapter.config["r"])
        self._scale = float(adapter.config["lora_alpha"]) / self._rank
        self._folded = 0
        self._dtype = next(adapter.file.dtypes[key] for key in adapter.file)

    def run(self) -> None:
        """Fill ``tensors``; every tensor of the adapter is used once. Raises AdapterError."""
        experts: set[str] = set()
        for module in dict.fromkeys(module for module, _ in self.adapter.factors):
            nested = [found for (name, _), found in sorted(self.adapter.factors.items()) if name == module]
            targets = targeted(self.adapter, module, self.placement)
            if not any(len(shape) == STACK for _, shape in targets):
                continue
            experts.add(module)
            if len(targets) != len(nested):
                raise AdapterError(
                    f"{module}: the adapter changes {len(nested)} parameters of this module, target_parameters and the "
                    f"model's class name {len(targets)}"
                )
            self._experts(module, dict(zip([name for name, _ in targets], reversed(nested), strict=True)))
        plain = self.adapter.config.get("use_rslora") and not experts  # the one scale that vLLM reads beside alpha / r
        patterns = self.adapter.config.get("rank_pattern") or self.adapter.config.get("alpha_pattern")
        if plain and not patterns:
            self._scale = self.adapter.scale("", self._rank)
        for key in self.adapter.file:
            self._copy(key, experts)
        self._tell(len(experts))

    def config(self) -> dict[str, Any]:
        """adapter_config.json of what is written: the scale of every module is ``lora_alpha / r`` of the config."""
        old = self.adapter.config
        config = dict(old)
        if self._scale == float(old["lora_alpha"]) / self._rank:
            config["use_rslora"] = False
        config["rank_pattern"] = self._ranks
        config["alpha_pattern"] = {name: self._scale * rank for name, rank in self._ranks.items()}
        modules = old.get("target_modules") or []
        if self._leaves:
            modules = sorted(self._modules) if isinstance(modules, str) else modules
            config["target_modules"] = sorted({*modules, *self._leaves})
        if self._apart or self._stacks:
            kept = {name for name in old["target_parameters"] if name.rpartition(".")[2] not in self._apart}
            config["target_parameters"] = sorted(kept | self._stacks) or None
        return config

    # ---- experts

    def _experts(self, module: str, found: dict[str, Factors]) -> None:
        """Write the factors of a module's stacks, by parameter; a stack without any gets zeros, as vLLM asks for all."""
        turned = self.placement.is_transposed(module)
        stacks = {name: shape for name, shape in self.placement.parameters(module) if len(shape) == STACK}
        if other := sorted(found.keys() - stacks.keys()):
            raise AdapterError(f"{module}.{other[0]}: vLLM has no LoRA on a parameter like this beside one on experts")
        pairs = {
            name: self.adapter.experts(found[name], name, shape, transposed=turned) if name in found else None
            for name, shape in stacks.items()
        }
        for factors in found.values():
            if factors.kinds:
                raise AdapterError(f"{factors.key}: lora_{next(iter(factors.kinds))} has no use in this adapter")
        parts = {name: self.placement.parts(f"{module}.{name}", shape) for name, shape in stacks.items()}
        if all(part.expert is not None for places in parts.values() for part in places):
            for name, shape in stacks.items():
                experts = pairs[name] or self._zeros(f"{module}.{name}", shape)
                for part in parts[name]:
                    change = experts[part.expert or 0].part(part.rows, part.cols, transposed=part.transposed)
                    self._single(part.name, change)
            self._apart |= stacks.keys()
        elif len(stacks) == _STACKED and all(len(places) == 1 for places in parts.values()):
            self._stacked(module, stacks, pairs, turned=turned)
        else:
            raise AdapterError(
                f"{module}: the base holds these experts neither one by one nor in two stacks, as vLLM asks"
            )

    def _single(self, name: str, change: LowRank) -> None:
        """The pair of one expert's weight, which is called ``name`` on disk."""
        module = name.removesuffix(".weight")
        if module == name:
            raise AdapterError(f"{change.source}: on disk a part of it is called {name}, which is no module's weight")
        self._leaves.add(module.rpartition(".")[2])
        self._put(module, change.right, change.left, change.scale)
        self._note(re.sub(r"\\\.\d+\\\.(?=[^.]*$)", r"\\.\\d+\\.", re.escape(module)), change.right.shape[0])

    def _stacked(
        self, module: str, stacks: dict[str, tuple[int, ...]], pairs: dict[str, list[LowRank] | None], *, turned: bool
    ) -> None:
        """Both stacks of a module as PEFT packs them: A [experts * rank, in], B [out, rank * experts]."""
        names = list(stacks)
        (_, height, width), (_, second_height, second_width) = stacks.values()
        read, given = (height, second_width) if turned else (width, second_height)
        if read != given:
            raise AdapterError(
                f"{module}: vLLM takes {names[0]} for the way into the experts, but it does not read {given}"
            )
        for place, name in zip((f"{module}.base_layer", module), names, strict=True):
            experts = pairs[name] or self._zeros(f"{module}.{name}", stacks[name])
            straight = [one.part(slice(0, one.shape[0]), slice(0, one.shape[1]), transposed=turned) for one in experts]
            a = torch.cat([one.right for one in straight])
            b = torch.stack([one.left for one in straight], dim=2).flatten(1)
            self._put(place, a, b, straight[0].scale)
            self._note(re.escape(f"{module}.{name}"), straight[0].right.shape[0])
        owner = module.rpartition(".")[2]
        old = self.adapter.config.get("target_parameters") or []
        self._stacks |= {f"{owner}.{name}" for name in names if not any(_ends(f"{module}.{name}", one) for one in old)}

    # ---- all tensors

    def _copy(self, key: str, experts: set[str]) -> None:
        """A tensor that is no LoRA on experts; lora_B times what the config's scale lacks."""
        module, found, kind = key.removeprefix(_PREFIX).partition(".lora_")
        if found and re.sub(r"(\.base_layer)+$", "", module) in experts:
            return
        value = self.adapter.file.get(key)
        if not found:
            self.tensors[key] = value
            return
        kind = kind.removesuffix(".weight")
        if kind in ("A", "B", "embedding_A", "embedding_B"):
            rank = value.shape[0] if kind.endswith("A") else value.shape[1]
            self._modules[module] = None
            self._note(re.escape(module), rank)
            if kind.endswith("B"):
                value = self._fold(value, self.adapter.scale(module, rank))
        elif kind == "B.bias":
            rank = self.adapter.factors[module, 0].kinds["A.weight"].shape[0]
            value = self._fold(value, self.adapter.scale(module, rank))
        self.tensors[key] = value

    def _put(self, module: str, a: torch.Tensor, b: torch.Tensor, scale: float) -> None:
        """A pair of an experts module, in the dtype of the adapter's file."""
        for kind, value in (("A", a.to(self._dtype)), ("B", self._fold(b.to(self._dtype), scale))):
            self.tensors[f"{_PREFIX}{module}.lora_{kind}.weight"] = value.contiguous()

    def _zeros(self, name: str, shape: tuple[int, ...]) -> list[LowRank]:
        """Factors that change nothing, for each expert of a stack."""
        experts, rows, cols = shape
        rank = self._rank
        return [LowRank(name, torch.zeros(rows, rank), torch.zeros(rank, cols), self._scale)] * experts

    def _fold(self, b: torch.Tensor, scale: float) -> torch.Tensor:
        """lora_B for the config's one scale in place of ``scale``; fp32 where it changes."""
        if scale == self._scale:
            return b
        self._folded += 1
        return b.float() * (scale / self._scale)

    def _note(self, pattern: str, rank: int) -> None:
        if rank != self._rank:
            self._ranks[pattern] = rank

    def _tell(self, experts: int) -> None:
        if not experts:
            self.said.append("the adapter has no LoRA on fused experts: it is exported as it is")
        elif self._leaves:
            names = ", ".join(sorted(self._leaves))
            self.said.append(f"LoRA on the experts of {experts} blocks: written for each expert's {names}")
        else:
            self.said.append(f"LoRA on the experts of {experts} blocks: stays stacked, as the base holds its experts")
        if self._folded:
            self.said.append(
                f"{self._folded} lora_B were multiplied: vLLM knows one scale for all modules, {self._scale:g}"
            )
        refused = [name for name in ("modules_to_save", "use_dora") if self.adapter.config.get(name)]
        if refused:
            self.said.append(f"warning: vLLM refuses adapters with {' or '.join(refused)}; merge this one to serve it")


def _ends(name: str, target: str) -> bool:
    """Whether PEFT takes ``target`` for the parameter ``name``."""
    return f".{name}".endswith(f".{target}")
