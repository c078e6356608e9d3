"""The merge against PEFT's own numbers, and what the output folder holds."""

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import finebridge
import pytest
import torch
from finebridge.merge.merge_lora import DTYPES, main, merge, parser
from finebridge.storage import progress
from finebridge.storage.manifest import verify
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from .conftest import arguments, load, logits, peft_logits, save_base, tensors

MakeAdapter = Callable[..., Path]
Edited = Callable[..., Path]


def by_hand(base: Path, adapter: Path, scale: float) -> dict[str, torch.Tensor]:
    """base + scale * B @ A in fp32, straight from PEFT's files."""
    factors = load_file(adapter / "adapter_model.safetensors")
    summed = {name: value.float() for name, value in tensors(base).items()}
    for name in summed:
        key = f"base_model.model.{name.removesuffix('.weight')}"
        if f"{key}.lora_A.weight" in factors:
            summed[name] += (factors[f"{key}.lora_B.weight"] @ factors[f"{key}.lora_A.weight"]) * scale
    return summed


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
    sums = merge(base, [adapter], tmp_path / "out").sums
    assert (logits(load(tmp_path / "out")) - truth).abs().max() < 1e-5
    assert len(sums) * 2 == sum(".lora_" in name for name in load_file(adapter / "adapter_model.safetensors"))
    assert all(item.relative > 0 and item.kept == 1 for item in sums.values())


@pytest.mark.parametrize(
    ("settings", "scale"), [({"lora_alpha": 8}, 2.0), ({"lora_alpha": 8, "use_rslora": True}, 4.0)], ids=str
)
@pytest.mark.parametrize("save_dtype", DTYPES)
def test_every_tensor_is_the_fp32_sum_rounded_once(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, save_dtype: str, settings: dict[str, Any], scale: float
) -> None:
    adapter = make_adapter(**settings)
    merge(base, [adapter], tmp_path / "out", save_dtype)
    got, wanted = tensors(tmp_path / "out"), by_hand(base, adapter, scale)
    assert list(got) == list(tensors(base))
    for name, value in wanted.items():
        assert torch.equal(got[name], value.to(getattr(torch, DTYPES[save_dtype]))), name


