"""``finebridge convert``: checkpoints between Hugging Face and Megatron-Core, and what is to be known of them.

    finebridge convert --from hf --to mcore --load MODEL --save OUT [--ckpt_format torch --tp 2 --pp 2]
    finebridge convert --from mcore --to hf --load CHECKPOINT --save OUT [--hf_config MODEL]
    finebridge convert --from hf --to mcore --load ADAPTER --save OUT --ckpt_format torch --tp 2
    finebridge convert inspect FOLDER
    finebridge convert verify FOLDER FOLDER [--forward]

Neither Megatron nor a GPU is needed (for ``--forward`` Megatron is). Names of MindSpeed-LLM's converter are taken too.
"""

import argparse
import gc
import os
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING

from ..storage.manifest import ManifestError, read, verify
from ..storage.space import EXIT_DISK_FULL, free_bytes, is_disk_full, parse_size
from ..storage.threads import usable_cores
from .errors import BridgeError

if TYPE_CHECKING:
    from .convert import Target
    from .kept import Key
    from .lora_source import LoraFlags
    from .source import Source

SIDES = ("hf", "mcore")
FORMATS = ("torch_dist", "torch")
DIALECTS = ("mcore", "mcore-local", "mindspeed", "pai")
_MEGATRON = "0.16"  # what megatron_cpu.py fits


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
    add("--to", "--save-model-type", dest="target", type=_side, choices=SIDES, help="what --save will be")
    add("--load", "--load-dir", type=Path, required=True, help="folder of the checkpoint, or of a LoRA adapter")
    add("--save", "--save-dir", type=Path, help="new folder")
    add(
        "--enable_hf2mg_convert", "--enable-hf2mg-convert", action="store_true",
        help="--to mcore, kept: made once for these files and flags, then found (format torch unless told)",
    )  # fmt: skip
    add(
        "--mg_cache_dir", "--mg-cache-dir", "--mg-save-dir", type=Path,
        help="where that is kept (default: megatron_cache_tpNppNepN in --load)",
    )  # fmt: skip
    add("--hf_config", "--hf-cfg-dir", type=Path, help="folder of config.json and tokenizer (default: --load)")
    add("--model_type_hf", "--model-type-hf", help="name of the family (default: by config.json)")
    add("--ckpt_format", choices=FORMATS, help="Megatron's format (default torch_dist)")
    add(
        "--dialect",
        choices=DIALECTS,
        help="whose names the Megatron checkpoint has: what is written (default mcore); with --to hf what is read (default: told "
        "by its names)",
    )
    add("--tp", "--target-tensor-parallel-size", type=_positive, default=1, help="tensor parallel size")
    add("--pp", "--target-pipeline-parallel-size", type=_positive, default=1, help="pipeline parallel size")
    add("--vpp", type=_positive, help="virtual chunks a pipeline stage")
    add("--ep", "--target-expert-parallel-size", type=_positive, default=1, help="expert parallel size")
    add(
        "--etp",
        "--expert-tensor-parallel-size",
        type=_positive,
        help="tensor parallel size of experts (default: TP)",
    )
    add("--num_layer_list", "--num-layer-list", type=_numbers, metavar="3,4,4,3", help="layers of each stage")
    add(
        "--adapter",
        "--lora-load",
        type=Path,
        help="LoRA for --load: a PEFT folder or a Megatron checkpoint with it alone",
    )
    add(
        "--lora",
        choices=("merge", "keep", "only"),
        help="what becomes of LoRA: merged, kept beside the model, taken alone",
    )
    add("--save-lora-to-hf", dest="lora", action="store_const", const="only", help="the same as --lora only")
    add("--lora_alpha", "--lora-alpha", type=_positive, help="of LoRA in --load, where its arguments do not tell")
    add("--lora_r", "--lora-r", type=_positive, help="rank of LoRA in --load, to be checked")
    add("--lora_target_modules", "--lora-target-modules", nargs="+", help="layers with LoRA in --load, to be checked")
    add("--iteration", type=int, help="write iter_NNNNNNN (default: release)")
    add(
        "--make_vocab_size_divisible_by",
        type=_positive,
        help="of the padded vocabulary, times TP (torch; default: 128)",
    )
    add("--dtype", choices=("bf16", "fp16", "fp32"), help="dtype of the weights (default: as they are)")
    add(
        "--allow_patched_attention", action="store_true",
        help="convert a model that stock Megatron-Core computes otherwise, for one that was changed",
    )  # fmt: skip
    add("--max_shard_size", default="5GB", help="largest Hugging Face file (default 5GB)")
    add("--workers", type=_positive, default=usable_cores(), help="threads (default %(default)s)")
    add("--dry_run", action="store_true", help="check everything and print the plan; nothing is written")
    add("--overwrite", action="store_true", help="replace what --save holds")
    return result


