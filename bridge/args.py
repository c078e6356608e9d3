"""Megatron's arguments of a model, from its config.json; ``plain_config.py`` is the way back.

A Megatron checkpoint carries the arguments of the run that wrote it (``args``, a Namespace). ``--use-checkpoint-args`` takes
the model from them, and a load compares some (``check_checkpoint_args``). What a config.json cannot say for itself, such as
biases, norms of query and key, or which layers have experts, is read from the family's table.

Sources: Megatron-LM core_v0.16.1 and main of 2026-08, ``megatron/training/{arguments,argument_utils,checkpointing}.py``,
``gpt_builders.py``; transformers 5 ``modeling_rope_utils.py`` and the model files. The tests build a real Megatron-Core
model from these arguments and compare its logits with those of transformers.
"""

import math
from collections.abc import Mapping
from typing import Any

from .errors import BridgeError
from .families import family_of
from .family import Family, head_dim

Config = Mapping[str, Any]
Args = dict[str, Any]
SHARED_UP = ".shared_experts.linear_fc1.weight"
LLAMA3 = {"low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
YARN = {"beta_fast": 32.0, "beta_slow": 1.0}  # what is meant where a config does not say


def to_args(
    config: Config, family: Family | None = None, *, tp: int = 1, divisible_by: int = 128, names: set[str] | None = None
) -> Args:
    """The content of Megatron's Namespace for a model of this config.json; layout and dtype of a run are not in it.

    ``tp`` and ``divisible_by`` only shape ``padded_vocab_size``; ``names`` are the model's canonical ones, where the table
    was asked for them before. Raises BridgeError for a key that is missing and for a
    model that Megatron-Core cannot compute.
    """
    family = family or family_of(config)
    config = family.plain(config)
    names = names or {row.mcore for row in family.rows(config)}
    rows, step = int(_need(config, "vocab_size")), tp * divisible_by
    return {
        "vocab_size": rows,
        "make_vocab_size_divisible_by": divisible_by,
        "padded_vocab_size": math.ceil(rows / step) * step,
        "tokenizer_type": "HuggingFaceTokenizer",
        "untie_embeddings_and_output_weights": "output_layer.weight" in names,
        **_body(config, names),
        **_attention(config, names),
        **_rope(config, latent=_any(names, ".linear_kv_down_proj.weight")),
        **(_experts(config, names) if _any(names, ".router.weight") else {"num_experts": None}),
        "mtp_num_layers": len({name.split(".")[2] for name in names if name.startswith("mtp.")}) or None,
    }


def _need(config: Config, key: str) -> Any:
    if config.get(key) is None:
        raise BridgeError(f"config.json: {key} is missing")
    return config[key]


def _any(names: set[str], ending: str) -> bool:
    return any(name.endswith(ending) for name in names)


def _body(config: Config, names: set[str]) -> Args:
    """Sizes, norms and the MLP."""
    if (act := config.get("hidden_act", "silu")) not in ("silu", "swish"):
        raise BridgeError(f"config.json: hidden_act {act} is none that the bridge knows; silu is")
    for key, tensor in {
        "attention_bias": ".linear_qkv.bias", "attention_out_bias": ".linear_proj.bias", "mlp_bias": ".linear_fc1.bias",
        "use_bias": ".linear_proj.bias",
    }.items():  # fmt: skip
        if config.get(key) and not _any(names, tensor):
            raise BridgeError(
                f"config.json: {key} is true, but Megatron-Core has no such bias in {config['model_type']} models"
            )
    if config.get("norm_head"):
        raise BridgeError("config.json: norm_head true: Megatron-Core has no head whose rows are normed")
    context = int(_need(config, "max_position_embeddings"))
    return {
        "num_layers": int(_need(config, "num_hidden_layers")),
        "hidden_size": int(_need(config, "hidden_size")),
        "ffn_hidden_size": int(_need(config, "intermediate_size")),
        "seq_length": context,
        "max_position_embeddings": context,
        "normalization": "RMSNorm",
        "norm_epsilon": float(_need(config, "rms_norm_eps")),  # its name before core 0.16
        "layernorm_epsilon": float(config["rms_norm_eps"]),
        "apply_layernorm_1p": bool(config.get("apply_layernorm_1p", False)),
        "swiglu": True,
        "squared_relu": False,
        "add_bias_linear": False,
        "add_qkv_bias": _any(names, ".linear_qkv.bias"),
        "attention_dropout": float(config.get("attention_dropout") or 0.0),
        "hidden_dropout": float(config.get("residual_dropout") or config.get("output_dropout") or 0.0),
    }


def _attention(config: Config, names: set[str]) -> Args:
    """Heads and what they see; latent attention has sizes of its own."""
    heads = int(_need(config, "num_attention_heads"))
    groups = int(config.get("num_key_value_heads") or heads)
    common: Args = {"num_attention_heads": heads, "apply_query_key_layer_scaling": False, **_window(config)}
    if config.get("use_cla"):  # arguments of MindSpeed-LLM
        common |= {"cla_share_factor": int(config["cla_share_factor"]), "share_kvstates": True}
    if not _any(names, ".linear_kv_down_proj.weight"):
        return common | {
            "multi_latent_attention": False,
            "group_query_attention": groups != heads,
            "num_query_groups": groups,
            "kv_channels": head_dim(config),
            "qk_layernorm": _any(names, ".q_layernorm.weight"),
            "attention_output_gate": bool(config.get("attention_output_gate", False)),
            **(_delta_net(config, names) if _any(names, ".in_proj.weight") else {}),
        }
    if config.get("rope_interleave") is False:
        raise BridgeError(
            "config.json: rope_interleave false: Megatron-Core's latent attention rotates neighbouring pairs"
        )
    return common | {
        "multi_latent_attention": True,
        "group_query_attention": False,
        "num_query_groups": heads,
        "kv_channels": int(_need(config, "v_head_dim")),
        "qk_layernorm": True,
        "q_lora_rank": config.get("q_lora_rank"),
        "kv_lora_rank": int(_need(config, "kv_lora_rank")),
        "qk_head_dim": int(_need(config, "qk_nope_head_dim")),
        "qk_pos_emb_head_dim": int(_need(config, "qk_rope_head_dim")),
        "v_head_dim": int(config["v_head_dim"]),
        **(_indexer(config, names) if _any(names, ".indexer.linear_wk.weight") else {}),
    }


def _delta_net(config: Config, names: set[str]) -> Args:
    """Layers of gated delta nets, a flag a layer, and their sizes."""
    layers = range(int(config["num_hidden_layers"]))
    sizes = ("conv_kernel_dim", "key_head_dim", "value_head_dim", "num_key_heads", "num_value_heads")
    return {
        "experimental_attention_variant": "gated_delta_net",
        "linear_attention_freq": [
            int(f"decoder.layers.{layer}.self_attention.in_proj.weight" in names) for layer in layers
        ],
        **{f"linear_{size}": int(_need(config, f"linear_{size}")) for size in sizes},
    }


def _indexer(config: Config, names: set[str]) -> Args:
    """What picks the tokens that attention sees: in every layer, or from ``offset`` on in every ``step``-th one."""
    step, offset = int(config.get("index_topk_freq") or 1), int(config.get("index_skip_topk_offset", 2))
    for layer in range(int(config["num_hidden_layers"])):
        has_own = f"decoder.layers.{layer}.self_attention.core_attention.indexer.linear_wk.weight" in names
        if has_own == bool(max(layer + 1 - max(offset, 1), 0) % step):
            raise BridgeError(
                f"config.json: layer {layer} {'has' if has_own else 'lacks'} an indexer, Megatron-Core's rule of "
                f"index_topk_freq {step} and index_skip_topk_offset {offset} says otherwise"
            )
    return {
        "experimental_attention_variant": "dsa",
        "dsa_indexer_n_heads": int(_need(config, "index_n_heads")),
        "dsa_indexer_head_dim": int(_need(config, "index_head_dim")),
        "dsa_indexer_topk": int(_need(config, "index_topk")),
        "dsa_indexer_rope_interleaved": bool(config.get("indexer_rope_interleave", False)),
        "dsa_indexer_k_norm_epsilon": 1e-6,
        "dsa_indexer_topk_freq": step,
        "dsa_indexer_skip_topk_offset": offset if step > 1 else 0,
    }


def _window(config: Config) -> Args:
    """Sliding-window attention: (tokens to the left, to the right) and, when not in all layers, a flag a layer."""
    width = config.get("sliding_window")
    # Qwen's configs have a width even where the window is off; Mistral's have only the width.
    if not width or not config.get("use_sliding_window", "max_window_layers" not in config):
        return {"window_size": None, "window_attn_skip_freq": None}
    layers = int(config["num_hidden_layers"])
    if kinds := config.get("layer_types"):
        flags = [int(kind == "sliding_attention") for kind in kinds]
    else:
        flags = [int(layer >= int(config.get("max_window_layers", 0))) for layer in range(layers)]
    if not any(flags):
        return {"window_size": None, "window_attn_skip_freq": None}
    return {"window_size": (int(width) - 1, 0), "window_attn_skip_freq": None if all(flags) else flags}


def _rope(config: Config, *, latent: bool) -> Args:
    """Rotary positions. transformers 5 has ``rope_parameters``, before there were ``rope_theta`` and ``rope_scaling``."""
    rope: dict[str, Any] = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type") or rope.get("type") or "default"
    base = float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)
    if kind == "dynamic" and rope.get("alpha"):  # Hunyuan: not dynamic at all, another base
        kind, size = "default", head_dim(config)
        base *= float(rope["alpha"]) ** (size / (size - 2))
    common: Args = {
        "position_embedding_type": "rope",
        "use_rotary_position_embeddings": True,
        "add_position_embedding": True,  # the default of a flag that is out of use; a load compares it
        "rotary_base": int(base) if base.is_integer() else base,
        "rotary_percent": float(rope.get("partial_rotary_factor") or config.get("partial_rotary_factor") or 1.0),
        "rotary_interleaved": False,
        "use_rope_scaling": False,
        "rotary_seq_len_interpolation_factor": None,
    }
    if kind == "yarn":
        return common | _yarn(config, rope, latent=latent)
    if sections := rope.get("mrope_section"):
        if latent or kind not in ("default", "mrope"):
            raise BridgeError(f"config.json: rope type {kind} with mrope_section is none that Megatron-Core computes")
        return common | {"position_embedding_type": "mrope", "mrope_section": [int(size) for size in sections]}
    if latent and kind == "default":
        return common | {"rope_type": "rope", "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0}
    if kind == "default":
        return common
    if kind == "linear" and not latent:
        return common | {"rotary_seq_len_interpolation_factor": float(_need(rope, "factor"))}
    if kind == "llama3" and not latent:
        if other := {key: rope.get(key) for key, value in LLAMA3.items() if rope.get(key) != value}:
            raise BridgeError(f"config.json: rope scaling with {other}: Megatron-Core's is fixed to {LLAMA3}")
        return common | {"use_rope_scaling": True, "rope_scaling_factor": float(_need(rope, "factor"))}
    raise BridgeError(f"config.json: rope type {kind} is none that Megatron-Core computes for this model")


def _yarn(config: Config, rope: Mapping[str, Any], *, latent: bool) -> Args:
    """YaRN: latent attention has the plain names, other attention Megatron's ``yarn_`` ones."""
    context = int(config["max_position_embeddings"])
    original = int(
        config.get("original_max_position_embeddings") or rope.get("original_max_position_embeddings") or context
    )
    factor = float(rope.get("factor") or context / original)
    mscale, all_dim = rope.get("mscale") or 0.0, rope.get("mscale_all_dim") or 0.0
    if all_dim and not (mscale and latent):
        raise BridgeError(
            f"config.json: rope scaling with mscale {mscale} and mscale_all_dim {all_dim}: not computed alike"
        )
    mscale = float(mscale) if all_dim else 1.0  # transformers takes both or none
    stretch = _magnitude(factor, mscale) / _magnitude(factor, all_dim)
    if (said := rope.get("attention_factor")) is not None and not math.isclose(said, stretch):
        raise BridgeError(f"config.json: rope scaling with attention_factor {said}: Megatron-Core's is {stretch}")
    shared: Args = {"rotary_scaling_factor": factor, "mscale": mscale, "mscale_all_dim": float(all_dim)}
    shape = {key: float(rope.get(key) or value) for key, value in YARN.items()}
    if not latent:
        return shared | {
            "position_embedding_type": "yarn",
            "use_rotary_position_embeddings": False,
            "yarn_original_max_position_embeddings": original,
            **{f"yarn_{key}": value for key, value in shape.items()},
            "yarn_correction_range_round_to_int": bool(rope.get("truncate", True)),
        }
    if rope.get("truncate") is False:
        raise BridgeError("config.json: rope scaling without truncate: Megatron-Core's latent attention always rounds")
    return shared | {"rope_type": "yarn", "original_max_position_embeddings": original, **shape}


def _magnitude(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0 if factor > 1 else 1.0


def _experts(config: Config, names: set[str]) -> Args:
    """Experts and their router. Without ``norm_topk_prob`` the softmax is taken over all experts, else over the chosen."""
    layers = int(config["num_hidden_layers"])
    sparse = [int(f"decoder.layers.{layer}.mlp.router.weight" in names) for layer in range(layers)]
    biased = _any(names, ".router.expert_bias")
    score = config.get("scoring_func") or config.get("score_function") or ("sigmoid" if biased else "softmax")
    if config.get("moe_router_use_sigmoid") is False:
        raise BridgeError(
            "config.json: moe_router_use_sigmoid false: the bridge knows this model with a sigmoid router only"
        )
    chosen = int(_need(config, "num_experts_per_tok"))
    normed = bool(config.get("norm_topk_prob", config.get("route_norm", biased)))
    if score == "sigmoid" and chosen > 1 and not normed:
        raise BridgeError(
            "config.json: norm_topk_prob false: Megatron-Core always norms the weights of a sigmoid router"
        )
    scale = float(config.get("routed_scaling_factor") or config.get("router_scaling_factor") or 1.0)
    size = int(_need(config, "moe_intermediate_size"))
    return {
        "num_experts": len(
            {name.split(".local_experts.")[1].split(".")[0] for name in names if ".local_experts." in name}
        ),
        "moe_layer_freq": 1 if all(sparse) else sparse,
        "moe_ffn_hidden_size": size,
        "moe_router_topk": chosen,
        "moe_router_score_function": score,
        "moe_router_pre_softmax": score == "softmax" and not normed,
        "moe_router_enable_expert_bias": biased,
        # As these models' own code: scores with a bias are close together.
        "moe_router_dtype": "fp32" if biased else None,
        "moe_router_topk_scaling_factor": None if scale == 1.0 else scale,
        **_expert_groups(config, chosen, biased=biased),
        "moe_shared_expert_intermediate_size": _shared_size(config, size) if _any(names, SHARED_UP) else None,
        "moe_shared_expert_gate": _any(names, ".shared_experts.gate_weight"),
    }


def _shared_size(config: Config, size: int) -> int:
    """Width of the shared experts together."""
    count = int(config.get("n_shared_experts") or config.get("num_shared_experts") or 1)
    return int(config.get("shared_expert_intermediate_size") or count * size)


def _expert_groups(config: Config, chosen: int, *, biased: bool) -> Args:
    """Experts are chosen from the best groups only. Megatron-Core ranks a group by the sum of its best few."""
    groups, kept = int(config.get("n_group") or 1), int(config.get("topk_group") or 1)
    if groups == kept or config.get("topk_method") == "greedy":
        return {"moe_router_num_groups": None, "moe_router_group_topk": None}
    few = 2 if biased else 1  # DeepSeek-V3 and DeepSeek-V2
    if chosen // kept != few:
        raise BridgeError(
            f"config.json: {chosen} experts from {kept} of {groups} groups: the model ranks a group by its best {few}, "
            f"Megatron-Core by its best {chosen // kept}"
        )
    return {"moe_router_num_groups": groups, "moe_router_group_topk": kept}
