"""A model's weights as files that ``from_pretrained`` and PEFT read, streamed part by part.

No rank holds the model: a layer at a time is gathered from the ranks of ZeRO-3, given the names of the Hub by
transformers' own conversion and handed to the writer of its shard. The files hold what ``save_pretrained`` writes.
"""

import re
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from transformers.core_model_loading import revert_weight_conversion
from transformers.modeling_utils import remove_tied_weights_from_state_dict

from ..storage.hashing import Ledger
from ..storage.safetensors_io import ShardWriter, write_tensors

ADAPTER_NAME = "adapter_model.safetensors"
Tensors = dict[str, torch.Tensor]
Fetch = Callable[[Sequence[str]], AbstractContextManager[Tensors]]


class WeightsError(RuntimeError):
    """The tensors at hand are not the model's; the message names one."""


def write_weights(
    model: Any, folder: Path, max_bytes: int, ledger: Ledger, fetch: Fetch, *, rank: int = 0, world: int = 1
) -> None:
    """Write the weights of a transformers model as safetensors shards, on every rank the shards that are its own.

    Every rank must call it: ``fetch`` gives the tensors of some parameters and may gather them. ``model`` tells names,
    shapes and ties; its weights may lie on the meta device. Raises WeightsError on a tensor too few, too many or of
    another shape.
    """
    stored = stored_tensors(model)
    left = {name: tensor.shape for name, tensor in revert_weight_conversion(model, stored).items()}
    writer = ShardWriter(folder, max_bytes, ledger, rank=rank, world=world)
    for names in parts(stored):
        with fetch(names) as tensors:
            for name, tensor in revert_weight_conversion(model, tensors).items():
                shape = left.pop(name, None)
                if tensor.shape != shape or not tensor.numel():
                    raise WeightsError(f"tensor {name} has the shape {tuple(tensor.shape)}, the model's is {shape}")
                writer.add(name, tensor)
    if left:
        raise WeightsError(f"{len(left)} tensors of the model were not written, the first is {next(iter(left))}")
    writer.close()


def stored_tensors(model: Any) -> Tensors:
    """The parameters and persistent buffers that a checkpoint holds, as meta tensors of their full shapes.

    Of tied ones the one is left that transformers expects when it loads.
    """
    ignored = set(model._keys_to_ignore_on_save or ())  # noqa: SLF001 - what save_pretrained leaves out
    tensors = {
        name: torch.empty(full_shape(tensor), dtype=tensor.dtype, device="meta")
        for name, tensor in model.state_dict(keep_vars=True).items()
        if name not in ignored
    }
    return remove_tied_weights_from_state_dict(tensors, model)


def full_shape(tensor: Any) -> torch.Size:
    """A tensor's shape, also when ZeRO-3 has partitioned it."""
    return torch.Size(getattr(tensor, "ds_shape", tensor.shape))


def write_adapter(model: Any, folder: Path, ledger: Ledger, *, writes: bool) -> None:
    """Write a PEFT model's adapter in PEFT's own form: only its tensors are gathered, one at a time.

    Every rank must call it; the one that ``writes`` keeps the tensors. Raises WeightsError when one is missing.
    """
    held = model.state_dict(keep_vars=True)
    meta = {name: torch.empty(full_shape(tensor), device="meta") for name, tensor in held.items()}
    names = {id(tensor): name for name, tensor in meta.items()}
    tensors: Tensors = {}
    for key, chosen in get_peft_model_state_dict(model, state_dict=meta).items():
        with gathered({key: held[names[id(chosen)]]}) as whole:
            if whole[key].shape != chosen.shape:
                raise WeightsError(f"tensor {key} has the shape {tuple(whole[key].shape)}, not {tuple(chosen.shape)}")
            if writes:
                tensors[key] = whole[key].to("cpu", copy=True)
    if writes:
        ledger.write(folder / ADAPTER_NAME, lambda stream: write_tensors(stream, tensors))


@contextmanager
def gathered(tensors: Mapping[str, Any]) -> Generator[Tensors]:
    """Whole tensors of parameters that ZeRO-3 may have partitioned. Every rank must enter it with the same ones."""
    partitioned = [tensor for tensor in tensors.values() if hasattr(tensor, "ds_id")]
    if not partitioned:
        yield {name: tensor.detach() for name, tensor in tensors.items()}
        return
    import deepspeed

    with deepspeed.zero.GatheredParameters(partitioned):
        yield {name: tensor.detach() for name, tensor in tensors.items()}


@contextmanager
def partitioned_only(engine: Any) -> Generator[None]:
    """Inside, DeepSpeed keeps no parameter of ZeRO-3 whole, as before its own saves; afterwards the small ones again."""
    optimizer: Any = getattr(engine, "optimizer", None)
    if not hasattr(optimizer, "checkpoint_event_prologue"):
        yield
        return
    optimizer.checkpoint_event_prologue()
    try:
        yield
    finally:
        optimizer.checkpoint_event_epilogue()


def parts(names: Mapping[str, Any]) -> list[list[str]]:
    """Names that are gathered together: those of a layer, else those of a module."""
    found: dict[str, list[str]] = {}
    for name in names:
        layer = re.match(r".*?\.\d+(?=\.)", name)
        found.setdefault(layer.group() if layer else name.rpartition(".")[0], []).append(name)
    return list(found.values())
