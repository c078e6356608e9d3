"""The format ``torch`` against real megatron-core: it loads what is written, strictly, and what it saves is read right.

Megatron saves what it has loaded a second time as ``torch_dist``: its own account of which part of which tensor a rank
holds, in which no layout is left.
"""

from pathlib import Path
from typing import Any

import pytest
import torch
from canonical_models import EMBEDDING, OUTPUT, args_of, read, tiny_model, write
from finebridge.bridge.dist_format import DistCheckpoint
from finebridge.bridge.parallel import Layout
from finebridge.bridge.torch_format import TorchCheckpoint

from .oracle import ask, fill, load, needs_megatron, save

pytestmark = [needs_megatron, pytest.mark.distributed]
slow = pytest.mark.slow
VOCAB, ROWS = 100, 128

# A model, a layout of ranks, and, when it is uneven, the same in Megatron's words.
CASES: list[Any] = [
    pytest.param({"tied": True, "bias": True}, {"tp": 2}, "", marks=slow),
    pytest.param({"tied": True}, {"pp": 2}, "", marks=slow),
    pytest.param({}, {"pp": 2, "vpp": 2}, "", marks=slow),
    pytest.param({}, {"pp": 2, "layer_list": (1, 3)}, "Et|tttL", marks=slow),
    ({"tied": True, "bias": True}, {"pp": 2, "vpp": 2, "layer_list": (1, 2, 1, 0)}, "Et|tt|t|L"),
    pytest.param({"experts": 4}, {"tp": 2}, "", marks=slow),
    pytest.param({"experts": 4}, {"ep": 2}, "", marks=slow),
    pytest.param({"experts": 4}, {"tp": 2, "ep": 2, "etp": 1}, "", marks=slow),
    pytest.param({"mla": True}, {"tp": 2}, "", marks=slow),
    pytest.param({"mla": True, "q_lora": False}, {"tp": 2}, "", marks=slow),
    ({"experts": 4, "mla": True, "mtp": 1}, {"tp": 2, "ep": 2, "etp": 1}, ""),
    pytest.param({"experts": 4, "mla": True}, {"pp": 2}, "", marks=slow),
    pytest.param({"mtp": 1}, {"tp": 2}, "", marks=slow),
    pytest.param({"mtp": 1}, {"pp": 2}, "", marks=slow),
    pytest.param({"mtp": 1, "tied": True}, {"pp": 2}, "", marks=slow),
]


@pytest.mark.parametrize(("model", "layout", "stages"), CASES)
def test_megatron_loads_what_is_written_and_what_it_saves_is_read(
    model: dict[str, Any], layout: dict[str, Any], stages: str, tmp_path: Path
) -> None:
    wanted = tiny_model(vocab=VOCAB, gate=False, **model)
    options = {"args": args_of(**model), "dialect": "mcore-local", "make_vocab_size_divisible_by": ROWS // 2}
    write(tmp_path / "ours", wanted, Layout(**layout), **options)
    told = not (model.get("tied") and model.get("mtp"))  # megatron-core 0.16.1 cannot tell it for both
    steps = [load(tmp_path / "ours" / "release", "torch"), save(tmp_path / "theirs" / "iter_0000007", "torch")]
    steps += [save(tmp_path / "told", "torch_dist")] if told else []
    sizes = {name: size for name, size in layout.items() if name != "layer_list"}
    ask(args_of(**model), *steps, rows=ROWS, stages=stages, **sizes)
    assert same(read_theirs(tmp_path / "theirs", layout), wanted) == []
    if told:
        with DistCheckpoint(tmp_path / "told") as checkpoint:
            found = {name: checkpoint.get(name) for name in checkpoint}
        for name in {EMBEDDING, OUTPUT} & found.keys():
            assert not found[name][VOCAB:].any()
            found[name] = found[name][:VOCAB]
        assert same(found, wanted) == []


@pytest.mark.parametrize("layout", [{"ep": 2}, pytest.param({"tp": 2}, marks=slow)])
def test_grouped_experts_are_read(layout: dict[str, int], tmp_path: Path) -> None:
    """Experts in one tensor, which is not written here: what is read is what Megatron says of it."""
    model = {"experts": 4}
    args = args_of(**model, grouped=True)
    canonical = {name: tensor.bfloat16() for name, tensor in tiny_model(vocab=VOCAB, gate=False, **model).items()}
    steps = fill(canonical), save(tmp_path / "theirs" / "iter_0000007", "torch"), save(tmp_path / "told", "torch_dist")
    ask(args, *steps, rows=ROWS, **layout)
    found = read_theirs(tmp_path / "theirs", layout)
    experts = {name for name in canonical if ".local_experts." in name}
    assert len(experts) == 24
    assert same({name: found[name] for name in found.keys() - experts}, canonical.keys() - experts, canonical) == []
    with DistCheckpoint(tmp_path / "told") as checkpoint:
        assert same({name: found[name] for name in experts}, {name: checkpoint.get(name) for name in experts}) == []


def read_theirs(folder: Path, layout: dict[str, Any]) -> dict[str, torch.Tensor]:
    """What Megatron's files of the form ``torch`` hold, and what is said of them."""
    (folder / "latest_checkpointed_iteration.txt").write_text("7")
    with TorchCheckpoint(folder, vocab_size=VOCAB) as checkpoint:
        assert checkpoint.layout == Layout(**{"etp": layout.get("tp", 1)} | layout)
        assert checkpoint.iteration == 7
        assert checkpoint.args["model_type"].args == (1,)
        assert checkpoint.said[0].endswith("not taken over: optimizer, rng_state")
    return read(folder, vocab_size=VOCAB)


def same(found: dict[str, torch.Tensor], wanted: Any, values: Any = None) -> list[str]:
    """Names that one of them lacks or that differ in a bit."""
    values = wanted if values is None else values
    both = found.keys() & wanted
    return [*(found.keys() ^ set(wanted)), *(name for name in both if not torch.equal(found[name], values[name]))]
