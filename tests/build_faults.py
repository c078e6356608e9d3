"""``finebridge`` on several ranks: rank 0 builds while the others wait for it, and is killed, or fails, before their eyes.

Environment: ``MEET`` is a folder that all see, where the ranks' logs are; ``KILL`` ends rank 0 when all is written but
nothing published; ``DEAD`` is a shorter time after which a lock that stands still is nobody's, ``GONE`` a rank.
"""

import os
import signal
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any


def patient(words: Sequence[str]) -> int:
    """The command, which tells at once what it waits for."""
    from finebridge.finetune import cli
    from finebridge.storage import once

    if dead := os.environ.get("DEAD"):
        once._DEAD, once._BEAT = float(dead), 0.1
    once._TOLD = 0.05
    return cli.main(words)


def main(words: Sequence[str]) -> int:
    """The command; what rank 0 builds it builds when all others wait for it."""
    from finebridge.storage import once

    meet, honest = Path(os.environ["MEET"]), once._build
    if os.environ["RANK"] != "0":
        _until((meet / "inside").exists)
        return patient(words)

    def _build(target: Path, build: Callable[..., Any], *rest: Any) -> bool:
        def watched(folder: Path, tell: once.Say) -> Mapping[str, Any]:
            (meet / "inside").touch()
            _until(lambda: all(_waits(log) for log in meet.glob("rank*.log") if log.name != "rank0.log"))
            made = build(folder, tell)
            if os.environ.get("KILL"):
                os.kill(os.getpid(), signal.SIGKILL)
            return made

        return honest(target, watched, *rest)

    once._build = _build
    return patient(words)


def _waits(log: Path) -> bool:
    return "waiting for process" in log.read_text()


def _until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 60
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def train(words: Sequence[str]) -> int:
    """``finebridge.train.sft``; a rank that prepares data prints that, whichever it is. Rank ``KILL`` dies there."""
    from finebridge.data_tools import preprocess
    from finebridge.train import meeting, sft

    meeting._GONE = float(os.environ.get("GONE", meeting._GONE))
    meeting._TOLD = min(meeting._TOLD, meeting._GONE / 10)
    honest = preprocess._build

    def _build(*args: Any) -> None:
        print("this rank prepares", flush=True)
        time.sleep(float(os.environ.get("SLOW", "0")))
        honest(*args)
        if os.environ.get("KILL") == os.environ["RANK"]:
            os.kill(os.getpid(), signal.SIGKILL)

    preprocess._build = _build
    return sft.main(words)


if __name__ == "__main__":
    sys.exit(train(sys.argv[1:]))
