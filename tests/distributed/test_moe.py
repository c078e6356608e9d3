"""Mixture-of-experts models: blocks found by structure, ZeRO-3 leaf modules, and the hang they prevent."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.ds_configs.resolve import FOLDER
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.moe import has_listed_experts, make_leaf_modules, moe_blocks
from rank_runner import RankRunner

pytestmark = pytest.mark.distributed
BLOCKS = {"hunyuan_v1_moe": "HunYuanMoEV1Moe", "qwen3_moe": "Qwen3MoeSparseMoeBlock"}


@pytest.mark.parametrize("model_type", BLOCKS)
def test_blocks_are_found_and_marked(model_type: str, models: Callable[[str], Path]) -> None:
    from deepspeed.utils import get_z3_leaf_modules
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models(model_type))
    assert list(moe_blocks(model)) == ["model.layers.0.mlp", "model.layers.1.mlp"]
    assert not has_listed_experts(model)
    assert make_leaf_modules(model) == [BLOCKS[model_type]]
    assert [type(module).__name__ for module in get_z3_leaf_modules(model)] == [BLOCKS[model_type]] * 2


def test_a_convolution_beside_a_projection_is_no_block() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    config = MambaConfig(vocab_size=32, hidden_size=8, state_size=4, num_hidden_layers=2, intermediate_size=16)
    assert not moe_blocks(MambaForCausalLM(config))


def test_experts_in_a_list_are_found() -> None:
    from torch import nn

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 4, bias=False)
            self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])

    model = nn.Sequential(nn.Linear(8, 8), Block())
    assert list(moe_blocks(model)) == ["1"]
    assert has_listed_experts(model)


def test_a_dense_model_is_refused(models: Callable[[str], Path]) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(models("hunyuan_v1_dense"))
    assert not moe_blocks(model)
    with pytest.raises(ArgumentsError, match="no mixture-of-experts block"):
        make_leaf_modules(model)


@pytest.mark.parametrize("leaf", ["true", "false"])
@pytest.mark.parametrize("model_type", BLOCKS)
def test_zero3_on_two_ranks(
    model_type: str, leaf: str, ranks: RankRunner, models: Callable[[str], Path], train_file: Path, tmp_path: Path,
    history: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    settings = json.loads((FOLDER / "ds_zero3_no_offload.json").read_text())
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    argv = [
        "--model_name_or_path", models(model_type), "--train_data_file", train_file, "--output_dir", tmp_path,
        "--max_steps", 3, "--logging_steps", 1, "--learning_rate", 1e-3, "--per_device_train_batch_size", 2,
        "--deepspeed", tmp_path / "ds.json", "--make_moe_param_leaf_module", leaf, "--disable_tqdm", "true",
    ]  # fmt: skip
    done = ranks.run(argv, tmp_path / "log", ranks=2).check()
    assert (f"leaf modules: {BLOCKS[model_type]}" in done.text) == (leaf == "true")
    losses = [entry["loss"] for entry in history(tmp_path)]
    assert losses[-1] < losses[0]
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", output_loading_info=True)
    assert not info["missing_keys"]
