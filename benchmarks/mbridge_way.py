"""mbridge's two ways for ``bridge_speed.py``, run by an interpreter that has mbridge and megatron-core.

    python mbridge_way.py to_torch_dist MODEL OUT CHECKPOINT # Hugging Face -> torch_dist; CHECKPOINT is not read
    python mbridge_way.py to_hf MODEL OUT CHECKPOINT         # torch_dist -> Hugging Face; MODEL gives config and index

mbridge fills a live model of Megatron-Core, whose own ``dist_checkpointing`` writes and reads ``torch_dist``. Both want CUDA
and Transformer Engine, so ``_on_cpu`` takes Megatron's local layers and two rows of names for them. The model is not
initialised, which spares mbridge seconds. CPU seconds are of this process and of those that write for it.
"""

import json
import resource
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any


def _on_cpu() -> None:
    """Do without CUDA and Transformer Engine."""
    import mbridge.core.llm_bridge as llm
    import torch
    from mbridge.models.qwen2 import Qwen2Bridge
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec

    torch.cuda.current_device = lambda: torch.device("cpu")
    torch.cuda.synchronize = lambda *_: None
    torch.nn.Module.cuda = lambda self, *_: self

    def local_layers(config: Any, vp_stage: int | None = None, **_: bool) -> Any:
        return get_gpt_decoder_block_spec(config, False, "RMSNorm", vp_stage=vp_stage)

    llm.get_gpt_decoder_block_spec = local_layers
    attention, mlp = Qwen2Bridge._ATTENTION_MAPPING, Qwen2Bridge._MLP_MAPPING  # noqa: SLF001
    Qwen2Bridge._OTHER_MAPPING = {  # noqa: SLF001
        "input_layernorm.weight": attention["self_attention.linear_qkv.layer_norm_weight"]
    }
    mlp["pre_mlp_layernorm.weight"] = mlp["mlp.linear_fc1.layer_norm_weight"]


def _one_rank() -> None:
    import torch
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    parallel_state.initialize_model_parallel()


def _convert(way: str, hf: str, out: str, checkpoint: str) -> None:
    from mbridge import AutoBridge
    from mbridge.core.util import unwrap_model
    from megatron.core import dist_checkpointing

    bridge = AutoBridge.from_pretrained(hf)
    bridge.set_extra_args(use_cpu_initialization=True, perform_initialization=False)
    models = bridge.get_model(use_cpu_initialization=True)
    live = unwrap_model(models[0])
    if way == "to_torch_dist":
        bridge.load_weights(models, hf)
        Path(out).mkdir()
        dist_checkpointing.save({"model": live.sharded_state_dict(), "checkpoint_version": 3.0}, out)
    else:
        live.load_state_dict(dist_checkpointing.load({"model": live.sharded_state_dict()}, checkpoint)["model"])
        bridge.safetensor_io = bridge._get_safetensor_io(hf)  # noqa: SLF001 - load_weights would set it
        bridge.save_weights(models, out)


def _cpu() -> float:
    """CPU seconds of this process and its children."""
    return sum(sum(resource.getrusage(who)[:2]) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))


def main(words: Sequence[str]) -> None:
    """One measurement: print its seconds as JSON."""
    start, first = time.perf_counter(), _cpu()
    _on_cpu()
    _one_rank()
    begin, cpu = time.perf_counter(), _cpu()
    _convert(*words)
    told = {"wall_s": time.perf_counter() - begin, "cpu_s": _cpu() - cpu}
    print("RESULT " + json.dumps({**told, "import_wall_s": begin - start, "import_cpu_s": cpu - first}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
