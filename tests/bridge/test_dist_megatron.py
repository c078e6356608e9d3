"""Real Megatron-Core reads what is written here, and what it writes is read here, bit for bit."""

from pathlib import Path
from typing import Any

import pytest
import torch
from canonical_models import args_of, tiny_model
from finebridge.bridge.dist_format import DistCheckpoint, write_dist
from finebridge.storage.safetensors_io import Spec

from .dist_by_hand import same
from .oracle import PIECES, ask, fill, joined, load, needs_megatron, save

pytestmark = [needs_megatron, pytest.mark.distributed]
slow = pytest.mark.slow
KINDS: dict[str, dict[str, Any]] = {
    "tied": {"tied": True, "bias": True, "groups": 2},
    "experts": {"experts": 4, "dense": 0},
    "mixed": {"experts": 4, "mtp": 1},
    "latent": {"experts": 4, "mla": True},
}
SPLIT = [{"tp": 2, "ep": 2}, {"pp": 2}]


def made_of(kind: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Megatron's arguments and canonical tensors of a kind, in bf16; routers' biases stay in fp32, as Megatron keeps them."""
    made = tiny_model(gate=False, dtype=torch.bfloat16, **KINDS[kind])
    bias = {name: tensor.float() for name, tensor in made.items() if name.endswith("expert_bias")}
    return args_of(**KINDS[kind]) | {"bf16": True}, made | bias


def differing(folder: Path, canonical: dict[str, torch.Tensor]) -> list[str]:
    """Names that a checkpoint or the model lacks or whose tensors differ in a bit."""
    with DistCheckpoint(folder) as found:
        both = found.shapes.keys() & canonical.keys()
        return [*(found.shapes.keys() ^ canonical.keys()), *(n for n in both if not same(found.get(n), canonical[n]))]


def write(folder: Path, kind: str, dialect: str) -> None:
    args, canonical = made_of(kind)
    folder.mkdir()
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in canonical.items()]
    uniform = not isinstance(args.get("moe_layer_freq"), list)
    write_dist(folder, specs, canonical.__getitem__, args=args, iteration=7, uniform=uniform, dialect=dialect)


@pytest.mark.parametrize("kind", ["mixed", *(pytest.param(kind, marks=slow) for kind in KINDS if kind != "mixed")])
def test_each_reads_what_the_other_writes(tmp_path: Path, kind: str) -> None:
    args, canonical = made_of(kind)
    for dialect in ("mcore", "mcore-local"):
        write(tmp_path / f"our {dialect}", kind, dialect)
        assert differing(tmp_path / f"our {dialect}", canonical) == []
        steps = (
            load(tmp_path / f"our {dialect}", "torch_dist"),
            PIECES,
            save(tmp_path / f"their {dialect}", "torch_dist"),
        )
        loaded = joined([rank[1] for rank in ask(args, *steps, dialect=dialect)])
        assert loaded.keys() == canonical.keys()
        assert [name for name in loaded if not same(loaded[name], canonical[name])] == []
        assert differing(tmp_path / f"their {dialect}", canonical) == []
    for number, sizes in enumerate(SPLIT):
        split = tmp_path / f"split{number}"
        ask(args, load(tmp_path / "our mcore", "torch_dist"), save(split, "torch_dist"), etp=1, **fitting(sizes, kind))
        assert differing(split, canonical) == []


def fitting(sizes: dict[str, int], kind: str) -> dict[str, int]:
    return sizes if "experts" in KINDS[kind] else {name: size for name, size in sizes.items() if name != "ep"}


@pytest.mark.parametrize("metadata", ["singleton_local_shards", pytest.param("non_homogeneous_layers", marks=slow)])
def test_other_layouts_of_megatron_are_read(tmp_path: Path, metadata: str) -> None:
    args, canonical = made_of("experts")
    step = save(tmp_path / "other", "torch_dist", {metadata: True})
    ask(args, fill(canonical), step, tp=2, etp=1)
    assert differing(tmp_path / "other", canonical) == []
