"""Real Megatron-Core on the CPU, to write and to load ``torch_dist`` checkpoints of tiny models; nothing is computed.

Run as a script it imports Megatron once and answers one request a line; its ranks are forks. Megatron-Core 0.16.1 takes
CUDA for granted in a few places on this way, and Transformer Engine in one: ``_patch`` puts something in their place.
"""

import json
import os
import queue
import socket
import subprocess
import sys
import traceback
from argparse import Namespace
from multiprocessing import get_context
from pathlib import Path
from types import SimpleNamespace
from typing import Any

LIMIT = 100.0  # seconds

SMALL: dict[str, Any] = {
    "num_layers": 4, "hidden_size": 16, "num_attention_heads": 4, "num_query_groups": 2, "kv_channels": 8,
    "ffn_hidden_size": 24, "normalization": "RMSNorm", "add_bias_linear": False, "gated_linear_unit": True,
}  # fmt: skip
EXPERTS = {
    "num_moe_experts": 4, "moe_ffn_hidden_size": 8, "moe_router_topk": 2, "moe_shared_expert_intermediate_size": 16,
    "moe_router_score_function": "sigmoid", "moe_router_enable_expert_bias": True, "moe_router_dtype": "fp32",
}  # fmt: skip
LATENT = {
    "multi_latent_attention": True, "qk_layernorm": True, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_head_dim": 8,
    "qk_pos_emb_head_dim": 4, "v_head_dim": 8, "num_query_groups": 4,
}  # fmt: skip
KINDS: dict[str, dict[str, Any]] = {
    "tied": SMALL | {"add_qkv_bias": True, "qk_layernorm": True, "tied": True},
    "experts": SMALL | {"qk_layernorm": True, **EXPERTS},
    "mixed": SMALL | {**EXPERTS, "moe_layer_freq": [0, 1, 1, 1], "mtp_num_layers": 1},
    "latent": SMALL | EXPERTS | LATENT | {"moe_layer_freq": [0, 1, 1, 1]},
}

# The keys that modules of Transformer Engine have, whose norms are part of the linear after them.
ENGINE_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}


def _patch() -> None:
    import megatron.core.transformer.multi_latent_attention as latent
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async
    from megatron.core.models.backends import LocalSpecProvider

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    for name in ("TELinear", "TEColumnParallelLinear"):
        setattr(latent, name, type(name, (), {}))  # isinstance is asked with them
    # The stock one lives in a spawned process, which a script without a __main__ guard would wait for without end.
    filesystem_async._get_write_results_queue = lambda: results
    results: Any = queue.Queue()

    class NoAttention(torch.nn.Module):
        def __init__(self, *_: Any, **__: Any) -> None:
            super().__init__()

    LocalSpecProvider.core_attention = lambda _: NoAttention  # the real one refuses latent attention; it has no weights


def _model(kind: str, *, engine_keys: bool = False) -> Any:
    """This rank's part of a GPTModel of the local layer spec."""
    import torch
    from megatron.core import parallel_state as state
    from megatron.core.models.gpt import GPTModel, gpt_layer_specs
    from megatron.core.transformer import MLATransformerConfig, TransformerConfig

    settings = dict(KINDS[kind])
    tied = settings.pop("tied", False)
    config = (MLATransformerConfig if "q_lora_rank" in settings else TransformerConfig)(
        **settings, use_cpu_initialization=True, pipeline_dtype=torch.float32, activation_func=torch.nn.functional.silu,
        tensor_model_parallel_size=state.get_tensor_model_parallel_world_size(),
        pipeline_model_parallel_size=state.get_pipeline_model_parallel_world_size(),
        expert_model_parallel_size=state.get_expert_model_parallel_world_size(),
    )  # fmt: skip
    spec = gpt_layer_specs.get_gpt_decoder_block_spec(config, False, "RMSNorm")
    for layer in spec.layer_specs if engine_keys else []:
        keys = (
            ENGINE_KEYS if "q_lora_rank" in settings else {"input_layernorm.": "self_attention.linear_qkv.layer_norm_"}
        )
        if "MoE" not in layer.submodules.mlp.module.__name__:
            keys = keys | {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}
        layer.submodules.sharded_state_dict_keys_map = keys
    further = None
    if config.mtp_num_layers:
        further = gpt_layer_specs.get_gpt_mtp_block_spec(config, spec, False)
    return GPTModel(
        config, spec, vocab_size=48, max_sequence_length=32, share_embeddings_and_output_weights=tied,
        pre_process=state.is_pipeline_first_stage(), post_process=state.is_pipeline_last_stage(),
        position_embedding_type="rope", mtp_block_spec=further,
    ).bfloat16()  # fmt: skip


