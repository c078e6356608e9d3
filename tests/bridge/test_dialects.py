"""The names under which Megatron-Core stores a tensor, there and back."""

import pytest
import torch
from canonical_models import tiny_model
from finebridge.bridge import mindspeed
from finebridge.bridge.dialects import (
    canonical_names,
    check_dialect,
    cuts_of,
    dialects_of,
    extra_states,
    slot_of,
    stored_name,
    ungrouped,
)
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.parallel import LOCAL_CUTS

AT = "decoder.layers.3."
MODELS = [
    {},
    {"bias": True, "tied": True},
    {"experts": 2},
    {"experts": 2, "mla": True, "mtp": 1},
    {"mla": True, "q_lora": False},
]


@pytest.mark.parametrize("model", MODELS, ids=str)
@pytest.mark.parametrize("dialect", ["mcore", "mcore-local", "pai"])
def test_names_go_there_and_back(dialect: str, model: dict[str, object]) -> None:
    names = list(tiny_model(**model))  # pyright: ignore[reportArgumentType]
    stored = [stored_name(name, dialect) for name in names]
    assert len(set(stored)) == len(names)
    assert canonical_names(stored) == dict(zip(stored, names, strict=True))
    assert canonical_names(names) == dict(zip(names, names, strict=True))
    assert dialect in dialects_of(stored, names)


@pytest.mark.parametrize(
    ("name", "mcore", "local"),
    [
        ("self_attention.linear_qkv.layer_norm_weight", None, "input_layernorm.weight"),
        ("mlp.linear_fc1.layer_norm_weight", None, "pre_mlp_layernorm.weight"),
        ("pre_mlp_layernorm.weight", None, None),
        ("self_attention.q_layernorm.weight", None, None),
        ("self_attention.linear_q_up_proj.layer_norm_weight", None, "self_attention.q_layernorm.weight"),
        ("self_attention.linear_kv_up_proj.layer_norm_weight", None, "self_attention.kv_layernorm.weight"),
        ("mlp.experts.local_experts.7.linear_fc1.weight", "mlp.experts.linear_fc1.weight7", None),
        ("mlp.shared_experts.linear_fc1.weight", None, None),
    ],
)
def test_single_names(name: str, mcore: str | None, local: str | None) -> None:
    assert stored_name(AT + name, "mcore") == AT + (mcore or name)
    assert stored_name(AT + name, "mcore-local") == AT + (local or name)
    inside = "mtp.layers.0.transformer_layer."
    assert stored_name(inside + name, "mcore-local") == inside + (local or name)


def test_a_norm_is_named_by_what_else_its_layer_holds() -> None:
    dense = [
        "input_layernorm.weight",
        "pre_mlp_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "mlp.linear_fc1.weight",
    ]
    sparse = [
        "input_layernorm.weight",
        "pre_mlp_layernorm.weight",
        "self_attention.linear_qkv.weight",
        "mlp.router.weight",
    ]
    names = [f"decoder.layers.0.{name}" for name in dense] + [f"decoder.layers.1.{name}" for name in sparse]
    found = canonical_names(names)
    assert found["decoder.layers.0.pre_mlp_layernorm.weight"] == "decoder.layers.0.mlp.linear_fc1.layer_norm_weight"
    assert found["decoder.layers.1.pre_mlp_layernorm.weight"] == "decoder.layers.1.pre_mlp_layernorm.weight"
    assert (
        found["decoder.layers.1.input_layernorm.weight"]
        == "decoder.layers.1.self_attention.linear_qkv.layer_norm_weight"
    )


def test_newer_names_of_multi_token_prediction_are_read() -> None:
    name = "mtp.layers.0.mtp_model_layer.mlp.linear_fc2.weight"
    assert canonical_names([name]) == {name: "mtp.layers.0.transformer_layer.mlp.linear_fc2.weight"}


def test_grouped_experts_are_parted_as_megatron_multiplies_with_them() -> None:
    """``GroupedMLP.forward`` computes ``x @ weight1.view(E, h, -1)[e]``, a linear layer computes ``x @ weight.T``."""
    experts, hidden, ffn = 3, 4, 5
    stored = {
        "decoder.layers.0.mlp.router.weight": torch.zeros(2 * experts, hidden),
        "decoder.layers.0.mlp.experts.weight1": torch.randn(hidden, experts * 2 * ffn),
        "decoder.layers.0.mlp.experts.weight2": torch.randn(experts * ffn, hidden),
    }
    found = ungrouped(stored, 2)
    one, two = stored["decoder.layers.0.mlp.experts.weight1"], stored["decoder.layers.0.mlp.experts.weight2"]
    at = "decoder.layers.0.mlp.experts.local_experts"
    for number in range(experts):
        fc1, fc2 = found.pop(f"{at}.{number}.linear_fc1.weight"), found.pop(f"{at}.{number}.linear_fc2.weight")
        assert torch.equal(fc1.t(), one.view(experts, hidden, -1)[number])
        assert torch.equal(fc2.t(), two.view(experts, -1, hidden)[number])
        assert fc1.untyped_storage().data_ptr() == one.untyped_storage().data_ptr()
    assert list(found) == ["decoder.layers.0.mlp.router.weight"]


