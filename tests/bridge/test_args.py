"""Megatron's arguments of a model and back. That they mean the same model is shown in test_oracle.py."""

import json
from typing import Any

import pytest
from finebridge.bridge.args import to_args
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.plain_config import to_config
from finebridge.bridge.run_flags import run_flags, run_notes

LLAMA: dict[str, Any] = {
    "model_type": "llama", "vocab_size": 1000, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 4,
    "num_attention_heads": 8, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 512, "rms_norm_eps": 1e-5,
    "hidden_act": "silu", "tie_word_embeddings": False, "rope_theta": 10000.0,
}  # fmt: skip
QWEN2 = LLAMA | {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": None, "max_window_layers": 4}
QWEN3 = QWEN2 | {"model_type": "qwen3", "head_dim": 16, "tie_word_embeddings": True, "rope_theta": 1e6}
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32,
    "norm_topk_prob": True, "decoder_sparse_step": 1, "mlp_only_layers": [],
}  # fmt: skip
MISTRAL = LLAMA | {"model_type": "mistral", "head_dim": 16, "sliding_window": 128}
SEED = LLAMA | {
    "model_type": "seed_oss", "head_dim": 16, "attention_bias": True, "attention_out_bias": False, "residual_dropout": 0.1,
    "attention_dropout": 0.1,
}  # fmt: skip
DEEPSEEK = LLAMA | {
    "model_type": "deepseek_v3", "num_key_value_heads": 8, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 12,
    "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8, "n_shared_experts": 2, "num_experts_per_tok": 4,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "num_nextn_predict_layers": 1,
    "rope_scaling": {
        "type": "yarn", "factor": 40, "original_max_position_embeddings": 128, "beta_fast": 32, "beta_slow": 1, "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}  # fmt: skip
ROUTED = {  # shared by models with a sigmoid router and its bias
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_dtype": "fp32",
    "moe_router_pre_softmax": False, "moe_layer_freq": [0, 1, 1, 1], "mtp_num_layers": 1, "num_query_groups": 2,
}  # fmt: skip
GLM = LLAMA | {
    "model_type": "glm4_moe", "head_dim": 16, "attention_bias": True, "use_qk_norm": True, "partial_rotary_factor": 0.5,
    "n_routed_experts": 8, "n_shared_experts": 1, "num_experts_per_tok": 4, "moe_intermediate_size": 24, "n_group": 1,
    "topk_group": 1, "first_k_dense_replace": 1, "routed_scaling_factor": 2.5, "norm_topk_prob": True,
    "num_nextn_predict_layers": 1,
}  # fmt: skip
HY_V3 = LLAMA | {
    "model_type": "hy_v3", "head_dim": 16, "num_experts": 8, "num_shared_experts": 2, "num_experts_per_tok": 4,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "router_scaling_factor": 2.826, "route_norm": True,
    "moe_router_use_sigmoid": True, "num_nextn_predict_layers": 1, "rope_parameters": {"rope_theta": 11158840.0},
}  # fmt: skip
LING = LLAMA | {
    "model_type": "bailing_moe", "head_dim": 16, "num_experts": 8, "num_shared_experts": 1, "num_experts_per_tok": 4,
    "moe_intermediate_size": 24, "first_k_dense_replace": 1, "n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5,
    "norm_topk_prob": True, "score_function": "sigmoid", "moe_router_enable_expert_bias": True, "use_qk_norm": True,
    "use_qkv_bias": False, "use_bias": False, "partial_rotary_factor": 0.5, "num_nextn_predict_layers": 1,
}  # fmt: skip
LLAMA3 = {
    "rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}  # fmt: skip
YARN = {
    "rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128, "beta_fast": 16.0, "beta_slow": 2.0,
    "truncate": False,
}  # fmt: skip
PLAIN = {
    "llama": LLAMA,
    "llama3": LLAMA | {"rope_scaling": LLAMA3, "num_key_value_heads": 8},
    "linear": LLAMA | {"rope_scaling": {"rope_type": "linear", "factor": 4.0}},
    "qwen2": QWEN2,
    "yarn": QWEN2 | {"rope_scaling": YARN},
    "qwen2-window": QWEN2 | {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 0},
    "qwen3": QWEN3,
    "qwen3-moe": QWEN3_MOE,
    "qwen3-moe-mixed": QWEN3_MOE | {"mlp_only_layers": [0, 2], "norm_topk_prob": False},
    "mistral": MISTRAL,
    "seed-oss": SEED,
}


@pytest.mark.parametrize("name", PLAIN)
def test_a_plain_config_comes_back(name: str) -> None:
    config = PLAIN[name]
    back = to_config(to_args(config))
    skipped = {"max_window_layers", "rope_scaling"}
    assert {key: back.get(key) for key in config if key not in skipped} == {
        key: value for key, value in config.items() if key not in skipped
    }
    assert back["rope_scaling"] == config.get("rope_scaling")
    assert to_args(back) == to_args(config)
    assert json.loads(json.dumps(back)) == back


def test_transformers_reads_what_is_made(tmp_path: Any) -> None:
    from transformers import AutoConfig

    for name, config in PLAIN.items():
        (tmp_path / "config.json").write_text(json.dumps(to_config(to_args(config))))
        read = AutoConfig.from_pretrained(tmp_path)
        assert to_args(read.to_dict()) == to_args(config), name


def test_deepseek() -> None:
    args = to_args(DEEPSEEK)
    wanted = {
        "multi_latent_attention": True, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_head_dim": 12, "qk_pos_emb_head_dim": 8,
        "v_head_dim": 12, "rope_type": "yarn", "rotary_scaling_factor": 40.0, "original_max_position_embeddings": 128,
        "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "num_experts": 8,
        "moe_layer_freq": [0, 1, 1, 1], "moe_router_topk": 4, "moe_router_score_function": "sigmoid",
        "moe_router_enable_expert_bias": True, "moe_router_num_groups": 4, "moe_router_group_topk": 2,
        "moe_router_topk_scaling_factor": 2.5, "moe_router_pre_softmax": False,
        "moe_shared_expert_intermediate_size": 48, "mtp_num_layers": 1, "qk_layernorm": True,
    }  # fmt: skip
    assert {key: args[key] for key in wanted} == wanted


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        (GLM, {
            "rotary_percent": 0.5, "add_qkv_bias": True, "qk_layernorm": True, "kv_channels": 16,
            "moe_router_num_groups": None, "moe_router_topk_scaling_factor": 2.5, "moe_shared_expert_intermediate_size": 24,
        }),
        (GLM | {"use_qk_norm": False, "attention_bias": False}, {"add_qkv_bias": False, "qk_layernorm": False}),
        (HY_V3, {
            "rotary_base": 11158840, "rotary_percent": 1.0, "qk_layernorm": True, "moe_router_topk_scaling_factor": 2.826,
            "moe_shared_expert_intermediate_size": 48, "moe_router_num_groups": None,
        }),
        (LING, {
            "rotary_percent": 0.5, "add_qkv_bias": False, "qk_layernorm": True, "moe_router_num_groups": 4,
            "moe_router_group_topk": 2, "moe_router_topk_scaling_factor": 2.5, "moe_shared_expert_intermediate_size": 24,
        }),
    ],
)  # fmt: skip
def test_routers_with_a_bias(config: dict[str, Any], wanted: dict[str, Any]) -> None:
    args = to_args(config)
    assert {key: args[key] for key in ROUTED | wanted} == ROUTED | wanted


def test_layers_listed_one_by_one() -> None:
    listed = to_args(HY_V3 | {"mlp_layer_types": ["sparse", "dense", "sparse", "dense"]})
    assert listed["moe_layer_freq"] == [1, 0, 1, 0]
    assert listed["mtp_num_layers"] == 1  # its layer comes after the list's end


def test_the_padded_vocabulary_is_of_the_layout() -> None:
    assert to_args(LLAMA)["padded_vocab_size"] == 1024
    assert to_args(LLAMA, tp=8, divisible_by=64)["padded_vocab_size"] == 1024
    assert to_args(LLAMA, tp=8)["padded_vocab_size"] == 1024
    assert to_args(LLAMA | {"vocab_size": 1025}, tp=2)["padded_vocab_size"] == 1280


@pytest.mark.parametrize(
    ("base", "changes", "said"),
    [
        (LLAMA, {"hidden_size": None}, "hidden_size is missing"),
        (LLAMA, {"model_type": "other"}, "model_type 'other'"),
        (LLAMA, {"hidden_act": "gelu"}, "hidden_act gelu"),
        (LLAMA, {"attention_bias": True}, "attention_bias is true"),
        (LLAMA, {"mlp_bias": True}, "mlp_bias is true"),
        (SEED, {"attention_out_bias": True}, "attention_out_bias is true"),
        (LLAMA, {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0}}, "'low_freq_factor': 2.0"),
        (LLAMA, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, "rope type dynamic"),
        (LLAMA, {"rope_scaling": {"type": "linear"}}, "factor is missing"),
        (LLAMA, {"rope_scaling": YARN | {"attention_factor": 1.0}}, "attention_factor 1.0"),
        (LLAMA, {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0}}, "mscale_all_dim 1.0"),
        (DEEPSEEK, {"rope_scaling": LLAMA3}, "rope type llama3"),
        (DEEPSEEK, {"rope_scaling": YARN}, "without truncate"),
        (DEEPSEEK, {"rope_interleave": False}, "rope_interleave"),
        (DEEPSEEK, {"attention_bias": True}, "attention_bias is true"),
        (DEEPSEEK, {"norm_topk_prob": False}, "norm_topk_prob"),
        (HY_V3, {"route_norm": False}, "norms the weights of a sigmoid router"),
        (HY_V3, {"moe_router_use_sigmoid": False}, "moe_router_use_sigmoid false"),
        (HY_V3, {"attention_bias": True}, "attention_bias is true"),
        (LING, {"use_bias": True}, "use_bias is true"),
        (LING, {"norm_head": True}, "norm_head true"),
        (LING, {"topk_group": 4, "n_group": 8}, "by its best 2, Megatron-Core by its best 1"),
        (DEEPSEEK, {"num_experts_per_tok": 6}, "by its best 2, Megatron-Core by its best 3"),
    ],
)
def test_what_megatron_cannot_compute_is_refused(base: dict[str, Any], changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BridgeError, match=said):
        to_args(base | changes)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"add_bias_linear": True}, "add_bias_linear=True"),
        ({"normalization": "LayerNorm"}, "normalization=LayerNorm"),
        ({"multi_latent_attention": True}, "multi_latent_attention=True"),
        ({"mtp_num_layers": 1}, "mtp_num_layers=1"),
        ({"qk_layernorm": True, "add_qkv_bias": True}, "no plain model"),
        ({"num_experts": 4}, "no plain model"),
        ({"position_embedding_type": "learned_absolute"}, "learned_absolute"),
        ({"hidden_size": None}, "hidden_size is missing"),
    ],
)
def test_a_model_without_a_plain_config_is_refused(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BridgeError, match=said):
        to_config(to_args(LLAMA) | changes)


