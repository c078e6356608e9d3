"""Pretraining by the real entry: from raw text, prepared data and Megatron's files, on one and two ranks."""

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.indexed import IndexedReader, IndexedWriter
from finebridge.data_tools.preprocess import prepare
from finebridge.data_tools.tokenizer_files import TokenizerSource
from finebridge.finetune.cli import main
from finebridge.train.arguments import parse
from rank_runner import RankRunner
from safetensors.torch import load_file

Models = Callable[[str], Path]
History = Callable[[Path], list[dict[str, Any]]]


def text_file(path: Path, count: int = 40, seed: int = 0) -> Path:
    """Short texts of few words: a tiny model learns their letters in some steps."""
    chance = random.Random(seed)
    rows = [{"text": "the answer is " * chance.randint(1, 6)} for _ in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def flags(model: Path, data: Path, out: Path, **more: Any) -> list[object]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "max_steps": 4, "logging_steps": 1,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2, "disable_tqdm": "true",
        "max_seq_length": 32, "report_to": "none",
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def new_flags(data: Path, out: Path, **more: Any) -> list[object]:
    """The same for a new model, which ``more`` describes."""
    return flags(out, data, out, **more)[2:]


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return text_file(tmp_path_factory.mktemp("text") / "text.jsonl")


@pytest.fixture(scope="module")
def tokens(text: Path, models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The prefix of a uint16 pair with the documents of ``text``, as Megatron-LM writes it for a small vocabulary."""
    folder = tmp_path_factory.mktemp("tokens")
    source = TokenizerSource(str(models("hunyuan_v1_dense")))
    reader = IndexedReader(prepare([str(text)], source, DataArguments(), folder) / "text_document")
    with IndexedWriter(folder / "corpus_text_document", np.uint16) as writer:
        writer.add_many(np.array(reader.tokens), reader.lengths)
    return folder / "corpus_text_document"


def logged(out: Path) -> list[dict[str, Any]]:
    return json.loads((out / "trainer_state.json").read_text(encoding="utf-8"))["log_history"]


def losses(history: History, out: Path) -> list[float]:
    return [entry["loss"] for entry in history(out)]


def test_raw_text_token_files_and_ranks_train_alike(
    ranks: RankRunner, models: Models, text: Path, tokens: Path, tmp_path: Path, history: History
) -> None:
    """Text and its tokens are the same rows in the same order, and so are one rank and two with the same global batch."""
    base = models("hunyuan_v1_dense")
    runs: dict[str, tuple[int, Any, dict[str, Any]]] = {
        "raw": (1, text, {"gradient_accumulation_steps": 2}),
        "two": (2, f"{tokens}.idx", {}),
        "across": (1, tokens, {"gradient_accumulation_steps": 2, "cross_document_attention": "true"}),
    }
    seen: dict[str, list[float]] = {}
    for name, (world, data, more) in runs.items():
        argv = flags(base, data, tmp_path / name, **more)
        done = ranks.run(argv, tmp_path / name / "log", ranks=world, entry="finebridge.train.pretrain:main").check()
        assert "40 documents" in done.text
        seen[name] = losses(history, tmp_path / name)
        assert seen[name][-1] < seen[name][0] - 0.3
    assert seen["two"] == pytest.approx(seen["raw"], rel=1e-5)
    assert seen["across"] != pytest.approx(seen["raw"], rel=1e-3)
    one, two = (load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in ("raw", "two"))
    assert all(one[name].allclose(two[name], atol=1e-4) for name in one)


def test_a_new_model_learns_lines_of_text_under_zero3(
    ranks: RankRunner, models: Models, tmp_path: Path, history: History
) -> None:
    """From a .txt on two ranks, with held-out text; then from the middle on, which is the straight run again."""
    train, held_out = tmp_path / "train.txt", tmp_path / "held_out.txt"
    for file, words in ((train, range(1, 61)), (held_out, range(3, 6))):
        file.write_text("".join("an answer " * (1 + number % 5) + "\n" for number in words))
    settings = tmp_path / "zero3.json"
    shipped = Path(__file__).parents[2] / "ds_configs" / "ds_zero3_no_offload.json"
    loaded = json.loads(shipped.read_text())
    loaded["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    settings.write_text(json.dumps(loaded))
    base = models("hunyuan_v1_dense")
    more: dict[str, Any] = {
        "config_name": base / "config.json", "tokenizer_name_or_path": base, "append_eod": "true", "think_mode": "fast",
        "eval_data_file": held_out, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "deepspeed": settings,
    }  # fmt: skip
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    done = ranks.run(
        new_flags(train, straight, **more), straight / "log", ranks=2, entry="finebridge.train.pretrain:main"
    ).check()
    assert "warning: --think_mode: no effect on pretraining text" in done.text
    assert "end-of-text" not in done.text
    assert losses(history, straight)[-1] < losses(history, straight)[0] - 0.3
    evaluated = [entry["eval_loss"] for entry in logged(straight) if "eval_loss" in entry]
    assert evaluated[1] < evaluated[0]
    resumed.mkdir()
    (straight / "checkpoint-2").rename(resumed / "checkpoint-2")
    argv = [*new_flags(train, resumed, **more), "--resume_from_checkpoint", "true"]
    ranks.run(argv, resumed / "log", ranks=2, entry="finebridge.train.pretrain:main").check()
    assert losses(history, resumed)[-2:] == losses(history, straight)[-2:]
    one, two = (load_file(folder / "checkpoint-4" / "model.safetensors") for folder in (straight, resumed))
    assert all(one[name].equal(two[name]) for name in one)


def test_a_model_that_mixes_documents_is_refused_unless_that_is_asked_for(
    ranks: RankRunner, models: Models, text: Path, tmp_path: Path
) -> None:
    more = {"config_name": "mamba", "tokenizer_name_or_path": models("hunyuan_v1_dense"), "hidden_size": 16,
            "num_layers": 1, "max_steps": 1}  # fmt: skip
    done = ranks.run(new_flags(text, tmp_path / "a", **more), tmp_path / "log", entry="finebridge.train.pretrain:main")
    assert done.codes == [2]
    assert "give --cross_document_attention true" in done.text
    argv = [*new_flags(text, tmp_path / "a", **more), "--cross_document_attention"]
    assert "done: 1 steps" in ranks.run(argv, tmp_path / "log", entry="finebridge.train.pretrain:main").check().text


def test_another_tokenizers_ids_are_refused_before_the_first_step(
    ranks: RankRunner, models: Models, tmp_path: Path
) -> None:
    with IndexedWriter(tmp_path / "other", np.uint16) as writer:
        writer.add(np.arange(200))
        writer.add(np.arange(300, 400))
    argv = flags(models("hunyuan_v1_dense"), tmp_path / "other.bin", tmp_path / "out")
    done = ranks.run(argv, tmp_path / "log", entry="finebridge.train.pretrain:main")
    assert done.codes == [2]
    assert "other.bin: sequence 1 holds id 3" in done.text
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_what_is_for_the_other_entry_is_told_before_any_rank(
    text: Path, tokens: Path, train_file: Path, models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refused(verb: str, data: object, *more: str) -> str:
        words = [verb, *map(str, flags(models("hunyuan_v1_dense"), Path(str(data)), tmp_path / "out")), *more]
        assert main(words) == 2
        return capsys.readouterr().err

    assert "these rows are conversations" in refused("pretrain", train_file)
    assert "finebridge sft trains on them" in refused("pretrain", train_file)
    assert "finebridge pretrain trains on them" in refused("sft", text)
    assert "plain text for finebridge pretrain; files of chats" in refused("sft", tokens)
    assert "--append_eod is for raw text" in refused("pretrain", tokens, "--append_eod")
    assert f"{tokens.parent}/none.idx: no such file" in refused("pretrain", tokens.parent / "none.bin")
    assert "cannot be mixed yet" in refused("pretrain", f"0.5 {tokens} 0.5 {tokens}")


def test_flags_without_effect_are_warned_of(text: Path, train_file: Path, models: Models) -> None:
    idle = ("--packing", "--over_long", "error", "--chat_template", "qwen3")
    words = [str(word) for word in flags(models("hunyuan_v1_dense"), text, Path("out"))]
    args = parse([*words, *idle], "document")
    assert args.warnings == [
        "--chat_template, --over_long, --packing: no effect on pretraining text, which is cut into full rows"
    ]
    assert args.shares_rows
    assert not parse([*words, "--cross_document_attention"], "document").shares_rows
    dummy = [*words[:2], "--use_dummy_data"]
    assert not parse(dummy, "document").shares_rows
    words = [str(word) for word in flags(models("hunyuan_v1_dense"), train_file, Path("out"))]
    args = parse([*words, "--cross_document_attention", "--append_eod"])
    assert args.warnings == [
        "--append_eod, --cross_document_attention: no effect on conversations; they are for pretraining text"
    ]
    assert not args.shares_rows
