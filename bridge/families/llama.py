"""Llama 2 and 3.x, Mistral, Magistral: grouped-query attention and a gated MLP without biases.

Sources: transformers ``models/llama``, ``models/mistral``; Megatron-Core ``models/gpt/gpt_layer_specs.py``.
"""

from ..family import ATTENTION, MLP, TOP, Family

FAMILY = Family("llama", ("llama", "mistral"), aliases=("llama2", "magistral"), top=TOP, layer=ATTENTION, dense=MLP)
