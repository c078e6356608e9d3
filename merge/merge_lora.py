"""Merge LoRA adapters into their base, offline and streamed.

    bash merge/merge_lora_weight.sh --base_model_path B --adapter_model_path A --output_path O --save_dtype bf16

Works on files: no model is built, and a few blocks of rows are in memory at a time. The sum is computed in fp32 and
rounded once to ``--save_dtype``; every adapter tensor is used exactly once or the merge stops; the output appears whole
or not at all. How far the rounding kept what was learnt is measured while it is written, and told.
"""

import argparse
import json
import math
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..storage.assets import carry, is_tokenizer_asset, read_json
from ..storage.progress import Progress, Say
from ..storage.publish import publish
from ..storage.space import EXIT_DISK_FULL, free_bytes, is_disk_full, parse_size
from ..storage.threads import usable_cores

if TYPE_CHECKING:
    from .plan import Plan
    from .proof import Proof

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}


def parser() -> argparse.ArgumentParser:
    """The command line of the merge."""
    result = argparse.ArgumentParser("finebridge merge", description=__doc__, allow_abbrev=False)
    add = result.add_argument
    add("--base_model_path", required=True, type=Path, help="folder of the base model (safetensors or .bin)")
    add(
        "--adapter_model_path",
        required=True,
        type=Path,
        action="append",
        help="folder of a LoRA adapter; may be repeated",
    )
    add(
        "--adapter_weights", type=float, nargs="+", metavar="W", help="factor of each adapter's change (default 1 each)"
    )
    add("--output_path", type=Path, help="new folder for the merged model")
    add("--export_adapter", type=Path, metavar="DIR", help="new folder for the adapter in the form that vLLM loads")
    add("--save_dtype", choices=DTYPES, default="fp32", help="dtype of the merged weights (default fp32)")
    add("--max_shard_size", default="5GB", help="largest weight file (default 5GB)")
    add("--workers", type=int, default=usable_cores(), help="threads (default %(default)s)")
    add(
        "--verify",
        action="store_true",
        help="compare the logits with base + live adapter before publishing (loads both)",
    )
    add("--prompts", type=Path, help="text file, a prompt a line, for --verify (default: built-in prompts)")
    add("--allow_unchanged", action="store_true", help="accept an adapter that leaves some of its weights unchanged")
    add(
        "--trust_remote_code",
        action="store_true",
        help="allow the base's own Python files to be run where they are needed",
    )
    add("--overwrite", action="store_true", help="replace what --output_path holds")
    return result


def merge(
    base: Path,
    adapters: Sequence[Path],
    output: Path,
    save_dtype: str = "fp32",
    max_shard_size: str = "5GB",
    *,
    weights: Sequence[float] | None = None,
    workers: int | None = None,
    check: Callable[[Path], object] | None = None,
    allow_unchanged: bool = False,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    say: Say = print,
) -> "Proof":
    """Write ``base + sum of weight * adapter`` to ``output``; what was changed and kept, by weight.

    ``check`` is called with the finished folder before it is published. Raises AdapterError (adapter and base do not
    fit, a value is not finite or overflows ``save_dtype``, nothing is changed), FileExistsError, FileNotFoundError,
    ValueError; OSError with ENOSPC when there is no room, also before anything is written.
    """
    for name, folder in (("base", base), *(("adapter", adapter) for adapter in adapters)):
        if output.resolve() in (folder.resolve(), *folder.resolve().parents):
            raise ValueError(f"--output_path {output} is or contains the {name}; choose another folder")
    factors = list(weights or [1.0] * len(adapters))
    if len(factors) != len(adapters) or not all(math.isfinite(factor) and factor for factor in factors):
        raise ValueError(f"--adapter_weights {factors}: {len(adapters)} finite numbers other than 0 are expected")
    config = _base_config(base)

    import torch

    from ..storage.hashing import Ledger
    from ..storage.safe_load import open_weights
    from .adapter import Adapter
    from .plan import Planner
    from .proof import Proof
    from .stream import write_plan

    made_from: dict[str, Any] = {
        "base": str(base), "adapters": list(zip(map(str, adapters), factors, strict=True)), "save_dtype": save_dtype,
    }  # fmt: skip
    written: dict[str, dict[str, Any]] = {}
    threads = torch.get_num_threads()
    with ExitStack() as stack:
        stack.callback(torch.set_num_threads, threads)
        torch.set_num_threads(1)  # torch's own wait for each other in loops, a block is too small a task for them
        weight_files = stack.enter_context(open_weights(base))
        loaded = [stack.enter_context(Adapter(adapter)) for adapter in adapters]
        dtype: torch.dtype = getattr(torch, DTYPES[save_dtype])
        plan = Planner(
            weight_files, config, dtype, allow_unchanged=allow_unchanged, trust_remote_code=trust_remote_code
        ).plan(loaded, factors)
        for line in plan.said:
            say(line)
        _check_room(output, plan)
        folder = stack.enter_context(
            publish(output, kind="merged", made_from=made_from, replace=overwrite, written=written)
        )
        proof = Proof(plan.outputs)
        with Progress("merge", sum(item.spec.size for item in plan.outputs), "written", say) as progress:
            write_plan(
                folder, plan.outputs, weight_files, proof, Ledger(folder, written),
                max_bytes=parse_size(max_shard_size), workers=workers or usable_cores(), advance=progress.advance,
            )  # fmt: skip
        proof.check(save_dtype, allow_unchanged=allow_unchanged)
        made_from["changes"] = proof.table()
        _write_config(folder, config, save_dtype, plan)
        _carry_assets(base, adapters[-1], folder)
        if check:
            torch.set_num_threads(threads)
            check(folder)
    return proof


