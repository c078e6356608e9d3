"""Routers that a model wants in fp32 stay fp32 under bf16, whatever the ZeRO stage, in training and on disk."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import on_meta
from finebridge.train.precision import asked_in_fp32
from rank_runner import RankRunner
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
Models = Callable[[str], Path]
ROUTERS = {f"model.layers.{layer}.mlp.gate.wg.weight" for layer in range(2)}


@pytest.mark.parametrize(("model_type", "asked"), [("hunyuan_v1_moe", ROUTERS), ("qwen3_moe", set()), ("llama", set())])
def test_what_a_model_asks_for(model_type: str, asked: set[str]) -> None:
    assert asked_in_fp32(on_meta(model_type), torch.bfloat16) == asked
    assert asked_in_fp32(on_meta(model_type), torch.float32) == set()


def flags(model: Path, data: Path, out: Path, settings: Path, **more: Any) -> list[object]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "max_steps": 4, "logging_steps": 1,
        "learning_rate": 1e-3, "lr_scheduler_type": "constant", "per_device_train_batch_size": 2, "disable_tqdm": "true",
        "bf16": "true", "deepspeed": settings, "prepared_data_dir": data.parent / "prepared", "save_steps": 2,
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def check_stages(
    ranks: RankRunner, base: Path, train_file: Path, tmp_path: Path, kinds: dict[str, Path]
) -> dict[str, dict[str, torch.Tensor]]:
    """Train with each of these settings; all save the same, with routers in fp32."""
    runs = [flags(base, train_file, tmp_path / name, settings) for name, settings in kinds.items()]
    words = [word for run in runs for word in ("+++", *run)][1:]
    done = ranks.run(words, tmp_path / "log", ranks=2, entry="sft_many:main", limit=400).check()
    told = "model: 2 parameters stay in fp32, as the model asks: model.layers.0.mlp.gate.wg.weight"
    assert done.text.count(told) == len(kinds)
    saved = {name: load_file(tmp_path / name / "checkpoint-4" / "model.safetensors") for name in kinds}
    first = saved[next(iter(kinds))]
    for name, tensors in saved.items():
        assert {key for key, value in tensors.items() if value.dtype == torch.float32} == ROUTERS, name
        for key, value in tensors.items():
            # An optimizer in host memory rounds otherwise, and Adam's first steps are as long as the learning rate.
            near = 1e-6 if name not in ("2.offload", "3.offload") else 4e-3
            assert (value.float() - first[key].float()).abs().max() < near, (name, key)
    return saved


def test_stages_train_and_save_the_router_alike(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path, zero: Callable[..., Path],
    history: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    base = models("hunyuan_v1_moe")
    saved = check_stages(ranks, base, train_file, tmp_path, {"two": zero(2), "three": zero(3)})
    router = saved["three"][min(ROUTERS)]
    assert not router.equal(load_file(base / "model.safetensors")[min(ROUTERS)])
    assert not router.equal(router.bfloat16().float())
    assert [entry["loss"] for entry in history(tmp_path / "two")] == [e["loss"] for e in history(tmp_path / "three")]


@pytest.mark.slow
def test_offload_saves_the_router_alike_and_goes_on(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path, zero: Callable[..., Path],
    history: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    """Parameters and optimizer in host memory; then each setting goes on from the middle."""
    base = models("hunyuan_v1_moe")
    kinds = {
        name: zero(*name.split("."))
        for name in ("2.no_offload", "2.offload", "3.no_offload", "3.param_offload", "3.offload")
    }
    saved = check_stages(ranks, base, train_file, tmp_path, kinds)
    for name in ("2.no_offload", "3.no_offload", "3.param_offload"):
        straight = [entry["loss"] for entry in history(tmp_path / name)]
        again = tmp_path / f"again-{name}"
        again.mkdir()
        (tmp_path / name / "checkpoint-2").rename(again / "checkpoint-2")
        argv = [*flags(base, train_file, again, kinds[name]), "--resume_from_checkpoint", "true"]
        ranks.run(argv, tmp_path / "log2", ranks=2).check()
        assert [entry["loss"] for entry in history(again)] == straight
        assert load_file(again / "checkpoint-4" / "model.safetensors")[min(ROUTERS)].equal(saved[name][min(ROUTERS)])
