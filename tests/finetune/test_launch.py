"""Real ranks: what they get, and that none outlives a run that went wrong."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.finetune import launch
from finebridge.finetune.launch import gpu_count, run_ranks

# Writes what it got into the folder that it is given; then does what the second word says.
HELPER = """
import json, os, signal, sys, time
from pathlib import Path
folder, what, rank = Path(sys.argv[1]), sys.argv[2], int(os.environ["RANK"])
names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "OMP_NUM_THREADS")
if what == "deaf":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
got = {"argv": sys.argv, "env": {name: os.environ[name] for name in names}, "pid": os.getpid(), "path": sys.path}
if what == "deaf-wait":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
if what in ("saves", "finishes", "fails"):
    code = {"saves": 143, "finishes": 0, "fails": 9 * rank}[what]
    signal.signal(signal.SIGTERM, lambda *_: (time.sleep(0.3), os._exit(code)))
(folder / f"{rank}.tmp").write_text(json.dumps(got))
(folder / f"{rank}.tmp").rename(folder / f"{rank}.json")
if what.startswith("codes"):
    time.sleep(rank / 2)
    sys.exit(int(what.split()[1 + rank]))
if what != "done":
    while len(list(folder.glob("*.json"))) < int(os.environ["WORLD_SIZE"]):
        time.sleep(0.01)
    if rank == 1 and what in ("fail", "deaf"):
        sys.exit(7)
    if rank == 1 and what == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)
"""

WORDS = [
    "--run_name=two words", "it's", 'say "hi"', "$(touch x)", "`touch x`", "a;touch x", "|&><*?~", "\\n\n\t", "",
    "größe 日本 🎉", "--flag", "--", "-", '{"a": [1]}', "$HOME", "%PATH%",
]  # fmt: skip


@pytest.fixture
def module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    (tmp_path / "code").mkdir()
    (tmp_path / "code" / "rank_helper.py").write_text(HELPER)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "code"), prepend=os.pathsep)
    monkeypatch.chdir(tmp_path)
    return "rank_helper"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "said").mkdir()
    return tmp_path / "said"


def read(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]


def alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def test_arguments_arrive_byte_for_byte_and_no_shell_reads_them(module: str, folder: Path, tmp_path: Path) -> None:
    assert run_ranks(module, [str(folder), "done", *WORDS], 1) == 0
    (got,) = read(folder)
    assert got["argv"][1:] == [str(folder), "done", *WORDS]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["code", "said"]


def test_the_current_folder_is_not_on_the_ranks_path(module: str, folder: Path, tmp_path: Path) -> None:
    """A user's folder may hold a json.py or a tokenize.py."""
    (tmp_path / "json.py").write_text("raise SystemExit('imported from the current folder')")
    assert run_ranks(module, [str(folder), "done"], 1) == 0
    assert not {"", str(tmp_path)} & set(read(folder)[0]["path"])


