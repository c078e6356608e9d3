"""Checkpoints with the names of MindSpeed-LLM and of Pai-Megatron-Patch: as their own converters write them, there and back."""

import shutil
from argparse import Namespace
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from canonical_models import read, tiny_model, write
from finebridge.bridge.convert import Target, plan
from finebridge.bridge.convert_cli import DIALECTS as OFFERED
from finebridge.bridge.dialects import DIALECTS, canonical_names, slot_of
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.parallel import Layout
from finebridge.bridge.source import open_source
from finebridge.bridge.torch_format import FILE, TorchCheckpoint
from finebridge.finetune.cli import main
from finebridge.storage.safetensors_io import Checkpoint

from .conftest import MODELS

Models = Callable[[str], Path]
State = dict[str, torch.Tensor]
GOLDEN = Path(__file__).parent / "golden"
LATENT = {"mla": True, "experts": 4, "mtp": 1, "layers": 2}
ARGS = {"num_attention_heads": 4, "qk_pos_emb_head_dim": 4, "vocab_size": 100}


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


def assert_same(one: Path, other: Path) -> None:
    with Checkpoint(one) as first, Checkpoint(other) as second:
        assert set(first) == set(second)
        for name in first:
            assert first.dtypes[name] == second.dtypes[name]
            assert torch.equal(first.get(name), second.get(name)), name


def golden() -> Iterator[tuple[str, str, str, dict[str, list[str]]]]:
    """Dialect, model, layout and, of each file, its lines: key, name and shape."""
    for path in sorted(GOLDEN.glob("*.txt")):
        for part in path.read_text().split("\n== ")[1:]:
            head, *blocks = part.split("\n-- ")
            files: dict[str, list[str]] = {}
            for block in blocks:
                folders, *lines = block.strip().splitlines()
                files |= dict.fromkeys(folders.split(), lines)
            model, _, layout = head.strip().partition(" ")
            yield path.stem, model, layout, files


def lines_of(path: Path) -> list[str]:
    content = torch.load(path, weights_only=False)
    return [
        f"{key} {name} {'x'.join(map(str, tensor.shape))}"
        for key in content
        if key.startswith("model")
        for name, tensor in sorted(content[key].items())
        if tensor is not None
    ]


@pytest.mark.parametrize(("dialect", "model", "layout", "files"), list(golden()))
def test_it_is_what_their_converters_write(
    dialect: str, model: str, layout: str, files: dict[str, list[str]], hf_models: Models, tmp_path: Path
) -> None:
    base, mcore = hf_models(model), tmp_path / "mcore"
    words = ["--ckpt_format", "torch", "--dialect", dialect, *layout.split()]
    assert run("--to", "mcore", "--load", base, "--save", mcore, *words) == 0
    assert {path.parent.relative_to(mcore).as_posix() for path in mcore.rglob(FILE)} == set(files)
    for folder, lines in files.items():
        assert sorted(lines_of(mcore / folder / FILE)) == sorted(lines)
    assert (mcore / "latest_checkpointed_iteration.txt").read_text() == ("1" if dialect == "mindspeed" else "release")
    assert run("--to", "hf", "--load", mcore, "--save", tmp_path / "hf", "--dialect", dialect) == 0
    assert_same(base, tmp_path / "hf")


@pytest.mark.parametrize("model", ["qwen3_moe_mixed", "deepseek_v3_mtp"])
def test_pais_newer_converter_writes_torch_dist(model: str, hf_models: Models, tmp_path: Path) -> None:
    assert run("--to", "mcore", "--load", hf_models(model), "--save", tmp_path / "mcore", "--dialect", "pai") == 0
    with open_source(tmp_path / "mcore").tensors as tensors:
        assert tensors.args["padded_vocab_size"] == tensors.args["vocab_size"] == 70  # pyright: ignore[reportAttributeAccessIssue]
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "hf", "--dialect", "pai") == 0
    assert_same(hf_models(model), tmp_path / "hf")


def test_from_one_dialect_to_another(hf_models: Models, tmp_path: Path) -> None:
    place = base = hf_models("deepseek_v3_mtp")
    steps = ["mindspeed --ckpt_format torch --tp 2 --ep 2", "pai", "mcore-local --ckpt_format torch --pp 4"]
    for number, words in enumerate(steps):
        target = tmp_path / str(number)
        assert run("--to", "mcore", "--load", place, "--save", target, "--dialect", *words.split()) == 0
        place = target
    assert run("--to", "hf", "--load", place, "--save", tmp_path / "hf", "--dialect", "mcore-local") == 0
    assert_same(base, tmp_path / "hf")
    assert run("verify", tmp_path / "0", tmp_path / "1") == 0


