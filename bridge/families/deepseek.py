"""DeepSeek V2, V2-Lite and V3: latent attention, a router with a bias, shared experts, layers that predict further tokens.

Sources: transformers ``models/deepseek_v2``, ``models/deepseek_v3``; Megatron-Core
``transformer/multi_latent_attention.py``, ``transformer/multi_token_prediction.py``.
"""

from ..family import EXPERT, MLP, MOE, TOP, Family, Line, copy, from_layer, gated, has, lacks

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
SHARED = "mlp.shared_experts"
SHARED_EXPERTS = (
    Line(
        f"{SHARED}.linear_fc1.weight",
        gated,
        (f"{SHARED}.gate_proj.weight", f"{SHARED}.up_proj.weight"),
        has("n_shared_experts"),
    ),
    Line(f"{SHARED}.linear_fc2.weight", copy, (f"{SHARED}.down_proj.weight",), has("n_shared_experts")),
)
EXPERT_BIAS = Line(
    "mlp.router.expert_bias",
    copy,
    ("mlp.gate.e_score_correction_bias",),
    lambda config: config["model_type"] != "deepseek_v2",
)
MTP = tuple(
    Line(f"{ours}.weight", copy, (f"{theirs}.weight",))
    for ours, theirs in [
        ("enorm", "enorm"),
        ("hnorm", "hnorm"),
        ("eh_proj", "eh_proj"),
        ("final_layernorm", "shared_head.norm"),
    ]
)

FAMILY = Family(
    "deepseek", ("deepseek_v2", "deepseek_v3"), top=TOP, layer=LATENT_ATTENTION, dense=MLP,
    moe=(*MOE, EXPERT_BIAS, *SHARED_EXPERTS), expert=EXPERT, sparse=from_layer(), experts=("n_routed_experts",), mtp=MTP,
    mtp_copies=(("embed_tokens.weight", "model.embed_tokens.weight"), ("shared_head.head.weight", "lm_head.weight")),
)  # fmt: skip
