"""What a run of Megatron-LM must be told beside ``--use-checkpoint-args``, which takes only a part from a checkpoint.

Sources: Megatron-LM core_v0.16.1 to main of 2026-08: ``load_args_from_checkpoint`` of ``megatron/training/checkpointing.py``,
the flags of ``megatron/training/arguments.py``, ``gpt_builders.py``.
"""

import shlex
from collections.abc import Mapping
from typing import Any

# Arguments with a flag that are not taken from a checkpoint, and what holds without the flag.
_FLAGS: Mapping[str, Any] = {
    "layernorm_epsilon": 1e-5, "qk_layernorm": False, "window_size": None, "window_attn_skip_freq": None,
    "use_rope_scaling": False, "rope_scaling_factor": 8.0, "rotary_seq_len_interpolation_factor": None,
    "yarn_original_max_position_embeddings": None, "yarn_beta_fast": None, "yarn_beta_slow": None,
    "multi_latent_attention": False, "q_lora_rank": None, "kv_lora_rank": 32, "qk_head_dim": 128,
    "qk_pos_emb_head_dim": 64, "v_head_dim": 128, "rope_type": None, "rotary_scaling_factor": 1.0, "mscale": 1.0,
    "mscale_all_dim": 0.0, "moe_router_num_groups": None, "moe_router_group_topk": None, "moe_router_dtype": None,
    "mtp_num_layers": None, "mrope_section": None,
    "attention_output_gate": False, "moe_shared_expert_gate": False, "linear_attention_freq": None,
    "linear_conv_kernel_dim": 4, "linear_key_head_dim": 128, "linear_value_head_dim": 128, "linear_num_key_heads": 16,
    "linear_num_value_heads": 32, "experimental_attention_variant": None, "dsa_indexer_n_heads": None,
    "dsa_indexer_head_dim": None, "dsa_indexer_topk": None, "dsa_indexer_rope_interleaved": False,
    "dsa_indexer_k_norm_epsilon": None, "dsa_indexer_topk_freq": 1, "dsa_indexer_skip_topk_offset": 0,
}  # fmt: skip
# Fields of the model's config without a flag, and what they then are.
_FIXED: Mapping[str, Any] = {"original_max_position_embeddings": 4096, "beta_fast": 32.0, "beta_slow": 1.0}
# Arguments with a flag that nevertheless do not reach the model.
_NOT_PASSED = {"rope_scaling_factor": "", "rotary_seq_len_interpolation_factor": " up to core 0.19"}


def run_flags(args: Mapping[str, Any]) -> list[str]:
    """The words of a command line that a run of this model needs beside ``--use-checkpoint-args``."""
    words: list[str] = []
    for name, default in _FLAGS.items():
        value = args.get(name)
        if value is None or value == default:
            continue
        words.append("--norm-epsilon" if name == "layernorm_epsilon" else f"--{name.replace('_', '-')}")
        if name == "mrope_section":
            words += map(str, value)  # a flag that takes several words
        elif isinstance(value, float) and value.is_integer():
            words.append(str(int(value)))  # some of these flags take integers only
        elif value is not True:
            words.append(str(value).replace(" ", ""))
    return words


def run_notes(args: Mapping[str, Any]) -> list[str]:
    """Lines for a user who goes on with Megatron-LM: the flags to give, and what no flag tells it."""
    said: list[str] = []
    if words := run_flags(args):
        said.append(f"Megatron-LM needs beside --use-checkpoint-args: {shlex.join(words)}")
    fixed = [f"{name} {args[name]} ({was} holds)" for name, was in _FIXED.items() if args.get(name, was) != was]
    for name, since in _NOT_PASSED.items():
        if args.get(name, _FLAGS[name]) != _FLAGS[name]:
            fixed.append(f"{name} {args[name]} (gpt_builders.py does not pass it to the model{since})")
    if fixed:
        said.append(f"Megatron-LM computes otherwise until its code is changed: {', '.join(fixed)}")
    return said
