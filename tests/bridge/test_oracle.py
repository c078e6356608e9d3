"""What real Megatron-Core makes of our arguments and canonical tensors."""

from pathlib import Path

import pytest
import torch

from oracle import load_with_megatron, megatron_logits, needs_megatron, save_with_megatron
from tiny import FAMILIES, canonical_of, model_of

pytestmark = needs_megatron
CLOSE = 1e-5


@pytest.mark.parametrize("name", FAMILIES)
def test_megatron_computes_what_transformers_computes(name: str) -> None:
    model = model_of(name)
    ids = torch.randint(0, 64, (2, 24), generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        wanted = model(ids).logits
    got = megatron_logits(model.config, canonical_of(model), ids)
    assert wanted.abs().max() > 1
    assert (got - wanted).abs().max() <= CLOSE
