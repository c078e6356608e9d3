"""LoRA across the bridge: the same adapter comes back by its bits, the merged model is the one of ``finebridge merge``."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.dist_format import write_dist
from finebridge.bridge.mapping import QKV
from finebridge.finetune.cli import main
from finebridge.merge.merge_lora import merge
from finebridge.storage.safetensors_io import Spec
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from .oracle import lora_logits, needs_megatron

Models = Callable[[str], Path]
Adapters = Callable[..., Path]
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
LATENT = ["q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "all linear": ("llama", {"target_modules": DENSE}),
    "query and value": ("qwen2", {"target_modules": ["q_proj", "v_proj"]}),
    "some layers": ("qwen3_tied", {"target_modules": ["k_proj", "up_proj"], "layers_to_transform": [1, 2]}),
    "ranks": ("qwen3", {"target_modules": DENSE, "rank_pattern": {"k_proj": 2}, "alpha_pattern": {"k_proj": 4}}),
    "experts": ("qwen3_moe", {"target_modules": ATTENTION, "target_parameters": STACKS}),
    "experts, one way": ("qwen3_moe_mixed", {"target_modules": ["o_proj"], "target_parameters": STACKS[1:]}),
    "latent attention": ("deepseek_v3", {"target_modules": LATENT}),
}  # fmt: skip


def run(*words: object) -> int:
    return main(["convert", *map(str, words)])


def tensors(folder: Path, name: str = "adapter_model") -> dict[str, torch.Tensor]:
    return load_file(folder / f"{name}.safetensors")


def assert_same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert value.dtype == other[name].dtype, name
        assert torch.equal(value, other[name]), name


@pytest.fixture(scope="module")
def adapters(hf_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Adapters:
    """Adapters as PEFT saves them, with random factors, by the model's name and PEFT's settings."""
    made: dict[str, Path] = {}

    def get(model: str, **changes: Any) -> Path:
        key = json.dumps([model, changes])
        if key not in made:
            base = AutoModelForCausalLM.from_pretrained(hf_models(model))
            config = {"r": 4, "lora_alpha": 8, "target_modules": DENSE, "task_type": "CAUSAL_LM"} | changes
            torch.manual_seed(1)
            peft = get_peft_model(base, LoraConfig(**config))
            peft.base_model.config._name_or_path = str(hf_models(model))
            for name, value in peft.named_parameters():
                if "lora_" in name:
                    torch.nn.init.normal_(value, std=0.1)
            made[key] = tmp_path_factory.mktemp("adapter")
            peft.save_pretrained(made[key])
        return made[key]

    return get


TORCH = "--ckpt_format torch --tp 2 --pp 2"
DIST = "--ckpt_format torch_dist"


@pytest.mark.parametrize(
    ("case", "layout"),
    [
        *((case, TORCH) for case in CASES),
        ("all linear", DIST),
        ("experts", DIST),
        ("experts", "--ckpt_format torch --tp 2 --ep 4 --etp 1"),
        ("latent attention", "--ckpt_format torch --tp 2 --dialect mcore-local"),
        *(pytest.param(case, DIST, marks=pytest.mark.slow) for case in CASES if case not in ("all linear", "experts")),
        *(
            pytest.param(case, layout, marks=pytest.mark.slow)
            for case in CASES
            for layout in ("--ckpt_format torch --pp 2 --vpp 2", "--ckpt_format torch --dialect mcore-local")
        ),
    ],
)
def test_an_adapter_comes_back(case: str, layout: str, adapters: Adapters, hf_models: Models, tmp_path: Path) -> None:
    model, changes = CASES[case]
    adapter = adapters(model, **changes)
    assert run("--to", "mcore", "--load", adapter, "--save", tmp_path / "mcore", *layout.split()) == 0
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "back") == 0
    assert_same(tensors(adapter), tensors(tmp_path / "back"))
    ids = torch.arange(20)[None]
    with torch.no_grad():
        one, other = (
            PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf_models(model)), place)(ids).logits
            for place in (adapter, tmp_path / "back")
        )
    assert torch.equal(one, other), "ranks and scales of the config"


# ---- whole checkpoints


@pytest.fixture(scope="module")
def merged(adapters: Adapters, hf_models: Models, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """What ``finebridge merge`` makes of a model and its adapter."""

    def get(model: str, save_dtype: str = "fp32", **changes: Any) -> Path:
        place = tmp_path_factory.mktemp("merged") / "out"
        merge(hf_models(model), [adapters(model, **changes)], place, save_dtype, say=lambda _: None)
        return place

    return get


@pytest.mark.parametrize("case", ["all linear", "experts"])
def test_the_merged_model_is_the_one_of_merge(
    case: str,
    adapters: Adapters,
    merged: Callable[..., Path],
    hf_models: Models,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Bit for bit: the sum is made part by part in both."""
    model, changes = CASES[case]
    base, adapter = hf_models(model), adapters(model, **changes)
    words = [
        "--load",
        base,
        "--adapter",
        adapter,
        "--ckpt_format",
        "torch",
        "--tp",
        2,
        "--pp",
        2,
        "--dialect",
        "mcore-local",
    ]
    assert run("--to", "mcore", *words, "--save", tmp_path / "keep", "--lora", "keep") == 0
    capsys.readouterr()
    assert run("--to", "hf", "--load", tmp_path / "keep", "--save", tmp_path / "hf") == 0
    assert "LoRA on " in (said := capsys.readouterr().out)
    assert "is merged into them; --lora only takes it alone" in said
    expected = tensors(merged(model, **changes), "model")
    assert_same(expected, tensors(tmp_path / "hf", "model"))
    assert run("--to", "mcore", *words[:4], "--save", tmp_path / "sum", "--lora", "merge") == 0
    assert run("--to", "hf", "--load", tmp_path / "sum", "--save", tmp_path / "hf2") == 0
    assert_same(expected, tensors(tmp_path / "hf2", "model"))
    other = ["--load", tmp_path / "keep", "--lora", "keep", "--ckpt_format", "torch", "--dialect", "mcore-local"]
    assert run("--to", "mcore", *other, "--save", tmp_path / "other") == 0
    assert run("--to", "hf", "--load", tmp_path / "other", "--save", tmp_path / "only", "--lora", "only") == 0
    assert_same(tensors(adapter), tensors(tmp_path / "only"))
    capsys.readouterr()
    assert run("inspect", tmp_path / "other") == 0
    assert f"LoRA on {16 if case == 'all linear' else 40} layers" in capsys.readouterr().out


