"""Merge a LoRA adapter into its base, offline and one tensor at a time.

    bash merge/merge_lora_weight.sh --base_model_path B --adapter_model_path A --output_path O --save_dtype bf16

Works on files: no model is built. The sum is computed in fp32 and rounded once to ``--save_dtype``; every adapter
tensor is used exactly once or the merge stops; the output appears whole or not at all.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.assets import carry, is_tokenizer_asset, read_json
from ..storage.publish import publish
from ..storage.space import EXIT_DISK_FULL, free_bytes, is_disk_full, parse_size

if TYPE_CHECKING:
    from ..storage.safetensors_io import Checkpoint
    from .lora_delta import LoraWeight

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def parser() -> argparse.ArgumentParser:
    """The command line of the merge."""
    result = argparse.ArgumentParser("finebridge merge", description=__doc__, allow_abbrev=False)
    result.add_argument("--base_model_path", required=True, type=Path, help="folder of the base model (safetensors)")
    result.add_argument(
        "--adapter_model_path", required=True, type=Path, help="folder of the adapter (a LoRA checkpoint)"
    )
    result.add_argument("--output_path", required=True, type=Path, help="new folder for the merged model")
    result.add_argument(
        "--save_dtype", choices=DTYPES, default="fp32", help="dtype of the merged weights (default fp32)"
    )
    result.add_argument("--max_shard_size", default="5GB", help="largest weight file (default 5GB)")
    result.add_argument("--overwrite", action="store_true", help="replace what --output_path holds")
    return result


def merge(
    base: Path,
    adapter: Path,
    output: Path,
    save_dtype: str = "fp32",
    max_shard_size: str = "5GB",
    *,
    overwrite: bool = False,
) -> dict[str, float]:
    """Write ``base + adapter`` to ``output``; relative size of each change, |delta| / |weight| (Frobenius), by weight.

    Raises AdapterError (adapter and base do not fit, a value is not finite or overflows ``save_dtype``),
    FileExistsError, FileNotFoundError, ValueError.
    """
    import torch

    from ..storage.hashing import Ledger
    from ..storage.safetensors_io import Checkpoint, ShardWriter
    from .lora_delta import AdapterError, load_adapter

    for name, folder in (("base", base), ("adapter", adapter)):
        if output.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(f"--output_path {output} is or contains the {name}; choose another folder")
    dtype: torch.dtype = getattr(torch, DTYPES[save_dtype])
    config = _base_config(base)
    loaded = load_adapter(adapter)
    left = loaded.weights
    changes: dict[str, float] = {}
    made_from = {"base": str(base), "adapter": str(adapter), "save_dtype": save_dtype}
    written: dict[str, dict[str, Any]] = {}
    with (
        Checkpoint(base) as weights,
        publish(output, kind="merged", made_from=made_from, replace=overwrite, written=written) as folder,
    ):
        _check_fit(left, weights, config)
        writer = ShardWriter(folder, parse_size(max_shard_size), Ledger(folder, written))
        for name in weights:
            tensor = weights.get(name)
            copy = loaded.copies.pop(name, None)
            if copy is not None and not copy.equal(tensor.to(copy.dtype)):
                raise AdapterError(f"{name}: the adapter holds a copy of this weight that is not the base's")
            pair = left.pop(name, None)
            if not tensor.is_floating_point():
                if pair:
                    raise AdapterError(
                        f"{name}: the base's weight is {tensor.dtype}, no floating-point weight to add to"
                    )
                writer.add(name, tensor)
                continue
            value = tensor.float()
            if pair:
                delta = pair.delta()
                changes[name] = float(delta.norm() / value.norm().clamp_min(1e-30))
                value = value + delta
            stored = value.to(dtype)
            if not stored.isfinite().all():
                cause = (
                    "holds values that are not finite"
                    if not value.isfinite().all()
                    else f"overflows {save_dtype}; use bf16"
                )
                raise AdapterError(f"{name}: the merged weight {cause}")
            writer.add(name, stored)
        if loaded.copies:
            raise AdapterError(f"{min(loaded.copies)}: the adapter holds a copy of this weight, but the base has none")
        writer.close()
        config["dtype"] = DTYPES[save_dtype]
        config.pop("torch_dtype", None)
        (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
        _carry_assets(base, adapter, folder)
    return changes


def main(argv: Sequence[str] | None = None) -> int:
    """Merge as the command line says; exit code 0, 2 for bad input, or 28 when the disk is full."""
    args = parser().parse_args(argv)
    try:
        changes = merge(
            args.base_model_path, args.adapter_model_path, args.output_path, args.save_dtype, args.max_shard_size,
            overwrite=args.overwrite,
        )  # fmt: skip
    except FileExistsError:
        print(
            f"error: {args.output_path} exists already; choose another --output_path or give --overwrite",
            file=sys.stderr,
        )
        return 2
    except (ValueError, FileNotFoundError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        if not is_disk_full(error):
            raise
        free = f"{free_bytes(args.output_path):,} bytes are free"
        print(f"error: --output_path {args.output_path}: {error}; {free}, nothing is left there", file=sys.stderr)
        return EXIT_DISK_FULL
    smallest, largest = min(changes.values()), max(changes.values())
    print(
        f"merged {len(changes)} weights into {args.output_path} ({args.save_dtype}); "
        f"relative change {smallest:.2e} to {largest:.2e}"
    )
    if largest == 0:
        print("warning: the adapter changes nothing: every lora_B is zero, it was never trained", file=sys.stderr)
    return 0


def _base_config(base: Path) -> dict[str, object]:
    path = base / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--base_model_path {base}: no config.json there; the folder of a model is expected")
    config = read_json(path)
    if config.get("quantization_config"):
        raise ValueError(f"{path}: the base is quantised; merge into the unquantised model that it was made from")
    return config


def _check_fit(adapter: dict[str, "LoraWeight"], weights: "Checkpoint", config: dict[str, object]) -> None:
    """Refuse an adapter that names other weights, other shapes or one of a tied pair."""
    from .lora_delta import AdapterError

    for name, pair in adapter.items():
        if config.get("tie_word_embeddings") and ("lm_head" in name or "embed" in name):
            raise AdapterError(f"{name}: the base ties its embeddings, so a change of one of the pair cannot be merged")
        if name not in weights:
            raise AdapterError(f"{name}: the adapter changes this weight, but the base on disk has none of that name")
        if (shape := weights.shapes[name]) != (wanted := (pair.b.shape[0], pair.a.shape[1])):
            raise AdapterError(f"{name}: the base's shape is {shape}, the adapter was made for {tuple(wanted)}")


def _carry_assets(base: Path, adapter: Path, folder: Path) -> None:
    """Tokenizer and all other files. The adapter's tokenizer and generation config win: they were trained with."""
    tokenizer_of = adapter if (adapter / "tokenizer_config.json").is_file() else base
    if (adapter / "generation_config.json").is_file():
        shutil.copyfile(adapter / "generation_config.json", folder / "generation_config.json")
    carry(
        tokenizer_of, folder, skip={path.name for path in tokenizer_of.iterdir() if not is_tokenizer_asset(path.name)}
    )
    carry(
        base,
        folder,
        skip={path.name for path in base.iterdir() if tokenizer_of is adapter and is_tokenizer_asset(path.name)},
    )


if __name__ == "__main__":
    sys.exit(main())
