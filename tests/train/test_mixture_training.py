"""The real trainer on a mixture of sources: what each epoch trains on, packed and not, and how a run resumes."""

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import load_weights
from finebridge.finetune.cli import main
from finebridge.train.record import read_record
from rank_runner import RankRunner

Models = Callable[[str], Path]
History = Callable[[Path], list[dict[str, Any]]]


@pytest.fixture
def mixture(tmp_path: Path) -> Path:
    """8 samples an epoch: 4 of 12 sums, 4 of 2 greetings."""
    for name, count in (("sums", 12), ("greetings", 2)):
        turns = [("user", f"{name} {{}}="), ("assistant", "{}" * 3)]
        rows = [
            {"messages": [{"role": role, "content": text.replace("{}", str(number))} for role, text in turns]}
            for number in range(count)
        ]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = tmp_path / "mix.yaml"
    file.write_text(
        "reshuffle: true\nsources:\n  sums: {path: sums.jsonl, ratio: 1/3}\n  greetings: {path: greetings.jsonl, ratio: 2}\n"
    )
    return file


def flags(model: Path, data: Path, out: Path, **more: Any) -> list[object]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "num_train_epochs": 3, "logging_steps": 1,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2, "disable_tqdm": "true",
        "report_to": "none", "prepared_data_dir": data.parent / "cache", "max_seq_length": 64,
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


@pytest.mark.slow
def test_the_plan_has_every_source_and_the_index(
    models: Models, mixture: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = flags(models("qwen3"), mixture, tmp_path / "out", max_steps=2)
    assert main(["run", *map(str, argv), "--dry_run"]) == 0
    plan = [line.split() for line in capfd.readouterr().out.splitlines() if line.startswith("plan: data")]
    assert [row[2] for row in plan] == ["make"] * 3
    assert not list((tmp_path / "cache").glob("*/text_document.bin"))


@pytest.mark.slow
def test_two_steps_on_a_mixture_through_the_command(
    models: Models, mixture: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    argv = flags(models("qwen3"), mixture, tmp_path / "out", max_steps=2, packing="true", per_device_train_batch_size=1)
    words = [str(word) for word in argv]
    assert main(["run", *words]) == 0
    log = capfd.readouterr().out
    assert "mixture: sums: 4 of 12 samples" in log
    trained, before = load_weights(tmp_path / "out" / "checkpoint-2"), load_weights(models("qwen3"))
    assert any((trained[name] != tensor).any() for name, tensor in before.items())
    record = read_record(tmp_path / "out")
    assert record[-1]["data"]["training"]["used"] == 8
    assert main(["run", *words]) == 0
    assert "train: reused" in capfd.readouterr().out
    mixture.write_text(mixture.read_text().replace("1/3", "0.5"))
    assert main(["run", *words, "--dry_run", "--overwrite_output_dir", "true"]) == 0
    plan = [line.split() for line in capfd.readouterr().out.splitlines() if line.startswith("plan: ")]
    assert [row[2] for row in plan if row[1] == "data"] == ["reuse", "reuse", "make"]
    assert [row[2] for row in plan if row[1] == "train"] == ["make"]


@pytest.mark.parametrize("packing", [pytest.param("false", marks=pytest.mark.slow), "true"])
def test_a_resumed_run_ends_with_the_same_weights(
    ranks: RankRunner, models: Models, mixture: Path, tmp_path: Path, history: History, packing: str
) -> None:
    more: dict[str, Any] = {"packing": packing, "save_steps": 1, "per_device_train_batch_size": 1}
    more["gradient_accumulation_steps"] = 1 if packing == "true" else 3
    whole = flags(models("qwen3"), mixture, tmp_path / "whole", **more)
    ranks.run(whole, tmp_path / "log1").check()
    steps = history(tmp_path / "whole")
    middle = len(steps) // 2
    assert middle % (len(steps) // 3)  # in the middle of an epoch
    rest = flags(models("qwen3"), mixture, tmp_path / "rest", **more)
    (tmp_path / "rest").mkdir()
    (tmp_path / "whole" / f"checkpoint-{middle}").rename(tmp_path / "rest" / f"checkpoint-{middle}")
    done = ranks.run([*rest, "--resume_from_checkpoint", tmp_path / "rest" / f"checkpoint-{middle}"], tmp_path / "log2")
    done.check()
    assert [entry["loss"] for entry in history(tmp_path / "rest")] == [entry["loss"] for entry in steps]
    end = f"checkpoint-{len(steps)}"
    one, two = load_weights(tmp_path / "whole" / end), load_weights(tmp_path / "rest" / end)
    assert all(one[name].equal(two[name]) for name in one)


def test_evaluation_data_is_not_filtered(ranks: RankRunner, models: Models, mixture: Path, tmp_path: Path) -> None:
    held_out = tmp_path / "eval.jsonl"
    question = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen"
    rows = [{"messages": [{"role": "user", "content": question}, {"role": "assistant", "content": "yes"}]}]
    held_out.write_text(json.dumps(rows[0]) + "\n")
    (tmp_path / "sums.jsonl").open("a").write(json.dumps(rows[0]) + "\n")
    argv = flags(
        models("qwen3"), mixture, tmp_path / "out", max_steps=1, eval_data_file=held_out, eval_strategy="steps",
        eval_steps=1, decontaminate=held_out, max_seq_length=128,
    )  # fmt: skip
    ranks.run(argv, tmp_path / "log").check()
    record = read_record(tmp_path / "out")[-1]["data"]
    assert Counter(record["training"]["rejects"]) == {"contaminated": 1}
    assert record["evaluation"]["rejects"] == {}
    assert record["evaluation"]["used"] == 1
