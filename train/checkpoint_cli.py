"""``finebridge checkpoint verify|consolidate``: prove that artifacts are whole; make full weights of a checkpoint."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from ..storage.manifest import MANIFEST_NAME, ManifestError, steps, verify
from ..storage.space import parse_size

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_USAGE = "finebridge checkpoint verify PATH... | consolidate CHECKPOINT --output_path O"


def main(words: Sequence[str]) -> int:
    """Run one verb; exit code 0, or 2 when an artifact is damaged. Raises ValueError for bad input."""
    verbs = {"verify": _verify, "consolidate": _consolidate}
    if words and words[0] in ("-h", "--help"):
        print(_USAGE)
        return 0
    if not words or words[0] not in verbs:
        raise ValueError(_USAGE)
    return verbs[words[0]](words[1:])


def _verify(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "finebridge checkpoint verify",
        allow_abbrev=False,
        description="read every file of checkpoints, merges, prepared data or models and compare it with their manifest",
    )
    parser.add_argument(
        "path", nargs="+", type=Path, help="an artifact, or a run's --output_dir for all its checkpoints"
    )
    damaged = 0
    for folder in [folder for path in parser.parse_args(words).path for folder in _artifacts(path)]:
        try:
            manifest = verify(folder)
        except ManifestError as error:
            damaged += 1
            print(f"damaged: {error}", file=sys.stderr)
        else:
            sizes = [entry["size"] for entry in manifest["files"].values()]
            print(f"whole: {folder} ({manifest['kind']}, {len(sizes)} files, {sum(sizes):,} bytes)")
    return 2 if damaged else 0


def _artifacts(path: Path) -> list[Path]:
    """The artifact itself, or the checkpoints of a run's folder, oldest first. Raises ValueError when there is neither."""
    inside = [folder for _, folder in reversed(steps(path))]
    if (path / MANIFEST_NAME).is_file() or not inside:
        if not path.is_dir():
            raise ValueError(f"{path}: no such folder")
        return [path]
    return inside


def _consolidate(words: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        "finebridge checkpoint consolidate",
        allow_abbrev=False,
        description="full weights of a checkpoint, from DeepSpeed's fp32 masters where there are some",
    )
    parser.add_argument("checkpoint", type=Path, help="checkpoint-N of a full fine-tuning")
    parser.add_argument("--output_path", required=True, type=Path, help="new folder for the model")
    parser.add_argument("--save_dtype", choices=DTYPES, default="fp32", help="dtype of the weights (default fp32)")
    parser.add_argument("--max_shard_size", default="5GB", help="largest weight file (default 5GB)")
    parser.add_argument("--trust_remote_code", action="store_true", help="run the .py files that came with the model")
    args = parser.parse_args(words)
    limit = parse_size(args.max_shard_size)
    verify(args.checkpoint, hashes=False)  # before torch is imported
    if args.output_path.exists():
        raise ValueError(f"--output_path {args.output_path} exists already; choose another")
    import torch

    from .consolidate import consolidate

    dtype: torch.dtype = getattr(torch, DTYPES[args.save_dtype])
    source = consolidate(args.checkpoint, args.output_path, dtype, limit, remote_code=args.trust_remote_code)
    print(f"wrote {args.output_path} in {args.save_dtype} from {source}")
    return 0
