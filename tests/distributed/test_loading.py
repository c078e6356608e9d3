"""Loading under ZeRO-3 on two ranks gives bit for bit what transformers' own reader gives."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_runner import RankRunner
from safetensors.torch import load_file, save_file

pytestmark = pytest.mark.distributed


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
def test_each_rank_holds_what_stock_loading_gives(
    dtype: str, ranks: RankRunner, models: Callable[[str], Path], tmp_path: Path
) -> None:
    """Dense and MoE (experts apart on disk, one parameter in the model); a NaN that only rank 1 sees stops both ranks."""
    broken = tmp_path / "broken"
    shutil.copytree(models("hunyuan_v1_moe"), broken)
    tensors = load_file(broken / "model.safetensors")
    name = "model.layers.1.mlp.experts.3.down_proj.weight"
    tensors[name][-1, -1] = float("nan")
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    folders = [models("hunyuan_v1_dense"), models("hunyuan_v1_moe"), models("qwen3_moe")]
    done = ranks.run([dtype, *folders, broken], tmp_path / "log", ranks=2, entry="zero3_loading:main").check()
    total = sum(p.numel() for p in load_file(folders[0] / "model.safetensors").values())
    for text in done.texts:
        assert all(f"alike: {folder.name}" in text for folder in folders)
        assert f"refused: {broken / 'model.safetensors'}: tensor {name} has values that are NaN or infinite" in text
    here = [int(text.split("alike: hunyuan_v1_dense, ")[1].split()[0]) for text in done.texts]
    assert sum(here) >= total
    assert max(here) < 0.6 * sum(here)