def test_a_merge_in_bf16_is_rounded_once(
    adapters: Adapters, merged: Callable[..., Path], hf_models: Models, tmp_path: Path
) -> None:
    base, adapter = hf_models("qwen3"), adapters("qwen3")
    assert run("--to", "mcore", "--load", adapter, "--save", tmp_path / "lora") == 0
    assert run("--to", "mcore", "--load", base, "--save", tmp_path / "base") == 0
    words = ["--load", tmp_path / "base", "--adapter", tmp_path / "lora", "--save", tmp_path / "hf", "--dtype", "bf16"]
    assert run("--to", "hf", *words) == 0
    assert_same(tensors(merged("qwen3", "bf16"), "model"), tensors(tmp_path / "hf", "model"))


def test_what_a_rank_holds(adapters: Adapters, hf_models: Models, tmp_path: Path) -> None:
    """Names and parts as PEFT's parallel layers have them: B of a column-parallel layer is cut, A of a row-parallel one."""
    model, changes = CASES["all linear"]
    words = ["--load", hf_models(model), "--adapter", adapters(model, **changes), "--save", tmp_path / "mcore"]
    assert run("--to", "mcore", *words, "--lora", "keep", "--ckpt_format", "torch", "--tp", 2) == 0
    files = [tmp_path / f"mcore/release/mp_rank_0{rank}/model_optim_rng.pt" for rank in range(2)]
    states = [torch.load(file, weights_only=False) for file in files]
    args = vars(states[0]["args"])
    assert (args["lora_r"], args["lora_alpha"]) == (12, 24)
    assert args["lora_target_modules"] == ["linear_fc1", "linear_fc2", "linear_proj", "linear_qkv"]
    one, other = (state["model"] for state in states)
    layer = "decoder.layers.1."
    held = {name.removeprefix(layer): value for name, value in one.items() if name.startswith(layer)}
    shapes = {name: tuple(value.shape) for name, value in held.items() if value is not None}
    assert shapes == {
        "self_attention.linear_qkv.base_layer.layer_norm_weight": (32,), "self_attention.linear_qkv.base_layer.weight": (32, 32),
        "self_attention.linear_qkv.lora_A.default.weight": (12, 32), "self_attention.linear_qkv.lora_B.default.weight": (32, 12),
        "self_attention.linear_proj.base_layer.weight": (32, 16), "self_attention.linear_proj.lora_A.default.weight": (12, 16),
        "self_attention.linear_proj.lora_B.default.weight": (32, 12), "mlp.linear_fc1.base_layer.layer_norm_weight": (32,),
        "mlp.linear_fc1.base_layer.weight": (64, 32), "mlp.linear_fc1.lora_A.default.weight": (12, 32),
        "mlp.linear_fc1.lora_B.default.weight": (64, 12), "mlp.linear_fc2.base_layer.weight": (32, 32),
        "mlp.linear_fc2.lora_A.default.weight": (12, 32), "mlp.linear_fc2.lora_B.default.weight": (32, 12),
    }  # fmt: skip
    assert "self_attention.linear_qkv.base_layer._extra_state" in held
    factors = tensors(adapters(model, **changes))
    up = factors["base_model.model.model.layers.1.mlp.up_proj.lora_B.weight"]
    name = layer + "mlp.linear_fc1.lora_B.default.weight"
    assert torch.equal(torch.cat([one[name][32:, 4:8], other[name][32:, 4:8]]), up)
    gate_rows = torch.cat([one[name][:32, 4:], other[name][:32, 4:]])
    assert not gate_rows.any()


