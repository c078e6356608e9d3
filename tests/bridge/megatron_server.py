"""Real Megatron-Core on the CPU, as a server: imported once, every request runs in gloo ranks that are forks of it.

Run as a script it answers JSON lines; ``oracle.py`` asks them. A request builds a model (``bridge/megatron_model.py``) in
each rank and does its steps with it, one after another. What stands in for CUDA (``bridge/megatron_cpu.py``, and here for
what only saving and several stages need) never enters the tests' own process.
"""

import json
import math
import os
import sys
import traceback
from argparse import Namespace
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from multiprocessing import connection, get_context
from pathlib import Path
from queue import Queue
from typing import Any
from unittest.mock import MagicMock

import megatron_parts

LIMIT = 120.0  # seconds a request may take
GRACE = 3.0  # seconds that the other ranks have after one has failed
SIZES = {"tensor": "tp", "pipeline": "pp", "virtual_pipeline": "vpp", "expert": "ep"}


def also_without_gpu() -> None:
    """Stand-ins for what saving, several stages and grouped experts take for granted; there is no way back."""
    import torch
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    megatron_parts.patch()
    torch.cuda.synchronize = lambda *_: None
    torch.Tensor.cuda = lambda self, *_, **__: self
    filesystem_async._results_queue = Queue()  # the stock queue is a Python of its own, for saves in the background
    if find_spec("megatron.core.transformer.moe.grouped_gemm_util"):  # core 0.17 and on have no experts in one tensor
        from megatron.core.transformer.moe import grouped_gemm_util

        grouped_gemm_util.grouped_gemm_is_available = lambda: True  # their weights are saved here, never used
        grouped_gemm_util.assert_grouped_gemm_is_available = lambda: None


def build_chunks(request: dict[str, Any]) -> list[Any]:
    """This rank's chunks of the model of a request."""
    from finebridge.bridge.megatron_model import build
    from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout

    sizes = request["sizes"]
    parallel = {f"{name}_model_parallel_size": sizes[key] for name, key in SIZES.items()}
    if request["stages"]:  # stages that are not equal, in Megatron's words
        parallel["pipeline_model_parallel_layout"] = PipelineParallelLayerLayout(request["stages"], sizes["pp"])
    parallel["expert_tensor_parallel_size"] = sizes["etp"]
    chunks = build(request["args"], request["rows"], fused=request["fused"], change=megatron_parts.change, **parallel)
    return [chunk.bfloat16() for chunk in chunks] if request["args"].get("bf16") else chunks


# ---- canonical tensors and the ranks


def cut_of(name: str, tensor: Any) -> tuple[int | None, int, int]:
    """The axis that ranks cut a tensor on, or None; this rank's number among them, and how many they are."""
    from megatron.core import parallel_state as ranks

    axis = getattr(tensor, "partition_dim", 0) if getattr(tensor, "tensor_model_parallel", False) else None
    if axis is None:
        return None, 0, 1
    if ".local_experts." in name:
        return axis, ranks.get_expert_tensor_parallel_rank(), ranks.get_expert_tensor_parallel_world_size()
    return axis, ranks.get_tensor_model_parallel_rank(), ranks.get_tensor_model_parallel_world_size()


def fill(chunks: list[Any], step: dict[str, Any], request: dict[str, Any]) -> None:
    """Give the model its part of canonical tensors; experts that Megatron keeps as one tensor get random values."""
    import torch
    from finebridge.bridge.megatron_model import places

    canonical = torch.load(step["canonical"], weights_only=True)
    generator = torch.Generator().manual_seed(int(os.environ["RANK"]))
    for name, tensor in (item for chunk in chunks for item in places(chunk).items()):
        if name.endswith((".experts.weight1", ".experts.weight2")):
            tensor.data.copy_(torch.randn(tensor.shape, generator=generator))
            continue
        whole = canonical[name]
        axis, rank, count = cut_of(name, tensor)
        if name.endswith(("word_embeddings.weight", "output_layer.weight")):
            whole = torch.nn.functional.pad(whole, (0, 0, 0, tensor.shape[0] * count - whole.shape[0]))
        if axis is not None:
            halves = whole.chunk(2) if name.endswith("linear_fc1.weight") else (whole,)  # gate and up
            if sections := megatron_parts.sections(request["args"], name):
                halves = whole.split(sections)
            whole = torch.cat([half.chunk(count, axis)[rank] for half in halves], axis)
        assert tensor.shape == whole.shape, f"{name}: {tuple(tensor.shape)} here, {tuple(whole.shape)} given"
        tensor.data.copy_(whole)


