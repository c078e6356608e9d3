"""Qwen3 with experts: a softmax router, no shared experts, some layers may be dense.

Source: transformers ``models/qwen3_moe``.
"""

from ..family import ATTENTION, EXPERT, MLP, MOE, QK_NORM, TOP, Family, every

FAMILY = Family(
    "qwen3-moe", ("qwen3_moe",), top=TOP, layer=(*ATTENTION, *QK_NORM), dense=MLP, moe=MOE, expert=EXPERT, sparse=every(),
)  # fmt: skip
