"""Ranks of real megatron-core models on the CPU: what Megatron loads, saves and says of its own weights.

``main`` is run on every rank by ``RankRunner``. It works through the cases of a JSON file. A case has a model, a layout,
a folder ``load`` (a checkpoint of the format ``torch`` that must load strictly) and a folder ``save`` in which it leaves
what training would save, and beside it ``truth``: Megatron's own account of which part of which tensor this rank holds.
"""

import json
import os
from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

HIDDEN, HEADS, FFN, EXPERT_FFN, VOCAB = 16, 4, 24, 12, 128


def main(argv: Sequence[str]) -> int:
    """Work through the cases in the file ``argv[0]``."""
    torch.distributed.init_process_group("gloo")
    _without_gpu()
    from megatron.core import parallel_state

    for case in json.loads(Path(argv[0]).read_text()):
        layout = case["layout"]
        parallel_state.initialize_model_parallel(
            layout.get("tp", 1), layout.get("pp", 1), layout.get("vpp"),
            expert_model_parallel_size=layout.get("ep", 1), expert_tensor_parallel_size=layout.get("etp"),
        )  # fmt: skip
        _run(case, parallel_state)
        torch.distributed.barrier()
        parallel_state.destroy_model_parallel()
    return 0


def _without_gpu() -> None:
    """Take out what megatron-core does with CUDA or TransformerEngine in any case."""
    from megatron.core.transformer import multi_latent_attention
    from megatron.core.transformer.moe import grouped_gemm_util

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.Tensor.cuda = lambda self, *_, **__: self
    grouped_gemm_util.grouped_gemm_is_available = lambda: True
    grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None
    for name in ("TELinear", "TEColumnParallelLinear"):
        if not isinstance(getattr(multi_latent_attention, name), type):
            setattr(multi_latent_attention, name, type(name, (), {}))


class NoCore(torch.nn.Module):
    """In the place of attention itself, which has no weights: Megatron's own takes no latent attention."""

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()


def _config(case: dict[str, Any]) -> Any:
    from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig

    model, layout = case["model"], case["layout"]
    grouped = model.get("grouped", False)
    values: dict[str, Any] = {
        "num_layers": 4, "hidden_size": HIDDEN, "num_attention_heads": HEADS, "ffn_hidden_size": FFN,
        "use_cpu_initialization": True, "gated_linear_unit": True, "add_bias_linear": False, "normalization": "RMSNorm",
        "bias_activation_fusion": False, "masked_softmax_fusion": False, "persist_layer_norm": False,
        "apply_rope_fusion": False, "qk_layernorm": True, "pipeline_dtype": torch.float32, "bf16": grouped,
        "params_dtype": torch.bfloat16 if grouped else torch.float32, "mtp_num_layers": model.get("mtp"),
        "tensor_model_parallel_size": layout.get("tp", 1), "pipeline_model_parallel_size": layout.get("pp", 1),
        "virtual_pipeline_model_parallel_size": layout.get("vpp"), "expert_model_parallel_size": layout.get("ep", 1),
        "expert_tensor_parallel_size": layout.get("etp"), "pipeline_model_parallel_layout": _stages(case),
    }  # fmt: skip
    if model.get("experts"):
        values |= {
            "num_moe_experts": model["experts"], "moe_ffn_hidden_size": EXPERT_FFN, "moe_layer_freq": [0, 1, 1, 1],
            "moe_shared_expert_intermediate_size": EXPERT_FFN, "moe_router_enable_expert_bias": True,
            "moe_router_score_function": "sigmoid", "moe_grouped_gemm": grouped,
        }  # fmt: skip
    if not model.get("mla"):
        values |= {"num_query_groups": HEADS, "kv_channels": HIDDEN // HEADS, "add_qkv_bias": model.get("bias", False)}
        return TransformerConfig(**values)
    values |= {
        "multi_latent_attention": True, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_head_dim": HIDDEN // HEADS,
        "qk_pos_emb_head_dim": 4, "v_head_dim": HIDDEN // HEADS,
    }  # fmt: skip
    return MLATransformerConfig(**values)


def _stages(case: dict[str, Any]) -> Any:
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    return PipelineParallelLayerLayout(case["stages"], case["layout"]["pp"]) if case.get("stages") else None


def _build(case: dict[str, Any], state: Any) -> list[Any]:
    """This rank's chunks of the model, from Megatron's own layers."""
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs

    config, made = _config(case), case["model"]
    chunks: list[Any] = []
    for number in range(case["layout"].get("vpp") or 1):
        stage = number if case["layout"].get("vpp") else None
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, use_transformer_engine=False, vp_stage=stage)
        for layer in spec.layer_specs if made.get("mla") else ():
            layer.submodules.self_attention.submodules.core_attention = NoCore
        mtp = None
        if made.get("mtp"):
            mtp = gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, use_transformer_engine=False, vp_stage=stage)
        chunk = GPTModel(
            config, spec, vocab_size=VOCAB, max_sequence_length=64, position_embedding_type="rope", vp_stage=stage,
            pre_process=state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=stage),
            post_process=state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=stage),
            share_embeddings_and_output_weights=made.get("tied", False), mtp_block_spec=mtp,
        )  # fmt: skip
        chunks.append(chunk)
    return chunks


