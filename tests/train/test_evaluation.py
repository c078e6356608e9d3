"""Evaluation counts every token of every sample once: the same on any number of ranks, padded or packed."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.data_tools.collator import PaddingCollator
from finebridge.data_tools.dataset import PreparedDataset
from rank_runner import RankRunner

Models = Callable[[str], Path]


def evaluate(
    ranks: RankRunner, model: Path, data: Path, out: Path, world: int = 1, **more: Any
) -> list[dict[str, Any]]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "eval_data_file": data, "output_dir": out, "max_steps": 1,
        "per_device_train_batch_size": 2, "disable_tqdm": "true", "eval_strategy": "steps", "eval_steps": 1,
        "learning_rate": 1e-12, "save_strategy": "no",
    } | more  # fmt: skip
    argv = [word for name, value in values.items() for word in (f"--{name}", value)]
    ranks.run(argv, out / "log", ranks=world).check()
    history = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [entry for entry in history if "eval_loss" in entry]


def test_loss_and_accuracy_are_those_of_the_tokens(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    from transformers import AutoModelForCausalLM

    base = models("hunyuan_v1_dense")
    runs = [
        evaluate(ranks, base, train_file, tmp_path / "one", per_device_eval_batch_size=5),
        evaluate(ranks, base, train_file, tmp_path / "two", 2, per_device_eval_batch_size=7),
        evaluate(ranks, base, train_file, tmp_path / "packed", 2, packing="true", max_seq_length=128),
    ]
    (folder,) = (path for path in (tmp_path / "one" / "prepared_data").iterdir() if path.is_dir())
    data = PreparedDataset(folder, 2048)
    batch = PaddingCollator(0)([data[i] for i in range(len(data))])
    labels = batch.pop("labels")[:, 1:]
    with torch.no_grad():
        logits = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)(**batch).logits[:, :-1]
    taken = labels != -100
    loss = float(torch.nn.functional.cross_entropy(logits[taken], labels[taken]))
    accuracy = float((logits[taken].argmax(-1) == labels[taken]).double().mean())
    for (entry,) in runs:
        assert entry["eval_tokens"] == int(taken.sum())
        assert entry["eval_loss"] == pytest.approx(loss, rel=1e-6)
        assert entry["eval_accuracy"] == pytest.approx(accuracy, abs=1e-12)


def test_early_stopping_saves_where_it_stops(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    more = {"max_steps": 12, "early_stopping_patience": 2, "save_strategy": "steps", "save_steps": 100}
    entries = evaluate(ranks, models("hunyuan_v1_dense"), train_file, tmp_path, early_stopping_threshold=0.1, **more)
    assert [entry["step"] for entry in entries] == [1, 2, 3]
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
