"""What cannot be merged truly is refused by name and leaves nothing; bad input is exit code 2."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.merge.lora_delta import AdapterError
from finebridge.merge.merge_lora import main, merge
from finebridge.storage.manifest import verify
from safetensors.torch import save_file

from .conftest import arguments, load, logits, peft_logits, tensors

MakeAdapter = Callable[..., Path]
Edited = Callable[..., Path]
Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}.lora_A.weight"


def assert_refused(base: Path, adapter: Path, tmp_path: Path, message: str, **settings: Any) -> None:
    folder = tmp_path / "new"
    with pytest.raises(AdapterError, match=message):
        merge(base, [adapter], folder / "out", **settings)
    assert not folder.exists() or list(folder.iterdir()) == []


def test_fp16_overflow_is_an_error_and_leaves_no_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = broken(base, tmp_path / "base", "model.norm.weight", 1e5)
    assert_refused(
        own,
        adapter,
        tmp_path,
        r"model\.norm\.weight: .*reaches 1e\+05, which overflows torch.float16; use bf16",
        save_dtype="fp16",
    )
    merge(own, [adapter], tmp_path / "out", "bf16")
    assert tensors(tmp_path / "out")["model.norm.weight"][0] == torch.tensor(1e5).bfloat16()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_that_is_not_finite_is_refused(
    base: Path, edited: Edited, tmp_path: Path, factor: str, bad: float
) -> None:
    wrong = edited(lambda t: t[KEY.replace("lora_A", factor)].view(-1)[-1:].fill_(bad))
    assert_refused(base, wrong, tmp_path, rf"{Q0}.{factor}.weight: the adapter holds values that are not finite")


def broken(base: Path, folder: Path, name: str, value: float, *more: float) -> Path:
    """A copy of the base whose tensor ``name`` begins with these values."""
    shutil.copytree(base, folder)
    values = tensors(base)
    values[name].view(-1)[: 1 + len(more)] = torch.tensor([value, *more])
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("bad", [float("nan"), float("-inf")])
def test_a_base_that_is_not_finite_where_the_adapter_changes_it_is_refused(
    base: Path, adapter: Path, tmp_path: Path, bad: float
) -> None:
    own = broken(base, tmp_path / "base", f"{Q0}.weight", bad)
    assert_refused(own, adapter, tmp_path, rf"{Q0}\.weight: the merged weight holds values that are not finite")


@pytest.mark.parametrize("save_dtype", ["fp32", "bf16", "fp16"])
def test_what_is_not_finite_elsewhere_is_carried_and_named(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], save_dtype: str
) -> None:
    own = broken(base, tmp_path / "base", "model.norm.weight", float("-inf"), float("nan"))
    assert main(arguments(own, adapter, tmp_path / "out", "--save_dtype", save_dtype)) == 0
    got = tensors(tmp_path / "out")["model.norm.weight"].float()
    assert got[0] == float("-inf")
    assert got[1].isnan()
    assert got[2:].isfinite().all()
    said = capsys.readouterr().err
    assert "warning: not finite, as in the base, and not changed by an adapter: model.norm.weight\n" in said
    if save_dtype == "fp16":
        worse = broken(base, tmp_path / "worse", "model.norm.weight", float("-inf"), 1e5)
        assert_refused(worse, adapter, tmp_path, r"reaches 1e\+05, which overflows torch.float16", save_dtype="fp16")


@pytest.mark.parametrize("save_dtype", ["fp32", "bf16"])
def test_a_change_that_overflows_in_a_late_row_is_refused(
    base: Path, edited: Edited, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save_dtype: str
) -> None:
    def change(values: dict[str, torch.Tensor]) -> None:
        values[KEY].fill_(1e25)
        values[KEY.replace("lora_A", "lora_B")][-1] = 1e25

    monkeypatch.setattr("finebridge.merge.stream.BLOCK", 96)  # of three rows: only every eighth is measured
    assert_refused(base, edited(change), tmp_path, rf"{Q0}\.weight: the merged weight holds", save_dtype=save_dtype)


def rename(to: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(values: dict[str, torch.Tensor]) -> None:
        for key in [key for key in values if Q0 in key]:
            values[key.replace(Q0, to)] = values.pop(key)

    return change


def narrower(values: dict[str, torch.Tensor]) -> None:
    values[KEY] = values[KEY][:, :-1].contiguous()


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "another name": (rename("model.layers.7.self_attn.q_proj"), r"layers\.7\.self_attn\.q_proj\.weight: neither the base nor"),
    "another shape": (narrower, rf"{Q0}\.weight: of shape \(32, 31\), but .* has the shape \(32, 32\)"),
    "a tensor left over": (lambda t: t.update({"base_model.model.x": torch.ones(1)}), "x: neither the base nor its model class"),
    "an unknown kind": (lambda t: t.update({f"{KEY}.more": torch.ones(1)}), r"\.more is not a tensor that the merge"),
    "no prefix": (lambda t: t.update({"x": torch.ones(1)}), "x is not a tensor that the merge knows"),
    "B without A": (lambda t: t.pop(KEY), rf"{Q0}: the adapter has only one of lora_A\.weight and lora_B\.weight"),
    "A without B": (lambda t: t.pop(KEY.replace("lora_A", "lora_B")), rf"{Q0}: the adapter has only one of lora_A"),
    "ranks that differ": (lambda t: t.update({KEY: torch.ones(5, 32)}), rf"{Q0}: lora_A \(5, 32\) and lora_B \(32, 4\)"),
    "another rank than the config's": (
        lambda t: t.update({KEY: torch.ones(5, 32), KEY.replace("lora_A", "lora_B"): torch.ones(32, 5)}),
        rf"{Q0}: lora_A has rank 5, adapter_config\.json says 4",
    ),
    "a tensor without use": (lambda t: t.update({KEY.replace("lora_A", "lora_embedding_A"): torch.ones(4, 4)}), f"{Q0}: the ad"),
    "empty as ZeRO-3 leaves it": (lambda t: t.update({KEY: torch.ones(0)}), rf"{Q0}.lora_A.weight: is empty \(0,\)"),
    "nothing": (lambda t: t.clear(), "holds no LoRA factors"),
    "one weight unchanged": (lambda t: t[KEY.replace("lora_A", "lora_B")].zero_(), "the adapter leaves this weight"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_an_adapter_that_does_not_fit_is_refused_by_name(base: Path, edited: Edited, tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    assert_refused(base, edited(change), tmp_path, message)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens"], "use_dora": True}, r"embed_tokens\.weight: DoRA on an embedding"),
    ],
    ids=str,
)
def test_kinds_that_are_not_merged_are_refused_by_name(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    assert_refused(base, make_adapter(**settings), tmp_path, message)


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "mica"},
        {"alora_invocation_tokens": [5, 6]},
    ],
    ids=str,
)
def test_no_adapter_is_merged_to_other_numbers_than_pefts(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, settings: dict[str, Any]
) -> None:
    """These change the base at start, or act on some tokens only: refuse them, or merge what PEFT would compute."""
    adapter = make_adapter(**settings)
    truth = peft_logits(base, adapter)
    try:
        merge(base, [adapter], tmp_path / "out")
    except AdapterError as error:
        assert next(iter(settings)) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert (logits(load(tmp_path / "out")) - truth).abs().max() < 1e-5


def test_another_peft_type_is_refused(base: Path, edited: Edited, tmp_path: Path) -> None:
    assert_refused(base, edited(peft_type="IA3"), tmp_path, "peft_type is 'IA3'; only LORA")


def test_a_quantised_base_is_refused(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    config = json.loads((own / "config.json").read_text()) | {"quantization_config": {"quant_method": "fp8"}}
    (own / "config.json").write_text(json.dumps(config))
    assert main(arguments(own, adapter, tmp_path / "out")) == 2
    assert "the base is quantised" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_an_adapted_weight_that_is_no_float_stops_the_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Every adapter tensor is used exactly once or the merge stops."""
    own = tmp_path / "base"
    shutil.copytree(base, own)
    values = tensors(base)
    values[f"{Q0}.weight"] = torch.ones(32, 32, dtype=torch.int8)
    save_file(values, own / "model.safetensors")
    assert_refused(own, adapter, tmp_path, Q0)


