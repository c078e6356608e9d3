"""GLM-4.5, GLM-4.5-Air and later of their kind: half of a head is rotated, a router with a bias, shared experts.

Biases on query, key and value and norms of query and key are there where the config says so. Source: transformers
``models/glm4_moe``.
"""

from dataclasses import replace

from ..family import (
    ATTENTION,
    EXPERT,
    MLP,
    MOE,
    QK_NORM,
    QKV_BIAS,
    TOP,
    Family,
    expert_bias,
    from_layer,
    further,
    has,
    shared_experts,
)

LAYER = (
    *ATTENTION,
    replace(QKV_BIAS, when=has("attention_bias")),
    *(replace(line, when=has("use_qk_norm")) for line in QK_NORM),
)

FAMILY = Family(
    "glm45-moe", ("glm4_moe",), aliases=("glm45", "glm45-air"), top=TOP, layer=LAYER, dense=MLP,
    moe=(*MOE, expert_bias(), *shared_experts()), expert=EXPERT, sparse=from_layer(), experts=("n_routed_experts",),
    mtp=further("shared_head.norm"),
    mtp_copies=(("embed_tokens.weight", "model.embed_tokens.weight"), ("shared_head.head.weight", "lm_head.weight")),
)  # fmt: skip
