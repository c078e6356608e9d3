"""Every kind of adapter against PEFT's own live model: dense with untied and tied embeddings, mixtures of experts."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, SMALL, tiny
from finebridge.merge.lora_delta import AdapterError
from finebridge.merge.merge_lora import main, merge
from finebridge.train.moe import experts_of
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoModelForMaskedLM, GPT2Config

from .conftest import arguments, load, logits, peft_logits, save_base, tensors

MakeAdapter = Callable[..., Path]
TIED = {"tied": True}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    made: dict[str, Path] = {}

    def make(**settings: Any) -> Path:
        key = str(settings)
        if key not in made:
            made[key] = save_base(tmp_path_factory.mktemp("base"), biased=True, **settings)
        return made[key]

    return make


DENSE: list[tuple[dict[str, Any], dict[str, Any], int]] = [  # adapter, base, weights that change
    ({"use_dora": True}, {}, 6),
    ({"rank_pattern": {"q_proj": 2, "layers.1.*v_proj": 8}, "alpha_pattern": {"down_proj": 32}, "use_rslora": True}, {}, 6),
    ({"layers_to_transform": [1]}, {}, 3),
    ({"modules_to_save": ["lm_head", "input_layernorm", "mlp"], "target_modules": ["q_proj"]}, {}, 11),
    ({"modules_to_save": ["lm_head", "embed_tokens"]}, {}, 8),
    ({"bias": "all"}, {}, 14),
    ({"bias": "lora_only"}, {}, 10),
    ({"lora_bias": True, "target_modules": ["q_proj", "o_proj"]}, {}, 8),
    ({"target_modules": ["embed_tokens", "q_proj", "lm_head"]}, {}, 4),
    ({"target_modules": [], "target_parameters": ["q_proj.weight"]}, {}, 2),
    ({"target_modules": ["lm_head", "q_proj"], "use_dora": True}, TIED, 3),
    ({"target_modules": ["embed_tokens"]}, TIED, 1),
    ({"target_modules": ["embed_tokens", "lm_head"]}, TIED, 2),
    ({"modules_to_save": ["lm_head"]}, TIED, 7),
    ({"modules_to_save": ["embed_tokens"]}, TIED, 7),
    ({"modules_to_save": ["embed_tokens", "lm_head"]}, TIED, 8),
    ({"target_modules": ["embed_tokens"], "ensure_weight_tying": True}, TIED, 1),
    ({"modules_to_save": ["embed_tokens", "lm_head"], "ensure_weight_tying": True}, TIED, 7),
]  # fmt: skip


@pytest.mark.parametrize(("settings", "on", "changed"), DENSE, ids=str)
def test_logits_are_pefts(
    settings: dict[str, Any],
    on: dict[str, Any],
    changed: int,
    bases: Callable[..., Path],
    make_adapter: MakeAdapter,
    tmp_path: Path,
) -> None:
    base = bases(**on)
    before = {path.name: path.read_bytes() for path in base.iterdir()}
    adapter = make_adapter(base, **settings)
    truth = peft_logits(base, adapter)
    assert (truth - logits(load(base))).abs().max() > 0.01, "the adapter must matter"
    proof = merge(base, [adapter], tmp_path / "out", save_dtype="fp32")
    assert len(proof.sums) == changed
    assert (logits(load(tmp_path / "out")) - truth).abs().max() < 1e-5
    ties = json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"]
    touched = {"embed_tokens", "lm_head"} & {*settings.get("target_modules", []), *settings.get("modules_to_save", [])}
    assert ties is (bool(on) and (not touched or "ensure_weight_tying" in settings))
    assert ("lm_head.weight" in tensors(tmp_path / "out")) is not ties
    assert {path.name: path.read_bytes() for path in base.iterdir()} == before, "the base is untouched"


def test_a_tied_pair_that_is_stored_twice_stays_one(
    bases: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapter = make_adapter(bases(**TIED), modules_to_save=["embed_tokens"], ensure_weight_tying=True)
    both = save_base(tmp_path / "both", tied=True, biased=True)
    values = tensors(both)
    save_file(values | {"lm_head.weight": values["model.embed_tokens.weight"].clone()}, both / "model.safetensors")
    merge(both, [adapter], tmp_path / "out")
    assert "lm_head.weight" not in tensors(tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - peft_logits(bases(**TIED), adapter)).abs().max() < 1e-5


def test_a_weight_that_is_stored_as_in_out(tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "base")
    model = get_peft_model(
        load(tmp_path / "base"), LoraConfig(r=4, target_modules=["c_attn", "c_proj"], fan_in_fan_out=True)
    )
    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    model.save_pretrained(tmp_path / "adapter")
    truth = peft_logits(tmp_path / "base", tmp_path / "adapter")
    merge(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - truth).abs().max() < 1e-5


def several(base: Path, adapters: list[Path], weights: list[float]) -> torch.Tensor:
    """PEFT's live model with all adapters active, each scaled."""
    model = PeftModel.from_pretrained(load(base), adapters[0], adapter_name="a0")
    for number, adapter in enumerate(adapters[1:], 1):
        model.load_adapter(adapter, adapter_name=f"a{number}")
    model.base_model.set_adapter([f"a{number}" for number in range(len(adapters))])
    for module in model.modules():
        if isinstance(module, LoraLayer):
            for number, weight in enumerate(weights):
                if f"a{number}" in module.scaling:
                    module.scaling[f"a{number}"] *= weight
    return logits(model.eval())


