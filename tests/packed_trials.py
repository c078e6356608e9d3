"""Tiny models on packed rows: their loss and gradients beside those of the samples alone, and the flags of a packed run."""

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from finebridge.data_tools.collator import FlatteningCollator
from finebridge.data_tools.dataset import DummyDataset, PackedDataset
from finebridge.data_tools.packing import pack
from finebridge.train import flash
from finebridge.train.attention import takes_borders
from finebridge.train.attention_kernels import Kernel, Need, by_operator, plain
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

CPU = torch.device("cpu")
OPERATOR = "plain products as an operator"
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "use_cache": False,
}  # fmt: skip


def build(model_type: str, attention: str | None = None, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    config = AutoConfig.for_model(model_type, **{**SIZES, **more})
    set_seed(0)
    options = {"attn_implementation": attention} if attention else {}
    return AutoModelForCausalLM.from_config(config, dtype=dtype, **options)


def packed(lengths: list[int]) -> PackedDataset:
    samples = DummyDataset(60, 8)
    samples.lengths = np.array(lengths)
    rows = [np.random.default_rng(n).integers(0, 60, length) for n, length in enumerate(lengths)]
    data = PackedDataset(samples, pack(samples.lengths, 1000, 0))
    data.data = Rows(rows)  # pyright: ignore[reportAttributeAccessIssue]
    return data


class Rows:
    def __init__(self, rows: list[Any]) -> None:
        self.rows = rows

    def __getitem__(self, number: int) -> dict[str, Any]:
        labels = self.rows[number].copy()
        labels[: len(labels) // 3] = -100
        return {"input_ids": self.rows[number], "labels": labels}


def losses(model: Any, lengths: Sequence[int] = (17, 30, 5, 21)) -> tuple[float, float, float]:
    """The loss of a packed row, that of its samples one by one weighted by tokens, and the gradients' difference."""
    data = packed(list(lengths))
    batch = FlatteningCollator(borders=takes_borders(model))([data[0]])
    device = model.device
    row = model(**{name: value.to(device) if hasattr(value, "to") else value for name, value in batch.items()}).loss
    row.backward()
    together = [parameter.grad.clone() for parameter in model.parameters()]
    model.zero_grad()
    count = int((batch["labels"] != -100).sum())
    alone = 0.0
    for number in range(4):
        item = {name: torch.from_numpy(value)[None].to(device) for name, value in data.data[number].items()}
        share = model(**item).loss * int((item["labels"][:, 1:] != -100).sum()) / count
        share.backward()
        alone += share.item()
    worst = max(
        float((a - b.grad).abs().max() / a.abs().max()) for a, b in zip(together, model.parameters(), strict=True)
    )
    return row.item(), alone, worst


def flags(model: Path, data: Path, out: Path, **more: Any) -> list[object]:
    values: dict[str, Any] = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "max_steps": 3, "logging_steps": 1,
        "learning_rate": 1e-2, "lr_scheduler_type": "constant", "per_device_train_batch_size": 1, "disable_tqdm": "true",
        "packing": "true", "max_seq_length": 160,
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def forward(query: Any, key: Any, value: Any, borders: Any, rule: Any, sinks: Any) -> tuple[torch.Tensor, torch.Tensor]:
    need = Need(
        query.device, query.dtype, query.shape[1], key.shape[1], query.shape[2], value.shape[2], rule.scale, rule.causal,
        rule.window, rule.softcap, sinks is not None,
    )  # fmt: skip
    out = plain(query, key, value, borders, need, sinks, 0.0)
    return out.contiguous(), torch.zeros(query.shape[1], query.shape[0])


def backward(
    outer: Any, query: Any, key: Any, value: Any, _: Any, __: Any, borders: Any, rule: Any, sinks: Any
) -> tuple[Any, ...]:
    """By autograd, in a thread: where an operator works, torch records nothing."""

    def differentiate() -> tuple[Any, ...]:
        leaves = [part.detach().requires_grad_() for part in (query, key, value, *([] if sinks is None else [sinks]))]
        out, _ = forward(*leaves[:3], borders, rule, leaves[3] if sinks is not None else None)
        return torch.autograd.grad(out, leaves, outer)

    with ThreadPoolExecutor(1) as thread:
        made = thread.submit(differentiate).result()
    return (*made, *([None] if sinks is None else []))


def operator() -> Kernel:
    """A kernel for the CPU that stands in a graph."""
    flash.PAIRS[OPERATOR] = flash.Pair(forward, backward)
    return Kernel(OPERATOR, flash=True, call=by_operator(OPERATOR))
