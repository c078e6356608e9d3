"""Tiny models under the bridge's canonical names, with random weights: what any reader must give and any writer takes."""

from pathlib import Path
from typing import Any

import torch
from finebridge.bridge.args import to_args
from finebridge.bridge.parallel import EMBEDDING, OUTPUT, Layout
from finebridge.bridge.torch_format import TorchCheckpoint
from finebridge.bridge.torch_writer import write_torch
from finebridge.storage.safetensors_io import Spec

__all__ = ["EMBEDDING", "OUTPUT", "args_of", "read", "tiny_model", "write"]


def tiny_model(
    layers: int = 4, *, vocab: int = 100, hidden: int = 16, heads: int = 4, groups: int = 4, ffn: int = 24, tied: bool = False,
    bias: bool = False, experts: int = 0, expert_bias: bool = True, gate: bool = True, mla: bool = False, q_lora: bool = True,
    mtp: int = 0, seed: int = 0, dtype: torch.dtype = torch.float32, dense: int = 1,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """The tensors of a model by canonical name. With experts the first layers stay ``dense``; ``gate``: of shared experts."""
    generator = torch.Generator().manual_seed(seed)
    dim = hidden // heads
    shapes: dict[str, tuple[int, ...]] = {EMBEDDING: (vocab, hidden)}

    def attention(at: str) -> None:
        shapes[f"{at}.linear_proj.weight"] = (hidden, heads * dim)
        if not mla:
            shapes[f"{at}.linear_qkv.layer_norm_weight"] = (hidden,)
            shapes[f"{at}.linear_qkv.weight"] = ((heads + 2 * groups) * dim, hidden)
            if bias:
                shapes[f"{at}.linear_qkv.bias"] = ((heads + 2 * groups) * dim,)
            shapes[f"{at}.q_layernorm.weight"] = shapes[f"{at}.k_layernorm.weight"] = (dim,)
            return
        shapes[at.replace("self_attention", "input_layernorm.weight")] = (hidden,)
        if q_lora:
            shapes[f"{at}.linear_q_down_proj.weight"] = (8, hidden)
            shapes[f"{at}.linear_q_up_proj.layer_norm_weight"] = (8,)
            shapes[f"{at}.linear_q_up_proj.weight"] = (heads * (dim + 4), 8)
        else:
            shapes[f"{at}.linear_q_proj.weight"] = (heads * (dim + 4), hidden)
        shapes[f"{at}.linear_kv_down_proj.weight"] = (8 + 4, hidden)
        shapes[f"{at}.linear_kv_up_proj.layer_norm_weight"] = (8,)
        shapes[f"{at}.linear_kv_up_proj.weight"] = (heads * 2 * dim, 8)

    def gated(at: str, size: int) -> None:
        shapes[f"{at}.linear_fc1.weight"], shapes[f"{at}.linear_fc2.weight"] = (2 * size, hidden), (hidden, size)

    def layer(at: str, count: int) -> None:
        attention(f"{at}.self_attention")
        if not count:
            shapes[f"{at}.mlp.linear_fc1.layer_norm_weight"] = (hidden,)
            gated(f"{at}.mlp", ffn)
            return
        shapes[f"{at}.pre_mlp_layernorm.weight"] = (hidden,)
        shapes[f"{at}.mlp.router.weight"] = (count, hidden)
        if expert_bias:
            shapes[f"{at}.mlp.router.expert_bias"] = (count,)
        for number in range(count):
            gated(f"{at}.mlp.experts.local_experts.{number}", ffn // 2)
        gated(f"{at}.mlp.shared_experts", ffn // 2)
        if gate:
            shapes[f"{at}.mlp.shared_experts.gate_weight"] = (1, hidden)

    for number in range(layers):
        layer(f"decoder.layers.{number}", experts if number >= dense else 0)
    shapes["decoder.final_layernorm.weight"] = (hidden,)
    for number in range(mtp):
        at = f"mtp.layers.{number}"
        for norm in ("enorm", "hnorm", "final_layernorm"):
            shapes[f"{at}.{norm}.weight"] = (hidden,)
        shapes[f"{at}.eh_proj.weight"] = (hidden, 2 * hidden)
        layer(f"{at}.transformer_layer", experts)
    if not tied:
        shapes["output_layer.weight"] = (vocab, hidden)
    return {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}


def args_of(
    layers: int = 4, *, vocab: int = 100, hidden: int = 16, heads: int = 4, groups: int = 4, ffn: int = 24, tied: bool = False,
    bias: bool = False, experts: int = 0, expert_bias: bool = True, mla: bool = False, q_lora: bool = True, mtp: int = 0,
    dense: int = 1, grouped: bool = False, **_: Any,
) -> dict[str, Any]:  # fmt: skip
    """Megatron's arguments of that model; ``grouped``: its experts are one tensor, which Megatron wants in bf16."""
    dim = hidden // heads
    args = to_args({
        "model_type": "qwen3", "hidden_size": hidden, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "head_dim": dim, "intermediate_size": ffn, "vocab_size": vocab,
        "max_position_embeddings": 64, "rms_norm_eps": 1e-6, "tie_word_embeddings": tied,
    })  # fmt: skip
    args |= {"add_qkv_bias": bias, "mtp_num_layers": mtp or None, "bf16": grouped}
    if experts:
        args |= {
            "num_experts": experts, "moe_ffn_hidden_size": ffn // 2, "moe_shared_expert_intermediate_size": ffn // 2,
            "moe_layer_freq": [int(layer >= dense) for layer in range(layers)] if dense else 1,
            "moe_router_enable_expert_bias": expert_bias, "moe_router_score_function": "sigmoid", "moe_grouped_gemm": grouped,
        }  # fmt: skip
    if mla:
        args |= {
            "multi_latent_attention": True, "group_query_attention": False, "q_lora_rank": 8 if q_lora else None,
            "kv_lora_rank": 8, "qk_head_dim": dim, "qk_pos_emb_head_dim": 4, "v_head_dim": dim, "rope_type": "rope",
            "rotary_scaling_factor": 1.0, "mscale": 1.0, "mscale_all_dim": 0.0,
        }  # fmt: skip
    return args


def write(
    folder: Path, model: dict[str, torch.Tensor], layout: Layout | None = None, **changes: Any
) -> dict[str, dict[str, Any]]:
    """Write a model in Megatron's format ``torch``; ``changes``: other options of ``write_torch``."""
    folder.mkdir(exist_ok=True, parents=True)
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in model.items()]
    options: dict[str, Any] = {"args": {}, "make_vocab_size_divisible_by": 8} | changes
    return write_torch(folder, specs, model.__getitem__, layout or Layout(), **options)


def read(folder: Path, **options: Any) -> dict[str, torch.Tensor]:
    """All tensors of a checkpoint in Megatron's format ``torch``."""
    with TorchCheckpoint(folder, **options) as checkpoint:
        found = {name: checkpoint.get(name).clone() for name in checkpoint.shapes}
        assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in found.items()}
        assert checkpoint.dtypes == {name: tensor.dtype for name, tensor in found.items()}
    return found