def test_every_rank_gets_its_place_in_the_world(module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    for name in ("RANK", "WORLD_SIZE", "MASTER_PORT"):
        monkeypatch.setenv(name, "99")  # what an outer launcher left is not passed on
    assert run_ranks(module, [str(folder), "done"], 3) == 0
    seen = [got["env"] for got in read(folder)]
    (port,) = {env.pop("MASTER_PORT") for env in seen}
    assert 1024 <= int(port) <= 65535
    assert seen == [
        {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "3", "LOCAL_WORLD_SIZE": "3",
            "MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "3",
        }
        for rank in range(3)
    ]  # fmt: skip
    assert os.environ["RANK"] == "99"


@pytest.mark.parametrize("given", ["", None])
def test_the_cores_are_shared_when_the_user_does_not_say(
    module: str, folder: Path, monkeypatch: pytest.MonkeyPatch, given: str | None
) -> None:
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OMP_NUM_THREADS", given)
    assert run_ranks(module, [str(folder), "done"], 2) == 0
    assert {got["env"]["OMP_NUM_THREADS"] for got in read(folder)} == {str(max(1, len(os.sched_getaffinity(0)) // 2))}


@pytest.mark.parametrize(("what", "code"), [("fail", 7), ("killed", 128 + signal.SIGKILL)])
def test_one_bad_rank_ends_the_others_and_gives_its_code(
    module: str, folder: Path, capfd: pytest.CaptureFixture[str], what: str, code: int
) -> None:
    assert run_ranks(module, [str(folder), what], 3) == code
    got = read(folder)
    assert len(got) == 3
    assert not any(alive(rank["pid"]) for rank in got)
    assert ("rank 1 was ended by SIGKILL" in capfd.readouterr().err) == (what == "killed")


def test_a_rank_that_ignores_sigterm_is_killed(module: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "_GRACE_SECONDS", 0.2)
    assert run_ranks(module, [str(folder), "deaf"], 2) == 7
    assert not any(alive(rank["pid"]) for rank in read(folder))


def launcher(module: str, folder: Path, what: str, grace: float = 60) -> subprocess.Popen[str]:
    """A launcher of two ranks, in a process of its own, when both ranks run."""
    launch_two = f"""
import signal, sys
from finebridge.finetune.launch import run_ranks
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background jobs inherit that it is ignored
sys.exit(run_ranks({module!r}, [{str(folder)!r}, {what!r}], 2, {grace}))
"""
    process = subprocess.Popen([sys.executable, "-c", launch_two], stderr=subprocess.PIPE, text=True)
    while len(list(folder.glob("*.json"))) < 2:
        assert process.poll() is None, process.communicate()[1]
        time.sleep(0.02)
    return process


def test_ctrl_c_ends_all_ranks(module: str, folder: Path) -> None:
    process = launcher(module, folder, "deaf-wait")
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: stopping the ranks" in said
    assert not any(alive(rank["pid"]) for rank in read(folder))


@pytest.mark.parametrize(
    ("what", "grace", "sends", "code", "words"),
    [
        ("saves", 60, 1, 143, "save a checkpoint"),  # ends with 143 when it has saved
        ("finishes", 60, 1, 0, "save a checkpoint"),  # was at its last step
        ("deaf-wait", 0.5, 1, 143, "did not stop in time"),
        ("deaf-wait", 60, 2, 143, "interrupted: stopping the ranks"),
        ("fails", 60, 1, 9, "rank 1 ended with exit code 9"),
    ],
)
def test_sigterm_is_passed_on_and_the_ranks_get_their_time(
    module: str, folder: Path, what: str, grace: float, sends: int, code: int, words: str
) -> None:
    process = launcher(module, folder, what, grace)
    for number in range(sends):
        if number:
            assert "save a checkpoint" in process.stderr.readline()
        process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == code
    assert words in said
    assert not any(alive(rank["pid"]) for rank in read(folder))


def test_a_rank_that_stops_alone_stops_all(module: str, folder: Path) -> None:
    process = launcher(module, folder, "saves")
    os.kill(read(folder)[1]["pid"], signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert "SIGTERM" in said


@pytest.mark.parametrize(("codes", "wanted"), [([75, 1], 1), ([75, 75], 75), ([1, 75], 1)])
def test_the_cause_is_told_not_who_noticed_it(module: str, folder: Path, codes: list[int], wanted: int) -> None:
    """Rank 1 ends half a second after rank 0."""
    assert run_ranks(module, [str(folder), f"codes {codes[0]} {codes[1]}"], 2) == wanted


def test_the_callers_signal_handler_is_put_back(module: str, folder: Path) -> None:
    def mine(_signal: int, _frame: object) -> None: ...

    before = signal.signal(signal.SIGTERM, mine)
    try:
        assert run_ranks(module, [str(folder), "done"], 1) == 0
        assert signal.getsignal(signal.SIGTERM) is mine
    finally:
        signal.signal(signal.SIGTERM, before)


def test_a_module_that_is_not_there_is_a_failed_rank(capfd: pytest.CaptureFixture[str]) -> None:
    assert run_ranks("finebridge.train.nothing", [], 2) == 1
    assert "No module named finebridge.train.nothing" in capfd.readouterr().err


@pytest.mark.parametrize(("visible", "wanted"), [("", 0), ("-1", 0), ("0", 1), ("0,1,2", 3), ("GPU-8932f937,MIG-1", 2)])
def test_gpus_by_what_is_visible(monkeypatch: pytest.MonkeyPatch, visible: str, wanted: int) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert gpu_count() == wanted


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def install(script: str) -> None:
        (tmp_path / "nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "nvidia-smi").chmod(0o755)

    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    return install


def test_gpus_by_what_nvidia_smi_lists(nvidia_smi: Callable[[str], None]) -> None:
    assert gpu_count() == 0, "no such tool"
    nvidia_smi("echo 'GPU 0: H100 (UUID: GPU-a)'; echo '  MIG 1g.10gb Device 0: (UUID: MIG-b)'; echo 'GPU 1: H100'")
    assert gpu_count() == 2
    nvidia_smi("echo 'GPU 0: broken'; exit 9")
    assert gpu_count() == 0