def main(words: Sequence[str]) -> int:
    """Run one verb; exit code 0, 1 when ``verify`` finds a difference, 28 for a full disk. Raises ValueError for bad input."""
    verbs = {"inspect": _inspect, "verify": _verify}
    if words and words[0] in verbs:
        return verbs[words[0]](words[1:])
    args = parser().parse_args(words)
    if args.enable_hf2mg_convert:
        _keep(args)
    elif args.mg_cache_dir:
        raise ValueError("--mg_cache_dir is for --enable_hf2mg_convert")
    if not args.target:
        raise ValueError("--to is missing: hf or mcore")
    if not args.save and not args.dry_run:
        raise ValueError("--save is missing (or give --dry_run)")
    max_bytes = parse_size(args.max_shard_size)
    if not args.load.is_dir():
        raise ValueError(f"--load {args.load}: no such folder")
    kept = args.enable_hf2mg_convert
    if args.save and args.save.exists() and not (args.overwrite or args.dry_run or kept):
        raise ValueError(f"--save {args.save} exists already; choose another folder or give --overwrite")

    target = target_of(args, max_bytes)
    if kept and not args.dry_run:
        KeptConversion(args, target, args.save).make()
        return 0
    gc.freeze()  # what is imported stays: the many objects of large headers are looked through without it
    try:
        return _convert(args, target)
    finally:
        gc.unfreeze()


def _keep(args: argparse.Namespace) -> None:
    """Fill in what ``--enable_hf2mg_convert`` stands for. Raises ValueError for flags that do not go with it."""
    if args.save or args.overwrite or args.adapter or args.lora or args.target == "hf" or args.source == "mcore":
        raise ValueError(
            "--enable_hf2mg_convert is from a Hugging Face model into --mg_cache_dir; leave --save, --overwrite and LoRA out"
        )
    args.target, args.source = "mcore", "hf"
    args.ckpt_format = args.ckpt_format or "torch"
    args.save = args.mg_cache_dir or args.load / f"megatron_cache_tp{args.tp}pp{args.pp}ep{args.ep}"
    parent = next(folder for folder in args.save.absolute().parents if folder.exists())
    if not os.access(parent, os.W_OK) and not args.save.exists():
        raise ValueError(f"{parent}: not writable; name another place with --mg_cache_dir")
    for folder in args.save.absolute().parents:
        with suppress(ManifestError, OSError):
            read(folder)
            raise ValueError(
                f"{folder}: its manifest lists its files, so one more would be damage; name another place with --mg_cache_dir"
            )


@dataclass(frozen=True, slots=True)
class KeptConversion:
    """A conversion of ``--enable_hf2mg_convert`` and the folder ``save`` that keeps it."""

    args: argparse.Namespace
    target: "Target"
    save: Path

    def _key(self, say: Callable[[str], None]) -> "Key":
        from .kept import key_of

        memory = self.save.with_name(f".{self.save.name}.sources")
        return key_of(self.args.load, self.args.hf_config, self.target, memory, say)

    def stands(self, say: Callable[[str], None] = print) -> bool:
        """Whether it was made for these files and flags already; its files are looked at, not read. Raises BridgeError."""
        try:
            return self.save.exists() and verify(self.save, hashes=False)["made_from"].get("key") == self._key(say)
        except ManifestError:
            return False

    def make(self, say: Callable[[str], None] = print) -> bool:
        """Convert when it does not stand; True when this call did. Raises what ``kept.convert_once`` does."""
        from .kept import convert_once

        def again() -> str:
            return self._key(say)

        made = convert_once(lambda: _open(self.args), self.target, self.save, self._key(say), say, again)
        say(f"{'wrote' if made else 'reused'} {self.save}")
        return made


def kept_conversion(words: Sequence[str]) -> KeptConversion:
    """The conversion that a command line with ``--enable_hf2mg_convert`` means. Raises ValueError."""
    args = parser().parse_args(words)
    _keep(args)
    return KeptConversion(args, target_of(args, parse_size(args.max_shard_size)), args.save)


