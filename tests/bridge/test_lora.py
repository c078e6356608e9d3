"""LoRA across the bridge: the same adapter comes back by its bits, the merged model is the one of ``finebridge merge``."""

import json
import shutil
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.family import Row
from finebridge.bridge.lora import NAMES, Pair, to_hf, to_mcore
from finebridge.bridge.mapping import QKV, Copy, Gated
from finebridge.finetune.cli import main
from finebridge.merge.merge_lora import merge
from hypothesis import given, settings
from hypothesis import strategies as st
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


# ---- the fused layers by themselves


def whole_numbers(seed: int) -> Callable[..., torch.Tensor]:
    """Random tensors whose products are exact in fp32, whatever the order of sums; without zeros."""
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randint(1, 9, shape, generator=source).float()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6), gated=st.booleans(), shared=st.booleans(), there=st.sets(st.integers(0, 2), min_size=1)
)
def test_stacked_factors_are_the_same_change_and_come_apart(
    seed: int, gated: bool, shared: bool, there: set[int]
) -> None:
    numbers = whole_numbers(seed)
    rule, sizes = (Gated(), [6, 6]) if gated else (QKV(4, 2, 3), [12, 6, 6])
    row = Row("decoder.layers.0.x.linear_y.weight", rule, tuple(f"part{number}.weight" for number in range(len(sizes))))
    there = {number % len(sizes) for number in there}
    ranks = [2] * 3 if shared else [1 + (seed + number) % 3 for number in range(3)]
    same = numbers(2, 5)
    pairs = {
        row.hf[number]: Pair(
            same if shared else numbers(ranks[number], 5), numbers(sizes[number], ranks[number]), Fraction(3)
        )
        for number in there
    }
    fused = to_mcore(pairs, [row])
    (whole,) = fused.pairs.values()
    expected = [
        pairs[name].b @ pairs[name].a if name in pairs else torch.zeros(size, 5)
        for name, size in zip(row.hf, sizes, strict=True)
    ]
    assert torch.equal(whole.b @ whole.a, rule.to_mcore(expected))
    assert fused.alpha == 3 * fused.rank
    if shared:
        assert fused.rank == 2
    back = to_hf(fused.tensors("mindspeed"), [row], alpha=Fraction(fused.alpha))
    assert back.keys() == pairs.keys()
    for name, pair in pairs.items():
        assert (back[name].scale, back[name].rank) == (3, pair.rank)
        assert torch.equal(back[name].a, pair.a)
        assert torch.equal(back[name].b, pair.b)


def test_factors_trained_since_stay_whole_and_untrained_ones_too() -> None:
    numbers = whole_numbers(1)
    row = Row("decoder.layers.0.mlp.linear_fc1.weight", Gated(), ("gate.weight", "up.weight"))
    pairs = {name: Pair(numbers(2, 5), numbers(6, 2), Fraction(2)) for name in row.hf}
    factors = to_mcore(pairs, [row]).tensors("mindspeed")
    a, b = factors
    for trained, value in ((True, numbers(12, 4)), (False, torch.zeros(12, 4))):
        back = to_hf({a: factors[a], b: value}, [row], alpha=Fraction(8))
        assert [torch.equal(pair.a, factors[a]) for pair in back.values()] == [True, True]
        assert torch.equal(torch.cat([pair.b for pair in back.values()]), value), trained


def test_factors_by_part_are_hugging_faces() -> None:
    """Megatron-Bridge's CanonicalLoRA has a pair for query, key, value, gate and up each."""
    numbers, row = whole_numbers(1), Row("x.linear_qkv.weight", QKV(4, 2, 3), ("q", "k", "v"))
    a, b = numbers(2, 5), numbers(6, 2)
    name = "x.linear_qkv.adapter.adapter_k.linear_"
    assert to_hf({f"{name}in.weight": a, f"{name}out.weight": b}, [row], alpha=Fraction(4)) == {
        "k": Pair(a, b, Fraction(2))
    }
    row = Row("x.linear_qkv.weight", Copy(), ("qkv",))
    with pytest.raises(BridgeError, match=r"x.linear_qkv \(k\): LoRA on this part, but the layer is qkv"):
        to_hf({f"{name}in.weight": a, f"{name}out.weight": b}, [row], alpha=Fraction(4))
    with pytest.raises(BridgeError, match="LoRA of a kind that is not converted"):
        to_hf({"x.linear_qkv.lora_A.other.weight": a}, [row], alpha=Fraction(4))


