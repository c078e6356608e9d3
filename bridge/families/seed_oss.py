"""Seed-OSS: as Qwen2, with a head size of its own and biases where the config says so.

Source: transformers ``models/seed_oss``.
"""

from dataclasses import replace

from ..family import ATTENTION, MLP, QKV_BIAS, TOP, Family, has

FAMILY = Family(
    "seed-oss", ("seed_oss",), top=TOP, layer=(*ATTENTION, replace(QKV_BIAS, when=has("attention_bias"))), dense=MLP
)
