"""Samples to a batch: padded on the right to the longest, the mask from lengths, never from the pad token's id."""

from collections.abc import Sequence

import torch

from .dataset import IGNORE_INDEX, Item


class PaddingCollator:
    """Pads ``input_ids`` with ``pad_id`` and ``labels`` with -100; tensors int64, shape [batch, longest].

    ``attention_mask`` (int64) marks real tokens. Raises ValueError when no position of the batch carries loss: its mean
    would be not a number.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: Sequence[Item]) -> dict[str, torch.Tensor]:
        shape = (len(items), max(len(item["input_ids"]) for item in items))
        batch = {
            "input_ids": torch.full(shape, self.pad_id, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            batch["input_ids"][row, :length] = torch.from_numpy(item["input_ids"])
            batch["labels"][row, :length] = torch.from_numpy(item["labels"])
            batch["attention_mask"][row, :length] = 1
        if not (batch["labels"][:, 1:] != IGNORE_INDEX).any():
            raise ValueError("a batch in which no token carries loss reached the collator")
        return batch
