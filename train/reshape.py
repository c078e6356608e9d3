"""A DeepSpeed checkpoint for another number of ranks, by DeepSpeed's universal checkpoint.

ZeRO's shards belong to one number of ranks. ``python -m finebridge.train.reshape CHECKPOINT FOLDER`` writes the same
state tensor by tensor, which any number of ranks loads; a resume with other ranks starts it by itself, once.
"""

import hashlib
import json
import os
import shutil
import subprocess
import sys
from argparse import Namespace
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from ..storage.manifest import MANIFEST_NAME, describe, read
from ..storage.once import build_once
from .hf_flags import ArgumentsError
from .shards import latest_folder, refuse_pickles

# What the Trainer itself reads on a resume under DeepSpeed; the random streams of other ranks are of no use.
_TRAINER_FILES = ("trainer_state.json", "scheduler.pt")
_LAUNCHER = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def reshaped(checkpoint: Path, output_dir: Path, say: Callable[[str], None]) -> Path:
    """A folder with the state of ``checkpoint`` that any number of ranks can resume from, built once in ``output_dir``.

    As large as the checkpoint's optimizer state and fp32 weights. Raises ArgumentsError when DeepSpeed's tool fails.
    """
    files = (read if (checkpoint / MANIFEST_NAME).is_file() else _described)(checkpoint)["files"]
    key = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()[:12]
    target = output_dir / "reshaped" / f"{checkpoint.name}-{key}"

    def build(folder: Path, tell: Callable[[str], None]) -> dict[str, Any]:
        tell(f"resume: rewriting DeepSpeed's shards of {checkpoint} for another number of ranks, the others wait")
        _run_tool(checkpoint, folder)
        for name in _TRAINER_FILES:
            shutil.copyfile(checkpoint / name, folder / name)
        return {"checkpoint": str(checkpoint.absolute())}

    build_once(target, build, kind="reshaped", say=say)
    say(f"resume: {target} holds the state for any number of ranks; remove it when the next checkpoint is saved")
    return target


def _described(checkpoint: Path) -> dict[str, Any]:
    return describe(checkpoint, "checkpoint", {})


def _run_tool(checkpoint: Path, folder: Path) -> None:
    """Run DeepSpeed's tool in a process of its own: not a rank, without GPU and network."""
    env = {name: value for name, value in os.environ.items() if name not in _LAUNCHER}
    env |= {"DS_ACCELERATOR": "cpu", "CUDA_VISIBLE_DEVICES": "", "HF_HUB_OFFLINE": "1", "TMPDIR": str(folder)}
    command = [sys.executable, "-P", "-m", __name__, str(checkpoint), str(folder)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)  # noqa: S603 - no shell
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).rpartition("\n")[2]
        raise ArgumentsError(
            f"--resume_from_checkpoint {checkpoint}: DeepSpeed cannot rewrite it for another number of ranks ({said}); "
            "resume with as many ranks as wrote it, or start from its weights with --init_from_checkpoint"
        )


def main(argv: Sequence[str]) -> int:
    """Write the universal form of the checkpoint ``argv[0]`` into the empty folder ``argv[1]``."""
    refuse_pickles(deepspeed=True)
    from deepspeed.checkpoint import ds_to_universal

    source = latest_folder(Path(argv[0]))
    ds_to_universal.main(
        Namespace(
            input_folder=str(source),
            output_folder=str(Path(argv[1]) / f"{source.name}_universal"),
            num_extract_workers=1,
            num_merge_workers=1,
            keep_temp_folder=False,
            strict=True,
            inject_missing_state=True,  # ZeRO-2 saves no such block, ZeRO-3 needs none
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
