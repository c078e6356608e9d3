"""The process that tries saves under faults."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Trial = Callable[..., dict[str, Any]]


@pytest.fixture(scope="session")
def trial(trials: Callable[[str], Trial]) -> Trial:
    """``trial(argv, home, at=K, act="kill" or "enospc")``; with ``rank`` it is a run of two ranks. K = 0 counts."""
    ask = trials("fault_trials.py")

    def run(argv: list[object], home: Path, **more: Any) -> dict[str, Any]:
        return ask(argv=list(map(str, argv)), home=str(home), **more)

    return run
