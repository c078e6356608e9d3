"""Hy3: norms of query and key, a sigmoid router with a bias, shared experts; the first layers have none.

Released files have the names of this table. transformers knows others for the same in memory, and Tencent's own tool
writes those to disk: they are read too. Sources: transformers ``models/hy_v3``; https://github.com/Tencent-Hunyuan/Hy3
``finetune/tools``.
"""

from ..family import (
    ATTENTION,
    EXPERT,
    MLP,
    MOE,
    QK_NORM,
    TOP,
    Family,
    Line,
    copy,
    expert_bias,
    further,
    listed,
    shared_experts,
)

ROUTER = Line("mlp.router.weight", copy, ("mlp.router.gate.weight",))

FAMILY = Family(
    "hy_v3", ("hy_v3",), aliases=("HYV3",), top=TOP, layer=(*ATTENTION, *QK_NORM), dense=MLP,
    moe=(MOE[0], ROUTER, expert_bias("mlp.expert_bias"), *shared_experts("mlp.shared_mlp", "num_shared_experts")),
    expert=EXPERT, sparse=listed(), mtp=further("final_layernorm"),
    spellings=(
        (".mlp.gate.weight", ".mlp.router.gate.weight"), (".mlp.e_score_correction_bias", ".mlp.expert_bias"),
        (".mlp.shared_experts.", ".mlp.shared_mlp."),
    ),
)  # fmt: skip
