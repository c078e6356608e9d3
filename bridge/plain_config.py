"""A config.json from the arguments in a Megatron checkpoint, for the plain families; sources as in ``args.py``."""

from collections.abc import Mapping
from typing import Any

from .args import LLAMA3, YARN
from .errors import BridgeError

_PLAIN: Mapping[str, Any] = {  # what a config.json made from arguments takes for granted
    "normalization": "RMSNorm", "swiglu": True, "add_bias_linear": False, "apply_layernorm_1p": False,
    "layernorm_zero_centered_gamma": False, "qk_l2_norm": False, "multi_latent_attention": False,
    "rotary_percent": 1.0, "rotary_interleaved": False, "no_rope_freq": None, "window_attn_skip_freq": None,
    "attention_output_gate": False, "experimental_attention_variant": None, "linear_attention_freq": None,
    "heterogeneous_layers_config_path": None, "hybrid_override_pattern": None, "hybrid_layer_pattern": None, "spec": None,
    "moe_router_score_function": "softmax", "moe_router_enable_expert_bias": False, "moe_router_num_groups": None,
    "moe_router_topk_scaling_factor": None, "moe_shared_expert_intermediate_size": None, "moe_latent_size": None,
    "mtp_num_layers": None, "patched_attention": None,
}  # fmt: skip
_CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM",
    "qwen3_moe": "Qwen3MoeForCausalLM", "seed_oss": "SeedOssForCausalLM",
}  # fmt: skip


def to_config(args: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json for the content of a Megatron Namespace, for Llama, Mistral, Qwen2, Qwen3, Qwen3-MoE and Seed-OSS.

    The class is the first whose weights and sums fit: a Mistral without window becomes a Llama, which is the same. Token
    ids are null: no argument tells them. Without ``vocab_size`` padding rows stay, as part of the vocabulary. Raises
    BridgeError for any other model.
    """
    if other := [f"{key}={args[key]}" for key, plain in _PLAIN.items() if _differs(args.get(key), plain)]:
        raise BridgeError(
            f"args: a model with {', '.join(other)} is none for which a config.json can be made; give --hf_config"
        )
    width, heads = int(_told(args, "hidden_size")), int(_told(args, "num_attention_heads"))
    channels = int(args.get("kv_channels") or width // heads)
    epsilon = args.get("layernorm_epsilon")
    kind = _model_type(args, own_head_dim=channels * heads != width)
    return {
        "architectures": [_CLASSES[kind]],
        "model_type": kind,
        "vocab_size": int(args.get("vocab_size") or _told(args, "padded_vocab_size")),
        "hidden_size": width,
        "intermediate_size": int(_told(args, "ffn_hidden_size")),
        "num_hidden_layers": int(_told(args, "num_layers")),
        "num_attention_heads": heads,
        "num_key_value_heads": int(_told(args, "num_query_groups")) if args.get("group_query_attention") else heads,
        "head_dim": channels,
        "hidden_act": "silu",
        "max_position_embeddings": int(_told(args, "max_position_embeddings")),
        "rms_norm_eps": float(_told(args, "norm_epsilon") if epsilon is None else epsilon),
        "tie_word_embeddings": not _told(args, "untie_embeddings_and_output_weights"),
        "attention_dropout": float(args.get("attention_dropout") or 0.0),
        "bos_token_id": None,
        "eos_token_id": None,
        **_biases(kind, args),
        **_window_back(kind, args),
        **_rope_back(args),
        **(_experts_back(args) if args.get("num_experts") else {}),
    }


def _differs(value: Any, plain: Any) -> bool:
    """Whether a setting is there and means something: null, false and a frequency of nothing are all off."""
    return (bool(value) if not plain else value != plain) and value is not None


def _told(args: Mapping[str, Any], key: str) -> Any:
    if args.get(key) is None:
        raise BridgeError(f"args: {key} is missing; give --hf_config")
    return args[key]


def _model_type(args: Mapping[str, Any], *, own_head_dim: bool) -> str:
    normed, biased = bool(args.get("qk_layernorm")), bool(args.get("add_qkv_bias"))
    experts, window = bool(args.get("num_experts")), bool(args.get("window_size"))
    if (normed and biased) or (experts and not normed) or (window and biased and own_head_dim):
        raise BridgeError(
            f"args: no plain model has num_experts={args.get('num_experts')}, qk_layernorm={normed}, "
            f"add_qkv_bias={biased}, window_size={args.get('window_size')}; give --hf_config"
        )
    if normed:
        return "qwen3_moe" if experts else "qwen3"
    if biased:
        return "seed_oss" if own_head_dim else "qwen2"
    return "mistral" if window else "llama"


def _biases(kind: str, args: Mapping[str, Any]) -> dict[str, Any]:
    if kind in ("qwen2", "mistral"):
        return {}  # have or lack them always
    more = {"attention_out_bias": False, "residual_dropout": args.get("hidden_dropout") or 0.0}
    return {"attention_bias": kind == "seed_oss", **(more if kind == "seed_oss" else {})}


def _window_back(kind: str, args: Mapping[str, Any]) -> dict[str, Any]:
    window = args.get("window_size")
    width = int(window[0]) + 1 if window else None
    if kind == "mistral":
        return {"sliding_window": width}
    if kind.startswith("qwen"):
        return {"use_sliding_window": bool(width), "sliding_window": width, "max_window_layers": 0}
    return {}


def _rope_back(args: Mapping[str, Any]) -> dict[str, Any]:
    """``rope_theta`` and ``rope_scaling``, which transformers 4 and 5 both read."""
    kind, stretch = args.get("position_embedding_type"), args.get("rotary_seq_len_interpolation_factor")
    scaling: dict[str, Any] | None = None
    if kind == "yarn":
        scaling = {
            "rope_type": "yarn",
            "factor": float(_told(args, "rotary_scaling_factor")),
            "original_max_position_embeddings": int(_told(args, "yarn_original_max_position_embeddings")),
            **{key: float(_told(args, f"yarn_{key}")) for key in YARN},
            "truncate": bool(args.get("yarn_correction_range_round_to_int", True)),
        }
    elif kind != "rope":
        raise BridgeError(f"args: position_embedding_type={kind}: the plain families have rope; give --hf_config")
    elif args.get("use_rope_scaling"):
        scaling = {"rope_type": "llama3", "factor": float(args.get("rope_scaling_factor") or 8.0), **LLAMA3}
    elif stretch:
        scaling = {"rope_type": "linear", "factor": float(stretch)}
    return {"rope_theta": float(_told(args, "rotary_base")), "rope_scaling": scaling}


def _experts_back(args: Mapping[str, Any]) -> dict[str, Any]:
    frequency, layers = args.get("moe_layer_freq") or 1, range(int(args["num_layers"]))
    sparse = [layer % frequency == 0 for layer in layers] if isinstance(frequency, int) else list(frequency)
    return {
        "num_experts": int(args["num_experts"]),
        "num_experts_per_tok": int(_told(args, "moe_router_topk")),
        "moe_intermediate_size": int(_told(args, "moe_ffn_hidden_size")),
        "norm_topk_prob": not args.get("moe_router_pre_softmax"),
        "decoder_sparse_step": 1,
        "mlp_only_layers": [layer for layer, has_experts in enumerate(sparse) if not has_experts],
    }
