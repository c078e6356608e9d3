"""Sharded checkpoints, tensor by tensor, in and out; wrong indexes are refused."""

import json
from pathlib import Path

import pytest
import torch
from finebridge.storage.hashing import HashingFile, Ledger, file_entry
from finebridge.storage.manifest import ManifestError
from finebridge.storage.safetensors_io import Checkpoint, ShardWriter, write_tensors
from finebridge.storage.space import parse_size
from safetensors.torch import load_file, save_file

INDEX = "model.safetensors.index.json"


def tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    made = {f"model.layers.{i}.w": torch.randn(4, 5, generator=generator) for i in range(5)}  # 80 bytes each
    return made | {
        "half": torch.randn(7, generator=generator).bfloat16(),
        "counts": torch.arange(3),
        "one": torch.tensor(2.5),
    }


def write(folder: Path, values: dict[str, torch.Tensor], max_bytes: int) -> None:
    folder.mkdir()
    writer = ShardWriter(folder, max_bytes, Ledger(folder))
    for name, value in values.items():
        writer.add(name, value)
    writer.close()


def assert_equal(got: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert list(got) == list(wanted)
    for name, value in wanted.items():
        assert got[name].dtype == value.dtype
        assert got[name].shape == value.shape
        assert torch.equal(got[name], value), name


def sharded(folder: Path) -> dict[str, str]:
    """Two shards with an index, the index's weight_map."""
    write(folder, {"a": torch.ones(2), "b": torch.zeros(2)}, 8)
    return json.loads((folder / INDEX).read_text())["weight_map"]


def rewrite_index(folder: Path, **weight_map: str) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def test_round_trip_through_several_shards(tmp_path: Path) -> None:
    wanted = tensors()
    write(tmp_path / "x", wanted, 170)
    names = [f"model-{number:05d}-of-00003.safetensors" for number in (1, 2, 3)]
    assert sorted(path.name for path in (tmp_path / "x").iterdir()) == [*names, INDEX]
    index = json.loads((tmp_path / "x" / INDEX).read_text())
    stored = {name: load_file(tmp_path / "x" / name) for name in names}
    assert index["weight_map"] == {key: name for name, part in stored.items() for key in part}
    total = sum(value.numel() * value.element_size() for value in wanted.values())
    assert index["metadata"] == {"total_size": total}
    for part in stored.values():
        assert sum(value.numel() * value.element_size() for value in part.values()) <= 170
    with Checkpoint(tmp_path / "x") as checkpoint:
        assert set(checkpoint) == set(wanted)
        assert len(checkpoint) == len(wanted)
        assert checkpoint.shapes == {name: tuple(checkpoint.get(name).shape) for name in checkpoint}
        assert_equal({name: checkpoint.get(name) for name in wanted}, wanted)
        assert "half" in checkpoint
        assert "other" not in checkpoint
        with pytest.raises(KeyError):
            checkpoint.get("other")


def test_what_fits_becomes_one_file_without_an_index(tmp_path: Path) -> None:
    wanted = tensors()
    total = sum(value.numel() * value.element_size() for value in wanted.values())
    write(tmp_path / "x", wanted, total)
    assert [path.name for path in (tmp_path / "x").iterdir()] == ["model.safetensors"]
    with Checkpoint(tmp_path / "x") as checkpoint:
        assert_equal({name: checkpoint.get(name) for name in wanted}, wanted)
    write(tmp_path / "y", wanted, total - 1)
    assert len(list((tmp_path / "y").glob("*.safetensors"))) == 2


def test_a_tensor_larger_than_a_shard_gets_its_own(tmp_path: Path) -> None:
    wanted = {"a": torch.ones(2), "big": torch.ones(100), "b": torch.ones(2), "c": torch.zeros(2)}
    write(tmp_path / "x", wanted, 16)
    weight_map = json.loads((tmp_path / "x" / INDEX).read_text())["weight_map"]
    assert [name.split("-")[1] for name in weight_map.values()] == ["00001", "00002", "00003", "00003"]
    with Checkpoint(tmp_path / "x") as checkpoint:
        assert_equal({name: checkpoint.get(name) for name in wanted}, wanted)


def test_views_are_written_as_their_own_bytes(tmp_path: Path) -> None:
    grid = torch.arange(12.0).reshape(3, 4)
    write(tmp_path / "x", {"turned": grid.T, "row": grid[1]}, 10**6)
    assert (tmp_path / "x" / "model.safetensors").stat().st_size < 300
    with Checkpoint(tmp_path / "x") as checkpoint:
        assert torch.equal(checkpoint.get("turned"), grid.T)
        assert torch.equal(checkpoint.get("row"), grid[1])


def test_a_name_written_twice_is_refused_even_in_another_shard(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path, 8, Ledger(tmp_path))
    writer.add("a", torch.ones(2))
    writer.add("b", torch.ones(2))
    with pytest.raises(ValueError, match="a is written twice"):
        writer.add("a", torch.ones(2))


def test_a_name_in_two_files_is_refused(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path / "x")
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "x" / weight_map["b"])
    with pytest.raises(ValueError, match=r"00002.*tensor a is in model-00001"):
        Checkpoint(tmp_path / "x")


@pytest.mark.parametrize("name", ["../secret.safetensors", "/etc/passwd", "sub/../../secret.safetensors"])
def test_an_index_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    sharded(tmp_path / "x")
    save_file({"b": torch.ones(2)}, tmp_path / "secret.safetensors")
    rewrite_index(tmp_path / "x", b=name)
    with pytest.raises(ValueError, match="outside the folder"):
        Checkpoint(tmp_path / "x")


