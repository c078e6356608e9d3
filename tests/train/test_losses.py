"""The loss of a global batch and its gradient do not depend on how the batch is split; each rule has its closed form."""

from typing import Any, get_args

import numpy as np
import pytest
import torch
from finebridge.data_tools.collator import FlatteningCollator, PaddingCollator
from finebridge.train.losses import evaluation_sums, share, summed_loss, token_losses
from finebridge.train.model_arguments import Normalization
from torch import nn

NORMALIZATIONS = get_args(Normalization)
VOCABULARY, WIDTH = 23, 16
LENGTHS = (9, 4, 14, 6, 3, 11, 8, 5)


def samples() -> list[dict[str, np.ndarray]]:
    """Eight samples, each with its own share of tokens with loss."""
    rng = np.random.default_rng(0)
    made = []
    for number, length in enumerate(LENGTHS):
        ids = rng.integers(0, VOCABULARY, length)
        labels = np.where(np.arange(length) > number % 3, ids, -100)
        made.append({"input_ids": ids, "labels": labels})
    return made


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Embedding(VOCABULARY, WIDTH), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, VOCABULARY)
    )


def padded(items: list[dict[str, np.ndarray]], batch: int) -> list[dict[str, Any]]:
    return [PaddingCollator(0)(items[i : i + batch]) for i in range(0, len(items), batch)]


def packed(items: list[dict[str, np.ndarray]], batch: int) -> list[dict[str, Any]]:
    rows = []
    for start in range(0, len(items), batch):
        some = items[start : start + batch]
        labels = [np.concatenate([[-100], item["labels"][1:]]) for item in some]
        rows.append(
            {
                "input_ids": np.concatenate([item["input_ids"] for item in some]),
                "labels": np.concatenate(labels),
                "lengths": np.array([len(item["input_ids"]) for item in some]),
            }
        )
    return [FlatteningCollator(borders=False)([row]) for row in rows]


def gradient(micro_batches: list[dict[str, Any]], how: Any, smoothing: float = 0.0) -> tuple[float, torch.Tensor]:
    net = model()
    divisor = torch.stack([share(batch, how) for batch in micro_batches]).sum()
    total = sum(summed_loss(net(batch["input_ids"]), batch, how, smoothing) for batch in micro_batches) / divisor
    total.backward()
    return float(total.detach()), torch.cat([p.grad.flatten() for p in net.parameters()])


@pytest.mark.parametrize("how", ["token", "sequence"])
@pytest.mark.parametrize("layout", [padded, packed])
@pytest.mark.parametrize("batch", [1, 2, 4, 8])
def test_every_split_has_the_same_gradient(how: Any, layout: Any, batch: int) -> None:
    loss, grad = gradient(padded(samples(), 8), how)
    other_loss, other = gradient(layout(samples(), batch), how)
    assert other_loss == pytest.approx(loss, rel=1e-6)
    assert float((grad - other).norm() / grad.norm()) < 1e-6


def test_the_rules_have_their_closed_forms() -> None:
    net, items = model(), samples()
    means, counts = [], []
    with torch.no_grad():
        for batch in padded(items, 1):
            losses = token_losses(net(batch["input_ids"]), batch["labels"])
            counts.append(int((batch["labels"][:, 1:] != -100).sum()))
            means.append(float(losses.sum()) / counts[-1])
    batches = padded(items, 2)
    by_token = np.average(means, weights=counts)
    assert gradient(batches, "token")[0] == pytest.approx(by_token, rel=1e-6)
    assert gradient(batches, "sequence")[0] == pytest.approx(np.mean(means), rel=1e-6)
    of_pairs = [np.average(means[i : i + 2], weights=counts[i : i + 2]) for i in range(0, 8, 2)]
    assert gradient(batches, "batch")[0] == pytest.approx(np.mean(of_pairs), rel=1e-6)
    assert len({round(gradient(batches, how)[0], 5) for how in NORMALIZATIONS}) == 3


def test_token_rule_is_that_of_transformers() -> None:
    from transformers.loss.loss_utils import ForCausalLMLoss

    (batch,) = padded(samples(), 8)
    logits = model()(batch["input_ids"])
    theirs = ForCausalLMLoss(logits, batch["labels"], VOCABULARY)
    assert gradient([batch], "token")[0] == pytest.approx(float(theirs), rel=1e-6)


def test_label_smoothing_is_that_of_transformers() -> None:
    from transformers.trainer_pt_utils import LabelSmoother

    (batch,) = padded(samples(), 8)
    logits = model()(batch["input_ids"])
    theirs = LabelSmoother(epsilon=0.1)({"logits": logits}, batch["labels"], shift_labels=True)
    assert gradient([batch], "token", smoothing=0.1)[0] == pytest.approx(float(theirs), rel=1e-5)


@pytest.mark.parametrize("how", NORMALIZATIONS)
def test_a_filler_changes_nothing(how: Any) -> None:
    items = samples()
    filler = {"input_ids": items[0]["input_ids"][:3], "labels": np.full(3, -100)}
    loss, grad = gradient(padded(items, 4), how)
    other_loss, other = gradient([*padded(items, 4), *padded([filler], 1)], how)
    assert other_loss == loss
    assert torch.equal(grad, other)


def test_evaluation_counts_what_is_predicted_right() -> None:
    labels = torch.tensor([[-100, 3, 5, -100, 2]])
    logits = torch.full((1, 5, 7), -20.0)
    for place, token in enumerate([3, 1, 6, 2, 0]):  # the next tokens that the model is sure of
        logits[0, place, token] = 20.0
    loss, right, tokens = evaluation_sums(logits, labels).tolist()
    assert (right, tokens) == (2, 3)
    assert loss == pytest.approx(40.0, rel=1e-6)
