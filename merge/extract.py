"""A low-rank adapter from two checkpoints: the best of a rank for each weight's difference, by singular values.

    finebridge merge extract --base_model_path B --tuned_model_path T --output_path O --rank 16

Differences are taken and cut tensor by tensor, so that memory holds one of them and the adapter. What is no weight of a
linear layer, and a linear layer whose bias differs, is kept whole (``modules_to_save``). Nothing that differs is left out;
how much of each difference the rank holds is told.
"""

import argparse
import json
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.assets import carry, is_tokenizer_asset
from ..storage.publish import publish

if TYPE_CHECKING:
    import torch

    from ..storage.safe_load import Weights

_MORE = 16  # directions beside the rank that the search for the largest ones keeps


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser("finebridge merge extract", description=__doc__, allow_abbrev=False)
    add = result.add_argument
    add("--base_model_path", required=True, type=Path, help="folder of the model that was tuned")
    add("--tuned_model_path", required=True, type=Path, help="folder of what became of it")
    add("--output_path", required=True, type=Path, help="new folder for the adapter")
    add("--rank", required=True, type=int, help="rank of the adapter; a smaller weight gets what it has")
    add("--trust_remote_code", action="store_true", help="allow the base's own Python files to be run")
    add("--overwrite", action="store_true", help="replace what --output_path holds")
    return result


def main(argv: Sequence[str]) -> int:
    """Extract as the command line says; exit code 0. Raises ValueError and OSError, see ``extract``."""
    args = parser().parse_args(argv)
    if args.rank < 1:
        raise ValueError(f"--rank {args.rank}: at least 1 is needed")
    if args.output_path.exists() and not args.overwrite:
        raise ValueError(f"--output_path {args.output_path} exists already; choose another folder or give --overwrite")
    extract(
        args.base_model_path, args.tuned_model_path, args.output_path, args.rank,
        trust_remote_code=args.trust_remote_code, overwrite=args.overwrite,
    )  # fmt: skip
    return 0


def extract(
    base: Path, tuned: Path, output: Path, rank: int, *,
    trust_remote_code: bool = False, overwrite: bool = False, say: Callable[[str], None] = print,
) -> None:  # fmt: skip
    """Write to ``output`` an adapter of ``base`` whose merge is ``tuned``, as far as ``rank`` goes.

    Raises AdapterError when the two have not the same tensors or do not differ, PlacementError for a tensor that no module
    of the model's class holds as it is on disk, FileExistsError, FileNotFoundError, ValueError.
    """
    from ..storage.hashing import Ledger
    from ..storage.safe_load import open_weights
    from ..storage.safetensors_io import write_tensors
    from .adapter import CONFIG, WEIGHTS

    written: dict[str, dict[str, Any]] = {}
    made_from = {"base": str(base), "tuned": str(tuned), "rank": rank}
    with (
        open_weights(base) as old,
        open_weights(tuned) as new,
        publish(output, kind="adapter", made_from=made_from, replace=overwrite, written=written) as folder,
    ):
        tensors, config = _adapter(old, new, rank, trust_remote_code, say)
        Ledger(folder, written).write(folder / WEIGHTS, lambda stream: write_tensors(stream, tensors))
        config["base_model_name_or_path"] = str(base)
        (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
        carry(tuned, folder, skip={path.name for path in tuned.iterdir() if not is_tokenizer_asset(path.name)})
    say(f"extracted an adapter of rank {rank} into {output}")


def _adapter(
    old: "Weights", new: "Weights", rank: int, trust_remote_code: bool, say: Callable[[str], None]
) -> tuple[dict[str, "torch.Tensor"], dict[str, Any]]:
    """Tensors by PEFT's names, and PEFT's settings."""
    import torch

    from .lora_delta import AdapterError, is_finite
    from .placement import Placement

    if old.shapes != new.shapes:
        odd = sorted(name for name in {*old, *new} if old.shapes.get(name) != new.shapes.get(name))
        raise AdapterError(
            f"{odd[0]}: {old.shapes.get(odd[0], 'missing')} in {old.folder}, {new.shapes.get(odd[0], 'missing')} in "
            f"{new.folder}; {len(odd)} tensors are not in both alike"
        )
    placement = Placement(old.folder, old.shapes, shapes=old.shapes, trust_remote_code=trust_remote_code)
    changed: dict[str, list[str]] = {}  # module -> its tensors that differ
    for name in old:
        if not old.get(name).to(new.dtypes[name]).equal(new.get(name)):
            changed.setdefault(name.rpartition(".")[0], []).append(name)
    if not changed:
        raise AdapterError(f"{new.folder} holds the same weights as {old.folder}: there is nothing to extract")
    tensors: dict[str, torch.Tensor] = {}
    ranks: dict[str, int] = {}
    kept: dict[str, float] = {}
    whole: dict[str, None] = {}
    for module, names in changed.items():
        weight = f"{module}.weight"
        if names == [weight] and isinstance(placement.module(module), torch.nn.Linear):
            delta = new.get(weight).double() - old.get(weight)
            if not is_finite(delta):
                raise AdapterError(f"{weight}: holds values that are not finite in {old.folder} or {new.folder}")
            left, right, kept[module] = _cut(delta, rank)
            tensors[f"base_model.model.{module}.lora_A.weight"] = right
            tensors[f"base_model.model.{module}.lora_B.weight"] = left
            ranks[module] = len(right)
        else:
            placement.module(module)
            whole |= dict.fromkeys([module])
            for name in (name for name in new if name.rpartition(".")[0] == module):
                tensors[f"base_model.model.{name}"] = new.get(name)
            for name in {
                name for pair in placement.tied({weight}) for name in pair
            }:  # as one tensor, so they stay tied
                whole |= dict.fromkeys([name.rpartition(".")[0]])
                tensors[f"base_model.model.{name}"] = new.get(weight)
    if kept:
        least = min(kept, key=lambda module: kept[module])
        say(f"{len(kept)} differences cut to rank {rank}: at least {kept[least]:.2%} of each is kept ({least})")
    if whole:
        say(f"{len(whole)} modules are stored whole, the first is {next(iter(whole))}")
    patterns = {re.escape(module): own for module, own in ranks.items() if own != rank}
    return tensors, {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "r": rank, "lora_alpha": rank, "lora_dropout": 0.0, "bias": "none",
        "inference_mode": True, "rank_pattern": patterns, "alpha_pattern": patterns, "target_modules": [*ranks],
        "modules_to_save": [*whole] or None,
    }  # fmt: skip


def _cut(delta: "torch.Tensor", rank: int) -> "tuple[torch.Tensor, torch.Tensor, float]":
    """The two fp32 factors of the best approximation of a rank, and the share of the difference's norm that it keeps.

    Few of many directions are found from a random start, the same for everyone (https://arxiv.org/abs/0909.4061).
    """
    import torch

    rank = min(rank, *delta.shape)
    if 4 * (rank + _MORE) >= min(delta.shape):
        u, s, v = torch.linalg.svd(delta, full_matrices=False)
        v = v.T
    else:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            u, s, v = torch.svd_lowrank(delta, q=rank + _MORE, niter=4)
    root = s[:rank].sqrt()
    left, right = (u[:, :rank] * root).float(), (v[:, :rank] * root).T.float().contiguous()
    lost = delta - left.double() @ right.double()
    return left, right, 1 - float(lost.norm() / delta.norm())
