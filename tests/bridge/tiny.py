"""Tiny models of every family that the bridge knows, and their canonical tensors by a second, plain way of making them."""

from typing import Any

import torch
from torch import Tensor

BASE: dict[str, Any] = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 256, "tie_word_embeddings": False,
}  # fmt: skip
MOE: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24, "norm_topk_prob": True}
LLAMA3 = {
    "rope_type": "llama3", "rope_theta": 500000.0, "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 16}
LATENT: dict[str, Any] = {
    "q_lora_rank": None, "kv_lora_rank": 16, "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12,
    "num_key_value_heads": 4, "n_routed_experts": 8, "num_experts_per_tok": 4, "moe_intermediate_size": 24,
    "n_shared_experts": 2, "first_k_dense_replace": 1,
}  # fmt: skip
DEEPSEEK_YARN = YARN | {"mscale": 0.707, "mscale_all_dim": 0.707, "beta_fast": 32, "beta_slow": 1}

FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama"},
    "llama-tied-multi-head": {"model_type": "llama", "tie_word_embeddings": True, "num_key_value_heads": 4},
    "llama-llama3": {"model_type": "llama", "rope_parameters": LLAMA3},
    "llama-linear": {"model_type": "llama", "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}},
    "qwen2": {"model_type": "qwen2"},
    "qwen2-tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen2-yarn": {"model_type": "qwen2", "rope_parameters": YARN},
    "qwen2-window": {"model_type": "qwen2", "use_sliding_window": True, "sliding_window": 5, "max_window_layers": 1},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3-tied": {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True},
    "qwen3-moe": {"model_type": "qwen3_moe", "head_dim": 16, **MOE},
    "qwen3-moe-mixed": {
        "model_type": "qwen3_moe", "head_dim": 16, **MOE, "norm_topk_prob": False, "num_hidden_layers": 4,
        "decoder_sparse_step": 2, "mlp_only_layers": [3],
    },
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "mistral-window": {"model_type": "mistral", "head_dim": 16, "sliding_window": 5},
    "seed-oss": {"model_type": "seed_oss", "head_dim": 16, "attention_bias": True},
    "deepseek2-lite": {"model_type": "deepseek_v2", **LATENT, "rope_parameters": DEEPSEEK_YARN},
    "deepseek2-lite-rope": {"model_type": "deepseek_v2", **LATENT, "routed_scaling_factor": 1.5},
    "deepseek2-groups": {
        "model_type": "deepseek_v2", **LATENT, "topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2,
        "num_experts_per_tok": 2, "q_lora_rank": 16,
    },
    "deepseek3": {
        "model_type": "deepseek_v3", **LATENT, "q_lora_rank": 16, "n_group": 4, "topk_group": 2, "norm_topk_prob": True,
        "routed_scaling_factor": 2.5, "rope_parameters": DEEPSEEK_YARN, "num_nextn_predict_layers": 0,
    },
}  # fmt: skip


def config_of(name: str) -> Any:
    """transformers' config of a tiny model."""
    from transformers import AutoConfig

    return AutoConfig.for_model(**{**BASE, **FAMILIES[name]})


def model_of(name: str) -> Any:
    """The model with weights that make every tensor matter: norms differ from one, biases from zero."""
    from transformers import AutoModelForCausalLM, set_seed

    set_seed(1)
    model = AutoModelForCausalLM.from_config(config_of(name), dtype=torch.float32).eval()
    with torch.no_grad():
        for key, value in model.state_dict().items():
            value.normal_(1.0 if "norm" in key else 0.0, 0.2)
    return model


def canonical_of(model: Any) -> dict[str, Tensor]:
    """The canonical tensors of a model in memory."""
    state, config = model.state_dict(), model.config
    made = {
        "embedding.word_embeddings.weight": state["model.embed_tokens.weight"],
        "decoder.final_layernorm.weight": state["model.norm.weight"],
    }
    if not config.tie_word_embeddings:
        made["output_layer.weight"] = state["lm_head.weight"]
    for layer in range(config.num_hidden_layers):
        start = f"model.layers.{layer}."
        theirs = {key.removeprefix(start): value for key, value in state.items() if key.startswith(start)}
        latent = "self_attn.kv_b_proj.weight" in theirs
        ours = _latent(theirs) if latent else _grouped(theirs, config)
        ours |= _sparse(theirs) if "mlp.gate.weight" in theirs else _dense(theirs)
        made |= {f"decoder.layers.{layer}.{key}": value for key, value in ours.items()}
    return {key: value.clone() for key, value in made.items()}


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
        size = query.shape[0] // config.num_attention_heads
        heads = [part.split(size) for part in (query, key, value)]
        rows: list[Tensor] = []
        for group in range(config.num_key_value_heads):
            rows += [*heads[0][group * each : (group + 1) * each], heads[1][group], heads[2][group]]
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
    made = {f"self_attention.{ours}": theirs[f"{key}.weight"] for key, ours in names.items() if f"{key}.weight" in theirs}
    return {"input_layernorm.weight": theirs["input_layernorm.weight"], **made}


def _dense(theirs: dict[str, Tensor], place: str = "mlp") -> dict[str, Tensor]:
    made = {
        f"{place}.linear_fc1.weight": torch.cat([theirs[f"{place}.gate_proj.weight"], theirs[f"{place}.up_proj.weight"]]),
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
    for expert, (up, down) in enumerate(zip(theirs["mlp.experts.gate_up_proj"], theirs["mlp.experts.down_proj"], strict=True)):
        made[f"mlp.experts.local_experts.{expert}.linear_fc1.weight"] = up
        made[f"mlp.experts.local_experts.{expert}.linear_fc2.weight"] = down
    if "mlp.gate.e_score_correction_bias" in theirs:
        made["mlp.router.expert_bias"] = theirs["mlp.gate.e_score_correction_bias"]
    if "mlp.shared_experts.gate_proj.weight" in theirs:
        made |= _dense(theirs, "mlp.shared_experts")
    return made
