"""The proof of a conversion that trusts none of it: logits of transformers beside those of real Megatron-Core.

Both are computed in fp32 on the CPU, one model after the other. Megatron-Core builds its model from the arguments in its
own checkpoint, so that they are proven too; what they do not say is taken from config.json.
"""

# pyright: reportMissingImports=false
import gc
import math
from collections.abc import Callable, Generator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from .args import to_args
from .errors import BridgeError
from .megatron_cpu import without_gpu
from .source import Checkpoint, Source

_EXACT = 1e-5  # of the largest logit, or absolute for small ones
_IDS = (2, 64)  # sequences, tokens
_MEMORY = Path("/proc/meminfo")
_LIMITS = Path("/sys/fs/cgroup")


def compare(one: Source, other: Source, say: Callable[[str], None] = print) -> bool:
    """Whether two checkpoints, one of Hugging Face and one of Megatron, compute the same logits; says by how much not.

    The same is within 1e-5 of the largest logit, or 1e-5 for logits below 1. Layers that predict further tokens have no
    part in logits. Needs megatron-core. Raises BridgeError when there are not one of each, when Megatron-Core has another
    model than the checkpoint, or when the memory is too small.
    """
    hf, mcore = (one, other) if one.form == "hf" else (other, one)
    if hf.form != "hf" or mcore.form == "hf" or not hf.config_folder:
        raise BridgeError(f"--forward: {one.folder} and {other.folder} are of one kind; one of each is needed")
    if "quantization_config" in hf.config:
        raise BridgeError(f"--forward: {hf.folder} is quantized; convert it first, which writes bf16")
    _check_stock(hf)
    say(_check_memory(mcore.tensors))
    rows = int(hf.config["vocab_size"])
    shape = _IDS[0], min(_IDS[1], int(hf.config["max_position_embeddings"]))
    ids = torch.randint(rows, shape, generator=torch.Generator().manual_seed(0))
    wanted = _transformers_logits(hf, ids)
    gc.collect()
    got = _megatron_logits(hf, mcore, ids)[..., :rows]
    difference, largest = float((got - wanted).abs().max()), float(wanted.abs().max())
    limit = _EXACT * max(1.0, largest)
    say(f"logits differ by at most {difference:.2e}, the largest is {largest:.2e}; up to {limit:.2e} is the same")
    return difference <= limit  # not so for what is no number


def _check_stock(hf: Source) -> None:
    """Raise BridgeError for a model that Megatron-Core's own layers do not compute on the CPU."""
    if hf.family.support(hf.config).kind != "stock":
        raise BridgeError(f"--forward: stock Megatron-Core computes {hf.family.name} otherwise")
    if variant := to_args(hf.config, hf.family).get("experimental_attention_variant"):
        raise BridgeError(f"--forward: Megatron-Core has {variant} for CUDA only; leave --forward out")


def _check_memory(tensors: Checkpoint) -> str:
    """What is needed and what is there. Raises BridgeError when it is not enough."""
    counts = [math.prod(shape) for shape in tensors.shapes.values()]
    need, free = 4 * (sum(counts) + 3 * max(counts)), _free_memory()
    said = f"--forward: the whole model in fp32, twice in turn, {need / 1e9:.2f} GB of memory"
    if free is None:
        return f"{said}; how much is free cannot be told here"
    if need > free:
        raise BridgeError(f"{said}, {free / 1e9:.2f} GB are free; leave --forward out or use a larger machine")
    return f"{said}; {free / 1e9:.2f} GB are free"


def _free_memory() -> int | None:
    """Bytes that this process may still use: of the machine and of its container. None where Linux does not tell."""
    if not _MEMORY.is_file():
        return None
    lines = dict(line.split(":", 1) for line in _MEMORY.read_text().splitlines())
    free = int(lines["MemAvailable"].split()[0]) * 1024
    limit, used = _LIMITS / "memory.max", _LIMITS / "memory.current"
    if limit.is_file() and (most := limit.read_text().strip()).isdigit():
        free = min(free, int(most) - int(used.read_text()))
    return free


def _transformers_logits(hf: Source, ids: torch.Tensor) -> torch.Tensor:
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(str(hf.config_folder))
    model = AutoModelForCausalLM.from_pretrained(
        hf.folder, config=config, dtype=torch.float32, attn_implementation="eager"
    )
    with torch.no_grad():
        return model.eval()(input_ids=ids).logits


def _megatron_logits(hf: Source, mcore: Source, ids: torch.Tensor) -> torch.Tensor:
    from .megatron_model import build

    known = to_args(hf.config, hf.family)
    args = known | {key: mcore.tensors.args[key] for key in known if key in mcore.tensors.args}  # pyright: ignore[reportAttributeAccessIssue]
    args["mtp_num_layers"] = None  # without labels core 0.16 cannot run these layers
    rows = mcore.tensors.shapes["embedding.word_embeddings.weight"][0]
    with without_gpu(), _one_rank(), torch.no_grad():
        (model,) = build(args, rows)
        _fill(model, mcore)
        return model(ids, torch.arange(ids.shape[1]).expand_as(ids), None)


def _fill(model: Any, mcore: Source) -> None:
    """Give Megatron's model the checkpoint's tensors. Raises BridgeError naming one that only one side has."""
    from .megatron_model import places

    found, shapes = places(model), mcore.tensors.shapes
    own = {name for name in shapes if not name.startswith("mtp.")}
    if alone := sorted(own ^ found.keys()):
        where = "only there" if alone[0] in own else "only in the model that Megatron-Core builds from its args"
        raise BridgeError(f"--forward: {mcore.folder}: tensor {alone[0]} is {where}; {len(alone)} in all")
    for name, tensor in found.items():
        if tensor.shape != shapes[name]:
            raise BridgeError(
                f"--forward: {mcore.folder}: tensor {name} is {list(shapes[name])}, Megatron-Core's is {list(tensor.shape)}"
            )
        tensor.copy_(mcore.tensors.get(name))


@contextmanager
def _one_rank() -> Generator[None]:
    """Megatron's groups of ranks, of this process alone."""
    from megatron.core import parallel_state

    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)  # pyright: ignore[reportPrivateImportUsage]
    try:
        parallel_state.initialize_model_parallel()
        yield
    finally:
        parallel_state.destroy_model_parallel()
        torch.distributed.destroy_process_group()
