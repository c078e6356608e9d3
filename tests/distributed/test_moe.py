"""Mixture-of-experts models: blocks found by structure, ZeRO-3 leaf modules, and the hang they prevent."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from families import DENSE, FAMILIES, on_meta
from finebridge.ds_configs.resolve import FOLDER
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.moe import LeafCheck, experts_of, has_listed_experts, make_leaf_modules, moe_blocks
from rank_runner import RankRunner
from torch import nn

pytestmark = pytest.mark.distributed
BLOCKS = {"hunyuan_v1_moe": "HunYuanMoEV1Moe", "qwen3_moe": "Qwen3MoeSparseMoeBlock"}


@pytest.mark.parametrize("model_type", FAMILIES)
def test_blocks_of_every_family_are_found_and_marked(model_type: str) -> None:
    from deepspeed.utils import get_z3_leaf_modules

    _, block, count = FAMILIES[model_type]
    model = on_meta(model_type)
    assert not has_listed_experts(model)
    said: list[str] = []
    make_leaf_modules(model, None, said.append)
    assert said == [f"ZeRO-3 leaf modules: {count} x {block} (set for you)"]
    assert [type(module).__name__ for module in get_z3_leaf_modules(model)] == [block] * count


@pytest.mark.parametrize("model_type", DENSE)
def test_a_dense_model_has_no_blocks(model_type: str) -> None:
    model = on_meta(model_type)
    said: list[str] = []
    make_leaf_modules(model, None, said.append)
    assert not said
    with pytest.raises(ArgumentsError, match="no mixture-of-experts block; leave the flag out"):
        make_leaf_modules(model, True, said.append)


class Unknown(nn.Module):
    """A block that no library knows, with its experts in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(8, 4, bias=False)
        self.experts = nn.ModuleList([nn.Linear(8, 8) for _ in range(4)])


def test_experts_in_a_list_need_leaf_modules() -> None:
    model = nn.Sequential(nn.Linear(8, 8), Unknown())
    assert list(moe_blocks(model)) == ["1"]
    with pytest.raises(ArgumentsError, match="1 keeps its experts in a list"):
        make_leaf_modules(model, False, print)
    said: list[str] = []
    make_leaf_modules(model, True, said.append)
    assert said == ["ZeRO-3 leaf modules: 1 x Unknown"]


def test_names_of_experts_as_an_adapter_targets_them() -> None:
    listed = experts_of(nn.Sequential(nn.Linear(8, 8), Unknown()))
    assert (listed.fused, listed.linear) == ([], [f"1.experts.{number}" for number in range(4)])
    fused = experts_of(on_meta("mixtral"))
    assert (fused.fused, fused.linear) == (["experts.down_proj", "experts.gate_up_proj"], [])


def test_a_block_that_is_no_leaf_stops_the_run() -> None:
    model = nn.Sequential(Unknown(), Unknown())
    make_leaf_modules(model, None, print)
    model[1]._z3_leaf = False
    with pytest.raises(RuntimeError, match=r"the MoE block 1 \(Unknown\) is no ZeRO-3 leaf module"):
        LeafCheck().on_train_begin(None, None, None, model=model)  # type: ignore[arg-type]


def test_experts_in_a_list_train_while_ranks_starve_experts(
    ranks: RankRunner,
    listed_moe: Path,
    train_file: Path,
    tmp_path: Path,
    history: Callable[[Path], list[dict[str, Any]]],
) -> None:
    """Remote code in the old layout; rank 0 uses experts 0 and 1 only, rank 1 the others. Hangs or fails without leaf modules."""
    argv = [*zero3(listed_moe, train_file, tmp_path), "--trust_remote_code", "true"]
    done = ranks.run(argv, tmp_path / "log", ranks=2, limit=90).check()
    assert "ZeRO-3 leaf modules: 2 x ListedBlock (set for you)" in done.text
    losses = [entry["loss"] for entry in history(tmp_path)]
    assert losses[-1] < losses[0]
    assert (tmp_path / "checkpoint-3" / "modeling_listed.py").is_file()


def zero3(model: Path, train_file: Path, out: Path, **zero: Any) -> list[object]:
    """Flags of a run whose parameters are all partitioned."""
    settings = json.loads((FOLDER / "ds_zero3_no_offload.json").read_text())
    settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, **zero}
    (out / "ds.json").write_text(json.dumps(settings))
    return [
        "--model_name_or_path", model, "--train_data_file", train_file, "--output_dir", out, "--max_steps", 3,
        "--logging_steps", 1, "--learning_rate", 1e-3, "--per_device_train_batch_size", 2, "--deepspeed", out / "ds.json",
        "--disable_tqdm", "true",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("model_type", "leaf"),
    [
        ("hunyuan_v1_moe", "true"),
        ("qwen3_moe", "false"),
        pytest.param("qwen3_moe", "true", marks=pytest.mark.slow),
        pytest.param("hunyuan_v1_moe", "false", marks=pytest.mark.slow),
    ],
)
def test_zero3_on_two_ranks(
    model_type: str, leaf: str, ranks: RankRunner, models: Callable[[str], Path], train_file: Path, tmp_path: Path,
    history: Callable[[Path], list[dict[str, Any]]],
) -> None:  # fmt: skip
    argv = [*zero3(models(model_type), train_file, tmp_path), "--make_moe_param_leaf_module", leaf]
    done = ranks.run(argv, tmp_path / "log", ranks=2).check()
    assert (f"leaf modules: 2 x {BLOCKS[model_type]}" in done.text) == (leaf == "true")
    losses = [entry["loss"] for entry in history(tmp_path)]
    assert losses[-1] < losses[0]
    from transformers import AutoModelForCausalLM

    _, info = AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-3", output_loading_info=True)
    assert not info["missing_keys"]