def test_an_index_that_names_a_missing_file_is_refused(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path / "x")
    (tmp_path / "x" / weight_map["b"]).unlink()
    with pytest.raises(FileNotFoundError, match=r"00002-of-00002.*missing"):
        Checkpoint(tmp_path / "x")


def test_an_index_that_names_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path / "x")
    rewrite_index(tmp_path / "x", **weight_map, ghost=weight_map["a"])
    with pytest.raises(ValueError, match="1 tensors are in no file, the first is ghost"):
        Checkpoint(tmp_path / "x")


def test_a_tensor_that_the_index_does_not_list_is_refused(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path / "x")
    save_file({"b": torch.ones(2), "left": torch.ones(2)}, tmp_path / "x" / weight_map["b"])
    with pytest.raises(ValueError, match=rf"00002-of-00002.*tensor left is not listed in {INDEX}"):
        Checkpoint(tmp_path / "x")


@pytest.mark.parametrize("text", ["{}", '{"weight_map": {}}', '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(ValueError, match=f"{INDEX}: no weight_map"):
        Checkpoint(tmp_path)


def test_an_index_that_is_not_json_is_named(tmp_path: Path) -> None:
    sharded(tmp_path / "x")
    (tmp_path / "x" / INDEX).write_text("{")
    with pytest.raises(ValueError, match=r"index\.json: not JSON"):
        Checkpoint(tmp_path / "x")


def test_a_shard_with_a_damaged_header_is_named(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path / "x")
    (tmp_path / "x" / weight_map["b"]).write_bytes(b"version https://git-lfs.github.com/spec/v1")
    with pytest.raises(ManifestError, match=r"00002-of-00002.*not a safetensors file"):
        Checkpoint(tmp_path / "x")


def test_a_shard_whose_data_are_cut_is_a_value_error_that_names_it(tmp_path: Path) -> None:
    weight_map = sharded(tmp_path / "x")
    path = tmp_path / "x" / weight_map["b"]
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(ValueError, match="00002-of-00002"), Checkpoint(tmp_path / "x") as checkpoint:
        checkpoint.get("b")


def test_pickled_weights_only_are_told_so(tmp_path: Path) -> None:
    (tmp_path / "pytorch_model.bin").touch()
    with pytest.raises(
        FileNotFoundError, match=r"no model\.safetensors.*found \.bin.*save the model once with safetensors"
    ):
        Checkpoint(tmp_path)


def test_a_folder_without_weights_is_told_so(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no .*index\.json$"):
        Checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("5GB", 5 * 10**9), ("200MB", 2 * 10**8), ("64KB", 64_000), ("1TB", 10**12), ("17B", 17), ("12345", 12345),
        ("1.5 gb", 1_500_000_000), (" 2 MB ", 2_000_000), ("0.5KB", 500),
    ],
)  # fmt: skip
def test_sizes_that_are_understood(text: str, wanted: int) -> None:
    assert parse_size(text) == wanted


@pytest.mark.parametrize(
    "text", ["", "GB", "five", "5XB", "5G", "5GiB", "0", "0GB", "-1GB", "nan", "inf", "1e999MB", "5GB5"]
)
def test_sizes_that_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="size"):
        parse_size(text)


def test_the_bytes_are_those_of_the_reference_writer(tmp_path: Path) -> None:
    types = [
        torch.bool, torch.uint8, torch.int8, torch.int16, torch.uint16, torch.float16, torch.bfloat16, torch.int32,
        torch.uint32, torch.float32, torch.complex64, torch.float64, torch.int64, torch.uint64, torch.float8_e4m3fn,
        torch.float8_e5m2, torch.float8_e8m0fnu, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
    ]  # fmt: skip
    values = tensors() | {f't.{dtype} ä"': torch.arange(3).to(dtype) for dtype in types}
    save_file(values, tmp_path / "theirs", metadata={"format": "pt"})
    with HashingFile(tmp_path / "ours") as stream:
        write_tensors(stream, values)
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()
    assert stream.entry() == file_entry(tmp_path / "ours")


def test_an_empty_tensor_is_never_written(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"tensor b is empty \(0, 4\)"):
        write(tmp_path / "x", {"a": torch.ones(1), "b": torch.ones(0, 4)}, 10**6)


@pytest.mark.parametrize("world", [1, 2, 3])
def test_several_ranks_write_every_shard_once(tmp_path: Path, world: int) -> None:
    wanted = tensors()
    ledgers = [Ledger(tmp_path) for _ in range(world)]
    for rank, ledger in enumerate(ledgers):
        writer = ShardWriter(tmp_path, 90, ledger, rank=rank, world=world)
        for name, value in wanted.items():
            writer.add(name, value)
        writer.close()
    written = [name for ledger in ledgers for name in ledger.entries]
    assert sorted(written) == sorted(path.name for path in tmp_path.iterdir())
    assert all(entry == file_entry(tmp_path / name) for ledger in ledgers for name, entry in ledger.entries.items())
    assert all(any(name.startswith("model-") for name in ledger.entries) for ledger in ledgers)
    with Checkpoint(tmp_path) as checkpoint:
        assert_equal({name: checkpoint.get(name) for name in wanted}, wanted)