def test_grouped_experts_without_their_number_are_refused() -> None:
    name = "decoder.layers.0.mlp.experts.weight1"
    with pytest.raises(BridgeError, match=rf"{name} \(4, 10\): the number of its experts cannot be told"):
        ungrouped({name: torch.zeros(4, 10)}, 1)
    with pytest.raises(BridgeError, match="cannot be told"):
        ungrouped({name: torch.zeros(4, 10), "decoder.layers.0.mlp.router.weight": torch.zeros(3, 4)}, 1)


def test_linear_layers_have_an_extra_state() -> None:
    stored = [
        f"{AT}mlp.experts.linear_fc1.weight0",
        f"{AT}mlp.experts.linear_fc1.weight1",
        f"{AT}input_layernorm.weight",
    ]
    assert extra_states(stored, last_stage=False) == [f"{AT}mlp.experts.linear_fc1._extra_state"]
    assert extra_states(["mtp.layers.0.eh_proj.weight", "decoder.final_layernorm.weight"], last_stage=True) == [
        "mtp.layers.0.eh_proj._extra_state",
        "output_layer._extra_state",
    ]


def test_other_dialects_are_refused() -> None:
    for name in ("nemo", "Mcore", ""):
        with pytest.raises(
            BridgeError, match=f"--dialect {name}: not known; choose from mcore, mcore-local, mindspeed, pai"
        ):
            check_dialect(name)
    with pytest.raises(BridgeError, match="--dialect mindspeed: its checkpoints have the format torch only"):
        check_dialect("mindspeed", "torch_dist")


@pytest.mark.parametrize("dialect", ["mindspeed", "pai"])
@pytest.mark.parametrize(
    "name",
    [
        "decoder.layers.0.self_attention.in_proj.weight",
        "mtp.layers.0.transformer_layer.mlp.linear_fc2.bias",
        "visual.x.weight",
    ],
)
def test_a_tensor_without_a_known_name_is_refused(dialect: str, name: str) -> None:
    with pytest.raises(BridgeError, match=f"tensor {name}: --dialect {dialect} has no name for it"):
        slot_of(name, dialect)


def test_adapters_of_mindspeed_have_their_canonical_names() -> None:
    for layer in ("self_attention.linear_qkv", "self_attention.linear_proj", "mlp.linear_fc1", "mlp.linear_fc2"):
        name = f"{AT}{layer}.lora_A.default.weight"
        assert slot_of(name, "mindspeed").name == name
    with pytest.raises(BridgeError, match="--dialect pai has no name for it"):
        slot_of(name, "pai")


def test_the_dialects_of_a_checkpoint_are_told_by_its_names() -> None:
    dense, latent = tiny_model(), tiny_model(mla=True, experts=2, mtp=1)
    for model, dialect, found in [
        (dense, "mcore", ["mcore", "pai"]),
        (dense, "mcore-local", ["mcore-local", "mindspeed", "pai"]),
        (dense, "mindspeed", ["mcore-local", "mindspeed", "pai"]),
        (latent, "mcore", ["mcore", "pai"]),
        (latent, "mcore-local", ["mcore-local", "pai"]),
        (latent, "mindspeed", ["mindspeed"]),
    ]:
        stored = {slot_of(name, dialect, mtp=model is latent).name for name in model}
        assert dialects_of(stored, model) == found
    stored = {stored_name(name, "mcore-local" if ".0." in name else "mcore") for name in dense}
    assert dialects_of(stored, dense) == []


def test_a_down_projection_is_cut_when_it_has_too_few_rows() -> None:
    model = {name: tuple(tensor.shape) for name, tensor in tiny_model(mla=True).items()}
    assert cuts_of(model) == {}
    half = {name: (shape[0] // 2, *shape[1:]) if "down_proj" in name else shape for name, shape in model.items()}
    assert cuts_of(half) == LOCAL_CUTS
    assert cuts_of({stored_name(name, "mcore-local"): shape for name, shape in half.items()}) == LOCAL_CUTS
    assert cuts_of({slot_of(name, "mindspeed").name: shape for name, shape in model.items()}) == mindspeed.CUTS
