"""No checkpoint that is not the model is trained: every tensor dropped, renamed, reshaped, emptied, spoilt."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import DENSE, FAMILIES, tiny
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.loading import ModelError
from finebridge.train.model import load_model
from finebridge.train.model_arguments import ModelArguments
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

Models = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def load(folder: Path, dtype: torch.dtype = torch.float32, **flags: Any) -> tuple[Any, list[str]]:
    said: list[str] = []
    args = ModelArguments(model_name_or_path=str(folder), **flags)
    model = load_model(args, dtype, AutoTokenizer.from_pretrained(folder), set(), said.append)
    return model, said


@pytest.fixture
def copy(models: Models, tmp_path: Path) -> Callable[[str, Tensors | None], Path]:
    """A model's folder with other tensors."""

    def make(model_type: str, tensors: Tensors | None = None) -> Path:
        folder = tmp_path / "copy"
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(models(model_type), folder)
        if tensors is not None:
            save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        return folder

    return make


def spoil(tensors: Tensors, name: str, how: str) -> Tensors:
    changed = dict(tensors)
    value = changed.pop(name)
    if how == "renamed":
        changed[f"{name}_x"] = value
    elif how == "reshaped":
        changed[name] = value[:-1].contiguous()
    elif how == "emptied":
        changed[name] = value[:0].contiguous()
    elif how in ("nan", "inf"):
        changed[name] = value.clone()
        changed[name].view(-1)[-1] = float(how)
    elif how == "extra":
        changed |= {name: value, f"{name}.more": value.clone()}
    return changed


MUTATIONS = ["dropped", "renamed", "reshaped", "emptied", "nan", "inf", "extra"]


@pytest.mark.parametrize("how", MUTATIONS)
@pytest.mark.parametrize("model_type", ["hunyuan_v1_dense", "hunyuan_v1_moe"])
def test_no_tensor_is_lost_or_made_up(model_type: str, how: str, models: Models, copy: Callable[..., Path]) -> None:
    """Tensors of every kind; the slow test below has all of them."""
    tensors = load_file(models(model_type) / "model.safetensors")
    for name in [name for name in tensors if "layers.0" not in name]:
        if "layers.1" in name and name.rsplit(".", 2)[1] not in ("q_proj", "gate_proj", "wg", "input_layernorm"):
            continue
        folder = copy(model_type, spoil(tensors, name, how))
        with pytest.raises(ModelError) as caught:
            load(folder)
        message = str(caught.value)
        assert str(folder) in message
        assert name in message or f"{name.split('.experts.')[0]}.experts" in message, message


@pytest.mark.slow
@pytest.mark.parametrize("model_type", [*FAMILIES, *DENSE])
def test_no_tensor_of_any_family_is_lost_or_made_up(model_type: str, models: Models, tmp_path: Path) -> None:
    shutil.copytree(models("hunyuan_v1_dense"), tmp_path, dirs_exist_ok=True)  # for its tokenizer
    (tmp_path / "model.safetensors").unlink()
    tiny(model_type, vocab_size=400).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    for name in tensors:
        for how in MUTATIONS:
            save_file(spoil(tensors, name, how), tmp_path / "model.safetensors", metadata={"format": "pt"})
            with pytest.raises(ModelError):
                load(tmp_path)


def test_what_is_allowed_by_name_is_said(models: Models, copy: Callable[..., Path]) -> None:
    tensors = load_file(models("hunyuan_v1_dense") / "model.safetensors")
    name = "model.norm.weight"
    folder = copy("hunyuan_v1_dense", spoil(tensors, name, "renamed"))
    with pytest.raises(ModelError, match="--allow_missing 'model.norm.weight'"):
        load(folder)
    with pytest.raises(ModelError, match=r"model.norm.weight_x in .*safetensors; if that is right, --allow_unexpected"):
        load(folder, allow_missing="*.norm.weight")
    model, said = load(folder, allow_missing="*.norm.weight", allow_unexpected="other,*_x")
    assert model.model.norm.weight.equal(torch.ones(32))
    assert any("made at random" in line and name in line for line in said)
    assert any("of the checkpoint not used" in line and f"{name}_x" in line for line in said)


