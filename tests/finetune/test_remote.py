"""Runs on two nodes: what reaches the ranks, what is shown, and that nothing is left on any node."""

import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from conftest import load_weights
from finebridge.finetune.launch import run_ranks
from finebridge.finetune.node_job import Job
from loopback_nodes import FAKE_SSH, Runs, all_gone, missing, sshd

WORDS = [
    "--run_name=two words", "it's", 'say "hi"', "$(touch canary)", "`touch canary`", "a;touch canary", "|&><*?~", "\\n\n\t",
    "", "größe 日本 🎉", "--flag", "--", "-", '{"a": [1]}', "$HOME", "%h %u %n", "\x1b[31m",
]  # fmt: skip
VALUE = "/a b\"'$(touch canary)`touch canary`;touch canary\n größe 日本 \\ %h"


@pytest.fixture
def fake(tmp_path: Path) -> Runs:
    """Two nodes, the second behind a fake ssh that runs its line by a shell as sshd does."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "ssh").write_text(FAKE_SSH)
    (tmp_path / "bin" / "ssh").chmod(0o755)
    path = f"{tmp_path / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return Runs(tmp_path, ["--launcher=ssh"], {"PATH": path, "FAKE_SSH_PIDS": str(tmp_path / "ssh_pids")})


@pytest.fixture(scope="session")
def ssh_flags(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[str]]:
    if why := missing():
        pytest.skip(why)
    with sshd(tmp_path_factory.mktemp("sshd")) as flags:
        yield flags


@pytest.fixture(params=["pdsh", pytest.param("ssh", marks=pytest.mark.slow)])
def real(request: pytest.FixtureRequest, tmp_path: Path, ssh_flags: list[str]) -> Runs:
    """Two nodes, the second behind a real sshd."""
    return Runs(tmp_path, [*ssh_flags, f"--launcher={request.param}"], {})


def check_arrival(runs: Runs) -> None:
    """Run with hostile words; they and the environment arrive, and nothing of them was executed."""
    env = {"HF_HOME": VALUE, "NCCL_DEBUG": VALUE, "MINE": VALUE, "STAYS": "x", "CUDA_VISIBLE_DEVICES": "5"}
    done = runs.run("done", *WORDS, flags=("--forward_env=MINE",), **env)
    assert done.returncode == 0, done.stderr
    got = runs.got()
    assert [one["argv"] for one in got] == [[str(runs.said), "done", *WORDS]] * 3
    for one in got:
        assert [one["env"][name] for name in ("HF_HOME", "NCCL_DEBUG", "MINE")] == [VALUE] * 3
        assert one["cwd"] == str(runs.folder)
    names = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR")
    assert [[one["env"][name] for name in names] for one in got] == [
        ["0", "0", "3", "1", "127.0.0.2"],
        ["1", "0", "3", "2", "127.0.0.2"],
        ["2", "1", "3", "2", "127.0.0.2"],
    ]
    assert len({one["env"]["MASTER_PORT"] for one in got}) == 1
    assert not list(runs.folder.rglob("canary"))
    assert done.stdout == "a line of rank 0\n"
    assert "an error of rank 0\n" in done.stderr
    assert "rank 1" not in done.stderr
    logs = runs.folder / "out dir" / "logs"
    assert (logs / "rank-2.log").read_text() == "a line of rank 2\nan error of rank 2\n"
    assert sorted((logs / "rank-0.log").read_text().splitlines()) == ["a line of rank 0", "an error of rank 0"]
    assert (logs / "hostfile").read_text() == "127.0.0.2 slots=1\n127.0.0.3 slots=2\n"
    assert (logs / "pssh.hosts").read_text() == "127.0.0.2\n127.0.0.3\n"


def test_words_and_environment_arrive_through_a_shell(fake: Runs) -> None:
    check_arrival(fake)
    assert len((fake.folder / "ssh_pids").read_text().split()) == 1, "this node needs no ssh"


def test_words_and_environment_arrive_through_sshd(real: Runs) -> None:
    check_arrival(real)
    assert [one["env"].get("CUDA_VISIBLE_DEVICES") for one in real.got()] == ["5", None, None]
    assert [one["env"].get("STAYS") for one in real.got()] == ["x", None, None]


@pytest.mark.slow
def test_5000_words_arrive_through_sshd(real: Runs) -> None:
    """Random words of what shells, ssh and pdsh could take for something else, 500 a run; paths and a variable's name too."""
    draw = random.Random(11)
    pieces = [*WORDS, "\n", "'", '"', "\\", " ", "%h", "$(touch canary)", "-oProxyCommand=touch canary", "\x01", "ü"]
    for _ in range(10):
        words = ["".join(draw.choices(pieces, k=draw.randint(0, 5))) for _ in range(500)]
        hosts, logs = (real.folder / f"{start}{word}" for start, word in zip(("-", "$"), words, strict=False))
        hosts.write_text("127.0.0.2 slots=1\n127.0.0.3 slots=2\n")
        name = f"HF_{words[2].replace('=', '')}"
        flags = (f"--hostfile={hosts}", f"--log_dir={logs.name}")
        done = real.run("done", *words, flags=flags, **{"HF_TEXT": "".join(words), name: words[3]})
        assert done.returncode == 0, done.stderr
        assert all(one["argv"][2:] == words and one["env"]["HF_TEXT"] == "".join(words) for one in real.got())
        assert all(one["env"][name] == words[3] for one in real.got())
        assert (logs / "rank-2.log").is_file()
    assert not list(real.folder.rglob("canary"))


