"""The shipped DeepSpeed settings are what DeepSpeed takes; a user's own are checked before a model is loaded."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from finebridge.ds_configs.resolve import (
    FOLDER,
    DeepSpeedConfigError,
    check,
    check_precision,
    compiled_ops,
    find,
    offloads_optimizer,
    resolve,
    shipped,
    zero_stage,
)

NAMES = [
    "ds_zero2_no_offload", "ds_zero2_offload", "ds_zero3_no_offload", "ds_zero3_offload", "ds_zero3_offload_no_auto",
    "ds_zero3_optimizer_offload", "ds_zero3_param_offload",
]  # fmt: skip

# What the HF integration would put in place of "auto" (batch sizes consistent for one process).
FILLED: dict[str, Any] = {
    "bf16": {"enabled": True},
    "fp16": {"enabled": False},
    "train_batch_size": 8,
    "train_micro_batch_size_per_gpu": 2,
    "gradient_accumulation_steps": 4,
    "gradient_clipping": 1.0,
    "reduce_bucket_size": 1024,
    "stage3_prefetch_bucket_size": 921,
    "stage3_param_persistence_threshold": 320,
}


def fill(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings with every "auto" replaced; a KeyError means that an "auto" stands where HF fills none in."""
    filled: dict[str, Any] = {}
    for key, value in settings.items():
        if isinstance(value, dict):
            known = FILLED.get(key, FILLED)
            filled[key] = {inner: known[inner] if text == "auto" else text for inner, text in value.items()}
        else:
            filled[key] = FILLED[key] if value == "auto" else value
    return filled