def _run(case: dict[str, Any], state: Any) -> None:
    torch.manual_seed(7)
    chunks = _build(case, state)
    numbers = [f"{state.get_tensor_model_parallel_rank():02d}"]
    if state.get_pipeline_model_parallel_world_size() > 1:
        numbers.append(f"{state.get_pipeline_model_parallel_rank():03d}")
    if state.get_expert_model_parallel_world_size() > 1:
        numbers.append(f"{state.get_expert_model_parallel_rank():03d}")
    name = "_".join(["mp_rank", *numbers])
    keys = [f"model{number}" for number in range(len(chunks))] if len(chunks) > 1 else ["model"]
    if case.get("load"):
        content = torch.load(Path(case["load"]) / "release" / name / "model_optim_rng.pt", weights_only=False)
        assert content["checkpoint_version"] == 3.0
        for key, chunk in zip(keys, chunks, strict=True):
            chunk.load_state_dict(content[key], strict=True)
    folder = Path(case["save"]) / "iter_0000007" / name
    folder.mkdir(parents=True)
    content = _as_training_saves(case) | {
        key: chunk.state_dict_for_save_checkpoint() for key, chunk in zip(keys, chunks, strict=True)
    }
    torch.save(content, folder / "model_optim_rng.pt")
    (folder.parents[1] / "latest_checkpointed_iteration.txt").write_text("7")
    if case["truth"]:
        torch.save(_truth(chunks), folder.parents[1] / f"truth{os.environ['RANK']}")


def _as_training_saves(case: dict[str, Any]) -> dict[str, Any]:
    """What lies in such a file beside the model: arguments with Megatron's enums, optimizer, random numbers."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    layout = case["layout"]
    args = Namespace(
        num_layers=4, model_type=ModelType.encoder_or_decoder, attention_backend=AttnBackend.auto, params_dtype=torch.float32,
        tensor_model_parallel_size=layout.get("tp", 1), pipeline_model_parallel_size=layout.get("pp", 1),
        virtual_pipeline_model_parallel_size=layout.get("vpp"), expert_model_parallel_size=layout.get("ep", 1),
        expert_tensor_parallel_size=layout.get("etp"), padded_vocab_size=VOCAB,
        untie_embeddings_and_output_weights=not case["model"].get("tied", False),
    )  # fmt: skip
    rng = {
        "np_random_rng_state": np.random.default_rng(0).bit_generator.state,
        "numbers": np.arange(4, dtype=np.uint32),
    }
    return {
        "args": args, "checkpoint_version": 3.0, "iteration": 7, "rng_state": [rng],
        "optimizer": {"step": torch.ones(1), "param_groups": [{"lr": np.float64(0.1)}]},
    }  # fmt: skip


def _truth(chunks: Sequence[Any]) -> list[tuple[str, tuple[int, ...], tuple[slice, ...], torch.Tensor]]:
    """Of each tensor here its global key and shape, the part of it, and its values."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    found: list[Any] = []
    for chunk in chunks:
        state = chunk.sharded_state_dict(metadata={"non_homogeneous_layers": True})
        apply_factories(state)
        found += [
            (tensor.key, tensor.global_shape, tensor.global_slice(), tensor.data.detach())
            for tensor in nested_values(state)
            if isinstance(tensor, ShardedTensor)
        ]
    return found
