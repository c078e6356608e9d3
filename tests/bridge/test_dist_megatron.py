"""Real Megatron-Core reads what is written here, and what it writes is read here, bit for bit."""

import importlib.util
from collections.abc import Collection, Iterator
from pathlib import Path

import pytest
import torch
from finebridge.bridge.dist_format import DistCheckpoint, write_dist
from finebridge.storage.safetensors_io import Spec

from .dist_by_hand import same
from .megatron_cpu import KINDS, Megatron

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed; it is the oracle here"
)

# Megatron itself


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Megatron]:
    server = Megatron(tmp_path_factory.mktemp("megatron") / "log")
    yield server
    server.end()


# What the local spec's own modules are called, the canonical name, and the neighbour in a layer that has the latter.
LOCAL = [
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_", "self_attention.linear_qkv.weight"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_", "mlp.linear_fc1.weight"),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_", "self_attention.linear_q_up_proj.weight"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_", "self_attention.linear_kv_up_proj.weight"),
]  # fmt: skip


def canonical(name: str, names: Collection[str]) -> str:
    for local, engine, neighbour in LOCAL:
        head, found, rest = name.partition(local)
        if found and head + neighbour in names:
            return head + engine + rest
    return name


def different(one: DistCheckpoint, other: DistCheckpoint) -> list[str]:
    """Names that one of them lacks or whose tensors differ in a bit."""
    both = one.shapes.keys() & other.shapes.keys()
    return [*(one.shapes.keys() ^ other.shapes.keys()), *(n for n in both if not same(one.get(n), other.get(n)))]


@needs_megatron
@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_each_reads_what_the_other_writes(tmp_path: Path, megatron: Megatron, kind: str) -> None:
    megatron(do="save", kind=kind, to=tmp_path / "theirs")
    truth = torch.load(tmp_path / "theirs.truth", weights_only=True)
    with DistCheckpoint(tmp_path / "theirs") as theirs:
        assert {canonical(name, truth) for name in truth} == set(theirs)
        for name, tensor in truth.items():
            assert same(theirs.get(canonical(name, truth)), tensor), name
        assert theirs.args == {"num_layers": 4, "params_dtype": torch.bfloat16, "nested": {"a": [1, 2.5]}}
        specs = [Spec(name, theirs.dtypes[name], theirs.shapes[name]) for name in theirs]
        uniform = "moe_layer_freq" not in KINDS[kind]
        for name, dialect in (("ours", "mcore"), ("local", "mcore-local")):
            (tmp_path / name).mkdir()
            write_dist(
                tmp_path / name, specs, theirs.get, args=theirs.args, iteration=7, uniform=uniform, dialect=dialect
            )
            with DistCheckpoint(tmp_path / name) as ours:
                assert different(theirs, ours) == []
        for sizes in [{}, {"tp": 2, "ep": 2 if "num_moe_experts" in KINDS[kind] else 1}, {"pp": 2}]:
            split = tmp_path / f"split{sizes}"
            folders = {"of": tmp_path / "theirs", "ours": tmp_path / "ours", "to": split}
            megatron(do="compare", kind=kind, **folders, **sizes, **({} if sizes else {"local": tmp_path / "local"}))
            with DistCheckpoint(split) as resharded:
                assert different(theirs, resharded) == []


@needs_megatron
@pytest.mark.distributed
@pytest.mark.parametrize("metadata", ["singleton_local_shards", "non_homogeneous_layers"])
def test_other_layouts_of_megatron_are_read(tmp_path: Path, megatron: Megatron, metadata: str) -> None:
    kind = "experts"
    megatron(do="save", kind=kind, to=tmp_path / "plain")
    megatron(do="reshard", kind=kind, of=tmp_path / "plain", to=tmp_path / "other", metadata={metadata: True}, tp=2)
    with DistCheckpoint(tmp_path / "plain") as plain, DistCheckpoint(tmp_path / "other") as other:
        assert different(plain, other) == []