def main(argv: Sequence[str] | None = None) -> int:
    """Merge as the command line says; exit code 0, 1 when --verify fails, 2 for bad input, or 28 when the disk is full."""
    args = parser().parse_args(argv)
    try:
        _check(args)
        if args.export_adapter:
            _export(args)
        if args.output_path:
            _merge(args)
    except FileExistsError as error:
        return _refuse(f"{error}; choose another folder or give --overwrite")
    except (ValueError, FileNotFoundError) as error:
        return _refuse(str(error))
    except ArithmeticError as error:  # --verify
        print(f"error: {error}", file=sys.stderr)
        return 1
    except OSError as error:
        if not is_disk_full(error):
            raise
        place = args.output_path or args.export_adapter
        free = f"{free_bytes(place):,} bytes are free"
        print(
            f"error: {place}: {error}; {free}, nothing is left there", file=sys.stderr
        )  # not every OSError names a place
        return EXIT_DISK_FULL
    return 0


def _check(args: argparse.Namespace) -> None:
    """Raise ValueError for flags that do not go together, before anything is loaded."""
    if not (args.output_path or args.export_adapter):
        raise ValueError("nothing to do: give --output_path for the merged model, --export_adapter, or both")
    if args.export_adapter and len(args.adapter_model_path) > 1:
        raise ValueError("--export_adapter takes one --adapter_model_path")
    if args.prompts and not args.verify:
        raise ValueError("--prompts is for --verify; give both or none")
    if args.prompts:
        try:
            args.prompts.read_text(encoding="utf-8")
        except ValueError as error:
            raise ValueError(f"--prompts {args.prompts}: not a text file in UTF-8: {error}") from None
    if args.workers < 1:
        raise ValueError(f"--workers {args.workers}: at least 1 is needed")


def _export(args: argparse.Namespace) -> None:
    from .export_adapter import export_adapter

    export_adapter(
        args.adapter_model_path[0], args.base_model_path, args.export_adapter,
        trust_remote_code=args.trust_remote_code, overwrite=args.overwrite,
    )  # fmt: skip
    print(f"exported the adapter to {args.export_adapter}")


def _merge(args: argparse.Namespace) -> None:
    proof = merge(
        args.base_model_path, args.adapter_model_path, args.output_path, args.save_dtype, args.max_shard_size,
        weights=args.adapter_weights, workers=args.workers, check=_verifier(args) if args.verify else None,
        allow_unchanged=args.allow_unchanged, trust_remote_code=args.trust_remote_code, overwrite=args.overwrite,
    )  # fmt: skip
    print(f"merged {len(proof.sums)} weights into {args.output_path} ({args.save_dtype})")
    for line in proof.lines(args.save_dtype):
        print(line, file=sys.stderr if line.startswith("warning") else sys.stdout)


def _refuse(text: str) -> int:
    print(f"error: {text}", file=sys.stderr)
    return 2


def _verifier(args: argparse.Namespace) -> Callable[[Path], None]:
    def check(folder: Path) -> None:
        from .verify import compare

        compare(
            args.base_model_path, args.adapter_model_path, args.adapter_weights or [1.0] * len(args.adapter_model_path), folder,
            exact=args.save_dtype == "fp32", prompts=args.prompts, trust_remote_code=args.trust_remote_code,
        )  # fmt: skip

    return check


def _base_config(base: Path) -> dict[str, Any]:
    path = base / "config.json"
    if not path.is_file():
        raise FileNotFoundError(f"--base_model_path {base}: no config.json there; the folder of a model is expected")
    config = read_json(path)
    if config.get("quantization_config"):
        raise ValueError(f"{path}: the base is quantised; merge into the unquantised model that it was made from")
    return config


def _check_room(output: Path, plan: "Plan") -> None:
    import errno

    needed = sum(item.spec.size for item in plan.outputs)
    if needed > free_bytes(output):
        raise OSError(
            errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: the merged model needs {needed:,} bytes", str(output)
        )


def _write_config(folder: Path, config: dict[str, Any], save_dtype: str, plan: "Plan") -> None:
    """The base's config with the dtype of the weights, and without the tie that was parted."""
    for part in (config, config.get("text_config") or {}):
        if part is config or "dtype" in part or "torch_dtype" in part:
            part["dtype"] = DTYPES[save_dtype]
            part.pop("torch_dtype", None)
        if plan.unties and part:
            part["tie_word_embeddings"] = False
    (folder / "config.json").write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


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
