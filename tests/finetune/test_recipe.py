"""Recipes and overrides: later wins, unknown keys are refused where they stand, ranks get what the recipe says."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.finetune.arguments import take
from finebridge.finetune.recipe import RecipeError, gather, read_recipe, to_argv
from finebridge.train.arguments import Arguments, build, known_flags, read_flags
from hypothesis import given, settings
from hypothesis import strategies as st

Write = Callable[..., str]


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def to_file(text: str | bytes, name: str = "r.yaml") -> str:
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return str(path)

    return to_file


@pytest.fixture
def needed(tmp_path: Path) -> dict[str, Any]:
    """The least that a run needs: a model folder and a data file."""
    (tmp_path / "model").mkdir()
    (tmp_path / "data.jsonl").write_text('{"messages": []}\n')
    (tmp_path / "model" / "config.json").write_text("{}")
    return {"model_name_or_path": str(tmp_path / "model"), "train_data_file": str(tmp_path / "data.jsonl")}


def test_recipe_then_override_then_flag(write: Write) -> None:
    first = write("seed: 1\nmax_steps: 1\nlogging_steps: 1\nsave_steps: 1\nbf16: true\n")
    second = write("max_steps: 2\nlogging_steps: 2\nsave_steps: 2\n", "s.yml")
    values = gather([first, second, "logging_steps=3", "save_steps=3", "--save-steps", "4"])
    assert values == {"seed": 1, "max_steps": 2, "logging_steps": "3", "save_steps": "4", "bf16": True}


def test_a_later_recipe_wins_over_an_earlier_override(write: Write) -> None:
    assert gather(["seed=1", write("seed: 2")]) == {"seed": 2}


@pytest.mark.parametrize(
    ("recipe", "flags"),
    [
        ("activation_checkpointing: true", ["--gradient_checkpointing", "false"]),
        ("eval_strategy: steps", ["--evaluation_strategy", "no"]),
        ("gradient_checkpointing: true", ["--activation_checkpointing", "false"]),
    ],
)
def test_a_flag_wins_over_the_recipe_under_its_old_name_too(
    write: Write, needed: dict[str, Any], recipe: str, flags: list[str]
) -> None:
    alone = build(needed | read_flags(flags)).hf
    together = build(needed | gather([write(recipe), *flags])).hf
    assert together == alone


def test_values_keep_their_yaml_types_and_null_is_not_given(write: Write) -> None:
    path = write(
        "lora_target: [q_proj, v_proj]\nlr_scheduler_kwargs: {num_cycles: 2}\nmin_lr: 1.0e-6\nbf16: true\nseed:\n"
    )
    assert read_recipe(Path(path)) == {
        "lora_target": ["q_proj", "v_proj"],
        "lr_scheduler_kwargs": {"num_cycles": 2},
        "min_lr": 1e-6,
        "bf16": True,
    }


def test_an_override_may_hold_equals_signs_and_nothing() -> None:
    assert gather(["optim_args=a=1,b=2", "run_name="]) == {"optim_args": "a=1,b=2", "run_name": ""}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("seed: 1\n# a comment\nlearning_rte: 1e-5\n", r"r\.yaml:3: unknown key 'learning_rte'; did you mean learning_rate\?"),
        ("seed: 1\nlora:\n  rank: 8\n", r"r\.yaml:2: unknown key 'lora'; did you mean"),
        ("Seed: 1\n", r"r\.yaml:1: unknown key 'Seed'; did you mean seed\?"),
        ("1: 2\n", r"r\.yaml:1: unknown key '1'"),
        ("seed: [1\n", r"r\.yaml: not YAML: .*"),
        ("seed: 1\n---\nseed: 2\n", r"r\.yaml: not YAML: .*"),
        ("seed: !!python/object/apply:os.system ['touch x']\n", r"r\.yaml: not YAML: .*"),
        ("- seed\n", r"r\.yaml: a mapping of flag names"),
        ("seed\n", r"r\.yaml: a mapping of flag names"),
        ("", r"r\.yaml: a mapping of flag names"),
        (b"run_name: \xff\n", r"r\.yaml: .*"),
    ],
)  # fmt: skip
def test_a_bad_recipe_is_refused_with_file_and_line(write: Write, text: str | bytes, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        read_recipe(Path(write(text)))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=r"none\.yaml: No such file"):
        gather([str(tmp_path / "none.yaml")])


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("max_step=1", r"'max_step=1': unknown key 'max_step'; did you mean max_steps\?"),
        ("recipe.json", r"'recipe\.json': a recipe \(\.yaml\), key=value or --flag is expected"),
        ("=1", "unknown key ''"),
    ],
)
def test_a_bad_override_is_refused(word: str, message: str) -> None:
    with pytest.raises(RecipeError, match=message):
        gather([word])


@settings(deadline=None)
@given(st.dictionaries(st.sampled_from(known_flags()), st.text(st.characters(exclude_categories=["Cs"]))))
def test_any_text_reaches_the_ranks_unchanged(values: dict[str, str]) -> None:
    assert read_flags(to_argv(values)) == values


EQUAL: list[dict[str, Any]] = [
    {"learning_rate": 1e-5, "min_lr": 1e-7, "warmup_steps": 0.1, "weight_decay": 0},
    {"learning_rate": "3e-3", "max_steps": 400, "bf16": True, "use_lora": True, "save_only_model": False},
    {"lr_scheduler_kwargs": {"num_cycles": 2}, "accelerator_config": {"split_batches": True}},
    {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": False}},
    {"label_names": ["a", "b"], "include_for_metrics": ["loss"]},
    {"report_to": "none"},
    {"report_to": ["clearml", "comet_ml"]},
    {"report_to": []},
    {"optim_target_modules": ["q_proj", "v_proj"]},
    {"run_name": "a b=c ä $(x)"},
    {"resume_from_checkpoint": True},
    {"no_dataloader_pin_memory": True},
    {"lora_target": "q_proj,v_proj", "lora_alpha": 16},
]


@pytest.mark.parametrize("values", EQUAL, ids=str)
def test_the_ranks_build_what_the_recipe_says(needed: dict[str, Any], values: dict[str, Any]) -> None:
    """A recipe's values are checked once here and once more by each rank, as words of a command line."""

    def seen(arguments: Arguments) -> tuple[object, ...]:
        return arguments.model, arguments.data, arguments.hf, arguments.warnings

    assert seen(build(read_flags(to_argv(needed | values)))) == seen(build(needed | values))


def test_a_list_for_a_flag_of_our_own_is_its_comma_form(needed: dict[str, Any]) -> None:
    data = needed["train_data_file"]
    values = needed | {"lora_target": ["q_proj", "v_proj"], "train_data_file": [data, data]}
    ranks = build(read_flags(to_argv(values)))
    assert ranks.model.lora_target == "q_proj,v_proj"
    assert ranks.data.train_data_file == f"{data},{data}"
    build(values)  # and the launcher's own check takes what the ranks take


def test_the_shipped_recipes_are_read(needed: dict[str, Any]) -> None:
    import finebridge

    recipes = sorted((Path(finebridge.__file__).parent / "finetune" / "example_data").glob("*.yaml"))
    assert [path.name for path in recipes] == ["full.yaml", "lora.yaml"]
    for path in recipes:
        values = read_recipe(path) | needed
        assert take(values, "run").stage == "sft"
        assert build(values).hf["deepspeed"] == "ds_zero2_no_offload"