EVERYWHERE = {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "seed_oss", "deepseek_v2", "deepseek_v3"}
LAYOUTS = ["", "--tp 2", "--pp 2", "--tp 2 --pp 2 --vpp 2", "--pp 2 --num_layer_list 1,3"]
SPARSE = ["--ep 2", "--tp 2 --ep 2 --pp 2", "--tp 2 --ep 2 --etp 1", "--tp 2 --ep 4"]


@pytest.mark.slow
@pytest.mark.parametrize("dialect", ["mindspeed", "pai"])
@pytest.mark.parametrize("model", [*MODELS, "deepseek_v3_mtp"])
def test_every_family_in_every_layout(
    model: str, dialect: str, hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    settings = MODELS[model.removesuffix("_mtp")]
    for number, layout in enumerate(LAYOUTS + (SPARSE if "experts_per_tok" in str(settings) else [])):
        mcore, hf = tmp_path / f"mcore{number}", tmp_path / f"hf{number}"
        words = ["--ckpt_format", "torch", "--dialect", dialect, *layout.split(), "--allow_patched_attention"]
        if run("--to", "mcore", "--load", hf_models(model), "--save", mcore, *words):
            assert settings["model_type"] not in EVERYWHERE
            assert f"--dialect {dialect} has no name for it that is known" in capsys.readouterr().err
            return
        words = ["--dialect", dialect, "--allow_patched_attention"]
        assert run("--to", "hf", "--load", mcore, "--save", hf, *words) == 0
        assert_same(hf_models(model), hf)


# Forms that only are read


def rewritten(folder: Path, change: Callable[[State], None], protocol: int = 2, **args: Any) -> Path:
    """Every file of a checkpoint with its state dict and its arguments changed."""
    for path in folder.rglob(FILE):
        content = torch.load(path, weights_only=False)
        change(content["model"])
        content["args"] = Namespace(**(vars(content["args"]) | args))
        torch.save(content, path, pickle_protocol=protocol)
    return folder


def test_up_projections_in_two_parts_are_woven(tmp_path: Path) -> None:
    """``--mla-mm-split``: of each head the rows of one kind are in one tensor, those of the other in another."""
    model = tiny_model(**LATENT)
    write(tmp_path, model, Layout(tp=2, pp=2), dialect="mindspeed", args=ARGS)

    def split(state: State) -> None:
        for name in [name for name in state if name.endswith("_up_proj.weight")]:
            whole = state.pop(name)
            names = ("linear_qk_nope", "linear_qk_rope") if "linear_q_up" in name else ("linear_kv_nope", "linear_v")
            for part, rows in zip(names, (slice(0, 4), slice(4, None)), strict=True):
                heads = [head[rows] for head in whole.chunk(2)]  # two of the four heads are on a rank
                state[name.replace(name.split(".")[-2], part)] = torch.cat(heads)

    rewritten(tmp_path, split, mla_mm_split=True)
    assert read(tmp_path).keys() == model.keys()
    assert all(torch.equal(tensor, model[name]) for name, tensor in read(tmp_path).items())
    with TorchCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.dialects == ["mindspeed"]
    rewritten(tmp_path, lambda _: None, num_attention_heads=3)
    with pytest.raises(
        BridgeError, match=r"num_attention_heads 3 does not fit up projections of \(8, 8\) and \(8, 8\)"
    ):
        read(tmp_path)


@pytest.mark.parametrize("ep", [1, 2])
def test_tensor_parallel_ranks_with_experts_of_their_own(tmp_path: Path, ep: int) -> None:
    """``--moe-tp-extend-ep``: rank t of expert rank e has part e * TP + t of the experts, whole."""
    model = tiny_model(**LATENT)
    write(tmp_path / "made", model, Layout(tp=2, ep=2 * ep, etp=1), dialect="mindspeed", args=ARGS)
    for path in list((tmp_path / "made/iter_0000001").iterdir()):
        tp, part = (int(number) for number in path.name.split("_")[2:])
        assert part % 2 == tp
        group = "" if ep == 1 else f"_{part // 2:03d}"
        shutil.copytree(path, tmp_path / f"iter_0000001/mp_rank_{tp:02d}{group}")
    sizes = {"expert_model_parallel_size": ep, "expert_tensor_parallel_size": 2}
    rewritten(tmp_path / "iter_0000001", lambda _: None, moe_tp_extend_ep=True, **sizes)
    found = read(tmp_path / "iter_0000001")
    assert found.keys() == model.keys()
    assert all(torch.equal(tensor, model[name]) for name, tensor in found.items())


def test_layers_of_transformer_engine_and_experts_one_by_one(tmp_path: Path) -> None:
    """MindSpeed's ``--transformer-impl transformer_engine`` and runs without ``--moe-grouped-gemm``."""
    model = {name: tensor for name, tensor in tiny_model(**LATENT).items() if not name.startswith("mtp.")}
    write(tmp_path, model, dialect="mindspeed", args=ARGS)
    names = {"input_layernorm.weight": "self_attention.linear_qkv.layer_norm_weight"}

    def change(state: State) -> None:
        for name in list(state):
            _, _, inner = name.partition(".layers.0.")
            for old, new in (names | {"pre_mlp_layernorm.weight": "mlp.linear_fc1.layer_norm_weight"}).items():
                if inner == old:
                    state[name.replace(old, new)] = state.pop(name)
            if name.endswith("layers.1.mlp.experts.weight1"):
                for number, part in enumerate(state.pop(name).view(4, 16, -1)):
                    state[name.replace("weight1", f"local_experts.{number}.linear_fc1.weight")] = part.t().clone()

    rewritten(tmp_path, change)
    with TorchCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.dialects == ["mindspeed"]
    found = read(tmp_path)
    assert found.keys() == model.keys()
    assert all(torch.equal(tensor, model[name]) for name, tensor in found.items())


def test_files_of_mindspeeds_converter_are_read(tmp_path: Path) -> None:
    """It saves with pickle protocol 4, of dictionaries with a default, and notes virtual stages under another name."""
    model = tiny_model(tied=True)
    write(tmp_path, model, Layout(tp=2, pp=2, vpp=2), dialect="mindspeed", args=ARGS)
    for path in tmp_path.rglob(FILE):
        content = torch.load(path, weights_only=False)
        del content["args"].virtual_pipeline_model_parallel_size
        for key in ("model0", "model1"):
            content[key] = defaultdict(dict, content[key])
        torch.save(content, path, pickle_protocol=4)
    found = read(tmp_path)
    assert found.keys() == model.keys()
    assert all(torch.equal(tensor, model[name]) for name, tensor in found.items())


def test_names_of_the_sparse_attention_go_there_and_back() -> None:
    """Source: ``model_builder.py`` of MindSpeed-LLM, ``enable_dsa_indexer``."""
    theirs = ["k_norm.weight", "k_norm.bias", "weights_proj.weight", "wk.weight", "wq_b.weight"]
    ours = ["k_norm.weight", "k_norm.bias", "linear_weights_proj.weight", "linear_wk.weight", "linear_wq_b.weight"]
    for layer in ("decoder.layers.3", "mtp.layers.0.transformer_layer"):
        stored = [f"{layer}.self_attention.dsa_indexer.{name}" for name in theirs]
        canonical = [f"{layer}.self_attention.core_attention.indexer.{name}" for name in ours]
        assert [slot_of(name, "mindspeed").name for name in canonical] == stored
        assert list(canonical_names(stored).values()) == canonical


def test_a_run_of_pai_that_untied_the_embeddings(hf_models: Models, tmp_path: Path) -> None:
    """Its scripts give ``--untie-embeddings-and-output-weights`` to every model of more than one stage."""
    words = ["--to", "mcore", "--ckpt_format", "torch", "--pp", "2", "--dialect", "pai"]
    assert run(*words, "--load", hf_models("qwen2_tied"), "--save", tmp_path / "mcore") == 0

    def train(state: State) -> None:
        if "output_layer.weight" in state:
            state["output_layer.weight"] += 1

    (tmp_path / "mcore/manifest.json").unlink()
    rewritten(tmp_path / "mcore", train, untie_embeddings_and_output_weights=True)
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "hf") == 0
    with Checkpoint(tmp_path / "hf") as after:
        assert torch.equal(after.get("lm_head.weight"), after.get("model.embed_tokens.weight") + 1)
    assert '"tie_word_embeddings": false' in (tmp_path / "hf/config.json").read_text()


