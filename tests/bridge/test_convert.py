"""Whole checkpoints there and back, through the command: every family, form and layout, bit for bit; bad input; kills."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finebridge.finetune.cli import main
from finebridge.storage.manifest import verify
from finebridge.storage.publish import publish
from finebridge.storage.safetensors_io import Checkpoint
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from .conftest import FURTHER, MODELS, add_further, thinned

Models = Callable[[str], Path]
ROOT = Path(__file__).parents[2]
LAYOUTS = ["", "--tp 2", "--pp 2", "--tp 4 --pp 2 --vpp 2", "--pp 4", "--pp 2 --num_layer_list 1,3"]
# One layout a family in the default tier.
KEPT = {
    "llama": "--pp 4", "llama_tied": "--tp 2", "mistral": "--pp 2", "qwen2": "--tp 2", "qwen2_tied": "--pp 2",
    "qwen3": "--pp 2 --num_layer_list 1,3", "qwen3_tied": "", "qwen3_moe": "--tp 2 --ep 2 --etp 2 --pp 2",
    "qwen3_moe_mixed": "--tp 2 --ep 4", "seed_oss": "--tp 2", "deepseek_v2": "--ep 2", "deepseek_v3": "--tp 4 --pp 2 --vpp 2",
}  # fmt: skip
SPARSE = ["--ep 2", "--tp 2 --ep 2 --etp 2 --pp 2", "--tp 2 --ep 4"]


PATCHED = ["--allow_patched_attention"]  # what is not needed does no harm


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.get(name).clone() for name in checkpoint}


def assert_same(one: Path, other: Path) -> None:
    first, second = tensors(one), tensors(other)
    assert first.keys() == second.keys()
    for name, value in first.items():
        assert value.dtype == second[name].dtype
        assert torch.equal(value, second[name]), name


def layouts() -> list[tuple[str, str]]:
    """Each family in every layout that its heads allow; few query groups limit TP."""
    return [
        (name, layout)
        for name, settings in MODELS.items()
        for layout in LAYOUTS + (SPARSE if "n_routed_experts" in settings or "num_experts" in settings else [])
        if "--tp 4" not in layout or name.startswith("deepseek")
    ]


@pytest.mark.parametrize(("name", "layout"), thinned(layouts(), KEPT.items()))
def test_torch_and_back(name: str, layout: str, hf_models: Models, tmp_path: Path) -> None:
    base = hf_models(name)
    words = ["--ckpt_format", "torch", *layout.split(), *PATCHED]
    assert run("--from", "hf", "--to", "mcore", "--load", base, "--save", tmp_path / "mcore", *words) == 0
    assert run("--from", "mcore", "--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "hf", *PATCHED) == 0
    assert_same(base, tmp_path / "hf")


def test_rows_above_the_tokenizers_own_are_kept(hf_models: Models, tmp_path: Path) -> None:
    """Training may note the tokenizer's length as vocab_size; config.json knows the rows."""
    base = hf_models("qwen3")
    assert run("--to", "mcore", "--load", base, "--save", tmp_path / "mcore", "--ckpt_format", "torch") == 0
    path = tmp_path / "mcore/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    content["args"].vocab_size -= 5
    torch.save(content, path)
    (tmp_path / "mcore/manifest.json").unlink()  # training writes none
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "hf") == 0
    assert_same(base, tmp_path / "hf")


@pytest.mark.parametrize("name", thinned(MODELS, ["qwen2_tied", "qwen3_moe", "deepseek_v3"]))
def test_torch_dist_and_back(name: str, hf_models: Models, tmp_path: Path) -> None:
    base = hf_models(name)
    assert run("--to", "mcore", "--load", base, "--save", tmp_path / "mcore", *PATCHED) == 0
    assert (tmp_path / "mcore/latest_checkpointed_iteration.txt").read_text() == "release"
    assert verify(tmp_path / "mcore")["kind"] == "torch_dist"
    words = ["--max_shard_size", "20KB", *PATCHED]
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "hf", *words) == 0
    assert_same(base, tmp_path / "hf")
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 1