def test_layers_of_a_kind_are_filled_up_and_named() -> None:
    numbers, layers = whole_numbers(1), range(3)
    kinds = ["self_attention.linear_proj", "mlp.linear_fc2", "mlp.shared_experts.linear_fc2"]
    rows = [Row(f"decoder.layers.{n}.{kind}.weight", Copy(), (f"{n}.{kind}",)) for n in layers for kind in kinds]
    rows.append(Row("embedding.word_embeddings.weight", Copy(), ("embed",)))
    pair = Pair(numbers(2, 5), numbers(6, 2), Fraction(4))
    fused = to_mcore({"1.self_attention.linear_proj": pair, "0.mlp.linear_fc2": pair}, rows)
    assert fused.targets == ["linear_proj", "mlp.linear_fc2"]
    assert len(fused.pairs) == 6
    assert not fused.pairs["decoder.layers.0.self_attention.linear_proj.weight"].a.any()
    assert "4 of these layers are not in the adapter and get zeros" in fused.said[1]


REFUSED: dict[str, tuple[dict[str, Pair], str]] = {
    "embedding": (
        {"embed": Pair(torch.ones(1, 3), torch.ones(4, 1), Fraction(1))},
        "embed: .* linear layers of attention",
    ),
    "scales": (
        {
            "q": Pair(torch.ones(1, 3), torch.ones(4, 1), Fraction(1)),
            "o": Pair(torch.ones(1, 4), torch.ones(3, 1), Fraction(2)),
        },
        "o is scaled by 2, q by 1",
    ),
    "alpha": ({"q": Pair(torch.ones(1, 3), torch.ones(4, 1), Fraction(1, 2))}, "alpha 0.5 for rank 1"),
    "rows": (
        {"q": Pair(torch.ones(1, 3), torch.ones(5, 1), Fraction(1))},
        "q, k, v: LoRA's B: 5 rows where 4 are expected",
    ),
    "columns": (
        {name: Pair(torch.ones(1, width), torch.ones(4, 1), Fraction(1)) for name, width in (("q", 3), ("k", 2))},
        "q, k, v: their A have the shapes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_has_not_is_refused(name: str) -> None:
    pairs, message = REFUSED[name]
    rows = [
        Row("embedding.word_embeddings.weight", Copy(), ("embed",)),
        Row("decoder.layers.0.self_attention.linear_qkv.weight", QKV(2, 2, 2), ("q", "k", "v")),
        Row("decoder.layers.0.self_attention.linear_proj.weight", Copy(), ("o",)),
    ]
    with pytest.raises(BridgeError, match=message):
        to_mcore(pairs, rows)


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
    assert run("--to", "hf", "--load", tmp_path / "keep", "--save", tmp_path / "only", "--lora", "only") == 0
    assert_same(tensors(adapter), tensors(tmp_path / "only"))


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


@needs_megatron
@pytest.mark.parametrize(("case", "tp"), [("all linear", 2), ("experts", 1)])
def test_megatron_computes_the_same(case: str, tp: int, adapters: Adapters, hf_models: Models, tmp_path: Path) -> None:
    """Loaded strictly into PEFT's layers on real Megatron-Core's: logits of the model with the live adapter."""
    model, changes = CASES[case]
    adapter = adapters(model, **changes)
    words = [
        "--load",
        hf_models(model),
        "--adapter",
        adapter,
        "--save",
        tmp_path / "mcore",
        "--lora",
        "keep",
        "--tp",
        tp,
    ]
    assert run("--to", "mcore", *words, "--ckpt_format", "torch", "--dialect", "mcore-local") == 0
    args = torch.load(tmp_path / "mcore/release/mp_rank_00/model_optim_rng.pt", weights_only=False)["args"]
    settings = {"r": args.lora_r, "lora_alpha": args.lora_alpha, "target_modules": args.lora_target_modules}
    live = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(hf_models(model)), adapter)
    ids = torch.arange(20)[None]
    found = lora_logits(
        live.base_model.model.config, tmp_path / "mcore/release", settings, ids, rows=args.padded_vocab_size, tp=tp
    )
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
    adapters: Adapters, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its torch_dist holds gate and up of lora_B by rank: read as they stand they would be mixed up."""
    from finebridge.bridge import lora_source

    assert NAMES.keys() == set(lora_source._FORMS.values())
    forms = {**lora_source._FORMS, "torch_dist": "mindspeed"}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lora_source, "_FORMS", forms)
        patch.setattr("finebridge.bridge.args._body", lambda *_: {"tensor_model_parallel_size": 2})
        assert (
            run("--to", "mcore", "--load", adapters("llama", target_modules=DENSE), "--save", tmp_path / "swift") == 0
        )
    error = refuse(capsys, tmp_path / "out", "--to", "hf", "--load", tmp_path / "swift")
    assert "ms-swift stores gate and up of it by rank" in error