def pieces(chunks: list[Any], step: dict[str, Any], request: dict[str, Any]) -> Any:
    """This rank's tensors: (canonical name, tensor, axis or None, the number of the part)."""
    from finebridge.bridge.megatron_model import places

    found: list[Any] = []
    for name, tensor in (item for chunk in chunks for item in places(chunk).items()):
        axis, rank, _ = cut_of(name, tensor)
        found.append((name, tensor.detach().clone(), axis, rank))
    return found


def logits(chunks: list[Any], step: dict[str, Any], request: dict[str, Any]) -> Any:
    """Logits [batch, sequence, vocabulary] of ids."""
    import torch

    ids = torch.tensor(step["ids"])
    with torch.no_grad():
        return chunks[0](ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def lora(chunks: list[Any], step: dict[str, Any], request: dict[str, Any]) -> Any:
    """Logits of a model with LoRA: of a ``torch`` checkpoint with both, or of two ``torch_dist`` ones."""
    import torch
    from megatron_lora import by_bridge, by_peft

    if step["base"]:
        model = by_bridge(chunks[0], step["base"], step["folder"], step["lora"])
    else:
        model = by_peft(chunks[0], own_file(step["folder"], request), step["lora"])
    ids = torch.tensor(step["ids"])
    with torch.no_grad():
        return model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


# ---- checkpoints, as Megatron-LM's training writes and reads them


def save(chunks: list[Any], step: dict[str, Any], request: dict[str, Any]) -> None:
    """Write a checkpoint: model, args, iteration, version; ``torch`` with what else training has in such a file."""
    import torch
    from megatron.core import dist_checkpointing, parallel_state

    state = {"args": Namespace(**run_args(request)), "checkpoint_version": 3.0, "iteration": 7}
    Path(step["folder"]).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    if step["form"] == "torch_dist":
        state |= sharded(chunks, step["metadata"])
        dist_checkpointing.save(state, step["folder"], content_metadata=step["metadata"])
    elif parallel_state.get_expert_data_parallel_rank() == 0:
        path = own_file(step["folder"], request)
        path.parent.mkdir()
        state |= beside_the_model() | keyed([chunk.state_dict_for_save_checkpoint() for chunk in chunks])
        torch.save(state, path)


def load(chunks: list[Any], step: dict[str, Any], request: dict[str, Any]) -> None:
    """Load a checkpoint with default strictness; nothing of what the model held before is left."""
    import torch
    from megatron.core import dist_checkpointing

    for value in (value for chunk in chunks for value in chunk.state_dict().values() if value is not None):
        value.zero_()
    legacy = step["form"] == "torch"
    if legacy:
        common = state = torch.load(own_file(step["folder"], request), weights_only=False)
    else:
        common = dist_checkpointing.load_common_state_dict(step["folder"])
        metadata = dist_checkpointing.load_content_metadata(preloaded_state_dict=common)
        state = dist_checkpointing.load(sharded(chunks, metadata), step["folder"])
    check_common(common, run_args(request), legacy=legacy)
    for key, chunk in keyed(chunks).items():
        chunk.load_state_dict(state[key], strict=True)


def beside_the_model() -> dict[str, Any]:
    """Optimizer and random numbers, as they lie in files of the form ``torch``."""
    import numpy as np
    import torch

    rng = {
        "np_random_rng_state": np.random.default_rng(0).bit_generator.state,
        "numbers": np.arange(4, dtype=np.uint32),
    }
    return {
        "rng_state": [rng],
        "optimizer": {"step": torch.ones(1), "param_groups": [{"lr": np.float64(0.1)}]},
    }


def keyed(parts: Sequence[Any]) -> dict[str, Any]:
    """By the keys of a checkpoint: model, with virtual stages model0 and on."""
    return {f"model{number}" if len(parts) > 1 else "model": part for number, part in enumerate(parts)}


def sharded(chunks: list[Any], metadata: dict[str, Any] | None) -> dict[str, Any]:
    """Sharded state dicts; the group among which copies are told apart is what training adds."""
    from megatron.core import parallel_state

    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    return keyed([chunk.sharded_state_dict(metadata={**(metadata or {}), "dp_cp_group": group}) for chunk in chunks])


def run_args(request: dict[str, Any]) -> dict[str, Any]:
    """Arguments of the run: those of the model, with the layout and Megatron's enums."""
    from megatron.core.enums import ModelType
    from megatron.core.transformer.enums import AttnBackend

    layout = {f"{name}_model_parallel_size": request["sizes"][key] for name, key in SIZES.items()}
    enums = {"model_type": ModelType.encoder_or_decoder, "attention_backend": AttnBackend.auto}
    rows = {"padded_vocab_size": request["rows"]}
    return {**request["args"], **rows, **enums, **layout, "expert_tensor_parallel_size": request["sizes"]["etp"]}


def own_file(folder: str, request: dict[str, Any]) -> Path:
    """This rank's file of a ``torch`` checkpoint: Megatron-LM's ``get_checkpoint_name`` below the folder of an iteration."""
    from megatron.core import parallel_state as ranks

    name = f"mp_rank_{ranks.get_tensor_model_parallel_rank():02d}"
    if request["sizes"]["pp"] > 1:
        name += f"_{ranks.get_pipeline_model_parallel_rank():03d}"
    if request["sizes"]["ep"] > 1:
        name += f"_{ranks.get_expert_model_parallel_rank():03d}"
    return Path(folder, name, "model_optim_rng.pt")


def check_common(common: dict[str, Any], args: dict[str, Any], *, legacy: bool) -> None:
    """What Megatron-LM's ``check_checkpoint_args`` compares, and what ``load_checkpoint`` takes for granted."""
    assert common["checkpoint_version"] == 3.0, common["checkpoint_version"]
    assert isinstance(common["iteration"], int)
    names = ["num_layers", "hidden_size", "num_attention_heads", "add_position_embedding", "max_position_embeddings"]
    names += ["tensor_model_parallel_size", "pipeline_model_parallel_size"] if legacy else []
    for name in names:
        assert getattr(common["args"], name) == args[name], name


# ---- training


def run_of(chunks: list[Any], request: dict[str, Any]) -> Any:
    """The run of this request, which begins with the first step that asks for it."""
    from megatron_training import Run

    if "run" not in request:
        request["run"] = Run(chunks[0], distributed=request["distributed"])
    return request["run"]


def train(chunks: list[Any], step: dict[str, Any], request: dict[str, Any]) -> list[float]:
    """The losses of so many further steps."""
    run = run_of(chunks, request)
    return [run.step() for _ in range(step["steps"])]


def save_run(chunks: list[Any], step: dict[str, Any], request: dict[str, Any]) -> None:
    """Write a ``torch_dist`` checkpoint with optimizer and random numbers."""
    import torch
    from megatron.core import dist_checkpointing

    Path(step["folder"]).mkdir(parents=True, exist_ok=True)
    torch.distributed.barrier()
    run = run_of(chunks, request)
    state = run.state(step["metadata"], loading=False)
    state |= {"args": Namespace(**run_args(request)), "checkpoint_version": 3.0}
    dist_checkpointing.save(state, step["folder"], content_metadata=step["metadata"])


def resume(chunks: list[Any], step: dict[str, Any], request: dict[str, Any]) -> None:
    """Go on from such a checkpoint."""
    run_of(chunks, request).resume(step["folder"], step["left_out"])


# ---- the server

STEPS: dict[str, Callable[[list[Any], dict[str, Any], dict[str, Any]], Any]] = {
    "fill": fill, "pieces": pieces, "logits": logits, "lora": lora, "save": save, "load": load, "train": train,
    "save run": save_run, "resume": resume,
}  # fmt: skip


def rank_main(rank: int, world: int, request: dict[str, Any]) -> None:
    """One rank: what its steps answer or its traceback goes into the request's folder."""
    import torch
    from megatron.core import parallel_state

    out = Path(request["out"])
    sizes = request["sizes"]
    os.environ["RANK"] = str(rank)
    try:
        torch.set_num_threads(1)
        torch.distributed.init_process_group("gloo", init_method=f"file://{out}/ranks", rank=rank, world_size=world)
        parallel_state.initialize_model_parallel(
            sizes["tp"], sizes["pp"], sizes["vpp"],
            expert_model_parallel_size=sizes["ep"], expert_tensor_parallel_size=sizes["etp"],
        )  # fmt: skip
        chunks = build_chunks(request)
        torch.save([STEPS[step["do"]](chunks, step, request) for step in request["steps"]], out / f"{rank}.pt")
        torch.distributed.barrier()
    except BaseException:  # noqa: BLE001 - the asker reads it
        (out / f"{rank}.txt").write_text(traceback.format_exc())
        os._exit(1)
    os._exit(0)


def serve(request: dict[str, Any]) -> str:
    """Run a request's ranks; the text of what failed, empty when nothing did."""
    sizes = request["sizes"]
    world = sizes["pp"] * math.lcm(sizes["tp"], sizes["ep"] * sizes["etp"])
    context = get_context("fork")
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
    if find_spec("triton") is None:  # core 0.19 imports these kernels in any case
        sys.modules["megatron.core.transformer.moe.ops.paged_stash"] = MagicMock()
    from finebridge.bridge.megatron_cpu import without_gpu

    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
    os.environ["TORCH_COMPILE_DISABLE"] = "1"  # some parts of Megatron-Core compile themselves
    with without_gpu():
        also_without_gpu()
        for line in sys.stdin:
            print(json.dumps({"failed": serve(json.loads(line))}), file=answers, flush=True)


if __name__ == "__main__":
    main()
