"""The command: its exit codes, its messages, and that it is light."""

import subprocess
import sys
from pathlib import Path

import finebridge
import pytest
from finebridge.finetune.cli import main
from finebridge.finetune.launch import STOP_GRACE

ROOT = Path(finebridge.__file__).parent


@pytest.fixture
def run_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a model folder ``m`` and a data file ``d.jsonl``; no rank can be started by mistake."""
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "config.json").write_text("{}")
    (tmp_path / "d.jsonl").write_text('{"messages": []}\n')
    monkeypatch.chdir(tmp_path)
    for name in ("NODE_IP_LIST", "HOST_GPU_NUM"):
        monkeypatch.delenv(name, raising=False)

    def refuse(*_: object) -> int:
        raise AssertionError("ranks were started for bad input")

    monkeypatch.setattr("finebridge.finetune.launch.run_ranks", refuse)
    return tmp_path


def refused(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """What the command says on stderr when it refuses ``words`` with exit code 2."""
    assert main(words) == 2
    said = capsys.readouterr()
    assert said.out == ""
    assert said.err.startswith("error: ")
    assert "Traceback" not in said.err
    return said.err


GOOD = ("--model_name_or_path", "m", "--train_data_file", "d.jsonl")


@pytest.mark.parametrize("words", [(), ("--help",), ("-h",), ("help",)])
def test_help_lists_every_verb(capsys: pytest.CaptureFixture[str], words: tuple[str, ...]) -> None:
    assert main(words) == 0
    said = capsys.readouterr().out
    assert all(f"\n  {verb}" in said for verb in ("sft", "pretrain", "merge", "data preview", "example"))


def test_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--version"]) == 0
    assert capsys.readouterr().out == f"{finebridge.__version__}\n"


@pytest.mark.parametrize("verb", ["sft", "pretrain"])
def test_help_of_training_names_our_flags_and_transformers(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb, "--help"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"finebridge {verb} [recipe.yaml")
    for flag in ("--nproc_per_node", "--train_data_file", "--lora_rank", "--min_lr", "--learning_rate", "--deepspeed"):
        assert f"\n  {flag} " in said


def test_an_unknown_verb_is_refused_with_the_known_ones(capsys: pytest.CaptureFixture[str]) -> None:
    known = "run, sft, pretrain, plan, report, merge, convert, checkpoint, data, cache, nodes, example"
    assert refused(capsys, "trian") == f"error: unknown verb 'trian'; known are {known}\n"


@pytest.mark.parametrize("words", [("sft",), ()], ids=["sft", "no verb"])
def test_an_unknown_flag_gives_the_nearest(
    run_folder: Path, capsys: pytest.CaptureFixture[str], words: tuple[str, ...]
) -> None:
    assert run_folder
    said = refused(capsys, *words, *GOOD, "--learning_rte", "1e-5")
    assert "unknown flag --learning_rte; did you mean --learning_rate?" in said


BAD: dict[str, tuple[tuple[str, ...], str]] = {
    "missing data file": (("--model_name_or_path", "m", "--train_data_file", "none.jsonl"), "none.jsonl"),
    "no data file": (("--model_name_or_path", "m"), "--train_data_file is missing"),
    "missing model": (
        ("--model_name_or_path", "none", "--train_data_file", "d.jsonl"), "--model_name_or_path none: no such folder",
    ),
    "no model": (("--train_data_file", "d.jsonl"), "--model_name_or_path is missing"),
    "missing recipe": (("none.yaml",), "none.yaml: No such file"),
    "a word": (("sft", "word"), "'word': a recipe (.yaml), key=value or --flag is expected"),
    "not a number": ((*GOOD, "--learning_rate", "fast"), "--learning_rate fast"),
    "unknown settings": ((*GOOD, "--deepspeed", "ds_zero2_no_ofload"), "did you mean ds_zero2_no_offload"),
    "no processes": ((*GOOD, "--nproc_per_node", "0"), "--nproc_per_node 0: a positive number is expected"),
    "no number of processes": ((*GOOD, "--nproc_per_node"), "--nproc_per_node needs a value"),
    "processes of superscript": ((*GOOD, "--nproc_per_node", "²"), "--nproc_per_node ²: a number is expected"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_exit_code_2_before_any_rank(
    run_folder: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    assert run_folder
    words, message = BAD[name]
    assert message in refused(capsys, *words)


@pytest.mark.parametrize(
    "line",
    [
        "lora_rank: [8, 16]", "model_name_or_path: 5", "lora_rank: 2.5", "seed: 1.5", "max_steps: [1, 2]",
        "learning_rate: {a: 1}",
    ],
)  # fmt: skip
def test_a_recipes_value_of_the_wrong_type_is_exit_code_2_and_named(
    run_folder: Path, capsys: pytest.CaptureFixture[str], line: str
) -> None:
    """Before any rank: what a rank would refuse is refused here, and nothing is a traceback."""
    key = line.partition(":")[0]
    lines = {"model_name_or_path": "model_name_or_path: m", "train_data_file": "train_data_file: d.jsonl", key: line}
    (run_folder / "r.yaml").write_text("\n".join(lines.values()))
    assert key in refused(capsys, "r.yaml")


@pytest.mark.parametrize(
    ("words", "env", "processes"),
    [
        ((), {}, 3),
        (("--nproc_per_node", "2"), {"HOST_GPU_NUM": "5"}, 2),
        ((), {"HOST_GPU_NUM": "5"}, 5),
        ((), {"NODE_IP_LIST": "10.0.0.1:4", "HOST_GPU_NUM": "5"}, 4),
        ((), {"CUDA_VISIBLE_DEVICES": ""}, 1),
        (("nproc_per_node=2",), {}, 2),
    ],
    ids=str,
)
def test_how_many_ranks_start_and_with_what(
    run_folder: Path, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...], env: dict[str, str], processes: int
) -> None:
    started: list[tuple[object, ...]] = []
    monkeypatch.setattr("finebridge.finetune.launch.run_ranks", lambda *words: started.append(words) or 7)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0,1,2")
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    (run_folder / "r.yaml").write_text("seed: 3\nbf16: true\n")
    assert main(["sft", "r.yaml", "seed=4", *words, *GOOD]) == 7, "the ranks' exit code is the command's"
    argv = ["--seed=4", "--bf16=true", "--model_name_or_path=m", "--train_data_file=d.jsonl"]
    ((module, words_of_the_ranks, count, grace),) = started
    assert module == "finebridge.train.sft"
    assert sorted(words_of_the_ranks) == sorted(argv)  # type: ignore[call-overload]
    assert count == processes
    assert grace == STOP_GRACE


def test_data_without_its_verb_says_the_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert "finebridge data build|check|preview|sample|export|import" in refused(capsys, "data")


def test_checking_a_command_line_imports_no_torch(run_folder: Path) -> None:
    code = f"""
