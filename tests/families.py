"""Tiny configs of many families, dense and mixture of experts."""

from typing import Any

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 64, "head_dim": 8, "moe_intermediate_size": 16, "num_experts": 4, "n_routed_experts": 4, "n_group": 1,
    "topk_group": 1, "num_experts_per_tok": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
LATENT = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
SECOND_LAYER = {"first_k_dense_replace": 1}
FAMILIES: dict[str, tuple[dict[str, Any], str, int]] = {  # type -> config, class of its blocks, how many in two layers
    "hunyuan_v1_moe": ({"moe_topk": 2}, "HunYuanMoEV1Moe", 2),
    "hy_v3": (SECOND_LAYER, "HYV3MoE", 1),
    "qwen3_moe": ({}, "Qwen3MoeSparseMoeBlock", 2),
    "qwen3_next": (
        {"shared_expert_intermediate_size": 16, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
         "linear_key_head_dim": 8, "linear_value_head_dim": 8, "layer_types": ["linear_attention", "full_attention"]},
        "Qwen3NextSparseMoeBlock", 2,
    ),
    "deepseek_v2": ({**LATENT, **SECOND_LAYER}, "DeepseekV2Moe", 1),
    "deepseek_v3": ({**LATENT, **SECOND_LAYER}, "DeepseekV3MoE", 1),
    "glm4_moe": (SECOND_LAYER, "Glm4MoeMoE", 1),
    "mixtral": ({"num_local_experts": 4}, "MixtralSparseMoeBlock", 2),
}  # fmt: skip
DENSE: dict[str, dict[str, Any]] = {"llama": {}, "qwen3": {}, "hunyuan_v1_dense": {}, "mamba": {"state_size": 4}}


def tiny(model_type: str, **more: Any) -> Any:
    """A model with random weights."""
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    config = FAMILIES[model_type][0] if model_type in FAMILIES else DENSE[model_type]
    set_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SMALL, **config, **more}))


def on_meta(model_type: str) -> Any:
    """A model without storage: enough to look at its structure."""
    import torch

    with torch.device("meta"):
        return tiny(model_type)
