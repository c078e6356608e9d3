"""A real GPTModel of Megatron-Core, built from the arguments of a checkpoint, and its tensors by canonical name.

As Megatron-LM's ``gpt_builders.py`` and ``core_transformer_config_from_args`` build it (core_v0.16.1), from Megatron's own
("local") layers. Only within ``megatron_cpu.without_gpu`` and with Megatron's groups of ranks at hand.
"""

# pyright: reportMissingImports=false
import copy
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor, nn

from .dialects import FUSED, newest
from .megatron_cpu import LatentCore

Change = Callable[[list[Any], Mapping[str, Any]], None]  # of all layers' specs, given the arguments


def build(
    args: Mapping[str, Any], rows: int, *, fused: bool = True, change: Change | None = None, **parallel: Any
) -> list[nn.Module]:
    """This rank's chunks of the model, weights not initialised; ``parallel``: TransformerConfig's sizes that are not 1.

    ``rows`` of the vocabulary. With ``fused`` its ``torch_dist`` keys are those of Transformer Engine's modules. ``change``
    may give the layers' specs parts that the local ones lack.
    """
    from megatron.core.models.gpt import gpt_layer_specs

    config = _transformer_config(args, parallel)
    specs: Any = gpt_layer_specs.get_gpt_decoder_layer_specs(config, False, args["normalization"])
    layers = [copy.deepcopy(spec) for spec in specs]
    latent = bool(args["multi_latent_attention"])
    for layer in layers if latent else []:
        layer.submodules.self_attention.submodules.core_attention = LatentCore
    if change:
        change(layers, args)
    for layer in layers:
        parts = layer.submodules
        if fused:
            delta_net = "Delta" in parts.self_attention.module.__name__
            norms = _fused_norms(latent, "MoELayer" in repr(parts.mlp), delta_net)
            parts.sharded_state_dict_keys_map = {alone: norm for norm, alone in norms.items()}
    stages = range(parallel["virtual_pipeline_model_parallel_size"] or 1) if _is_virtual(parallel) else [None]
    return [_chunk(args, config, layers, rows, stage).eval() for stage in stages]


def places(model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a chunk by canonical name, those that train and the routers' biases."""
    from megatron.core.transformer import TransformerLayer

    layers = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, TransformerLayer)}
    tensors: dict[str, Tensor] = dict(model.named_parameters())
    tensors |= {name: value for name, value in model.named_buffers() if name.endswith("router.expert_bias")}
    found: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        place = next((prefix for prefix in layers if name.startswith(prefix)), None)
        canonical = _in_layer(layers[place], place, name.removeprefix(place)) if place else name
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            canonical = "embedding.word_embeddings.weight"  # the last stage's copy
        assert canonical not in found, canonical
        found[canonical] = tensor
    return found


def _is_virtual(parallel: Mapping[str, Any]) -> bool:
    return parallel.get("virtual_pipeline_model_parallel_size") is not None


def _transformer_config(args: Mapping[str, Any], parallel: Mapping[str, Any]) -> Any:
    """Every field that has an argument of its name, and the few that are called otherwise."""
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if args["multi_latent_attention"] else TransformerConfig
    chosen = {field.name: args[field.name] for field in fields(kind) if field.name in args}
    if args["window_size"]:
        chosen["window_size"] = tuple(args["window_size"])
    chosen |= {
        "num_query_groups": args["num_query_groups"] if args["group_query_attention"] else None,
        "num_moe_experts": args["num_experts"], "gated_linear_unit": args["swiglu"],
        "layernorm_zero_centered_gamma": args["apply_layernorm_1p"],
        "activation_func": nn.functional.silu, "pipeline_dtype": torch.float32, "use_cpu_initialization": True,
        "init_method": _nothing, "output_layer_init_method": _nothing, "masked_softmax_fusion": False, **parallel,
    }  # fmt: skip
    config: Any = kind(**chosen)
    config.dsa_indexer_rope_interleaved = args.get("dsa_indexer_rope_interleaved")  # a field since 0.19
    for name, value in args.items():  # Megatron-LM's _apply_yarn_config_from_args
        if name.startswith("yarn_"):
            setattr(config, name, value)
    if args["position_embedding_type"] == "yarn":
        config.yarn_rotary_scaling_factor = args["rotary_scaling_factor"]
        config.yarn_mscale, config.yarn_mscale_all_dim = args["mscale"], args["mscale_all_dim"]
    return config


def _nothing(_: Tensor) -> None:
    """Weights are filled in later."""


def _chunk(args: Mapping[str, Any], config: Any, layers: list[Any], rows: int, stage: int | None) -> Any:
    """One chunk of the pipeline; ``layers`` are specs of the whole model."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    spec: Any = layers[0]
    if args["num_experts"]:
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, False, args["normalization"], vp_stage=stage)
        first = get_transformer_layer_offset(config, vp_stage=stage)
        spec.layer_specs = layers[first : first + len(spec.layer_specs)]
    further: Any = None
    if args["mtp_num_layers"]:
        further = gpt_layer_specs.get_gpt_mtp_block_spec(config, layers[-1], False, vp_stage=stage)
    return GPTModel(
        config, spec, rows, args["max_position_embeddings"], parallel_output=False, vp_stage=stage, mtp_block_spec=further,
        pre_process=parallel_state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
        post_process=parallel_state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
        share_embeddings_and_output_weights=not args["untie_embeddings_and_output_weights"],
        position_embedding_type=args["position_embedding_type"], rotary_percent=args["rotary_percent"],
        rotary_base=args["rotary_base"], rope_scaling=args["use_rope_scaling"],
        rope_scaling_factor=args.get("rope_scaling_factor", 8.0),
        seq_len_interpolation_factor=args["rotary_seq_len_interpolation_factor"],
    )  # fmt: skip


def _in_layer(layer: Any, prefix: str, name: str) -> str:
    """The canonical name of a tensor of a layer that lies under ``prefix``."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    delta_net = hasattr(layer.self_attention, "in_proj")
    norms = _fused_norms(layer.config.multi_latent_attention, isinstance(layer.mlp, MoELayer), delta_net)
    name = next((norm + name.removeprefix(alone) for norm, alone in norms.items() if name.startswith(alone)), name)
    experts, local, rest = name.partition("local_experts.")
    if local:
        number, _, rest = rest.partition(".")
        name = f"{experts}{local}{layer.mlp.local_expert_indices[int(number)]}.{rest}"
    return (f"decoder.layers.{layer.layer_number - 1}." if prefix.startswith("decoder.") else newest(prefix)) + name


def _fused_norms(latent: bool, sparse: bool, delta_net: bool) -> dict[str, str]:
    """The part of FUSED that holds in a layer with or without latent attention, experts and a gated delta net."""
    lacks = {"input_layernorm."} if latent else {"self_attention.q_layernorm.", "self_attention.kv_layernorm."}
    lacks |= {"pre_mlp_layernorm."} if sparse else set()
    other = "self_attention.linear_qkv." if delta_net else "self_attention.in_proj."
    return {norm: alone for norm, alone in FUSED.items() if alone not in lacks and not norm.startswith(other)}