# What is refused


def test_a_wrong_dialect_is_refused(hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert tuple(DIALECTS) == OFFERED
    base, mcore = hf_models("deepseek_v3"), tmp_path / "mcore"
    write_torch = ["--to", "mcore", "--ckpt_format", "torch", "--load", base]
    assert run(*write_torch, "--save", mcore) == 0
    assert run(*write_torch, "--save", tmp_path / "theirs", "--dialect", "mindspeed") == 0
    capsys.readouterr()
    for words, said in [
        (["--to", "hf", "--load", mcore, "--dialect", "mindspeed"], "mcore has the names of mcore or pai"),
        (["--to", "hf", "--load", mcore, "--dialect", "mcore-local"], "mcore has the names of mcore or pai"),
        (["--to", "hf", "--load", tmp_path / "theirs", "--dialect", "mcore"], "theirs has the names of mindspeed"),
        (["--to", "hf", "--load", base, "--dialect", "pai"], "is a checkpoint of Hugging Face, which has no dialects"),
        (["--to", "mcore", "--load", base, "--dialect", "mindspeed"], "format torch only; give --ckpt_format torch"),
        ([*write_torch, "--dialect", "pai", "--make_vocab_size_divisible_by", 64], "does not pad the vocabulary"),
        ([*write_torch, "--dialect", "mindspeed", "--tp", 4], "the vocabulary of 70 rows cannot be cut evenly"),
    ]:
        assert run(*words, "--save", tmp_path / "out") == 2, words
        assert said in capsys.readouterr().err, words
        assert not (tmp_path / "out").exists()
    assert run("inspect", tmp_path / "theirs") == 0
    assert "torch, family deepseek, names of mindspeed" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "said"),
    [
        ({"schedules_method": "dualpipev"}, "have schedules_method dualpipev, whose order of layers is not read"),
        ({"noop_layers": "3,7"}, "have noop_layers 3,7, whose order"),
        ({"qk_pos_emb_head_dim": None}, "linear_qkv.weight: args have no qk_pos_emb_head_dim"),
        (
            {"qk_pos_emb_head_dim": 8},
            r"linear_qkv.weight \(20, 16\): its rows are not those of a query, the latent and 8 rotary",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_refused(tmp_path: Path, args: dict[str, Any], said: str) -> None:
    write(
        tmp_path,
        tiny_model(**LATENT, q_lora=args.get("qk_pos_emb_head_dim", 4) is not None),
        dialect="mindspeed",
        args=ARGS,
    )
    rewritten(tmp_path, lambda _: None, **args)
    with pytest.raises(BridgeError, match=said):
        read(tmp_path)


def test_every_tensor_counts(hf_models: Models, tmp_path: Path) -> None:
    """Each one that is missing, has another name, or too few rows for what it holds is an error before anything is written."""
    base, mcore = hf_models("deepseek_v3_mtp"), tmp_path / "mcore"
    words = ["--to", "mcore", "--ckpt_format", "torch", "--tp", "2", "--dialect", "mindspeed"]
    assert run(*words, "--load", base, "--save", mcore) == 0
    one, other = sorted(mcore.rglob(FILE))
    before, aside = torch.load(one, weights_only=False), torch.load(other, weights_only=False)

    def opened() -> None:
        with (source := open_source(mcore)).tensors:
            plan(source, Target("hf"))

    def refused(change: Callable[[State, str], None], name: str, *, both: bool) -> None:
        for path, content in ((one, before), (other, aside)):
            state = dict(content["model"])
            if both or path == one:
                change(state, name)
            torch.save({**content, "model": state}, path)
        with pytest.raises(BridgeError):
            opened()

    def renamed(state: State, name: str) -> None:
        state[name + "x"] = state.pop(name)

    def shorter(state: State, name: str) -> None:
        state[name] = state[name][:-1]

    names = [name for name in before["model"] if "layers.2." not in name and "layers.3." not in name]
    assert len(names) > 35
    for name in names:
        refused(dict.__delitem__, name, both=True)
        refused(renamed, name, both=True)
        refused(shorter, name, both=False)
