"""The command line: every flag of the Hunyuan scripts is accepted, wrong ones are told before torch is imported."""

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.schema import DataError
from finebridge.ds_configs.resolve import DeepSpeedConfigError
from finebridge.train.arguments import build, parse, read_flags
from finebridge.train.hf_flags import ArgumentsError, hf_flags
from finebridge.train.model_arguments import ModelArguments
from finebridge.train.schedule import schedule

FROZEN = Path(__file__).parents[1] / "house" / "flags.json"


@pytest.fixture
def base(tmp_path: Path, train_file: Path) -> list[str]:
    (tmp_path / "config.json").write_text("{}")
    return ["--model_name_or_path", str(tmp_path), "--train_data_file", str(train_file)]


def test_flags_and_defaults_are_frozen() -> None:
    """A flag that vanishes or changes its default breaks users' scripts: change tests/house/flags.json on purpose."""
    now = {
        field.name: {"type": str(field.type).removeprefix("<class '").removesuffix("'>"), "default": field.default}
        for owner in (ModelArguments, DataArguments)
        for field in fields(owner)
    }
    assert now == json.loads(FROZEN.read_text())


SEED_FLAGS = [
    "--do_train",
    "--model_size",
    "7B",
    "--deepspeed",
    "ds_zero3_offload_no_auto.json",
    "--overwrite_output_dir",
    "--per_device_train_batch_size",
    "1",
    "--gradient_accumulation_steps",
    "1",
    "--gradient_checkpointing",
    "--lr_scheduler_type",
    "cosine_with_min_lr",
    "--logging_steps",
    "1",
    "--max_steps",
    "200",
    "--save_steps",
    "100",
    "--learning_rate",
    "1e-5",
    "--min_lr",
    "1e-6",
    "--warmup_ratio",
    "0.01",
    "--save_strategy",
    "steps",
    "--save_safetensors",
    "True",
    "--model_max_length",
    "4096",
    "--max_seq_length",
    "4096",
    "--bf16",
    "--use_lora",
    "--lora_rank",
    "64",
    "--lora_alpha",
    "128",
    "--lora_dropout",
    "0.1",
]


def test_the_flag_list_of_the_scripts(base: list[str]) -> None:
    args = parse([*base, *SEED_FLAGS])
    assert (args.model.lora_rank, args.model.lora_alpha, args.model.min_lr, args.data.max_seq_length) == (
        64,
        128,
        1e-6,
        4096,
    )
    assert args.hf["learning_rate"] == 1e-5
    assert args.hf["warmup_steps"] == 0.01
    assert args.hf["bf16"] is True
    assert args.hf["activation_checkpointing"] is True
    told = " ".join(args.warnings)
    for name in ("overwrite_output_dir", "save_safetensors", "warmup_ratio", "gradient_checkpointing"):
        assert told.count(f"--{name} ") == 1


ARCHITECTURE_FLAGS = [
    "--hidden_size",
    "32",
    "--num_layers",
    "2",
    "--num_attention_heads",
    "4",
    "--intermediate_size",
    "64",
    "--max_position_embeddings",
    "64",
    "--vocab_size",
    "400",
    "--type_vocab_size",
    "1",
    "--layer_norm_eps",
    "1e-5",
    "--moe_topk",
    "2",
    "--num_experts",
    "4",
    "--num_key_value_heads",
    "2",
    "--use_cla",
    "False",
    "--cla_share_factor",
    "2",
    "--use_mixed_mlp_moe",
    "False",
    "--num_shared_expert",
    "1",
    "--use_qk_norm",
    "False",
    "--tie_word_embeddings",
    "True",
    "--make_moe_param_leaf_module",
    "--train_attention_params_only",
    "--use_flash_attn",
    "False",
    "--complex_data",
    "x",
    "--cache_dir",
    "/tmp",
    "--optim",
    "adamw_torch",
    "--tokenizer_name_or_path",
    "/tmp",
    "--average_tokens_across_devices",
    "False",
    "--evaluation_strategy",
    "no",
    "--group_by_length",
    "--logging_dir",
    "/tmp/x",
]


def test_every_other_flag_of_the_scripts(base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)
    args = parse([*base, *ARCHITECTURE_FLAGS])
    assert args.hf["train_sampling_strategy"] == "group_by_length"
    assert args.hf["eval_strategy"] == "no"
    assert any("average_tokens_across_devices has no effect" in text for text in args.warnings)
    assert any("has its own config" in text and "--hidden_size" in text for text in args.warnings)
    assert any("no effect without ZeRO-3" in text for text in args.warnings)
    monkeypatch.delenv("TENSORBOARD_LOGGING_DIR", raising=False)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--lerning_rate 1", "unknown flag --lerning_rate; did you mean --learning_rate?"),
        ("--learning_rate fast", "--learning_rate fast: a value of type float"),
        ("--lora_rank many --use_lora", "--lora_rank many: a number"),
        ("--bf16 maybe", "--bf16 maybe"),
        ("--think_mode slwo", "choose one of keep, fast, slow, mixed; did you mean slow?"),
        ("--min_lr 0.01 --learning_rate 1e-5 --lr_scheduler_type cosine", "must lie below --learning_rate 1e-05"),
        ("--min_lr 1e-6 --learning_rate 1e-5 --lr_scheduler_type constant", "constant never falls"),
        ("--bf16 --fp16", "exclude each other"),
        ("--config_name hunyuan_v1_dense", "exclude each other"),
        ("--lora_dropout 1.5", "--lora_dropout in"),
        ("--resume_from_checkpoint /no/where", "no such folder"),
        ("--lora_rank", "--lora_rank needs a value"),
        ("stray", "a flag"),
    ],
)
def test_wrong_flags_are_told(base: list[str], words: str, message: str) -> None:
    with pytest.raises(ArgumentsError, match=re.escape(message)):
        parse([*words.split(), *base] if words == "stray" else [*base, *words.split()])


