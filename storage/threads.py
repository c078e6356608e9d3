"""How many threads work that is bound by the disk is spread over."""

import os

_MANY = 8  # the disk is the limit before


def usable_cores() -> int:
    """The cores that this process may use, at most eight: the default of ``--workers``."""
    return min(_MANY, len(os.sched_getaffinity(0)))
