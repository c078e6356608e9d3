"""Supervised fine-tuning: one rank of a run.

Started by ``finebridge sft`` or ``bash train/train.sh``, or by any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT:  ``torchrun --nproc_per_node 8 -m finebridge.train.sft --model_name_or_path ...``
"""

import math
import os
import socket
import sys
import time
import warnings
from collections.abc import Sequence
from pathlib import Path

from .arguments import parse
from .hf_flags import ArgumentsError

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
_RANK_0_SPEAKS_WITHIN = 10.0  # seconds; the launcher ends the other ranks when rank 0 has ended


def main(argv: Sequence[str] | None = None) -> int:
    """Train; the process's exit code: 0 done, 1 diverged, 2 bad input (said in one message)."""
    try:
        args = parse(sys.argv[1:] if argv is None else argv)  # before torch is imported
    except ValueError as error:
        return _refuse(error)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated.*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
    from . import runtime
    from .assemble import assemble
    from .attention import AttentionError
    from .callbacks import DivergedError

    for text in args.warnings:
        runtime.say(f"warning: {text}")
    try:
        run = assemble(args)
    except (ValueError, OSError, runtime.RuntimeSetupError) as error:
        return _refuse(error)
    try:
        result = run.trainer.train(resume_from_checkpoint=run.resume_from)
    except (ArgumentsError, AttentionError) as error:
        return _refuse(error)
    except DivergedError as error:
        runtime.say(f"error: {error}")
        return EXIT_FAILED
    run.trainer.save_state()
    saved = Path(args.hf["output_dir"]) / f"checkpoint-{result.global_step}"
    runtime.say(
        f"done: {result.global_step} steps, mean loss {result.training_loss:.4f}, "
        + (f"checkpoint {saved}" if saved.is_dir() else "nothing saved (--save_strategy no)")
    )
    runtime.finish()
    if not math.isfinite(result.training_loss):
        runtime.say("error: the mean loss is not finite; lower --learning_rate or lengthen the warm-up")
        return EXIT_FAILED
    return 0


def _refuse(error: Exception) -> int:
    """Say it once: rank 0 at once; another rank only when rank 0, still alive after a while, did not meet the error."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_RANK_0_SPEAKS_WITHIN)
    who = "" if rank == "0" else f" on rank {rank} ({socket.gethostname()})"
    print(f"error{who}: {error}", file=sys.stderr, flush=True)
    return EXIT_BAD_INPUT


if __name__ == "__main__":
    sys.exit(main())