def _convert(args: argparse.Namespace, target: "Target") -> int:
    from .convert import convert, plan
    from .lora_source import with_lora, write_lora

    source, pairs = with_lora(_open(args), target, _lora(args))
    with source.tensors:
        if pairs is not None:
            write_lora(source, pairs, args.save, dtype=args.dtype, overwrite=args.overwrite, dry=args.dry_run)
            return 0
        made = plan(source, target)
        if args.dry_run:
            print("\n".join(made.lines()))
            return 0
        try:
            convert(made, args.save, overwrite=args.overwrite)
        except OSError as error:
            if not is_disk_full(error):
                raise
            free = f"{free_bytes(args.save):,} bytes are free"
            print(f"error: {args.save}: {error}; {free}, nothing is left there", file=sys.stderr)
            return EXIT_DISK_FULL
    print(f"wrote {args.save}")
    return 0


def _open(args: argparse.Namespace) -> "Source":
    from .lora_source import open_adapter
    from .peft_files import is_adapter
    from .source import open_source

    dialect = args.dialect if args.target == "hf" else None
    if is_adapter(args.load):
        if dialect:
            raise BridgeError(
                f"--dialect {dialect}: {args.load} is a LoRA adapter of Hugging Face, which has no dialects"
            )
        source = open_adapter(args.load, hf_config=args.hf_config, family=args.model_type_hf)
    else:
        source = open_source(args.load, hf_config=args.hf_config, family=args.model_type_hf, dialect=dialect)
    found = "hf" if source.form == "hf" else "mcore"
    if args.source and args.source != found:
        raise ValueError(f"--from {args.source}: {args.load} holds a checkpoint of the form {source.form}")
    return source


def _lora(args: argparse.Namespace) -> "LoraFlags":
    from .lora_source import LoraFlags

    return LoraFlags(args.adapter, args.lora, args.lora_alpha, args.lora_r, tuple(args.lora_target_modules or ()))


def target_of(args: argparse.Namespace, max_bytes: int) -> "Target":
    """What the flags ask for. Raises ValueError for flags that do not go together."""
    from .convert import Target
    from .parallel import Layout

    layout = Layout(args.tp, args.pp, args.vpp, args.ep, args.etp, args.num_layer_list)
    if layout != Layout() and args.target == "hf":
        raise ValueError("--tp, --pp, --vpp, --ep, --etp and --num_layer_list are for --to mcore")
    form = "hf" if args.target == "hf" else args.ckpt_format or "torch_dist"
    return Target(
        form,
        layout,
        args.dialect or "mcore",
        args.dtype,
        max_bytes,
        args.iteration,
        args.make_vocab_size_divisible_by,
        args.workers,
        args.allow_patched_attention,
    )


def _inspect(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "finebridge convert inspect", allow_abbrev=False, description="what a checkpoint is: form, layout, tensors"
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("--hf_config", type=Path, help="folder of config.json, if it is not there")
    parser.add_argument("--tensors", action="store_true", help="list every tensor by its canonical name")
    args = parser.parse_args(words)

    from .lora import factor_of
    from .source import open_source

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
        if adapted := {factor.weight for name in tensors.shapes if (factor := factor_of(name))}:
            print(f"LoRA on {len(adapted)} layers")
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
    parser.add_argument(
        "--forward",
        action="store_true",
        help="also compute both, Hugging Face's by transformers and Megatron's by Megatron-Core (extra megatron), in fp32 on "
        "the CPU, and compare their logits",
    )
    args = parser.parse_args(words)
    if args.forward:
        _check_megatron()

    from .convert import same
    from .source import open_source

    one, other = (open_source(folder, hf_config=args.hf_config) for folder in (args.one, args.other))
    alike = True
    with one.tensors, other.tensors:
        if args.forward:
            from .forward import compare

            alike = compare(one, other)
        found = same(one.tensors, other.tensors)
    for line in found[:20]:
        print(line, file=sys.stderr)
    if len(found) > 20:  # noqa: PLR2004
        print(f"and {len(found) - 20} more", file=sys.stderr)
    print("the same tensors" if not found else f"{len(found)} tensors differ")
    return 0 if alike and not found else 1


def _check_megatron() -> None:
    try:
        found = version("megatron-core")
    except PackageNotFoundError:
        found = "none"
    if not found.startswith(f"{_MEGATRON}."):
        raise BridgeError(
            f"--forward needs megatron-core {_MEGATRON}, which computes without a GPU; installed is {found}: "
            f"pip install 'finebridge[megatron]' 'megatron-core=={_MEGATRON}.*'"
        )


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
