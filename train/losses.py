"""The training loss: each token's cross entropy, weighted so that a global batch has one gradient however it is split.

The model is called without labels and its logits are weighted here. So the loss does not depend on what a model class
makes of ``num_items_in_batch``, nor on how the batch is split into ranks, micro-steps, rows and packs.

=================== ==========================================================================================
normalization       the loss of an optimizer step
=================== ==========================================================================================
token (default)     mean over all its loss tokens; what transformers does
sequence            mean over its samples of each sample's mean; long answers weigh no more (Pai-Megatron-Patch)
batch               mean over its micro-batches of each one's mean; older trainers, depends on the split
=================== ==========================================================================================
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch.nn import functional

from ..data_tools.dataset import IGNORE_INDEX
from .model_arguments import Normalization


def share(inputs: Mapping[str, Any], how: Normalization) -> torch.Tensor:
    """What a micro-batch adds to the step's divisor: its loss tokens, its samples with loss, or itself; int64, scalar."""
    if how == "token":
        return _counts(inputs).sum()
    if how == "sequence":
        samples = _sample_of(inputs)[:, 1:]
        return (_per_sample(_counts(inputs), samples) > 0).sum()
    return _counts(inputs).any().long()


def summed_loss(
    logits: torch.Tensor, inputs: Mapping[str, Any], how: Normalization, smoothing: float = 0.0
) -> torch.Tensor:
    """The weighted sum of a micro-batch's cross entropies, to be divided by the step's summed ``share``; fp32, scalar.

    ``logits`` have the shape [rows, tokens, vocabulary]; ``inputs`` hold ``labels`` (unshifted, -100 without loss) and,
    for packed rows, ``position_ids``.
    """
    return (token_losses(logits, inputs["labels"], smoothing) / row_divisors(inputs, how)).sum()


def row_divisors(inputs: Mapping[str, Any], how: Normalization) -> torch.Tensor:
    """What each next token's cross entropy is divided by within its micro-batch; int64, broadcasts to [rows, tokens - 1]."""
    counts = _counts(inputs)
    if how == "token":
        return torch.ones_like(counts[:1, :1])
    if how == "batch":
        return counts.sum().clamp_min(1).expand(1, 1)
    samples = _sample_of(inputs)[:, 1:]
    return _per_sample(counts, samples).gather(0, samples.flatten()).view_as(counts).clamp_min(1)


def token_losses(logits: torch.Tensor, labels: torch.Tensor, smoothing: float = 0.0) -> torch.Tensor:
    """Cross entropy of each next token, 0 where its label is -100; fp32, shape [rows, tokens - 1]."""
    ahead = logits[:, :-1].float()
    targets = labels[:, 1:]
    flat = functional.cross_entropy(
        ahead.flatten(0, 1), targets.flatten(), ignore_index=IGNORE_INDEX, reduction="none", label_smoothing=smoothing
    )
    return flat.view_as(targets)


def evaluation_sums(logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Summed loss, rightly predicted tokens and loss tokens of a batch; float64, shape [3]."""
    targets = labels[:, 1:]
    right = (logits[:, :-1].argmax(-1) == targets) & (targets != IGNORE_INDEX)
    sums = (token_losses(logits, labels).double().sum(), right.sum(), (targets != IGNORE_INDEX).sum())
    return torch.stack([value.double() for value in sums])


def _counts(inputs: Mapping[str, Any]) -> torch.Tensor:
    """1 for each next token that carries loss; int64, shape [rows, tokens - 1]."""
    return (inputs["labels"][:, 1:] != IGNORE_INDEX).long()


def _sample_of(inputs: Mapping[str, Any]) -> torch.Tensor:
    """The sample that each token belongs to, counted from 0; int64, shape [rows, tokens]."""
    labels: torch.Tensor = inputs["labels"]
    if "position_ids" in inputs:  # a packed row: a sample starts where positions do
        return (inputs["position_ids"] == 0).cumsum(-1) - 1
    return torch.arange(len(labels), device=labels.device)[:, None].expand_as(labels)


def _per_sample(counts: torch.Tensor, samples: torch.Tensor) -> torch.Tensor:
    """Loss tokens of each sample; int64, as many places as there are tokens, so that no length has to be read back."""
    return torch.zeros(counts.numel() + 1, dtype=torch.long, device=counts.device).scatter_add_(
        0, samples.flatten(), counts.flatten()
    )