def test_several_adapters_with_weights(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    adapters = [make_adapter(), make_adapter(r=2, target_modules=["q_proj", "o_proj"], use_rslora=True)]
    truth = several(base, adapters, [0.7, -0.4])
    words = ["--adapter_model_path", str(adapters[1]), "--adapter_weights", "0.7", "-0.4", "--verify", "--workers", "1"]
    assert main(arguments(base, adapters[0], tmp_path / "out", *words)) == 0
    assert (logits(load(tmp_path / "out")) - truth).abs().max() < 1e-5
    assert "verify: logits of 5 prompts differ by at most " in capsys.readouterr().out
    merge(base, adapters, tmp_path / "one", weights=[1, 1])
    assert (logits(load(tmp_path / "one")) - several(base, adapters, [1, 1])).abs().max() < 1e-5
    for weights in ([1.0], [1.0, float("nan")], [1.0, 0.0]):
        with pytest.raises(ValueError, match="--adapter_weights"):
            merge(base, adapters, tmp_path / "refused", weights=weights)


def test_whole_modules_of_weighted_adapters_are_sums_of_their_changes(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    adapters = [make_adapter(modules_to_save=["lm_head"]), make_adapter(modules_to_save=["lm_head"], r=2)]
    merge(base, adapters, tmp_path / "out", weights=[0.25, 0.5])
    trained = [
        load_file(adapter / "adapter_model.safetensors")["base_model.model.lm_head.weight"] for adapter in adapters
    ]
    own = tensors(base)["lm_head.weight"]
    wanted = own + 0.25 * (trained[0] - own) + 0.5 * (trained[1] - own)
    assert (tensors(tmp_path / "out")["lm_head.weight"] - wanted).abs().max() < 1e-6


def test_the_result_does_not_depend_on_workers_or_shards_nor_much_on_blocks(
    base: Path, make_adapter: MakeAdapter, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make_adapter(use_dora=True, modules_to_save=["lm_head"])
    merge(base, [adapter], tmp_path / "one", "bf16", workers=1)
    merge(base, [adapter], tmp_path / "many", "bf16", workers=3, max_shard_size="9KB")
    merge(base, [adapter], tmp_path / "exact", "fp32")
    monkeypatch.setattr("finebridge.merge.stream.BLOCK", 96)
    merge(base, [adapter], tmp_path / "small", workers=3)
    one, many, small = (tensors(tmp_path / name) for name in ("one", "many", "small"))
    assert len(list((tmp_path / "many").glob("*.safetensors"))) > 3
    assert all(torch.equal(one[name], many[name]) for name in one)
    for name, value in tensors(tmp_path / "exact").items():
        assert torch.equal(value.bfloat16(), many[name]), "the narrow types are the wide one, rounded once"
        assert (value - small[name]).abs().max() < 1e-6


# ---- mixtures of experts


def moe(model_type: str, folder: Path, **settings: Any) -> tuple[Path, Path]:
    """A tiny base, as transformers saves it (an expert a tensor), and PEFT's adapter on its fused experts and linears."""
    folder.mkdir(exist_ok=True)
    heads = {"num_key_value_heads": 4} if model_type.startswith("deepseek") else {}
    model = tiny(model_type, **heads)
    model.save_pretrained(folder / "base")
    fused = experts_of(model).fused
    settings = {"target_modules": "all-linear", "target_parameters": fused} | settings
    config = LoraConfig(task_type="CAUSAL_LM", r=4, lora_alpha=8, **settings)
    adapted = get_peft_model(model, config)
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder / "adapter")
    return folder / "base", folder / "adapter"


@pytest.mark.parametrize("model_type", FAMILIES)
def test_experts(model_type: str, tmp_path: Path) -> None:
    base, adapter = moe(model_type, tmp_path)
    truth = peft_logits(base, adapter)
    merge(base, [adapter], tmp_path / "out")
    assert (truth - logits(load(base))).abs().max() > 0.01
    assert (logits(load(tmp_path / "out")) - truth).abs().max() < 2e-5
    assert list(tensors(tmp_path / "out")) == list(tensors(base)), "the base's own layout stays"


def per_expert(adapter: Path, folder: Path) -> Path:
    """The same adapter with a pair of factors an expert's matrix, as engines before fused experts wrote it."""
    folder.mkdir()
    values: dict[str, torch.Tensor] = {}
    for key, value in load_file(adapter / "adapter_model.safetensors").items():
        module, found, factor = key.partition(".mlp.experts.")
        if not found or not factor.endswith("lora_A.weight"):
            values |= {} if found else {key: value}
            continue
        b = load_file(adapter / "adapter_model.safetensors")[key.replace("lora_A", "lora_B")]
        rank = value.shape[0] // 4
        names = ("gate_proj", "up_proj") if "base_layer" in factor else ("down_proj",)
        for expert in range(4):
            own = b.view(b.shape[0], rank, 4)[:, :, expert]
            for name, rows in zip(names, own.chunk(len(names)), strict=True):
                place = f"{module}.mlp.experts.{expert}.{name}"
                values[f"{place}.lora_A.weight"] = value[expert * rank : (expert + 1) * rank].clone()
                values[f"{place}.lora_B.weight"] = rows.clone()
    save_file(values, folder / "adapter_model.safetensors")
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"target_parameters": None}
    for pattern in ("rank_pattern", "alpha_pattern"):  # PEFT's own, for the fused pair of gate and up
        config[pattern] = {
            f"experts.*{name}": value for value in config[pattern].values() for name in ("gate_proj", "up_proj")
        }
    (folder / "adapter_config.json").write_text(json.dumps(config))
    return folder


def test_experts_however_base_and_adapter_hold_them(tmp_path: Path) -> None:
    base, adapter = moe("qwen3_moe", tmp_path)
    parts = per_expert(adapter, tmp_path / "parts")
    fused = tmp_path / "fused"
    model = load(base)
    model.save_pretrained(fused)
    for file in fused.glob("*.safetensors"):
        file.unlink()
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, fused / "model.safetensors")
    assert "model.layers.0.mlp.experts.gate_up_proj" in tensors(fused)
    truth = peft_logits(base, adapter)
    for number, (on, what) in enumerate([(base, parts), (fused, adapter), (fused, parts)]):
        out = tmp_path / f"out{number}"
        merge(on, [what], out)
        assert list(tensors(out)) == list(tensors(on))
        assert (logits(load(out)) - truth).abs().max() < 1e-5


