"""``finebridge run`` that is killed or runs out of disk at one chosen point of all that its launcher writes.

Reads one request a line (JSON) and answers each with a line; a process of its own with ``faults/inject.c`` preloaded. In
place of ranks, whose saves have trials of their own (``fault_trials.py``), stands a copy of the model as their checkpoint.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from command_trials import in_fork


def quick_ranks(_module: str, argv: Sequence[str], _processes: int, _grace: float) -> int:
    """A training of no time: a checkpoint whose weights are the model's; one that stands is gone on from."""
    from finebridge.storage.publish import publish, write_text

    flags = dict(word.removeprefix("--").split("=", 1) for word in argv)
    out, step = Path(flags["output_dir"]), int(flags["max_steps"])
    if not (out / f"checkpoint-{step}").exists():
        with publish(out / f"checkpoint-{step}", kind="checkpoint", made_from={}) as folder:
            shutil.copytree(flags["model_name_or_path"], folder, dirs_exist_ok=True)
            (folder / "manifest.json").unlink(missing_ok=True)
            (folder / "optimizer.pt").write_text("state")
    write_text(out / "trainer_state.json", json.dumps({"global_step": step}))
    return 0


def launch(folder: Path, *words: str) -> "subprocess.Popen[str]":
    """The real command in ``folder``, at the head of a process group of its own."""
    command = [sys.executable, "-P", "-m", "finebridge.finetune.cli", "run", *words]
    return subprocess.Popen(
        command, cwd=folder, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def artifacts(folder: Path) -> dict[str, Any]:
    """Every artifact below: what its manifest lists, or what is wrong with it."""
    from finebridge.storage.manifest import ManifestError, verify

    found: dict[str, Any] = {}
    for path in sorted(folder.rglob("*")):
        if (
            path.is_dir()
            and not path.name.startswith(".")
            and (path / "config.json").exists() | (path / "rows.npy").exists()
        ):
            try:
                found[str(path.relative_to(folder))] = verify(path)["files"]
            except ManifestError as error:
                found[str(path.relative_to(folder))] = str(error)
    return found


def temporary(folder: Path) -> list[str]:
    """What a writer begins and should not leave."""
    names = (str(path.relative_to(folder)) for path in folder.rglob("*"))
    return sorted(name for name in names if ".tmp-" in name or name.endswith((".lock", ".failed")))


def trial(words: list[str], home: Path, at: int, act: str) -> dict[str, Any]:
    """The command under a fault, and once more without; ``words`` are relative to its folder."""
    folder = home / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    os.chdir(folder)
    code, text, points = in_fork(words, home / "told", str(folder), at, act)
    faulty = artifacts(folder)
    again, told, _ = in_fork(words, home / "told")
    return {
        "at": at, "code": code, "text": text, "points": points, "faulty": faulty, "again": again, "told": told,
        "made": artifacts(folder), "left": temporary(folder),
    }  # fmt: skip


def serve() -> None:
    from finebridge.finetune import cli, launch
    from finebridge.storage import once

    once._BEAT = 3600.0  # seconds; a heart that beats now and then would make points that no other trial meets
    launch.run_ranks = quick_ranks
    answers, sys.stdout = sys.stdout, sys.stderr  # what a command prints is no answer
    warm = False
    for line in sys.stdin:
        request = json.loads(line)
        home = Path(request["home"])
        if not warm:  # so that everything is imported
            (home / "warm").mkdir()
            os.chdir(home / "warm")
            assert cli.main(request["words"]) == 0
            warm = True
        answer = trial(request["words"], home, request["at"], request["act"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
