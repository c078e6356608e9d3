"""Megatron-Core goes on from a run whose checkpoint was converted meanwhile: the same losses and weights, to the last bit.

Real megatron-core in gloo ranks: its optimizers, its ``dist_checkpointing``, dropout, so that random numbers matter. The run
itself begins with a checkpoint that was converted from Hugging Face.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.args import to_args
from finebridge.bridge.convert_cli import main
from finebridge.bridge.dist_format import DistCheckpoint
from finebridge.storage.hashing import file_entry
from torch import Tensor
from transformers import AutoModelForCausalLM

from .oracle import PIECES, ask, joined, load, needs_megatron
from .test_oracle import assert_same, canonical_of

pytestmark = [needs_megatron, pytest.mark.distributed]
slow = pytest.mark.slow
Models = Callable[[str], Path]
ROWS = 72  # of a vocabulary of 70
TWO_STEPS = {"do": "train", "steps": 2}
# A model, a layout, and how Megatron shares out its distributed optimizer; "" is its plain one.
CASES = [
    ("qwen3_moe", {"ep": 2}, "fully_reshardable"),
    pytest.param("qwen3_moe", {"ep": 2}, "dp_reshardable", marks=slow),
    pytest.param("qwen3_tied", {"tp": 2}, "dp_reshardable", marks=slow),
    pytest.param("qwen2", {"tp": 2}, "", marks=slow),
    pytest.param("deepseek_v3", {"ep": 2}, "", marks=slow),
]


class Runs:
    """A run from a converted checkpoint: two steps, a checkpoint, two steps; and what comes of going on from it."""

    def __init__(self, base: Path, folder: Path, sizes: dict[str, int], sharing: str, dropout: float) -> None:
        config = AutoModelForCausalLM.from_pretrained(base).config.to_dict() | {"num_nextn_predict_layers": 0}
        self.args = to_args(config) | {"hidden_dropout": dropout}
        self.sizes, self.sharing, self.folder = sizes, sharing, folder / "run" / "iter_0000002"
        assert main(["--to", "mcore", "--load", str(base), "--save", str(folder / "ours")]) == 0
        metadata = {"distrib_optim_sharding_type": sharing} if sharing else {}
        saving = {"do": "save run", "folder": self.folder, "metadata": metadata}
        begin = load(folder / "ours" / "release", "torch_dist"), TWO_STEPS
        ranks = self._ask(*begin, saving, PIECES, TWO_STEPS, PIECES)
        self.saved, self.losses, self.ended = joined([rank[3] for rank in ranks]), ranks[0][4], self._weights(ranks, 5)
        (self.folder.parent / "latest_checkpointed_iteration.txt").write_text("2")

    def _ask(self, *steps: dict[str, Any], **changes: Any) -> list[list[Any]]:
        return ask(self.args, *steps, rows=ROWS, distributed=bool(self.sharing), **{**self.sizes, **changes})

    @staticmethod
    def _weights(ranks: list[list[Any]], step: int) -> dict[str, Tensor]:
        return joined([rank[step] for rank in ranks])

    def go_on(self, *left_out: str, **changes: Any) -> tuple[list[float], dict[str, Tensor]]:
        """The losses of the two steps after the checkpoint, and the weights after them."""
        steps = {"do": "resume", "folder": self.folder, "left_out": left_out}, TWO_STEPS, PIECES
        ranks = self._ask(*steps, **changes)
        return ranks[0][1], self._weights(ranks, 2)


@pytest.mark.parametrize(("name", "sizes", "sharing"), CASES)
def test_a_run_goes_on_after_its_checkpoint_was_converted(
    name: str, sizes: dict[str, int], sharing: str, hf_models: Models, tmp_path: Path
) -> None:
    base = hf_models(name)
    runs = Runs(base, tmp_path, sizes, sharing, dropout=0.1)
    before = {path: file_entry(path) for path in runs.folder.iterdir()}
    words = ["--to", "hf", "--load", str(tmp_path / "run"), "--save", str(tmp_path / "hf"), "--hf_config", str(base)]
    assert main(words) == 0
    assert_same(canonical_of(AutoModelForCausalLM.from_pretrained(tmp_path / "hf")), cut(runs.saved))
    assert {path: file_entry(path) for path in runs.folder.iterdir()} == before
    with DistCheckpoint(runs.folder) as checkpoint:
        assert {line.split("entries of ")[1] for line in checkpoint.said if "entries" in line} >= {"rng_state"}
        assert not [name for name in checkpoint if "optimizer" in name]
    losses, weights = runs.go_on()
    assert losses == runs.losses
    assert [name for name in weights if not torch.equal(weights[name], runs.ended[name])] == []
    forgetful, _ = runs.go_on("rng_state")
    assert forgetful[0] != losses[0], "dropout is another one"
    slow_start, _ = runs.go_on("optimizer")
    assert slow_start[0] == losses[0]
    assert slow_start[1] != losses[1], "the moments of Adam are others"


def cut(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the padding of the vocabulary."""
    return {name: value[:70] if name.endswith(("word_embeddings.weight", "output_layer.weight")) else value
            for name, value in weights.items()}  # fmt: skip


@pytest.mark.slow
def test_a_run_goes_on_in_another_layout(hf_models: Models, tmp_path: Path) -> None:
    """With its optimizer; random numbers are a rank's own, and Megatron-LM leaves them out as well then."""
    runs = Runs(hf_models("qwen3"), tmp_path, {"tp": 1}, "fully_reshardable", dropout=0.0)
    losses, weights = runs.go_on("rng_state", tp=2)
    assert losses == pytest.approx(runs.losses, abs=1e-5)
    assert [name for name in weights if not torch.allclose(weights[name], runs.ended[name], atol=1e-4)] == []
    slow_start, _ = runs.go_on("rng_state", "optimizer", tp=2)
    assert slow_start[1] != pytest.approx(runs.losses[1], abs=1e-3)