def test_an_adapter_whose_experts_the_base_has_not(base: Path, tmp_path: Path) -> None:
    _, adapter = moe("qwen3_moe", tmp_path)
    with pytest.raises(AdapterError, match=r"layers\.0\.mlp\.experts: the model class of the base has no such"):
        merge(base, [adapter], tmp_path / "out")
    assert not (tmp_path / "out").exists()


# ---- weights as [in, out], and tensors that several parameters share


def trained(model: Any, folder: Path, **settings: Any) -> Path:
    """PEFT's adapter for a model that was saved, every trained tensor moved away from its start."""
    adapted = get_peft_model(model, LoraConfig(**{"r": 4, "lora_alpha": 8} | settings))
    torch.manual_seed(1)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data += 0.3 * torch.randn_like(parameter)
    adapted.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("prefixed", [True, False], ids=["as saved", "as on the hub"])
@pytest.mark.parametrize("targets", [["c_proj", "lm_head"], ["c_attn", "attn.c_proj"], ["attn.c_proj"]], ids=str)
def test_square_weights_as_in_out_whatever_the_adapters_config_says(
    targets: list[str], prefixed: bool, tmp_path: Path
) -> None:
    """PEFT writes the ``fan_in_fan_out`` of the module that it wrapped last, here often a head that has none."""
    torch.manual_seed(0)
    config = GPT2Config(
        n_embd=32, n_layer=2, n_head=4, vocab_size=64, n_positions=32, tie_word_embeddings="lm_head" not in targets
    )
    base = tmp_path / "base"
    AutoModelForCausalLM.from_config(config).save_pretrained(base)
    adapter = trained(load(base), tmp_path / "adapter", target_modules=targets)
    truth = peft_logits(base, adapter)
    if not prefixed:
        plain = {name.removeprefix("transformer."): value for name, value in tensors(base).items()}
        save_file(plain, base / "model.safetensors", metadata={"format": "pt"})
    merge(base, [adapter], tmp_path / "out")
    assert (logits(load(tmp_path / "out")) - truth).abs().max() < 2e-5


