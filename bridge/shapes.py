"""The shapes that Megatron-Core gives a model's tensors: what a rule cannot tell from the parts alone.

Rules see whether parts fit together; a projection whose rows are too few in all its parts fits, and no run could load it.
"""

import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from ..storage.safetensors_io import Spec
from .errors import BridgeError

_PLACE = re.compile(r"^(decoder|mtp)\.layers\.\d+\.(transformer_layer\.)?|(?<=local_experts\.)\d+\.")


def check_shapes(specs: Iterable[Spec], args: Mapping[str, Any], say: Callable[[str], str] = str) -> None:
    """Compare canonical tensors with Megatron's arguments of their model. Raises BridgeError naming the first that differs.

    A tensor of a kind that ``expected`` does not list passes. ``say`` is how a user knows a tensor, by its canonical name.
    """
    wanted = expected(args)
    for name, _, shape in specs:
        known = wanted.get(_PLACE.sub("", name), shape)
        if known != shape:
            raise BridgeError(f"{say(name)}: {tuple(shape)} in Megatron-Core, where config.json makes it {known}")


def expected(args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes by name inside a layer, an expert's without its number; source: megatron-core 0.16.1 ``transformer``."""
    hidden, rows = args["hidden_size"], args["vocab_size"]
    norms = (
        "decoder.final_layernorm.weight", "input_layernorm.weight", "pre_mlp_layernorm.weight", "enorm.weight",
        "hnorm.weight", "final_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight",
        "mlp.linear_fc1.layer_norm_weight",
    )  # fmt: skip
    return {
        "embedding.word_embeddings.weight": (rows, hidden),
        "output_layer.weight": (rows, hidden),
        "eh_proj.weight": (hidden, 2 * hidden),
        **dict.fromkeys(norms, (hidden,)),
        **{f"self_attention.{name}": shape for name, shape in _attention(args).items()},
        **_gated("mlp", hidden, args["ffn_hidden_size"]),
        **(_experts(args) if args["num_experts"] else {}),
    }


def _attention(args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, heads, channels = args["hidden_size"], args["num_attention_heads"], args["kv_channels"]
    if not args["multi_latent_attention"]:
        queries = heads * (2 if args.get("attention_output_gate") else 1)
        rows = (queries + 2 * args["num_query_groups"]) * channels
        norms = dict.fromkeys(("q_layernorm.weight", "k_layernorm.weight"), (channels,))
        # Where layers share keys and values, the rows differ by layer.
        joined = {} if args.get("share_kvstates") else {"linear_qkv.weight": (rows, hidden), "linear_qkv.bias": (rows,)}
        return {**norms, **joined, "linear_proj.weight": (hidden, heads * channels), **_delta_net(args)}
    query, key_value, value = args["q_lora_rank"], args["kv_lora_rank"], args["v_head_dim"]
    plain, turned = args["qk_head_dim"], args["qk_pos_emb_head_dim"]
    return {
        "linear_q_proj.weight": (heads * (plain + turned), hidden),
        "linear_q_down_proj.weight": (query, hidden),
        "linear_q_up_proj.layer_norm_weight": (query,),
        "linear_q_up_proj.weight": (heads * (plain + turned), query),
        "linear_kv_down_proj.weight": (key_value + turned, hidden),
        "linear_kv_up_proj.layer_norm_weight": (key_value,),
        "linear_kv_up_proj.weight": (heads * (plain + value), key_value),
        "linear_proj.weight": (hidden, heads * value),
        **{f"core_attention.indexer.{name}": shape for name, shape in _indexer(args).items()},
    }


def _delta_net(args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if args.get("experimental_attention_variant") != "gated_delta_net":
        return {}
    hidden, heads, size = args["hidden_size"], args["linear_num_value_heads"], args["linear_value_head_dim"]
    keys, values = args["linear_num_key_heads"] * args["linear_key_head_dim"], heads * size
    return {
        "in_proj.layer_norm_weight": (hidden,),
        "in_proj.weight": (2 * (keys + values + heads), hidden),
        "conv1d.weight": (2 * keys + values, 1, args["linear_conv_kernel_dim"]),
        "A_log": (heads,),
        "dt_bias": (heads,),
        "out_norm.weight": (size,),
        "out_proj.weight": (hidden, values),
    }


def _indexer(args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    if args.get("experimental_attention_variant") != "dsa":
        return {}
    heads, size = args["dsa_indexer_n_heads"], args["dsa_indexer_head_dim"]
    return {
        "linear_wq_b.weight": (heads * size, args["q_lora_rank"]),
        "linear_wk.weight": (size, args["hidden_size"]),
        "linear_weights_proj.weight": (heads, args["hidden_size"]),
        "k_norm.weight": (size,),
        "k_norm.bias": (size,),
    }


def _experts(args: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    hidden, count = args["hidden_size"], args["num_experts"]
    return {
        "mlp.router.weight": (count, hidden),
        "mlp.router.expert_bias": (count,),
        "mlp.shared_experts.gate_weight": (1, hidden),
        **_gated("mlp.experts.local_experts", hidden, args["moe_ffn_hidden_size"]),
        **_gated("mlp.shared_experts", hidden, args["moe_shared_expert_intermediate_size"] or 0),
    }


def _gated(place: str, hidden: int, inner: int) -> dict[str, tuple[int, ...]]:
    return {f"{place}.linear_fc1.weight": (2 * inner, hidden), f"{place}.linear_fc2.weight": (hidden, inner)}
