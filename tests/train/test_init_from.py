"""``--init_from_checkpoint``: the weights of a checkpoint and nothing else of it."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.train.arguments import build
from finebridge.train.hf_flags import ArgumentsError
from rank_runner import RankRunner
from safetensors.torch import load_file

Models = Callable[[str], Path]


def words(data: Path, out: Path, **more: Any) -> list[object]:
    values: dict[str, Any] = {
        "train_data_file": data, "output_dir": out, "max_steps": 3, "logging_steps": 1, "learning_rate": 1e-2,
        "lr_scheduler_type": "linear", "per_device_train_batch_size": 4, "disable_tqdm": "true", "report_to": "none",
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def history(out: Path) -> list[tuple[int, float, float]]:
    log = json.loads((out / "trainer_state.json").read_text())["log_history"]
    return [(entry["step"], entry["loss"], entry["learning_rate"]) for entry in log if "loss" in entry]


def test_full_weights(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    """As if the checkpoint were given as the model: equal to that run, with step, schedule and optimizer of a new one."""
    first = words(train_file, tmp_path / "a", model_name_or_path=models("hunyuan_v1_dense"))
    ranks.run(first, tmp_path / "log").check()
    source = tmp_path / "a" / "checkpoint-3"
    done = ranks.run(words(train_file, tmp_path / "b", init_from_checkpoint=source), tmp_path / "log2").check()
    assert (
        f"init: the weights of {source}; optimizer, schedule, step count and order of samples start afresh" in done.text
    )
    ranks.run(words(train_file, tmp_path / "c", model_name_or_path=source), tmp_path / "log3").check()
    assert history(tmp_path / "b") == history(tmp_path / "c")
    assert [(step, rate) for step, _, rate in history(tmp_path / "b")] == [
        (step, rate) for step, _, rate in history(tmp_path / "a")
    ]
    assert history(tmp_path / "b")[0][1] < history(tmp_path / "a")[0][1]
    assert (tmp_path / "b" / "checkpoint-3").is_dir()


@pytest.mark.parametrize("stage", [None, "ds_zero3_no_offload"])
def test_an_adapter_goes_on_training(
    stage: str | None, ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    more = {"deepspeed": stage} if stage else {}
    adapter = {"use_lora": "true", "lora_rank": 2, "lora_alpha": 4, "lora_target": "q_proj,v_proj"}
    first = words(train_file, tmp_path / "a", model_name_or_path=models("hunyuan_v1_dense"), **adapter, **more)
    ranks.run(first, tmp_path / "log").check()
    source = tmp_path / "a" / "checkpoint-3"
    again = words(train_file, tmp_path / "b", init_from_checkpoint=source, learning_rate=1e-6, **more)
    ranks.run(again, tmp_path / "log2").check()
    before, after = (load_file(tmp_path / run / "checkpoint-3" / "adapter_model.safetensors") for run in ("a", "b"))
    assert before.keys() == after.keys()
    moved = {name: float((after[name] - before[name]).abs().max()) for name in before}
    assert all(
        0 < distance < 1e-5 for distance in moved.values()
    )  # three steps of 1e-6 from where it was, not from zero
    assert min(float(before[name].abs().max()) for name in before) > 1e-3
    config = json.loads((tmp_path / "b" / "checkpoint-3" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], set(config["target_modules"])) == (2, 4, {"q_proj", "v_proj"})


def test_a_damaged_checkpoint(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    argv = words(train_file, tmp_path / "a", model_name_or_path=models("hunyuan_v1_dense"), max_steps=1)
    ranks.run(argv, tmp_path / "log").check()
    source = tmp_path / "a" / "checkpoint-1"
    raw = bytearray((source / "model.safetensors").read_bytes())
    raw[-1] ^= 1
    (source / "model.safetensors").write_bytes(bytes(raw))
    done = ranks.run(words(train_file, tmp_path / "b", init_from_checkpoint=source), tmp_path / "log2")
    assert done.codes == [2]
    assert "--init_from_checkpoint" in done.text
    assert "model.safetensors" in done.text


def test_what_cannot_be(models: Models, train_file: Path, tmp_path: Path) -> None:
    """Told from the command line alone, before torch is imported."""
    model = models("hunyuan_v1_dense")
    base: dict[str, Any] = {"train_data_file": str(train_file), "init_from_checkpoint": str(model)}
    assert build(base).model.model_name_or_path == str(model)
    for more, told in (
        ({"resume_from_checkpoint": True}, "--init_from_checkpoint and --resume_from_checkpoint exclude each other"),
        ({"config_name": "qwen3", "tokenizer_name_or_path": str(model)}, "and --config_name exclude each other"),
        ({"init_from_checkpoint": str(tmp_path)}, r"no config\.json there"),
        ({"init_from_checkpoint": "owner/name"}, "no such folder"),
    ):
        with pytest.raises(ArgumentsError, match=told):
            build({**base, **more})
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"base_model_name_or_path": str(model), "r": 4, "lora_alpha": 8, "target_modules": ["v_proj", "q_proj"]}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "lora_dropout": 0.0}))
    args = build({**base, "init_from_checkpoint": str(adapter)})
    assert (args.model.model_name_or_path, args.model.use_lora, args.model.lora_rank) == (str(model), True, 4)
    assert args.model.lora_target == "q_proj,v_proj"
    with pytest.raises(ArgumentsError, match="--lora_rank 8: the adapter of --init_from_checkpoint .* has 4"):
        build({**base, "init_from_checkpoint": str(adapter), "lora_rank": "8"})
    shutil.rmtree(adapter)