def test_arguments_of_a_run_of_megatron() -> None:
    """A Namespace of Megatron-LM: defaults of flags that were not given, no size of the vocabulary before padding."""
    told = to_args(LLAMA) | {
        "vocab_size": None, "num_query_groups": 1, "group_query_attention": False, "num_experts": None, "moe_layer_freq": 1,
        "moe_router_score_function": "softmax", "window_size": None, "layernorm_epsilon": None, "norm_epsilon": 1e-5,
        "no_rope_freq": None, "moe_shared_expert_intermediate_size": None, "kv_channels": None, "attention_dropout": 0.0,
    }  # fmt: skip
    config = to_config(told)
    assert (config["vocab_size"], config["num_key_value_heads"], config["head_dim"]) == (1024, 8, 8)
    assert config["rms_norm_eps"] == 1e-5
    assert config["bos_token_id"] is None


def test_flags_of_a_run() -> None:
    """What Megatron-LM does not take from a checkpoint; read from its own ``load_args_from_checkpoint``."""
    assert run_flags(to_args(LLAMA)) == []
    assert run_flags(to_args(QWEN3 | {"rms_norm_eps": 1e-6})) == ["--norm-epsilon", "1e-06", "--qk-layernorm"]
    routed = ["--moe-router-dtype", "fp32", "--mtp-num-layers", "1"]
    assert run_flags(to_args(GLM)) == ["--qk-layernorm", *routed]
    assert run_flags(to_args(LING))[1:] == ["--moe-router-num-groups", "4", "--moe-router-group-topk", "2", *routed]
    assert run_flags(to_args(MISTRAL)) == ["--window-size", "(127,0)"]
    assert run_flags(to_args(PLAIN["linear"])) == ["--rotary-seq-len-interpolation-factor", "4"]
    words = " ".join(run_flags(to_args(DEEPSEEK)))
    assert words == (
        "--qk-layernorm --multi-latent-attention --q-lora-rank 24 --kv-lora-rank 16 --qk-head-dim 12 "
        "--qk-pos-emb-head-dim 8 --v-head-dim 12 --rope-type yarn --rotary-scaling-factor 40 --mscale-all-dim 1 "
        "--moe-router-num-groups 4 --moe-router-group-topk 2 --moe-router-dtype fp32 --mtp-num-layers 1"
    )


def test_what_no_flag_tells_megatron_is_said() -> None:
    assert run_notes(to_args(LLAMA)) == []
    said = run_notes(to_args(PLAIN["llama3"]))
    assert "--use-rope-scaling --rope-scaling-factor 32" in said[0]
    assert "rope_scaling_factor 32.0" in said[1]
    assert "rotary_seq_len_interpolation_factor 4.0" in run_notes(to_args(PLAIN["linear"]))[1]
    assert "original_max_position_embeddings 128 (4096 holds)" in run_notes(to_args(DEEPSEEK))[1]
