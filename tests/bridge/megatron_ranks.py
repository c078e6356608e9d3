"""Real Megatron-Core on the CPU, as a server: imported once, every request runs in gloo ranks that are forks of it.

Run as a script it answers JSON lines; ``oracle.py`` asks them. Megatron-Core wants CUDA in some places: what stands in for
it is patched here and never enters the tests' own process. Facts: megatron-core 0.16.1, its local layer specs.
"""

import contextlib
import json
import math
import os
import sys
import traceback
from argparse import Namespace
from dataclasses import fields
from multiprocessing import connection, get_context
from pathlib import Path
from queue import Queue
from typing import Any

LIMIT = 120.0  # seconds a request may take
GRACE = 3.0  # seconds that the other ranks have after one has failed

# What a fused Transformer Engine module calls its norm, for modules of the local spec. The first two are the stock map of
# the local spec, which has none of the others: it is written for dense layers without latent attention only.
FUSED = {
    "input_layernorm.": "self_attention.linear_qkv.layer_norm_",
    "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def fused_names(*, latent: bool, sparse: bool) -> dict[str, str]:
    """The part of FUSED that holds in a layer with or without latent attention and experts."""
    mine = ["self_attention.q_layernorm.", "self_attention.kv_layernorm."] if latent else ["input_layernorm."]
    return {key: FUSED[key] for key in [*mine, *([] if sparse else ["pre_mlp_layernorm."])]}


def patch() -> None:
    """Stand-ins for CUDA and for Transformer Engine's classes where Megatron-Core takes them for granted."""
    import megatron.core.transformer.moe.moe_utils
    import megatron.core.transformer.multi_latent_attention as latent
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.fusions import fused_softmax
    from megatron.core.tensor_parallel.random import CudaRNGStatesTracker

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    CudaRNGStatesTracker.fork = lambda *_: contextlib.nullcontext()
    megatron.core.transformer.moe.moe_utils.te_general_gemm = None  # a name that only Transformer Engine binds
    for name in ("TELinear", "TEColumnParallelLinear"):
        setattr(latent, name, type(name, (), {}))  # isinstance() is asked with them
    # Masks are made on CUDA; true is what a token does not see.
    fused_softmax.get_default_causal_mask = lambda size: torch.ones(size, size, dtype=torch.bool).triu(1)
    fused_softmax.get_sliding_window_causal_mask = lambda rows, columns, window: (
        ~(torch.ones(rows, columns, dtype=torch.bool).triu(columns - rows - window[0]).tril(columns - rows + window[1]))
    )
    # The stock queue is a Python of its own, for saves in the background.
    filesystem_async._results_queue = Queue()


def attention_class() -> Any:
    """Core attention for latent attention, whose keys and values differ in size: the local one refuses that."""
    import torch
    from megatron.core.transformer.module import MegatronModule

    class Attention(MegatronModule):
        def __init__(self, config: Any, softmax_scale: float, **_: Any) -> None:
            super().__init__(config=config)
            self.scale = softmax_scale

        def forward(self, *states: Any, **_: Any) -> Any:  # query, key, value [sequence, batch, heads, size], mask
            query, key, value = (state.permute(1, 2, 0, 3) for state in states[:3])
            seen = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=self.scale)
            return seen.permute(2, 0, 1, 3).flatten(2)

    return Attention


def transformer_config(args: dict[str, Any], sizes: dict[str, Any]) -> Any:
    """As Megatron-LM's ``core_transformer_config_from_args`` makes it: every field that has an argument of its name."""
    import torch
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    kind = MLATransformerConfig if args["multi_latent_attention"] else TransformerConfig
    chosen = {field.name: args[field.name] for field in fields(kind) if field.name in args}
    if args["window_size"]:
        chosen["window_size"] = tuple(args["window_size"])
    config = kind(
        **chosen | {"num_query_groups": args["num_query_groups"] if args["group_query_attention"] else None},
        num_moe_experts=args["num_experts"],
        gated_linear_unit=args["swiglu"],
        activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=sizes["tp"],
        pipeline_model_parallel_size=sizes["pp"],
        virtual_pipeline_model_parallel_size=sizes["vpp"],
        expert_model_parallel_size=sizes["ep"],
        expert_tensor_parallel_size=sizes["etp"],
        pipeline_dtype=torch.float32,
        use_cpu_initialization=True,
        masked_softmax_fusion=False,
    )
    for name, value in args.items():  # Megatron-LM's _apply_yarn_config_from_args
        if name.startswith("yarn_"):
            setattr(config, name, value)
    if args["position_embedding_type"] == "yarn":
        config.yarn_rotary_scaling_factor = args["rotary_scaling_factor"]
        config.yarn_mscale, config.yarn_mscale_all_dim = args["mscale"], args["mscale_all_dim"]
    return config


