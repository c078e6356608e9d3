"""Ranks that start again after a fault of a machine, with fewer nodes where that is asked for."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from conftest import load_weights
from finebridge.finetune.beats import Beats, listen_to
from finebridge.finetune.cli import main
from finebridge.finetune.launch import Ended, run_all
from finebridge.finetune.node_job import Job
from finebridge.finetune.nodes import Node
from finebridge.finetune.restart import Course, Restarts
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.record import read_record
from loopback_nodes import FAKE_SSH, Runs, all_gone

# Fails as it is told by FAULTS, one word a start: kill, node (its launcher), gone (the same, and unreachable), done.
RANK = """
import os, signal, sys, time
from pathlib import Path
from finebridge.train import launched
from finebridge.train.orphans import die_with_launcher
die_with_launcher()
folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
told = launched.restart()
number = told["number"] if told else 0
launched.note(step=3 + number)
(folder / f"{number}-{rank}").write_text(" ".join([os.environ["WORLD_SIZE"], *sys.argv[3:]]))
while len(list(folder.glob(f"{number}-*"))) < int(os.environ["WORLD_SIZE"]):
    time.sleep(0.01)
fault = sys.argv[2].split(",")[number]
if fault == "done":
    sys.exit(0)
if rank == 1:
    if fault == "gone":
        (folder / "gone").touch()
    os.kill(os.getpid() if fault == "kill" else int(os.environ["FINEBRIDGE_LAUNCHER"]), signal.SIGKILL)