def test_factors_that_megatron_trained(adapters: Adapters, hf_models: Models, tmp_path: Path) -> None:
    """Dense B over stacked A: each of query, key and value has the whole A then, and the change is the fused layer's."""
    model, changes = CASES["all linear"]
    assert (
        run(
            "--to",
            "mcore",
            "--load",
            adapters(model, **changes),
            "--save",
            tmp_path / "mcore",
            "--ckpt_format",
            "torch",
        )
        == 0
    )
    path = tmp_path / "mcore/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    prefix = "decoder.layers.0.self_attention.linear_qkv.lora_"
    a, b = (content["model"][f"{prefix}{kind}.default.weight"] for kind in "AB")
    b.normal_()
    torch.save(content, path)
    (tmp_path / "mcore/manifest.json").unlink()
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "peft") == 0
    found = tensors(tmp_path / "peft")
    prefix = "base_model.model.model.layers.0.self_attn."
    for kind in ("q", "k", "v"):
        assert torch.equal(found[f"{prefix}{kind}_proj.lora_A.weight"], a)
    parts = [found[f"{prefix}{kind}_proj.lora_B.weight"] for kind in "qkv"]
    assert torch.equal(QKV(4, 2, 8).to_mcore(parts), b)
    config = json.loads((tmp_path / "peft/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 8)
    assert config["rank_pattern"]["model\\.layers\\.0\\.self_attn\\.q_proj"] == 12
    PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf_models(model)), tmp_path / "peft")


