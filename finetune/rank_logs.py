"""One log file for each rank on its node; rank 0 is heard on the launching terminal too."""

import os
import subprocess
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

_TAIL_LINES, _TAIL_BYTES, _LONGEST_LINE = 40, 65_536, 500


class RankLogs:
    """``FOLDER/rank-R.log``: standard output and errors of rank R, after what earlier runs left there."""

    def __init__(self, folder: Path, shown: int = 0) -> None:
        self.folder, self.shown = folder, shown
        self.lock = threading.Lock()  # of our own output, which several threads write
        self._begins: dict[int, int] = {}
        self._followers: list[threading.Thread] = []

    def path(self, rank: int) -> Path:
        """The log of a rank."""
        return self.folder / f"rank-{rank}.log"

    def start(
        self, rank: int, command: list[str], env: dict[str, str], inherited: Sequence[int] = ()
    ) -> subprocess.Popen[bytes]:
        """Start a rank whose output goes into its log, with the open files that it inherits. Raises OSError."""
        with self.path(rank).open("ab") as log:
            self._begins[rank] = log.tell()
            out: Any = subprocess.PIPE if rank == self.shown else log
            err: Any = subprocess.PIPE if rank == self.shown else subprocess.STDOUT
            process = subprocess.Popen(  # noqa: S603 - no shell
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=err, pass_fds=inherited
            )
        for pipe, to in ((process.stdout, 1), (process.stderr, 2)):
            if pipe is not None:
                follower = threading.Thread(target=self._follow, args=(pipe, to, self.path(rank)), daemon=True)
                follower.start()
                self._followers.append(follower)
        return process

    def finish(self, within: float = 2.0) -> None:
        """Wait until all that the shown rank has said is written; a process that it left behind may hold its output open."""
        for follower in self._followers:
            follower.join(within)

    def tail(self, rank: int) -> list[str]:
        """The last lines of this run in the log of a rank."""
        with self.path(rank).open("rb") as log:
            end = log.seek(0, os.SEEK_END)
            log.seek(max(self._begins.get(rank, 0), end - _TAIL_BYTES))
            lines = log.read().decode(errors="replace").splitlines()
        return [line[:_LONGEST_LINE] for line in lines[-_TAIL_LINES:]]

    def say(self, to: int, content: bytes) -> None:
        """Write to our own output; a reader that is gone is no reason to stop."""
        with self.lock:
            while content:
                try:
                    content = content[os.write(to, content) :]
                except OSError:
                    return

    def _follow(self, pipe: IO[bytes], to: int, path: Path) -> None:
        """Pass on whole lines: Python writes a line and its end apart, and the other stream's could come between them."""
        rest = b""
        with pipe, path.open("ab", buffering=0) as log:
            while content := os.read(pipe.fileno(), 65_536):
                rest += content
                end = max(rest.rfind(b"\n"), rest.rfind(b"\r")) + 1
                self._pass_on(rest[:end], log, to)
                rest = rest[end:]
            self._pass_on(rest, log, to)

    def _pass_on(self, lines: bytes, log: IO[bytes], to: int) -> None:
        try:
            log.write(lines)
        except OSError as error:  # a full disk; the rank must not wait for us
            self.say(2, f"error: {log.name}: {error.strerror}; these lines are missing there\n".encode())
        self.say(to, lines)