FORMS = [
    "--ckpt_format torch --pp 2 --ep 2",
    "--ckpt_format torch --tp 2 --dialect mcore-local",
    "--ckpt_format torch_dist",
]


@pytest.mark.parametrize("form", thinned(FORMS, FORMS[:1]))
@pytest.mark.parametrize("name", FURTHER)
def test_further_layers_through_megatrons_forms(name: str, form: str, hf_models: Models, tmp_path: Path) -> None:
    base = tmp_path / "base"
    base.mkdir()
    values = tensors(hf_models(name))
    add_further(name, values)
    save_file(values, base / "model.safetensors", metadata={"format": "pt"})
    shutil.copy(hf_models(name) / "config.json", base)
    assert run("--to", "mcore", "--load", base, "--save", tmp_path / "mcore", *form.split()) == 0
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "hf") == 0
    assert_same(base, tmp_path / "hf")


@pytest.mark.parametrize("name", thinned(MODELS, {"qwen3_moe_mixed", "qwen3_next"}))
def test_from_one_layout_and_format_to_another(name: str, hf_models: Models, tmp_path: Path) -> None:
    steps = [
        "--ckpt_format torch --tp 2 --pp 2",
        "--ckpt_format torch_dist",
        "--ckpt_format torch --pp 4 --dialect mcore-local",
    ]
    place = hf_models(name)
    for number, step in enumerate(steps):
        assert run("--to", "mcore", "--load", place, "--save", tmp_path / str(number), *step.split(), *PATCHED) == 0
        place = tmp_path / str(number)
    assert run("--to", "hf", "--load", place, "--save", tmp_path / "hf", *PATCHED) == 0
    assert_same(hf_models(name), tmp_path / "hf")
    assert run("verify", hf_models(name), tmp_path / "0") == 0
    assert run("verify", tmp_path / "1", tmp_path / "2") == 0


@pytest.mark.parametrize(
    "name", thinned(["llama", "qwen2", "qwen3_tied", "mistral", "qwen3_moe"], ["llama", "qwen3_moe"])
)
def test_a_config_is_made_from_the_arguments(name: str, hf_models: Models, tmp_path: Path) -> None:
    """Without any Hugging Face folder: what comes out loads in transformers and computes the same."""
    assert run("--to", "mcore", "--load", hf_models(name), "--save", tmp_path / "mcore") == 0
    (tmp_path / "mcore/config.json").unlink()
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "hf") == 0
    assert_same(hf_models(name), tmp_path / "hf")
    ids = torch.arange(20)[None]
    one, other = (AutoModelForCausalLM.from_pretrained(place).eval() for place in (hf_models(name), tmp_path / "hf"))
    with torch.no_grad():
        assert torch.equal(one(ids).logits, other(ids).logits)


