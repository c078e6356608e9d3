"""A checkpoint of a run as full weights of one type, from the fp32 masters where DeepSpeed kept some."""

from collections.abc import Generator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from ..storage.assets import carry
from ..storage.hashing import Ledger
from ..storage.manifest import verify
from ..storage.publish import publish
from ..storage.safetensors_io import Checkpoint, ShardWriter
from .weights import write_weights
from .zero_shards import ZeroShards


class ConsolidateError(ValueError):
    """The checkpoint cannot become full weights; the message says why and what to do."""


def consolidate(checkpoint: Path, output: Path, dtype: torch.dtype, max_bytes: int, *, remote_code: bool) -> str:
    """Publish the weights of a verified checkpoint in ``dtype`` at ``output``; where they were taken from, in words.

    Names, ties, config, tokenizer and remote code are the checkpoint's. Raises ManifestError, ShardsError,
    ConsolidateError (an adapter; a tensor too few or too many; a value that is not finite in ``dtype``),
    FileExistsError.
    """
    manifest = verify(checkpoint)
    if (checkpoint / "adapter_config.json").is_file():
        raise ConsolidateError(f"{checkpoint}: an adapter; finebridge merge adds it to its base")
    latest = checkpoint / "latest"
    written: dict[str, dict[str, Any]] = {}
    made_from = {"checkpoint": str(checkpoint.resolve()), "dtype": str(dtype), "of": manifest["made_from"]}
    with publish(output, kind="model", made_from=made_from, written=written) as folder:
        ledger = Ledger(folder, written)
        config: Any = AutoConfig.from_pretrained(checkpoint, trust_remote_code=remote_code)
        if latest.is_file():
            _from_shards(
                checkpoint, latest.read_text(encoding="utf-8"), config, folder, ledger, dtype, max_bytes, remote_code
            )
        else:
            _from_weights(checkpoint, folder, ledger, dtype, max_bytes)
        stored = {name for names in manifest["tensors"].values() for name in names}
        with Checkpoint(folder) as weights:
            if differs := sorted(stored ^ set(weights)):
                raise ConsolidateError(
                    f"{checkpoint}: {len(differs)} tensors are only on one side, the first is {differs[0]}"
                )
        config.dtype = str(dtype).removeprefix("torch.")
        config.save_pretrained(folder)
        carry(checkpoint, folder)
    return "the fp32 masters of ZeRO" if latest.is_file() else "its weights"


def _from_shards(
    checkpoint: Path, tag: str, config: Any, folder: Path, ledger: Ledger, dtype: torch.dtype, max_bytes: int,
    remote_code: bool,
) -> None:  # fmt: skip
    if not (checkpoint / tag).is_dir():
        raise ConsolidateError(f"{checkpoint / tag}: missing; the file latest names it")
    shards = ZeroShards(checkpoint / tag)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=remote_code)

    @contextmanager
    def fetch(names: Sequence[str]) -> Generator[dict[str, torch.Tensor]]:
        yield {name: _cast(name, shards.get(name), dtype) for name in names}

    write_weights(model, folder, max_bytes, ledger, fetch)


def _from_weights(checkpoint: Path, folder: Path, ledger: Ledger, dtype: torch.dtype, max_bytes: int) -> None:
    writer = ShardWriter(folder, max_bytes, ledger)
    with Checkpoint(checkpoint) as weights:
        for name in weights:
            writer.add(name, _cast(name, weights.get(name), dtype))
        writer.close()


def _cast(name: str, tensor: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if not tensor.is_floating_point():
        return tensor
    value = tensor.to(dtype)
    if not value.isfinite().all():
        raise ConsolidateError(
            f"tensor {name}: a value is not finite in {dtype}; take bf16 or fp32, or another checkpoint"
        )
    return value
