"""Commands that are killed or run out of disk at one chosen point, with ``faults/inject.c`` preloaded, or after some time.

Reads one request a line (JSON) and answers each with a line. A trial is the command in a fork of this process, which has
run it once, so that everything is imported.
"""

import ctypes
import json
import os
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

from fault_trials import arm


def in_fork(argv: list[str], told: Path, folder: str = "", at: int = 0, act: str = "kill") -> tuple[int, str, int]:
    """Exit code, what was printed, and the number of points that were met (unless killed).

    ``act`` happens at point ``at``; "kill after" kills after so many milliseconds.
    """
    from finebridge.finetune.cli import main

    points = told.with_suffix(".points")
    points.write_text("-1")
    child = os.fork()
    if child == 0:
        with told.open("w") as stream:
            sys.stdout = sys.stderr = stream
            arm(folder, 0 if act == "kill after" else at, act)
            try:
                code = main(argv)
            except BaseException as error:  # noqa: BLE001 - the test reads it
                print(f"Traceback: {type(error).__name__}: {error}")
                code = 1
            arm("/nowhere", 0, act) if at else points.write_text(str(ctypes.CDLL(None).fault_points()))
        os._exit(code)
    if act == "kill after":
        time.sleep(at / 1000)
        os.kill(child, signal.SIGKILL)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return code, told.read_text(), int(points.read_text())


def state(output: Path, sizes: dict[str, Any]) -> str:
    """Which of the known artifacts ``output`` is, ``absent``, or what is wrong with it."""
    from finebridge.storage.manifest import ManifestError, verify

    if not output.exists():
        return "absent"
    try:
        files = verify(output)["files"]
    except ManifestError as error:
        return str(error)
    return next((name for name, known in sizes.items() if known == files), "another")


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


class Artifacts:
    """The right artifacts, made without a fault: ``new`` by the command that is tried, ``old`` by another one.

    The words of both lack the folder, which is the last one: they end with the flag for it. What a command ``kept`` lies
    there, or in a folder of its own in there, and needs no --overwrite.
    """

    def __init__(self, new: list[str], old: list[str], home: Path, kept: bool = False) -> None:
        from finebridge.finetune.cli import main
        from finebridge.storage import once

        self.new, self.home, self.kept = new, home, kept
        once._BEAT = 3600.0  # seconds; a heart that beats now and then would make points that no other trial meets
        self.known: dict[str, Any] = {}
        for name, words in (("new", new), ("old", old)):
            assert main([*words, str(home / name)]) == 0
            (made,) = (home / name).rglob("manifest.json")
            self.known[name] = json.loads(made.read_text())["files"]
            self.inside = made.parent.relative_to(home / name)  # of the old one: that is where the new one comes

    def trial(self, at: int, act: str, *, overwrite: bool) -> dict[str, Any]:
        """The command under a fault, and once more without."""
        faulty, told = self.home / "trial", self.home / "told"
        shutil.rmtree(faulty, ignore_errors=True)
        folder = faulty / "models"
        folder.mkdir(parents=True)
        output = folder / "out"
        made = output / self.inside
        if overwrite:
            shutil.copytree(self.home / "old", output, copy_function=os.link)
        argv = [*self.new, str(output), *["--overwrite"] * (overwrite and not self.kept)]
        began = time.monotonic()
        code, text, points = in_fork(argv, told, str(faulty), at, act)
        answer = {"at": at, "code": code, "text": text, "points": points, "seconds": time.monotonic() - began}
        answer["left"] = self.left(folder, made)
        answer["found"] = state(made, self.known)
        answer["again"] = in_fork(argv, told)[0]
        answer["told"] = told.read_text()
        answer["then"], answer["then_left"] = state(made, self.known), self.left(folder, made)
        return answer

    def left(self, folder: Path, made: Path) -> list[str]:
        """What lies beside the artifact: hidden things, or all, where something is kept for the next start."""
        if not self.kept:
            return hidden(folder)
        beside = (path for path in folder.rglob("*") if path != made and made not in path.parents)
        return sorted(str(path.relative_to(folder)) for path in beside)


def assert_full_disks_left_nothing(results: list[dict[str, Any]], *, overwrite: bool) -> None:
    """Of trials on a disk that fills up: what was begun is gone, the error is told once, and with room it succeeds."""
    full = [result for result in results if result["code"] == 28]
    assert len(full) > len(results) // 2
    for result in results:
        assert result["code"] in (0, 28), result
        assert not result["left"], "what was begun is removed by the command itself"
        assert result["found"] == ("new" if result["code"] == 0 else "old" if overwrite else "absent"), result
    for result in full:
        errors = [line for line in result["text"].splitlines() if line.startswith("error: ")]
        assert len(errors) == 1, result
        assert "/trial/models/out: " in errors[0], "the place is named"
        assert "bytes are free" in errors[0]
        assert "Traceback" not in result["text"]
        assert (result["again"], result["then"]) == (0, "new"), "with room again it succeeds"


def serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what a command prints is no answer
    made: dict[str, Artifacts] = {}
    for line in sys.stdin:
        request = json.loads(line)
        key = request["home"]
        if key not in made:
            made[key] = Artifacts(request["new"], request["old"], Path(key), request.get("kept", False))
        answer = made[key].trial(request["at"], request["act"], overwrite=request["overwrite"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