def test_a_bf16_base_is_summed_in_fp32(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(base)
    merge(base, [adapter], tmp_path / "bf16", "bf16")
    merge(base, [adapter], tmp_path / "fp32", "fp32")
    stored, wanted = tensors(base), by_hand(base, adapter, 2.0)
    got, fine = tensors(tmp_path / "bf16"), tensors(tmp_path / "fp32")
    for name, value in wanted.items():
        assert torch.equal(fine[name], value), name
        assert torch.equal(got[name], value.bfloat16()), name
    assert torch.equal(got["model.embed_tokens.weight"], stored["model.embed_tokens.weight"])
    assert (logits(load(tmp_path / "fp32")) - peft_logits(base, adapter)).abs().max() < 1e-5


def test_relative_changes_are_those_of_the_weights(base: Path, adapter: Path, tmp_path: Path) -> None:
    sums = merge(base, [adapter], tmp_path / "out").sums
    before, after = tensors(base), tensors(tmp_path / "out")
    assert set(sums) == {name for name in before if not torch.equal(before[name], after[name])}
    told = verify(tmp_path / "out")["made_from"]["changes"]
    for name, item in sums.items():
        assert item.relative == pytest.approx(
            float((after[name] - before[name]).norm() / before[name].norm()), rel=1e-4
        )
        assert told[name] == {"relative": item.relative, "kept": 1}


@pytest.mark.parametrize("spread", [1e-1, 1e-2, 1e-3])
def test_what_rounding_keeps_is_measured(
    make_adapter: MakeAdapter, tmp_path: Path, spread: float, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    adapter = make_adapter(base)
    factors = load_file(adapter / "adapter_model.safetensors")
    small = {key: value * spread if "lora_B" in key else value for key, value in factors.items()}
    save_file(small, adapter / "adapter_model.safetensors")
    assert main(arguments(base, adapter, tmp_path / "out", "--save_dtype", "bf16")) == 0
    said = capsys.readouterr()
    merged, rounded, exact = verify(tmp_path / "out"), tensors(tmp_path / "out"), by_hand(base, adapter, 2.0)
    worst = 1.0
    for name, told in merged["made_from"]["changes"].items():
        change, lost = exact[name] - tensors(base)[name].float(), exact[name] - rounded[name].float()
        assert told["kept"] == pytest.approx(max(0.0, 1 - float(lost.norm() / change.norm())), abs=1e-4)
        worst = min(worst, told["kept"])
    assert f"least {worst:.2%}" in said.out
    assert ("keeps less than 99%" in said.err) is (worst < 0.99)
    assert (worst < 0.9) is (spread < 1e-2)


def test_a_change_that_rounding_takes_whole_is_refused(
    make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    ones = {name: torch.ones_like(value) for name, value in tensors(base).items()}
    save_file(ones, base / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(base)
    factors = load_file(adapter / "adapter_model.safetensors")
    save_file({key: value * 1e-2 for key, value in factors.items()}, adapter / "adapter_model.safetensors")
    assert main(arguments(base, adapter, tmp_path / "out", "--save_dtype", "bf16")) == 2
    assert "nothing of it is left; use fp32" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_the_output_loads_whole_and_verifies(base: Path, adapter: Path, tmp_path: Path) -> None:
    merge(base, [adapter], tmp_path / "out", "bf16")
    model, report = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.dtype == torch.bfloat16
    manifest = verify(tmp_path / "out")
    assert manifest["kind"] == "merged"
    made_from = manifest["made_from"]
    assert made_from.pop("changes")
    assert made_from == {"base": str(base), "adapters": [[str(adapter), 1.0]], "save_dtype": "bf16"}
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
    merge(own, [adapter], tmp_path / "out", save_dtype)
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
    merge(base, [adapter], tmp_path / "one")
    merge(shards, [adapter], tmp_path / "many", max_shard_size="20KB")
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
    merge(both, [adapter], tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - truth).abs().max() < 1e-5


def test_a_tied_base_stays_tied(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", tied=True)
    adapter = make_adapter(base)
    merge(base, [adapter], tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - peft_logits(base, adapter)).abs().max() < 1e-5


def test_integer_buffers_are_carried_as_they_are(base: Path, adapter: Path, tmp_path: Path) -> None:
    own = tmp_path / "base"
    shutil.copytree(base, own)
    save_file(tensors(base) | {"model.counts": torch.arange(3)}, own / "model.safetensors")
    merge(own, [adapter], tmp_path / "out", "bf16")
    assert torch.equal(tensors(tmp_path / "out")["model.counts"], torch.arange(3))


def test_what_was_merged_is_said_and_an_untrained_adapter_too(
    base: Path, adapter: Path, edited: Edited, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(base, adapter, tmp_path / "out")) == 0
    said = capsys.readouterr()
    assert f"merged 6 weights into {tmp_path / 'out'} (fp32)\nchange |dW|/|W|: median " in said.out
    assert "kept by fp32: 100.00% of the change" in said.out
    assert "warning" not in said.err
    untrained = edited(lambda t: [value.zero_() for key, value in t.items() if "lora_B" in key])
    assert main(arguments(base, untrained, tmp_path / "same")) == 2
    assert "the adapter changes nothing: every lora_B is zero" in capsys.readouterr().err
    assert not (tmp_path / "same").exists()


def test_the_adapters_tokenizer_wins_and_the_bases_other_files_are_carried(
    base: Path, adapter: Path, tmp_path: Path
) -> None:
    own, trained = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(base, own)
    shutil.copytree(adapter, trained)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "modeling_x.py", "LICENSE"):
        (own / name).write_text("{}" if name.endswith("config.json") else f"base {name}")
    merge(own, [trained], tmp_path / "out_of_base")
    assert (tmp_path / "out_of_base" / "tokenizer.json").read_text() == "base tokenizer.json"
    for name in ("tokenizer.json", "chat_template.jinja", "LICENSE", "rng_state.pth", "training_args.bin"):
        (trained / name).write_text(f"adapter {name}")
    (trained / "tokenizer_config.json").write_text("{}")
    merge(own, [trained], tmp_path / "out")
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
    merge(own, [trained], tmp_path / "out")
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


def test_what_the_base_stores_wider_stays_wide(make_adapter: MakeAdapter, tmp_path: Path) -> None:
    base = save_base(tmp_path / "base", dtype=torch.bfloat16)
    wide = {
        name: value.float() + 1e-4 if name == "model.norm.weight" else value for name, value in tensors(base).items()
    }
    save_file(wide, base / "model.safetensors", metadata={"format": "pt"})
    said: list[str] = []
    merge(base, [make_adapter(base)], tmp_path / "out", "bf16", say=said.append)
    assert torch.equal(tensors(tmp_path / "out")["model.norm.weight"], wide["model.norm.weight"])
    assert said == ["1 tensors stay torch.float32 as in the base, the first is model.norm.weight"]


def test_a_merge_tells_how_far_it_is(
    base: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "EVERY", 0.0)
    said: list[str] = []
    merge(base, [adapter], tmp_path / "out", say=said.append)
    shares = [int(found[1]) for line in said if (found := re.match(r"merge: (\d+)% of \d+ MB written, ", line))]
    assert len(shares) == len(tensors(base)), "one for each block, and a tensor of this model is one"
    assert shares == sorted(shares)
    assert shares[-1] == 100
    assert re.match(r"merge: \d+ MB written in \d+ s", said[-1])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--prompts", "p.txt"], "--prompts is for --verify"),
        (["--workers", "0"], "--workers 0: at least 1"),
        (["--adapter_weights", "1", "2"], "--adapter_weights"),
        (["--verify", "--prompts", "/dev/null"], "--prompts /dev/null: holds no prompt"),
    ],
)
def test_flags_that_do_not_go_together(
    base: Path, adapter: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments(base, adapter, tmp_path / "out", *words)) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_nothing_to_do(base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--base_model_path", str(base), "--adapter_model_path", str(adapter)]) == 2
    assert "give --output_path for the merged model, --export_adapter, or both" in capsys.readouterr().err


def test_a_merge_that_fails_its_verification_is_not_published(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:  # fmt: skip
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("one\n\ntwo\n")
    adapter = make_adapter(use_dora=True)
    words = ["--verify", "--prompts", str(prompts)]
    assert main(arguments(base, adapter, tmp_path / "good", *words)) == 0
    assert "verify: logits of 2 prompts differ by at most" in capsys.readouterr().out
    monkeypatch.setattr("finebridge.merge.adapter.Adapter.scale", lambda *_: 1.99)
    assert main(arguments(base, adapter, tmp_path / "bad", *words)) == 1
    assert "--verify: the logits differ by" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["good", "prompts.txt"]


def test_room_is_looked_at_before_anything_is_written(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("finebridge.merge.merge_lora.free_bytes", lambda *_: 1000)
    assert main(arguments(base, adapter, tmp_path / "out")) == 28
    assert "No space left on device: the merged model needs" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


MEASURE = """
import resource, sys
from pathlib import Path
from finebridge.merge.merge_lora import merge
base, adapter, warm, out = map(Path, sys.argv[1:])
merge(warm, [adapter], out / "warm", "bf16")
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
merge(base, [adapter], out / "big", "bf16", max_shard_size="100MB")
print("GREW", resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""


def test_memory_does_not_grow_with_the_model(base: Path, adapter: Path, tmp_path: Path) -> None:
    """A model 4,000 times as large, of which one tensor is half, takes a few blocks more."""
    big = tmp_path / "big"
    shutil.copytree(base, big)
    more = {f"model.more.{number}": torch.ones(2**23 if number else 2**26, dtype=torch.float32) for number in range(5)}
    save_file(tensors(base) | more, big / "model.safetensors", metadata={"format": "pt"})
    assert (big / "model.safetensors").stat().st_size > 400e6
    words = [sys.executable, "-P", "-c", MEASURE, *map(str, (big, adapter, base, tmp_path / "out"))]
    done = subprocess.run(words, capture_output=True, text=True, check=True)
    assert int(done.stdout.partition("GREW ")[2]) * 1024 < 60e6, done.stdout
