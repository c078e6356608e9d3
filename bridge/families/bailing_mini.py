"""Ling 2 and Ring 2 (BailingMoeV2): query, key and value in one tensor, a router with a bias that looks at groups of experts.

A model of remote code: transformers has no class for it. Source: https://github.com/inclusionAI/Ling-V2
``models/modeling_bailing_moe_v2.py``.
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
    one_qkv,
    shared_experts,
    vocab,
)

_A = "self_attention."
LAYER = (
    Line(f"{_A}linear_qkv.layer_norm_weight", copy, ("input_layernorm.weight",)),
    Line(f"{_A}linear_qkv.weight", one_qkv, ("attention.query_key_value.weight",)),
    Line(f"{_A}linear_qkv.bias", one_qkv, ("attention.query_key_value.bias",), has("use_qkv_bias")),
    Line(f"{_A}q_layernorm.weight", copy, ("attention.query_layernorm.weight",), has("use_qk_norm")),
    Line(f"{_A}k_layernorm.weight", copy, ("attention.key_layernorm.weight",), has("use_qk_norm")),
    Line(f"{_A}linear_proj.weight", copy, ("attention.dense.weight",)),
)
BIAS = expert_bias("mlp.gate.expert_bias", has("moe_router_enable_expert_bias"))

FAMILY = Family(
    "bailing_mini", ("bailing_moe", "bailing_moe_v2"),
    top=(Line("embedding.word_embeddings.weight", vocab, ("model.word_embeddings.weight",)), *TOP[1:]),
    layer=LAYER, dense=MLP, moe=(*MOE, BIAS, *shared_experts(count="num_shared_experts")), expert=EXPERT,
    sparse=from_layer(), mtp=further("final_layernorm"),
)  # fmt: skip
