"""What is built once, on several nodes: one builder a disk, whoever shares it, dies, or fails; and training over nodes."""

import json
import os
import re
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import ROOT
from finebridge.storage.manifest import verify
from finebridge.storage.owner import me
from nodes import nodes, together
from rank_runner import RankRunner

Models = Callable[[str], Path]
Words = list[object]
History = Callable[[Path], list[dict[str, Any]]]
MAIN = "finebridge.finetune.cli:main"
FAULTS = "build_faults:main"
slow = pytest.mark.slow


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A folder that is on each node what a test says."""
    return tmp_path / "disk"


@pytest.fixture
def commands(models: Models, train_file: Path, disk: Path) -> dict[str, Words]:
    """What is built once, into ``disk``: the data and the weights."""
    model = models("qwen3")
    return {
        "data": ["data", "build", train_file, "--tokenizer_name_or_path", model, "--output_dir", disk / "prepared"],
        "weights": ["convert", "--enable-hf2mg-convert", "--load", model, "--mg-cache-dir", disk / "mcore", "--tp", 2],
    }


def outcome(text: str) -> str:
    """What a command says that it did; one that fails says neither."""
    said = re.findall(r"(?:^|; )(prepared|wrote|reused) /", text, re.MULTILINE)
    return said[0] if len(said) == 1 else f"{said}: {text}"


def artifact(disk: Path, what: str) -> Path:
    """The one artifact that a disk holds, whole and with nothing half-made beside it."""
    if what == "weights":
        (made,) = disk.glob("mcore")
    else:
        (made,) = (path for path in (disk / "prepared").iterdir() if path.is_dir())
    verify(made)
    beside = {path.name for path in made.parent.iterdir()} - {made.name, "prepared"}
    assert beside <= {f".{made.name}.verified", "source_hashes.json", f".{made.name}.sources"}
    return made


def test_nodes_are_apart(tmp_path: Path) -> None:
    """What the tests below stand on: names, networks, processes, boots and disks of their own."""
    disk = tmp_path / "disk"
    with nodes(3, tmp_path, names=["one", "same", "same"], disks={disk: "aab"}) as made:
        ids = {node.run(["cat", "/proc/sys/kernel/random/boot_id"]) for node in made}
        assert len(ids) == 3
        assert [node.run(["hostname"]) for node in made] == ["one\n", "same\n", "same\n"]
        assert [node.run(["hostname", "-I"]).strip() for node in made] == ["10.77.0.1", "10.77.0.2", "10.77.0.3"]
        assert [node.run(["getent", "hosts", "same"]).split()[0] for node in made[1:]] == ["10.77.0.2", "10.77.0.3"]
        made[0].run(["touch", disk / "here"])
        assert [node.run(["ls", disk]) for node in made] == ["here\n", "here\n", ""]
        assert [path.name for path in (tmp_path / "disk.a").iterdir()] == ["here"]
        sleeper = made[1].popen(["sleep", "600"])
        assert all(int(node.run(["sh", "-c", "echo $$"])) < 50 for node in made), "numbers of their own"
        for number in ("1", "2", "3"):
            greet = f"exec 3<>/dev/tcp/10.77.0.{number}/9"  # nobody listens, but someone is there to say so
            with pytest.raises(subprocess.CalledProcessError) as caught:
                made[0].run(["timeout", "5", "bash", "-c", greet])
            assert "refused" in caught.value.output
    assert sleeper.wait(10) == -9, "a node's processes end with it"
    assert socket.gethostname() not in ("one", "same")


LAYOUTS = {"shared": "aa", "private": "ab", "mixed": "aab"}


@pytest.mark.parametrize(
    ("layout", "names"),
    [("mixed", "same same same"), *(pytest.param(layout, "one two three", marks=slow) for layout in LAYOUTS)],
)
def test_each_disk_is_built_once(
    layout: str, names: str, ranks: RankRunner, commands: dict[str, Words], disk: Path, tmp_path: Path
) -> None:
    letters = LAYOUTS[layout]
    with nodes(len(letters), tmp_path, names=names.split()[: len(letters)], disks={disk: letters}) as made:
        jobs = [(node, words) for node in made for words in commands.values()]
        done = together(ranks, jobs, tmp_path / "logs", MAIN).check()
    said = {
        what: Counter(zip(letters, map(outcome, done.texts[at::2]), strict=True)) for at, what in enumerate(commands)
    }
    for what, word in (("data", "prepared"), ("weights", "wrote")):
        found = {letter: letters.count(letter) - 1 for letter in letters}
        wanted = Counter(
            {(letter, word): 1 for letter in found} | {(letter, "reused"): n for letter, n in found.items() if n}
        )
        assert said[what] == wanted
        files = [verify(artifact(tmp_path / f"disk.{letter}", what))["files"] for letter in sorted(set(letters))]
        assert all(entry == files[0] for entry in files)


@pytest.mark.parametrize(
    "names", [pytest.param(["one", "two"], marks=slow), ["same", "same"]], ids=["names", "one name"]
)
@pytest.mark.parametrize(("what", "dead"), [
    ("data", "2"), pytest.param("data", "", marks=slow), pytest.param("weights", "", marks=slow),
])  # fmt: skip
def test_a_builder_that_is_killed_is_replaced_on_another_node(
    what: str, dead: str, names: list[str], ranks: RankRunner, commands: dict[str, Words], disk: Path, tmp_path: Path
) -> None:  # fmt: skip
    """Nobody there can see that it is dead; its lock stands still."""
    logs = tmp_path / "logs"
    with nodes(2, tmp_path, names=names, disks={disk: "aa"}) as made:
        jobs = [(node, commands[what]) for node in made]
        done = together(ranks, jobs, logs, FAULTS, KILL="1", DEAD=dead, MEET=str(logs), limit=60)
    assert done.codes == [-9, 0], done.texts
    assert f"on {names[0]}, is dead or stands still; going on without it" in done.texts[1]
    if not dead:  # not before it has stood still for 20 s
        assert max(map(int, re.findall(r"\(waited (\d+) s\)", done.texts[1]))) >= 18
    assert outcome(done.texts[1]) in ("prepared", "wrote")
    artifact(tmp_path / "disk.a", what)


@pytest.mark.parametrize("dead", ["2", pytest.param("", marks=slow)])
def test_what_a_dead_machine_left_is_taken_away(
    dead: str, ranks: RankRunner, commands: dict[str, Words], disk: Path, tmp_path: Path
) -> None:
    """Locks and an unfinished artifact of a machine that is gone; of this host's name, but another boot."""
    host, _, pid, start = me().rsplit("-", 3)
    gone = f"{host}-{'0' * 16}n1-{pid}-{start}"
    for place in ("prepared/.source_hashes.json", ".mcore.sources/.source_hashes.json", ".mcore"):
        lock = tmp_path / "disk.a" / f"{place}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        lock.write_text(json.dumps({"owner": gone, "attempt": "x", "beat": 7}).ljust(4000))
    with nodes(2, tmp_path, disks={disk: "aa"}) as made:
        jobs = [(node, words) for node in made for words in commands.values()]
        done = together(ranks, jobs, tmp_path / "logs", "build_faults:patient", DEAD=dead, limit=90).check()
    assert Counter(map(outcome, done.texts)) == {"prepared": 1, "wrote": 1, "reused": 2}
    assert "is dead or stands still; going on without it" in "".join(done.texts)
    for what in commands:
        artifact(tmp_path / "disk.a", what)