def build(args: dict[str, Any], sizes: dict[str, Any], rows: int, *, fused: bool = True) -> list[Any]:
    """This rank's chunks of a GPTModel, built from arguments as Megatron-LM's ``gpt_builders.py`` does.

    ``rows`` of the vocabulary. With ``fused`` its ``torch_dist`` keys are those of Transformer Engine's modules.
    """
    from megatron.core.models.gpt import gpt_layer_specs

    config = transformer_config(args, sizes)
    layers = gpt_layer_specs.get_gpt_decoder_layer_specs(config, False, args["normalization"])
    own, latent = attention_class(), args["multi_latent_attention"]
    for layer in layers:
        parts = layer.submodules
        if latent:
            parts.self_attention.submodules.core_attention = own
        if fused:
            parts.sharded_state_dict_keys_map = fused_names(latent=latent, sparse="MoE" in parts.mlp.module.__name__)
    stages = [None] if sizes["vpp"] is None else range(sizes["vpp"])
    return [build_chunk(args, config, layers, rows, stage).eval() for stage in stages]


def build_chunk(args: dict[str, Any], config: Any, layers: list[Any], rows: int, stage: int | None) -> Any:
    """One chunk of the pipeline; ``layers`` are specs of the whole model."""
    from megatron.core import parallel_state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer.transformer_layer import get_transformer_layer_offset

    spec = layers[0]
    if args["num_experts"]:
        spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, False, args["normalization"], vp_stage=stage)
        first = get_transformer_layer_offset(config, vp_stage=stage)
        spec.layer_specs = layers[first : first + len(spec.layer_specs)]
    further = None
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


# ---- canonical tensors


def places(model: Any) -> dict[str, tuple[Any, int | None, str]]:
    """This rank's tensors by canonical name: (tensor, axis that ranks cut or None, the kind of these ranks)."""
    from megatron.core.transformer import TransformerLayer

    layers = {f"{name}.": module for name, module in model.named_modules() if isinstance(module, TransformerLayer)}
    tensors = dict(model.named_parameters())
    tensors |= {name: value for name, value in model.named_buffers() if name.endswith("router.expert_bias")}
    found: dict[str, tuple[Any, int | None, str]] = {}
    for name, tensor in tensors.items():
        place = next((prefix for prefix in layers if name.startswith(prefix)), None)
        canonical = in_layer(layers[place], place, name.removeprefix(place)) if place else name
        if name == "output_layer.weight" and model.share_embeddings_and_output_weights:
            canonical = "embedding.word_embeddings.weight"  # the last stage's copy
        axis = tensor.partition_dim if getattr(tensor, "tensor_model_parallel", False) else None
        assert canonical not in found, canonical
        found[canonical] = tensor, axis, "etp" if ".local_experts." in name else "tp"
    return found


def in_layer(layer: Any, prefix: str, name: str) -> str:
    """The canonical name of a tensor of a layer that lies under ``prefix``."""
    from megatron.core.transformer.moe.moe_layer import MoELayer

    fused = fused_names(latent=layer.config.multi_latent_attention, sparse=isinstance(layer.mlp, MoELayer))
    module, _, kind = name.rpartition(".")
    name = fused.get(f"{module}.", f"{module}.") + kind
    experts, local, rest = name.partition("local_experts.")
    if local:
        number, _, rest = rest.partition(".")
        name = f"{experts}{local}{layer.mlp.local_expert_indices[int(number)]}.{rest}"
    return (f"decoder.layers.{layer.layer_number - 1}." if prefix.startswith("decoder.") else prefix) + name


