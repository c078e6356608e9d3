"""Qwen2 and Qwen2.5: grouped-query attention with biases on query, key and value.

Source: transformers ``models/qwen2``.
"""

from ..family import ATTENTION, MLP, QKV_BIAS, TOP, Family

FAMILY = Family("qwen2", ("qwen2",), aliases=("qwen25",), top=TOP, layer=(*ATTENTION, QKV_BIAS), dense=MLP)
