"""Every file of a checkpoint's state is mandatory: one that lacks is named, nothing starts afresh in silence."""

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.storage.manifest import MANIFEST_NAME, read
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.resume import Resume, find_resume
from rank_runner import RankRunner

Models = Callable[[str], Path]
# What a resume does not load: the model is built from --model_name_or_path, the rest is for other tools.
NOT_LOADED = {
    "config.json", "generation_config.json", "training_args.bin", "tokenizer.json", "tokenizer_config.json",
    "chat_template.jinja", "zero_to_fp32.py", "zero_to_torch.py", "README.md",
}  # fmt: skip


@pytest.fixture(scope="module", params=["plain", "lora", "zero2", "zero3"])
def checkpoint(
    request: pytest.FixtureRequest, ranks: RankRunner, models: Models, train_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Path:  # fmt: skip
    """A checkpoint of each kind; with DeepSpeed of two ranks."""
    out = tmp_path_factory.mktemp(str(request.param))
    more = {
        "plain": [], "lora": ["--use_lora", "true", "--lora_rank", 2], "zero2": ["--deepspeed", "ds_zero2_no_offload"],
        "zero3": ["--deepspeed", "ds_zero3_no_offload"],
    }[str(request.param)]  # fmt: skip
    argv = [
        "--model_name_or_path", models("hunyuan_v1_dense"), "--train_data_file", train_file, "--output_dir", out,
        "--max_steps", 1, "--per_device_train_batch_size", 2, "--disable_tqdm", "true", *more,
    ]  # fmt: skip
    ranks.run(argv, out / "log", ranks=2 if "zero" in str(request.param) else 1).check()
    return out / "checkpoint-1"


def linked(source: Path, target: Path, without: str) -> Path:
    """A copy of a checkpoint by hard links, one file left out."""
    shutil.copytree(source, target, copy_function=os.link)
    (target / without).unlink()
    return target


def find(folder: Path, now: dict[str, Any], said: list[str] | None = None) -> Resume | None:
    return find_resume(str(folder), folder.parent, now, frozenset(), [].append if said is None else said.append)


def test_each_file_in_turn(checkpoint: Path, tmp_path: Path) -> None:
    now = read(checkpoint)["made_from"]["run"]
    assert find(checkpoint, now) == Resume(checkpoint)
    names = [path.relative_to(checkpoint).as_posix() for path in sorted(checkpoint.rglob("*")) if path.is_file()]
    assert len(names) > 10
    for number, name in enumerate(names):
        if name == MANIFEST_NAME:
            continue
        folder = linked(checkpoint, tmp_path / f"ours{number}", name)
        with pytest.raises(ArgumentsError, match=f"{name}: missing"):
            find(folder, now)


def test_each_file_in_turn_of_a_stock_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    """The stock Trainer writes the same files without a manifest; what is loaded is known by the structure."""
    now = read(checkpoint)["made_from"]["run"]
    stock = linked(checkpoint, tmp_path / "stock", MANIFEST_NAME)
    said: list[str] = []
    assert find(stock, now, said) == Resume(stock)
    assert "has no manifest" in said[0]
    names = [path.relative_to(stock).as_posix() for path in sorted(stock.rglob("*")) if path.is_file()]
    harmless = NOT_LOADED | (
        {"model.safetensors"} if now["zero_stage"] else set()
    )  # DeepSpeed's own files hold them too
    named = 0
    for number, name in enumerate(names):
        folder = linked(stock, tmp_path / f"without{number}", name)
        if Path(name).name in harmless:
            assert find(folder, now) == Resume(folder)
            continue
        with pytest.raises(ArgumentsError, match=Path(name).name):
            find(folder, now)
        named += 1
    assert named >= 5


def test_a_cut_state_file_of_a_stock_checkpoint(checkpoint: Path, tmp_path: Path) -> None:
    now = read(checkpoint)["made_from"]["run"]
    stock = linked(checkpoint, tmp_path / "stock", MANIFEST_NAME)
    for path in sorted(stock.rglob("*.pt")):
        whole = path.read_bytes()
        path.unlink()
        path.write_bytes(whole[: len(whole) // 2])
        with pytest.raises(ArgumentsError, match=path.name):
            find(stock, now)
        path.write_bytes(whole)
    (stock / "trainer_state.json").unlink()
    (stock / "trainer_state.json").write_text("{}")
    with pytest.raises(ArgumentsError, match=r"trainer_state\.json: missing or damaged"):
        find(stock, now)


def test_what_the_files_of_a_stock_checkpoint_tell(checkpoint: Path, tmp_path: Path) -> None:
    """Batch size and length of the run are in trainer_state.json; the rest cannot be compared, and that is said."""
    now = read(checkpoint)["made_from"]["run"]
    stock = linked(checkpoint, tmp_path / "stock", MANIFEST_NAME)
    said: list[str] = []
    assert find(stock, {**now, "per_device_train_batch_size": 4}, said) == Resume(stock)
    assert "only ranks, batch size and --max_steps are compared" in said[1]
    assert said[2].startswith("resume: per_device_train_batch_size was 2, is 4")
    with pytest.raises(ArgumentsError, match="max_steps was 1, is 9"):
        find(stock, {**now, "max_steps": 9})


class Payload:
    """Unpickling it creates a file."""

    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.canary,)


def test_a_shard_that_would_run_code_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    """By the classes it names, before anything is loaded."""
    import torch

    now = read(checkpoint)["made_from"]["run"]
    stock = linked(checkpoint, tmp_path / "stock", MANIFEST_NAME)
    canary = tmp_path / "canary"
    name = next(iter(stock.glob("global_step1/*optim_states.pt")), stock / "scheduler.pt")
    name.unlink()
    torch.save({"state": Payload(canary)}, name)
    with pytest.raises(ArgumentsError, match=f"{name.name}: it would run"):
        find(stock, now)
    assert not canary.exists()


def test_no_load_of_the_process_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from deepspeed.runtime.checkpoint_engine.torch_checkpoint_engine import TorchCheckpointEngine
    from finebridge.train.shards import refuse_pickles

    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "0")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    canary, file = tmp_path / "canary", tmp_path / "mp_rank_00_model_states.pt"
    torch.save({"module": Payload(canary)}, file)
    refuse_pickles(deepspeed=True)
    with pytest.raises(pickle.UnpicklingError, match="Weights only load failed"):
        TorchCheckpointEngine().load(str(file), map_location="cpu")
    assert not canary.exists()


def test_weights_split_over_several_files(tmp_path: Path) -> None:
    from finebridge.train.resume import state_files

    now = {"zero_stage": None, "precision": "fp32", "lora": None}
    for name in ("scheduler.pt", "optimizer.pt", "rng_state.pth", "model-00001-of-00002.safetensors"):
        (tmp_path / name).write_bytes(b"")
    (tmp_path / "trainer_state.json").write_text('{"global_step": 4}')
    weight_map = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ArgumentsError, match="model-00002-of-00002.safetensors is missing"):
        state_files(tmp_path, 1, now)
    with pytest.raises(ArgumentsError, match=r"rng_state_0\.pth is missing and 2 more"):
        state_files(tmp_path, 2, now)
    with pytest.raises(ArgumentsError, match=r"scaler\.pt is missing"):
        state_files(tmp_path, 1, {**now, "precision": "fp16"})