def test_experts_with_factors_of_their_own_in_bf16(adapters: Adapters, tmp_path: Path) -> None:
    """As PEFT had them with transformers 4: gate and up of each expert have their own A, so they are no stacks."""
    adapter = adapters("qwen3_moe", target_modules=["o_proj"])
    place = changed(adapter, tmp_path / "each", target_modules=["o_proj", "gate_proj", "up_proj", "down_proj"])
    factors = tensors(adapter)
    for part in (f"{layer}.mlp.experts.{expert}" for layer in range(4) for expert in range(4)):
        for name, rows, cols in (("gate_proj", 16, 32), ("up_proj", 16, 32), ("down_proj", 32, 16)):
            module = f"base_model.model.model.layers.{part}.{name}.lora_"
            factors |= {f"{module}A.weight": torch.randn(4, cols), f"{module}B.weight": torch.randn(rows, 4)}
    factors = {name: value.bfloat16() for name, value in factors.items()}
    save_file(factors, place / "adapter_model.safetensors")
    assert run("--to", "mcore", "--load", place, "--save", tmp_path / "mcore") == 0
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "back") == 0
    assert_same(factors, tensors(tmp_path / "back"))


@needs_megatron
@pytest.mark.parametrize(
    ("case", "form", "tp"),
    [(case, form, tp) for case, tp in (("all linear", 2), ("experts", 1)) for form in ("torch", "torch_dist")],
)
def test_megatron_computes_the_same(
    case: str, form: str, tp: int, adapters: Adapters, hf_models: Models, tmp_path: Path
) -> None:
    """Loaded strictly by real Megatron-Core, into PEFT's layers or as Megatron-Bridge has them: logits with the live adapter."""
    model, changes = CASES[case]
    base, adapter, lora = hf_models(model), adapters(model, **changes), tmp_path / "lora"
    if form == "torch":
        words = ["--load", base, "--adapter", adapter, "--lora", "keep", "--tp", tp, "--dialect", "mcore-local"]
        assert run("--to", "mcore", "--save", lora, "--ckpt_format", "torch", *words) == 0
        args = torch.load(lora / "release/mp_rank_00/model_optim_rng.pt", weights_only=False)["args"]
    else:
        assert run("--to", "mcore", "--load", base, "--save", tmp_path / "base") == 0
        assert run("--to", "mcore", "--load", adapter, "--save", lora) == 0
        args = torch.load(lora / "release/common.pt", weights_only=False)["args"]
    settings = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "target_modules": args.lora_target_modules}
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), adapter)
    ids = torch.arange(20)[None]
    given: dict[str, Any] = {"base": None, "rows": args.padded_vocab_size}
    if form == "torch_dist":
        given = {"base": tmp_path / "base/release", "rows": args.vocab_size}
    found = lora_logits(live.base_model.model.config, lora / "release", settings, ids, tp=tp, **given)
    with torch.no_grad():
        wanted = live(ids).logits
        live.disable_adapter_layers()
        assert not torch.allclose(live(ids).logits, wanted, atol=1e-3), "the adapter must be felt"
    assert torch.allclose(found[..., : wanted.shape[-1]], wanted, atol=1e-5)


def test_mindspeeds_grouped_experts(adapters: Adapters, hf_models: Models, tmp_path: Path) -> None:
    """``weight1_lora_a`` and the like hold each expert's factors transposed, one after the other."""
    model, changes = CASES["experts"]
    words = ["--load", hf_models(model), "--adapter", adapters(model, **changes), "--save", tmp_path / "mcore"]
    words += ["--lora", "keep", "--ckpt_format", "torch", "--dialect", "mcore-local"]
    assert run("--to", "mcore", *words) == 0
    path = tmp_path / "mcore/release/mp_rank_00/model_optim_rng.pt"
    content = torch.load(path, weights_only=False)
    state = content["model"]
    for layer in range(4):
        experts = f"decoder.layers.{layer}.mlp.experts."
        for number in "12":
            for old, new in (
                ("base_layer", ""),
                ("lora_A.default", "_lora_a"),
                ("lora_B.default", "_lora_b"),
            ):
                each = [state.pop(f"{experts}local_experts.{e}.linear_fc{number}.{old}.weight") for e in range(4)]
                rows = each[0].shape[1] if number == "1" else 4 * each[0].shape[1]
                state[f"{experts}weight{number}{new}"] = torch.stack([one.t() for one in each]).reshape(rows, -1)
    torch.save(content, path)
    (tmp_path / "mcore/manifest.json").unlink()
    assert run("--to", "hf", "--load", tmp_path / "mcore", "--save", tmp_path / "only", "--save-lora-to-hf") == 0
    assert_same(tensors(adapters(model, **changes)), tensors(tmp_path / "only"))
    words = ["--load", tmp_path / "mcore", "--lora", "only", "--dry_run", "--dialect"]
    assert [run("--to", "hf", *words, dialect) for dialect in ("mindspeed", "mcore-local")] == [0, 2]


