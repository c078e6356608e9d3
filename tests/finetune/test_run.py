"""The whole way in one command: what is made, what is made again, what is refused; with real ranks where it matters."""

import json
import os
import shutil
import signal
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.csv
import pyarrow.feather
import pyarrow.parquet
import pytest
from conftest import load_weights, messages_file
from finebridge.finetune import export
from finebridge.finetune.cli import main
from finebridge.finetune.recipe import SHIPPED, find_recipe, read_recipe
from finebridge.storage.manifest import verify
from finebridge.storage.publish import publish
from run_trials import launch

Models = Callable[[str], Path]
Run = Callable[..., list[str]]


def alpaca(count: int = 24) -> list[dict[str, str]]:
    return [{"instruction": f"{i}+{i}=", "input": "", "output": f"{2 * i}{'!' * (i % 7)}"} for i in range(count)]


@pytest.fixture
def here(tmp_path: Path, models: Models, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A current folder with a model ``m`` that may be changed and data ``x.parquet`` and ``d.jsonl``."""
    monkeypatch.chdir(tmp_path)
    for name in ("NODE_IP_LIST", "HOST_GPU_NUM"):
        monkeypatch.delenv(name, raising=False)
    shutil.copytree(models("qwen3"), tmp_path / "m")
    pyarrow.parquet.write_table(pa.Table.from_pylist(alpaca()), tmp_path / "x.parquet")
    messages_file(tmp_path / "d.jsonl")
    return tmp_path


@pytest.fixture
def quick_ranks(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, str]]:
    """In place of ranks: the flags that each would have got, and a checkpoint whose weights are the model's."""
    started: list[dict[str, str]] = []

    def save(_module: str, argv: Sequence[str], _processes: int, _grace: float) -> int:
        flags = dict(word.removeprefix("--").split("=", 1) for word in argv)
        started.append(flags)
        out, step = Path(flags["output_dir"]), flags["max_steps"]
        with publish(out / f"checkpoint-{step}", kind="checkpoint", made_from={}, replace=True) as folder:
            shutil.copytree(flags.get("model_name_or_path") or flags["load"], folder, dirs_exist_ok=True)
            (folder / "manifest.json").unlink(missing_ok=True)
            (folder / "optimizer.pt").write_text(f"state at {step}")
        (out / "trainer_state.json").write_text(json.dumps({"global_step": int(step)}))
        return 0

    monkeypatch.setattr("finebridge.finetune.launch.run_ranks", save)
    return started


@pytest.fixture
def said(capsys: pytest.CaptureFixture[str]) -> Run:
    """Runs the command, which must end with ``code``; the lines that it says, those of the plan by stage too."""

    def call(*words: object, code: int = 0) -> list[str]:
        capsys.readouterr()
        assert main(["run", *map(str, words)]) == code
        told = capsys.readouterr()
        return (told.err if code else told.out).splitlines()

    return call


def plan_of(lines: Sequence[str]) -> dict[str, str]:
    """Stage -> ``make`` or ``reuse``."""
    rows = [line.split() for line in lines if line.startswith("plan: ")]
    return {row[1]: row[2] for row in rows if row[2] in ("make", "reuse")}


FLAGS = ("--train_data_file", "d.jsonl", "--model_name_or_path", "m", "--max_steps", "2", "--output_dir", "out")
MINDSPEED = (
    "--data-path", "x.parquet", "--load", "m", "--enable-hf2mg-convert", "--model-type-hf", "qwen3", "--handler-name",
    "AlpacaStyleInstructionHandler", "--prompt-type", "hunyuan_dense", "--tensor-model-parallel-size", "2",
    "--output_dir", "out", "--max_steps", "2", "--per_device_train_batch_size", "4", "--report_to", "none",
)  # fmt: skip


def test_mindspeeds_flags_in_one_command_and_again(here: Path, said: Run) -> None:
    """Acceptance checks 15 and 21 with a real rank: raw data and a Hugging Face model to both checkpoints, once."""
    lines = said(*MINDSPEED)
    assert plan_of(lines) == dict.fromkeys(("mcore", "data", "train", "model"), "make")
    kept = here / "m" / "megatron_cache_tp2pp1ep1"
    assert sorted(path.name for path in (kept / "release").iterdir()) == ["mp_rank_00", "mp_rank_01"]
    trained, left = load_weights(here / "out" / "checkpoint-2"), load_weights(here / "out" / "hf-2")
    assert all((trained[name] == left[name]).all() for name in trained)
    assert any((trained[name] != tensor).any() for name, tensor in load_weights(here / "m").items())
    times = {
        path: path.stat().st_mtime_ns for path in here.rglob("*") if path.is_file() and "verified" not in path.name
    }

    again = said(*MINDSPEED)
    assert plan_of(again) == dict.fromkeys(("mcore", "data", "train", "model"), "reuse")
    assert "train: reused out/checkpoint-2; remove it to train again" in again
    assert times == {path: path.stat().st_mtime_ns for path in times}, "nothing is written again"


def test_only_what_depends_on_a_change_is_made_again(here: Path, said: Run, quick_ranks: list[dict[str, str]]) -> None:
    said(*MINDSPEED)
    stages = ("mcore", "data", "train", "model")
    for change, made in (
        (("--tensor-model-parallel-size", "1"), {"mcore"}),
        (("--pp", "2"), {"mcore"}),
        (("--enable_thinking", "false"), {"data", "train", "model"}),
        (("--learning_rate", "1e-3"), {"train", "model"}),
        (("--logging_steps", "1"), set()),
        (("--learning_rate", "5e-5"), set()),  # the default
        (("--nproc_per_node", "2"), {"train", "model"}),
    ):
        told = plan_of(said(*MINDSPEED, *change, "--overwrite_output_dir", "--dry_run"))
        assert {stage for stage in stages if told[stage] == "make"} == made, change
    pyarrow.parquet.write_table(pa.Table.from_pylist(alpaca(25)), here / "x.parquet")
    told = plan_of(said(*MINDSPEED, "--overwrite_output_dir", "--dry_run"))
    assert {stage for stage in stages if told[stage] == "make"} == {"data", "train", "model"}
    file = here / "m" / "tokenizer_config.json"
    file.write_text(file.read_text() + " ")
    told = plan_of(said(*MINDSPEED, "--overwrite_output_dir", "--dry_run"))
    assert set(told.values()) == {"make"}, "the tokenizer lies beside the converted weights too"
    assert len(quick_ranks) == 1


def test_two_runs_are_never_mixed(here: Path, said: Run, quick_ranks: list[dict[str, str]]) -> None:
    said(*FLAGS)
    other = (*FLAGS, "--max_steps", "3", "--learning_rate", "1e-3")
    (line,) = said(*other, code=2)
    assert (
        "out holds checkpoint-2 of another run (max_steps was 2, is 3; learning_rate was not given, is 0.001)" in line
    )
    assert (here / "out" / "checkpoint-2").is_dir()
    assert len(quick_ranks) == 1
    said(*other, "--overwrite_output_dir")
    assert sorted(path.name for path in (here / "out").iterdir() if path.is_dir()) == [
        "checkpoint-3",
        "hf-3",
        "prepared_data",
    ]
    said(*FLAGS, "--resume_from_checkpoint", "true")
    assert quick_ranks[-1]["resume_from_checkpoint"] == "true"
    shutil.rmtree(here / "out" / "checkpoint-2")
    assert "out holds checkpoint-3 of another run" in said(*FLAGS, "--seed", "9", code=2)[0]
    shutil.rmtree(here / "out" / "checkpoint-3")
    assert "out holds hf-2 of another run" in said(*FLAGS, "--seed", "9", code=2)[0], "it is not removed unasked"
    shutil.rmtree(here / "out")
    (here / "out" / "checkpoint-9").mkdir(parents=True)
    assert "finebridge run did not make it" in said(*FLAGS, code=2)[0]


def test_a_changed_artifact_is_made_again(here: Path, said: Run, quick_ranks: list[dict[str, str]]) -> None:
    said(*FLAGS)
    left = here / "out" / "hf-2" / "config.json"
    left.write_bytes(left.read_bytes() + b" ")  # and with it the checkpoint's, which is the same file
    told = said(*FLAGS)
    assert plan_of(told)["train"] == plan_of(told)["model"] == "make"
    assert quick_ranks[-1]["resume_from_checkpoint"] == "true", "its own unfinished run goes on"
    assert verify(here / "out" / "hf-2")


def test_what_starts_from_a_checkpoint_goes_on_from_its_own(here: Path, quick_ranks: list[dict[str, str]]) -> None:
    """``--init_from_checkpoint`` and a resume exclude each other; the second start means its own checkpoints."""
    words = ("--train_data_file", "d.jsonl", "--max_steps", "2", "--output_dir", "out", "--init_from_checkpoint", "m")
    assert main(["run", *words, "--model_name_or_path", "m", "--save_strategy", "no"]) == 0
    assert main(["run", *words, "--model_name_or_path", "m", "--save_strategy", "no"]) == 0
    first, second = quick_ranks
    assert first["init_from_checkpoint"] == "m"
    assert second["resume_from_checkpoint"] == "true"
    assert second["model_name_or_path"] == "m"
    assert "init_from_checkpoint" not in second
    assert (here / "out" / "checkpoint-2").is_dir()


def test_the_resolved_recipe_does_the_same_again(here: Path, said: Run, quick_ranks: list[dict[str, str]]) -> None:
    said(*FLAGS, "--lora_rank", "8", "--hub_token", "hf_abcdefghijkl")
    text = (here / "out" / "recipe.yaml").read_text()
    assert "hf_abc" not in text
    recipe = read_recipe(here / "out" / "recipe.yaml")
    assert recipe["max_steps"] == 2
    assert recipe["lora_rank"] == 8
    assert recipe["stage"] == "sft"
    assert "hidden_size" not in recipe
    assert set(plan_of(said("out/recipe.yaml")).values()) == {"reuse"}
    (data,) = (here / "out" / "prepared_data").glob("[!.]*/")
    assert (data.parent / f".{data.name}.recipe.yaml").read_text() == text
    assert len(quick_ranks) == 1


def test_a_plan_makes_nothing(here: Path, said: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finebridge.finetune.launch.run_ranks", lambda *_: pytest.fail("started"))
    before = {path for path in here.rglob("*") if path.is_file()}
    told = said(
        *MINDSPEED, "--dry_run", "--use_lora", "--export_mcore", "tp=2,format=torch", "--output_prefix", "tok/x"
    )
    assert plan_of(told) == dict.fromkeys(("mcore", "data", "tokens", "train", "model", "export"), "make")
    assert {path.name for path in here.rglob("*") if path.is_file() and path not in before} == {"source_hashes.json"}
    commands = [line.split()[1:3] for line in told if line.startswith("  ")]
    assert [" ".join(words) for words in commands] == [
        "convert --enable_hf2mg_convert", "data build", "sft --nproc_per_node=1", "merge --base_model_path", "convert --to",
    ]  # fmt: skip
    assert "are free where out lies" in told[-1]


def test_the_files_of_an_output_prefix(here: Path, said: Run, quick_ranks: list[dict[str, str]]) -> None:
    words = (*FLAGS, "--output-prefix", "tok/x", "--neat-pack", "--seq-length", "64")
    said(*words)
    names = {
        f"x_packed_{part}_document.{end}"
        for part in ("input_ids", "attention_mask", "labels")
        for end in ("bin", "idx")
    }
    assert {path.name for path in (here / "tok").iterdir()} == names
    assert plan_of(said(*words))["tokens"] == "reuse"
    file = here / "tok" / "x_packed_labels_document.bin"
    file.write_bytes(file.read_bytes()[:-4])
    assert plan_of(said(*words))["tokens"] == "make"
    assert plan_of(said(*words))["tokens"] == "reuse"
    (here / "tok" / "y_packed_labels_document.bin").write_text("somebody's")
    lines = said(*words, "--output-prefix", "tok/y", code=2)
    assert "y_packed_labels_document.bin" in lines[0]
    assert len(quick_ranks) == 1


REFUSED: dict[str, tuple[tuple[str, ...], str]] = {
    "mistyped": (("--mg-cach-dir", "x"), "unknown flag --mg_cach_dir; did you mean --mg_cache_dir?"),
    "mistyped key": (("tpp=2",), "unknown key 'tpp'; did you mean tp?"),
    "no conversion": (("--tp", "2"), "--tp is for --enable_hf2mg_convert"),
    "choice": (("--stage", "pt"), "--stage pt: choose one of sft, pretrain"),
    "number": (("--tp", "two", "--enable_hf2mg_convert"), "--tp two: a number is expected"),
    "layout": (("--enable_hf2mg_convert", "--tp", "3"), "--tp 3: 4 attention heads"),
    "family": (("--enable_hf2mg_convert", "--model-type-hf", "qwen33"), "qwen33"),
    "dtype": (("--save_dtype", "bf16"), "--save_dtype is for LoRA"),
    "export": (("--export_mcore", "tp=3"), "--export_mcore: --tp 3: 4 attention heads"),
    "nothing saved": (("--save_strategy", "no", "--export_mcore", "tp=2"), "--export_mcore needs a checkpoint"),
    "handler": (("--handler-name", "AlpacaStyleInstructionHandlr"), "did you mean AlpacaStyleInstructionHandler?"),
    "file": (("--data-path", "m/config.yml"), "config.yml"),
    "recipe": (("nothere.yaml",), "shipped are from_megatron.yaml, full_zero2.yaml"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_anything_is_made(
    name: str, here: Path, said: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finebridge.finetune.launch.run_ranks", lambda *_: pytest.fail("started"))
    (here / "m" / "config.yml").write_text("a: 1")
    words, message = REFUSED[name]
    words = (*FLAGS, *words) if words[0].startswith("-") else (*words, *FLAGS)
    assert message in said(*words, code=2)[0]
    assert not (here / "out" / "checkpoint-2").exists()
    assert not list(here.glob("m/megatron*"))


def test_other_verbs_refuse_the_flags_of_run(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sft", *FLAGS, "--export_hf", "false"]) == 2
    assert "--export_hf is for finebridge run; finebridge sft is the training alone" in capsys.readouterr().err
    assert not (here / "out").exists()


def test_raw_files_of_every_kind(here: Path, said: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Acceptance check 16: told apart by content and extension, a folder too; what is prepared is used as it is."""
    monkeypatch.setattr("finebridge.finetune.launch.run_ranks", lambda *_: 0)
    table = pa.Table.from_pylist(alpaca())
    pyarrow.csv.write_csv(table, here / "x.csv")
    pyarrow.feather.write_feather(table, here / "x.arrow", compression="uncompressed")
    (here / "x.json").write_text(json.dumps(alpaca()))
    (here / "folder").mkdir()
    (here / "folder" / "x.jsonl").write_text("".join(json.dumps(row) + "\n" for row in alpaca()))
    words = (*FLAGS, "--save_strategy", "no", "--handler-name", "AlpacaStyleInstructionHandler")
    keys: set[str] = set()
    for name in ("x.parquet", "x.csv", "x.arrow", "x.json", "folder", "folder/x.jsonl"):
        lines = said(*words, "--data-path", name)
        assert any(line.startswith("data: 24 rows -> 24 samples") for line in lines), name
        keys |= {line.rpartition("/")[2] for line in lines if line.startswith("plan: data")}
    prepared = Path("out") / "prepared_data" / min(keys)
    lines = said(*FLAGS, "--save_strategy", "no", "--data-path", prepared)
    assert f"plan: data    reuse  {prepared}, prepared already" in lines
    (here / "t.txt").write_text("one and one is two\n" * 30)
    text = (
        "--stage",
        "pretrain",
        "--data-path",
        "t.txt",
        "--model_name_or_path",
        "m",
        "--max_steps",
        "1",
        "--save_strategy",
        "no",
    )
    assert any(
        line.startswith("data: 30 rows -> 30 samples")
        for line in said(*text, "--append-eod", "--output_prefix", "tok/t")
    )
    lines = said(*text, "--data-path", "tok/t_text_document")
    assert "plan: data    reuse  tok/t_text_document.bin, tokens already" in lines


@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.glob("*.yaml")))
def test_every_shipped_recipe_is_planned(name: str, here: Path, said: Run, models: Models) -> None:
    assert find_recipe(Path(name)) == SHIPPED / name
    model: Path = here / "m"
    if name == "from_megatron.yaml":
        model = here / "mcore"
        assert main(["convert", "--to", "mcore", "--load", "m", "--save", str(model)]) == 0
    elif name == "moe_lora.yaml":
        model = models("qwen3_moe")
    (here / "t.jsonl").write_text('{"text": "one and one is two"}\n' * 9)
    data = "t.jsonl" if name == "pretrain.yaml" else "d.jsonl"
    told = plan_of(said(name, f"model_name_or_path={model}", f"train_data_file={data}", "output_dir=out", "--dry_run"))
    assert {"data", "train", "model"} <= set(told)
    assert ("export" in told) == ("weights" in told) == (name == "from_megatron.yaml")


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(path.name for path in SHIPPED.glob("*.yaml")))
def test_every_shipped_recipe_trains(name: str, here: Path, said: Run, models: Models) -> None:
    """With real ranks, all of its own settings but the lengths of rows and run."""
    model: Path = {"moe_lora.yaml": models("qwen3_moe"), "hunyuan_think.yaml": models("hunyuan_v1_dense")}.get(
        name, here / "m"
    )
    if name == "from_megatron.yaml":
        model = here / "mcore"
        assert main(["convert", "--to", "mcore", "--load", "m", "--save", str(model)]) == 0
    (here / "t.jsonl").write_text('{"text": "one and one is two"}\n' * 60)
    data = "t.jsonl" if name == "pretrain.yaml" else "d.jsonl"
    short = ("max_steps=2", "max_seq_length=128", "report_to=none", "disable_tqdm=true")
    told = said(name, f"model_name_or_path={model}", f"train_data_file={data}", "output_dir=out", *short)
    assert set(plan_of(told).values()) == {"make"}
    before = load_weights(model if model != here / "mcore" else here / "m")
    after = load_weights(here / "out" / "hf-2")
    assert any((before[key].float() != after[key].float()).any() for key in before)
    assert (here / "out" / "mcore-2").is_dir() == (name == "from_megatron.yaml")


def test_a_checkpoint_is_shared_not_copied(here: Path, said: Run, quick_ranks: list[dict[str, str]]) -> None:
    """The model alone costs no room, and stays when the checkpoint goes."""
    said(*FLAGS)
    weights = here / "out" / "hf-2" / "model.safetensors"
    assert weights.samefile(here / "out" / "checkpoint-2" / "model.safetensors")
    assert not (here / "out" / "hf-2" / "optimizer.pt").exists()
    shutil.rmtree(here / "out" / "checkpoint-2")
    assert verify(here / "out" / "hf-2")
    assert quick_ranks


def test_where_files_cannot_be_shared_they_are_copied(
    here: Path, monkeypatch: pytest.MonkeyPatch, models: Models
) -> None:
    def no_links(*_: Any) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    with publish(here / "c", kind="checkpoint", made_from={}) as folder:
        shutil.copytree(models("qwen3"), folder, dirs_exist_ok=True)
    lines: list[str] = []
    export.leave_model(here / "c", None, here / "o", None, lines.append)
    assert lines == [f"model: wrote {here / 'o'}, which is a copy of the model in {here / 'c'}"]
    assert verify(here / "o")["files"]["model.safetensors"] == verify(here / "c")["files"]["model.safetensors"]


@pytest.mark.slow
def test_a_run_that_is_killed_goes_on(here: Path, said: Run) -> None:
    """SIGKILL of launcher and ranks after the first checkpoint: the rest is trained, and the bits are those of one run."""
    words = (
        *FLAGS, "--max_steps", "6", "--save_steps", "2", "--learning_rate", "1e-2", "--per_device_train_batch_size", "2",
        "--report_to", "none", "--disable_tqdm", "true",
    )  # fmt: skip
    process = launch(here, *words)
    until = time.monotonic() + 300
    while not (here / "out" / "checkpoint-2" / "manifest.json").exists() and time.monotonic() < until:
        time.sleep(0.005)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
    assert not (here / "out" / "checkpoint-6").exists(), "killed too late to prove anything"
    lines = said(*words)
    assert any("from the newest checkpoint on" in line for line in lines)
    straight = said(*words, "--output_dir", "straight")
    assert plan_of(straight)["train"] == "make"
    one, other = load_weights(here / "out" / "hf-6"), load_weights(here / "straight" / "hf-6")
    assert all((one[name] == other[name]).all() for name in other)


def test_a_run_that_ended_without_a_word_ends_at_once(here: Path, said: Run) -> None:
    """Killed between the last checkpoint and the note of it, within an epoch: no step more is trained."""
    words = (*FLAGS, "--max_steps", "4", "--save_steps", "3", "--report_to", "none", "--disable_tqdm", "true")
    said(*words)
    before = load_weights(here / "out" / "hf-4")
    ledger = here / "out" / "stages.json"
    entries = json.loads(ledger.read_text())
    entries["train"]["artifact"] = None
    ledger.write_text(json.dumps(entries))
    (here / "out" / "trainer_state.json").unlink()
    assert plan_of(said(*words))["train"] == "make"
    assert plan_of(said(*words)) == dict.fromkeys(("data", "train", "model"), "reuse")
    assert sorted(path.name for path in (here / "out").glob("[ch]*-*")) == ["checkpoint-3", "checkpoint-4", "hf-4"]
    after = load_weights(here / "out" / "hf-4")
    assert all((before[name] == after[name]).all() for name in before)


@pytest.mark.slow
def test_eight_launchers_at_once_train_once(here: Path) -> None:
    words = (*MINDSPEED, "--per_device_train_batch_size", "8")
    every = [launch(here, *words) for _ in range(8)]
    told = [process.communicate(timeout=900)[0] for process in every]
    assert [process.returncode for process in every] == [0] * 8, told
    for line, count in (("wrote m/megatron_cache", 1), ("; prepared out/prepared_data", 1), ("model: wrote", 1)):
        assert sum(text.count(line) for text in told) == count, line
    assert sum("train: reused out/checkpoint-2" in text for text in told) == 7
