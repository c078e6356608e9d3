"""Room on disk is reckoned before the first step, close to what checkpoints really take."""

from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from conftest import tiny_model, train_tokenizer, zero_settings
from finebridge.storage.publish import publish
from finebridge.storage.space import free_bytes, is_disk_full
from finebridge.train import space
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.space import SpaceCheck, checkpoint_bytes
from rank_runner import RankRunner

BIG = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from finebridge.data_tools.templates import ChatTemplate
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = tmp_path_factory.mktemp("base")
    tokenizer = train_tokenizer("hunyuan_dense")
    ChatTemplate(tokenizer, "hunyuan_dense")
    config = AutoConfig.from_pretrained(_saved(folder / "tiny", tokenizer))
    config.update(BIG)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def _saved(folder: Path, tokenizer: Any) -> Path:
    tiny_model("hunyuan_v1_dense", tokenizer).save_pretrained(folder)
    return folder


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("stage", "more"),
    [
        ("ds_zero3_no_offload", ["--bf16", "true"]),
        pytest.param("", [], marks=pytest.mark.slow),
        pytest.param("ds_zero2_no_offload", ["--bf16", "true"], marks=pytest.mark.slow),
        pytest.param("ds_zero3_no_offload", ["--use_lora", "true"], marks=pytest.mark.slow),
        pytest.param("", ["--use_lora", "true"], marks=pytest.mark.slow),
    ],
)
def test_the_estimate_is_near_the_truth(
    stage: str, more: list[str], ranks: RankRunner, base: Path, train_file: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    deepspeed = ["--deepspeed", zero_settings(stage, tmp_path)] if stage else []
    argv = [
        "--model_name_or_path", base, "--train_data_file", train_file, "--output_dir", tmp_path, "--max_steps", 1,
        "--per_device_train_batch_size", 2, "--disable_tqdm", "true", *deepspeed, *more,
    ]  # fmt: skip
    ranks.run(argv, tmp_path / "log", ranks=2).check()
    files = [path for path in (tmp_path / "checkpoint-1").rglob("*") if path.is_file()]
    states = [path for path in files if path.suffix in (".safetensors", ".pt")]
    real = sum(path.stat().st_size for path in states)
    import torch
    from transformers import AutoModelForCausalLM

    dtype = torch.bfloat16 if "--bf16" in more else torch.float32
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype=dtype)
    if "--use_lora" in more:
        from finebridge.train.lora import add_lora
        from finebridge.train.model_arguments import ModelArguments

        model = add_lora(model, ModelArguments(model_name_or_path=str(base), use_lora=True))
    monkeypatch.setattr(space, "_BESIDE", 0)
    settings = {"zero_optimization": {"stage": 3 if "zero3" in stage else 2}} if stage else None
    told = checkpoint_bytes(model, SimpleNamespace(save_only_model=False, deepspeed=settings))  # pyright: ignore[reportArgumentType]
    assert told == pytest.approx(real, rel=0.25)


def begin(keep: int | None, folder: Path, **changes: Any) -> None:
    args = SimpleNamespace(
        save_strategy="steps", save_only_model=True, deepspeed=None, output_dir=str(folder), num_train_epochs=3
    )
    state = SimpleNamespace(max_steps=100, global_step=0, save_steps=10)
    vars(state).update(changes)
    model = tiny_model("hunyuan_v1_dense", train_tokenizer("hunyuan_dense"))
    SpaceCheck(keep).on_train_begin(args, state, None, model=model)  # pyright: ignore[reportArgumentType]


def test_what_cannot_fit_is_refused_and_what_will_not_fit_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = 20_000_000 + 4 * 36_992
    free = {"bytes": one - 1}
    monkeypatch.setattr(space, "free_bytes", lambda _: free["bytes"])
    with pytest.raises(ArgumentsError, match=rf"{tmp_path}.*one checkpoint needs about {one:,} bytes, {one - 1:,} are"):
        begin(None, tmp_path)
    free["bytes"] = 3 * one
    for keep, changes, warned in (
        (None, {}, "10 checkpoints"), (2, {}, ""), (3, {}, "4 checkpoints"), (None, {"save_steps": 40}, ""),
        (None, {"save_steps": 30}, "4 checkpoints"), (None, {"global_step": 75}, ""),
    ):  # fmt: skip
        begin(keep, tmp_path, **changes)
        told = capsys.readouterr().out
        assert (f"{warned} of about {one:,} bytes are to come" in told) if warned else told == ""
    for step in (1, 2):  # those are on the disk already
        with publish(tmp_path / f"checkpoint-{step}", kind="checkpoint", made_from={}):
            pass
    begin(3, tmp_path)
    assert capsys.readouterr().out == ""


def test_a_run_that_cannot_save_does_not_start(
    ranks: RankRunner, models: Callable[[str], Path], train_file: Path, tmp_path: Path
) -> None:
    argv = [
        "--model_name_or_path",
        models("hunyuan_v1_dense"),
        "--train_data_file",
        train_file,
        "--output_dir",
        tmp_path,
    ]
    done = ranks.run(
        [*argv, "--max_steps", 1, "--disable_tqdm", "true"], tmp_path / "log", entry="twin_saves:small_disk"
    )
    assert done.codes == [2]
    assert "1,000 are free" in done.text
    assert "Traceback" not in done.text
    assert not list(tmp_path.glob("checkpoint-*"))


def test_a_full_disk_is_known_by_number_and_by_the_words_of_libraries(tmp_path: Path) -> None:
    assert is_disk_full(OSError(28, "No space left on device"))
    assert is_disk_full(Exception("I/O error: No space left on device (os error 28)"))
    wrapped = RuntimeError("saving failed")
    wrapped.__cause__ = OSError(122, "Disk quota exceeded")
    assert is_disk_full(wrapped)
    assert not is_disk_full(OSError(13, "Permission denied"))
    assert not is_disk_full(None)
    assert free_bytes(tmp_path / "not" / "there") > 0
