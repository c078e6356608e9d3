"""No process outlives its launcher."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

# A rank that forks a worker; both write their process id, then wait.
RANK = """
import os, sys, time
from pathlib import Path
from finebridge.train.orphans import die_with_launcher
die_with_launcher()
os.fork()
(Path(sys.argv[1]) / f"{os.getpid()}.tmp").touch()
(Path(sys.argv[1]) / f"{os.getpid()}.tmp").rename(Path(sys.argv[1]) / str(os.getpid()))
time.sleep(600)
"""


def gone(pid: int, within: float = 5.0) -> bool:
    until = time.monotonic() + within
    while time.monotonic() < until:
        try:
            if Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] == "Z":
                return True  # nobody has asked for its exit code
        except OSError:
            return True
        time.sleep(0.05)
    return False


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's own means")
def test_ranks_and_their_workers_end_with_a_killed_launcher(tmp_path: Path) -> None:
    (tmp_path / "code").mkdir()
    (tmp_path / "pids").mkdir()
    (tmp_path / "code" / "waiting_rank.py").write_text(RANK)
    launch = (
        f"from finebridge.finetune.launch import run_ranks; run_ranks('waiting_rank', [{str(tmp_path / 'pids')!r}], 2)"
    )
    path = os.pathsep.join([str(tmp_path / "code"), os.environ.get("PYTHONPATH", "")])
    launcher = subprocess.Popen([sys.executable, "-c", launch], env={**os.environ, "PYTHONPATH": path})
    while len(pids := [int(p.name) for p in (tmp_path / "pids").iterdir() if p.suffix != ".tmp"]) < 4:
        assert launcher.poll() is None
        time.sleep(0.02)
    launcher.kill()
    launcher.wait()
    assert all(gone(pid) for pid in pids)


def test_a_rank_of_another_launcher_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    from finebridge.train import orphans

    monkeypatch.delenv(orphans.LAUNCHER, raising=False)
    monkeypatch.setattr(orphans, "_die_with", lambda _: pytest.fail("asked the kernel"))
    assert orphans.die_with_launcher() is None
