"""A base in ``.bin`` files merges to the same weights as one in safetensors, and a hostile one runs nothing."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.merge.merge_lora import main, merge
from finebridge.storage import safe_load
from safetensors.torch import load_file, save_file

from .conftest import MakeAdapter, arguments, save_base

INDEX = "model.safetensors.index.json"


def pickled(base: Path, folder: Path, *, legacy: bool) -> Path:
    """The same base with a ``.bin`` file for each of its safetensors files."""
    shutil.copytree(base, folder, ignore=shutil.ignore_patterns("*.safetensors", INDEX))
    for path in base.glob("*.safetensors"):
        name = path.with_suffix(".bin").name.replace("model", "pytorch_model")
        torch.save(load_file(path), folder / name, _use_new_zipfile_serialization=not legacy)
    if (base / INDEX).is_file():
        index = (base / INDEX).read_text().replace("model-", "pytorch_model-").replace(".safetensors", ".bin")
        (folder / "pytorch_model.bin.index.json").write_text(index)
    return folder


@pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])
@pytest.mark.parametrize(
    ("dtype", "shards"), [(torch.float32, "20KB"), (torch.float32, "5GB"), (torch.bfloat16, "20KB")]
)
def test_the_same_weights_come_out(
    tmp_path: Path, make_adapter: MakeAdapter, dtype: torch.dtype, shards: str, legacy: bool
) -> None:
    base = save_base(tmp_path / "base", dtype=dtype, shards=shards)
    other = pickled(base, tmp_path / "bin", legacy=legacy)
    before = {path.name: path.read_bytes() for path in other.iterdir()}
    adapter = make_adapter(base)
    for source, out in ((base, "a"), (other, "b")):
        assert main(arguments(source, adapter, tmp_path / out, "--max_shard_size", "30KB")) == 0
    names = sorted(path.name for path in (tmp_path / "a").iterdir() if path.name != "manifest.json")
    assert len(names) > 4
    assert names == sorted(path.name for path in (tmp_path / "b").iterdir() if path.name != "manifest.json")
    tensors = {out: all_tensors(tmp_path / out) for out in "ab"}
    assert tensors["a"].keys() == tensors["b"].keys()
    assert all(torch.equal(value, tensors["b"][name]) for name, value in tensors["a"].items())
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config == json.loads((tmp_path / "b" / "config.json").read_text())
    assert {path.name: path.read_bytes() for path in other.iterdir()} == before


@pytest.mark.parametrize("tied", [False, True])
def test_each_of_several_older_files_is_read_once(
    tmp_path: Path, make_adapter: MakeAdapter, monkeypatch: pytest.MonkeyPatch, tied: bool
) -> None:
    base = save_base(tmp_path / "base", shards="20KB", tied=tied)
    if tied:  # both of the pair are stored, in two files
        index = json.loads((base / INDEX).read_text())
        places = index["weight_map"]
        first = places["model.embed_tokens.weight"]
        places["lm_head.weight"] = last = max({*places.values()} - {first})
        values = {"lm_head.weight": load_file(base / first)["model.embed_tokens.weight"], **load_file(base / last)}
        save_file(values, base / last, {"format": "pt"})
        (base / INDEX).write_text(json.dumps(index))
    other = pickled(base, tmp_path / "bin", legacy=True)
    files = sorted(path.name for path in other.glob("*.bin"))
    assert len(files) > 4
    monkeypatch.setattr("finebridge.merge.stream.BLOCK", 96)
    monkeypatch.setattr("finebridge.merge.plan.BLOCK", 96)
    adapter = make_adapter(base, target_modules=["embed_tokens", "q_proj"], save_embedding_layers=False)
    read: list[str] = []
    load = safe_load.load_tensors

    def counted(path: Path, *, content: bool = True) -> dict[str, torch.Tensor]:
        read.extend([path.name] * content)
        return load(path, content=content)

    monkeypatch.setattr(safe_load, "load_tensors", counted)
    merge(other, [adapter], tmp_path / "out", workers=4)
    assert sorted(read[-len(files) :]) == files
    assert len(read) <= len(files) + 2 * tied, "the pair is compared before, one after the other"
    merge(base, [adapter], tmp_path / "wanted")
    wanted = all_tensors(tmp_path / "wanted")
    assert all(torch.equal(value, wanted[name]) for name, value in all_tensors(tmp_path / "out").items())


def all_tensors(folder: Path) -> dict[str, torch.Tensor]:
    return {name: value for path in folder.glob("*.safetensors") for name, value in load_file(path).items()}


class Hostile:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.canary}",)


def test_a_hostile_base_is_refused_and_nothing_is_written(
    tmp_path: Path, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = pickled(base, tmp_path / "bin", legacy=False)
    weights = torch.load(other / "pytorch_model.bin", weights_only=True)
    torch.save(weights | {"model.norm.weight": Hostile(tmp_path / "canary")}, other / "pytorch_model.bin")
    assert main(arguments(other, adapter, tmp_path / "out")) == 2
    said = capsys.readouterr().err
    assert said.startswith(f"error: {other / 'pytorch_model.bin'}: holds more than tensors (it names posix.system)")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bin"]
