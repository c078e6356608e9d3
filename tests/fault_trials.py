"""Saves that are killed or run out of disk at one chosen point; a process of its own with ``faults/inject.c`` preloaded.

Reads one request a line (JSON) and answers each with a line. A solo trial is a fork of a trainer that stands ready, a
trial of ranks is a run of the real command; both then ask the real ``find_resume`` what the next start would take.
"""

import ctypes
import json
import os
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

NEWEST = "checkpoint-2"


def arm(folder: str, at: int, act: str) -> None:
    ctypes.CDLL(None).fault_arm(folder.encode(), ctypes.c_long(at), act == "enospc")


def rank_main(argv: Sequence[str]) -> int:
    """``sft.main`` whose second save meets the fault, on the rank that ``FAULT`` names."""
    from finebridge.train import sft
    from finebridge.train.saving import SavingTrainer

    rank, at, act, folder = json.loads(os.environ["FAULT"])
    honest = SavingTrainer._save_checkpoint

    def save(self: Any, *args: Any) -> None:
        if self.state.global_step == 2 and rank in (int(os.environ["RANK"]), "all"):
            arm(folder, at, act)
        honest(self, *args)
        if self.state.global_step == 2:
            points = ctypes.CDLL(None).fault_points()
            Path(folder).with_name(f"points.{os.environ['RANK']}").write_text(str(points))
            arm(folder, 0, act)  # the sweep is of the save alone

    SavingTrainer._save_checkpoint = save
    return sft.main(argv)


def resumes_from(folder: Path) -> str:
    """What the next start of the same run goes on from, or why it cannot."""
    from finebridge.storage.manifest import newest_verified, read
    from finebridge.train.checkpoint import put_back
    from finebridge.train.resume import find_resume

    try:
        put_back(folder)
        whole, _ = newest_verified(folder)
        run = read(whole)["made_from"]["run"]
        found = find_resume(True, folder, run, frozenset(), lambda _: None)
    except Exception as error:  # noqa: BLE001 - the test is about whatever comes
        return f"{type(error).__name__}: {error}"
    return found.folder.name if found else "nothing"


class Solo:
    """A trainer of one process that has saved checkpoint-1."""

    def __init__(self, argv: list[str]) -> None:
        from finebridge.train.arguments import parse
        from finebridge.train.assemble import assemble

        self.trainer = assemble(parse(argv)).trainer
        self.trainer.train()
        self.home = Path(str(self.trainer.args.output_dir))
        self.trainer.state.global_step = 2

    def trial(self, at: int, act: str) -> dict[str, Any]:
        folder = self.home.with_name("trial")
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(self.home, folder, copy_function=os.link)
        told = folder.with_name("told")
        child = os.fork()
        if child == 0:
            os._exit(self._save(folder, told, at, act))
        code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        left = sorted(path.name for path in folder.iterdir() if path.name.startswith("."))
        found = resumes_from(folder)
        after = sorted(path.name for path in folder.iterdir() if path.name.startswith(".checkpoint"))
        return {"at": at, "code": code, "text": told.read_text(), "found": found, "left": left, "after": after}

    def _save(self, folder: Path, told: Path, at: int, act: str) -> int:
        from finebridge.train.checkpoint import DiskFullError

        told.write_text("")
        self.trainer.args.output_dir = str(folder)
        arm(str(folder), at, act)
        try:
            self.trainer._save_checkpoint(self.trainer.model, None)
        except DiskFullError as error:
            told.write_text(f"{error}")
            return 28
        except BaseException as error:  # noqa: BLE001 - the test reads it
            told.write_text(f"{type(error).__name__}: {error}")
            return 1
        told.write_text(str(ctypes.CDLL(None).fault_points()))
        return 0


def of_ranks(argv: list[str], home: Path, rank: int | str, at: int, act: str, runner: Any) -> dict[str, Any]:
    """One run of two ranks whose second save meets the fault."""
    folder = home / "trial"
    shutil.rmtree(folder, ignore_errors=True)
    fault = json.dumps([rank, at, act, str(folder)])
    done = runner.run(
        [*argv, "--output_dir", folder], home / "log", ranks=2, limit=90, entry="fault_trials:rank_main", FAULT=fault
    )
    left = sorted(path.name for path in folder.iterdir() if path.name.startswith(".checkpoint"))
    points = [int(file.read_text()) for file in sorted(home.glob("points.*"))]
    found = resumes_from(folder)
    return {
        "at": at,
        "rank": rank,
        "codes": done.codes,
        "texts": done.texts,
        "found": found,
        "left": left,
        "points": points,
    }


def serve() -> None:
    answers, sys.stdout = sys.stdout, sys.stderr  # what training prints is no answer
    from rank_runner import RankRunner

    runner, solos = RankRunner(), dict[str, Solo]()
    for line in sys.stdin:
        request = json.loads(line)
        argv, home = request["argv"], Path(request["home"])
        if "rank" in request:
            answer = of_ranks(argv, home, request["rank"], request["at"], request["act"], runner)
        else:
            key = json.dumps(argv)
            if key not in solos:
                solos[key] = Solo([*argv, "--output_dir", str(home / "home")])
            answer = solos[key].trial(request["at"], request["act"])
        print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    serve()
