"""Qwen3, dense: heads of query and key are normalised before they are rotated.

Source: transformers ``models/qwen3``.
"""

from ..family import ATTENTION, MLP, QK_NORM, TOP, Family

FAMILY = Family("qwen3", ("qwen3",), top=TOP, layer=(*ATTENTION, *QK_NORM), dense=MLP)