@pytest.mark.parametrize(
    ("words", "error", "message"),
    [
        ("--train_data_file x.jsonl", ArgumentsError, "--model_name_or_path is missing"),
        ("--model_name_or_path ./nowhere --train_data_file x.jsonl", ArgumentsError, "no such folder"),
        ("--model_name_or_path MODEL", ArgumentsError, "--train_data_file is missing"),
        ("--model_name_or_path MODEL --train_data_file gone.jsonl", DataError, "no such data file"),
        ("--model_name_or_path MODEL --use_dummy_data --deepspeed ds_zero4", DeepSpeedConfigError, "no such file"),
        ("--model_name_or_path MODEL --use_dummy_data --max_seq_length 1", DataError, "at least 2"),
        ("--config_name qwen3 --use_dummy_data", ArgumentsError, "needs --tokenizer_name_or_path"),
    ],
)
def test_missing_inputs_are_told(words: str, error: type[Exception], message: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(error, match=re.escape(message)):
        parse(words.replace("MODEL", str(tmp_path)).split())


def test_forms_of_a_flag() -> None:
    assert read_flags(["--a", "1", "--b-c=2", "--d", "--e=-1", "--f", "-2"]) == {
        "a": "1", "b_c": "2", "d": True, "e": "-1", "f": "-2",
    }  # fmt: skip


def test_values_of_a_recipe_have_their_types(base: list[str]) -> None:
    values = {
        **read_flags(base),
        "learning_rate": "1e-4",
        "max_steps": 7,
        "bf16": True,
        "lora_alpha": 16,
        "report_to": "none",
    }
    args = build(values)
    assert (args.hf["learning_rate"], args.hf["max_steps"], args.hf["bf16"], args.model.lora_alpha) == (
        1e-4,
        7,
        True,
        16.0,
    )


def test_resume_without_a_model_takes_the_checkpoint(train_file: Path, tmp_path: Path) -> None:
    """As the Hunyuan README says: give --resume_from_checkpoint and leave --model_name_or_path out."""
    (tmp_path / "config.json").write_text("{}")
    args = parse(["--train_data_file", str(train_file), "--resume_from_checkpoint", str(tmp_path)])
    assert args.model.model_name_or_path == str(tmp_path)


def test_hf_flags_are_those_of_the_class() -> None:
    from transformers import TrainingArguments

    assert {field.name for field in fields(TrainingArguments) if field.init} <= set(hf_flags()) | {"_n_gpu"}
    assert hf_flags()["learning_rate"].default == "5e-05"


@pytest.mark.parametrize(
    ("name", "min_lr", "expected"),
    [
        ("cosine_with_min_lr", 1e-6, ("cosine_with_min_lr", {"min_lr": 1e-6})),
        ("cosine", 1e-6, ("cosine_with_min_lr", {"min_lr": 1e-6})),
        ("cosine", 0.0, ("cosine", {})),
        ("linear", 1e-6, ("polynomial", {"lr_end": 1e-6, "power": 1.0})),
        ("constant", 0.0, ("constant", {})),
    ],
)
def test_schedule(name: str, min_lr: float, expected: tuple[str, dict[str, Any]]) -> None:
    assert schedule(name, min_lr, 1e-5) == expected


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--eval_strategy steps", "--eval_strategy steps needs --eval_data_file"),
        ("--report_to wandb", "--report_to wandb: not installed"),
        ("--save_on_each_node", "must be one folder that all ranks share"),
        ('--min_lr 1e-6 --lr_scheduler_type cosine --lr_scheduler_kwargs {"min_lr":1e-7}', "both set a floor"),
        ("--preprocessing_num_workers 0", "at least 1"),
    ],
)
def test_what_transformers_would_say_late_is_said_at_once(base: list[str], words: str, message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        parse([*base, *words.split()])


def test_settings_that_fix_what_a_flag_says_otherwise(base: list[str], tmp_path: Path) -> None:
    (tmp_path / "ds.json").write_text(
        json.dumps({"train_micro_batch_size_per_gpu": 1, "optimizer": {"params": {"lr": 3e-4}}})
    )
    words = ["--deepspeed", str(tmp_path / "ds.json"), "--learning_rate", "3e-4"]
    with pytest.raises(DeepSpeedConfigError, match=r"per_gpu is 1 but --per_device_train_batch_size is 2"):
        parse([*base, *words, "--per_device_train_batch_size", "2"])
    assert parse([*base, *words, "--per_device_train_batch_size", "1"])


def test_more_forms_of_flags(base: list[str]) -> None:
    args = parse([*base, "--report_to", "clearml", "comet_ml", "--no_tie_word_embeddings", "--group_by_length", "no"])
    assert args.hf["report_to"] == ["clearml", "comet_ml"]
    assert args.model.tie_word_embeddings is False
    assert "train_sampling_strategy" not in args.hf
    assert any("never evaluated" in text for text in parse([*base, "--eval_data_file", base[3]]).warnings)


def test_an_output_folder_is_named_when_its_checkpoint_is_meant(train_file: Path, tmp_path: Path) -> None:
    (tmp_path / "checkpoint-20").mkdir()
    with pytest.raises(ArgumentsError, match=r"no config\.json there; did you mean .*checkpoint-20\?"):
        parse(["--model_name_or_path", str(tmp_path), "--train_data_file", str(train_file)])
