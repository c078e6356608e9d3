"""``finebridge convert``: checkpoints between Hugging Face and Megatron-Core, and what is to be known of them.

    finebridge convert --from hf --to mcore --load MODEL --save OUT [--ckpt_format torch --tp 2 --pp 2]
    finebridge convert --from mcore --to hf --load CHECKPOINT --save OUT [--hf_config MODEL]
    finebridge convert inspect FOLDER
    finebridge convert verify FOLDER FOLDER

Neither Megatron nor a GPU is needed. Names of MindSpeed-LLM's converter are taken too.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..storage.space import parse_size

if TYPE_CHECKING:
    from .convert import Source, Target

SIDES = ("hf", "mcore")
FORMATS = ("torch_dist", "torch")
DIALECTS = ("mcore", "mcore-local", "mindspeed", "pai")


def parser() -> argparse.ArgumentParser:
    """The command line of a conversion."""
    result = argparse.ArgumentParser(
        "finebridge convert",
        description=__doc__,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = result.add_argument
    add(
        "--from",
        "--load-model-type",
        dest="source",
        type=_side,
        choices=SIDES,
        help="what --load is (default: told by its files)",
    )
    add(
        "--to", "--save-model-type", dest="target", required=True, type=_side, choices=SIDES, help="what --save will be"
    )
    add("--load", "--load-dir", type=Path, required=True, help="folder of the checkpoint")
    add("--save", "--save-dir", type=Path, help="new folder")
    add("--hf_config", "--hf-cfg-dir", type=Path, help="folder of config.json and tokenizer (default: --load)")
    add("--model_type_hf", "--model-type-hf", help="name of the family (default: by config.json)")
    add("--ckpt_format", choices=FORMATS, default="torch_dist", help="Megatron's format (default %(default)s)")
    add(
        "--dialect",
        choices=DIALECTS,
        help="whose names the Megatron checkpoint has: what is written (default mcore); with --to hf what is read (default: told "
        "by its names)",
    )
    add("--tp", "--target-tensor-parallel-size", type=_positive, default=1, help="tensor parallel size (torch)")
    add("--pp", "--target-pipeline-parallel-size", type=_positive, default=1, help="pipeline parallel size (torch)")
    add("--vpp", type=_positive, help="virtual chunks a pipeline stage (torch)")
    add("--ep", "--target-expert-parallel-size", type=_positive, default=1, help="expert parallel size (torch)")
    add(
        "--etp",
        "--expert-tensor-parallel-size",
        type=_positive,
        help="tensor parallel size of experts (torch; default: TP)",
    )
    add("--num_layer_list", "--num-layer-list", type=_numbers, metavar="3,4,4,3", help="layers of each stage (torch)")
    add("--iteration", type=int, help="write iter_NNNNNNN (default: release)")
    add(
        "--make_vocab_size_divisible_by",
        type=_positive,
        help="of the padded vocabulary, times TP (torch; default: 128)",
    )
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="dtype of the weights (default: as they are)")
    add("--max_shard_size", default="5GB", help="largest Hugging Face file (default 5GB)")
    add("--workers", type=_positive, default=2, help="threads (default %(default)s)")
    add("--dry_run", action="store_true", help="check everything and print the plan; nothing is written")
    add("--overwrite", action="store_true", help="replace what --save holds")
    return result


def main(words: Sequence[str]) -> int:
    """Run one verb; exit code 0, or 1 when ``verify`` finds a difference. Raises ValueError for bad input."""
    verbs = {"inspect": _inspect, "verify": _verify}
    if words and words[0] in verbs:
        return verbs[words[0]](words[1:])
    args = parser().parse_args(words)
    if not args.save and not args.dry_run:
        raise ValueError("--save is missing (or give --dry_run)")
    max_bytes = parse_size(args.max_shard_size)
    if not args.load.is_dir():
        raise ValueError(f"--load {args.load}: no such folder")
    if args.save and args.save.exists() and not args.overwrite and not args.dry_run:
        raise ValueError(f"--save {args.save} exists already; choose another folder or give --overwrite")

    from .convert import convert, plan

    source = _open(args)
    with source.tensors:
        made = plan(source, _target(args, max_bytes))
        if args.dry_run:
            print("\n".join(made.lines()))
            return 0
        convert(made, args.save, overwrite=args.overwrite)
    print(f"wrote {args.save}")
    return 0


def _open(args: argparse.Namespace) -> "Source":
    from .convert import open_source

    dialect = args.dialect if args.target == "hf" else None
    source = open_source(args.load, hf_config=args.hf_config, family=args.model_type_hf, dialect=dialect)
    found = "hf" if source.form == "hf" else "mcore"
    if args.source and args.source != found:
        raise ValueError(f"--from {args.source}: {args.load} holds a checkpoint of the form {source.form}")
    return source


def _target(args: argparse.Namespace, max_bytes: int) -> "Target":
    from .convert import Target
    from .parallel import Layout

    layout = Layout(args.tp, args.pp, args.vpp, args.ep, args.etp, args.num_layer_list)
    legacy = args.target == "mcore" and args.ckpt_format == "torch"
    if layout != Layout() and not legacy:
        raise ValueError(
            "--tp, --pp, --vpp, --ep, --etp and --num_layer_list are for --to mcore --ckpt_format torch: the other forms are the "
            "same for every layout"
        )
    form = "hf" if args.target == "hf" else args.ckpt_format
    return Target(
        form,
        layout,
        args.dialect or "mcore",
        args.dtype,
        max_bytes,
        args.iteration,
        args.make_vocab_size_divisible_by,
        args.workers,
    )


def _inspect(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "finebridge convert inspect", allow_abbrev=False, description="what a checkpoint is: form, layout, tensors"
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hf_config", type=Path, help="folder of config.json, if it is not there")
    parser.add_argument("--tensors", action="store_true", help="list every tensor by its canonical name")
    args = parser.parse_args(words)

    from .convert import open_source

    source = open_source(args.folder, hf_config=args.hf_config)
    with source.tensors as tensors:
        layout = getattr(tensors, "layout", None)
        count = sum(_count(shape) for shape in tensors.shapes.values())
        names = f", names of {source.names}" if source.names else ""
        print(f"{args.folder}: {source.form}, family {source.family.name}{names}")
        print(
            f"{len(tensors.shapes)} tensors, {count:,} parameters, {', '.join(sorted(map(str, set(tensors.dtypes.values()))))}"
        )
        if layout:
            print(
                f"written for TP {layout.tp}, PP {layout.pp}, VPP {layout.vpp or 1}, EP {layout.ep}, ETP {layout.expert_tp}"
            )
        for line in tensors.said:
            print(line)
        for name, shape in tensors.shapes.items() if args.tensors else ():
            print(f"{name} {list(shape)} {tensors.dtypes[name]}")
    return 0


def _verify(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "finebridge convert verify",
        allow_abbrev=False,
        description="whether two checkpoints, of any form, are the same model: every tensor bit for bit",
    )
    parser.add_argument("one", type=Path)
    parser.add_argument("other", type=Path)
    parser.add_argument("--hf_config", type=Path, help="folder of config.json, for one that has none")
    args = parser.parse_args(words)

    from .convert import open_source, same

    one, other = (open_source(folder, hf_config=args.hf_config) for folder in (args.one, args.other))
    with one.tensors, other.tensors:
        found = same(one.tensors, other.tensors)
    for line in found[:20]:
        print(line, file=sys.stderr)
    if len(found) > 20:  # noqa: PLR2004
        print(f"and {len(found) - 20} more", file=sys.stderr)
    print("the same model" if not found else f"{len(found)} tensors differ")
    return 1 if found else 0


def _side(text: str) -> str:
    return "mcore" if text == "mg" else text  # MindSpeed-LLM's name


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text}: at least 1 is needed")
    return value


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _count(shape: tuple[int, ...]) -> int:
    count = 1
    for side in shape:
        count *= side
    return count
