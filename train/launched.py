"""What a launcher and its ranks tell each other beside the exit code. Neither torch nor a file system is needed.

The first rank of each machine notes how far it has come in a file without a name that its launcher holds open, so that the
launcher knows it also when the rank was killed. A rank that is started again gets the cause in its environment.
"""

import json
import os
from contextlib import suppress
from tempfile import TemporaryFile
from typing import Any

NOTES, RESTART = "FINEBRIDGE_NOTES", "FINEBRIDGE_RESTART"  # in the environment of ranks: a file's number; JSON
_LENGTH = 4096  # bytes of the note, written as a whole


class Notes:
    """The launcher's side: the file that one rank inherits."""

    def __init__(self) -> None:
        self._file = TemporaryFile()  # noqa: SIM115 - closed by ``read``

    @property
    def number(self) -> int:
        """The file's number, here and in the rank, whose environment tells it as NOTES."""
        return self._file.fileno()

    def read(self) -> dict[str, Any]:
        """What the rank, which has ended, had noted: ``step``, ``diverged``, ``verdict``, ``hung``, each when it was so."""
        with self._file:
            text = os.pread(self.number, _LENGTH, 0)
        with suppress(ValueError):
            words = json.loads(text)
            return words if isinstance(words, dict) else {}
        return {}


_noted: dict[str, Any] = {}
_number: int | None = None


def note(**words: Any) -> None:
    """Leave a few words (in all _LENGTH bytes of JSON) for the launcher, if it is ours, beside those noted before."""
    global _number  # noqa: PLW0603 - a process is one rank
    if given := os.environ.pop(NOTES, ""):  # what the rank starts does not inherit the file
        _number = int(given)
    if _number is not None:
        _noted.update(words)
        os.pwrite(_number, json.dumps(_noted).encode().ljust(_LENGTH), 0)


def restart() -> dict[str, Any] | None:
    """``number``, ``of`` and ``cause`` of the restart that this start is; None for the first start."""
    return json.loads(text) if (text := os.environ.get(RESTART)) else None
