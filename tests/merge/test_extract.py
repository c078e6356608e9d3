"""What two checkpoints differ in becomes an adapter, and merging it gives the second one back."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finebridge.finetune.cli import main
from finebridge.merge.extract import extract
from finebridge.merge.lora_delta import AdapterError
from finebridge.merge.merge_lora import merge
from finebridge.merge.placement import PlacementError
from peft import PeftModel
from safetensors.torch import load_file, save_file

from .conftest import load, logits, save_base, tensors
from .test_kinds import moe


def tuned(base: Path, folder: Path, change: Callable[[str, torch.Tensor], object]) -> Path:
    """A copy of the base whose tensors a function has changed in place."""
    shutil.copytree(base, folder)
    values = tensors(base)
    torch.manual_seed(2)
    for name, value in values.items():
        change(name, value)
    save_file(values, folder / "model.safetensors", {"format": "pt"})
    return folder


def all_moved(name: str, value: torch.Tensor) -> None:
    del name
    value += 0.1 * torch.randn_like(value)


@pytest.mark.parametrize("form", [{}, {"tied": True}, {"biased": True}], ids=str)
def test_the_whole_rank_gives_the_second_checkpoint_back(tmp_path: Path, form: dict[str, bool]) -> None:
    base = save_base(tmp_path / "base", **form)
    other = tuned(base, tmp_path / "tuned", all_moved)
    extract(base, other, tmp_path / "adapter", 64)
    said: list[str] = []
    merge(base, [tmp_path / "adapter"], tmp_path / "out", say=said.append)
    assert said == []
    got, wanted = tensors(tmp_path / "out"), tensors(other)
    assert list(got) == list(wanted), "a tied pair stays tied"
    assert all(torch.allclose(got[name], value, rtol=0, atol=1e-6) for name, value in wanted.items())
    live = PeftModel.from_pretrained(load(base), tmp_path / "adapter").eval()
    assert (logits(live) - logits(load(other))).abs().max() < 1e-4


@pytest.mark.parametrize("rank", [4, 6])
def test_the_difference_that_an_adapter_made_is_recovered(base: Path, adapter: Path, tmp_path: Path, rank: int) -> None:
    merge(base, [adapter], tmp_path / "tuned")
    said: list[str] = []
    extract(base, tmp_path / "tuned", tmp_path / "adapter", rank, say=said.append)
    assert said[0].startswith(f"6 differences cut to rank {rank}: at least 100.00% of each is kept (model.layers.")
    assert len(said) == 2, "nothing is stored whole"
    factors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert {min(value.shape) for value in factors.values()} == {rank}
    merge(base, [tmp_path / "adapter"], tmp_path / "out")
    wanted = tensors(tmp_path / "tuned")
    assert all((value - wanted[name]).abs().max() < 1e-5 for name, value in tensors(tmp_path / "out").items())


def test_a_large_weight_is_cut_to_its_largest_directions() -> None:
    from finebridge.merge.extract import _cut

    torch.manual_seed(0)
    delta = (torch.randn(300, 8) @ torch.randn(8, 400)).double() + 1e-3 * torch.randn(300, 400)
    u, s, v = torch.linalg.svd(delta, full_matrices=False)
    for rank in (8, 3):
        left, right, kept = _cut(delta, rank)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        assert (left.double() @ right.double() - best).norm() < 1e-4 * best.norm()
        assert kept == pytest.approx(1 - float((delta - best).norm() / delta.norm()), abs=1e-6)


def test_a_small_rank_keeps_a_part_and_says_which(base: Path, tmp_path: Path) -> None:
    other = tuned(base, tmp_path / "tuned", lambda name, value: all_moved(name, value) if "q_proj" in name else None)
    said: list[str] = []
    extract(base, other, tmp_path / "adapter", 2, say=said.append)
    assert 0.01 < float(said[0].split("at least ")[1].split("%")[0]) / 100 < 0.5
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert sorted(config["target_modules"]) == [f"model.layers.{layer}.self_attn.q_proj" for layer in (0, 1)]


def test_bad_input(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["--base_model_path", base, "--tuned_model_path", base, "--output_path", tmp_path / "out", "--rank", "4"]
    assert main(["merge", "extract", *map(str, words)]) == 2
    assert "holds the same weights" in capsys.readouterr().err
    assert main(["merge", "extract", *map(str, words[:-1]), "0"]) == 2
    assert "--rank 0: at least 1" in capsys.readouterr().err
    (tmp_path / "out").mkdir()
    assert main(["merge", "extract", *map(str, words)]) == 2
    assert "exists already; choose another folder or give --overwrite" in capsys.readouterr().err
    (tmp_path / "out").rmdir()
    broken = tuned(
        base, tmp_path / "broken", lambda name, value: value.view(-1)[5:6].fill_(torch.nan) if "k_proj" in name else 0
    )
    with pytest.raises(AdapterError, match=r"k_proj\.weight: holds values that are not finite in .*base or .*broken"):
        extract(base, broken, tmp_path / "out", 4)
    shorter = tmp_path / "shorter"
    shutil.copytree(base, shorter)
    values = tensors(base)
    del values["model.norm.weight"]
    save_file(values, shorter / "model.safetensors", {"format": "pt"})
    with pytest.raises(
        AdapterError, match=r"model\.norm\.weight: \(32,\) in .*, missing in .*; 1 tensors are not in both alike"
    ):
        extract(base, shorter, tmp_path / "out", 4)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken", "shorter"]


def test_experts_that_are_no_modules_are_refused(tmp_path: Path) -> None:
    base, adapter = moe("qwen3_moe", tmp_path)
    merge(base, [adapter], tmp_path / "tuned")
    with pytest.raises(PlacementError, match=r"mlp\.experts\.0\.\w+: the model class of the base has no such module"):
        extract(base, tmp_path / "tuned", tmp_path / "out", 4)
    assert not (tmp_path / "out").exists()
