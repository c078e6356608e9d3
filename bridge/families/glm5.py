"""GLM-5: as DeepSeek V3.2, with an indexer that rotates neighbouring pairs and that later layers may share (GLM-5.2).

Source: transformers ``models/glm_moe_dsa``.
"""

from dataclasses import replace

from ..family import Config
from .deepseek import LATENT_ATTENTION
from .deepseek32 import FAMILY as DEEPSEEK32
from .deepseek32 import INDEXER

_FULL = "full"


def _kind(config: Config, layer: int) -> str:
    """A layer with an indexer of its own, or one that sees what the last such layer has picked."""
    types = config.get("indexer_types") or [
        _FULL if letter in ("F", _FULL) else "shared" for letter in config.get("index_topk_pattern") or ()
    ]
    if types or layer >= int(config["num_hidden_layers"]):
        return types[layer] if layer < len(types) else _FULL
    step, first = int(config.get("index_topk_freq") or 1), int(config.get("index_skip_topk_offset", 2))
    return "shared" if max(layer - first + 1, 0) % step else _FULL


FAMILY = replace(
    DEEPSEEK32, name="glm5", model_types=("glm_moe_dsa",), layer=LATENT_ATTENTION, attention={_FULL: INDEXER}, kind=_kind,
    implied={"indexer_rope_interleave": True},
)  # fmt: skip
