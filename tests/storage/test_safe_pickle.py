"""Pickles of foreign classes: what they say is told, what they name is neither imported nor run."""

import io
import pickle
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict
from pathlib import Path, PurePosixPath
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finebridge.storage.safe_load import UnsafeFileError
from finebridge.storage.safe_pickle import Inert, load_namespace_file, read_pickle, read_torch, tensor_bytes, typed

TENSORS = {
    "grid": torch.randn(3, 4).bfloat16(),
    "turned": torch.randn(4, 3).T,
    "every_second": torch.randn(6, 5)[1::2, ::2],
    "spread": torch.tensor([1.0, 2.0]).expand(3, 2),
    "scalar": torch.tensor(2.5),
    "empty": torch.zeros(0, 3),
    "flags": torch.tensor([True, False]),
    "counts": torch.tensor([3, 4], dtype=torch.uint16),
    "narrow": torch.randn(3, 3).to(torch.float8_e4m3fn),
    "wide": torch.randn(3, dtype=torch.float64),
    "parameter": torch.nn.Parameter(torch.ones(2, 2)),
}


def saved(value: object, *, checksums: bool = True, shift: int = 0) -> memoryview:
    """What torch.save writes, ``shift`` bytes into its memory."""
    stream = io.BytesIO()
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(checksums)
    torch.save(value, stream)
    torch.serialization.set_crc32_options(before)
    return memoryview(bytearray(bytes(shift) + stream.getvalue()))[shift:]


@pytest.mark.parametrize("shift", [0, 1, 64])
@pytest.mark.parametrize("checksums", [True, False])
@pytest.mark.parametrize("name", TENSORS)
def test_a_tensor_comes_out_as_it_went_in(name: str, checksums: bool, shift: int) -> None:
    wanted = TENSORS[name].detach()
    data, dtype = tensor_bytes(read_torch(saved(TENSORS[name], checksums=checksums, shift=shift), "x"), "x")
    got = typed(data, dtype)
    assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
    assert torch.equal(got.double(), wanted.double())


def test_a_dense_tensor_is_a_view_of_the_bytes() -> None:
    memory = saved(torch.zeros(64))
    data, dtype = tensor_bytes(read_torch(memory, "x"), "x")
    whole = torch.frombuffer(memory, dtype=torch.uint8)
    assert whole.data_ptr() <= data.data_ptr() < whole.data_ptr() + len(whole)
    if data.data_ptr() % 4 == 0:
        assert typed(data, dtype).data_ptr() == data.data_ptr()


def test_plain_values_stay_and_objects_become_inert() -> None:
    value = {
        "args": Namespace(a=1, b=torch.bfloat16, c=[None, 2.5, "x", (True,)]),
        "path": PurePosixPath("x/y"),
        "state": SimpleNamespace(z=3),
        "order": OrderedDict(k=torch.Size([2, 3])),
        "bytes": b"\x00\xff",
    }
    got = read_torch(saved(value), "x")
    assert isinstance(got["args"], Inert)
    assert got["args"].named == "argparse.Namespace"
    assert got["args"].state == {"a": 1, "b": torch.bfloat16, "c": [None, 2.5, "x", (True,)]}
    assert got["state"].state == {"z": 3}
    assert got["order"] == OrderedDict(k=(2, 3))
    assert got["path"].named.startswith("pathlib")
    assert got["bytes"].named == "_codecs.encode"


def test_classes_of_one_file_know_nothing_of_those_of_another() -> None:
    first, second = (read_pickle(pickle.dumps(Namespace(a=1)), "x") for _ in range(2))
    assert type(first) is not type(second)
    assert not hasattr(first, "__dict__")


def repacked(data: memoryview, change: str) -> memoryview:
    """The same file with its records compressed, one lost, or the bytes of another machine."""
    out = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(data)) as old, zipfile.ZipFile(out, "w") as new:
        for entry in old.infolist():
            content = old.read(entry)
            if change == "lost" and entry.filename.endswith("data/0"):
                continue
            if change == "short" and entry.filename.endswith("data/0"):
                content = content[:-4]
            if entry.filename.endswith("byteorder") and change == "big":
                content = b"big"
            kind = zipfile.ZIP_DEFLATED if change == "packed" else zipfile.ZIP_STORED
            new.writestr(entry.filename, content, compress_type=kind)
    return memoryview(bytearray(out.getvalue()))


@pytest.mark.parametrize("change", ["lost", "short", "big", "packed"])
def test_a_file_that_was_changed_is_refused(change: str) -> None:
    data = saved(torch.randn(5))
    tensor_bytes(read_torch(repacked(data, ""), "file"), "file")
    with pytest.raises(UnsafeFileError, match="^file: broken"):
        tensor_bytes(read_torch(repacked(data, change), "file"), "file")


