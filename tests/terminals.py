"""A terminal for a test: commands show a bar there, and lines elsewhere."""

import os
import pty
import sys
import threading
from collections.abc import Generator
from contextlib import contextmanager

import pytest


@contextmanager
def terminal(patch: pytest.MonkeyPatch, term: str = "xterm") -> Generator[bytearray]:
    """stderr is a terminal within the block; after it the buffer holds what was written there, and a zero byte."""
    master, slave = pty.openpty()
    shown = bytearray()

    def read() -> None:
        while not shown.endswith(b"\0"):
            shown.extend(os.read(master, 4096))

    reader = threading.Thread(target=read)
    reader.start()
    with os.fdopen(slave, "w") as stream:
        try:
            with patch.context() as here:
                here.setattr(sys, "stderr", stream)
                here.setenv("TERM", term)
                here.setenv("COLUMNS", "100")
                for name in ("TTY_COMPATIBLE", "TTY_INTERACTIVE", "FORCE_COLOR"):
                    here.delenv(name, raising=False)
                yield shown
        finally:
            stream.write("\0")
            stream.flush()
            reader.join()
            os.close(master)
