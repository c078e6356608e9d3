"""What real Megatron-Core makes of our arguments and of canonical tensors that a second, plain way has made."""

import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from .conftest import MODELS, thinned, tiny
from .oracle import load_with_megatron, megatron_logits, needs_megatron, save_with_megatron

pytestmark = needs_megatron
CLOSE = 1e-5
IDS = torch.randint(0, 70, (2, 24), generator=torch.Generator().manual_seed(3))
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": 16}
LATENT_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}
LLAMA32 = {
    "rope_type": "llama3", "rope_theta": 5e5, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
CASES: dict[str, tuple[str, dict[str, Any]]] = {name: (name, {}) for name in MODELS} | {
    "llama_plain": ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "llama_multi_head": ("llama_tied", {"num_key_value_heads": 4, "head_dim": 4}),
    "llama_3.2": ("llama", {"rope_parameters": LLAMA32}),
    "llama_linear": ("llama", {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "mistral_window": ("mistral", {"sliding_window": 5}),
    "qwen2_window": ("qwen2", {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1}),
    "qwen2_yarn": ("qwen2", {"rope_parameters": YARN}),
    "qwen3_moe_normed": ("qwen3_moe", {"norm_topk_prob": True}),
    "qwen3_moe_steps": ("qwen3_moe", {"decoder_sparse_step": 2, "mlp_only_layers": [3]}),
    "deepseek_v2_yarn": ("deepseek_v2", {"rope_parameters": LATENT_YARN, "routed_scaling_factor": 1.5}),
    "deepseek_v2_groups": ("deepseek_v2", {
        "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2, "n_routed_experts": 8, "q_lora_rank": 8,
    }),
    "ling_1": ("ling", {
        "moe_router_enable_expert_bias": False, "score_function": "softmax", "n_group": 1, "topk_group": 1,
        "use_qk_norm": False, "use_qkv_bias": True, "num_shared_experts": 2, "routed_scaling_factor": 1.0,
    }),
    "ling_1_softmax_first": ("ling", {
        "moe_router_enable_expert_bias": False, "score_function": "softmax", "n_group": 1, "topk_group": 1,
        "use_qk_norm": False, "norm_topk_prob": False, "partial_rotary_factor": 1.0,
    }),
    "hy_v3_layers": ("hy_v3", {"mlp_layer_types": ["dense", "sparse", "dense", "sparse"]}),
    "qwen3_next_other": ("qwen3_next", {"linear_num_key_heads": 4, "layer_types": ["linear_attention"] * 3 + ["full_attention"]}),
    "hunyuan_plain_base": ("hunyuan_v1_dense", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}),
    "deepseek_v3_yarn": ("deepseek_v3", {"rope_parameters": LATENT_YARN}),
}  # fmt: skip


def model_of(name: str, **more: Any) -> Any:
    """A tiny model whose weights are large enough that each of them moves the logits."""
    base, changes = CASES[name]
    model = tiny(base, **changes, **more)
    factor = 4 if base == "qwen3_next" else 8  # delta nets enlarge what is lost by rounding with their weights
    with torch.no_grad():
        for key, value in model.named_parameters():
            if not key.endswith(("norm.weight", "A_log", "dt_bias")):
                value.mul_(factor)
    return model


def canonical_of(model: Any) -> dict[str, Tensor]:
    """The canonical tensors of a model in memory."""
    state, config = model.state_dict(), model.config
    state = _as_most(state, config)
    made = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        made["output_layer.weight"] = state["lm_head.weight"]
    last = max(int(key.split(".")[2]) for key in state if key.startswith("model.layers."))
    for layer in range(last + 1):
        start = f"model.layers.{layer}."
        theirs = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        theirs = {_usual(key): value for key, value in theirs.items()}
        if "self_attn.kv_b_proj.weight" in theirs:
            ours = _latent(theirs)
        else:
            ours = _delta_net(theirs, config) if "linear_attn.A_log" in theirs else _grouped(theirs, config)
        ours |= _sparse(theirs) if "mlp.gate.weight" in theirs else _dense(theirs)
        further = layer - config.num_hidden_layers
        place = f"decoder.layers.{layer}." if further < 0 else f"mtp.layers.{further}.transformer_layer."
        made |= {place + key: value for key, value in ours.items()}
        if further >= 0:  # of these models only Ling's has them
            own = ("enorm.weight", "hnorm.weight", "eh_proj.weight", "final_layernorm.weight")
            made |= {f"mtp.layers.{further}.{key}": theirs[key] for key in own}
    return {key: value.clone() for key, value in made.items()}


IN_MOST = {  # how a name is written by models in memory -> by most of them
    "word_embeddings": "embed_tokens", ".attention.dense.": ".self_attn.o_proj.",
    ".attention.query_layernorm.": ".self_attn.q_norm.", ".attention.key_layernorm.": ".self_attn.k_norm.",
    ".gate.expert_bias": ".gate.e_score_correction_bias", ".mlp.e_score": ".mlp.gate.e_score",
}  # fmt: skip


def _as_most(state: Mapping[str, Tensor], config: Any) -> dict[str, Tensor]:
    """A model's tensors under the names of most, with query, key and value apart and the experts of a layer together."""
    made: dict[str, Tensor] = {}
    for name, value in state.items():
        key = functools.reduce(lambda text, pair: text.replace(*pair), IN_MOST.items(), name)
        start, packed, kind = key.partition("attention.query_key_value.")
        if not packed:
            made[key] = value
            continue
        rows = [config.head_dim * heads for heads in (config.num_attention_heads, *2 * [config.num_key_value_heads])]
        for part, piece in zip("qkv", value.split(rows), strict=True):
            made[f"{start}self_attn.{part}_proj.{kind}"] = piece
    for place in {key.partition("experts.0.")[0] for key in made if ".mlp.experts.0." in key}:
        every = range(config.num_experts)
        parts = {
            kind: torch.stack([made.pop(f"{place}experts.{expert}.{kind}_proj.weight") for expert in every])
            for kind in ("gate", "up", "down")
        }
        made[f"{place}experts.gate_up_proj"] = torch.cat([parts["gate"], parts["up"]], dim=1)
        made[f"{place}experts.down_proj"] = parts["down"]
    return made


def _usual(key: str) -> str:
    """Hunyuan's and Qwen3-Next's names as those of others."""
    names = {
        "gate.wg.": "gate.", "shared_mlp.": "shared_experts.", "shared_expert.": "shared_experts.",
        "query_layernorm": "q_norm", "key_layernorm": "k_norm",
    }  # fmt: skip
    for other, usual in names.items():
        key = key.replace(other, usual)
    return key


def _delta_net(theirs: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    """Row by row: each key head has a query, a key, its values and their gates; then a beta and an alpha a value."""
    kinds: dict[str, list[Tensor]] = {kind: [] for kind in "qkvzba"}
    each = config.linear_num_value_heads // config.linear_num_key_heads
    wide = each * config.linear_value_head_dim
    sizes = {"q": config.linear_key_head_dim, "k": config.linear_key_head_dim, "v": wide, "z": wide}
    for name, parts in [("in_proj_qkvz", sizes), ("in_proj_ba", {"b": each, "a": each})]:
        rows = list(theirs[f"linear_attn.{name}.weight"])
        while rows:
            for kind, count in parts.items():
                kinds[kind] += [rows.pop(0) for _ in range(count)]
    names = {
        "conv1d.weight": "conv1d.weight",
        "A_log": "A_log",
        "dt_bias": "dt_bias",
        "out_proj.weight": "out_proj.weight",
    }
    return {
        "self_attention.in_proj.layer_norm_weight": theirs["input_layernorm.weight"],
        "self_attention.in_proj.weight": torch.stack([row for rows in kinds.values() for row in rows]),
        "self_attention.out_norm.weight": (theirs["linear_attn.norm.weight"].double() - 1).float(),
        **{f"self_attention.{ours}": theirs[f"linear_attn.{name}"] for ours, name in names.items()},
    }


def _grouped(theirs: dict[str, Tensor], config: Any) -> dict[str, Tensor]:
    made = {
        "self_attention.linear_qkv.layer_norm_weight": theirs["input_layernorm.weight"],
        "self_attention.linear_proj.weight": theirs["self_attn.o_proj.weight"],
    }
    for kind in ("weight", "bias"):
        if f"self_attn.q_proj.{kind}" not in theirs:
            continue
        query, key, value = (theirs[f"self_attn.{part}_proj.{kind}"] for part in "qkv")
        each = config.num_attention_heads // config.num_key_value_heads
        size = key.shape[0] // config.num_key_value_heads
        heads = [part.split(size) for part in (query, key, value)]
        gates: list[Tensor] = []
        if len(heads[0]) == 2 * config.num_attention_heads:  # a gate behind each query
            heads[0], gates = heads[0][::2], list(heads[0][1::2])
        rows: list[Tensor] = []
        for group in range(config.num_key_value_heads):
            mine = slice(group * each, (group + 1) * each)
            rows += [*heads[0][mine], *gates[mine], heads[1][group], heads[2][group]]
        made[f"self_attention.linear_qkv.{kind}"] = torch.cat(rows)
    for part in "qk":
        if f"self_attn.{part}_norm.weight" in theirs:
            made[f"self_attention.{part}_layernorm.weight"] = theirs[f"self_attn.{part}_norm.weight"]
    return made


def _latent(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    names = {
        "self_attn.q_proj": "linear_q_proj.weight", "self_attn.q_a_proj": "linear_q_down_proj.weight",
        "self_attn.q_a_layernorm": "linear_q_up_proj.layer_norm_weight", "self_attn.q_b_proj": "linear_q_up_proj.weight",
        "self_attn.kv_a_proj_with_mqa": "linear_kv_down_proj.weight",
        "self_attn.kv_a_layernorm": "linear_kv_up_proj.layer_norm_weight", "self_attn.kv_b_proj": "linear_kv_up_proj.weight",
        "self_attn.o_proj": "linear_proj.weight",
    }  # fmt: skip
    made = {
        f"self_attention.{ours}": theirs[f"{key}.weight"] for key, ours in names.items() if f"{key}.weight" in theirs
    }
    for part in ("wq_b.weight", "wk.weight", "weights_proj.weight", "k_norm.weight", "k_norm.bias"):
        if f"self_attn.indexer.{part}" in theirs:
            ours = part if "norm" in part else f"linear_{part}"
            made[f"self_attention.core_attention.indexer.{ours}"] = theirs[f"self_attn.indexer.{part}"]
    return {"input_layernorm.weight": theirs["input_layernorm.weight"], **made}


def _dense(theirs: dict[str, Tensor], place: str = "mlp") -> dict[str, Tensor]:
    made = {
        f"{place}.linear_fc1.weight": torch.cat(
            [theirs[f"{place}.gate_proj.weight"], theirs[f"{place}.up_proj.weight"]]
        ),
        f"{place}.linear_fc2.weight": theirs[f"{place}.down_proj.weight"],
    }
    if place == "mlp":
        made["mlp.linear_fc1.layer_norm_weight"] = theirs["post_attention_layernorm.weight"]
    return made


def _sparse(theirs: dict[str, Tensor]) -> dict[str, Tensor]:
    made = {
        "pre_mlp_layernorm.weight": theirs["post_attention_layernorm.weight"],
        "mlp.router.weight": theirs["mlp.gate.weight"],
    }
    for expert, (up, down) in enumerate(
        zip(theirs["mlp.experts.gate_up_proj"], theirs["mlp.experts.down_proj"], strict=True)
    ):
        made[f"mlp.experts.local_experts.{expert}.linear_fc1.weight"] = up
        made[f"mlp.experts.local_experts.{expert}.linear_fc2.weight"] = down
    if "mlp.gate.e_score_correction_bias" in theirs:
        made["mlp.router.expert_bias"] = theirs["mlp.gate.e_score_correction_bias"]
    if "mlp.shared_experts.gate_proj.weight" in theirs:
        made |= _dense(theirs, "mlp.shared_experts")
    if "mlp.shared_expert_gate.weight" in theirs:
        made["mlp.shared_experts.gate_weight"] = theirs["mlp.shared_expert_gate.weight"]
    return made


KEPT = [*MODELS, "qwen2_window", "deepseek_v2_yarn", "deepseek_v2_groups"]


@pytest.mark.parametrize("name", thinned(CASES, KEPT))
def test_megatron_computes_what_transformers_computes(name: str) -> None:
    model = model_of(name)
    with torch.no_grad():
        wanted = model(IDS).logits
    got = megatron_logits(model.config, canonical_of(model), IDS)
    assert wanted.abs().max() > 1
    assert (got - wanted).abs().max() <= CLOSE


def test_layers_that_take_keys_and_values_over() -> None:
    """Hunyuan-Large: transformers' model, whose odd layers are given what the projections before them gave."""
    model = model_of("hunyuan_v1_moe")
    layers = [layer.self_attn for layer in model.model.layers]
    canonical = canonical_of(model)
    for one, other in [(0, 1), (2, 3)]:
        for kind in ("k_proj", "v_proj"):
            given: list[Tensor] = []
            getattr(layers[one], kind).register_forward_hook(lambda _, __, made, given=given: given.append(made))
            getattr(layers[other], kind).register_forward_hook(lambda _, __, ___, given=given: given[-1])
        name = f"decoder.layers.{other}.self_attention.linear_qkv.weight"
        canonical[name] = layers[other].q_proj.weight.detach()
    with torch.no_grad():
        wanted = model(IDS).logits
    got = megatron_logits(model.config.to_dict() | {"use_cla": True, "cla_share_factor": 2}, canonical, IDS)
    assert (got - wanted).abs().max() <= CLOSE


# ---- the oracle's own way of cutting tensors: what Megatron-Core wrote it loads again, also in another layout

SAVED: list[tuple[str, str, dict[str, int], dict[str, int]]] = [  # form, layouts that write and load
    ("qwen2_tied", "torch_dist", {"tp": 2, "pp": 2}, {}),
    ("qwen3_moe_mixed", "torch_dist", {"tp": 2, "etp": 1}, {"ep": 2, "pp": 2}),
    ("deepseek_v3", "torch_dist", {"pp": 2, "vpp": 2}, {"tp": 2, "ep": 2}),
    ("deepseek_v3", "torch", {"tp": 2, "ep": 2}, {"tp": 2, "ep": 2}),
]
FURTHER = {"enorm": (32,), "hnorm": (32,), "eh_proj": (32, 64), "final_layernorm": (32,)}


def with_further_layers(canonical: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors with a layer that predicts further tokens: transformers does not load one."""
    last = {name: value for name, value in canonical.items() if name.startswith("decoder.layers.3.")}
    made = {name.replace("decoder.layers.3.", "mtp.layers.0.transformer_layer."): 2 * last[name] for name in last}
    made |= {f"mtp.layers.0.{name}.weight": torch.randn(shape) for name, shape in FURTHER.items()}
    return {**canonical, **made}


def assert_same(got: Mapping[str, Tensor], canonical: Mapping[str, Tensor]) -> None:
    assert got.keys() == canonical.keys()
    for key, value in canonical.items():
        assert torch.equal(got[key][: value.shape[0]], value), key
        assert not got[key][value.shape[0] :].any()  # padding of the vocabulary


@pytest.mark.distributed
@pytest.mark.parametrize(("name", "form", "written", "loaded"), thinned(SAVED, SAVED[1:2]))
def test_megatron_loads_what_it_wrote(
    name: str, form: str, written: dict[str, int], loaded: dict[str, int], tmp_path: Path
) -> None:
    model = model_of(name)
    canonical = canonical_of(model)
    if name == "deepseek_v3":
        canonical = with_further_layers(canonical)
    save_with_megatron(model.config, canonical, tmp_path / "saved", form=form, rows=128, **written)
    assert_same(load_with_megatron(model.config, tmp_path / "saved", form=form, rows=128, **loaded), canonical)
