"""--master_weights: what it is refused with, told before torch is imported."""

import json
from pathlib import Path
from typing import Any

import pytest
from finebridge.train.arguments import Arguments, build
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.masters import without_masters


def parsed(tmp_path: Path, **more: Any) -> Arguments:
    return build({
        "config_name": "qwen3", "tokenizer_name_or_path": str(tmp_path), "use_dummy_data": True, "bf16": "true",
        "master_weights": "bf16_kahan", "output_dir": str(tmp_path / "out"), **more,
    })  # fmt: skip


@pytest.mark.parametrize(
    ("more", "why"),
    [
        ({"bf16": "false"}, "needs --bf16 true"),
        ({"use_lora": "true"}, "full training"),
        ({"optim": "adafactor"}, "leave --optim adafactor out"),
        ({"deepspeed": "ds_zero2_offload"}, "CPU Adam"),
        ({"deepspeed": {"zero_optimization": {"stage": 0}}}, "stage 1, 2 or 3"),
        ({"deepspeed": {"optimizer": {"type": "AdamW"}, "zero_optimization": {"stage": 2}}}, "optimizer block"),
    ],
)
def test_refused(tmp_path: Path, more: dict[str, Any], why: str) -> None:
    if isinstance(more.get("deepspeed"), dict):
        (tmp_path / "ds.json").write_text(json.dumps(more["deepspeed"]))
        more = {"deepspeed": str(tmp_path / "ds.json")}
    with pytest.raises(ArgumentsError, match=why):
        parsed(tmp_path, **more)


@pytest.mark.parametrize("deepspeed", [None, "ds_zero2_no_offload", "ds_zero3_no_offload"])
def test_taken(tmp_path: Path, deepspeed: str | None) -> None:
    args = parsed(tmp_path, **({"deepspeed": deepspeed} if deepspeed else {}))
    assert args.model.master_weights == "bf16_kahan"
    assert not args.warnings


def test_bf16_masters_of_the_settings_are_warned_of(tmp_path: Path) -> None:
    settings = {"bf16": {"enabled": "auto", "loss_scale": 1}, "zero_optimization": {"stage": 2}}
    half = without_masters(settings)
    assert half["bf16"] == {**settings["bf16"], "bf16_master_weights_and_grads": True, "bf16_optimizer_states": True}
    assert settings["bf16"] == {"enabled": "auto", "loss_scale": 1}
    (tmp_path / "ds.json").write_text(json.dumps(half))
    (warning,) = parsed(tmp_path, master_weights="fp32", deepspeed=str(tmp_path / "ds.json")).warnings
    assert "updates below 1/256 of a weight are lost" in warning


def test_without_a_fused_kernel_the_plain_one_is_taken(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from finebridge.train import assemble, optimizers

    assert optimizers.has_fused()
    monkeypatch.setattr(assemble, "has_fused", lambda: False)
    args = parsed(tmp_path)
    assert assemble._training_arguments(args, None).optim == "adamw_torch"
    assert "--optim is adamw_torch" in capsys.readouterr().out
    chosen = parsed(tmp_path, optim="adamw_torch_fused")
    assert assemble._training_arguments(chosen, None).optim == "adamw_torch_fused"


def test_fp8_needs_bf16_weights_without_zero_3(tmp_path: Path) -> None:
    with pytest.raises(ArgumentsError, match="needs weights in bf16"):
        parsed(tmp_path, master_weights="fp32", fp8="true")
    with pytest.raises(ArgumentsError, match="ZeRO-3"):
        parsed(tmp_path, fp8="true", deepspeed="ds_zero3_no_offload")
