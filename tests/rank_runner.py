"""Several ranks of the real trainer, started fast.

A fork server imports torch, transformers and DeepSpeed once; every rank is a fork of it that sets its own environment
and then runs ``finebridge.train.sft.main``, exactly what a launcher starts, or another function. Saves about six seconds a rank.
"""

import multiprocessing
import os
import signal
import socket
import sys
import time
from collections.abc import Callable, Sequence
from importlib import import_module
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

PRELOAD = [
    "torch", "transformers", "transformers.trainer", "peft", "deepspeed", "finebridge.train.assemble",
    "torch.utils.tensorboard", "matplotlib.backends.backend_agg",
]  # fmt: skip


def _rank_main(
    rank: int,
    world: int,
    port: int,
    argv: Sequence[str],
    log: str,
    extra: dict[str, str],
    entry: str,
    before: Callable[[], None] | None,
) -> None:
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), **extra)
    multiprocessing.set_start_method("fork", force=True)  # workers as in a run: forks of the rank that end with it
    if "KILL_AT_STEP" in extra:
        _kill_at(int(extra["KILL_AT_STEP"]))
    code = 1
    try:
        if before:
            before()
        module, _, name = entry.partition(":")
        code = getattr(import_module(module), name)(argv)
    except BaseException:  # noqa: BLE001 - the log is read by the test
        import traceback

        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # gloo's threads may abort an orderly exit


def _kill_at(step: int) -> None:
    """End this rank by SIGKILL when it begins to train after ``step`` steps: nothing can be saved any more."""
    from finebridge.train.trainer import FinetuneTrainer

    inner = FinetuneTrainer.training_step

    def training_step(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.state.global_step >= step:
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(self, *args, **kwargs)

    FinetuneTrainer.training_step = training_step


class Finished:
    """Exit codes and printed text of the ranks of one run."""

    def __init__(self, codes: list[int | None], texts: list[str]) -> None:
        self.codes = codes
        self.texts = texts

    @property
    def text(self) -> str:
        """What rank 0 printed."""
        return self.texts[0]

    def check(self) -> "Finished":
        """Fail with the ranks' output unless every rank ended with 0."""
        assert all(code == 0 for code in self.codes), f"exit codes {self.codes}\n" + "\n".join(self.texts)[-6000:]
        return self


class RankRunner:
    """Calls ``run(argv, ranks=n)``; a rank that hangs is killed at the time limit and has the exit code -9."""

    def __init__(self) -> None:
        self._context = multiprocessing.get_context("forkserver")
        self._context.set_forkserver_preload(PRELOAD)

    def run(
        self,
        argv: Sequence[object],
        folder: Path,
        *,
        ranks: int = 1,
        limit: float = 120.0,
        entry: str = "finebridge.train.sft:main",
        before: Callable[[], None] | None = None,
        patience: float | None = None,
        **extra: str,
    ) -> Finished:
        """Train with these flags; logs go into ``folder``. ``entry`` is another function of the words to run instead.

        Each rank calls ``before`` first. With ``patience`` the other ranks are killed so many seconds after one has failed,
        as a launcher would.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        folder.mkdir(parents=True, exist_ok=True)
        logs = [folder / f"rank{rank}.log" for rank in range(ranks)]
        words = [str(word) for word in argv]
        processes: list[Any] = [
            self._context.Process(
                target=_rank_main, args=(rank, ranks, port, words, str(logs[rank]), extra, entry, before)
            )
            for rank in range(ranks)
        ]
        for process in processes:
            process.start()
        until = time.monotonic() + limit
        while left := [process for process in processes if process.is_alive()]:
            wait([process.sentinel for process in left], max(0.0, until - time.monotonic()))
            if patience is not None and any(process.exitcode for process in processes):
                until = min(until, time.monotonic() + patience)
            if time.monotonic() >= until:
                for process in left:
                    process.kill()
                    process.join()
        return Finished([process.exitcode for process in processes], [log.read_text(errors="replace") for log in logs])
