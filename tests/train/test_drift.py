"""What differs between a checkpoint's run and the one that goes on from it: all of it is named, and stops or is said."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.train.drift import TABLE, Effect, allowed_names, differences, refused
from finebridge.train.hf_flags import ArgumentsError
from rank_runner import RankRunner

Models = Callable[[str], Path]
RUN: dict[str, Any] = dict.fromkeys(TABLE, "a") | {"lr_scheduler_type": "cosine"}


@pytest.mark.parametrize("name", TABLE)
def test_each_difference_alone_is_named(name: str) -> None:
    now = {**RUN, name: "b"}
    (drift,) = differences(RUN, now)
    assert str(drift).startswith(f"{name} was {RUN[name]}, is b (")
    effect = TABLE[name][0]
    assert refused([drift], "cosine", frozenset()) == ([] if effect is Effect.SAID else [drift])
    if effect in (Effect.ORDER, Effect.COURSE):
        assert refused([drift], "cosine", allowed_names(name)) == []
    if effect is Effect.STATE:
        with pytest.raises(ArgumentsError, match="--init_from_checkpoint starts from its weights alone"):
            allowed_names(name)


def test_nothing_differs() -> None:
    assert differences(RUN, dict(RUN)) == []


def test_what_was_not_recorded_counts_as_different() -> None:
    older = {name: value for name, value in RUN.items() if name != "betas"}
    assert [(drift.name, drift.then) for drift in differences(older, RUN)] == [("betas", None)]


def test_the_length_of_a_run_under_a_constant_schedule() -> None:
    drifts = differences(RUN, {**RUN, "max_steps": 9})
    assert [drift.name for drift in refused(drifts, "cosine", frozenset())] == ["max_steps"]
    assert refused(drifts, "constant_with_warmup", frozenset()) == []


def test_unknown_name() -> None:
    with pytest.raises(ArgumentsError, match="--allow_drift learning_rat: no such name; did you mean learning_rate"):
        allowed_names("data, learning_rat")


# One flag changed -> the names that must appear, and no others.
CHANGES: dict[str, tuple[dict[str, Any], set[str]]] = {
    "seed": ({"seed": 7}, {"seed", "data_seed"}),
    "data_seed": ({"data_seed": 7}, {"data_seed"}),
    "batch": ({"per_device_train_batch_size": 2}, {"per_device_train_batch_size", "global_batch"}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {"gradient_accumulation_steps", "global_batch"}),
    "other split": (
        {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2},
        {"per_device_train_batch_size", "gradient_accumulation_steps"},
    ),
    "learning rate": ({"learning_rate": 2e-3}, {"learning_rate"}),
    "schedule": ({"lr_scheduler_type": "linear"}, {"lr_scheduler_type"}),
    "floor": ({"min_lr": 1e-5}, {"min_lr", "lr_scheduler_type", "lr_scheduler_kwargs"}),
    "warm-up": ({"warmup_steps": 3}, {"warmup_steps"}),
    "length": ({"max_steps": 12}, {"max_steps"}),
    "epochs": ({"max_steps": -1, "num_train_epochs": 2}, {"max_steps", "num_train_epochs"}),
    "weight decay": ({"weight_decay": 0.1}, {"weight_decay"}),
    "beta": ({"adam_beta2": 0.95}, {"betas"}),
    "epsilon": ({"adam_epsilon": 1e-6}, {"epsilon"}),
    "optimizer": ({"optim": "adafactor"}, {"optimizer"}),
    "clipping": ({"max_grad_norm": 0.5}, {"max_grad_norm"}),
    "precision": ({"bf16": True}, {"precision"}),
    "longest": ({"max_seq_length": 64}, {"max_seq_length"}),
    "long samples": ({"over_long": "truncate"}, {"over_long"}),
    "adapter": ({"use_lora": True}, {"trained", "lora", "lora_alpha", "lora_dropout"}),
    "attention only": ({"train_attention_params_only": True}, {"trained"}),
    "smoothing": ({"label_smoothing_factor": 0.1}, {"label_smoothing_factor"}),
    "interval": ({"save_steps": 3}, {"save_steps"}),
    "recomputation": ({"gradient_checkpointing": True}, {"activation_checkpointing"}),
    "order": ({"train_sampling_strategy": "sequential"}, {"train_sampling_strategy"}),
    "end of epoch": ({"dataloader_drop_last": True}, {"dataloader_drop_last"}),
}


class Data:
    """What of a dataset shapes a run."""

    key = "tokens"

    def __len__(self) -> int:
        return 24


def shape(model: Path, data: Path, settings: dict[str, Any] | None = None, tokenizer: Any = None, **more: Any) -> Any:
    from finebridge.train.arguments import build
    from finebridge.train.assemble import _training_arguments
    from finebridge.train.run_shape import run_shape
    from transformers import AutoTokenizer

    flags = {
        "model_name_or_path": str(model),
        "train_data_file": str(data),
        "max_steps": 8,
        "lr_scheduler_type": "cosine",
    }
    args = build({**flags, "learning_rate": 1e-3, "per_device_train_batch_size": 4, **more})
    tokenizer = tokenizer or AutoTokenizer.from_pretrained(model)
    return run_shape(args, _training_arguments(args, None), Data(), settings, tokenizer)


def test_each_flag_that_shapes_a_run(models: Models, train_file: Path) -> None:
    from transformers import AutoTokenizer

    assert len(CHANGES) >= 15
    model = models("hunyuan_v1_dense")
    tokenizer = AutoTokenizer.from_pretrained(model)
    then = shape(model, train_file, tokenizer=tokenizer)
    assert json.loads(json.dumps(then)) == then
    assert then.keys() == TABLE.keys()
    for case, (change, names) in CHANGES.items():
        now = shape(model, train_file, tokenizer=tokenizer, **change)
        assert {drift.name for drift in differences(then, now)} == names, case


def test_model_tokenizer_template_and_deepspeed(models: Models, train_file: Path, tmp_path: Path) -> None:
    import shutil

    from transformers import AutoTokenizer

    model = models("hunyuan_v1_dense")
    then = shape(model, train_file)

    def named(path: Path = model, settings: dict[str, Any] | None = None, tokenizer: Any = None) -> set[str]:
        return {drift.name for drift in differences(then, shape(path, train_file, settings, tokenizer))}

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template += " "
    assert named(tokenizer=tokenizer) == {"chat_template"}
    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.add_tokens(["<new>"])
    assert named(tokenizer=tokenizer) == {"tokenizer"}
    zero = {"zero_optimization": {"stage": 3, "offload_optimizer": {"device": "cpu"}}}
    assert named(settings=zero) == {"zero_stage", "offload"}
    other = tmp_path / "other"
    shutil.copytree(model, other)
    assert named(other) == {"model"}
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "attention_dropout": 0.1}))
    assert named(other) == {"model", "dropout"}
    (other / "config.json").write_text(json.dumps({**config, "rope_theta": 5e5, "rms_norm_eps": 1e-3}))
    assert named(other) == {"model", "model_config"}


def words(model: Path, data: Path, out: Path, **more: Any) -> list[object]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "max_steps": 8, "save_steps": 4,
        "logging_steps": 1, "learning_rate": 1e-3, "lr_scheduler_type": "linear", "per_device_train_batch_size": 4,
        "disable_tqdm": "true", "report_to": "none",
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


@pytest.mark.parametrize("deepspeed", [{}, {"deepspeed": "ds_zero2_no_offload"}], ids=["plain", "deepspeed"])
def test_what_is_allowed_is_really_done(
    deepspeed: dict[str, str], ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    """Refused with all differences in one message; allowed, the new schedule goes on at the step that was reached."""
    base = models("hunyuan_v1_dense")
    first = {"max_steps": 4, **deepspeed}
    ranks.run(words(base, train_file, tmp_path, **first), tmp_path / "log").check()
    again = {"learning_rate": 4e-3, "weight_decay": 0.3, "max_grad_norm": 0.25, **deepspeed}
    argv = [*words(base, train_file, tmp_path, **again), "--resume_from_checkpoint"]
    done = ranks.run(argv, tmp_path / "log2")
    assert done.codes == [2]
    for named in ("learning_rate was 0.001, is 0.004", "weight_decay was 0.0, is 0.3", "max_steps was 4, is 8"):
        assert named in done.text
    assert "max_grad_norm was 1.0, is 0.25" in done.text
    assert "--allow_drift learning_rate,max_steps,weight_decay goes on" in done.text
    argv += ["--allow_drift", "learning_rate,max_steps,weight_decay"]
    done = ranks.run(argv, tmp_path / "log3").check()
    assert "resume: allowed: learning_rate was 0.001, is 0.004" in done.text
    assert "resume: max_grad_norm was 1.0, is 0.25" in done.text
    state = json.loads((tmp_path / "checkpoint-8" / "trainer_state.json").read_text())
    rates = {entry["step"]: entry["learning_rate"] for entry in state["log_history"] if "loss" in entry}
    assert [rates[step] for step in range(5, 9)] == pytest.approx([4e-3 * (9 - step) / 8 for step in range(5, 9)])
    import torch

    if not deepspeed:
        saved = torch.load(tmp_path / "checkpoint-8" / "optimizer.pt", weights_only=True)
        assert [group["weight_decay"] for group in saved["param_groups"]] == [0.3, 0.0]
