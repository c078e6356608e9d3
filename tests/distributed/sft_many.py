"""Several runs of the real trainer in the same ranks, one after the other: a start costs more than a tiny run."""

import traceback
from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """``argv``: the flags of each run, with ``+++`` between runs; the highest exit code."""
    from accelerate.state import AcceleratorState
    from finebridge.train import runtime
    from finebridge.train.sft import main as train
    from torch import distributed

    worst = 0
    flags: list[list[str]] = [[]]
    for word in argv:
        if word == "+++":
            flags.append([])
        else:
            flags[-1].append(word)
    # All runs share one process group.
    runtime.finish = lambda: distributed.barrier() if distributed.is_initialized() else None
    for number, words in enumerate(flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        try:
            code = train(words)
        except Exception:  # noqa: BLE001 - the test reads which run failed, and why
            traceback.print_exc()
            code = 1
        print(f"run {number} ended with {code}", flush=True)
        worst = max(worst, code)
    return worst
