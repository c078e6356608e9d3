"""Samples or packs to a batch.

Samples are padded on the right to the longest, the mask from lengths, never from the pad token's id. Packs become one
row without padding, in which positions restart at 0 where a sample starts. Items that know their number
(``batches.CheckedSamples``) give the batch ``samples``, the list of these numbers, which is taken out before the model.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from .dataset import IGNORE_INDEX, Item


class PaddingCollator:
    """Pads ``input_ids`` with ``pad_id`` and ``labels`` with -100; tensors int64, shape [batch, longest].

    ``attention_mask`` (int64) marks real tokens.
    """

    def __init__(self, pad_id: int) -> None:
        self.pad_id = pad_id

    def __call__(self, items: Sequence[Item]) -> dict[str, Any]:
        shape = (len(items), max(len(item["input_ids"]) for item in items))
        batch: dict[str, Any] = {
            "input_ids": torch.full(shape, self.pad_id, dtype=torch.long),
            "labels": torch.full(shape, IGNORE_INDEX, dtype=torch.long),
            "attention_mask": torch.zeros(shape, dtype=torch.long),
        }
        for row, item in enumerate(items):
            length = len(item["input_ids"])
            batch["input_ids"][row, :length] = torch.from_numpy(item["input_ids"])
            batch["labels"][row, :length] = torch.from_numpy(item["labels"])
            batch["attention_mask"][row, :length] = 1
        return batch | _numbers(items)


class FlatteningCollator:
    """Joins packs into one row: ``input_ids``, ``labels`` and ``position_ids``, int64, shape [1, tokens].

    There is no ``attention_mask`` and no cache: transformers reads the samples' borders from ``position_ids`` only
    without either (``masking_utils.find_packed_sequence_indices``), and attends across them in silence otherwise. With
    ``borders`` the batch has what attention without masks takes instead: ``cu_seq_lens_q`` and ``_k`` (int32, shape
    [samples + 1], where each sample starts and the last one ends) and ``max_length_q`` and ``_k`` (int). With ``tokens``
    the row is filled up to so many by one more sample, of tokens 0 without loss.
    """

    def __init__(self, *, borders: bool, tokens: int = 0) -> None:
        self.borders, self.tokens = borders, tokens

    def __call__(self, packs: Sequence[Item]) -> dict[str, Any]:
        lengths = np.concatenate([pack["lengths"] for pack in packs])
        lacking = self.tokens - int(lengths.sum())
        if lacking > 0:
            lengths = np.append(lengths, lacking)
        ends = np.cumsum(lengths)
        batch: dict[str, Any] = {
            name: torch.from_numpy(
                np.concatenate([*(pack[name] for pack in packs), np.full(max(0, lacking), fill, packs[0][name].dtype)])
            )[None]
            for name, fill in (("input_ids", 0), ("labels", IGNORE_INDEX))
        }
        batch["position_ids"] = torch.from_numpy(np.arange(ends[-1]) - np.repeat(ends - lengths, lengths))[None]
        if self.borders:
            starts = torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32))
            batch["cu_seq_lens_q"] = batch["cu_seq_lens_k"] = starts
            batch["max_length_q"] = batch["max_length_k"] = int(lengths.max())
        return batch | _numbers(packs)


def _numbers(items: Sequence[Item]) -> dict[str, list[int]]:
    return {"samples": [int(item["number"]) for item in items]} if "number" in items[0] else {}