def test_the_config_of_another_size_is_refused(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--to", "mcore", "--load", hf_models("qwen3"), "--save", tmp_path / "mcore") == 0
    other = tmp_path / "other"
    other.mkdir()
    config = json.loads((hf_models("qwen3") / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    words = ["--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "hf", "--hf_config", other]
    assert run(*words) == 2
    said = "decoder.layers.0.mlp.linear_fc1.weight: (128, 32) in Megatron-Core, where config.json makes it (192, 32)"
    assert said in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_what_lies_beside_is_carried_and_dtypes_change(hf_models: Models, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(hf_models("deepseek_v3"), base)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_x.py"):
        (base / name).write_text("{}")
    assert run("--to", "mcore", "--load", base, "--save", tmp_path / "mcore", "--dtype", "bf16", "--iteration", 7) == 0
    assert (tmp_path / "mcore/latest_checkpointed_iteration.txt").read_text() == "7"
    assert run("--to", "hf", "--load", tmp_path / "mcore/", "--save", tmp_path / "hf") == 0
    assert {"tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_x.py"} <= {
        p.name for p in (tmp_path / "hf").iterdir()
    }
    before, after = tensors(base), tensors(tmp_path / "hf")
    assert all(torch.equal(value.bfloat16(), after[name]) for name, value in before.items())
    assert json.loads((tmp_path / "hf/config.json").read_text())["dtype"] == "bfloat16"


def test_a_router_bias_in_fp32_stays(hf_models: Models, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(hf_models("deepseek_v3"), base)
    values = {name: value if "correction" in name else value.bfloat16() for name, value in tensors(base).items()}
    save_file(values, base / "model.safetensors", metadata={"format": "pt"})
    for words in (["--ckpt_format", "torch"], []):
        shutil.rmtree(tmp_path / "mcore", ignore_errors=True)
        shutil.rmtree(tmp_path / "hf", ignore_errors=True)
        assert run("--to", "mcore", "--load", base, "--save", tmp_path / "mcore", "--dtype", "bf16", *words) == 0
        assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "hf") == 0
        assert_same(base, tmp_path / "hf")


def test_the_plan_is_shown_and_nothing_is_written(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--to", "mcore", "--load", hf_models("qwen3_moe"), "--dry_run", "--ckpt_format", "torch", "--tp", 2) == 0
    said = capsys.readouterr().out
    assert "family qwen3-moe, 63 tensors" in said
    assert "for TP 2, PP 1, VPP 1, EP 1, ETP 2" in said
    assert list(tmp_path.iterdir()) == []


def test_inspect_tells_form_layout_and_tensors(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["--ckpt_format", "torch", "--tp", 2, "--pp", 2]
    assert run("--to", "mcore", "--load", hf_models("qwen3"), "--save", tmp_path / "mcore", *words) == 0
    capsys.readouterr()
    assert run("inspect", tmp_path / "mcore", "--tensors") == 0
    said = capsys.readouterr().out
    assert f"{tmp_path / 'mcore'}: torch, family qwen3" in said
    assert "35 tensors" in said
    assert "written for TP 2, PP 2, VPP 1, EP 1" in said
    assert "decoder.layers.3.self_attention.linear_qkv.weight [128, 32] torch.float32" in said
    assert run("inspect", hf_models("qwen3")) == 0
    assert ": hf, family qwen3" in capsys.readouterr().out


def test_verify_names_what_differs(hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    other = tmp_path / "other"
    shutil.copytree(hf_models("qwen3"), other)
    values = tensors(other)
    values["model.layers.1.mlp.up_proj.weight"][3, 4] += 1
    save_file(values, other / "model.safetensors")
    capsys.readouterr()  # of the model's making, if it was made here
    assert run("verify", hf_models("qwen3"), other) == 1
    said = capsys.readouterr()
    assert said.err == "decoder.layers.1.mlp.linear_fc1.weight: 1 of 4096 values differ\n"
    assert said.out == "1 tensors differ\n"


def test_mindspeeds_names_are_taken(hf_models: Models, tmp_path: Path) -> None:
    words = [
        "--load-model-type", "hf", "--save-model-type", "mg", "--load-dir", hf_models("qwen3"), "--save-dir", tmp_path / "mg",
        "--target-tensor-parallel-size", 2, "--target-pipeline-parallel-size", 2, "--num-layer-list", "1,3",
        "--model-type-hf", "qwen3", "--ckpt_format", "torch",
    ]  # fmt: skip
    assert run(*words) == 0
    assert sorted(path.name for path in (tmp_path / "mg/release").iterdir()) == [
        "mp_rank_00_000", "mp_rank_00_001", "mp_rank_01_000", "mp_rank_01_001",
    ]  # fmt: skip


BAD: dict[str, tuple[list[str], str]] = {
    "no such folder": (["--load", "/no/where"], "--load /no/where: no such folder"),
    "another side": (["--from", "mcore"], "--from mcore: .* holds a checkpoint of the form hf"),
    "no save": (["--save", ""], "exists already|--save is missing"),
    "layout of a form that has none": (["--to", "hf", "--tp", "2"], "are for --to mcore"),
    "layout that cannot be, also where files are the same for all": (["--tp", "3"], "--tp 3: 4 attention heads"),
    "groups": (["--ckpt_format", "torch", "--tp", "4"], "query groups|--tp"),
    "layers": (["--ckpt_format", "torch", "--pp", "3"], "layers"),
    "layer list": (["--ckpt_format", "torch", "--pp", "2", "--num_layer_list", "1,2"], "layer"),
    "no experts": (["--ckpt_format", "torch", "--ep", "2"], "experts|--ep"),
    "family": (["--model_type_hf", "nothing"], "--model_type_hf nothing: families are"),
    "size": (["--max_shard_size", "5XB"], "'5XB' is not a size"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_flags_are_exit_code_2(
    name: str, hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import re

    words, message = BAD[name]
    given = {"--to": "mcore", "--load": str(hf_models("qwen3")), "--save": str(tmp_path / "out")}
    given |= dict(zip(words[::2], words[1::2], strict=True))
    assert run(*[word for pair in given.items() for word in pair]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert "Traceback" not in error
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("name", ["groups", "layers", "layer list", "no experts"])
def test_a_plan_that_cannot_be_carried_out_is_not_shown(
    name: str, hf_models: Models, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("--to", "mcore", "--load", hf_models("qwen3"), "--dry_run", *BAD[name][0]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_an_existing_folder_is_never_written_over(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    words = ["--to", "mcore", "--load", hf_models("qwen3"), "--save", tmp_path / "out"]
    assert run(*words) == 2
    assert "exists already; choose another folder or give --overwrite" in capsys.readouterr().err
    assert run(*words, "--overwrite") == 0
    assert run("--to", "mcore", "--load", tmp_path / "out", "--save", tmp_path / "out", "--overwrite") == 2
    assert "is or contains" in capsys.readouterr().err
    assert verify(tmp_path / "out")


def test_a_file_that_is_damaged_or_missing(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for form in ("torch", "torch_dist"):
        mcore = tmp_path / form
        assert run("--to", "mcore", "--load", hf_models("qwen3"), "--save", mcore, "--ckpt_format", form) == 0
        for file in [path for path in (mcore / "release").rglob("*") if path.is_file()]:
            whole = file.read_bytes()
            for broken in (whole[: len(whole) // 2], None):
                file.unlink()
                if broken is not None:
                    file.write_bytes(broken)
                if file.name == "metadata.json" or (file.name, broken) == ("common.pt", None):
                    continue  # the format's name, and Megatron's arguments, for which config.json stands
                assert run("--to", "hf", "--load", mcore, "--save", tmp_path / "hf") == 2, file
                assert "Traceback" not in capsys.readouterr().err
                assert not (tmp_path / "hf").exists()
            file.write_bytes(whole)


def test_a_flipped_bit_is_found_by_the_manifest(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    mcore = tmp_path / "mcore"
    assert run("--to", "mcore", "--load", hf_models("qwen3"), "--save", mcore, "--ckpt_format", "torch") == 0
    file = mcore / "release/mp_rank_00/model_optim_rng.pt"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    assert run("--to", "hf", "--load", mcore, "--save", tmp_path / "hf") == 2
    assert "model_optim_rng.pt" in capsys.readouterr().err
    assert not (tmp_path / "hf").exists()


def test_the_users_scripts(hf_models: Models, tmp_path: Path) -> None:
    import os

    environment = {**os.environ, "FINEBRIDGE_PYTHON": sys.executable}

    def script(*words: object) -> None:
        subprocess.run(["bash", *map(str, words)], check=True, cwd=tmp_path, env=environment, capture_output=True)

    script(ROOT / "bridge/hf2mcore.sh", hf_models("qwen2"), "mcore", 2, 2)
    assert (tmp_path / "mcore/release/mp_rank_01_001/model_optim_rng.pt").is_file()
    script(ROOT / "bridge/mcore2hf.sh", "mcore", "hf", hf_models("qwen2"))
    assert_same(hf_models("qwen2"), tmp_path / "hf")
    script(ROOT / "bridge/hf2mcore.sh", hf_models("qwen2"), "dist")
    assert (tmp_path / "dist/release/.metadata").is_file()


def test_a_conversion_is_kept_beside_the_model(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """MindSpeed-LLM's flag: made once for files, flags and layout; a changed file makes it anew."""
    model = Path(shutil.copytree(hf_models("qwen3_moe"), tmp_path / "model"))
    words = ["--enable-hf2mg-convert", "--load", model, "--model-type-hf", "qwen3-moe"]
    words += ["--target-tensor-parallel-size", 2, "--target-expert-parallel-size", 2]
    place = model / "megatron_cache_tp2pp1ep2"

    def said() -> str:
        assert run(*words) == 0
        return capsys.readouterr().out.splitlines()[-1]

    assert said() == f"wrote {place}"
    assert (place / "release" / "mp_rank_01_001" / "model_optim_rng.pt").is_file()
    assert said() == f"reused {place}"
    assert run("verify", place, model) == 0
    capsys.readouterr()
    with (model / "config.json").open("a") as stream:
        stream.write(" ")
    assert said() == f"wrote {place}"
    assert said() == f"reused {place}"
    words += ["--pp", 2]
    assert said() == f"wrote {model / 'megatron_cache_tp2pp2ep2'}"
    for flag in ("--mg-cache-dir", "--mg-save-dir"):
        assert run(*words, flag, tmp_path / flag) == 0
        assert verify(tmp_path / flag)["kind"] == "torch"
    words += ["--dtype", "bf16"]
    assert said() == f"wrote {model / 'megatron_cache_tp2pp2ep2'}", "another flag, the same place"
    assert run("--to", "mcore", "--load", model, "--save", tmp_path / "whole") == 0
    assert not list((tmp_path / "whole").rglob("*mp_rank*")), "what is kept is no part of the model"


def test_a_conversion_to_keep_says_what_does_not_go_with_it(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ["--enable-hf2mg-convert", "--load", hf_models("qwen3")]
    for words, message in (
        ([*keep, "--save", tmp_path / "x"], "leave --save, --overwrite and LoRA out"),
        ([*keep, "--to", "hf"], "is from a Hugging Face model"),
        ([*keep, "--overwrite"], "leave --save, --overwrite and LoRA out"),
        (["--to", "mcore", "--load", hf_models("qwen3"), "--mg-cache-dir", tmp_path / "x"], "--mg_cache_dir is for"),
        ([*keep, "--tp", 3, "--mg-cache-dir", tmp_path / "x"], "--tp 3: 4 attention heads"),
        (["--load", hf_models("qwen3"), "--save", tmp_path / "x"], "--to is missing"),
    ):
        assert run(*words) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "x").exists()


def test_a_conversion_to_keep_replaces_nothing_else(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    keep = ["--enable-hf2mg-convert", "--load", hf_models("qwen3"), "--mg-cache-dir"]
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes").write_text("years of work")
    assert run("--to", "mcore", "--load", hf_models("qwen3"), "--save", tmp_path / "published") == 0
    (tmp_path / "file").touch()
    for name in ("mine", "published", "file"):
        before = sorted((tmp_path / name).rglob("*"))
        assert run(*keep, tmp_path / name) == 2
        assert "holds something else than a conversion that is kept there" in capsys.readouterr().err
        assert sorted((tmp_path / name).rglob("*")) == before
    with publish(tmp_path / "merged", kind="merged", made_from={}) as folder:
        shutil.copytree(hf_models("qwen3"), folder, dirs_exist_ok=True)
    for words in (
        ["--enable-hf2mg-convert", "--load", tmp_path / "merged"],
        [*keep, tmp_path / "merged" / "deep" / "x"],
    ):
        assert run(*words) == 2, "a published model would no longer be what its manifest says"
        assert f"{tmp_path / 'merged'}: its manifest lists its files" in capsys.readouterr().err
    assert verify(tmp_path / "merged")["kind"] == "merged"
    (tmp_path / "empty").mkdir()
    assert run(*keep, tmp_path / "empty") == 0
    assert verify(tmp_path / "empty")["kind"] == "torch"
