"""Tiny models of every family, as transformers saves them, with random weights of every kind."""

import json
from collections.abc import Callable
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
}  # fmt: skip


def tiny(name: str, **changes: Any) -> Any:
    """A model of ``MODELS`` on the CPU in fp32; biases and norms are random too, so that none can be mixed up."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    settings = {**SMALL, **MODELS[name], **changes}
    set_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(settings.pop("model_type"), **settings))
    with torch.no_grad():
        for key, value in model.state_dict().items():
            if value.is_floating_point() and (value.ndim == 1 or "norm" in key):
                value.add_(0.1 * torch.randn_like(value))
    return model.eval()


def with_further_layer(folder: Path, target: Path) -> Path:
    """DeepSeek V3 as its own files have it: a layer more, which predicts further tokens, and copies in it."""
    import torch
    from safetensors.torch import load_file, save_file

    values = load_file(folder / "model.safetensors")
    last, further = "model.layers.3.", "model.layers.4."
    values |= {further + key.removeprefix(last): value + 1 for key, value in values.items() if key.startswith(last)}
    values |= {f"{further}{key}.weight": torch.randn(32) for key in ("enorm", "hnorm", "shared_head.norm")}
    values[f"{further}eh_proj.weight"] = torch.randn(32, 64)
    values[f"{further}embed_tokens.weight"] = values["model.embed_tokens.weight"].clone()
    values[f"{further}shared_head.head.weight"] = values["lm_head.weight"].clone()
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
        if not (folder / name).exists() and name.endswith("_mtp"):
            return with_further_layer(get(name.removesuffix("_mtp")), folder / name)
        if not (folder / name).exists():
            tiny(name).save_pretrained(folder / name)
        return folder / name

    return get