time.sleep(600)
"""
CRASH = Ended(1, 0, step=5)
NODES = [Node(name, 2) for name in "abcd"]


def course(tmp_path: Path, *words: str, ranks: int = 8, split: tuple[int, int] = (2, 2)) -> Course:
    return Course([*words], tmp_path, ranks, split, {"model_name_or_path": "base"})


@pytest.mark.parametrize(
    ("ends", "most", "starts", "code", "said"),
    [
        ([CRASH, Ended(0)], 1, 2, 0, r"restart 1 of 1 \(the last one\) from the beginning, as rank 0 ended with exit code 1"),
        ([CRASH, CRASH], 5, 2, 1, "no restart: it failed at step 6 for the second time in a row"),
        ([Ended(1, 0), Ended(1, 0)], 5, 2, 1, "no restart: it failed before the first step for the second time"),
        ([CRASH, Ended(1, 0, step=7), CRASH], 2, 3, 1, "no restart: --max_restarts 2 are used up"),
        ([Ended(75, 0, step=5, verdict="rank 1 has died")], 0, 1, 75, "no restart: --max_restarts 0 are used up"),
        ([Ended(75, 0, step=5, verdict="x has died"), Ended(0)], 3, 2, 0, r"1 of 3 \(2 more remain\).*, as x has died; 5"),
        ([Ended(137, 2, "rank 2 was ended by SIGKILL"), Ended(0)], 1, 2, 0, "as rank 2 was ended by SIGKILL"),
        ([Ended(1, 0, diverged=True)], 5, 1, 1, "no restart: the run diverged"),
        ([Ended(137, 1, asked=True)], 5, 1, 137, "^$"),
        ([CRASH, Ended(2, lost=("b",), asked=True)], 5, 2, 2, "restart 1 of 5"),
        *(([Ended(code)], 5, 1, code, "^$") for code in (0, 2, 28, 130, 143)),
    ],
)  # fmt: skip
def test_what_is_started_again(
    ends: list[Ended], most: int, starts: int, code: int, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    done: list[str] = []

    def attempt(_: object, words: object, told: str) -> Ended:
        done.append(told)
        return ends[len(done) - 1]

    assert Restarts(most, False, course(tmp_path)).run(NODES, attempt) == code
    assert len(done) == starts
    assert [json.loads(told)["number"] for told in done if told] == list(range(1, starts))
    assert re.search(said, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("lost", "elastic", "split", "used", "flags", "said"),
    [
        (("b",), False, (2, 2), None, (), "no restart: b cannot be reached; with --elastic"),
        (("a", "b"), True, (2, 2), None, (), "no restart: a is the first node"),
        (("b",), True, (2, 3), "acd", (2, 4), r"elastic: without b; world size 8 -> 6; the global batch stays 48: .*size 2,"),
        (("b",), True, (2, 2), "ac", (2, 4), r"world size 8 -> 4 \(d stay idle"),
        (("b", "c", "d"), True, (3, 1), "a", (3, 4), "world size 8 -> 2;"),
        (("b",), True, (1, 3), "acd", (1, 4), "world size 8 -> 6;"),
    ],
)  # fmt: skip
def test_going_on_without_nodes(
    lost: tuple[str, ...], elastic: bool, split: tuple[int, int], used: str | None, flags: tuple[int, ...], said: str,
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    starts: list[tuple[str, list[str]]] = []

    def attempt(nodes: Any, words: Any, told: str) -> Ended:
        starts.append(("".join(node.host for node in nodes), list(words)))
        ends = [Ended(75, lost=lost, why="lost"), Ended(2, lost=lost), Ended(0)]
        return ends[len(starts) - 1]

    code = Restarts(1, elastic, course(tmp_path, split=split)).run(NODES, attempt)
    assert re.search(said, capsys.readouterr().err)
    assert [hosts for hosts, _ in starts] == ["abcd", "abcd", *([used] if used else [])]
    assert code == (0 if used else 75)
    if used:
        names = ("per_device_train_batch_size", "gradient_accumulation_steps")
        assert starts[-1][1] == [f"--{name}={value}" for name, value in zip(names, flags, strict=True)]
        assert 2 * len(used) * flags[0] * flags[1] == 8 * split[0] * split[1]


def test_a_batch_that_cannot_be_split_anew_ends_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [Node("a", 3), Node("b", 2)]
    ends = iter([CRASH, Ended(2, lost=("b",))])
    code = Restarts(1, True, course(tmp_path, ranks=5, split=(2, 1))).run(nodes, lambda *_: next(ends))
    assert code == 75
    assert "without b a global batch of 10 is not divisible by the number of ranks" in capsys.readouterr().err


def test_the_words_of_ranks_that_go_on(tmp_path: Path) -> None:
    words = ["--init_from_checkpoint=old/checkpoint-9", "--learning_rate=1"]
    mine = course(tmp_path, *words)
    mine.check()
    assert mine.again(8) == words, "there is no checkpoint of this run yet"
    (tmp_path / "checkpoint-2").mkdir()
    assert mine.again(8) == ["--learning_rate=1", "--model_name_or_path=base", "--resume_from_checkpoint=true"]
    with pytest.raises(ArgumentsError, match="would go on from .*checkpoint-2, which this run did not make"):
        mine.check()
    for fine in ("true", str(tmp_path / "checkpoint-2")):
        course(tmp_path, f"--resume_from_checkpoint={fine}").check()
    (tmp_path / "checkpoint-10").mkdir()
    with pytest.raises(ArgumentsError, match="checkpoint-10"):
        course(tmp_path, f"--resume_from_checkpoint={tmp_path}/checkpoint-2").check()


@pytest.fixture
def fake(tmp_path: Path) -> Runs:
    """Two nodes of a rank each, the second behind a fake ssh, until the file ``gone`` is there."""
    unreachable = '[ -e "$GONE" ] && { echo "ssh: connect to host b: Connection timed out" >&2; exit 255; }\n'
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(FAKE_SSH.replace("for last", f"{unreachable}for last"))
    (tmp_path / "bin" / "ssh").chmod(0o755)
    env = {"PATH": f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}", "FAKE_SSH_PIDS": str(tmp_path / "pids")}
    runs = Runs(tmp_path, ["--launcher=ssh"], {**env, "GONE": str(tmp_path / "said" / "gone")})
    (tmp_path / "code" / "faulty_rank.py").write_text(RANK)
    runs.said.mkdir()
    return runs


def test_ranks_on_this_machine_start_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "faulty_rank.py").write_text(RANK)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.delenv("FINEBRIDGE_RESTART", raising=False)
    ended = run_all("faulty_rank", [str(tmp_path), "kill"], 2, 9)
    assert (ended.code, ended.rank, ended.step, ended.asked) == (137, 1, 3, False)
    monkeypatch.setenv("FINEBRIDGE_RESTART", '{"number": 1}')
    assert run_all("faulty_rank", [str(tmp_path), "kill,done"], 2, 9).step == 4


def test_nodes_start_again_and_one_that_is_gone_is_left_out(fake: Runs) -> None:
    words = ("faulty_rank", str(fake.said), "kill,gone,done")
    env = {"NODE_IP_LIST": "127.0.0.2:1,127.0.0.3:1"}
    process = fake.start_module(*words, flags=("--max_restarts=2", "--elastic"), **env)
    _, said = process.communicate(timeout=120)
    assert process.returncode == 0, said
    lines = [line for line in said.splitlines() if line.startswith(("restart ", "elastic: "))]
    assert lines == [
        "restart 1 of 2 (1 more remain) from the beginning, as rank 1 on 127.0.0.3 was ended by SIGKILL (out of memory?); "
        "3 steps were done",
        "restart 2 of 2 (the last one) from the beginning, as 127.0.0.3 was lost (exit code 137); 4 steps were done",
        "elastic: without 127.0.0.3; world size 2 -> 1; the global batch stays 8: --per_device_train_batch_size 2, "
        "--gradient_accumulation_steps 4",
    ]
    starts = {path.name: path.read_text() for path in fake.said.glob("*-*")}
    assert starts.keys() == {"0-0", "0-1", "1-0", "1-1", "2-0"}
    assert starts["2-0"] == "1 --per_device_train_batch_size=2 --gradient_accumulation_steps=4"


def test_a_stranger_hears_no_beats(tmp_path: Path) -> None:
    beats = Beats()
    beats.start("\x1ethe mark ")
    for word in (b"a guess\n", b"x" * 300, b"\n"):
        with socket.create_connection(("127.0.0.1", beats.port)) as stranger:
            stranger.settimeout(30)
            stranger.sendall(word)
            try:
                assert stranger.recv(9) == b"", "hung up"
            except ConnectionResetError:
                continue
    line = listen_to(("127.0.0.1", beats.port), "\x1ethe mark ")
    line.settimeout(0.05)
    heard = b""
    while not heard:
        beats.send(b"beat\n")
        try:
            heard = line.recv(99)
        except TimeoutError:
            continue
    assert heard.startswith(b"beat\n")
    line.settimeout(30)
    beats.close()
    while heard:
        heard = line.recv(99)
    line.close()


@pytest.mark.parametrize("end", ["silence", "close"])
def test_a_node_that_is_not_fed_ends_without_beats(end: str, fake: Runs) -> None:
    """As pdsh starts it: its standard input stays open and says nothing."""
    beats = Beats()
    where, logs = ("127.0.0.1", beats.port), str(fake.folder / "logs")
    argv = [str(fake.said), "wait"]
    job = Job("faulty_rank", argv, {}, [("a", 1)], "a", 29500, str(fake.folder), logs, 9, where)
    beats.start(job.mark)
    code = "import sys, finebridge.finetune.node_launcher as n; n.SILENCE = 1.0; sys.exit(n.main(sys.argv[1:]))"
    node = subprocess.Popen(
        [sys.executable, "-c", code, job.encode(), "a"],
        env=fake.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    for _ in range(100):
        beats.send(b"beat\n")
        time.sleep(0.02)
        if (fake.said / "0-0").exists():
            break
    assert node.poll() is None, "the beats keep it alive"
    if end == "close":
        beats.close()
    said = node.stdout.read()  # standard input stays open
    assert node.wait(30) == 0
    assert f'{job.mark}{{"node": 0, "code": 130' in said
    started = int(re.search(r'"started": ([0-9]+)', said)[1])
    assert all_gone([started])
    beats.close()


def test_a_node_that_cannot_hear_the_launching_side_says_so(tmp_path: Path) -> None:
    beats = Beats()
    job = Job("m", [], {}, [("a", 1)], "a", 1, str(tmp_path), "logs", 9, ("127.0.0.1", beats.port))
    beats.close()
    done = subprocess.run(
        [sys.executable, "-P", "-m", "finebridge.finetune.node_launcher", job.encode(), "a"],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"error: the launching side does not answer at 127.0.0.1:{job.beats[1]}" in done.stderr


def ranks_of(launcher: int) -> list[int]:
    """The processes of a run on this machine, its ranks and their workers."""
    mark, found = f"FINEBRIDGE_LAUNCHER={launcher}".encode(), list[int]()
    for place in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if mark in (place / "environ").read_bytes().split(b"\0"):
                found.append(int(place.name))
    return found


def rank_process(launcher: int, rank: int) -> int:
    mark = f"RANK={rank}".encode()
    return next(pid for pid in ranks_of(launcher) if mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"))


@pytest.mark.slow
@pytest.mark.distributed
def test_a_killed_rank_changes_no_bit_of_the_whole_way(
    models: Callable[[str], Path], train_file: Path, tmp_path: Path
) -> None:
    """``finebridge run`` on two ranks: one is killed, all start again; weights, ledger and record tell of one run."""
    flags = [
        "--model_name_or_path",
        str(models("qwen3")),
        "--train_data_file",
        str(train_file),
        "--nproc_per_node",
        "2",
    ]
    flags += ["--max_steps", "60", "--save_steps", "5", "--learning_rate", "1e-2", "--report_to", "none"]
    command = [sys.executable, "-P", "-m", "finebridge.finetune.cli", "run", *flags, "--output_dir"]
    subprocess.run([*command, tmp_path / "straight"], cwd=tmp_path, capture_output=True, check=True)
    again = [*command, str(tmp_path / "out"), "--max_restarts", "2"]
    process = subprocess.Popen(again, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "out" / "checkpoint-5").exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.02)
    os.kill(rank_process(process.pid, 1), signal.SIGKILL)
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, out + said
    assert re.search(
        r"restart 1 of 2 \(1 more remain\) from the newest whole checkpoint, as rank 1 was ended by SIGKILL", said
    )
    mine, straight = (load_weights(tmp_path / name / "hf-60") for name in ("out", "straight"))
    assert all((mine[name] == straight[name]).all() for name in straight)
    first, second = read_record(tmp_path / "out")
    assert "restart" not in first
    assert second["restart"]["number"] == 1
    assert first["outcome"] == second["restart"]["cause"]
    assert second["outcome"] == "finished"
    assert "--resume_from_checkpoint=true" in second["command"]
    done = subprocess.run(again, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("plan: ")] == [
        ["data", "reuse"], ["train", "reuse"], ["model", "reuse"],
    ]  # fmt: skip
    assert not ranks_of(process.pid)


@pytest.mark.slow
def test_a_run_that_diverges_is_not_started_again(
    models: Callable[[str], Path], train_file: Path, tmp_path: Path
) -> None:
    flags = ["--model_name_or_path", models("qwen3"), "--train_data_file", train_file, "--output_dir", tmp_path / "out"]
    flags += ["--max_steps", 40, "--learning_rate", "1e30", "--report_to", "none", "--max_restarts", 2]
    command = [sys.executable, "-P", "-m", "finebridge.finetune.cli", "sft", *map(str, flags), "--nproc_per_node=1"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stdout + done.stderr
    assert "no restart: the run diverged, and would again" in done.stderr
    assert len(read_record(tmp_path / "out")) == 1


@pytest.mark.parametrize(
    ("flags", "env", "words"),
    [
        (["--max_restarts=-1"], {}, "--max_restarts -1: a number from 0 on is expected"),
        (["--elastic"], {}, "--elastic says how a run starts again; it needs --max_restarts N"),
        (["--elastic", "--max_restarts=1"], {}, "--elastic is for several nodes; this run has one"),
        (["--max_restarts=1", "--save_only_model"], {}, "leave --save_only_model out"),
        (["--max_restarts=1", "--no_ssh", "--node_rank=0"], {"NODE_IP_LIST": "a:1,b:1"}, "--max_restarts: it is for a laun"),
        (
            ["--elastic", "--max_restarts=1"], {"NODE_IP_LIST": "127.0.0.3:1,127.0.0.2:1", "LOCAL_IP": "127.0.0.2"},
            "--elastic: start the run on the first of the nodes",
        ),
    ],
)  # fmt: skip
def test_what_cannot_start_again_is_refused(
    flags: list[str], env: dict[str, str], words: str, tmp_path: Path, train_file: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "config.json").write_text('{"model_type": "qwen3"}')
    common = ["--model_name_or_path", str(tmp_path / "model"), "--train_data_file", str(train_file)]
    assert main(["sft", *common, "--output_dir", str(tmp_path / "out"), *flags]) == 2
    assert words in capsys.readouterr().err