def test_what_a_class_itself_ignores_is_no_error(models: Models, copy: Callable[..., Path]) -> None:
    """Old checkpoints hold the rotary frequencies of each layer, which models now compute."""
    tensors = load_file(models("hunyuan_v1_dense") / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    _, said = load(copy("hunyuan_v1_dense", tensors))
    assert not said


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("model_type", ["hunyuan_v1_dense", "hunyuan_v1_moe", "qwen3_moe"])
def test_a_good_checkpoint_loads_as_transformers_loads_it(model_type: str, dtype: torch.dtype, models: Models) -> None:
    ours, said = load(models(model_type), dtype)
    stock = AutoModelForCausalLM.from_pretrained(models(model_type), dtype=dtype)
    assert not said
    assert list(ours.state_dict()) == list(stock.state_dict())
    for name, value in stock.state_dict().items():
        assert ours.state_dict()[name].dtype == value.dtype
        assert ours.state_dict()[name].equal(value)


def sharded(folder: Path) -> dict[str, Any]:
    """The folder's weights in two shards with an index; the index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(tensors)
    where: dict[str, str] = {}
    for number, part in enumerate((names[:5], names[5:])):
        shard = f"model-0000{number + 1}-of-00002.safetensors"
        save_file({name: tensors[name] for name in part}, folder / shard, metadata={"format": "pt"})
        where |= dict.fromkeys(part, shard)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return index


def test_broken_shards_are_named(copy: Callable[..., Path]) -> None:
    folder = copy("hunyuan_v1_moe")
    index = sharded(folder)
    load(folder)
    second = folder / "model-00002-of-00002.safetensors"
    whole = second.read_bytes()
    second.write_bytes(whole[:-100])
    with pytest.raises(ArgumentsError, match=f"{second.name}: .* the file was cut"):
        load(folder)
    second.unlink()
    with pytest.raises(ArgumentsError, match=f"{second.name}: listed in model.safetensors.index.json but missing"):
        load(folder)
    (folder.parent / "outside.safetensors").write_bytes(whole)
    index["weight_map"] = {
        name: "../outside.safetensors" if shard == second.name else shard for name, shard in index["weight_map"].items()
    }
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with pytest.raises(ArgumentsError, match="weight_map points outside the folder: '../outside.safetensors'"):
        load(folder)


def test_bin_files_hold_tensors_or_are_refused(models: Models, copy: Callable[..., Path], tmp_path: Path) -> None:
    class Hostile:
        def __reduce__(self) -> Any:
            return (Path.touch, (tmp_path / "executed",))

    folder = copy("hunyuan_v1_moe")
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    stock = AutoModelForCausalLM.from_pretrained(models("hunyuan_v1_moe"))
    for zipped in (False, True):  # torch before 1.6, and since
        torch.save(tensors, folder / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        ours, _ = load(folder)
        assert all(value.equal(stock.state_dict()[name]) for name, value in ours.state_dict().items())
    torch.save({**tensors, "model.norm.weight": Hostile()}, folder / "pytorch_model.bin")
    with pytest.raises(ModelError, match=r"pytorch_model.bin: holds more than tensors"):
        load(folder)
    assert not (tmp_path / "executed").exists()


def test_a_value_that_fp16_cannot_hold_is_named(models: Models, copy: Callable[..., Path]) -> None:
    tensors = load_file(models("hunyuan_v1_dense") / "model.safetensors")
    tensors["model.norm.weight"][3] = 70000.0
    folder = copy("hunyuan_v1_dense", tensors)
    load(folder, torch.bfloat16)
    with pytest.raises(ModelError, match=r"tensor model.norm.weight: values too large for the dtype"):
        load(folder, torch.float16)
