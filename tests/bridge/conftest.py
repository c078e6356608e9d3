"""Tiny models of every family, as transformers saves them, with random weights of every kind."""

import json
from collections.abc import Callable, Container, Iterable
from pathlib import Path
from typing import Any

import pytest

SMALL: dict[str, Any] = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2,
    "vocab_size": 70, "max_position_embeddings": 64, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
EXPERTS = {"moe_intermediate_size": 16, "num_experts_per_tok": 2}
LATENT = {
    "kv_lora_rank": 8, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    "n_routed_experts": 4, "n_shared_experts": 1, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, **EXPERTS,
}  # fmt: skip
ROUTED = {"n_routed_experts": 4, "n_shared_experts": 1, "routed_scaling_factor": 2.5, **EXPERTS}
ALPHA = {"rope_type": "dynamic", "rope_theta": 10000.0, "alpha": 1000.0, "factor": 1.0}  # Hunyuan's
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"model_type": "llama", "rope_parameters": {
        "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }},
    "llama_tied": {"model_type": "llama", "tie_word_embeddings": True},
    "mistral": {"model_type": "mistral", "head_dim": 16, "sliding_window": None},
    "qwen2": {"model_type": "qwen2"},
    "qwen2_tied": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "qwen3_tied": {"model_type": "qwen3", "head_dim": 8, "tie_word_embeddings": True},
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 4, **EXPERTS},
    "qwen3_moe_mixed": {"model_type": "qwen3_moe", "head_dim": 8, "num_experts": 4, "mlp_only_layers": [1], **EXPERTS},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 16, "attention_bias": True, "attention_out_bias": False},
    "deepseek_v2": {"model_type": "deepseek_v2", "q_lora_rank": None, **LATENT},
    "deepseek_v3": {"model_type": "deepseek_v3", "q_lora_rank": 8, **LATENT},
    "glm4_moe": {"model_type": "glm4_moe", "attention_bias": True, "use_qk_norm": True, **ROUTED},
    "glm4_moe_air": {"model_type": "glm4_moe", "attention_bias": True, "head_dim": 16, "first_k_dense_replace": 2, **ROUTED},
    "hy_v3": {
        "model_type": "hy_v3", "initializer_range": 0.02, "head_dim": 16, "num_experts": 4, "num_shared_experts": 2,
        "num_nextn_predict_layers": 1, **EXPERTS,
    },
    "ling": {
        "model_type": "bailing_moe", "head_dim": 16, "num_experts": 8, "n_group": 4, "topk_group": 2,
        **EXPERTS, "num_experts_per_tok": 4,
    },
    "deepseek_v32": {
        "model_type": "deepseek_v32", "q_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4, **LATENT,
    },
    "glm5": {
        "model_type": "glm_moe_dsa", "q_lora_rank": 8, "index_n_heads": 2, "index_head_dim": 16, "index_topk": 4,
        "rms_norm_eps": 1e-6, **LATENT,
    },
    "qwen3_next": {
        "model_type": "qwen3_next", "head_dim": 16, "num_experts": 4, "shared_expert_intermediate_size": 24,
        "linear_key_head_dim": 8, "linear_value_head_dim": 12, "linear_num_key_heads": 2, "linear_num_value_heads": 4,
        "layer_types": ["linear_attention", "full_attention"] * 2, **EXPERTS,
    },
    "hunyuan_v1_dense": {"model_type": "hunyuan_v1_dense", "head_dim": 16, "rope_parameters": ALPHA},
    "hunyuan_v1_moe": {
        "model_type": "hunyuan_v1_moe", "head_dim": 8, "num_experts": 4, "moe_topk": [2, 2, 2, 2], "rope_parameters": ALPHA,
    },
}  # fmt: skip


def tiny(name: str, **changes: Any) -> Any:
    """A model of ``MODELS`` on the CPU in fp32; biases and norms are random too, so that none can be mixed up."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    from .ling import Ling

    settings = {**SMALL, **MODELS[name], **changes}
    set_seed(0)
    if settings["model_type"] == "bailing_moe":
        model = Ling(settings)
    else:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point() and (value.ndim == 1 or "norm" in key):
                value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def thinned(cases: Iterable[Any], kept: Container[Any]) -> list[Any]:
    """The cases of a test; those that are not ``kept`` for the default tier are slow."""
    slow = pytest.mark.slow
    return [
        case if case in kept else pytest.param(*(case if isinstance(case, tuple) else (case,)), marks=slow)
        for case in cases
    ]


# The last norm of a layer that predicts further tokens, and whether the layer repeats embedding and head.
FURTHER = {
    "deepseek_v3": ("shared_head.norm", True), "glm4_moe": ("shared_head.norm", True), "hy_v3": ("final_layernorm", False),
}  # fmt: skip


def add_further(name: str, values: dict[str, Any]) -> None:
    """Add the tensors of such a layer to those of a saved model, as its makers' own files have them."""
    import torch

    last, further = "model.layers.3.", "model.layers.4."
    norm, repeats = FURTHER[name]
    values |= {further + key.removeprefix(last): value + 1 for key, value in values.items() if key.startswith(last)}
    random = torch.Generator().manual_seed(4)
    values |= {f"{further}{key}.weight": torch.randn(32, generator=random) for key in ("enorm", "hnorm", norm)}
    values[f"{further}eh_proj.weight"] = torch.randn(32, 64, generator=random)
    if repeats:
        values[f"{further}embed_tokens.weight"] = values["model.embed_tokens.weight"].clone()
        values[f"{further}shared_head.head.weight"] = values["lm_head.weight"].clone()


def with_further_layer(name: str, folder: Path, target: Path) -> Path:
    """A saved model with such a layer in files of its own."""
    from safetensors.torch import load_file, save_file

    values = load_file(folder / "model.safetensors")
    add_further(name, values)
    target.mkdir()
    config = json.loads((folder / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (target / "config.json").write_text(json.dumps(config))
    save_file(values, target / "model.safetensors", metadata={"format": "pt"})
    return target


@pytest.fixture(scope="session")
def hf_models(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Saved models by name; ``deepseek_v3_mtp`` has a layer that predicts further tokens."""
    folder = tmp_path_factory.mktemp("hf")

    def get(name: str) -> Path:
        if not (folder / name).exists() and (plain := name.removesuffix("_mtp")) != name:
            return with_further_layer(plain, get(plain), folder / name)
        if not (folder / name).exists():
            tiny(name).save_pretrained(folder / name)
        return folder / name

    return get