def test_an_existing_output_needs_overwrite(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert main(arguments(base, adapter, tmp_path / "out")) == 2
    assert "exists already; choose another folder or give --overwrite" in capsys.readouterr().err
    assert (tmp_path / "out" / "precious").exists()
    assert main(arguments(base, adapter, tmp_path / "out", "--overwrite")) == 0
    verify(tmp_path / "out")
    assert not (tmp_path / "out" / "precious").exists()
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_overwrite_never_deletes_what_is_merged(base: Path, adapter: Path, tmp_path: Path) -> None:
    """An output folder that holds the base and the only copy of the adapter is not "what --output_path holds"."""
    models = tmp_path / "models"
    shutil.copytree(base, models / "base")
    shutil.copytree(adapter, models / "adapter")
    assert main(arguments(models / "base", models / "adapter", models, "--overwrite")) == 2
    assert (models / "base" / "model.safetensors").read_bytes() == (base / "model.safetensors").read_bytes()
    assert (models / "adapter" / "adapter_model.safetensors").is_file()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-10])


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "no base folder": (lambda x: shutil.rmtree(x / "base"), "no config.json there"),
    "no base weights": (lambda x: (x / "base" / "model.safetensors").unlink(), "no model.safetensors"),
    "base weights are a Git LFS pointer": (
        lambda x: (x / "base" / "model.safetensors").write_text("version https://git-lfs.github.com/spec/v1"),
        "model.safetensors: not a safetensors file",
    ),
    "base weights cut": (lambda x: cut(x / "base" / "model.safetensors"), "model.safetensors"),
    "no adapter folder": (lambda x: shutil.rmtree(x / "adapter"), "adapter_config.json: missing"),
    "no adapter weights": (
        lambda x: (x / "adapter" / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: missing",
    ),
    "adapter weights cut": (lambda x: cut(x / "adapter" / "adapter_model.safetensors"), "adapter_model.safetensors"),
    "adapter config cut": (lambda x: cut(x / "adapter" / "adapter_config.json"), "adapter_config.json: not JSON"),
    "adapter config without alpha": (
        lambda x: (x / "adapter" / "adapter_config.json").write_text('{"peft_type": "LORA", "r": 4}'), "lora_alpha",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGE)
def test_bad_input_is_exit_code_2_and_named(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    damage, message = DAMAGE[name]
    shutil.copytree(base, tmp_path / "base")
    shutil.copytree(adapter, tmp_path / "adapter")
    damage(tmp_path)
    left = sorted(path.name for path in tmp_path.iterdir())
    assert main(arguments(tmp_path / "base", tmp_path / "adapter", tmp_path / "out")) == 2
    assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == left


UP = "model.layers.0.mlp.up_proj.weight"  # [64, 32]
HEADERS: dict[str, Callable[[dict[str, Any]], object]] = {
    "larger than its bytes": lambda header: header[UP].update(shape=[64, 64]),
    "smaller than its bytes": lambda header: header[UP].update(shape=[64, 16]),
    "another type": lambda header: header[UP].update(dtype="F16"),
    "an unknown type": lambda header: header[UP].update(dtype="F3"),
    "no type": lambda header: header[UP].pop("dtype"),
    "no shape": lambda header: header[UP].pop("shape"),
    "a shape below zero": lambda header: header[UP].update(shape=[-64, -32]),
    "on top of another": lambda header: header[UP].update(data_offsets=[0, 8192]),
    "before the start": lambda header: header[UP].update(data_offsets=[-8192, 0]),
    "a gap": lambda header: header.pop(UP),
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_header_that_contradicts_itself_is_refused(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str
) -> None:
    """Its tensors would be read from other tensors' bytes."""
    shutil.copytree(base, tmp_path / "base")
    path = tmp_path / "base" / "model.safetensors"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:end])
    HEADERS[name](header)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + data[end:])
    assert main(arguments(tmp_path / "base", adapter, tmp_path / "out")) == 2
    assert f"{path}: tensor model." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_alpha": float("nan")},
        {"lora_alpha": float("inf")},
        {"rank_pattern": [4]},
        {"rank_pattern": {"(": 4}},
        {"alpha_pattern": {"q_proj": "x"}},
        {"target_parameters": [3]},
        {"target_parameters": "q_proj.weight"},
    ],
    ids=str,
)
def test_settings_of_a_wrong_kind_are_refused_by_name(
    base: Path, edited: Edited, tmp_path: Path, settings: dict[str, Any]
) -> None:
    assert_refused(base, edited(**settings), tmp_path, rf"adapter_config\.json: {next(iter(settings))} is ")


@pytest.mark.parametrize("size", ["5XB", "0", "inf"])
def test_a_bad_shard_size_is_exit_code_2(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert main(arguments(base, adapter, tmp_path / "out", "--max_shard_size", size)) == 2
    assert f"'{size}' is not a" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []
