"""Adapters in vLLM's form: read back as vLLM's loader reads them, compared with what PEFT computes live."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import tiny
from finebridge.merge.export_adapter import export_adapter
from finebridge.merge.lora_delta import AdapterError
from finebridge.merge.placement import Placement, PlacementError
from finebridge.storage.manifest import verify
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, GptOssConfig, conversion_mapping
from transformers.core_model_loading import Concatenate, MergeModulelist, WeightConverter

from .conftest import load, peft_logits

EXPERTS, HIDDEN, INNER = 4, 32, 16
BOTH = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
ATTENTION = ["q_proj", "v_proj"]
LEAVES = {"mixtral": ("w1", "w2", "w3")}  # gate, down, up, as vLLM orders them
BLOCK = {"mixtral": "block_sparse_moe"}
Make = Callable[..., Path]


def gpt_oss() -> Any:
    return AutoModelForCausalLM.from_config(
        GptOssConfig(hidden_size=HIDDEN, intermediate_size=INNER, num_hidden_layers=2, num_attention_heads=4, head_dim=8,
                     num_key_value_heads=2, vocab_size=64, num_local_experts=EXPERTS, pad_token_id=0)
    )  # fmt: skip


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """A tiny base of a family; ``qwen3_moe fused`` has the experts of each block in two tensors."""
    made: dict[str, Path] = {}

    def make(kind: str) -> Path:
        if kind in made:
            return made[kind]
        family, _, fused = kind.partition(" ")
        folder = made[kind] = tmp_path_factory.mktemp("base")
        small = {"intermediate_size": INNER} if family in ("mixtral", "hunyuan_v1_moe") else {}
        small |= {"attention_bias": True} if family == "llama" else {}
        model = gpt_oss() if family == "gpt_oss" else tiny(family, **small)
        model.save_pretrained(folder)
        if fused:
            save_file(model.state_dict(), folder / "model.safetensors", {"format": "pt"})
        return folder

    return make


@pytest.fixture
def make(bases: Callable[[str], Path], tmp_path: Path) -> Make:
    """An adapter of PEFT's for a base, every trained tensor moved away from its start."""

    def adapter(kind: str, dtype: torch.dtype = torch.float32, **settings: Any) -> Path:
        settings = {"r": 4, "lora_alpha": 8, "target_modules": ATTENTION, "target_parameters": BOTH} | settings
        torch.manual_seed(1)
        model = get_peft_model(load(bases(kind)), LoraConfig(task_type="CAUSAL_LM", **settings))
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.data = (parameter.data + 0.3 * torch.randn_like(parameter)).to(dtype)
        folder = tmp_path / "adapter"
        model.save_pretrained(folder)
        (folder / "tokenizer_config.json").write_text("{}")
        return folder

    return adapter


def deltas(base: Path, adapter: Path) -> dict[str, torch.Tensor]:
    """The truth: by parameter, what PEFT adds live."""
    plain = load(base).state_dict()
    merged = PeftModel.from_pretrained(load(base), adapter).merge_and_unload().state_dict()
    return {name: merged[name] - plain[name] for name in plain if not torch.equal(merged[name], plain[name])}


def exported(folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, Any], float]:
    """Tensors by vLLM's module names, the config, and the one scale that vLLM computes from it."""
    tensors = load_file(folder / "adapter_model.safetensors")
    config = json.loads((folder / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / (config["r"] ** (0.5 if config["use_rslora"] else 1))
    return {name.removeprefix("base_model.model."): tensor.float() for name, tensor in tensors.items()}, config, scale


def pop_pair(tensors: dict[str, torch.Tensor], module: str) -> tuple[torch.Tensor, torch.Tensor]:
    return tensors.pop(f"{module}.lora_A.weight"), tensors.pop(f"{module}.lora_B.weight")


def one_by_one(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    """As ``pack_moe`` reads it: all three weights of all experts, equal shapes. What is added, by parameter."""
    tensors, config, scale = exported(folder)
    assert not config["use_rslora"], "pack_moe knows alpha / r only"
    found = {}
    for layer in range(2):
        sums: dict[str, list[torch.Tensor]] = {"gate": [], "down": [], "up": []}
        for expert in range(EXPERTS):
            for place, leaf in zip(sums, LEAVES.get(kind, ("gate_proj", "down_proj", "up_proj")), strict=True):
                a, b = pop_pair(tensors, f"model.layers.{layer}.{BLOCK.get(kind, 'mlp')}.experts.{expert}.{leaf}")
                assert a.shape[1] == (INNER if place == "down" else HIDDEN)
                assert b.shape[0] == (HIDDEN if place == "down" else INNER)
                sums[place].append(scale * b @ a)
        gate, down, up = (torch.stack(parts) for parts in sums.values())
        found[f"model.layers.{layer}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], dim=1)
        found[f"model.layers.{layer}.mlp.experts.down_proj"] = down
    return found | attention(tensors, scale)


def stacked(folder: Path, *, turned: bool) -> dict[str, torch.Tensor]:
    """As ``_stack_moe_lora_weights`` reads it: two stacks a block. What is added, by parameter."""
    tensors, _, scale = exported(folder)
    found = {}
    for layer in range(2):
        block = f"model.layers.{layer}.mlp.experts"
        for name, module, into, out in (
            ("gate_up_proj", f"{block}.base_layer", HIDDEN, 2 * INNER),
            ("down_proj", block, INNER, HIDDEN),
        ):
            a, b = pop_pair(tensors, module)
            left = b.reshape(out, -1, EXPERTS).permute(2, 0, 1)
            added = scale * left @ a.reshape(EXPERTS, -1, into)
            found[f"{block}.{name}"] = added.transpose(1, 2) if turned else added
    return found | attention(tensors, scale)


def attention(tensors: dict[str, torch.Tensor], scale: float) -> dict[str, torch.Tensor]:
    """What plain modules add; nothing else may be left."""
    found = {}
    for module in sorted({name.partition(".lora_")[0] for name in tensors}):
        a, b = pop_pair(tensors, module)
        found[f"{module}.weight"] = scale * b @ a
    assert not tensors
    return found


def same(found: dict[str, torch.Tensor], truth: dict[str, torch.Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() >= truth.keys()
    for name, added in found.items():
        torch.testing.assert_close(added, truth.get(name, torch.zeros_like(added)), atol=tolerance, rtol=0)


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral", "hunyuan_v1_moe"])
def test_experts_one_by_one(kind: str, bases: Callable[[str], Path], make: Make, tmp_path: Path) -> None:
    base, adapter, said = bases(kind), make(kind), []
    export_adapter(adapter, base, tmp_path / "out", say=said.append)
    same(one_by_one(tmp_path / "out", kind), deltas(base, adapter))
    names = ", ".join(sorted(LEAVES.get(kind, ("down_proj", "gate_proj", "up_proj"))))
    assert said == [f"LoRA on the experts of 2 blocks: written for each expert's {names}"]
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["target_parameters"] is None
    assert config["target_modules"] == sorted([*ATTENTION, *names.split(", ")])
    assert (tmp_path / "out" / "tokenizer_config.json").is_file()
    assert verify(tmp_path / "out")["kind"] == "adapter"
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), peft_logits(base, adapter), atol=2e-5, rtol=0)


@pytest.mark.parametrize("kind", ["gpt_oss", "qwen3_moe fused"])
def test_experts_stay_stacked_where_the_base_has_them_fused(
    kind: str, bases: Callable[[str], Path], make: Make, tmp_path: Path
) -> None:
    base, adapter, said = bases(kind), make(kind), []
    export_adapter(adapter, base, tmp_path / "out", say=said.append)
    same(stacked(tmp_path / "out", turned=kind == "gpt_oss"), deltas(base, adapter))
    assert "stays stacked" in said[0]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before), "it is what vLLM reads already"
    assert torch.equal(peft_logits(base, tmp_path / "out"), peft_logits(base, adapter))


@pytest.mark.parametrize("parameter", BOTH)
@pytest.mark.parametrize("kind", ["qwen3_moe", "gpt_oss"])
def test_a_stack_without_lora_gets_zeros(
    kind: str, parameter: str, bases: Callable[[str], Path], make: Make, tmp_path: Path
) -> None:
    base, adapter = bases(kind), make(kind, target_parameters=[parameter])
    export_adapter(adapter, base, tmp_path / "out", say=lambda _: None)
    out = tmp_path / "out"
    same(one_by_one(out, kind) if kind == "qwen3_moe" else stacked(out, turned=True), deltas(base, adapter))
    torch.testing.assert_close(peft_logits(base, out), peft_logits(base, adapter), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {
            "rank_pattern": {"q_proj": 2, "experts.gate_up_proj": 3},
            "alpha_pattern": {"v_proj": 5, "experts.down_proj": 7},
        },
        {"use_rslora": True, "rank_pattern": {r"layers\.1.*\.v_proj": 8}, "alpha_pattern": {"q_proj": 2}},
    ],
    ids=["rslora", "patterns", "both"],
)
def test_every_scale_becomes_the_one_that_vllm_knows(
    settings: dict[str, Any], bases: Callable[[str], Path], make: Make, tmp_path: Path
) -> None:
    for kind in ("qwen3_moe", "gpt_oss"):
        base, adapter, out = bases(kind), make(kind, **settings), tmp_path / kind
        said: list[str] = []
        export_adapter(adapter, base, out, say=said.append)
        same(one_by_one(out, kind) if kind == "qwen3_moe" else stacked(out, turned=True), deltas(base, adapter))
        assert "lora_B were multiplied" in said[1]
    # Stacked, PEFT reads it back as well: its own scales must be the same.
    torch.testing.assert_close(peft_logits(base, out), peft_logits(base, adapter), atol=2e-5, rtol=0)


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True, "rank_pattern": {"q_proj": 2}},
        {"alpha_pattern": {"v_proj": 5}, "lora_bias": True},
        {"target_modules": ["embed_tokens", "q_proj"], "alpha_pattern": {"embed_tokens": 3}},
    ],
    ids=["rslora", "bias", "embedding"],
)
def test_scales_of_an_adapter_without_experts(
    settings: dict[str, Any], bases: Callable[[str], Path], make: Make, tmp_path: Path
) -> None:
    base, adapter = bases("llama"), make("llama", target_parameters=None, **settings)
    export_adapter(adapter, base, tmp_path / "out", say=lambda _: None)
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), peft_logits(base, adapter), atol=2e-5, rtol=0)
    tensors, _, scale = exported(tmp_path / "out")
    queries = {name: tensor for name, tensor in tensors.items() if "q_proj" in name and "bias" not in name}
    same(attention(queries, scale), {k: v for k, v in deltas(base, adapter).items() if "q_proj.weight" in k})


def test_patterns_name_what_is_written(bases: Callable[[str], Path], make: Make, tmp_path: Path) -> None:
    adapter = make("qwen3_moe", rank_pattern={"q_proj": 2, "experts.gate_up_proj": 3})
    export_adapter(adapter, bases("qwen3_moe"), tmp_path / "out", say=lambda _: None)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    ranks = {
        rf"model\.layers\.{layer}\.{name}": rank
        for layer in range(2)
        for name, rank in (
            (r"mlp\.experts\.\d+\.gate_proj", 3), (r"mlp\.experts\.\d+\.up_proj", 3), (r"self_attn\.q_proj", 2),
        )
    }  # fmt: skip
    assert config["rank_pattern"] == ranks
    assert config["alpha_pattern"] == {name: 2 * rank for name, rank in ranks.items()}


def test_an_adapter_in_bf16_keeps_its_bits(bases: Callable[[str], Path], make: Make, tmp_path: Path) -> None:
    base, adapter = bases("qwen3_moe"), make("qwen3_moe", dtype=torch.bfloat16)
    export_adapter(adapter, base, tmp_path / "out", say=lambda _: None)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert {tensor.dtype for tensor in after.values()} == {torch.bfloat16}
    block = "base_model.model.model.layers.0.mlp.experts"
    b = before[f"{block}.base_layer.lora_B.weight"].reshape(2 * INNER, 4, EXPERTS)
    assert torch.equal(after[f"{block}.2.up_proj.lora_B.weight"], b[INNER:, :, 2])
    assert torch.equal(after[f"{block}.2.gate_proj.lora_A.weight"], before[f"{block}.base_layer.lora_A.weight"][8:12])


def test_targets_given_as_a_pattern(bases: Callable[[str], Path], make: Make, tmp_path: Path) -> None:
    base, adapter = bases("qwen3_moe"), make("qwen3_moe")
    path = adapter / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"target_modules": r".*self_attn\.[qv]_proj"}))
    export_adapter(adapter, base, tmp_path / "out", say=lambda _: None)
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    copied = [f"model.layers.{layer}.self_attn.{name}" for layer in range(2) for name in ATTENTION]
    assert config["target_modules"] == ["down_proj", "gate_proj", *copied, "up_proj"]
    torch.testing.assert_close(peft_logits(base, tmp_path / "out"), peft_logits(base, adapter), atol=2e-5, rtol=0)


def test_other_tensors_are_copied_and_what_vllm_refuses_is_told(
    bases: Callable[[str], Path], make: Make, tmp_path: Path
) -> None:
    base = bases("qwen3_moe")
    adapter, said = make("qwen3_moe", modules_to_save=["norm"]), []
    export_adapter(adapter, base, tmp_path / "out", say=said.append)
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    copied = [key for key in before if ".experts." not in key]
    assert any(key.endswith("model.norm.weight") for key in copied)
    assert all(torch.equal(before[key], after[key]) for key in copied)
    assert "refuses adapters with modules_to_save" in said[-1]


@pytest.mark.parametrize("settings", [{}, {"use_rslora": True}], ids=["plain", "rslora"])
def test_an_adapter_without_experts_is_exported_as_it_is(
    settings: dict[str, Any], bases: Callable[[str], Path], make: Make, tmp_path: Path
) -> None:
    adapter, said = make("qwen3_moe", target_parameters=None, **settings), []
    export_adapter(adapter, bases("qwen3_moe"), tmp_path / "out", say=said.append)
    assert said == ["the adapter has no LoRA on fused experts: it is exported as it is"]
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (adapter, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    configs = [json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, tmp_path / "out")]
    assert sorted(configs[0].pop("target_modules")) == sorted(configs[1].pop("target_modules"))
    assert configs[0] == configs[1]


def test_what_cannot_be_exported(bases: Callable[[str], Path], make: Make, tmp_path: Path) -> None:
    base, adapter = bases("qwen3_moe"), make("qwen3_moe")
    out, weights = tmp_path / "out", adapter / "adapter_model.safetensors"
    with pytest.raises(ValueError, match="is or contains the adapter"):
        export_adapter(adapter, base, adapter)
    kept = load_file(weights)
    inner = "base_model.model.model.layers.1.mlp.experts.base_layer"
    for change, message in (
        ({f"{inner}.lora_B.weight": None}, r"layers\.1\.mlp\.experts.*only one of"),
        (
            {f"{inner}.lora_A.weight": None, f"{inner}.lora_B.weight": None},
            r"layers\.1\.mlp\.experts: the adapter changes 1",
        ),
        ({f"{inner}.lora_magnitude_vector": torch.ones(4)}, r"base_layer: lora_magnitude_vector has no use"),
        ({"base_model.model.stray.lora_C": torch.ones(4)}, r"stray\.lora_C is not a tensor"),
    ):
        save_file({key: t for key, t in (kept | change).items() if t is not None}, weights)
        with pytest.raises(AdapterError, match=message):
            export_adapter(adapter, base, out, say=lambda _: None)
        assert [path for path in tmp_path.iterdir() if "out" in path.name] == []
    save_file(kept, weights)
    export_adapter(adapter, base, out, say=lambda _: None)
    with pytest.raises(FileExistsError):
        export_adapter(adapter, base, out, say=lambda _: None)
    with pytest.raises(
        PlacementError, match=r"layers\.0\.mlp\.experts: the model class of the base has no such module"
    ):
        export_adapter(adapter, bases("llama"), tmp_path / "other", say=lambda _: None)


def test_forms_that_vllm_has_not_are_refused(
    bases: Callable[[str], Path], make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    beside = make("gpt_oss", target_parameters=[*BOTH, "mlp.experts.gate_up_proj_bias"])
    with pytest.raises(AdapterError, match=r"experts\.gate_up_proj_bias: vLLM has no LoRA on a parameter like this"):
        export_adapter(beside, bases("gpt_oss"), tmp_path / "out")
    adapter, fused = make("qwen3_moe fused"), bases("qwen3_moe fused")
    in_order = Placement.parameters
    monkeypatch.setattr(Placement, "parameters", lambda self, module: in_order(self, module)[::-1])
    with pytest.raises(
        AdapterError, match=r"layers\.0\.mlp\.experts: vLLM takes down_proj for the way into the experts"
    ):
        export_adapter(adapter, fused, tmp_path / "out")


def test_experts_on_disk_that_are_no_modules_are_refused(
    make: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = make("qwen3_moe fused")
    names = [f"mlp.experts.*.{name}" for name in ("gate", "up")]
    converter = WeightConverter(names, "mlp.experts.gate_up_proj", [MergeModulelist(dim=0), Concatenate(dim=1)])
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "qwen3_moe", [converter])
    tiny("qwen3_moe").save_pretrained(tmp_path / "base")
    with pytest.raises(AdapterError, match="neither one by one nor in two stacks"):
        export_adapter(adapter, tmp_path / "base", tmp_path / "out")
    down = WeightConverter("mlp.experts.*.down", "mlp.experts.down_proj", [MergeModulelist(dim=0)])
    monkeypatch.setitem(conversion_mapping._checkpoint_conversion_mapping_cache, "qwen3_moe", [converter, down])
    tiny("qwen3_moe").save_pretrained(tmp_path / "base")
    with pytest.raises(
        AdapterError, match=r"called model\.layers\.0\.mlp\.experts\.0\.gate, which is no module's weight"
    ):
        export_adapter(adapter, tmp_path / "base", tmp_path / "out")