def rank_of(kind: str) -> tuple[int, int]:
    """This rank's number among those that cut a tensor, and how many they are."""
    from megatron.core import parallel_state as ranks

    if kind == "etp":
        return ranks.get_expert_tensor_parallel_rank(), ranks.get_expert_tensor_parallel_world_size()
    return ranks.get_tensor_model_parallel_rank(), ranks.get_tensor_model_parallel_world_size()


def fill(model: Any, canonical: dict[str, Any]) -> None:
    """Give the model its part of the canonical tensors. A tensor that neither side knows is an error."""
    import torch

    for name, (tensor, axis, kind) in places(model).items():
        whole = canonical[name]
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            rank, count = rank_of(kind)
            pad = tensor.shape[0] * count - whole.shape[0]
            whole = torch.nn.functional.pad(whole, (0, 0, 0, pad))
        if axis is not None:
            rank, count = rank_of(kind)
            halves = whole.chunk(2) if name.endswith("linear_fc1.weight") else (whole,)  # gate and up
            whole = torch.cat([half.chunk(count, axis)[rank] for half in halves], axis)
        assert tensor.shape == whole.shape, f"{name}: {tuple(tensor.shape)} here, {tuple(whole.shape)} given"
        tensor.data.copy_(whole)


# ---- what can be asked


