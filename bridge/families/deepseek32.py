"""DeepSeek V3.2: V3 with an indexer in each layer, which picks the tokens that its attention sees.

Sources: transformers ``models/deepseek_v32``; Megatron-Core ``transformer/experimental_attention_variant/dsa.py``, which
takes the indexer's rotated dimensions first, as the model does, from 0.19 on; 0.16 to 0.18 take them last.
"""

from dataclasses import replace

from ..family import Line, copy, since
from .deepseek import FAMILY as DEEPSEEK
from .deepseek import LATENT_ATTENTION

_PARTS = {
    "linear_wq_b.weight": "wq_b.weight", "linear_wk.weight": "wk.weight", "linear_weights_proj.weight": "weights_proj.weight",
    "k_norm.weight": "k_norm.weight", "k_norm.bias": "k_norm.bias",
}  # fmt: skip
INDEXER = tuple(
    Line(f"self_attention.core_attention.indexer.{ours}", copy, (f"self_attn.indexer.{theirs}",))
    for ours, theirs in _PARTS.items()
)

FAMILY = replace(
    DEEPSEEK, name="deepseek32", aliases=(), model_types=("deepseek_v32",), layer=(*LATENT_ATTENTION, *INDEXER),
    support=since("0.19", "before, its indexer rotates other dimensions"),
)  # fmt: skip