# ---- what is wrong


def changed(adapter: Path, place: Path, **changes: Any) -> Path:
    """A copy of an adapter with other settings."""
    shutil.copytree(adapter, place)
    config = json.loads((place / "adapter_config.json").read_text()) | changes
    (place / "adapter_config.json").write_text(json.dumps(config))
    return place


def refuse(capsys: pytest.CaptureFixture[str], place: Path, *words: object) -> str:
    """The message of a conversion that is refused and leaves nothing."""
    capsys.readouterr()
    assert run("--save", place, *words) == 2
    error = capsys.readouterr().err
    assert "Traceback" not in error
    assert not place.exists()
    return error


def test_adapters_that_are_refused(
    adapters: Adapters, hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, out = adapters("llama", target_modules=DENSE), tmp_path / "out"
    name = "base_model.model.model.layers.2.mlp.up_proj.lora_"
    factors = tensors(adapter)
    harmed: dict[str, tuple[dict[str, torch.Tensor | None], str]] = {
        "no B": ({f"{name}B.weight": None}, "up_proj: the adapter has only one of lora_A"),
        "rank": ({f"{name}A.weight": torch.ones(3, 32)}, "up_proj: lora_A (3, 32) and lora_B (64, 4) do not fit"),
        "ranks": ({f"{name}A.weight": torch.ones(3, 32), f"{name}B.weight": torch.ones(64, 3)}, "lora_A has rank 3"),
        "rows": ({f"{name}B.weight": torch.ones(60, 4)}, "LoRA's B: gate (64, 8) and up (60, 8) differ"),
        "dora": ({f"{name}magnitude_vector": torch.ones(64)}, "up_proj: lora_magnitude_vector: DoRA"),
        "no table": (
            {f"base_model.model.model.layers.9.mlp.x.lora_{kind}.weight": torch.ones(4, 4) for kind in "AB"},
            "model.layers.9.mlp.x.weight: the adapter changes it, but no table of the model has it",
        ),
        "head": (
            {f"base_model.model.lm_head.lora_{kind}.weight": torch.ones(4, 4) for kind in "AB"},
            "lm_head.weight: Megatron's trainers have LoRA on linear layers",
        ),
        "whole": ({"base_model.model.lm_head.weight": torch.ones(70, 32)}, "lm_head.weight is held whole"),
        "embedding": (
            {f"base_model.model.model.embed_tokens.lora_embedding_{kind}": torch.ones(4, 4) for kind in "AB"},
            "model.embed_tokens: lora_embedding_A: LoRA on embeddings",
        ),
    }  # fmt: skip
    for number, (changes, message) in enumerate(harmed.values()):
        place = changed(adapter, tmp_path / str(number))
        kept = {key: value for key, value in (factors | changes).items() if value is not None}
        save_file(kept, place / "adapter_model.safetensors")
        (place / "manifest.json").unlink(missing_ok=True)
        assert message in refuse(capsys, out, "--to", "mcore", "--load", place)
    rslora = changed(adapter, tmp_path / "rslora", use_rslora=True)
    assert "use_rslora: its scale" in refuse(capsys, out, "--to", "mcore", "--load", rslora)
    lost = changed(adapter, tmp_path / "lost", base_model_name_or_path="/no/where")
    assert "name the folder of the adapter's base with --hf_config" in refuse(
        capsys, out, "--to", "mcore", "--load", lost
    )
    assert run("--to", "mcore", "--load", lost, "--hf_config", hf_models("llama"), "--dry_run") == 0
    assert "--dtype bf16: an adapter's factors stay" in refuse(
        capsys, out, "--to", "hf", "--load", adapter, "--dtype", "bf16"
    )
    assert "tells its own" in refuse(capsys, out, "--to", "mcore", "--load", adapter, "--lora_r", 16)
    other = ["--to", "mcore", "--load", hf_models("qwen3"), "--adapter", adapter, "--lora", "merge"]
    assert "the weight is " in refuse(capsys, out, *other)


def test_checkpoints_with_lora_that_are_refused(
    adapters: Adapters, hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapter, lora, out = adapters("llama", target_modules=DENSE), tmp_path / "lora", tmp_path / "out"
    assert run("--to", "mcore", "--load", adapter, "--save", lora, "--ckpt_format", "torch") == 0
    (lora / "manifest.json").unlink()
    path = lora / "release/mp_rank_00/model_optim_rng.pt"
    whole = path.read_bytes()
    name = "decoder.layers.1.mlp.linear_fc2.lora_"

    def harm(work: Callable[[dict[str, Any], Any], object]) -> str:
        path.write_bytes(whole)
        content = torch.load(path, weights_only=False)
        work(content["model"], content["args"])
        torch.save(content, path)
        return refuse(capsys, out, "--to", "hf", "--load", lora)

    assert "linear_fc2: LoRA's B is missing, its A is there" in harm(
        lambda model, _: model.pop(f"{name}B.default.weight")
    )
    assert "linear_fc2: LoRA's A is missing, its B is there" in harm(
        lambda model, _: model.pop(f"{name}A.default.weight")
    )
    assert "has rank 5" in harm(lambda model, _: model.update({f"{name}A.default.weight": torch.ones(5, 64)}))
    assert "not finite" in harm(lambda model, _: model[f"{name}A.default.weight"].fill_(float("nan")))
    assert "give --lora_alpha" in harm(lambda _, args: delattr(args, "lora_alpha"))
    assert "has rank 12, its arguments or --lora_r say 16" in harm(lambda _, args: setattr(args, "lora_r", 16))
    assert "args.lora_alpha is 'x'" in harm(lambda _, args: setattr(args, "lora_alpha", "x"))
    router = {f"decoder.layers.1.mlp.linear_x.lora_{kind}.default.weight": torch.ones(12, 12) for kind in "AB"}
    assert "linear_x" in harm(lambda model, _: model.update(router))
    path.write_bytes(whole)
    load = ["--to", "hf", "--load", lora]
    assert "--lora_alpha 5: the arguments in" in refuse(capsys, out, *load, "--lora_alpha", 5)
    assert "--lora_target_modules linear_q: " in refuse(capsys, out, *load, "--lora-target-modules", "linear_q")
    assert "which --lora_target_modules does not name" in refuse(
        capsys, out, *load, "--lora-target-modules", "linear_qkv"
    )
    assert "holds LoRA alone; give the model as --load" in refuse(capsys, out, *load, "--lora", "merge")
    assert "has LoRA already" in refuse(capsys, out, *load, "--adapter", adapter)
    base = ["--load", hf_models("llama")]
    assert "--lora: there is no LoRA in" in refuse(capsys, out, "--to", "mcore", *base, "--lora", "merge")
    assert "neither a PEFT adapter nor" in refuse(capsys, out, "--to", "mcore", *base, "--adapter", hf_models("llama"))
    both = [*base, "--adapter", lora]
    assert "say with --lora merge, keep or only" in refuse(capsys, out, "--to", "mcore", *both)
    assert "--lora keep: no trainer reads" in refuse(capsys, out, "--to", "mcore", *both, "--lora", "keep")
    assert "--lora keep: a Hugging Face folder" in refuse(capsys, out, "--to", "hf", *both, "--lora", "keep")


def test_adapters_of_megatron_bridge_tell_no_alpha(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It keeps its settings in a file of its own; only the factors are in the checkpoint."""
    name = "decoder.layers.{}.self_attention.linear_proj.adapter.linear_{}.weight"
    factors = {
        name.format(layer, kind): torch.ones(*shape)
        for layer in range(4)
        for kind, shape in (("in", (2, 32)), ("out", (32, 2)))
    }
    specs = [Spec(key, value.dtype, tuple(value.shape)) for key, value in factors.items()]
    (tmp_path / "lora").mkdir()
    write_dist(tmp_path / "lora", specs, factors.__getitem__, args={}, iteration=1, uniform=True)
    words = ["--to", "hf", "--hf_config", hf_models("llama"), "--load", tmp_path / "lora"]
    assert "LoRA's alpha is not among its arguments; give --lora_alpha" in refuse(capsys, tmp_path / "out", *words)
    assert run("--save", tmp_path / "out", *words, "--lora_alpha", 6) == 0
    config = json.loads((tmp_path / "out/adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["target_modules"]) == (2, 6, ["o_proj"])
    assert config["base_model_name_or_path"] == str(hf_models("llama"))
    capsys.readouterr()
    assert main(["convert", "inspect", str(tmp_path / "out")]) == 2
    assert "a LoRA adapter, no model" in capsys.readouterr().err


def test_grouped_experts_have_no_lora_by_expert(
    adapters: Adapters, hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, changes = CASES["experts"]
    words = [
        "--load",
        hf_models(model),
        "--adapter",
        adapters(model, **changes),
        "--ckpt_format",
        "torch",
        "--lora",
        "keep",
    ]
    assert "give --dialect mcore-local" in refuse(capsys, tmp_path / "out", "--to", "mcore", *words)


def test_ms_swifts_split_factors_are_refused(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its torch_dist holds gate and up of lora_B by rank: read as they stand they would be mixed up."""
    name = "decoder.layers.{}.mlp.linear_fc1.lora_{}.default.weight"
    factors = {
        name.format(layer, kind): torch.ones(shape)
        for layer in range(4)
        for kind, shape in (("A", (2, 32)), ("B", (128, 2)))
    }
    specs = [Spec(key, value.dtype, tuple(value.shape)) for key, value in factors.items()]
    for tp in (1, 2):
        (tmp_path / str(tp)).mkdir()
        args = {"tensor_model_parallel_size": tp, "lora_alpha": 8}
        write_dist(tmp_path / str(tp), specs, factors.__getitem__, args=args, iteration=1, uniform=True)
    words = ["--to", "hf", "--hf_config", hf_models("llama"), "--load"]
    error = refuse(capsys, tmp_path / "out", *words, tmp_path / "2")
    assert "ms-swift stores gate and up of it by rank" in error
    assert run("--save", tmp_path / "out", *words, tmp_path / "1") == 0
    assert len(tensors(tmp_path / "out")) == 16


def test_mindspeed_has_it_on_dense_layers(
    adapters: Adapters, hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model, changes = CASES["all linear"]
    adapter = adapters(model, **changes)
    words = ["--ckpt_format", "torch", "--tp", 2, "--dialect", "mindspeed"]
    for name, load in (("only", []), ("keep", ["--adapter", adapter, "--lora", "keep"])):
        mcore, back = tmp_path / name, tmp_path / f"{name} back"
        source = hf_models(model) if load else adapter
        assert run("--to", "mcore", "--load", source, *load, "--save", mcore, *words) == 0
        assert run("--to", "hf", "--load", mcore, "--save", back, "--lora", "only", "--dialect", "mindspeed") == 0
        assert_same(tensors(adapter), tensors(back))
    latent, changes = CASES["latent attention"]
    assert run("--to", "mcore", "--load", adapters(latent, **changes), "--save", tmp_path / "no", *words) == 2
    assert "--dialect mindspeed has no name for it that is known" in capsys.readouterr().err
    assert run("--to", "hf", "--load", adapter, "--save", tmp_path / "no", "--dialect", "pai") == 2
    assert "a LoRA adapter of Hugging Face, which has no dialects" in capsys.readouterr().err