def _save(model: Any, folder: str, metadata: dict[str, Any] | None) -> None:
    import torch.distributed
    from megatron.core import dist_checkpointing

    Path(folder).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    state = {
        "model": model.sharded_state_dict(metadata=dict(metadata or {})),
        "iteration": 7,
        "checkpoint_version": 3.0,
    }
    state["args"] = Namespace(num_layers=4, params_dtype=torch.bfloat16, nested={"a": [1, 2.5]})
    dist_checkpointing.save(state, folder, content_metadata=metadata)


def _load(model: Any, folder: str) -> dict[str, Any]:
    """What this rank's model holds after loading, with Megatron's default strictness."""
    from megatron.core import dist_checkpointing

    for value in filter(None.__ne__, model.state_dict().values()):
        value.zero_()
    metadata = dist_checkpointing.load_content_metadata(folder) or {}
    state = dist_checkpointing.load({"model": model.sharded_state_dict(metadata=metadata)}, folder)
    assert state["checkpoint_version"] == 3.0
    assert state["args"].num_layers == 4
    model.load_state_dict(state["model"])
    return {name: value.clone() for name, value in model.state_dict().items() if value is not None}


def _act(request: dict[str, Any]) -> None:
    import torch

    torch.manual_seed(1)
    if request["do"] == "save":
        model = _model(request["kind"])
        for name, value in model.state_dict().items():
            if value is not None and name.endswith(("norm.weight", "bias")):
                value.normal_()  # ones and zeros would let them be mixed up
        torch.save(
            {name: value for name, value in model.state_dict().items() if value is not None}, request["to"] + ".truth"
        )
    else:
        model = _model(request["kind"])
        wanted = _load(model, request["of"])
        for name in {"ours", "local"} & request.keys():
            got = _load(_model(request["kind"], engine_keys=name == "ours"), request[name])
            assert got.keys() == wanted.keys()
            different = [name for name in got if not torch.equal(got[name], wanted[name])]
            assert not different, different
            assert all(value.any() for value in got.values())
    _save(model, request["to"], request.get("metadata"))


def _rank(number: int, ranks: int, port: int, request: dict[str, Any], answers: Any) -> None:
    import torch.distributed
    from megatron.core import parallel_state

    os.environ.update(RANK=str(number), WORLD_SIZE=str(ranks), MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    try:
        torch.distributed.init_process_group("gloo")
        parallel_state.initialize_model_parallel(
            request.get("tp", 1), request.get("pp", 1), expert_model_parallel_size=request.get("ep", 1),
            expert_tensor_parallel_size=1,
        )  # fmt: skip
        _act(request)
        torch.distributed.barrier()
        answers.put("")
    except BaseException:  # noqa: BLE001 - the test reads it
        answers.put(traceback.format_exc())


def _serve() -> None:
    """Answer requests until there are no more: "" or what a rank met."""
    talk = os.dup(1)
    os.dup2(2, 1)
    import megatron.core.dist_checkpointing.strategies.torch
    import megatron.core.models.gpt.gpt_layer_specs  # noqa: F401 - for the forks

    _patch()
    context = get_context("fork")
    for line in sys.stdin:
        request = json.loads(line)
        ranks = max(request.get("tp", 1) * request.get("pp", 1), request.get("ep", 1))
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        answers = context.Queue()
        processes = [context.Process(target=_rank, args=(n, ranks, port, request, answers)) for n in range(ranks)]
        for process in processes:
            process.start()
        met = []
        try:
            while len(met) < ranks and not any(met):
                met.append(answers.get(timeout=LIMIT))
        except queue.Empty:
            met.append(f"no answer within {LIMIT} seconds")
        for process in processes:
            process.join(1.0)
            process.kill()
            process.join()
        os.write(talk, (json.dumps("\n".join(filter(None, met))) + "\n").encode())


class Megatron:
    """Asks the script, which starts with the first question."""

    def __init__(self, log: Path) -> None:
        with log.open("w") as stream:
            self._server = subprocess.Popen(
                [sys.executable, "-W", "ignore", __file__],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=stream, text=True,
            )  # fmt: skip
        self._log = log

    def __call__(self, **request: Any) -> None:
        """Fail with the traceback of a rank that failed."""
        pipes: Any = SimpleNamespace(write=self._server.stdin, read=self._server.stdout)
        print(json.dumps(request, default=str), file=pipes.write, flush=True)
        answer = pipes.read.readline()
        assert answer, self._log.read_text()[-3000:]
        assert not json.loads(answer), json.loads(answer)

    def end(self) -> None:
        self._server.kill()  # it waits for a request, and an orderly end of it takes seconds
        self._server.communicate()


if __name__ == "__main__":
    _serve()
