"""``torch_dist`` checkpoints: what others wrote is read bit for bit, what is written others read, what is bad is refused."""

import errno
import json
import random
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
from finebridge.storage.hashing import HashingFile, file_entry
from finebridge.storage.safetensors_io import Spec
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.checkpoint.metadata import (
    BytesStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)

from .dist_by_hand import Box, ByHand, bits, refused, same, simple

# Any chunks


def cut(shape: tuple[int, ...], draw: random.Random, times: int) -> list[Box]:
    """Boxes that tile a shape, in any order; they need not be a grid."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(times if shape else 0):
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
    shape=st.lists(st.integers(1, 6), max_size=4).map(tuple),
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


def test_empty_tensors_are_refused() -> None:
    with pytest.raises(BridgeError, match="tensor x is empty"):
        check_tiling("x", stored((3, 0), [((0, 0), (3, 0))]))


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


@pytest.mark.filterwarnings("ignore:torch.distributed is disabled")
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


def test_a_number_alone_is_a_tensor_too(tmp_path: Path) -> None:
    tensors = {f"decoder.layers.{layer}.scale": torch.tensor(layer + 0.5) for layer in range(3)} | {
        "scale": torch.tensor(7)
    }
    write(tmp_path / "x", tensors)
    with DistCheckpoint(tmp_path / "x") as checkpoint:
        assert all(same(checkpoint.get(name), tensor) for name, tensor in tensors.items())


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


def test_a_full_disk_is_told_as_such(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stock = HashingFile.write

    def write_some(self: HashingFile, data: Any) -> int:
        if self.entry()["size"] > 2000:
            self.error = OSError(errno.ENOSPC, "No space left on device", str(self.path))
            raise self.error
        return stock(self, data)

    monkeypatch.setattr(HashingFile, "write", write_some)
    with pytest.raises(OSError, match="No space left on device: .*distcp"):
        write(tmp_path / "x", model([False, False]))
    assert torch.serialization.get_crc32_options()


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
            f"{at}0.pre_mlp_layernorm.weight": (3,), f"{at}0.mlp.linear_fc1.weight": (4, 1),
            f"{at}0.mlp.linear_fc2.weight": (1, 2),
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
        ({"decoder.layers.0.mlp.linear_fc1.weight_w": (2, 2)}, "of its parts only"),
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
