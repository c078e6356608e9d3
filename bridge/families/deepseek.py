"""DeepSeek V2, V2-Lite and V3: latent attention, a router with a bias, shared experts, layers that predict further tokens.

Sources: transformers ``models/deepseek_v2``, ``models/deepseek_v3``; Megatron-Core
``transformer/multi_latent_attention.py``, ``transformer/multi_token_prediction.py``.
"""

from ..family import (
    EXPERT,
    MLP,
    MOE,
    TOP,
    Family,
    Line,
    copy,
    expert_bias,
    from_layer,
    further,
    has,
    lacks,
    shared_experts,
)

_A = "self_attention."
LATENT_ATTENTION = (
    Line("input_layernorm.weight", copy, ("input_layernorm.weight",)),
    Line(f"{_A}linear_q_proj.weight", copy, ("self_attn.q_proj.weight",), lacks("q_lora_rank")),
    Line(f"{_A}linear_q_down_proj.weight", copy, ("self_attn.q_a_proj.weight",), has("q_lora_rank")),
    Line(f"{_A}linear_q_up_proj.layer_norm_weight", copy, ("self_attn.q_a_layernorm.weight",), has("q_lora_rank")),
    Line(f"{_A}linear_q_up_proj.weight", copy, ("self_attn.q_b_proj.weight",), has("q_lora_rank")),
    Line(f"{_A}linear_kv_down_proj.weight", copy, ("self_attn.kv_a_proj_with_mqa.weight",)),
    Line(f"{_A}linear_kv_up_proj.layer_norm_weight", copy, ("self_attn.kv_a_layernorm.weight",)),
    Line(f"{_A}linear_kv_up_proj.weight", copy, ("self_attn.kv_b_proj.weight",)),
    Line(f"{_A}linear_proj.weight", copy, ("self_attn.o_proj.weight",)),
)
SHARED_EXPERTS = shared_experts()
EXPERT_BIAS = expert_bias(when=lambda config: config["model_type"] != "deepseek_v2")
MTP = further("shared_head.norm")
MTP_COPIES = (("embed_tokens.weight", "model.embed_tokens.weight"), ("shared_head.head.weight", "lm_head.weight"))

FAMILY = Family(
    "deepseek", ("deepseek_v2", "deepseek_v3"), aliases=("deepseek2", "deepseek2-lite", "deepseek3"),
    top=TOP, layer=LATENT_ATTENTION, dense=MLP, moe=(*MOE, EXPERT_BIAS, *SHARED_EXPERTS), expert=EXPERT, sparse=from_layer(),
    experts=("n_routed_experts",), mtp=MTP, mtp_copies=MTP_COPIES,
)  # fmt: skip
