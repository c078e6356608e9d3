"""``convert verify --forward``: logits of transformers beside those of real Megatron-Core, through the command."""

import json
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge import convert_cli, forward
from finebridge.finetune.cli import main
from finebridge.storage.safetensors_io import Checkpoint
from safetensors.torch import save_file

from .conftest import MODELS
from .oracle import needs_megatron

Models = Callable[[str], Path]
FORMS = [["--ckpt_format", "torch_dist"], ["--ckpt_format", "torch", "--tp", "2", "--pp", "2"]]
# Megatron and what stands in for CUDA are not for the tests' own process.
COMMANDS = """
import io, json, sys, torch
from contextlib import redirect_stderr, redirect_stdout
from finebridge.finetune.cli import main
found, before = [], torch.cuda.current_device
for words in json.loads(sys.argv[1]):
    out = io.StringIO()
    with redirect_stdout(out), redirect_stderr(out):
        code = main(["convert", "verify", "--forward", *words])
    found.append([code, out.getvalue()])
print(json.dumps([found, before is torch.cuda.current_device and not torch.distributed.is_initialized()]))
"""


def verify_forward(*pairs: tuple[Path, Path]) -> list[tuple[int, str]]:
    """Exit code and text of the command for each pair, all in one process."""
    given = json.dumps([list(map(str, pair)) for pair in pairs])
    done = subprocess.run([sys.executable, "-P", "-c", COMMANDS, given], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found, left_as_before = json.loads(done.stdout.splitlines()[-1])
    assert left_as_before
    return [(code, text) for code, text in found]


def converted(base: Path, target: Path, *words: str) -> Path:
    assert main(["convert", "--to", "mcore", "--load", str(base), "--save", str(target), *words]) == 0
    return target


def with_swapped_heads(base: Path, folder: Path) -> Path:
    """The model with its first two query heads of one layer in each other's place."""
    with Checkpoint(base) as checkpoint:
        values = {name: checkpoint.get(name).clone() for name in checkpoint}
    query = values["model.layers.2.self_attn.q_proj.weight"]
    size = json.loads((base / "config.json").read_text())["head_dim"]
    query[: 2 * size] = query[: 2 * size].roll(size, 0)
    folder.mkdir()
    save_file(values, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text((base / "config.json").read_text())
    return folder


@pytest.fixture(scope="module")
def verified(hf_models: Models, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[int, str]]:
    """What the command says of checkpoints that are right and of others that are not."""
    folder = tmp_path_factory.mktemp("forward")
    dense, sparse = hf_models("qwen3"), hf_models("qwen3_moe")
    pairs = {
        "dense": (dense, converted(dense, folder / "dense", *FORMS[0])),
        "sparse": (converted(sparse, folder / "sparse", *FORMS[1]), sparse),
        "swapped": (dense, converted(with_swapped_heads(dense, folder / "swapped hf"), folder / "swapped")),
        "biased": (dense, with_args(converted(dense, folder / "biased", "--ckpt_format", "torch"), add_qkv_bias=True)),
        "narrow": (dense, with_args(converted(dense, folder / "narrow", "--ckpt_format", "torch"), ffn_hidden_size=32)),
    }
    return dict(zip(pairs, verify_forward(*pairs.values()), strict=True))


def with_args(mcore: Path, **changes: Any) -> Path:
    """The checkpoint with other arguments."""
    file = mcore / "release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(file, weights_only=False)
    vars(content["args"]).update(changes)
    torch.save(content, file)
    (mcore / "manifest.json").unlink()
    return mcore


@needs_megatron
@pytest.mark.parametrize("name", ["dense", "sparse"])
def test_both_compute_the_same(verified: dict[str, tuple[int, str]], name: str) -> None:
    code, text = verified[name]
    assert code == 0, text
    assert float(text.split("differ by at most ")[1].split(",")[0]) < 1e-5
    assert text.endswith("the same tensors\n")
    assert "the whole model in fp32, twice in turn, 0.00 GB of memory; " in text


@needs_megatron
def test_a_swapped_head_is_found(verified: dict[str, tuple[int, str]]) -> None:
    code, text = verified["swapped"]
    assert code == 1, text
    assert float(text.split("differ by at most ")[1].split(",")[0]) > 1e-3
    assert text.endswith("1 tensors differ\n")


@needs_megatron
def test_other_arguments_than_the_tensors_are_refused(verified: dict[str, tuple[int, str]]) -> None:
    """Megatron would not load such a checkpoint; nor is there anything to compute."""
    biased, narrow = verified["biased"], verified["narrow"]
    assert (biased[0], narrow[0]) == (2, 2)
    assert "linear_qkv.bias is only in the model that Megatron-Core builds from its args; 4 in all" in biased[1]
    assert "mlp.linear_fc1.weight is [128, 32], Megatron-Core's is [64, 32]" in narrow[1]


@needs_megatron
@pytest.mark.slow
def test_every_family_computes_the_same(hf_models: Models, tmp_path: Path) -> None:
    """Or is refused: what Megatron-Core computes otherwise, or on CUDA only."""
    words = ["--ckpt_format", "torch", "--allow_patched_attention"]
    found = verify_forward(*((hf_models(name), converted(hf_models(name), tmp_path / name, *words)) for name in MODELS))
    for name, (code, said) in zip(MODELS, found, strict=True):
        if name.startswith("hunyuan"):
            assert (code, "computes hunyuan otherwise" in said) == (2, True), said
        elif name.startswith("ling"):
            assert (code, "does not recognize this architecture" in said) == (2, True), said
        elif name in ("deepseek_v32", "glm5", "qwen3_next"):
            assert (code, "for CUDA only" in said) == (2, True), said
        else:
            assert code == 0, (name, said)


def refused(words: list[Any], capsys: pytest.CaptureFixture[str]) -> str:
    assert main(["convert", "verify", "--forward", *map(str, words)]) == 2
    return capsys.readouterr().err


def test_without_megatron_the_extra_is_named(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def absent(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr(convert_cli, "version", absent)
    assert "installed is none: pip install 'finebridge[megatron]'" in refused(["/a", "/b"], capsys)
    monkeypatch.setattr(convert_cli, "version", lambda _: "0.19.2")
    assert "needs megatron-core 0.16, which computes without a GPU; installed is 0.19.2" in refused(
        ["/a", "/b"], capsys
    )


def test_what_cannot_be_compared_is_refused(
    hf_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(convert_cli, "version", lambda _: "0.16.1")
    base = hf_models("qwen3")
    mcore = converted(base, tmp_path / "mcore")
    capsys.readouterr()
    assert "are of one kind; one of each is needed" in refused([base, base], capsys)
    assert "are of one kind; one of each is needed" in refused([mcore, mcore], capsys)
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 90 kB\n")
    monkeypatch.setattr(forward, "_MEMORY", tmp_path / "meminfo")
    assert "twice in turn, 0.00 GB of memory, 0.00 GB are free; leave --forward out" in refused([base, mcore], capsys)


def test_the_memory_of_a_container_counts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "meminfo").write_text("MemTotal: 100 kB\nMemAvailable: 90 kB\n")
    monkeypatch.setattr(forward, "_MEMORY", tmp_path / "meminfo")
    monkeypatch.setattr(forward, "_LIMITS", tmp_path)
    assert forward._free_memory() == 90 * 1024
    for name, text in (("memory.max", "max\n"), ("memory.current", "1000\n")):
        (tmp_path / name).write_text(text)
    assert forward._free_memory() == 90 * 1024
    (tmp_path / "memory.max").write_text("5000\n")
    assert forward._free_memory() == 4000
    (tmp_path / "meminfo").unlink()
    assert forward._free_memory() is None
