"""The merge against PEFT's own numbers; what cannot be merged truly is refused and leaves nothing."""

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finebridge
import pytest
import torch
from finebridge.merge.lora_delta import AdapterError
from finebridge.merge.merge_lora import DTYPES, main, merge, parser
from finebridge.storage.manifest import verify
from finebridge.storage.safetensors_io import Checkpoint
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import load, logits, peft_logits, save_base

MakeAdapter = Callable[..., Path]
Edited = Callable[..., Path]
Q0 = "model.layers.0.self_attn.q_proj"
KEY = f"base_model.model.{Q0}.lora_A.weight"


def tensors(folder: Path) -> dict[str, torch.Tensor]:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.get(name).clone() for name in checkpoint}


def by_hand(base: Path, adapter: Path, scale: float) -> dict[str, torch.Tensor]:
    """base + scale * B @ A in fp32, straight from PEFT's files."""
    factors = load_file(adapter / "adapter_model.safetensors")
    summed = {name: value.float() for name, value in tensors(base).items()}
    for name in summed:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in factors:
            summed[name] += (factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]) * scale
    return summed


def arguments(base: Path, adapter: Path, output: Path, *more: str) -> list[str]:
    names = {"--base_model_path": base, "--adapter_model_path": adapter, "--output_path": output}
    return [str(word) for pair in names.items() for word in pair] + list(more)


def assert_refused(base: Path, adapter: Path, tmp_path: Path, message: str, **settings: Any) -> None:
    folder = tmp_path / "new"
    with pytest.raises(AdapterError, match=message):
        merge(base, adapter, folder / "out", **settings)
    assert not folder.exists() or list(folder.iterdir()) == []


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True},
        {"r": 3, "lora_alpha": 16},
        {"target_modules": "all-linear"},
        {"target_modules": ["lm_head"]},  # PEFT then stores the head's own weight beside the factors
        {"init_lora_weights": "orthogonal"},
    ],
    ids=str,
)
def test_merged_logits_are_pefts(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, settings: dict[str, Any]
) -> None:
    adapter = make_adapter(**settings)
    truth = peft_logits(base, adapter)
    assert (truth - logits(load(base))).abs().max() > 0.01, "the adapter must matter"
    changes = merge(base, adapter, tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - truth).abs().max() < 1e-5
    assert len(changes) * 2 == len(load_file(adapter / "adapter_model.safetensors"))
    assert all(change > 0 for change in changes.values())


@pytest.mark.parametrize(
    ("settings", "scale"), [({"lora_alpha": 8}, 2.0), ({"lora_alpha": 8, "use_rslora": True}, 4.0)], ids=str
)
@pytest.mark.parametrize("save_dtype", DTYPES)
def test_every_tensor_is_the_fp32_sum_rounded_once(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, save_dtype: str, settings: dict[str, Any], scale: float
) -> None:
    adapter = make_adapter(**settings)
    merge(base, adapter, tmp_path / "out", save_dtype)
    got, wanted = tensors(tmp_path / "out"), by_hand(base, adapter, scale)
    assert list(got) == list(tensors(base))
    for name, value in wanted.items():
        assert torch.equal(got[name], value.to(getattr(torch, DTYPES[save_dtype]))), name