import sys
from finebridge.finetune.cli import main
from finebridge.finetune.launch import STOP_GRACE
codes = [main(["--help"]), main(["sft", "--help"]), main({[*GOOD, "--learning_rte", "1"]!r})]
heavy = {{"torch", "transformers", "deepspeed", "peft"}} & set(sys.modules)
sys.exit(f"{{codes}} {{heavy}}" if codes != [0, 0, 2] or heavy else 0)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=run_folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_a_reader_that_stops_early_is_no_error() -> None:
    command = f"'{sys.executable}' -m finebridge.finetune.cli sft --help | head -n 1; echo ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.splitlines()[-1] == "0"
    assert done.stderr == ""


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--version"], 0, finebridge.__version__),
        (["trian"], 2, "unknown verb 'trian'"),
        (["a b $(touch x)"], 2, "'a b $(touch x)'"),
    ],
)
def test_the_users_script_hands_its_words_on(tmp_path: Path, words: list[str], code: int, message: str) -> None:
    done = subprocess.run(
        ["bash", ROOT / "finetune" / "finetune.sh", *words],
        cwd=tmp_path,
        env={"FINEBRIDGE_PYTHON": sys.executable, "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    assert message in done.stdout + done.stderr
    assert list(tmp_path.iterdir()) == []


def test_checkpoints_are_verified_without_torch(tmp_path: Path) -> None:
    from finebridge.storage.publish import publish

    with publish(tmp_path / "checkpoint-1", kind="checkpoint", made_from={}) as folder:
        (folder / "a").write_text("x")
    code = (
        "import sys; from finebridge.finetune.cli import main; "
        f"assert main(['checkpoint', 'verify', {str(tmp_path)!r}]) == 0; assert 'torch' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
