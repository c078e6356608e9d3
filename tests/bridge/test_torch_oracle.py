"""The format ``torch`` against real megatron-core: it loads what is written, strictly, and what it saves is read right.

Megatron's own account of its weights (``sharded_state_dict``) says which part of which tensor a rank holds.
"""

import json
import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from canonical_models import EMBEDDING, OUTPUT, read, tiny_model, write
from finebridge.bridge.dialects import canonical_names
from finebridge.bridge.parallel import Layout
from finebridge.bridge.torch_format import TorchCheckpoint
from rank_runner import RankRunner

pytestmark = [
    pytest.mark.distributed,
    pytest.mark.skipif(find_spec("megatron") is None, reason="megatron-core is not installed"),
]
VOCAB = 100

# A model, a layout of two ranks, and, when it is uneven, the same in Megatron's words.
CASES: list[tuple[dict[str, Any], dict[str, Any], str]] = [
    ({"tied": True, "bias": True}, {"tp": 2}, ""),
    ({"tied": True}, {"pp": 2}, ""),
    ({}, {"pp": 2, "vpp": 2}, ""),
    ({}, {"pp": 2, "layer_list": (1, 3)}, "Et|tttL"),
    ({"tied": True}, {"pp": 2, "vpp": 2, "layer_list": (1, 2, 1, 0)}, "Et|tt|t|L"),
    ({"experts": 4}, {"tp": 2}, ""),
    ({"experts": 4}, {"ep": 2}, ""),
    ({"experts": 4}, {"tp": 2, "ep": 2, "etp": 1}, ""),
    ({"mla": True}, {"tp": 2}, ""),
    ({"experts": 4, "mla": True}, {"pp": 2}, ""),
    ({"mtp": 1}, {"tp": 2}, ""),
    ({"mtp": 1}, {"pp": 2}, ""),
    ({"mtp": 1, "tied": True}, {"pp": 2}, ""),
    ({"experts": 4, "grouped": True}, {"ep": 2}, ""),
    ({"experts": 4, "grouped": True}, {"tp": 2}, ""),
]
IDS = ["-".join(map(str, [*model, *(f"{key}{value}" for key, value in layout.items())])) for model, layout, _ in CASES]


def written(case: int) -> dict[str, torch.Tensor]:
    """The model of a case; the arguments' values are megatron's defaults otherwise."""
    return tiny_model(vocab=VOCAB, gate=False, seed=case, **CASES[case][0])


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory, ranks: RankRunner) -> Path:
    """Per case ``save<N>``: what Megatron saved after it had loaded our files; grouped experts begin at random."""
    folder = tmp_path_factory.mktemp("mcore")
    cases: list[dict[str, Any]] = []
    for number, (model, layout, stages) in enumerate(CASES):
        case = {"model": model, "layout": layout, "stages": stages, "save": str(folder / f"save{number}")}
        if not model.get("grouped"):
            case["load"] = str(folder / f"load{number}")
            options = {"dialect": "mcore-local", "make_vocab_size_divisible_by": 64}
            write(folder / f"load{number}", written(number), Layout(**layout), **options)
        case["truth"] = not (model.get("tied") and model.get("mtp"))  # megatron-core 0.16.1 cannot tell it for both
        cases.append(case)
    (folder / "cases.json").write_text(json.dumps(cases))
    ranks.run([folder / "cases.json"], folder / "logs", ranks=2, entry="mcore_ranks:main", patience=5).check()
    return folder


@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_megatron_loads_what_is_written_and_what_it_saves_is_read(saved: Path, case: int) -> None:
    model, layout, _ = CASES[case]
    with TorchCheckpoint(saved / f"save{case}", vocab_size=VOCAB) as checkpoint:
        assert checkpoint.layout == Layout(**layout)
        assert checkpoint.iteration == 7
        assert checkpoint.args["model_type"].args == (1,)
        assert checkpoint.said[0].endswith("not taken over: optimizer, rng_state")
        found = {name: checkpoint.get(name) for name in checkpoint.shapes}
    if not model.get("grouped"):
        wanted = written(case)
        assert found.keys() == wanted.keys()
        assert [name for name in wanted if not torch.equal(found[name], wanted[name])] == []


@pytest.mark.parametrize("case", range(len(CASES)), ids=IDS)
def test_every_part_is_what_megatron_says_it_is(saved: Path, case: int) -> None:
    model, _, _ = CASES[case]
    truths = [torch.load(path, weights_only=False) for path in sorted((saved / f"save{case}").glob("truth*"))]
    if model.get("tied") and model.get("mtp"):
        assert not truths
        return
    found = read(saved / f"save{case}", vocab_size=128)
    names = canonical_names({_as_dense(key, found) for truth in truths for key, *_ in truth})
    whole = {key: _whole(names[_as_dense(key, found)], found) for truth in truths for key, *_ in truth}
    told = {key: torch.zeros_like(tensor, dtype=torch.bool) for key, tensor in whole.items()}
    for key, shape, part, values in (entry for truth in truths for entry in truth):
        assert tuple(shape) == tuple(whole[key].shape)
        assert torch.equal(whole[key][part], values), key
        told[key][part] = True
    assert [key for key, part in told.items() if not part.all()] == []
    assert sum(part.numel() for part in told.values()) == sum(tensor.numel() for tensor in found.values())


def _whole(name: str, found: dict[str, torch.Tensor]) -> torch.Tensor:
    """A tensor as Megatron counts it: the experts of a layer are one."""
    before, experts, after = name.partition(".experts.experts.")
    return (
        torch.stack([found[f"{before}.experts.local_experts.{e}.{after}"] for e in range(4)])
        if experts
        else found[name]
    )


def _as_dense(key: str, found: dict[str, torch.Tensor]) -> str:
    """Megatron's own layers call the norm before experts that of ``linear_fc1``, which such a layer does not have."""
    layer = re.sub(r"mlp\.linear_fc1\.layer_norm_weight$", "", key)
    return f"{layer}pre_mlp_layernorm.weight" if f"{layer}mlp.router.weight" in found else key


def test_the_padding_that_megatron_loaded_is_zero(saved: Path) -> None:
    found = read(saved / "save5", vocab_size=128)
    for name in (EMBEDDING, OUTPUT):
        assert not found[name][VOCAB:].any()
        assert found[name][VOCAB - 1].any()