@pytest.mark.slow
def test_rank_0_of_another_node_is_heard(real: Runs) -> None:
    done = real.run("done", flags=("--master_port=29517",), NODE_IP_LIST="127.0.0.3:2,127.0.0.2:1")
    assert done.returncode == 0, done.stderr
    assert done.stdout == "a line of rank 0\n"
    assert "\nan error of rank 0\n" in done.stderr
    assert [one["env"]["MASTER_PORT"] for one in real.got()] == ["29517"] * 3


def test_a_failed_rank_of_another_node_is_told_and_all_end(real: Runs) -> None:
    done = real.run("fail")
    assert done.returncode == 1
    assert "[127.0.0.3 rank 2] RuntimeError: this rank fails\n" in done.stderr
    assert "error: rank 2 on 127.0.0.3 ended with exit code 1; the run stops\n" in done.stderr
    assert f"its log is {real.folder}/out dir/logs/rank-2.log on 127.0.0.3\n" in done.stderr
    assert "rank 1]" not in done.stderr, "one rank's lines, not those of all"
    assert all_gone([one["pid"] for one in real.got()])


@pytest.mark.parametrize(
    ("codes", "wanted"),
    [
        ((75, 0, 5), 5),
        pytest.param((0, 75, 3), 3, marks=pytest.mark.slow),
        pytest.param((4, 75, 75), 4, marks=pytest.mark.slow),
        pytest.param((75, 75, 75), 75, marks=pytest.mark.slow),
    ],
)
def test_the_cause_is_told_not_who_noticed_it(fake: Runs, codes: tuple[int, ...], wanted: int) -> None:
    assert fake.run("codes", *map(str, codes)).returncode == wanted


def test_ctrl_c_ends_all_nodes(real: Runs) -> None:
    process = real.start("wait")
    got = real.running(process)
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "interrupted: stopping the ranks on all nodes" in said
    assert all_gone([one[name] for one in got for name in ("pid", "launcher")])


def test_sigterm_lets_all_nodes_save(real: Runs) -> None:
    process = real.start("saves")
    got = real.running(process)
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143, said
    assert said.count("SIGTERM: the ranks save a checkpoint") == 1
    assert all_gone([one["pid"] for one in got])


def test_a_second_sigterm_ends_all_nodes(fake: Runs) -> None:
    process = fake.start("wait")
    got = fake.running(process)
    process.send_signal(signal.SIGTERM)
    while "SIGTERM: the ranks save" not in process.stderr.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == 143
    assert all_gone([one["pid"] for one in got])