@pytest.fixture(scope="module")
def deepspeed_config() -> Iterator[Callable[[dict[str, Any]], Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DS_ACCELERATOR", "cpu")
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.delenv(name, raising=False)
        from deepspeed.runtime.config import DeepSpeedConfig

        yield DeepSpeedConfig


@pytest.fixture
def write(tmp_path: Path) -> Callable[[Any], str]:
    def to_file(settings: Any) -> str:
        path = tmp_path / "own.json"
        path.write_text(settings if isinstance(settings, str) else json.dumps(settings))
        return str(path)

    return to_file


def test_exactly_these_seven_are_shipped() -> None:
    assert shipped() == NAMES


@pytest.mark.parametrize("name", NAMES)
def test_deepspeed_accepts_what_is_shipped(name: str, deepspeed_config: Callable[[dict[str, Any]], Any]) -> None:
    settings = resolve(name)
    parsed = deepspeed_config(fill(settings))
    zero = parsed.zero_config
    assert zero.stage == zero_stage(settings) == (2 if "zero2" in name else 3)
    cpu_optimizer = name in (
        "ds_zero2_offload", "ds_zero3_offload", "ds_zero3_offload_no_auto", "ds_zero3_optimizer_offload",
    )  # fmt: skip
    assert (zero.offload_optimizer is not None) == offloads_optimizer(settings) == cpu_optimizer
    assert (zero.offload_param is not None) == (name in ("ds_zero3_offload", "ds_zero3_param_offload"))
    assert parsed.bfloat16_config.enabled
    assert not parsed.float16_config.enabled
    assert parsed.train_batch_size == 8
    assert parsed.gradient_clipping == 1.0
    if zero.stage == 3:
        assert zero.gather_16bit_weights_on_model_save


@pytest.mark.parametrize("name", NAMES)
def test_batch_and_precision_are_left_to_the_command_line(name: str) -> None:
    settings = resolve(name)
    for key in ("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps"):
        assert settings[key] == "auto"
    for bf16, fp16 in ((True, False), (False, True), (False, False)):
        check_precision(settings, bf16=bf16, fp16=fp16, where=name)
    assert "optimizer" not in settings


def test_no_auto_means_no_auto_bucket() -> None:
    zero = resolve("ds_zero3_offload_no_auto")["zero_optimization"]
    assert "auto" not in zero.values()


def test_a_name_works_with_and_without_json() -> None:
    assert find("ds_zero2_no_offload") == find("ds_zero2_no_offload.json") == FOLDER / "ds_zero2_no_offload.json"


def test_a_users_file_wins_over_a_shipped_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = {"zero_optimization": {"stage": 1}, "train_batch_size": 4}
    (tmp_path / "ds_zero3_offload.json").write_text(json.dumps(own))
    assert resolve(str(tmp_path / "ds_zero3_offload.json")) == own
    monkeypatch.chdir(tmp_path)
    assert zero_stage(resolve("ds_zero3_offload.json")) == 1
    assert zero_stage(resolve("ds_zero3_offload")) == 3


@pytest.mark.parametrize(
    ("name", "nearest"),
    [
        ("ds_zero2_no_ofload", "ds_zero2_no_offload"),
        ("zero3_offload", "ds_zero3_offload"),
        ("elsewhere/ds_zero3_offload.json", "ds_zero3_offload"),
    ],
)
def test_an_unknown_name_gives_the_nearest_first(name: str, nearest: str) -> None:
    with pytest.raises(DeepSpeedConfigError, match=rf"{name}: .*did you mean {nearest}\b"):
        find(name)


def test_a_name_like_nothing_lists_all() -> None:
    with pytest.raises(DeepSpeedConfigError, match=", ".join(NAMES)):
        find("q")


@pytest.mark.parametrize(
    ("typo", "right"),
    [
        ("zero_optimisation", "zero_optimization"),
        ("gradient_acumulation_steps", "gradient_accumulation_steps"),
        ("train_micro_batch_size_per_gpus", "train_micro_batch_size_per_gpu"),
        ("gradient_cliping", "gradient_clipping"),
    ],
)
def test_a_mistyped_key_is_refused_with_the_right_one(write: Callable[[Any], str], typo: str, right: str) -> None:
    with pytest.raises(DeepSpeedConfigError, match=rf"own\.json: unknown key '{typo}'; did you mean '{right}'"):
        resolve(write({typo: 1}))


def test_a_mistyped_key_inside_a_block_is_refused_before_deepspeed_does(
    write: Callable[[Any], str], deepspeed_config: Callable[[dict[str, Any]], Any]
) -> None:
    settings = {"train_batch_size": 1, "zero_optimization": {"stage": 2, "overlap_com": True}}
    with pytest.raises(ValueError, match="overlap_com"):  # DeepSpeed says it too, when the model is loaded
        deepspeed_config(settings)
    with pytest.raises(DeepSpeedConfigError, match=r"own\.json: .*'overlap_com'.*'overlap_comm'"):
        resolve(write(settings))


def test_deepspeeds_other_keys_pass(deepspeed_config: Callable[[dict[str, Any]], Any]) -> None:
    """No key that DeepSpeed itself reads is taken for a typing error."""
    assert deepspeed_config
    from deepspeed.runtime import constants

    keys = {value for value in vars(constants).values() if isinstance(value, str) and value.isidentifier()}
    keys -= {"scheduler"}
    assert len(keys) > 50
    check({key: {} for key in keys} | {"zero_optimization": {"stage": 2}}, "own.json")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"zero_optimization": {"stage": 3}}, "stage3_gather_16bit_weights_on_model_save must be true"),
        (
            {"zero_optimization": {"stage": 3, "stage3_gather_16bit_weights_on_model_save": False}},
            "stage3_gather_16bit_weights_on_model_save must be true",
        ),
        ({"scheduler": {"type": "WarmupLR"}}, "scheduler block would override --lr_scheduler_type"),
        ({"bf16": {"enabled": True}, "fp16": {"enabled": True}}, "bf16 and fp16 are both enabled"),
        ({"zero_optimization": {"stage": 2, "offload_param": {"device": "cpu"}}}, "offload_param needs ZeRO stage 3"),
        ({"zero_optimization": {"offload_param": {"device": "nvme"}}}, "offload_param needs ZeRO stage 3"),
        ({"zero_optimization": {"stage": 4}}, "stage is 4"),
        ({"zero_optimization": {"stage": "3"}}, "stage is '3'"),
        ("{", "not JSON"),
        ([], "a JSON object"),
    ],
)
def test_what_would_fail_late_is_refused_early(write: Callable[[Any], str], settings: Any, message: str) -> None:
    with pytest.raises(DeepSpeedConfigError, match=rf"own\.json: .*{message}"):
        resolve(write(settings))


