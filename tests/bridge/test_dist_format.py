"""``torch_dist`` checkpoints: what others wrote is read bit for bit, what is written others read, what is bad is refused."""

import importlib.util
import itertools
import json
import math
import pickle
import random
import shutil
import sys
import types
from argparse import Namespace
from collections.abc import Callable, Iterator
from enum import Enum
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from finebridge.bridge.dist_format import DistCheckpoint, write_dist
from finebridge.bridge.dist_records import Chunk, Record, Stored, check_tiling
from finebridge.bridge.errors import BridgeError
from finebridge.storage.hashing import file_entry
from finebridge.storage.safetensors_io import Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron_cpu import KINDS, Megatron
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorProperties,
    TensorStorageMetadata,
)

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed; it is the oracle here"
)
Box = tuple[tuple[int, ...], tuple[int, ...]]  # offset and shape


def same(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    """Bit for bit."""
    if (got.dtype, got.shape) != (wanted.dtype, wanted.shape):
        return False
    return torch.equal(*(tensor.contiguous().reshape(-1).view(torch.uint8) for tensor in (got, wanted)))


def bits(shape: tuple[int, ...], dtype: torch.dtype, seed: int = 0) -> torch.Tensor:
    """Any bits, so NaN of every kind too."""
    generator = torch.Generator().manual_seed(seed)
    size = math.prod(shape) * dtype.itemsize
    return torch.randint(0, 256, (size,), dtype=torch.uint8, generator=generator).view(dtype).reshape(shape)


class ByHand:
    """Writes the format from its description: any chunks, in any files, with any bytes between the records."""

    def __init__(self, folder: Path, files: int = 2) -> None:
        self.folder = folder
        folder.mkdir(parents=True)
        self.table: dict[str, Any] = {}
        self.places: dict[MetadataIndex, _StorageInfo] = {}
        self.common: Any = {"args": Namespace(num_layers=2), "checkpoint_version": 3.0, "iteration": 5}
        self._files = itertools.cycle([f"__{number}_{number % 2}.distcp" for number in range(files)])

    def record(self, value: object) -> _StorageInfo:
        name = next(self._files)
        with (self.folder / name).open("ab") as stream:
            stream.write(b"between")
            start = stream.tell()
            torch.save(value, stream)
            return _StorageInfo(name, start, stream.tell() - start)

    def add(self, key: str, tensor: torch.Tensor, boxes: list[Box] | None = None) -> None:
        boxes = boxes or [((0,) * tensor.ndim, tuple(tensor.shape))]
        chunks = [ChunkStorageMetadata(torch.Size(offset), torch.Size(shape)) for offset, shape in boxes]
        self.table[key] = TensorStorageMetadata(TensorProperties(tensor.dtype), tensor.shape, chunks)
        for offset, shape in boxes:
            part = tensor[tuple(slice(first, first + size) for first, size in zip(offset, shape, strict=True))]
            self.places[MetadataIndex(key, offset)] = self.record(part.clone())

    def add_object(self, key: str, value: object) -> None:
        self.table[key] = BytesStorageMetadata()
        self.places[MetadataIndex(key)] = self.record([value])

    def close(self, kind: type = Metadata) -> Path:
        (self.folder / ".metadata").write_bytes(pickle.dumps(kind(self.table, storage_data=self.places)))
        if self.common is not None:
            torch.save(self.common, self.folder / "common.pt")
        return self.folder


def simple(folder: Path) -> tuple[ByHand, dict[str, torch.Tensor]]:
    made = ByHand(folder)
    tensors = {
        "embedding.word_embeddings.weight": bits((6, 4), torch.bfloat16),
        "output_layer.weight": torch.randn(6, 4),
    }
    for key, tensor in tensors.items():
        made.add(key, tensor, [((0, 0), (3, 4)), ((3, 0), (3, 4))])
    return made, tensors


def refused(folder: Path, match: str) -> None:
    with pytest.raises(BridgeError, match=match), DistCheckpoint(folder) as checkpoint:
        for name in checkpoint:
            checkpoint.get(name)


# Any chunks


def cut(shape: tuple[int, ...], draw: random.Random, times: int) -> list[Box]:
    """Boxes that tile a shape, in any order; they need not be a grid."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(times):
        offset, size = boxes.pop(draw.randrange(len(boxes)))
        axis = draw.randrange(len(shape))
        if size[axis] < 2:
            boxes.append((offset, size))
            continue
        at = draw.randrange(1, size[axis])
        boxes.append((offset, (*size[:axis], at, *size[axis + 1 :])))
        boxes.append(
            (
                (*offset[:axis], offset[axis] + at, *offset[axis + 1 :]),
                (*size[:axis], size[axis] - at, *size[axis + 1 :]),
            )
        )
    draw.shuffle(boxes)
    return boxes


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=4).map(tuple),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64, torch.bool, torch.float16]),
    seed=st.integers(0, 10**6),
    times=st.integers(0, 9),
)
def test_any_chunks_make_up_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], dtype: torch.dtype, seed: int, times: int
) -> None:
    tensor = torch.randint(0, 2, shape).bool() if dtype == torch.bool else bits(shape, dtype, seed)
    made = ByHand(tmp_path_factory.mktemp("chunks") / "x", files=3)
    made.add("any.weight", tensor, cut(shape, random.Random(seed), times))
    with DistCheckpoint(made.close()) as checkpoint:
        assert (checkpoint.shapes, checkpoint.dtypes) == ({"any.weight": shape}, {"any.weight": dtype})
        assert same(checkpoint.get("any.weight"), tensor)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 10**6),
    times=st.integers(1, 9),
    fault=st.sampled_from(["lost", "twice", "wider", "moved"]),
)
def test_chunks_that_do_not_tile_are_refused(shape: tuple[int, ...], seed: int, times: int, fault: str) -> None:
    draw = random.Random(seed)
    boxes = cut(shape, draw, times)
    check_tiling("x", stored(shape, boxes))
    number = draw.randrange(len(boxes))
    offset, size = boxes[number]
    axis = draw.randrange(len(shape))
    if fault == "lost":
        del boxes[number]
    elif fault == "twice":
        boxes.append(boxes[number])
    elif fault == "wider":
        boxes[number] = offset, (*size[:axis], size[axis] + 1, *size[axis + 1 :])
    else:
        boxes[number] = (*offset[:axis], offset[axis] + 1, *offset[axis + 1 :]), size
    with pytest.raises(BridgeError, match="tensor x: (its chunk|chunks are missing)"):
        check_tiling("x", stored(shape, boxes))


def stored(shape: tuple[int, ...], boxes: list[Box]) -> Stored:
    return Stored(torch.int8, shape, [Chunk(*box, Record("a", 0, 10**6)) for box in boxes])


def test_a_pinwheel_is_a_tiling_too() -> None:
    boxes: list[Box] = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    check_tiling("x", stored((3, 3), boxes))
    with pytest.raises(BridgeError, match="overlap"):
        check_tiling("x", stored((3, 3), [*boxes[:4], ((1, 1), (2, 1))]))


# The canonical names


def layer(number: int, *, moe: bool, experts: int = 3) -> Iterator[tuple[str, tuple[int, ...]]]:
    at = f"decoder.layers.{number}."
    yield at + "self_attention.linear_qkv.layer_norm_weight", (4,)
    yield at + "self_attention.linear_qkv.weight", (8, 4)
    yield at + "self_attention.linear_proj.weight", (4, 4)
    if not moe:
        yield at + "mlp.linear_fc1.layer_norm_weight", (4,)
        yield at + "mlp.linear_fc1.weight", (6, 4)
        yield at + "mlp.linear_fc2.weight", (4, 3)
        return
    yield at + "pre_mlp_layernorm.weight", (4,)
    yield at + "mlp.router.weight", (experts, 4)
    for expert in range(experts):
        yield f"{at}mlp.experts.local_experts.{expert}.linear_fc1.weight", (6, 4)
        yield f"{at}mlp.experts.local_experts.{expert}.linear_fc2.weight", (4, 3)


def model(moe: list[bool]) -> dict[str, torch.Tensor]:
    shapes = dict(row for number, kind in enumerate(moe) for row in layer(number, moe=kind))
    shapes |= {"embedding.word_embeddings.weight": (10, 4), "decoder.final_layernorm.weight": (4,)}
    return {name: bits(shape, torch.bfloat16, seed) for seed, (name, shape) in enumerate(shapes.items())}


def specs_of(tensors: dict[str, torch.Tensor]) -> list[Spec]:
    return [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()]


def write(folder: Path, tensors: dict[str, torch.Tensor], **more: Any) -> dict[str, dict[str, Any]]:
    folder.mkdir()
    given = {"args": {"num_layers": 2}, "iteration": 3, "uniform": True} | more
    return write_dist(folder, specs_of(tensors), tensors.__getitem__, **given)


LAYOUTS = pytest.mark.parametrize(
    ("moe", "uniform"),
    [
        ([False, False], True),
        ([False, False], False),
        ([True, True], True),
        ([True, True], False),
        ([False, True], False),
    ],
)


@LAYOUTS
def test_what_is_written_is_read_back(tmp_path: Path, moe: list[bool], uniform: bool) -> None:
    tensors = model(moe)
    entries = write(tmp_path / "x", tensors, uniform=uniform)
    assert entries == {path.name: file_entry(path) for path in (tmp_path / "x").iterdir()}
    with DistCheckpoint(tmp_path / "x") as checkpoint:
        assert set(checkpoint) == set(tensors)
        assert len(checkpoint) == len(tensors)
        assert checkpoint.shapes == {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert checkpoint.dtypes == dict.fromkeys(tensors, torch.bfloat16)
        assert all(same(checkpoint.get(name), tensor) for name, tensor in tensors.items())
        assert (checkpoint.args, checkpoint.iteration) == ({"num_layers": 2}, 3)
        assert "output_layer.weight" not in checkpoint
        with pytest.raises(KeyError):
            checkpoint.get("output_layer.weight")


@LAYOUTS
def test_torch_reads_what_is_written(tmp_path: Path, moe: list[bool], uniform: bool) -> None:
    tensors = model(moe)
    write(tmp_path / "x", tensors, uniform=uniform)
    reader = dcp.FileSystemReader(tmp_path / "x")
    table = reader.read_metadata().state_dict_metadata
    loaded: dict[str, Any] = {
        key: torch.zeros(entry.size, dtype=entry.properties.dtype)
        for key, entry in table.items()
        if isinstance(entry, TensorStorageMetadata)
    }
    dcp.load(loaded, storage_reader=reader, no_dist=True)
    for name, tensor in tensors.items():
        key, at = name, []
        if uniform and name.startswith("decoder.layers."):
            at.append(int(name.split(".")[2]))
            key = "decoder.layers." + name.split(".", 3)[3]
        if "local_experts" in key:
            head, rest = key.split("local_experts.")
            at.append(int(rest.split(".")[0]))
            key = f"{head}experts.{rest.split('.', 1)[1]}"
        assert same(loaded[key][tuple(at)], tensor), name


def test_files_are_shared_out_and_each_tensor_is_asked_for_once(tmp_path: Path) -> None:
    tensors = model([False] * 8)
    asked: list[str] = []

    def get(name: str) -> torch.Tensor:
        asked.append(name)
        return tensors[name]

    (tmp_path / "x").mkdir()
    more: dict[str, Any] = {"args": {}, "iteration": 1, "uniform": True}
    entries = write_dist(tmp_path / "x", specs_of(tensors), get, workers=3, max_file_bytes=300, **more)
    assert sorted(asked) == sorted(tensors)
    sizes = [sum(tensor.nbytes for tensor in tensors.values()), sum(name.endswith(".distcp") for name in entries)]
    assert sizes[0] / 300 <= sizes[1] <= sizes[0] / 300 + 2
    asked.clear()
    (tmp_path / "y").mkdir()
    entries = write_dist(tmp_path / "y", specs_of(tensors), get, workers=1, **more)
    assert asked == list(tensors)
    assert [name for name in entries if name.endswith(".distcp")] == ["__0_0.distcp"]
    assert json.loads((tmp_path / "y" / "metadata.json").read_text())["sharded_backend"] == "torch_dist"


def test_a_view_of_a_larger_storage_is_written_alone(tmp_path: Path) -> None:
    whole = bits((1000, 4), torch.float32)
    entries = write(tmp_path / "x", {"a.weight": whole[3:5], "b.weight": whole[10:12].T}, workers=1)
    assert entries["__0_0.distcp"]["size"] < 8000
    with DistCheckpoint(tmp_path / "x") as checkpoint:
        assert same(checkpoint.get("a.weight"), whole[3:5])
        assert same(checkpoint.get("b.weight"), whole[10:12].T)


def test_every_module_of_transformer_engine_finds_its_state(tmp_path: Path) -> None:
    write(tmp_path / "x", model([True, True]))
    table = dcp.FileSystemReader(tmp_path / "x").read_metadata()
    objects = {key for key, entry in table.state_dict_metadata.items() if isinstance(entry, BytesStorageMetadata)}
    for module, shards in {
        "self_attention.linear_qkv": ["0_2", "1_2"], "self_attention.linear_proj": ["0_2", "1_2"],
        "self_attention.core_attention": ["0_2", "1_2"], "pre_mlp_layernorm": ["0_2", "1_2"],
        "mlp.experts.experts.linear_fc1": [f"{at}.{expert}_2.3" for at in range(2) for expert in range(3)],
    }.items():  # fmt: skip
        found = {key for key in objects if key.startswith(f"decoder.layers.{module}._extra_state/")}
        assert found == {f"decoder.layers.{module}._extra_state/shard_{shard}" for shard in shards}
    assert "decoder.final_layernorm._extra_state/shard_0_1" in objects
    assert not any("router" in key or "word_embeddings" in key for key in objects)
    loaded: dict[str, Any] = {"decoder.final_layernorm._extra_state/shard_0_1": None}
    index = table.storage_data[MetadataIndex(next(iter(loaded)))]
    with (tmp_path / "x" / index.relative_path).open("rb") as stream:
        stream.seek(index.offset)
        (tmp_path / "record").write_bytes(stream.read(index.length))
    assert torch.load(tmp_path / "record", weights_only=True) == [None]


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (
            lambda tensors: tensors.pop("decoder.layers.1.mlp.linear_fc2.weight"),
            "mlp.linear_fc2.weight: nothing for layer 1",
        ),
        (
            lambda tensors: tensors.update({"decoder.layers.1.mlp.linear_fc2.weight": torch.zeros(4, 5)}),
            "others of decoder",
        ),
        (lambda tensors: tensors.update({"decoder.layers.1.mlp.router.weight": torch.zeros(4)}), "nothing for layer 0"),
        (lambda tensors: tensors.update({"output_layer.weight": torch.zeros(0, 4)}), "output_layer.weight is empty"),
    ],
)
def test_tensors_that_do_not_belong_together_are_refused(
    tmp_path: Path, change: Callable[[Any], Any], match: str
) -> None:
    tensors = model([False, False])
    change(tensors)
    with pytest.raises(BridgeError, match=match):
        write(tmp_path / "x", tensors)


def test_a_missing_expert_is_refused(tmp_path: Path) -> None:
    tensors = model([True])
    del tensors["decoder.layers.0.mlp.experts.local_experts.1.linear_fc2.weight"]
    with pytest.raises(BridgeError, match="nothing for layer 0, expert 1"):
        write(tmp_path / "x", tensors)
    with pytest.raises(BridgeError, match="nothing for expert 1"):
        write(tmp_path / "y", tensors, uniform=False)


@pytest.mark.parametrize("given", [torch.zeros(4), torch.zeros(10, 4), torch.zeros(4, 10, dtype=torch.bfloat16)])
def test_a_tensor_that_is_not_as_announced_is_refused(tmp_path: Path, given: torch.Tensor) -> None:
    specs = [Spec("embedding.word_embeddings.weight", torch.bfloat16, (10, 4))]
    with pytest.raises(BridgeError, match="embedding.word_embeddings.weight: .* in place of"):
        write_dist(tmp_path, specs, lambda _: given, args={}, iteration=1, uniform=True)


def test_an_error_of_the_source_ends_the_writing(tmp_path: Path) -> None:
    def get(name: str) -> torch.Tensor:
        raise OSError(f"{name} cannot be read")

    with pytest.raises(OSError, match="cannot be read"):
        write_dist(tmp_path, specs_of(model([False])), get, args={}, iteration=1, uniform=True)
    assert not (tmp_path / ".metadata").exists()


def test_args_are_plain(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="args.backend: .* cannot be written"):
        write(tmp_path / "x", model([False]), args={"backend": object()})


def rules(folder: Path, keys: dict[str, tuple[int, ...]]) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.Tensor]]:
    """Canonical names and shapes of a checkpoint with these keys, and its tensors by key."""
    made = ByHand(folder)
    tensors = {key: bits(shape, torch.float32, seed) for seed, (key, shape) in enumerate(keys.items())}
    for key, tensor in tensors.items():
        made.add(key, tensor)
    with DistCheckpoint(made.close()) as checkpoint:
        return checkpoint.shapes, {name: checkpoint.get(name).clone() for name in checkpoint} | tensors


def test_norms_of_the_local_spec_get_their_name(tmp_path: Path) -> None:
    at = "decoder.layers."
    shapes, _ = rules(
        tmp_path / "x",
        {
            f"{at}0.input_layernorm.weight": (1,), f"{at}0.self_attention.linear_qkv.weight": (2, 1),
            f"{at}0.pre_mlp_layernorm.weight": (3,), f"{at}0.mlp.linear_fc1.weight": (4, 1), f"{at}0.mlp.linear_fc2.weight": (1, 2),
            f"{at}1.input_layernorm.weight": (5,), f"{at}1.self_attention.linear_q_up_proj.weight": (6, 1),
            f"{at}1.self_attention.q_layernorm.weight": (7,), f"{at}1.self_attention.kv_layernorm.weight": (8,),
            f"{at}1.self_attention.linear_kv_up_proj.weight": (9, 1), f"{at}1.mlp.linear_fc1.layer_norm_weight": (10,),
            f"{at}1.mlp.router.weight": (11, 1), f"{at}1.self_attention.linear_q_down_proj.weight": (12, 1),
            "mtp.layers.0.mtp_model_layer.pre_mlp_layernorm.weight": (13,), "mtp.layers.0.enorm.weight": (14,),
            "mtp.layers.0.mtp_model_layer.mlp.router.weight": (15, 1),
        },
    )  # fmt: skip
    assert shapes == {
        f"{at}0.self_attention.linear_qkv.layer_norm_weight": (1,), f"{at}0.self_attention.linear_qkv.weight": (2, 1),
        f"{at}0.mlp.linear_fc1.layer_norm_weight": (3,), f"{at}0.mlp.linear_fc1.weight": (4, 1),
        f"{at}0.mlp.linear_fc2.weight": (1, 2), f"{at}1.input_layernorm.weight": (5,),
        f"{at}1.self_attention.linear_q_up_proj.weight": (6, 1),
        f"{at}1.self_attention.linear_q_up_proj.layer_norm_weight": (7,),
        f"{at}1.self_attention.linear_kv_up_proj.layer_norm_weight": (8,),
        f"{at}1.self_attention.linear_kv_up_proj.weight": (9, 1), f"{at}1.pre_mlp_layernorm.weight": (10,),
        f"{at}1.mlp.router.weight": (11, 1), f"{at}1.self_attention.linear_q_down_proj.weight": (12, 1),
        "mtp.layers.0.transformer_layer.pre_mlp_layernorm.weight": (13,), "mtp.layers.0.enorm.weight": (14,),
        "mtp.layers.0.transformer_layer.mlp.router.weight": (15, 1),
    }  # fmt: skip


def test_halves_of_a_gated_layer_are_joined(tmp_path: Path) -> None:
    at = "decoder.layers.mlp.experts.experts."
    shapes, found = rules(
        tmp_path / "x", {f"{at}1.linear_fc1.weight_w": (2, 3, 4), f"{at}1.linear_fc1.weight_v": (2, 3, 4), "a": (1,)}
    )
    name = "decoder.layers.{}.mlp.experts.local_experts.1.linear_fc1.weight"
    assert shapes == {name.format(0): (6, 4), name.format(1): (6, 4), "a": (1,)}
    halves = [found[f"{at}1.linear_fc1.weight_{half}"] for half in "wv"]
    for number in range(2):
        assert same(found[name.format(number)], torch.cat([half[number] for half in halves]))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"decoder.layers.0.mlp.linear_fc1.weight_w": (2, 2)}, "only its half"),
        ({"mlp.layers.0.mlp.linear_fc1.weight_w": (2, 2), "mlp.layers.0.mlp.linear_fc1.weight_v": (2, 3)}, "its halves"),
        ({"decoder.layers.a.weight": (2, 2), "decoder.layers.1.a.weight": (2,)}, "stored twice"),
        ({"decoder.layers.mlp.experts.experts.linear_fc1.weight": (2,)}, "no dimension for its layers or experts"),
        ({"optimizer.state.exp_avg.decoder.weight": (2,)}, "holds no tensor of a model"),
    ],
)  # fmt: skip
def test_keys_that_make_no_model_are_refused(tmp_path: Path, keys: dict[str, tuple[int, ...]], match: str) -> None:
    with pytest.raises(BridgeError, match=match):
        rules(tmp_path / "x", keys)


# What lies beside the model


class Backend(Enum):
    FLASH = 1


def test_what_is_skipped_is_said_and_foreign_classes_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = types.ModuleType("megatron.core.transformer.enums")
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.enums", foreign)
    monkeypatch.setattr(Backend, "__module__", foreign.__name__)
    monkeypatch.setattr(foreign, "Backend", Backend, raising=False)
    kind = type("MCoreMetadata", (Metadata,), {"__module__": foreign.__name__, "__qualname__": "MCoreMetadata"})
    monkeypatch.setattr(foreign, "MCoreMetadata", kind, raising=False)

    made, tensors = simple(tmp_path / "x")
    made.add("optimizer.state.exp_avg.output_layer.weight", torch.zeros(3))
    made.add("chained_0.optimizer.state.exp_avg.output_layer.weight", torch.zeros(3))
    made.add_object("rng_state/shard_0.0_1.1", {"random": (3, (1, 2), None)})
    made.add_object("rerun_state_machine_state/shard_0_1", {})
    made.add_object("decoder.final_layernorm._extra_state/shard_0_1", None)
    plain = {"layers": 2, "dtype": torch.bfloat16, "list": [1, (2.5, None)], "inner": Namespace(x="y")}
    made.common["args"] = Namespace(**plain, attention=Backend.FLASH, nested=[Backend.FLASH])
    with DistCheckpoint(made.close(kind)) as checkpoint:
        assert set(checkpoint) == set(tensors)
        assert checkpoint.args == plain | {"inner": {"x": "y"}}
        assert checkpoint.iteration == 5
        assert sorted(checkpoint.said) == [
            "args.attention is left out: <megatron.core.transformer.enums.Backend> is no plain value",
            "args.nested is left out: <megatron.core.transformer.enums.Backend> is no plain value",
            "not read: 1 entries of _extra_state", "not read: 1 entries of chained_0",
            "not read: 1 entries of optimizer", "not read: 1 entries of rerun_state_machine_state",
            "not read: 1 entries of rng_state",
        ]  # fmt: skip


def test_the_common_state_of_core_0_19_is_read(tmp_path: Path) -> None:
    made, tensors = simple(tmp_path / "x")
    made.add_object("common_state/shard_0_1", made.common)
    made.common = None
    with DistCheckpoint(made.close()) as checkpoint:
        assert (checkpoint.args, checkpoint.iteration, checkpoint.said) == ({"num_layers": 2}, 5, [])
        assert all(same(checkpoint.get(name), tensor) for name, tensor in tensors.items())


def test_no_common_state_is_said(tmp_path: Path) -> None:
    made, _ = simple(tmp_path / "x")
    made.common = None
    with DistCheckpoint(made.close()) as checkpoint:
        assert (checkpoint.args, checkpoint.iteration) == ({}, None)
        assert any("nothing is known" in line for line in checkpoint.said)


@pytest.mark.parametrize("version", [0, 1.0, "3"])
def test_the_old_order_of_query_key_and_value_is_refused(tmp_path: Path, version: object) -> None:
    made, _ = simple(tmp_path / "x")
    made.common["checkpoint_version"] = version
    refused(made.close(), "another order of query, key and value")


# Damage


def test_a_file_that_is_absent_or_cut_is_named(tmp_path: Path) -> None:
    folder = simple(tmp_path / "x")[0].close()
    for path in sorted(folder.glob("*.distcp")):
        content = path.read_bytes()
        for length in {0, 7, len(content) // 2, len(content) - 1}:
            path.write_bytes(content[:length])
            refused(folder, f"{path.name}: cut")
        path.unlink()
        refused(folder, f"{path.name}: absent")
        path.write_bytes(content)
    (folder / ".metadata").unlink()
    refused(folder, r"\.metadata: absent; name the folder")


def test_records_are_not_read_from_elsewhere(tmp_path: Path) -> None:
    made, _ = simple(tmp_path / "x")
    index, info = next(iter(made.places.items()))
    for name in ("../x/__0_0.distcp", str(tmp_path / "x" / "__0_0.distcp")):
        made.places[index] = _StorageInfo(name, info.offset, info.length)
        refused(made.close(), "points outside")
    for start, length in ((-1, 100), (0, 0), (0, -5), (info.offset + 1, info.length), (info.offset, 10**12)):
        made.places[index] = _StorageInfo(info.relative_path, start, length)
        refused(made.close(), "record|cut|broken|cannot be in")
    made.places[index] = _StorageInfo(info.relative_path, info.offset, info.length, ["zstd"])
    refused(made.close(), "packed with")
    del made.places[index]
    refused(made.close(), r"no record holds its chunk at \(0, 0\)")


def test_a_record_of_another_tensor_is_refused(tmp_path: Path) -> None:
    made, _ = simple(tmp_path / "x")
    index = next(iter(made.places))
    for other in (torch.zeros(4, 4, dtype=torch.bfloat16), torch.zeros(3, 4), None, [torch.zeros(3, 4)]):
        made.places[index] = made.record(other)
        refused(made.close(), "embedding.word_embeddings.weight: .* (in place of|cannot be in)")


def flips(folder: Path, path: Path, places: Iterator[int]) -> int:
    """How many of the flipped bits were refused; nothing but BridgeError may come of one."""
    content = path.read_bytes()
    met = 0
    for place in places:
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        try:
            with DistCheckpoint(folder) as checkpoint:
                for name in checkpoint:
                    checkpoint.get(name).clone()
        except BridgeError:
            met += 1
    path.write_bytes(content)
    return met


@pytest.mark.parametrize("name", [".metadata", "common.pt", "__0_0.distcp"])
def test_a_flipped_bit_never_breaks_out(tmp_path: Path, name: str) -> None:
    folder = simple(tmp_path / "x")[0].close()
    size = (folder / name).stat().st_size
    assert flips(folder, folder / name, iter(range(0, size, max(1, size // 150)))) > 10


# Malice

MARK = "mark"
PAYLOADS: dict[str, Callable[[Path], bytes]] = {
    "system": lambda mark: b"cposix\nsystem\n(S'touch %s'\ntR." % bytes(mark),
    "os": lambda mark: b"cos\nsystem\n(S'touch %s'\ntR." % bytes(mark),
    "eval": lambda mark: b"cbuiltins\neval\n(S'open(\"%s\",\"w\")'\ntR." % bytes(mark),
    "exec": lambda mark: b"cbuiltins\nexec\n(S'open(\"%s\",\"w\")'\ntR." % bytes(mark),
    "open": lambda mark: b"cio\nopen\n(S'%s'\nS'w'\ntR." % bytes(mark),
    "popen": lambda mark: b"csubprocess\nPopen\n((lS'touch'\naS'%s'\natR." % bytes(mark),
    "run": lambda mark: b"csubprocess\ngetoutput\n(S'touch %s'\ntR." % bytes(mark),
    "import": lambda mark: b"cbuiltins\n__import__\n(S'mark_module'\ntR.",
    "import_module": lambda mark: b"cimportlib\nimport_module\n(S'mark_module'\ntR.",
    "class_of_module": lambda mark: b"cmark_module\nAnything\n(tR.",
    "global_only": lambda mark: b"cmark_module\nAnything\n.",
    "instance": lambda mark: b"(S'touch %s'\nios\nsystem\n." % bytes(mark),
    "object": lambda mark: b"(cos\nsystem\nS'touch %s'\no." % bytes(mark),
    "new_object": lambda mark: b"\x80\x02csubprocess\nPopen\n(]X\x05\x00\x00\x00touchaX%s%sat\x81."
    % (len(bytes(mark)).to_bytes(4, "little"), bytes(mark)),
    "stack_global": lambda mark: b"\x80\x04\x8c\x02os\x8c\x06system\x93\x8c" + bytes([6 + len(bytes(mark))])
    + b"touch " + bytes(mark) + b"\x85R.",
    "dotted": lambda mark: b"\x80\x04\x8c\x07pathlib\x8c\x0fPosixPath.touch\x93\x8c" + bytes([len(bytes(mark))])
    + bytes(mark) + b"\x85R.",
    "megatron_dotted": lambda mark: b"\x80\x04\x8c\x0dmegatron.core\x8c\x09os.system\x93\x8c" + bytes([6 + len(bytes(mark))])
    + b"touch " + bytes(mark) + b"\x85R.",
    "numpy": lambda mark: b"cnumpy.testing._private.utils\nrunstring\n(S'open(\"%s\",\"w\")'\n(dtR." % bytes(mark),
    "distributed": lambda mark: b"ctorch.distributed.run\nmain\n((lS'--no-python'\naS'touch'\naS'%s'\natR." % bytes(mark),
    "getattr": lambda mark: b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'touch %s'\ntR." % bytes(mark),
    "state_of_class": lambda mark: b"cargparse\nNamespace\n(N(dS'__setstate__'\ncos\nsystem\nstbS'touch %s'\nb." % bytes(mark),
    "state": lambda mark: b"cargparse\nNamespace\n(tR(dS'__setstate__'\ncos\nsystem\nsbS'touch %s'\nb." % bytes(mark),
    "partial": lambda mark: b"cfunctools\npartial\n(cos\nsystem\nS'touch %s'\ntR(tR." % bytes(mark),
    "hub": lambda mark: b"ctorch.hub\n_import_module\n(S'mark_module'\nS'%s'\ntR." % bytes(mark.with_name("mark_module.py")),
    "load": lambda mark: b"ctorch\nload\n(S'%s'\ntR." % bytes(mark),
    "runpy": lambda mark: b"crunpy\nrun_path\n(S'%s'\ntR." % bytes(mark.with_name("mark_module.py")),
    "extension": lambda mark: b"\x80\x02\x82\x01.",
    "persistent": lambda mark: b"S'%s'\nQ." % bytes(mark),
    "memo": lambda mark: b"cos\nsystem\np0\n0g0\n(S'touch %s'\ntR." % bytes(mark),
}  # fmt: skip


def in_zip(folder: Path, payload: bytes) -> None:
    """A file of torch.save whose pickle is this."""
    writer = torch._C.PyTorchFileWriter(str(folder))
    writer.write_record("data.pkl", payload, len(payload))
    writer.write_end_of_file()


def in_metadata(made: ByHand, payload: bytes) -> None:
    made.close()
    (made.folder / ".metadata").write_bytes(payload)


def in_common(made: ByHand, payload: bytes) -> None:
    made.close()
    in_zip(made.folder / "common.pt", payload)


def in_record(made: ByHand, payload: bytes) -> None:
    in_zip(made.folder / "__9_9.distcp", payload)
    made.places[next(iter(made.places))] = _StorageInfo(
        "__9_9.distcp", 0, (made.folder / "__9_9.distcp").stat().st_size
    )
    made.close()


@pytest.mark.parametrize("place", [in_metadata, in_common, in_record])
@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_of_a_pickle_is_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, place: Callable[[ByHand, bytes], None]
) -> None:
    mark = tmp_path / MARK
    (tmp_path / "mark_module.py").write_text(f"open({str(mark)!r}, 'w')\n")
    monkeypatch.syspath_prepend(tmp_path)
    made, _ = simple(tmp_path / "x")
    place(made, PAYLOADS[name](mark))
    refused(made.folder, re_of(place))
    assert not mark.exists()
    assert "mark_module" not in sys.modules


def re_of(place: object) -> str:
    return {in_metadata: r"\.metadata", in_common: r"common\.pt|folder|x:", in_record: r"__9_9\.distcp"}[place]


HARMLESS = {
    "extension",
    "persistent",
    "load",
    "megatron_dotted",
    "state",
    "state_of_class",
    "hub",
    "distributed",
    "popen",
}


@pytest.mark.parametrize("name", sorted(PAYLOADS.keys() - HARMLESS - {"new_object", "numpy"}))
def test_the_payloads_do_run_where_pickles_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    mark = tmp_path / MARK
    (tmp_path / "mark_module.py").write_text(f"open({str(mark)!r}, 'w')\nAnything = dict\n")
    monkeypatch.syspath_prepend(tmp_path)
    pickle.loads(PAYLOADS[name](mark))
    sys.modules.pop("mark_module", None)
    assert mark.exists()


# Megatron itself


@pytest.fixture(scope="module")
def megatron(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Megatron]:
    server = Megatron(tmp_path_factory.mktemp("megatron") / "log")
    yield server
    server.end()


# What the state_dict of the local spec calls otherwise than the canonical names, by kind of model.
LOCAL = [
    ("input_layernorm.", "self_attention.linear_qkv.layer_norm_", lambda kind, layer: kind != "latent"),
    ("pre_mlp_layernorm.", "mlp.linear_fc1.layer_norm_", lambda kind, layer: kind in ("tied", "normed") or layer == "decoder.layers.0."),
    ("self_attention.q_layernorm.", "self_attention.linear_q_up_proj.layer_norm_", lambda kind, layer: kind == "latent"),
    ("self_attention.kv_layernorm.", "self_attention.linear_kv_up_proj.layer_norm_", lambda kind, layer: kind == "latent"),
]  # fmt: skip


def canonical(kind: str, name: str) -> str:
    for local, engine, holds in LOCAL:
        head, found, rest = name.partition(local)
        if found and holds(kind if kind != "experts" else "experts", head if kind != "experts" else ""):
            return head + engine + rest
    return name


def equal(one: DistCheckpoint, other: DistCheckpoint) -> None:
    assert one.shapes == other.shapes
    assert [name for name in one if not same(one.get(name), other.get(name))] == []


@needs_megatron
@pytest.mark.distributed
@pytest.mark.parametrize("kind", KINDS)
def test_megatron_and_this_read_what_the_other_writes(tmp_path: Path, megatron: Megatron, kind: str) -> None:
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    megatron(do="save", kind=kind, to=str(theirs))
    truth = torch.load(tmp_path / "theirs.truth", weights_only=True)
    with DistCheckpoint(theirs) as checkpoint:
        assert {canonical(kind, name) for name in truth} == set(checkpoint)
        for name, tensor in truth.items():
            assert same(checkpoint.get(canonical(kind, name)), tensor), name
        assert checkpoint.args == {"num_layers": 4, "params_dtype": torch.bfloat16, "nested": {"a": [1, 2.5]}}
        specs = [Spec(name, checkpoint.dtypes[name], checkpoint.shapes[name]) for name in checkpoint]
        ours.mkdir()
        uniform = "moe_layer_freq" not in KINDS[kind]
        write_dist(ours, specs, checkpoint.get, args=checkpoint.args, iteration=7, uniform=uniform)
        with DistCheckpoint(ours) as mine:
            equal(checkpoint, mine)
        for sizes in [{}, {"tp": 2}, {"pp": 2}, *([{"ep": 2}] if "num_moe_experts" in KINDS[kind] else [])]:
            megatron(do="same", kind=kind, of=str(theirs), to=str(ours), **sizes)
            if sizes:
                split = tmp_path / "split"
                megatron(do="reshard", kind=kind, of=str(theirs), to=str(split), **sizes)
                with DistCheckpoint(split) as resharded:
                    equal(checkpoint, resharded)
                shutil.rmtree(split)


@needs_megatron
@pytest.mark.distributed
@pytest.mark.parametrize("kind", ["tied", "mixed"])
@pytest.mark.parametrize(
    "metadata", [{"singleton_local_shards": True}, {"non_homogeneous_layers": True}], ids=lambda m: next(iter(m))
)
def test_other_layouts_of_megatron_are_read(
    tmp_path: Path, megatron: Megatron, kind: str, metadata: dict[str, Any]
) -> None:
    megatron(do="save", kind=kind, to=str(tmp_path / "plain"))
    megatron(do="reshard", kind=kind, of=str(tmp_path / "plain"), to=str(tmp_path / "other"), metadata=metadata, tp=2)
    with DistCheckpoint(tmp_path / "plain") as plain, DistCheckpoint(tmp_path / "other") as other:
        equal(plain, other)
