"""Several runs of the real trainer in the same ranks, one after the other: a start costs more than a tiny run."""

from collections.abc import Sequence


def main(argv: Sequence[str]) -> int:
    """``argv``: the flags of each run, with ``+++`` between runs; the first exit code that is not 0."""
    from accelerate.state import AcceleratorState
    from finebridge.train.sft import main as train

    flags: list[list[str]] = [[]]
    for word in argv:
        if word == "+++":
            flags.append([])
        else:
            flags[-1].append(word)
    for number, words in enumerate(flags):
        AcceleratorState._reset_state(reset_partial_state=True)
        code = train(words)
        print(f"run {number} ended with {code}", flush=True)
        if code:
            return code
    return 0
