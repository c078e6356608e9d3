"""The real trainer on one or two ranks: what it trains, saves, refuses and resumes."""

import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.storage.manifest import verify
from rank_runner import RankRunner
from safetensors.torch import load_file

Models = Callable[[str], Path]
History = Callable[[Path], list[dict[str, Any]]]


def flags(model: Path, data: Path, out: Path, **more: Any) -> list[object]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "max_steps": 3, "logging_steps": 1,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 4, "disable_tqdm": "true",
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def changed(before: Path, after: Path) -> set[str]:
    old, new = load_file(before / "model.safetensors"), load_file(after / "model.safetensors")
    assert old.keys() == new.keys()
    return {name for name in old if not old[name].equal(new[name])}


def test_checkpoint_of_the_last_step_loads_alone(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path, save_steps=2, deepspeed="ds_zero3_no_offload")
    ranks.run(argv, tmp_path / "log", ranks=2).check()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-2", "checkpoint-3"]
    assert not list(tmp_path.glob(".checkpoint*"))
    last = tmp_path / "checkpoint-3"
    assert verify(last)["made_from"]["step"] == 3
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(last, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert all(parameter.numel() for parameter in model.parameters())
    tokenizer = AutoTokenizer.from_pretrained(last)
    assert tokenizer.apply_chat_template([{"role": "user", "content": "q"}], tokenize=False).endswith("q")


def test_save_total_limit_keeps_the_newest(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path, save_steps=1, save_total_limit=2, max_steps=4)
    ranks.run(argv, tmp_path / "log").check()
    assert sorted(path.name for path in tmp_path.glob("checkpoint-*")) == ["checkpoint-3", "checkpoint-4"]


def test_attention_only(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    base = models("hunyuan_v1_dense")
    ranks.run(
        flags(base, train_file, tmp_path, max_steps=1, train_attention_params_only="true"), tmp_path / "log"
    ).check()
    names = set(load_file(base / "model.safetensors"))
    assert changed(base, tmp_path / "checkpoint-1") == {name for name in names if "self_attn" in name}


@pytest.mark.parametrize("world", [1, 2])
def test_lora_saves_the_adapter_alone(
    world: int, ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    more = {"use_lora": "true", "lora_rank": 4, "lora_alpha": 8, "deepspeed": "ds_zero3_no_offload"}
    ranks.run(flags(models("hunyuan_v1_dense"), train_file, tmp_path, **more), tmp_path / "log", ranks=world).check()
    last = tmp_path / "checkpoint-3"
    assert not (last / "model.safetensors").exists()
    adapter = load_file(last / "adapter_model.safetensors")
    modules = {name.split(".self_attn.")[1].split(".")[0] for name in adapter}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert all(tensor.numel() for tensor in adapter.values())
    assert any(tensor.abs().sum() > 0 for name, tensor in adapter.items() if "lora_B" in name)


def test_lora_target_that_matches_nothing(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path, use_lora="true", lora_target="q_proj,w_proj")
    done = ranks.run(argv, tmp_path / "log")
    assert done.codes == [2]
    assert "--lora_target w_proj: no module of that name" in done.text
    assert "o_proj" in done.text


def test_min_lr_is_reached_at_the_last_step(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path, history: History
) -> None:
    more = {"lr_scheduler_type": "cosine_with_min_lr", "learning_rate": 1e-3, "min_lr": 1e-4, "max_steps": 5}
    ranks.run(
        flags(models("hunyuan_v1_dense"), train_file, tmp_path, deepspeed="ds_zero2_no_offload", **more),
        tmp_path / "log",
    ).check()
    rates = [entry["learning_rate"] for entry in history(tmp_path)]
    state = json.loads((tmp_path / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["global_step"] == 5
    import torch

    scheduler = torch.load(tmp_path / "checkpoint-5" / "scheduler.pt", weights_only=True)
    assert all(rate == pytest.approx(1e-4) for rate in scheduler["_last_lr"])
    assert max(rates) <= 1e-3
    assert min(rates) >= 1e-4


def test_damaged_checkpoint_is_refused(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path, max_steps=1)
    ranks.run(argv, tmp_path / "log").check()
    weights = tmp_path / "checkpoint-1" / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-1] ^= 1
    weights.write_bytes(bytes(raw))
    done = ranks.run([*argv, "--resume_from_checkpoint", tmp_path / "checkpoint-1"], tmp_path / "log2")
    assert done.codes == [2]
    assert "model.safetensors" in done.text


def test_missing_weight_is_never_random(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    import shutil

    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(models("hunyuan_v1_dense"), broken)
    tensors = load_file(broken / "model.safetensors")
    gone = next(name for name in tensors if "q_proj" in name)
    del tensors[gone]
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = ranks.run(flags(broken, train_file, tmp_path / "out"), tmp_path / "log")
    assert done.codes == [2]
    assert gone in done.text
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_a_nan_in_the_checkpoint_stops_the_run(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    import shutil

    from safetensors.torch import save_file

    broken = tmp_path / "broken"
    shutil.copytree(models("hunyuan_v1_dense"), broken)
    tensors = load_file(broken / "model.safetensors")
    tensors["model.norm.weight"][0] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    done = ranks.run(flags(broken, train_file, tmp_path / "out", save_steps=1), tmp_path / "log")
    assert done.codes == [2]
    assert f"{broken / 'model.safetensors'}: tensor model.norm.weight has values that are NaN or infinite" in done.text
    assert not list((tmp_path / "out").glob("checkpoint-*"))


def test_dummy_data_and_a_new_model(ranks: RankRunner, models: Models, tmp_path: Path, history: History) -> None:
    base = models("hunyuan_v1_dense")
    argv = [
        "--config_name", "hunyuan_v1_dense", "--hidden_size", 32, "--num_layers", 1, "--num_attention_heads", 4,
        "--num_key_value_heads", 2, "--intermediate_size", 64, "--model_max_length", 64, "--tokenizer_name_or_path", base,
        "--use_dummy_data", "--max_seq_length", 16, "--output_dir", tmp_path, "--max_steps", 2, "--logging_steps", 1,
        "--disable_tqdm", "true",
    ]  # fmt: skip
    ranks.run(argv, tmp_path / "log").check()
    config = json.loads((tmp_path / "checkpoint-2" / "config.json").read_text())
    assert (config["hidden_size"], config["num_hidden_layers"], config["max_position_embeddings"]) == (32, 1, 64)
    assert len(history(tmp_path)) == 2


def test_architecture_flag_that_the_model_type_lacks(ranks: RankRunner, models: Models, tmp_path: Path) -> None:
    argv = [
        "--config_name",
        "hunyuan_v1_dense",
        "--use_cla",
        "true",
        "--tokenizer_name_or_path",
        models("hunyuan_v1_dense"),
    ]
    done = ranks.run([*argv, "--use_dummy_data", "--output_dir", tmp_path], tmp_path / "log")
    assert done.codes == [2]
    assert "--use_cla: a hunyuan_v1_dense model has no such setting" in done.text


def test_launcher_and_trainer_must_agree_on_the_world(monkeypatch: pytest.MonkeyPatch) -> None:
    from finebridge.train.runtime import RuntimeSetupError, check_world

    monkeypatch.setenv("WORLD_SIZE", "2")
    check_world(2)
    with pytest.raises(RuntimeSetupError, match="2 ranks but the Trainer sees 1"):
        check_world(1)


def test_evaluation_data(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    more = {"eval_data_file": train_file, "eval_strategy": "steps", "eval_steps": 3}
    ranks.run(flags(models("hunyuan_v1_dense"), train_file, tmp_path, **more), tmp_path / "log").check()
    state = json.loads((tmp_path / "trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "eval_loss" in entry] == [3]


def test_adapter_folder_is_no_model(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    more = {"use_lora": "true", "lora_rank": 4, "max_steps": 1}
    ranks.run(flags(models("hunyuan_v1_dense"), train_file, tmp_path, **more), tmp_path / "log").check()
    done = ranks.run(flags(tmp_path / "checkpoint-1", train_file, tmp_path / "b", max_steps=1), tmp_path / "log2")
    assert done.codes == [2]
    assert "checkpoint-1: an adapter; name its base here" in done.text


@pytest.mark.parametrize("deepspeed", [{}, {"deepspeed": "ds_zero2_no_offload"}])
def test_weights_alone_cannot_be_resumed(
    deepspeed: dict[str, str], ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path, max_steps=1, save_only_model="true", **deepspeed)
    ranks.run(argv, tmp_path / "log").check()
    done = ranks.run([*argv, "--resume_from_checkpoint"], tmp_path / "log2")
    assert done.codes == [2]
    assert "optimizer and schedule would start afresh" in done.text


def test_an_output_folder_that_cannot_be_made_is_one_message(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").write_text("x")
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path / "file" / "out", max_steps=1)
    done = ranks.run(argv, tmp_path / "log")
    assert done.codes == [2]
    assert "Traceback" not in done.text
    assert f"{tmp_path}/file" in done.text


def test_unknown_model_type_gives_the_nearest(ranks: RankRunner, models: Models, tmp_path: Path) -> None:
    argv = [
        "--config_name",
        "hunyuan_v1_dens",
        "--tokenizer_name_or_path",
        models("hunyuan_v1_dense"),
        "--use_dummy_data",
    ]
    done = ranks.run([*argv, "--output_dir", tmp_path], tmp_path / "log")
    assert done.codes == [2]
    assert "did you mean hunyuan_v1_dense?" in done.text


@pytest.mark.parametrize(
    ("more", "dtype"), [({}, "float32"), ({"deepspeed": "ds_zero2_no_offload"}, "bfloat16")], ids=["plain", "deepspeed"]
)
def test_bf16_never_trains_without_fp32_masters(
    more: dict[str, str], dtype: str, ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    """DeepSpeed keeps fp32 masters beside bf16 weights; a plain Trainer does not, so its weights stay fp32."""
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path, max_steps=1, bf16="true", **more)
    ranks.run(argv, tmp_path / "log").check()
    assert json.loads((tmp_path / "checkpoint-1" / "config.json").read_text())["dtype"] == dtype


def test_spoilt_weights_are_never_saved(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    """The first update alone makes them infinite: loss and gradient still look well, the weights are looked at themselves."""
    import shutil

    from safetensors.torch import save_file

    steep = tmp_path / "steep"
    shutil.copytree(models("hunyuan_v1_dense"), steep)
    tensors = load_file(steep / "model.safetensors")
    tensors[next(name for name in ("lm_head.weight", "model.embed_tokens.weight") if name in tensors)] *= 1000
    save_file(tensors, steep / "model.safetensors", metadata={"format": "pt"})
    more = {"learning_rate": 3e38, "optim": "sgd", "lr_scheduler_type": "constant", "save_steps": 1, "max_grad_norm": 0}
    done = ranks.run(flags(steep, train_file, tmp_path, **more), tmp_path / "log", ranks=2)
    assert 1 in done.codes
    assert "not finite" in done.text
    assert not list(tmp_path.glob("*checkpoint-*"))


def test_resume_with_another_order_of_samples_is_refused(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    lines = train_file.read_text().splitlines()[:12]
    (tmp_path / "other.jsonl").write_text("\n".join(lines))
    ranks.run(flags(models("hunyuan_v1_dense"), train_file, tmp_path, max_steps=1), tmp_path / "log").check()
    change = {"train_data_file": tmp_path / "other.jsonl", "per_device_train_batch_size": 2, "seed": 7}
    again = flags(models("hunyuan_v1_dense"), train_file, tmp_path, max_steps=1, **change)
    done = ranks.run([*again, "--resume_from_checkpoint"], tmp_path / "log2")
    assert done.codes == [2]
    for named in ("data was", "samples was 24, is 12", "data_seed was 42, is 7", "global_batch was 4, is 2"):
        assert named in done.text
    assert "samples would be repeated or skipped" in done.text
    assert "also different, without harm: seed was 42, is 7" in done.text


def test_best_and_last_stay(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    more = {
        "eval_data_file": train_file, "eval_strategy": "steps", "eval_steps": 2, "save_steps": 2, "max_steps": 6,
        "save_total_limit": 1, "load_best_model_at_end": "true", "metric_for_best_model": "eval_loss",
        "learning_rate": 0.5, "lr_scheduler_type": "constant",
    }  # fmt: skip
    done = ranks.run(flags(models("hunyuan_v1_dense"), train_file, tmp_path, **more), tmp_path / "log").check()
    left = {path.name for path in tmp_path.glob("checkpoint-*")}
    state = json.loads((tmp_path / "checkpoint-6" / "trainer_state.json").read_text())
    assert left == {"checkpoint-6", Path(state["best_model_checkpoint"]).name}
    assert Path(state["best_model_checkpoint"]).is_dir()
    assert "checkpoint-6" in done.text


def test_generation_stops_where_the_trained_answers_end(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    """A chat template whose end is not the model's own end token: both stop generation, in the model and the adapter."""
    import shutil

    base = tmp_path / "base"
    shutil.copytree(models("hunyuan_v1_dense"), base)
    settings = json.loads((base / "generation_config.json").read_text())
    terminator = settings["eos_token_id"]
    settings["eos_token_id"] = 3
    (base / "generation_config.json").write_text(json.dumps(settings))
    for more in ({}, {"use_lora": "true", "lora_rank": 2}):
        out = tmp_path / f"out{len(more)}"
        done = ranks.run(flags(base, train_file, out, max_steps=1, **more), out / "log").check()
        saved = json.loads((out / "checkpoint-1" / "generation_config.json").read_text())
        assert saved["eos_token_id"] == [3, terminator]
        assert "generation will stop at" in done.text


def test_intervals_come_from_the_flags_on_resume(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    base = models("hunyuan_v1_dense")
    ranks.run(flags(base, train_file, tmp_path, max_steps=2, save_steps=50), tmp_path / "log").check()
    argv = flags(base, train_file, tmp_path, max_steps=6, save_steps=2)
    ranks.run([*argv, "--resume_from_checkpoint"], tmp_path / "log2").check()
    assert {path.name for path in tmp_path.glob("checkpoint-*")} == {f"checkpoint-{step}" for step in (2, 4, 6)}


def test_report_to_none_trains(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path, max_steps=1, report_to="none")
    assert "done: 1 steps" in ranks.run(argv, tmp_path / "log").check().text


def test_an_output_folder_that_ranks_do_not_share_is_refused(models: Models, train_file: Path, tmp_path: Path) -> None:
    """Two ranks in different current folders, with a relative --output_dir: each would write a checkpoint of its own."""
    base = models("hunyuan_v1_dense")
    code = (
        "import os, sys; os.makedirs(sys.argv[1] + os.environ['RANK'], exist_ok=True);"
        "os.chdir(sys.argv[1] + os.environ['RANK']);"
        "from finebridge.train.sft import main; sys.exit(main(sys.argv[2:]))"
    )
    words = [str(word) for word in flags(base, train_file, Path("out"), max_steps=1)]
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = str(probe.getsockname()[1])
    started = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(tmp_path / "node"), *words],
            env={**os.environ, "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1",
                 "MASTER_PORT": port},
            stderr=subprocess.PIPE, text=True,
        )
        for rank in range(2)
    ]  # fmt: skip
    errors = [process.communicate(timeout=120)[1] for process in started]
    assert [process.returncode for process in started] == [2, 2]
    assert "ranks [1] do not see what rank 0 writes there" in errors[0]
    assert not list(tmp_path.glob("node*/out/*checkpoint*"))
