"""Megatron checkpoints as the start and the end of a run: flags, the conversion that is kept, what is refused at once."""

import shutil
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from finebridge.bridge import kept
from finebridge.bridge.convert_cli import target_of
from finebridge.finetune.arguments import RunArguments
from finebridge.finetune.cli import main
from finebridge.finetune.export import export_last, parse_export
from finebridge.finetune.recipe import gather
from finebridge.finetune.weights import from_megatron, start_of
from finebridge.storage.assets import is_tokenizer_asset
from finebridge.storage.manifest import verify
from finebridge.storage.publish import publish
from finebridge.train.arguments import ArgumentsError, build, parse

Models = Callable[[str], Path]


@pytest.fixture(scope="module")
def mcore(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Megatron checkpoint of the tiny Qwen3, over two tensor-parallel ranks."""
    folder = tmp_path_factory.mktemp("megatron") / "mcore"
    words = ["--to", "mcore", "--load", models("qwen3"), "--save", folder, "--ckpt_format", "torch", "--tp", 2]
    assert main(["convert", *map(str, words)]) == 0
    return folder


@pytest.fixture
def copy(mcore: Path, tmp_path: Path) -> Path:
    """One that a test may change."""
    return Path(shutil.copytree(mcore, tmp_path / "copy"))


def quiet(_line: str) -> None:
    """Says nothing."""


def test_flags_of_an_export() -> None:
    flags = parse_export("tp=2,pp=2,num_layer_list=1,3,format=torch,dtype=bf16,iteration=step")
    assert (flags.tp, flags.pp, flags.num_layer_list, flags.ckpt_format) == (2, 2, (1, 3), "torch")
    assert (flags.dtype, flags.at_step, flags.iteration) == ("bf16", True, None)
    assert target_of(parse_export("tp=1"), 0).form == "torch_dist"
    assert parse_export("iteration=7").iteration == 7


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("2", "'2'; pairs like tp=2"), ("tp=2,3", "'3'; pairs"), ("tp=0", "at least 1"), ("format=zip", "invalid choice"),
        ("colour=red", "colour is none of the flags"), ("save-dir=x", "save is not for an export"),
        ("lora=merge", "lora is not for"), ("", "''; pairs"), ("tp=", "invalid"),
    ],
)  # fmt: skip
def test_an_export_that_is_not_understood(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        parse_export(text)
    assert str(caught.value).startswith(f"--export_mcore {text}: ")


def test_a_checkpoint_is_converted_once(
    mcore: Path, copy: Path, models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Again only when a byte of it changes, wherever it lies; what was converted is the model it was made from."""
    made: list[Path] = []
    honest = kept.write_target
    monkeypatch.setattr(kept, "write_target", lambda folder, *rest: (made.append(folder), honest(folder, *rest))[1])
    first = from_megatron(mcore, None, tmp_path / "cache", quiet)
    assert from_megatron(mcore, None, tmp_path / "cache", quiet) == first
    assert from_megatron(copy, None, tmp_path / "cache", quiet) == first
    assert len(made) == 1
    assert verify(first)["kind"] == "hf"
    assert main(["convert", "verify", str(first), str(models("qwen3"))]) == 0
    with (copy / "config.json").open("a") as stream:
        stream.write(" ")
    assert from_megatron(copy, None, tmp_path / "cache", quiet) != first
    assert len(made) == 2


def test_config_and_tokenizer_from_elsewhere(copy: Path, models: Models, tmp_path: Path) -> None:
    for path in copy.iterdir():
        if path.is_file() and path.name != "latest_checkpointed_iteration.txt":
            path.unlink()
    made = from_megatron(copy, models("qwen3"), tmp_path / "cache", quiet)
    assert (made / "tokenizer_config.json").is_file()
    assert main(["convert", "verify", str(made), str(models("qwen3"))]) == 0


def test_a_damaged_checkpoint_leaves_nothing(copy: Path, tmp_path: Path) -> None:
    file = next(copy.rglob("model_optim_rng.pt"))
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum is not the manifest's"):
        from_megatron(copy, None, tmp_path / "cache", quiet)
    assert not [path for path in (tmp_path / "cache").iterdir() if path.is_dir()]


def test_a_rank_does_not_convert(mcore: Path, train_file: Path) -> None:
    words = ["--model_name_or_path", str(mcore), "--train_data_file", str(train_file)]
    assert build(gather(words))
    with pytest.raises(ArgumentsError, match="a Megatron checkpoint; start with finebridge"):
        parse(words)


REFUSED: dict[str, tuple[dict[str, str], str]] = {
    "nothing to convert": ({"hf_config": "MODEL"}, "--hf_config is for a Megatron checkpoint"),
    "no cache needed": ({"converted_weights_dir": "x"}, "--converted_weights_dir is for a Megatron checkpoint"),
    "no config there": ({"model_name_or_path": "MCORE", "hf_config": "nowhere"}, "--hf_config nowhere: no config.json"),
    "nothing saved": ({"save_strategy": "no", "export_mcore": "tp=2"}, "--export_mcore needs a checkpoint"),
    "base of an adapter": ({"use_lora": "true", "export_mcore": "tp=2", "model_name_or_path": "owner/name"}, "needs a folder"),
    "layout": ({"export_mcore": "tp=3"}, "--export_mcore: --tp 3: 4 attention heads"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_is_refused_before_the_ranks_start(
    name: str, mcore: Path, models: Models, train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # so that a name of the Hub passes for one
    monkeypatch.setattr("finebridge.finetune.launch.run_ranks", lambda *_: pytest.fail("started"))
    given, message = REFUSED[name]
    names = {"MODEL": str(models("qwen3")), "MCORE": str(mcore)}
    words: dict[str, Any] = {"model_name_or_path": names["MODEL"], "train_data_file": train_file, "output_dir": "out"}
    words |= {key: names.get(value, value) for key, value in given.items()}
    assert main(["sft", *(f"--{key}={value}" for key, value in words.items())]) == 2
    assert message in capsys.readouterr().err


def test_a_checkpoint_without_tokenizer(copy: Path, train_file: Path, models: Models) -> None:
    for path in copy.iterdir():
        if is_tokenizer_asset(path.name):
            path.unlink()
    args = build({"model_name_or_path": str(copy), "train_data_file": str(train_file)})
    with pytest.raises(ValueError, match="without tokenizer; name one with --tokenizer_name_or_path"):
        start_of(args, RunArguments())
    assert start_of(args, RunArguments(hf_config=str(models("qwen3")))).megatron


def test_no_export_without_a_checkpoint(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="trainer_state.json is missing"):
        export_last(Namespace(), None, tmp_path, quiet)


def test_the_run_that_ended_is_exported_and_none_before_it(models: Models, tmp_path: Path) -> None:
    """A later step may be of an older run; a checkpoint that is not whole is no reason to take another one."""
    for step, name in ((3, "qwen3"), (9, "qwen3_moe")):
        with publish(tmp_path / f"checkpoint-{step}", kind="checkpoint", made_from={}) as folder:
            shutil.copytree(models(name), folder, dirs_exist_ok=True)
    (tmp_path / "trainer_state.json").write_text('{"global_step": 3}')
    made = export_last(parse_export("iteration=step"), None, tmp_path, quiet)
    assert made == tmp_path / "mcore-3"
    assert main(["convert", "verify", str(made), str(models("qwen3"))]) == 0
    (tmp_path / "checkpoint-3" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"checkpoint-3/model.safetensors: missing"):
        export_last(parse_export("iteration=step"), None, tmp_path, quiet)
