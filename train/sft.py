"""Supervised fine-tuning: one rank of a run.

Started by ``finebridge sft`` or ``bash train/train.sh``, or by any launcher that sets RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT:  ``torchrun --nproc_per_node 8 -m finebridge.train.sft --model_name_or_path ...``
"""

import math
import os
import signal
import socket
import sys
import time
import warnings
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from ..data_tools.schema import Kind
from ..storage.space import EXIT_DISK_FULL, is_disk_full
from . import launched
from .arguments import Arguments, parse
from .hf_flags import ArgumentsError
from .orphans import die_with_launcher
from .record import RunRecord
from .report import build

if TYPE_CHECKING:
    from .assemble import Run

EXIT_FAILED, EXIT_BAD_INPUT = 1, 2
_RANK_0_SPEAKS_WITHIN = 10.0  # seconds; the launcher ends the other ranks when rank 0 has ended


def main(argv: Sequence[str] | None = None, kind: Kind = "chat") -> int:
    """Train on data of this kind; the exit code, each with one message.

    0 done, 1 diverged, 2 bad input, 28 disk full, 143 stopped by SIGTERM; a rank that hangs or dies ends all with 75.
    """
    words = sys.argv[1:] if argv is None else argv
    try:
        args = parse(words, kind)  # before torch is imported
    except ValueError as error:
        return _refuse(error)
    die_with_launcher()
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*torch.distributed.*deprecated.*")
    warnings.filterwarnings("ignore", category=FutureWarning, message=".*is_gradient_checkpointing.*")
    from . import heartbeat, runtime, stopping

    try:
        stopping.listen()
        with heartbeat.told():
            return _train(args, words)
    except stopping.StoppedError as stopped:
        runtime.say(str(stopped))
        return stopping.EXIT_STOPPED


def _train(args: Arguments, words: Sequence[str]) -> int:
    """What ``main`` does when torch is there."""
    from ..data_tools.schema import DataError
    from . import runtime
    from .assemble import assemble
    from .attention import AttentionError
    from .checkpoint import DiskFullError
    from .guards import DivergedError
    from .stopping import StoppedError

    for text in args.warnings:
        runtime.say(f"warning: {text}")
    try:
        run = assemble(args)
    except (ValueError, OSError, runtime.RuntimeSetupError) as error:
        return _refuse(error)
    try:
        with _recorded(run, args, words):
            over = _is_over(run)
            result = None if over else run.trainer.train(resume_from_checkpoint=run.resume_from)
    except (AttentionError, ArgumentsError) as error:
        return _refuse(error)
    except DiskFullError as error:  # on every rank
        runtime.say(f"error: {error}")
        return EXIT_DISK_FULL
    except OSError as error:
        if not is_disk_full(error):
            raise
        return _refuse(error)
    except DataError as error:  # a loader's worker puts its traceback before the message
        return _refuse(DataError(str(error).rpartition("DataError: ")[2].strip()))
    except DivergedError as error:
        launched.note(diverged=True)
        runtime.say(f"error: {error}")
        runtime.finish()  # all ranks are here; one that ends now would have rank 0 stopped within its report
        return EXIT_FAILED
    except StoppedError:  # on all ranks, after the same step
        runtime.finish()
        raise
    if result is None:
        runtime.say(f"done: {run.resume_from} is the end of this run already; nothing is left to train")
        runtime.finish()
        return 0
    saved = Path(args.hf["output_dir"]) / f"checkpoint-{result.global_step}"
    runtime.say(
        f"done: {result.global_step} steps, mean loss {result.training_loss:.4f}, "
        + (f"checkpoint {saved}" if saved.is_dir() else "nothing saved (--save_strategy no)")
    )
    diverged = not math.isfinite(result.training_loss)
    launched.note(diverged=diverged)
    runtime.finish()
    if diverged:
        runtime.say("error: the mean loss is not finite; lower --learning_rate or lengthen the warm-up")
        return EXIT_FAILED
    return 0


def _is_over(run: "Run") -> bool:
    """Whether the checkpoint to go on from has all steps already: the stock Trainer would train one more within an epoch."""
    from transformers import TrainerState

    last = run.trainer.args.max_steps
    file = Path(run.resume_from or "") / "trainer_state.json"
    if last <= 0 or run.resume_from is None or not file.is_file():
        return False
    state = TrainerState.load_from_json(str(file))
    if state.global_step < last:
        return False
    run.trainer.state = state
    return True


@contextmanager
def _recorded(run: "Run", args: Arguments, argv: Sequence[str]) -> Generator[None]:
    """Keep run.json from the start on; however training ends, write the Trainer's state and the report."""
    from . import runtime

    output_dir = Path(args.hf["output_dir"])
    record = RunRecord(output_dir, resumed=run.resume_from is not None)
    if runtime.is_main():
        record.open(argv, args, run.about)
    outcome = "finished"
    try:
        yield
        state = run.trainer.state
        if state.global_step < state.max_steps:
            outcome = f"stopped at step {state.global_step} of {state.max_steps}"
    except BaseException as error:
        outcome = f"{type(error).__name__}: {error}".rstrip(": ")
        raise
    finally:
        before = signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher waits for what follows
        run.progress.close()
        if runtime.is_main():
            _conclude(run, record, outcome)
        signal.signal(signal.SIGTERM, before)


def _conclude(run: "Run", record: RunRecord, outcome: str) -> None:
    """Write the Trainer's state, run.json and the report; what hinders it is told, and is no reason to fail."""
    from .runtime import say

    try:
        if run.trainer.state.global_step:
            run.trainer.save_state()
        record.close(outcome)
        say("report: " + ", ".join(map(str, build(Path(str(run.trainer.args.output_dir))))))
    except Exception as error:  # noqa: BLE001 - a page must not spoil the exit code, nor hide why training ended
        say(f"warning: no report was written: {type(error).__name__}: {error}")


def _refuse(error: Exception) -> int:
    """Say it once: rank 0 at once; another rank only when rank 0, still alive after a while, did not meet the error."""
    rank = os.environ.get("RANK", "0")
    if rank != "0":
        time.sleep(_RANK_0_SPEAKS_WITHIN)
    who = "" if rank == "0" else f" on rank {rank} ({socket.gethostname()})"
    print(f"error{who}: {error}", file=sys.stderr, flush=True)
    return EXIT_DISK_FULL if is_disk_full(error) else EXIT_BAD_INPUT


def leave(code: int) -> NoReturn:
    """End this rank's process with an exit code."""
    if "torch" not in sys.modules:  # refused before it was imported
        sys.exit(code)
    from .runtime import end

    end(code)


if __name__ == "__main__":
    leave(main())
