"""Mistral Small 3.1 and Magistral with their vision tower: Mistral as the language model, Pixtral's tower carried as it is.

Sources: transformers ``models/mistral3``, ``models/pixtral``; the names in Megatron-Core are those of Megatron-Bridge 067f987d
(2026-08-22), ``models/ministral3/ministral3_bridge.py``.
"""

from dataclasses import replace

from ..family import ATTENTION, MLP, TOP, Config, Family, Tower

_LAYER = "vision_tower.transformer.layers.{l}."
_LINEAR = ("linear_1", "linear_2")


def _has(config: Config, name: str) -> bool:
    """Whether the projector has this tensor: its linear layers may lack biases."""
    return not name.endswith(".bias") or bool(config.get("multimodal_projector_bias"))


TOWER = Tower(
    once=(
        "vision_tower.patch_conv.weight",
        "vision_tower.ln_pre.weight",
        "multi_modal_projector.norm.weight",
        "multi_modal_projector.patch_merger.merging_layer.weight",
        *(f"multi_modal_projector.{linear}.{kind}" for linear in _LINEAR for kind in ("weight", "bias")),
    ),
    each=(
        *(f"{_LAYER}{norm}.weight" for norm in ("attention_norm", "ffn_norm")),
        *(f"{_LAYER}attention.{part}_proj.weight" for part in "qkvo"),
        *(f"{_LAYER}feed_forward.{part}_proj.weight" for part in ("gate", "up", "down")),
    ),
    sizes=("vision_config", "num_hidden_layers"),
    when=_has,
)
FAMILY = Family(
    "mistral3", ("mistral3",), top=tuple(replace(line, hf=(f"language_model.{line.hf[0]}",)) for line in TOP),
    layer=ATTENTION, dense=MLP, prefix="language_model.model.layers.{l}.", tower=TOWER,
    spellings=(
        ("model.language_model.", "language_model.model."), ("model.vision_tower.", "vision_tower."),
        ("model.multi_modal_projector.", "multi_modal_projector."), ("lm_head.", "language_model.lm_head."),
        ("language_model.language_model.", "language_model."),
    ),
)  # fmt: skip