def test_a_bf16_base_is_summed_in_fp32(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(base)
    merge(base, adapter, tmp_path / "bf16", "bf16")
    merge(base, adapter, tmp_path / "fp32", "fp32")
    stored, wanted = tensors(base), by_hand(base, adapter, 2.0)
    got, fine = tensors(tmp_path / "bf16"), tensors(tmp_path / "fp32")
    for name, value in wanted.items():
        assert torch.equal(fine[name], value), name
        assert torch.equal(got[name], value.bfloat16()), name
    assert torch.equal(got["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert (logits(load(tmp_path / "fp32")) - peft_logits(base, adapter)).abs().max() < 1e-5


def test_relative_changes_are_those_of_the_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    changes = merge(base, adapter, tmp_path / "out")
    before, after = tensors(base), tensors(tmp_path / "out")
    assert set(changes) == {name for name in before if not torch.equal(before[name], after[name])}
    for name, change in changes.items():
        assert change == pytest.approx(float((after[name] - before[name]).norm() / before[name].norm()), rel=1e-4)


def test_the_output_loads_whole_and_verifies(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, adapter, tmp_path / "out", "bf16")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    manifest = verify(tmp_path / "out")
    assert manifest["kind"] == "merged"
    assert manifest["made_from"] == {"base": str(base), "adapter": str(adapter), "save_dtype": "bf16"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("save_dtype", DTYPES)
def test_the_config_says_the_dtype_and_keeps_the_rest(
    base: Path, adapter: Path, tmp_path: Path, save_dtype: str
) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    config = json.loads((own / "config.json").read_text())
    del config["dtype"]
    (own / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16", "ours": "ä"}))
    merge(own, adapter, tmp_path / "out", save_dtype)
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {
        "dtype": DTYPES[save_dtype],
        "ours": "ä",
    }


def test_fp32_is_the_default(base: Path, adapter: Path, tmp_path: Path) -> None:
    assert parser().get_default("save_dtype") == "fp32"
    assert main(arguments(base, adapter, tmp_path / "out")) == 0
    assert {value.dtype for value in tensors(tmp_path / "out").values()} == {torch.float32}


def test_sharded_in_and_out_is_the_same_merge(base: Path, adapter: Path, tmp_path: Path) -> None:
    shards = save_base(tmp_path / "sharded", shards="20KB")
    assert len(list(shards.glob("model-*.safetensors"))) > 3
    merge(base, adapter, tmp_path / "one")
    merge(shards, adapter, tmp_path / "many", max_shard_size="20KB")
    assert [path.name for path in (tmp_path / "one").glob("*.safetensors*")] == ["model.safetensors"]
    assert len(list((tmp_path / "many").glob("model-*-of-*.safetensors"))) > 3
    one, many = tensors(tmp_path / "one"), tensors(tmp_path / "many")
    assert set(one) == set(many)
    assert all(torch.equal(value, many[name]) for name, value in one.items())
    assert torch.equal(logits(load(tmp_path / "one")), logits(load(tmp_path / "many")))


def test_a_base_that_transformers_saved_twice_is_read_as_transformers_reads_it(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    """Saving one file over a sharded save removes the shards but leaves their index; from_pretrained takes the file."""
    both = save_base(tmp_path / "both", shards="20KB")
    load(base).save_pretrained(both)
    assert (both / "model.safetensors.index.json").is_file()
    truth = peft_logits(both, adapter)
    merge(both, adapter, tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - truth).abs().max() < 1e-5


def test_fp16_overflow_is_an_error_and_leaves_no_output(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    values = tensors(base)
    values["model.norm.weight"][3] = 1e5
    save_file(values, own / "model.safetensors", metadata={"format": "pt"})
    assert_refused(own, adapter, tmp_path, r"model\.norm\.weight: .*overflows fp16; use bf16", save_dtype="fp16")
    merge(own, adapter, tmp_path / "out", "bf16")
    assert tensors(tmp_path / "out")["model.norm.weight"][3] == torch.tensor(1e5).bfloat16()


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("factor", ["lora_A", "lora_B"])
def test_an_adapter_that_is_not_finite_is_refused(
    base: Path, edited: Edited, tmp_path: Path, factor: str, bad: float
) -> None:
    broken = edited(lambda t: t[KEY.replace("lora_A", factor)].view(-1)[-1:].fill_(bad))
    assert_refused(base, broken, tmp_path, rf"{Q0}: the adapter holds values that are not finite")


def test_a_base_that_is_not_finite_is_refused(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    values = tensors(base)
    values["model.norm.weight"][0] = float("nan")
    save_file(values, own / "model.safetensors")
    assert_refused(own, adapter, tmp_path, r"model\.norm\.weight: the merged weight holds values that are not finite")


def rename(to: str) -> Callable[[dict[str, torch.Tensor]], None]:
    def change(values: dict[str, torch.Tensor]) -> None:
        for key in [key for key in values if Q0 in key]:
            values[key.replace(Q0, to)] = values.pop(key)

    return change


def narrower(values: dict[str, torch.Tensor]) -> None:
    values[KEY] = values[KEY][:, :-1].contiguous()


CHANGES: dict[str, tuple[Callable[[dict[str, torch.Tensor]], object], str]] = {
    "another name": (rename("model.layers.7.self_attn.q_proj"), r"layers\.7\.self_attn\.q_proj\.weight: .*the base on disk has none"),
    "another shape": (narrower, rf"{Q0}\.weight: the base's shape is \(32, 32\), the adapter was made for \(32, 31\)"),
    "a tensor left over": (lambda t: t.update({"base_model.model.x.weight": torch.ones(1)}), r"1 tensors are not LoRA.*model\.x\.weight"),
    "B without A": (lambda t: t.pop(KEY), rf"1 tensors are not LoRA.*{Q0}\.lora_B"),
    "A without B": (lambda t: t.pop(KEY.replace("lora_A", "lora_B")), rf"{Q0}: lora_A without lora_B"),
    "ranks that differ": (lambda t: t.update({KEY: torch.ones(5, 32)}), rf"{Q0}: lora_A \(5, 32\) and lora_B \(32, 4\) do not fit"),
    "empty as ZeRO-3 leaves it": (lambda t: t.update({KEY: torch.ones(0)}), rf"{Q0}: lora_A \(0,\)"),
    "nothing": (lambda t: t.clear(), "holds no LoRA factors"),
}  # fmt: skip


@pytest.mark.parametrize("name", CHANGES)
def test_an_adapter_that_does_not_fit_is_refused_by_name(base: Path, edited: Edited, tmp_path: Path, name: str) -> None:
    change, message = CHANGES[name]
    assert_refused(base, edited(change), tmp_path, message)


@pytest.mark.parametrize(
    ("settings", "key"),
    [
        ({"use_dora": True}, "use_dora"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"bias": "lora_only"}, "bias"),
        ({"lora_bias": True}, "lora_bias"),
        ({"rank_pattern": {"q_proj": 2}}, "rank_pattern"),
        ({"alpha_pattern": {"q_proj": 32}}, "alpha_pattern"),
        ({"trainable_token_indices": [1, 2]}, "trainable_token_indices"),
        ({"target_modules": ["embed_tokens", "q_proj"]}, r"embed_tokens\."),
    ],
    ids=str,
)
def test_other_kinds_of_adapters_are_refused_by_name(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, settings: dict[str, Any], key: str
) -> None:
    assert_refused(base, make_adapter(**settings), tmp_path, key)


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
        merge(base, adapter, tmp_path / "out")
    except AdapterError as error:
        assert next(iter(settings)) in str(error)  # noqa: PT017 - either outcome is right
    else:
        assert (logits(load(tmp_path / "out")) - truth).abs().max() < 1e-5


def test_another_peft_type_is_refused(base: Path, edited: Edited, tmp_path: Path) -> None:
    assert_refused(base, edited(peft_type="IA3"), tmp_path, "peft_type is 'IA3'; only LORA")


@pytest.mark.parametrize("tied", [True, False])
def test_an_adapter_of_a_tied_head_is_refused(make_adapter: MakeAdapter, tmp_path: Path, *, tied: bool) -> None:
    base = save_base(tmp_path / "base", tied=tied)
    adapter = make_adapter(base, target_modules=["lm_head", "q_proj"], save_embedding_layers=False)
    if tied:
        assert_refused(base, adapter, tmp_path, r"lm_head\.weight: the base ties its embeddings")
    else:
        assert "lm_head.weight" in merge(base, adapter, tmp_path / "out")
        assert (logits(load(tmp_path / "out")) - peft_logits(base, adapter)).abs().max() < 1e-5


def test_a_tied_base_stays_tied(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base)
    merge(base, adapter, tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - peft_logits(base, adapter)).abs().max() < 1e-5


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


def test_integer_buffers_are_carried_as_they_are(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    save_file(tensors(base) | {"model.counts": torch.arange(3)}, own / "model.safetensors")
    merge(own, adapter, tmp_path / "out", "bf16")
    assert torch.equal(tensors(tmp_path / "out")["model.counts"], torch.arange(3))


def test_an_existing_output_needs_overwrite(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").touch()
    assert main(arguments(base, adapter, tmp_path / "out")) == 2
    assert "exists already; choose another --output_path or give --overwrite" in capsys.readouterr().err
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
    "no adapter weights": (lambda x: (x / "adapter" / "adapter_model.safetensors").unlink(), "adapter_model.safetensors: missing"),
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


@pytest.mark.parametrize("size", ["5XB", "0", "inf"])
def test_a_bad_shard_size_is_exit_code_2(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], size: str
) -> None:
    assert main(arguments(base, adapter, tmp_path / "out", "--max_shard_size", size)) == 2
    assert f"'{size}' is not a" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_what_was_merged_is_said_and_an_untrained_adapter_too(
    base: Path, adapter: Path, edited: Edited, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(base, adapter, tmp_path / "out")) == 0
    said = capsys.readouterr()
    assert f"merged 6 weights into {tmp_path / 'out'} (fp32); relative change " in said.out
    assert "warning" not in said.err
    untrained = edited(lambda t: [value.zero_() for key, value in t.items() if "lora_B" in key])
    assert main(arguments(base, untrained, tmp_path / "same")) == 0
    assert "the adapter changes nothing: every lora_B is zero" in capsys.readouterr().err
    assert all(torch.equal(value, tensors(base)[name]) for name, value in tensors(tmp_path / "same").items())


def test_the_adapters_tokenizer_wins_and_the_bases_other_files_are_carried(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    own, trained = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(base, own)
    shutil.copytree(adapter, trained)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_x.py", "LICENSE"):
        (own / name).write_text("{}" if name.endswith("config.json") else f"base {name}")
    merge(own, trained, tmp_path / "out_of_base")
    assert (tmp_path / "out_of_base" / "tokenizer.json").read_text() == "base tokenizer.json"
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "rng_state.pth", "training_args.bin"):
        (trained / name).write_text(f"adapter {name}")
    (trained / "tokenizer_config.json").write_text("{}")
    merge(own, trained, tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {
        "LICENSE", "chat_template.jinja", "config.json", "generation_config.json", "manifest.json", "model.safetensors",
        "modeling_x.py", "tokenizer.json", "tokenizer_config.json",
    }  # fmt: skip
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "adapter tokenizer.json"
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == "adapter chat_template.jinja"
    assert (tmp_path / "out" / "LICENSE").read_text() == "base LICENSE"


def test_the_adapters_chat_template_wins_wherever_it_is_kept(base: Path, adapter: Path, tmp_path: Path) -> None:
    """Older versions keep the template inside tokenizer_config.json; a chat_template.jinja beside it would win."""
    example = Path(finebridge.__file__).parent / "finetune" / "example_data"
    own, trained = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(base, own)
    shutil.copytree(adapter, trained)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(example / name, own)
        shutil.copy(example / name, trained)
    (own / "chat_template.jinja").write_text("the base's")
    config = json.loads((example / "tokenizer_config.json").read_text()) | {"chat_template": "the adapter's"}
    (trained / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(trained).chat_template == "the adapter's"
    merge(own, trained, tmp_path / "out")
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == "the adapter's"


def test_the_users_script_runs_from_anywhere(base: Path, adapter: Path, tmp_path: Path) -> None:
    script = Path(finebridge.__file__).parent / "merge" / "merge_lora_weight.sh"
    output = tmp_path / "a folder $(touch x)"
    done = subprocess.run(
        ["bash", script, *arguments(base, adapter, output, "--save_dtype", "bf16")],
        cwd=tmp_path,
        env={"FINEBRIDGE_PYTHON": sys.executable, "PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    verify(output)
    assert [path.name for path in tmp_path.iterdir()] == [output.name]