def test_a_node_that_is_lost_ends_the_others(real: Runs) -> None:
    process = real.start("wait")
    got = real.running(process)
    os.kill(got[1]["launcher"], signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 75
    assert "error: 127.0.0.3 was lost" in said
    assert all_gone([one["pid"] for one in got])


@pytest.mark.slow
def test_a_node_whose_connection_falls_silent_is_lost_on_both_sides(real: Runs) -> None:
    """Its sshd is frozen, as when the network is cut. With pdsh only the ranks' own heartbeat ends those of that node."""
    process = real.start("wait")
    got = real.running(process)
    session = int(Path(f"/proc/{got[1]['launcher']}/stat").read_text().rsplit(")", 1)[1].split()[1])
    os.kill(session, signal.SIGSTOP)
    try:
        _, said = process.communicate(timeout=120)
        assert process.returncode == 75
        assert "error: 127.0.0.3 was lost" in said
        assert all_gone([got[0]["pid"]])
        if "--launcher=ssh" in real.flags:
            assert all_gone([one["pid"] for one in got], within=60)
    finally:
        os.kill(session, signal.SIGCONT)
    assert all_gone([one["pid"] for one in got], within=60)


def test_a_killed_launcher_leaves_nothing_on_any_node(real: Runs) -> None:
    process = real.start("wait")
    got = real.running(process)
    process.kill()
    process.communicate()
    assert all_gone([one[name] for one in got for name in ("pid", "launcher")])


def test_a_launching_side_that_goes_silent_is_gone(fake: Runs) -> None:
    """No line for SILENCE seconds, as when the network is cut: the node ends its ranks, though nothing was closed."""
    fake.said.mkdir()
    (fake.folder / "logs").mkdir()
    job = Job(
        "node_rank_helper", [str(fake.said), "wait"], {}, [("a", 1), ("b", 2)], "a", 29500, str(fake.folder), "logs", 9
    )
    code = "import sys, finebridge.finetune.node_launcher as n; n.SILENCE = 2.0; sys.exit(n.main(['-', 'a']))"
    node = subprocess.Popen(
        [sys.executable, "-c", code], env=fake.env, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    node.stdin.write(job.encode() + "\n")
    for beat in range(30):
        node.stdin.write("beat\n" if beat else "")
        node.stdin.flush()
        time.sleep(0.1)
    (got,) = fake.running(node, ranks=1)
    assert node.poll() is None, "the beats keep it alive"
    said = node.stdout.read()  # standard input stays open
    assert node.wait(30) == 0
    assert f'{job.mark}{{"node": 0, "started": {got["launcher"]}}}\n' in said
    assert f'{job.mark}{{"node": 0, "code": 130' in said
    assert all_gone([got["pid"]])


@pytest.mark.parametrize(
    ("break_it", "words"),
    [
        (lambda config: config.replace("known_hosts", "nothing"), "its host key is not known here"),
        pytest.param(
            lambda config: config.replace("/id\n", "/host_key\n"), "public key is missing in ~/.ssh/authorized_keys",
            marks=pytest.mark.slow,
        ),
        pytest.param(lambda config: "Port 1\n" + config, "no sshd listens on that port", marks=pytest.mark.slow),
    ],
    ids=["unknown host key", "no key", "no sshd"],
)  # fmt: skip
def test_a_node_that_cannot_be_reached_says_what_to_do(
    real: Runs, tmp_path: Path, break_it: Callable[[str], str], words: str
) -> None:
    flags = dict(flag.removeprefix("--").split("=", 1) for flag in real.flags)
    broken = tmp_path / "broken"
    broken.write_text(break_it(Path(flags["ssh_config"]).read_text()))
    real.flags = [f"--ssh_config={broken}", f"--launcher={flags['launcher']}"]
    port = () if "Port 1\n" in broken.read_text() else (f"--ssh_port={flags['ssh_port']}",)
    done = real.run("wait", flags=port)
    assert done.returncode == 2
    assert "error: 127.0.0.3 could not be started" in done.stderr
    assert words in done.stderr
    assert all_gone([one["pid"] for one in real.got()])


def test_a_node_without_finebridge_is_told(fake: Runs, tmp_path: Path) -> None:
    other = FAKE_SSH.replace('"$last"', '"$(printf %s "$last" | sed \'s|-m [^ ]*|-m none|\')"')
    (tmp_path / "bin" / "ssh").write_text(other)
    done = fake.run("wait")
    assert done.returncode == 2
    assert "127.0.0.3: " in done.stderr
    assert "No module named none" in done.stderr
    assert "finebridge and its Python must be at the same path there" in done.stderr
    assert all_gone([one["pid"] for one in fake.got()])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"folder": "/no/where"}, "/no/where: No such file or directory; every node needs the same paths"),
        ({"nodes": [("c", 1)]}, "this node is called 'a', which is none of c"),
        ({"version": "0"}, "the run was started with 0"),
        ({"logs": "/dev/null/logs"}, "/dev/null/logs: Not a directory"),
    ],
)
def test_a_node_on_which_the_job_cannot_run_says_why(tmp_path: Path, change: dict[str, Any], words: str) -> None:
    fields = {
        "module": "m",
        "argv": [],
        "env": {},
        "nodes": [("a", 1)],
        "master": "a",
        "port": 1,
        "logs": "l",
        "stop_grace": 1.0,
    }
    job = Job(**{**fields, "folder": str(tmp_path), **change})
    done = subprocess.run(
        [sys.executable, "-P", "-m", "finebridge.finetune.node_launcher", job.encode(), "a"],
        stdin=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2
    assert words in done.stderr


def test_nodes_started_by_hand_find_each_other(fake: Runs) -> None:
    second = fake.start("codes", "0", "0", "9", flags=("--no_ssh", "--node_rank=1"), LOCAL_IP="")
    ours = [
        "--preflight=off",
        "--no_ssh",
        "--node_rank=0",
        "::",
        "node_rank_helper",
        str(fake.said),
        "codes",
        "0",
        "0",
        "9",
    ]
    first = subprocess.run(
        [sys.executable, "-P", "-m", "loopback_nodes", *ours],
        cwd=fake.folder, env={**fake.env, "LOCAL_IP": ""}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    _, said = second.communicate(timeout=60)
    assert first.returncode == 0
    assert first.stdout == "a line of rank 0\n"
    assert second.returncode == 9
    assert "error: rank 2 on 127.0.0.3 ended with exit code 9" in said
    assert [one["env"]["RANK"] for one in fake.got()] == ["0", "1", "2"]
    assert [one["env"]["MASTER_PORT"] for one in fake.got()] == ["29500"] * 3


def test_a_node_started_by_hand_stops_as_one_machine_does(fake: Runs) -> None:
    process = fake.start("saves", flags=("--no_ssh", "--node_rank=1"), LOCAL_IP="")
    got = fake.running(process, ranks=2)
    (fake.said / "0.json").write_text("{}")  # rank 0, which another machine has
    process.send_signal(signal.SIGTERM)
    _, said = process.communicate(timeout=60)
    assert process.returncode == 143
    assert said.count("SIGTERM: the ranks save a checkpoint") == 1
    assert all_gone([one["pid"] for one in got])


def train_flags(base: Path, data: Path, out: Path, settings: Path) -> list[object]:
    return [
        "--model_name_or_path", base, "--train_data_file", data, "--output_dir", out, "--deepspeed", settings,
        "--per_device_train_batch_size", 2, "--learning_rate", "1e-2", "--logging_steps", 1, "--max_steps", 4,
        "--report_to", "none", "--heartbeat_timeout", 20,
    ]  # fmt: skip


@pytest.mark.slow
@pytest.mark.distributed
def test_two_nodes_train_as_two_ranks_of_one(
    real: Runs,
    models: Callable[[str], Path],
    train_file: Path,
    tmp_path: Path,
    zero: Callable[..., Path],
    history: Callable[[Path], list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """ZeRO-3 over gloo: the same losses and weights to the last bit."""
    base, settings = models("hunyuan_v1_dense"), zero(3)
    monkeypatch.chdir(tmp_path)
    here = [str(word) for word in train_flags(base, train_file, tmp_path / "one", settings)]
    assert run_ranks("finebridge.train.sft", here, 2) == 0
    process = real.start_module(
        "finebridge.train.sft", *train_flags(base, train_file, tmp_path / "two", settings),
        NODE_IP_LIST="127.0.0.2:1,127.0.0.3:1", GLOO_SOCKET_IFNAME="lo", DS_ACCELERATOR="cpu",
    )  # fmt: skip
    out, said = process.communicate(timeout=300)
    assert process.returncode == 0, out + said
    one, two = ([entry["loss"] for entry in history(tmp_path / name)] for name in ("one", "two"))
    assert len(one) == 4
    assert one == two
    mine, theirs = (load_weights(tmp_path / name / "checkpoint-4") for name in ("one", "two"))
    assert all((mine[name] == theirs[name]).all() for name in mine)
    assert "done: 4 steps" in out


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize(
    ("kind", "code", "words"),
    [
        ("kill", 137, r"error: rank 1 on 127\.0\.0\.3 was ended by SIGKILL"),
        ("raise", 1, r"\n\[127\.0\.0\.3 rank 1\] .*OSError: the disk is gone\n"),
        ("launcher", 75, r"error: 127\.0\.0\.3 was lost"),
        ("stop", 75, r"rank 1 \(host .* has said nothing for"),
        ("terminate", 143, r"stopped by SIGTERM at step [0-9]+, checkpoint .* saved"),
    ],
    ids=["kill", "raise", "launcher", "stop", "terminate"],
)
def test_a_run_whose_second_node_fails(
    real: Runs,
    models: Callable[[str], Path],
    train_file: Path,
    tmp_path: Path,
    zero: Callable[..., Path],
    kind: str,
    code: int,
    words: str,
) -> None:
    """Faults in the rank of the second node (``rank_faults.py``): told, ended everywhere, with the rank's code."""
    flags = train_flags(models("hunyuan_v1_dense"), train_file, tmp_path / "out", zero(3))
    process = real.start_module(
        "rank_faults", kind, 1, 4, *flags, "--max_steps", 500,
        NODE_IP_LIST="127.0.0.2:1,127.0.0.3:1", GLOO_SOCKET_IFNAME="lo",
    )  # fmt: skip
    out, said = process.communicate(timeout=300)
    assert process.returncode == code, out + said
    assert re.search(words, out + said), out + said
    assert all_gone(those_of(tmp_path))
    assert (kind == "terminate") == any((tmp_path / "out").glob("checkpoint-*"))


def those_of(folder: Path) -> list[int]:
    """Processes that have this folder in their command."""
    found: list[int] = []
    for place in Path("/proc").glob("[0-9]*"):
        try:
            if str(folder).encode() in (place / "cmdline").read_bytes():
                found.append(int(place.name))
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.distributed
def test_the_whole_way_over_two_nodes(
    real: Runs, models: Callable[[str], Path], train_file: Path, tmp_path: Path, zero: Callable[..., Path]
) -> None:
    """``finebridge run``: the stages around the training once, on this machine; said again all of it stands."""
    flags = map(str, train_flags(models("hunyuan_v1_dense"), train_file, tmp_path / "two", zero(3)))
    command = [sys.executable, "-P", "-m", "finebridge.finetune.cli", "run", *flags, *real.flags, "--use_lora"]
    env = {
        **real.env, "NODE_IP_LIST": "127.0.0.2:1,127.0.0.3:1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu",
    }  # fmt: skip
    shown = subprocess.run([*command, "--dry_run"], cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
    assert shown.returncode == 0, shown.stderr
    assert "plan: train   make   sft, 2 ranks" in shown.stdout
    assert "127.0.0.3" in shown.stdout
    assert not (tmp_path / "two" / "checkpoint-4").exists()
    for word in ("make", "reuse"):
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        plan = [line.split()[1:3] for line in done.stdout.splitlines() if line.startswith("plan: ")]
        assert plan == [["data", word], ["train", word], ["model", word]]
    merged, base = load_weights(tmp_path / "two" / "hf-4"), load_weights(models("hunyuan_v1_dense"))
    assert any((merged[name] != base[name]).any() for name in base)
