"""Qwen2.5-VL: Qwen2 as the language model, a vision tower that is carried as it is.

Sources: transformers ``models/qwen2_5_vl``; the names in Megatron-Core are those of Megatron-Bridge 067f987d (2026-08-22),
``models/qwen_vl/qwen25_vl_bridge.py``: ``language_model.`` and ``visual.``, the latter whole on every rank.
"""

from ..family import ATTENTION, MLP, QKV_BIAS, TOP, Family, Tower

_BLOCK = "visual.blocks.{l}."
_LINEAR = ("attn.qkv", "attn.proj", "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")
TOWER = Tower(
    once=(
        "visual.patch_embed.proj.weight",
        "visual.merger.ln_q.weight",
        *(f"visual.merger.mlp.{number}.{kind}" for number in (0, 2) for kind in ("weight", "bias")),
    ),
    each=(
        *(f"{_BLOCK}{norm}.weight" for norm in ("norm1", "norm2")),
        *(f"{_BLOCK}{linear}.{kind}" for linear in _LINEAR for kind in ("weight", "bias")),
    ),
    sizes=("vision_config", "depth"),
)
FAMILY = Family(
    "qwen2.5-vl", ("qwen2_5_vl",), top=TOP, layer=(*ATTENTION, QKV_BIAS), dense=MLP, tower=TOWER,
    spellings=(("model.language_model.", "model."), ("model.visual.", "visual.")),
)  # fmt: skip