VISION = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
}


def two_names() -> Any:
    """A model of pictures and text whose tied embedding has another name on disk than in memory."""
    text = {key: value for key, value in SMALL.items() if "expert" not in key}
    images = {"mm_tokens_per_image": 4, "image_token_index": 60, "boi_token_index": 61, "eoi_token_index": 62}
    config = AutoConfig.for_model("gemma3", text_config=text, vision_config={**VISION, "patch_size": 4}, **images)
    return AutoModelForImageTextToText.from_config(config)


def two_ties() -> Any:
    """An encoder that ties the bias of its head too."""
    return AutoModelForMaskedLM.from_config(AutoConfig.for_model("bert", **SMALL, max_position_embeddings=32))


SHARED: dict[str, tuple[Callable[[], Any], str, dict[str, Any]]] = {
    "head, other name on disk": (two_names, "ImageTextToText", {"target_modules": ["q_proj", "lm_head"]}),
    "embedding, other name on disk": (two_names, "ImageTextToText", {"target_modules": ["embed_tokens"]}),
    "head, and a bias that is tied too": (two_ties, "MaskedLM", {"target_modules": ["query", "decoder"]}),
}


@pytest.mark.parametrize("case", SHARED)
def test_all_that_was_tied_is_there_when_it_is_parted(case: str, tmp_path: Path) -> None:
    make, kind, settings = SHARED[case]
    torch.manual_seed(0)
    model = make()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            parameter.data.normal_(0, 0.1)
    model.save_pretrained(tmp_path / "base")
    auto = {"ImageTextToText": AutoModelForImageTextToText, "MaskedLM": AutoModelForMaskedLM}[kind]
    adapter = trained(model, tmp_path / "adapter", **settings)
    live = PeftModel.from_pretrained(auto.from_pretrained(tmp_path / "base", dtype=torch.float32), adapter).eval()
    merge(tmp_path / "base", [adapter], tmp_path / "out")
    merged, report = auto.from_pretrained(tmp_path / "out", dtype=torch.float32, output_loading_info=True)
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert (logits(merged.eval()) - logits(live)).abs().max() < 2e-5


def test_a_pair_that_the_config_ties_but_the_files_do_not(
    bases: Callable[..., Path], make_adapter: MakeAdapter, tmp_path: Path
) -> None:
    """As transformers does, which ties two stored weights only when they are equal."""
    both = save_base(tmp_path / "both", tied=True, biased=True)
    values = tensors(both)
    save_file(values | {"lm_head.weight": torch.ones(64, 32)}, both / "model.safetensors", metadata={"format": "pt"})
    adapter = make_adapter(both, target_modules=["embed_tokens"])
    merge(both, [adapter], tmp_path / "out")
    assert torch.equal(tensors(tmp_path / "out")["lm_head.weight"], torch.ones(64, 32))
    assert (logits(load(tmp_path / "out")) - peft_logits(both, adapter)).abs().max() < 1e-5