@pytest.mark.parametrize(
    "settings",
    [
        {"zero_optimization": []},
        {"zero_optimization": "stage3"},
        {"zero_optimization": {"stage": 2, "offload_optimizer": "cpu"}},
        {"zero_optimization": {"stage": 2, "offload_param": "cpu"}},
        {"bf16": True},
        {"fp16": "auto"},
    ],
)
def test_a_block_of_the_wrong_type_is_named(write: Callable[[Any], str], settings: dict[str, Any]) -> None:
    with pytest.raises(DeepSpeedConfigError, match=r"own\.json"):
        resolve(write(settings), has_accelerator=False)


@pytest.mark.parametrize("block", ["offload_optimizer", "offload_param"])
def test_null_offload_blocks_mean_none_as_in_deepspeed(
    write: Callable[[Any], str], block: str, deepspeed_config: Callable[[dict[str, Any]], Any]
) -> None:
    settings = {"train_batch_size": 1, "zero_optimization": {"stage": 2, block: None}}
    assert getattr(deepspeed_config(settings).zero_config, block) is None
    for has_accelerator in (True, False):
        assert not offloads_optimizer(resolve(write(settings), has_accelerator=has_accelerator))


def test_no_offload_under_stage_2_may_be_said_explicitly(write: Callable[[Any], str]) -> None:
    settings = {"zero_optimization": {"stage": 2, "offload_param": {"device": "none"}}}
    assert resolve(write(settings)) == settings


@pytest.mark.parametrize("name", NAMES)
def test_pinned_memory_is_turned_off_without_an_accelerator_only(name: str) -> None:
    with_one, without = resolve(name), resolve(name, has_accelerator=False)
    pinned = [block for block, value in with_one["zero_optimization"].items() if isinstance(value, dict)]
    assert sorted(pinned) == sorted(block for block in with_one["zero_optimization"] if block.startswith("offload"))
    for block in pinned:
        assert with_one["zero_optimization"][block]["pin_memory"] is True
        assert without["zero_optimization"][block].pop("pin_memory") is False
        del with_one["zero_optimization"][block]["pin_memory"]
    assert with_one == without


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_fixed_precision_must_be_the_command_lines(precision: str) -> None:
    fixed = {precision: {"enabled": True}}
    wanted = {"bf16": precision == "bf16", "fp16": precision == "fp16"}
    check_precision(fixed, **wanted, where="own.json")
    with pytest.raises(
        DeepSpeedConfigError, match=rf"own\.json: {precision}\.enabled is true .*--{precision} is False"
    ):
        check_precision(fixed, bf16=False, fp16=False, where="own.json")
    with pytest.raises(
        DeepSpeedConfigError, match=rf"own\.json: {precision}\.enabled is false .*--{precision} is True"
    ):
        check_precision({precision: {"enabled": False}}, **wanted, where="own.json")


def test_stage_and_offload_of_settings() -> None:
    assert zero_stage({}) == 0
    assert not offloads_optimizer({})
    offload = {"stage": 2, "offload_optimizer": {"device": "cpu"}}
    assert offloads_optimizer({"zero_optimization": offload})
    assert not offloads_optimizer({"zero_optimization": offload, "optimizer": {"params": {"torch_adam": True}}})
    assert not offloads_optimizer({"zero_optimization": {"offload_optimizer": {"device": "none"}}})


OFFLOAD = {"offload_optimizer": {"device": "cpu"}}


@pytest.mark.parametrize(
    ("zero", "optimizer", "ops"),
    [
        ({}, {}, []),
        ({}, {"type": "AdamW"}, ["fused_adam"]),
        ({}, {"type": "AdamW", "params": {"torch_adam": True}}, []),
        (OFFLOAD, {"type": "AdamW", "params": {"torch_adam": True}}, []),
        (OFFLOAD, {"type": "AdamW"}, ["cpu_adam"]),
        (OFFLOAD, {}, ["cpu_adam"]),
        (OFFLOAD, {"type": "Lion"}, ["cpu_lion"]),
        (OFFLOAD, {"type": "Adagrad"}, ["cpu_adagrad"]),
        ({}, {"type": "Lion"}, ["fused_lion"]),
        ({}, {"type": "Adagrad"}, []),
        ({"offload_param": {"device": "nvme"}}, {}, ["pin_memory", "async_io"]),
    ],
)
def test_what_deepspeed_would_compile(zero: dict[str, Any], optimizer: dict[str, Any], ops: list[str]) -> None:
    settings = {"zero_optimization": zero, **({"optimizer": optimizer} if optimizer else {})}
    assert compiled_ops(settings) == ops
