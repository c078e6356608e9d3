"""Training and evaluation data as a run opens them: each prepared from what is on disk, one chat template for both."""

from pathlib import Path
from typing import Any

import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.preprocess import prepare
from finebridge.data_tools.tokenizer_files import TokenizerSource, load_tokenizer
from finebridge.train.arguments import parse
from finebridge.train.assemble import _datasets  # pyright: ignore[reportPrivateUsage]
from finebridge.train.hf_flags import ArgumentsError

EXAMPLE = Path(__file__).resolve().parents[2] / "finetune" / "example_data"
ROWS = EXAMPLE / "train_lora.jsonl"


def opened(tmp_path: Path, train: Path, *more: object) -> tuple[Any, Any, Any]:
    """The tokenizer and both data sets of a run with these flags."""
    words = ["--config_name", "qwen3", "--tokenizer_name_or_path", EXAMPLE, "--train_data_file", train]
    words += ["--output_dir", tmp_path / "out", "--prepared_data_dir", tmp_path / "cache", *more]
    tokenizer = load_tokenizer(str(EXAMPLE))
    return (tokenizer, *_datasets(parse([str(word) for word in words]), tokenizer, tmp_path / "out"))


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """The rows prepared with another template than the tokenizer's own."""
    template = (EXAMPLE / "chat_template.jinja").read_text(encoding="utf-8")
    (tmp_path / "other.jinja").write_text("{#- another -#}\n" + template, encoding="utf-8")
    args = DataArguments(chat_template=str(tmp_path / "other.jinja"))
    return prepare([str(ROWS)], TokenizerSource(str(EXAMPLE)), args, tmp_path / "elsewhere")


def test_the_template_of_the_training_data_is_saved(tmp_path: Path, other: Path) -> None:
    own = load_tokenizer(str(EXAMPLE)).chat_template
    assert opened(tmp_path, ROWS)[0].chat_template == own
    assert opened(tmp_path, other)[0].chat_template.startswith("{#- another -#}")


def test_evaluation_data_of_another_template_is_refused(tmp_path: Path, other: Path) -> None:
    eval_flags = ("--eval_data_file", ROWS, "--eval_strategy", "steps")
    with pytest.raises(ArgumentsError, match="another chat template than the training data"):
        opened(tmp_path, other, *eval_flags)
    _, train, evaluation = opened(tmp_path, ROWS, *eval_flags)
    assert train.key == evaluation.key  # the refused run left nothing under a wrong name


def test_names_and_kinds_are_checked_before_torch(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="AlpacaStyleInstructionHandler"):
        opened(tmp_path, ROWS, "--handler_name", "AlpacaStyleInstructionHandlr")
    with pytest.raises(ValueError, match="did you mean qwen3"):
        opened(tmp_path, ROWS, "--chat_template", "qwen33")
    (tmp_path / "text.jsonl").write_text('{"text": "t"}\n')
    with pytest.raises(ValueError, match="plain text for pretraining"):
        parse(["--config_name", "qwen3", "--tokenizer_name_or_path", str(EXAMPLE), "--output_dir", str(tmp_path / "o"),
               "--train_data_file", str(tmp_path / "text.jsonl")])  # fmt: skip


def test_a_truth_value_of_a_recipe_is_a_choice_of_words(tmp_path: Path) -> None:
    recipe = tmp_path / "r.yaml"
    recipe.write_text(
        f"config_name: qwen3\ntokenizer_name_or_path: {EXAMPLE}\noutput_dir: {tmp_path / 'o'}\n"
        f"train_data_file: {ROWS}\nenable_thinking: false\n"
    )
    from finebridge.finetune.recipe import read_recipe, to_argv

    assert parse(to_argv(read_recipe(recipe))).data.enable_thinking == "false"