WRONG: dict[str, tuple[str, Words, str]] = {
    "unreadable rows": ("data", ["--max_rejects", 0.01], "1 of 3 rows are rejected"),
    "handler": ("data", ["--handler_name", "AlpacaStyleInstructionHandler2"], "AlpacaStyleInstructionHandler2"),
    "template": ("data", ["--chat_template", "TEMPLATE"], "TEMPLATE"),
    "layout": ("weights", ["--tp", 3], "--tp 3: 4 attention heads"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_error_reaches_who_waits_on_another_node(
    name: str, ranks: RankRunner, commands: dict[str, Words], disk: Path, tmp_path: Path
) -> None:
    """Each ends with its own exit code 2 and the cause; nothing of what failed is used by the next start."""
    what, more, cause = WRONG[name]
    template = tmp_path / "wrong.jinja"
    template.write_text("{{ messages[0].nothing.at_all }}")
    words = [str(word).replace("TEMPLATE", str(template)) for word in (*commands[what], *more)]
    if name == "unreadable rows":
        rows = Path(words[2]).read_text().splitlines()[:2]
        words[2] = str(tmp_path / "rows.jsonl")
        Path(words[2]).write_text("\n".join([*rows, "{broken"]))
    logs = tmp_path / "logs"
    with nodes(2, tmp_path, disks={disk: "aa"}) as made:
        met = (
            "build_faults:patient" if name == "handler" else FAULTS
        )  # the handler is looked up before anything is built
        done = together(ranks, [(node, words) for node in made], logs, met, MEET=str(logs), limit=30)
    assert done.codes == [2, 2], done.texts
    for text in done.texts:
        assert re.search(rf"^error: .*{re.escape(cause.replace('TEMPLATE', str(template)))}", text, re.MULTILINE), text
        assert "Traceback" not in text


@pytest.fixture
def training(models: Models, train_file: Path, zero: Callable[..., Path]) -> Callable[..., Words]:
    """The words of a short training by ZeRO stage, output folder and folder of prepared data."""

    def words(stage: int, output: Path, prepared: Path) -> Words:
        return [
            "--model_name_or_path", models("hunyuan_v1_dense"), "--train_data_file", train_file, "--deepspeed", zero(stage),
            "--output_dir", output, "--prepared_data_dir", prepared, "--max_steps", 3, "--per_device_train_batch_size", 2,
            "--logging_steps", 1, "--report_to", "none", "--save_strategy", "no", "--disable_tqdm", "true",
        ]  # fmt: skip

    return words


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "each", "layout"), [
    pytest.param(2, 1, "private", marks=slow), pytest.param(3, 1, "shared", marks=slow), pytest.param(2, 2, "shared", marks=slow),
    pytest.param(3, 2, "private", marks=slow),
])  # fmt: skip
def test_training_over_two_nodes(
    stage: int, each: int, layout: str, ranks: RankRunner, training: Callable[..., Words], history: History, disk: Path,
    tmp_path: Path,
) -> None:  # fmt: skip
    """The same losses as on one node; the data is prepared once a disk, ahead of the process group."""
    letters = LAYOUTS[layout]
    output = tmp_path / "out"
    with nodes(2, tmp_path, disks={disk: letters}) as made:
        jobs = [(node, training(stage, output, disk / "prepared")) for node in made for _ in range(each)]
        done = together(ranks, jobs, tmp_path / "logs", "build_faults:train").check()
    built = Counter(letters[number // each] for number, text in enumerate(done.texts) if "this rank prepares" in text)
    assert built == Counter(set(letters))
    for letter in set(letters):
        artifact(tmp_path / f"disk.{letter}", "data")
    ranks.run(training(stage, tmp_path / "one", tmp_path / "prepared"), tmp_path / "logs1", ranks=2 * each).check()
    losses = [entry["loss"] for entry in history(output)]
    assert len(losses) == 3
    assert losses == [entry["loss"] for entry in history(tmp_path / "one")]


@slow
@pytest.mark.distributed
@pytest.mark.parametrize(("fault", "codes", "said"), [
    ("data", [2, 2], r"rank 1 \(two\): .*1 of 2 rows are rejected"), ("kill", [2, -9], r"rank 1 \(two\): no sign of life for "),
])  # fmt: skip
def test_a_node_that_cannot_prepare_its_data_ends_the_others(
    fault: str, codes: list[int], said: str, ranks: RankRunner, training: Callable[..., Words], disk: Path, tmp_path: Path
) -> None:  # fmt: skip
    """They wait for it ahead of the process group, and are told why."""
    words = training(2, tmp_path / "out", disk / "prepared")
    rows = Path(str(words[3])).read_text().splitlines()[:2]
    words[3] = disk / "train.jsonl"
    with nodes(2, tmp_path, names=["one", "two"], disks={disk: "ab"}) as made:
        for letter in "ab":
            rows[-1] = rows[-1] if (letter, fault) != ("b", "data") else "{broken"
            (tmp_path / f"disk.{letter}" / "train.jsonl").write_text("\n".join(rows))
        kill = {"KILL": "1"} if fault == "kill" else {}
        jobs = [(node, words) for node in made]
        done = together(ranks, jobs, tmp_path / "logs", "build_faults:train", GONE="5", limit=60, **kill)
    assert done.codes == codes, done.texts
    assert re.search(f"^error: another rank cannot train: {said}", done.texts[0], re.MULTILINE), done.texts[0]


@slow
@pytest.mark.distributed
@pytest.mark.parametrize("seconds", [0, 80])
def test_torchrun_over_two_nodes(
    seconds: int, training: Callable[..., Words], history: History, disk: Path, tmp_path: Path
) -> None:  # fmt: skip
    """As a user starts it: one torchrun a node, two ranks each; node 2 may prepare data for longer than any time-out."""
    output = tmp_path / "out"
    with nodes(2, tmp_path, disks={disk: "ab"}) as made:
        started: list[subprocess.Popen[str]] = []
        for number, node in enumerate(made):
            words: Words = [
                sys.executable, "-P", "-m", "torch.distributed.run", "--nnodes", 2, "--node_rank", number, "--nproc_per_node", 2,
                "--master_addr", made[0].address, "--master_port", 29500, "-m", "build_faults",
                *training(3, output, disk / "prepared"),
            ]  # fmt: skip
            env = {**os.environ, "DEEPSPEED_TIMEOUT": "1", "SLOW": str(seconds * number)}  # minutes, seconds
            env["PYTHONPATH"] = f"{ROOT / 'tests'}:{env.get('PYTHONPATH', '')}"
            started.append(node.popen(words, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT))
        said = [process.communicate(timeout=300)[0] for process in started]
    assert [process.returncode for process in started] == [0, 0], "\n".join(said)
    assert len(history(output)) == 3
    assert [text.count("this rank prepares") for text in said] == [1, 1]
    assert ("waiting for rank 2 (node2), rank 3 (node2), still preparing data" in said[0]) == bool(seconds)
    for letter in "ab":
        artifact(tmp_path / f"disk.{letter}", "data")