def logits(chunks: list[Any], request: dict[str, Any]) -> Any:
    """Logits [batch, sequence, vocabulary] of ids."""
    import torch

    given = torch.load(request["input"], weights_only=True)
    own = {name: value for name, value in given["canonical"].items() if not name.startswith("mtp.")}
    unknown = own.keys() ^ places(chunks[0]).keys()
    assert not unknown, f"only in the model or only given: {sorted(unknown)}"
    fill(chunks[0], own)
    ids = given["ids"]
    with torch.no_grad():
        return chunks[0](ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def lora(chunks: list[Any], request: dict[str, Any]) -> Any:
    """Logits of a model with LoRA: of a ``torch`` checkpoint with both, or of two ``torch_dist`` ones."""
    import torch
    from megatron_lora import by_bridge, by_peft

    if request["form"] == "torch":
        model = by_peft(chunks[0], own_file(request), request["lora"])
    else:
        model = by_bridge(chunks[0], request["base"], request["folder"], request["lora"])
    ids = torch.load(request["input"], weights_only=True)["ids"]
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def save(chunks: list[Any], request: dict[str, Any]) -> None:
    """Write a checkpoint as Megatron-LM does: model, args, iteration, version, and the tracker."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    canonical = torch.load(request["input"], weights_only=True)["canonical"]
    for chunk in chunks:
        fill(chunk, canonical)
    state = {"args": Namespace(**run_args(request)), "checkpoint_version": 3.0, "iteration": 1}
    if request["form"] == "torch_dist":
        state |= sharded(chunks, request["metadata"])
        dist_checkpointing.save(state, request["folder"], content_metadata=request["metadata"])
    elif parallel_state.get_expert_data_parallel_rank() == 0:
        path = own_file(request)
        path.parent.mkdir()
        torch.save(state | keyed([chunk.state_dict_for_save_checkpoint() for chunk in chunks]), path)


def load(chunks: list[Any], request: dict[str, Any]) -> Any:
    """Load a checkpoint with default strictness, as Megatron-LM does; this rank's pieces by name."""
    import torch
    from megatron.core import dist_checkpointing

    legacy = request["form"] == "torch"
    if legacy:
        with torch.serialization.safe_globals([Namespace]):
            common = state = torch.load(own_file(request), weights_only=True)
    else:
        common = dist_checkpointing.load_common_state_dict(request["folder"])
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        state = dist_checkpointing.load(sharded(chunks, metadata), request["folder"])
    check_common(common, run_args(request), legacy=legacy)
    for key, chunk in keyed(chunks).items():
        chunk.load_state_dict(state[key])
    return [
        (name, tensor.detach().clone(), axis, 0 if axis is None else rank_of(kind)[0])
        for chunk in chunks
        for name, (tensor, axis, kind) in places(chunk).items()
    ]


def keyed(chunks: list[Any]) -> dict[str, Any]:
    """Chunks under the names that they have in a checkpoint."""
    return {"model": chunks[0]} if len(chunks) == 1 else {f"model{number}": one for number, one in enumerate(chunks)}


def sharded(chunks: list[Any], metadata: dict[str, Any] | None) -> dict[str, Any]:
    """The sharded state of chunks, as Megatron-LM asks for it."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return keyed([chunk.sharded_state_dict(metadata={**(metadata or {}), "dp_cp_group": group}) for chunk in chunks])


def run_args(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the run: those of the model with the layout."""
    sizes = {"tensor": "tp", "pipeline": "pp", "virtual_pipeline": "vpp", "expert": "ep"}
    layout = {f"{name}_model_parallel_size": request["sizes"][key] for name, key in sizes.items()}
    return {**request["args"], **layout, "expert_tensor_parallel_size": request["sizes"]["etp"]}


def own_file(request: dict[str, Any]) -> Path:
    """This rank's file of a ``torch`` checkpoint: Megatron-LM's ``get_checkpoint_name`` below the folder of an iteration."""
    from megatron.core import parallel_state as ranks

    name = f"mp_rank_{ranks.get_tensor_model_parallel_rank():02d}"
    if request["sizes"]["pp"] > 1:
        name += f"_{ranks.get_pipeline_model_parallel_rank():03d}"
    if request["sizes"]["ep"] > 1:
        name += f"_{ranks.get_expert_model_parallel_rank():03d}"
    return Path(request["folder"], name, "model_optim_rng.pt")


def check_common(common: dict[str, Any], args: dict[str, Any], *, legacy: bool) -> None:
    """What Megatron-LM's ``check_checkpoint_args`` compares, and what ``load_checkpoint`` takes for granted."""
    assert common["checkpoint_version"] == 3.0, common["checkpoint_version"]
    assert isinstance(common["iteration"], int)
    names = ["num_layers", "hidden_size", "num_attention_heads", "add_position_embedding", "max_position_embeddings"]
    names += ["tensor_model_parallel_size", "pipeline_model_parallel_size"] if legacy else []
    for name in names:
        assert getattr(common["args"], name) == args[name], name


def rank_main(rank: int, world: int, request: dict[str, Any]) -> None:
    """One rank: its answer or its traceback goes into the request's folder."""
    import torch
    from megatron.core import parallel_state

    out = Path(request["out"])
    sizes = request["sizes"]
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{out}/ranks", rank=rank, world_size=world)
        parallel_state.initialize_model_parallel(
            sizes["tp"], sizes["pp"], sizes["vpp"],
            expert_model_parallel_size=sizes["ep"], expert_tensor_parallel_size=sizes["etp"],
        )  # fmt: skip
        chunks = build(request["args"], sizes, request["rows"], fused=request["fused"])
        torch.save(
            {"logits": logits, "lora": lora, "save": save, "load": load}[request["do"]](chunks, request),
            out / f"{rank}.pt",
        )
    except BaseException:  # noqa: BLE001 - the asker reads it
        (out / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def serve(request: dict[str, Any]) -> str:
    """Run a request's ranks; the text of what failed, empty when nothing did."""
    sizes = request["sizes"]
    world = sizes["pp"] * math.lcm(sizes["tp"], sizes["ep"] * sizes["etp"])
    context = get_context("fork")
    if request["do"] == "lora" and request["form"] == "torch":
        import peft  # noqa: F401 - once, for all ranks
    ranks = [context.Process(target=rank_main, args=(rank, world, request)) for rank in range(world)]
    for rank in ranks:
        rank.start()
    limit = LIMIT
    while left := [rank for rank in ranks if rank.is_alive()]:
        ended = connection.wait([rank.sentinel for rank in left], limit)
        if any(rank.exitcode for rank in ranks):
            limit = GRACE
        if not ended:
            for rank in left:
                rank.kill()
    if all(rank.exitcode == 0 for rank in ranks):
        return ""
    texts = sorted(Path(request["out"]).glob("*.txt"))
    return f"exit codes {[rank.exitcode for rank in ranks]}\n" + "\n".join(text.read_text() for text in texts)


def main() -> None:
    """Answer requests, a JSON line each, until the input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    patch()
    for line in sys.stdin:
        print(json.dumps({"failed": serve(json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
