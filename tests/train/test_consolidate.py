"""``finebridge checkpoint``: what is damaged is named, and ZeRO's masters become a model that loads alone."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import load_weights, tiny_model, train_tokenizer, zero_settings
from finebridge.finetune.cli import main
from finebridge.storage.manifest import verify
from finebridge.storage.publish import publish
from rank_runner import RankRunner
from safetensors.torch import load_file

Models = Callable[[str], Path]


def artifact(folder: Path) -> Path:
    with publish(folder, kind="checkpoint", made_from={}) as staging:
        (staging / "a.bin").write_bytes(bytes(1000))
    return folder


def test_verify_names_what_is_damaged(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole, broken = artifact(tmp_path / "run" / "checkpoint-2"), artifact(tmp_path / "run" / "checkpoint-10")
    assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"whole: {path} (checkpoint, 1 files, 1,000 bytes)" for path in (whole, broken)
    ]
    (broken / "a.bin").write_bytes(bytes(999) + b"x")
    assert main(["checkpoint", "verify", str(tmp_path / "run")]) == 2
    told = capsys.readouterr()
    assert told.out.startswith(f"whole: {whole}")
    assert told.err.startswith(f"damaged: {broken / 'a.bin'}: its checksum")
    assert main(["checkpoint", "verify", str(whole), str(tmp_path)]) == 2
    assert "no manifest.json" in capsys.readouterr().err
    assert main(["checkpoint", "verify", str(tmp_path / "absent")]) == 2
    assert main(["checkpoint"]) == 2


def trained(folder: Path, ranks: RankRunner, model: Path, data: Path, stage: str, *more: str, world: int = 2) -> Path:
    argv = [
        "--model_name_or_path", model, "--train_data_file", data, "--output_dir", folder / "run", "--max_steps", 1,
        "--learning_rate", 1e-2, "--per_device_train_batch_size", 2, "--disable_tqdm", "true", "--prepared_data_dir",
        data.parent / "prepared", "--bf16", "true", "--deepspeed", zero_settings(stage, folder), *more,
    ]  # fmt: skip
    ranks.run(argv, folder / "log", ranks=world).check()
    return folder / "run" / "checkpoint-1"


def tied_model(folder: Path) -> Path:
    from finebridge.data_tools.templates import ChatTemplate

    tokenizer = train_tokenizer("hunyuan_dense")
    ChatTemplate(tokenizer, "hunyuan_dense")
    tiny_model("hunyuan_v1_moe", tokenizer, tie_word_embeddings=True).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("ds_zero3_no_offload", []),
        ("ds_zero2_no_offload", ["--train_attention_params_only", "true"]),
        pytest.param("ds_zero3_no_offload", ["--train_attention_params_only", "true"], marks=pytest.mark.slow),
        pytest.param("ds_zero2_no_offload", [], marks=pytest.mark.slow),
    ],
)
def test_masters_become_a_model(
    stage: str, more: list[str], ranks: RankRunner, train_file: Path, tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    saved = trained(tmp_path, ranks, tied_model(tmp_path / "base"), train_file, stage, *more)
    out = tmp_path / "out"
    assert main(["checkpoint", "consolidate", str(saved), "--output_path", str(out), "--max_shard_size", "50KB"]) == 0
    assert "fp32 masters of ZeRO" in capsys.readouterr().out
    assert verify(out)["kind"] == "model"
    got, rounded = load_weights(out), load_weights(saved)
    assert got.keys() == rounded.keys()
    assert "lm_head.weight" not in got
    assert any(name.endswith("experts.3.down_proj.weight") for name in got)
    assert all(got[name].to(tensor.dtype).equal(tensor) for name, tensor in rounded.items())
    assert any(not got[name].equal(tensor.float()) for name, tensor in rounded.items()), "masters hold more than bf16"
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    reference = get_fp32_state_dict_from_zero_checkpoint(str(saved))
    alike = set(got) & set(reference)
    assert len(alike) > 10
    assert all(got[name].equal(reference[name].float()) for name in alike)
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert model.dtype == torch.float32
    assert AutoTokenizer.from_pretrained(out).chat_template
    assert json.loads((out / "config.json").read_text())["dtype"] == "float32"


@pytest.mark.distributed
def test_what_cannot_be_consolidated_is_refused(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def refusal(folder: Path) -> str:
        assert main(["checkpoint", "consolidate", str(folder), "--output_path", str(tmp_path / "out")]) == 2
        assert not (tmp_path / "out").exists()
        return capsys.readouterr().err

    base = models("hunyuan_v1_dense")
    assert "no manifest.json" in refusal(base)
    adapter = trained(tmp_path, ranks, base, train_file, "ds_zero3_no_offload", "--use_lora", "true", world=1)
    assert "an adapter; finebridge merge adds it to its base" in refusal(adapter)
    file = adapter / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    assert "adapter_model.safetensors" in refusal(adapter)


def test_weights_without_masters_change_their_type_alone(tmp_path: Path) -> None:
    base = tied_model(tmp_path / "base")
    with publish(tmp_path / "checkpoint-1", kind="checkpoint", made_from={}) as folder:
        for path in base.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
    argv = ["checkpoint", "consolidate", str(tmp_path / "checkpoint-1"), "--output_path", str(tmp_path / "out")]
    assert main([*argv, "--save_dtype", "bf16"]) == 0
    wanted: dict[str, Any] = load_file(base / "model.safetensors")
    got = load_file(tmp_path / "out" / "model.safetensors")
    assert all(got[name].equal(tensor.bfloat16()) for name, tensor in wanted.items())
    assert main([*argv, "--save_dtype", "bf16"]) == 2
