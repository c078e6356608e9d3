"""What a save streams is bit for bit what transformers and PEFT write, for every layout, stage and number of ranks."""

import json
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_weights, tiny_model, train_tokenizer, zero_settings
from finebridge.storage.hashing import Ledger, file_entry
from finebridge.train.weights import WeightsError, gathered, write_weights
from rank_runner import RankRunner
from safetensors.torch import load_file

Models = Callable[[str], Path]


def assert_same(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert (got[name].dtype, got[name].shape) == (tensor.dtype, tensor.shape), name
        assert got[name].view(torch.uint8).equal(tensor.view(torch.uint8)), name


@pytest.mark.parametrize(
    ("model_type", "changes"),
    [
        ("hunyuan_v1_dense", {}),
        ("hunyuan_v1_dense", {"tie_word_embeddings": True}),
        ("hunyuan_v1_dense", {"tie_word_embeddings": False}),
        ("hunyuan_v1_moe", {}),
        ("qwen3_moe", {"tie_word_embeddings": True}),
    ],
)
def test_the_files_hold_what_save_pretrained_writes(model_type: str, changes: dict[str, Any], tmp_path: Path) -> None:
    model = tiny_model(model_type, train_tokenizer("hunyuan_dense"), **changes).bfloat16()
    model.model.norm.float()  # another type in the same file
    model.save_pretrained(tmp_path / "stock")
    held = model.state_dict(keep_vars=True)
    for world in (1, 3):
        folder = tmp_path / str(world)
        folder.mkdir()
        for rank in range(world):
            ledger = Ledger(folder)
            write_weights(
                model, folder, 20_000, ledger, lambda names: gathered({name: held[name] for name in names}),
                rank=rank, world=world,
            )  # fmt: skip
            assert ledger.entries
            assert all(entry == file_entry(folder / name) for name, entry in ledger.entries.items())
        assert_same(load_weights(folder), load_weights(tmp_path / "stock"))
        index = json.loads((folder / "model.safetensors.index.json").read_text())["weight_map"]
        assert index.keys() == load_weights(folder).keys()
        assert all(index[name] == file.name for file in folder.glob("*.safetensors") for name in load_file(file))


def test_a_tensor_that_was_not_gathered_is_never_written(tmp_path: Path) -> None:
    model = tiny_model("hunyuan_v1_dense", train_tokenizer("hunyuan_dense"))
    held = model.state_dict(keep_vars=True)

    @contextmanager
    def forgetful(names: Any) -> Any:
        yield {name: held[name].detach() if "o_proj" not in name else torch.empty(0) for name in names}

    with pytest.raises(WeightsError, match=r"o_proj\.weight has the shape \(0,\)"):
        write_weights(model, tmp_path, 10**9, Ledger(tmp_path), forgetful)


STAGES = {"plain": "", "zero2": "ds_zero2_no_offload", "zero3": "ds_zero3_no_offload", "offload": "ds_zero3_offload"}


CASES = [
    ("zero3", "hunyuan_v1_moe", []),
    ("zero3", "hunyuan_v1_dense", ["--bf16", "true"]),
    ("zero2", "qwen3_moe", []),
    ("zero3", "hunyuan_v1_dense", ["--use_lora", "true", "--lora_rank", "4"]),
    pytest.param("plain", "hunyuan_v1_dense", [], marks=pytest.mark.slow),
    pytest.param("zero2", "hunyuan_v1_dense", ["--train_attention_params_only", "true"], marks=pytest.mark.slow),
    pytest.param("zero3", "qwen3_moe", ["--bf16", "true"], marks=pytest.mark.slow),
    pytest.param("offload", "hunyuan_v1_dense", ["--use_lora", "true"], marks=pytest.mark.slow),
    pytest.param("zero2", "hunyuan_v1_dense", ["--use_lora", "true"], marks=pytest.mark.slow),
]


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "model_type", "more"), CASES)
def test_two_ranks_write_what_the_stock_trainer_writes(
    stage: str, model_type: str, more: list[str], ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    argv = [
        "--model_name_or_path", models(model_type), "--train_data_file", train_file, "--output_dir", tmp_path,
        "--max_steps", 1, "--learning_rate", 1e-2, "--per_device_train_batch_size", 2, "--disable_tqdm", "true",
        "--prepared_data_dir", train_file.parent / "prepared", "--max_shard_size", "30KB",
        *more,
    ]  # fmt: skip
    if stage := STAGES[stage]:
        argv += ["--deepspeed", zero_settings(stage, tmp_path)]
    ranks.run(argv, tmp_path / "log", ranks=2, entry="twin_saves:main").check()
    saved, stock = tmp_path / "checkpoint-1", tmp_path / "stock"
    assert_same(load_weights(saved), load_weights(stock))
    for name in ("config.json", "adapter_config.json", "generation_config.json"):
        if (stock / name).exists():
            assert json.loads((saved / name).read_text()) == json.loads((stock / name).read_text())
    lacking = {path.name for path in stock.iterdir()} - {path.name for path in saved.iterdir()}
    assert lacking <= {"model.safetensors"}  # one file there, several here