def test_every_cut_of_a_file_is_refused() -> None:
    data = saved([torch.randn(5), "x"])
    for length in range(0, len(data), 7):
        with pytest.raises(UnsafeFileError, match="^file: broken"):
            read_torch(data[:length], "file")


class Rebuilt:
    """Pickles as a tensor of any storage, place, shape and strides."""

    def __init__(self, *numbers: Any) -> None:
        self.numbers = numbers

    def __reduce__(self) -> Any:
        storage = torch.storage.TypedStorage(
            wrap_storage=torch.zeros(6).untyped_storage(), dtype=torch.float32, _internal=True
        )
        return torch._utils._rebuild_tensor_v2, (storage, *self.numbers, False, OrderedDict())


@pytest.mark.parametrize(
    "numbers",
    [
        (1, (2, 3), (3, 1)), (0, (7,), (1,)), (-1, (2,), (1,)), (0, (2, -1), (1, 1)), (0, (2,), (-1,)), (0, (2,), (9,)),
        (0, (2, 3), (1,)), (0, "ab", (1, 1)), (None, (2,), (1,)), (0, (2**40, 2**40), (0, 6)),
    ],
)  # fmt: skip
def test_a_tensor_that_is_not_within_its_storage_is_refused(numbers: Any) -> None:
    with pytest.raises(UnsafeFileError, match="^file: broken"):
        tensor_bytes(read_torch(saved(Rebuilt(*numbers)), "file"), "file")


@pytest.mark.parametrize("value", [3, None, [torch.zeros(2)], Namespace(a=1), torch.zeros(2).to_sparse()])
def test_what_is_no_plain_tensor_is_refused(value: object) -> None:
    with pytest.raises(UnsafeFileError):
        tensor_bytes(read_torch(saved(value), "file"), "file")


def test_a_name_that_has_no_place_there_is_refused_and_told() -> None:
    with pytest.raises(UnsafeFileError, match=r"^file: names builtins\.print, which has no place"):
        read_pickle(pickle.dumps([print]), "file")


# Files of settings and tensors


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_file_of_any_protocol_is_read(protocol: int, tmp_path: Path) -> None:
    value = {
        "args": Namespace(a=1, b=[None, 2.5], c=torch.bfloat16),
        "model": OrderedDict((name, tensor) for name, tensor in TENSORS.items() if name != "narrow"),
        "iteration": 3,
    }
    torch.save(value, tmp_path / "file", pickle_protocol=protocol)
    found = load_namespace_file(tmp_path / "file")
    assert (found["args"], found["iteration"]) == (value["args"], 3)
    for name, tensor in value["model"].items():
        assert torch.equal(found["model"][name], tensor.detach())
        assert found["model"][name].dtype == tensor.dtype


def test_what_only_newer_protocols_name_is_read_without_running_it(tmp_path: Path) -> None:
    value = {
        "model": defaultdict(dict, {"x": torch.ones(3)}), "state": SimpleNamespace(z=3), "place": PurePosixPath("a/b"),
    }  # fmt: skip
    torch.save(value, tmp_path / "file", pickle_protocol=4)
    found = load_namespace_file(tmp_path / "file")
    assert type(found["model"]) is dict
    assert torch.equal(found["model"]["x"], torch.ones(3))
    assert found["state"] == Namespace(z=3)
    assert isinstance(found["place"], Inert)
    assert found["place"].args == ("a", "b")


class _Runs:
    def __reduce__(self) -> Any:
        return print, ("run",)


def test_a_hostile_or_broken_file_of_a_newer_protocol_is_refused(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "file"
    torch.save({"x": _Runs()}, path, pickle_protocol=4)
    with pytest.raises(UnsafeFileError, match=r"names builtins\.print, which has no place"):
        load_namespace_file(path)
    assert capsys.readouterr().out == ""
    torch.save([torch.ones(3)], path, pickle_protocol=4)
    with pytest.raises(UnsafeFileError, match="a dictionary by name is expected"):
        load_namespace_file(path)
    torch.save({"x": torch.ones(3000)}, path, pickle_protocol=4)
    whole = path.read_bytes()
    for size in (0, 3, 100, len(whole) // 2, len(whole) - 5):
        path.write_bytes(whole[:size])
        with pytest.raises(UnsafeFileError, match="broken"):
            load_namespace_file(path)
    with pytest.raises(FileNotFoundError):
        load_namespace_file(tmp_path / "none")
