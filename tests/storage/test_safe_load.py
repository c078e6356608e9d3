"""Pickled weights: the right tensors, little memory, and nothing of a file is ever run."""

import json
import os
import pickle
import subprocess
import sys
import weakref
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.storage import safe_load
from finebridge.storage.safe_load import BinCheckpoint, UnsafeFileError, load_tensors, open_weights
from finebridge.storage.safetensors_io import Checkpoint
from safetensors.torch import save_file

INDEX = "pytorch_model.bin.index.json"
SINGLE = "pytorch_model.bin"
BOTH = pytest.mark.parametrize("legacy", [False, True], ids=["zip", "legacy"])


def save(value: object, path: Path, *, legacy: bool = False) -> None:
    torch.save(value, path, _use_new_zipfile_serialization=not legacy)


def tensors(*, legacy: bool) -> dict[str, torch.Tensor]:
    """Every way in which a tensor may lie in a file: its own storage, shared, turned, a part, a parameter, empty."""
    new = (
        {} if legacy else {"float8": torch.arange(6.0).reshape(2, 3).to(torch.float8_e4m3fn)}
    )  # younger than zip files
    generator = torch.Generator().manual_seed(0)
    grid = torch.randn(6, 5, generator=generator)
    return new | {
        "grid": grid,
        "tied": grid,
        "tied_row": grid[2],
        "turned": grid.T,
        "every_second": grid[1::2, ::2],
        "cube": torch.randn(3, 4, 5, generator=generator).permute(2, 0, 1),
        "spread": torch.tensor([1.0, 2.0]).expand(3, 2),
        "half": torch.randn(7, generator=generator).bfloat16(),
        "counts": torch.arange(5),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0, 4),
        "flat_empty": torch.zeros(3, 0),
        "parameter": torch.nn.Parameter(torch.ones(2, 2)),
    }


def sharded(folder: Path, parts: dict[str, dict[str, Any]], *, legacy: bool = False, **more: str) -> Path:
    """A folder with these files and the index to them; ``more`` are further lines of its weight_map."""
    folder.mkdir()
    for name, part in parts.items():
        save(part, folder / name, legacy=legacy)
    weight_map = {key: name for name, part in parts.items() for key in part} | more
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def equal(got: torch.Tensor, wanted: torch.Tensor) -> bool:
    return got.dtype == wanted.dtype and got.shape == wanted.shape and torch.equal(got.double(), wanted.double())


def refused(folder: Path, match: str, kind: type[Exception] = ValueError) -> None:
    with pytest.raises(kind, match=match):
        BinCheckpoint(folder)


@BOTH
def test_one_file_gives_every_tensor_as_it_was_saved(tmp_path: Path, legacy: bool) -> None:
    wanted = tensors(legacy=legacy)
    save(OrderedDict(wanted), tmp_path / SINGLE, legacy=legacy)
    with BinCheckpoint(tmp_path) as weights:
        assert list(weights) == list(wanted)
        assert len(weights) == len(wanted)
        assert weights.shapes == {name: tuple(value.shape) for name, value in wanted.items()}
        assert weights.dtypes == {name: value.dtype for name, value in wanted.items()}
        assert "grid" in weights
        assert "other" not in weights
        for name, value in wanted.items():
            assert equal(weights.get(name), value.detach()), name
            assert not weights.get(name).requires_grad
        for act in (weights.get, lambda name: weights.read(name, 0, 1)):
            with pytest.raises(KeyError):
                act("other")


@BOTH
def test_any_range_of_elements_is_that_of_the_flat_tensor(tmp_path: Path, legacy: bool) -> None:
    wanted = tensors(legacy=legacy)
    save(wanted, tmp_path / SINGLE, legacy=legacy)
    with BinCheckpoint(tmp_path) as weights:
        for name, value in wanted.items():
            flat = value.detach().contiguous().reshape(-1)
            for start in range(len(flat) + 1):
                for stop in range(start, len(flat) + 1):
                    assert equal(weights.read(name, start, stop), flat[start:stop]), (name, start, stop)


@BOTH
def test_what_was_read_may_be_changed(tmp_path: Path, legacy: bool) -> None:
    wanted = {name: value for name, value in tensors(legacy=legacy).items() if value.is_floating_point()}
    save(wanted, tmp_path / SINGLE, legacy=legacy)
    with BinCheckpoint(tmp_path) as weights:
        for name, value in wanted.items():
            for changed in (weights.get(name), weights.read(name, 0, value.numel()), weights.read(name, 0, 1)):
                assert changed.reshape(-1).stride() == (1,)
                changed.zero_()
        for name, value in wanted.items():
            assert equal(weights.get(name), value.detach()), name


def test_threads_read_older_files_one_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"{i}.bin": {f"t{i}": torch.full((100,), float(i))} for i in range(3)}
    with BinCheckpoint(sharded(tmp_path / "x", parts, legacy=True)) as weights, ThreadPoolExecutor(4) as pool:
        monkeypatch.setattr(safe_load, "load_tensors", alone(safe_load.load_tensors))
        names = [name for name in weights for _ in range(20)]
        got = list(pool.map(lambda name: weights.read(name, 10, 20), names))
    assert all(equal(value, torch.full((10,), float(name[1:]))) for name, value in zip(names, got, strict=True))


def alone(load: Callable[[Path], dict[str, torch.Tensor]]) -> Callable[[Path], dict[str, torch.Tensor]]:
    """``load``, failing while a storage of an earlier file lives."""
    living: list[weakref.ref[Any]] = []

    def watched(path: Path) -> dict[str, torch.Tensor]:
        assert not any(ref() is not None for ref in living), "two files in memory"
        loaded = load(path)
        living[:] = [weakref.ref(value) for value in loaded.values()]
        return loaded

    return watched


@BOTH
def test_shards_are_read_in_the_order_of_the_index(tmp_path: Path, legacy: bool) -> None:
    parts = {"z.bin": {"a": torch.ones(2), "c": torch.full((2, 3), 3.0)}, "y.bin": {"b": torch.zeros(4)}}
    with BinCheckpoint(sharded(tmp_path / "x", parts, legacy=legacy)) as weights:
        assert list(weights) == ["a", "c", "b"]
        for _ in range(2):
            for part in parts.values():
                for name, value in part.items():
                    assert equal(weights.get(name), value)
                    assert equal(weights.read(name, 1, 2), value.reshape(-1)[1:2])


def test_a_single_file_wins_over_an_index(tmp_path: Path) -> None:
    sharded(tmp_path / "x", {"a.bin": {"a": torch.ones(2)}})
    save({"b": torch.ones(3)}, tmp_path / "x" / SINGLE)
    with BinCheckpoint(tmp_path / "x") as weights:
        assert weights.shapes == {"b": (3,)}


def test_safetensors_win_over_pickles(tmp_path: Path) -> None:
    save({"a": torch.ones(2)}, tmp_path / SINGLE)
    assert isinstance(open_weights(tmp_path), BinCheckpoint)
    save_file({"a": torch.zeros(2)}, tmp_path / "model.safetensors")
    with open_weights(tmp_path) as weights:
        assert isinstance(weights, Checkpoint)
        assert not weights.get("a").any()
    assert isinstance(open_weights(sharded(tmp_path / "x", {"a.bin": {"a": torch.ones(2)}})), BinCheckpoint)


def test_a_folder_without_weights_is_told_so(tmp_path: Path) -> None:
    refused(tmp_path, r"no pytorch_model\.bin and no pytorch_model\.bin\.index\.json", FileNotFoundError)
    with pytest.raises(FileNotFoundError, match="no model.safetensors and no"):
        open_weights(tmp_path)


# Memory


MEMORY = """
import sys, torch
from pathlib import Path
from finebridge.storage.safe_load import BinCheckpoint

def own():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) // 1024

torch.ones(4).sum()
begin = own()
with BinCheckpoint(Path(sys.argv[1])) as weights:
    opened = own()
    most, total = opened, 0.0
    for name in weights:
        for start in range(0, 2**22, 2**18):
            total += float(weights.read(name, start, start + 2**18).sum())
            most = max(most, own())
print(opened - begin, most - begin, total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(("legacy", "most"), [(False, 8), (True, 16 + 8)], ids=["zip", "legacy"])
def test_memory_is_none_for_mapped_files_and_one_file_for_others(tmp_path: Path, legacy: bool, most: int) -> None:
    folder = sharded(tmp_path / "x", {f"{i}.bin": {f"t{i}": torch.ones(2**22)} for i in range(4)}, legacy=legacy)
    # Freed memory goes back at once, as that of tensors over 32 MiB always does (mallopt(3)).
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    done = subprocess.run(
        [sys.executable, "-c", MEMORY, folder], capture_output=True, text=True, check=True, env=environment
    )
    opened, highest, total = done.stdout.split()
    assert float(total) == 4 * 2**22
    assert int(opened) < 8, "MiB: opening reads no content"
    assert int(highest) < most


def test_an_older_file_is_read_once_and_gone_before_the_next(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    parts = {f"{i}.bin": {f"t{i}": torch.full((2,), float(i))} for i in range(3)}
    read: list[str] = []
    load = alone(load_tensors)

    def counted(path: Path) -> dict[str, torch.Tensor]:
        read.append(path.name)
        return load(path)

    with BinCheckpoint(sharded(tmp_path / "x", parts, legacy=True)) as weights:
        monkeypatch.setattr(safe_load, "load_tensors", counted)
        kept = [weights.get(name) for name in weights for _ in range(2)]
    assert read == list(parts)
    assert [int(value[0]) for value in kept] == [0, 0, 1, 1, 2, 2]


# Hostile files


class Calls:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def hostile(canary: Path) -> dict[str, Any]:
    touch = f"open({str(canary)!r}, 'w').close()"
    system = Calls(os.system, f"touch {canary}")
    evaluate = Calls(eval, touch)
    return {
        "os.system": {"a": torch.ones(2), "b": system},
        "eval": {"a": torch.ones(2), "b": evaluate},
        "exec": {"b": Calls(exec, touch)},
        "alone": evaluate,
        "name": {evaluate: torch.ones(2)},
        "nested": {"a": torch.ones(2), "state": OrderedDict(deep=[{"er": (1, {"still": system})}])},
        "popen": {"a": Calls(subprocess.Popen, ["touch", str(canary)])},
        "getattr": {"a": Calls(getattr, Calls(__import__, "os"), "system")},
        "load again": {"a": Calls(torch.load, str(canary))},
        "pickle again": {"a": Calls(pickle.loads, pickle.dumps(system))},
    }


@BOTH
@pytest.mark.parametrize("payload", hostile(Path("x")))
def test_a_file_that_names_code_is_refused_and_runs_nothing(
    tmp_path: Path, payload: str, legacy: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # turns torch's default unsafe, not this reader
    canary = tmp_path / "canary"
    save(hostile(canary)[payload], tmp_path / SINGLE, legacy=legacy)
    refused(tmp_path, rf"{SINGLE}: holds more than tensors \(it names \S+\), which could run code", UnsafeFileError)
    sharded(tmp_path / "x", {"1.bin": {"a": torch.ones(2)}, "2.bin": {"b": torch.ones(2)}}, legacy=legacy)
    save(hostile(canary)[payload], tmp_path / "x" / "2.bin", legacy=legacy)
    refused(tmp_path / "x", r"2\.bin: holds more than tensors", UnsafeFileError)
    assert not canary.exists()


def test_the_payloads_would_run_where_they_are_trusted(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for payload in ("os.system", "eval", "nested"):
        save(hostile(canary)[payload], tmp_path / SINGLE)
        torch.load(tmp_path / SINGLE, weights_only=False)
        assert canary.exists(), payload
        canary.unlink()


def test_a_plain_pickle_is_refused_and_runs_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for payload in hostile(canary).values():
        for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
            (tmp_path / SINGLE).write_bytes(pickle.dumps(payload, protocol))
            refused(tmp_path, SINGLE, UnsafeFileError)
    assert not canary.exists()


def test_a_scripted_module_is_refused(tmp_path: Path) -> None:
    class Double(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * x

    torch.jit.save(torch.jit.script(Double()), tmp_path / SINGLE)
    refused(tmp_path, rf"{SINGLE}: broken, or no file of tensors that", UnsafeFileError)


# Broken files and wrong indexes


@BOTH
def test_a_file_cut_anywhere_is_refused_by_name(tmp_path: Path, legacy: bool) -> None:
    save({"a": torch.randn(40), "b": torch.randn(3)}, tmp_path / SINGLE, legacy=legacy)
    whole = (tmp_path / SINGLE).read_bytes()
    for size in [*range(0, len(whole) - 1, 7), len(whole) - 1]:
        (tmp_path / SINGLE).write_bytes(whole[:size])
        with pytest.raises(UnsafeFileError, match=SINGLE), BinCheckpoint(tmp_path) as weights:
            weights.get("a")


def test_an_older_file_that_was_cut_is_told_when_it_is_opened(tmp_path: Path) -> None:
    save({"a": torch.randn(400)}, tmp_path / SINGLE, legacy=True)
    (tmp_path / SINGLE).write_bytes((tmp_path / SINGLE).read_bytes()[:1200])
    refused(tmp_path, rf"{SINGLE}: 1200 bytes, its tensors have more; the file was cut")


def test_what_is_no_file_of_torch_is_refused_by_name(tmp_path: Path) -> None:
    for text in (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
        b"PK\x03\x04",
        b"\x80\x02}",
        bytes(100),
    ):
        (tmp_path / SINGLE).write_bytes(text)
        refused(tmp_path, rf"{SINGLE}: broken, or no file of tensors that torch\.save wrote")


def test_a_file_that_was_packed_again_is_refused(tmp_path: Path) -> None:
    """Mapped, its compressed bytes would be taken for the tensors'."""
    save({"a": torch.zeros(1000)}, tmp_path / "whole.bin")
    with (
        zipfile.ZipFile(tmp_path / "whole.bin") as whole,
        zipfile.ZipFile(tmp_path / SINGLE, "w", zipfile.ZIP_DEFLATED) as packed,
    ):
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    refused(tmp_path, rf"{SINGLE}: .*whole/data.pkl is compressed")


def test_a_tensor_larger_than_its_bytes_is_refused(tmp_path: Path) -> None:
    save({"a": torch.zeros(1000), "b": torch.ones(1000)}, tmp_path / "whole.bin")
    with (
        zipfile.ZipFile(tmp_path / "whole.bin") as whole,
        zipfile.ZipFile(tmp_path / SINGLE, "w", zipfile.ZIP_STORED) as changed,
    ):
        for entry in whole.infolist():
            data = whole.read(entry)
            if entry.filename.endswith("data.pkl"):
                assert data.count(b"M\xe8\x03") >= 2
                data = data.replace(b"M\xe8\x03", b"M\xff\xff")
            changed.writestr(entry.filename, data)
    refused(tmp_path, SINGLE)


@pytest.mark.parametrize(
    ("value", "match"),
    [
        ({"a": torch.ones(1), "step": 3}, "'step' is of the type int"),
        ({"model": {"a": torch.ones(1)}}, "'model' is of the type dict"),
        ({3: torch.ones(1)}, "3 is no tensor's name"),
        ([torch.ones(1)], "holds a list; a dictionary of tensors by name is expected"),
        ({"a": torch.eye(3).to_sparse()}, "tensor a is sparse"),
        ({"a": torch.ones(3, device="meta")}, "tensor a is .*without content"),
    ],
)
def test_entries_that_are_no_plain_tensors_are_named(tmp_path: Path, value: object, match: str) -> None:
    save(value, tmp_path / SINGLE)
    refused(tmp_path, f"{SINGLE}: .*{match}", UnsafeFileError)


@BOTH
def test_a_wrong_index_is_refused_with_what_is_wrong(tmp_path: Path, legacy: bool) -> None:
    parts = {"1.bin": {"a": torch.ones(2)}, "2.bin": {"b": torch.ones(2)}}
    refused(sharded(tmp_path / "lost", parts, legacy=legacy, ghost="1.bin"), "1 tensors are in no file.* ghost")
    extra = sharded(tmp_path / "extra", parts, legacy=legacy)
    save({"b": torch.ones(2), "c": torch.ones(2)}, extra / "2.bin", legacy=legacy)
    refused(extra, rf"2\.bin: tensor c is not listed in {INDEX}")
    twice = sharded(tmp_path / "twice", parts, legacy=legacy)
    save(parts["1.bin"] | parts["2.bin"], twice / "2.bin", legacy=legacy)
    refused(twice, r"2\.bin: tensor a is in 1\.bin too")
    gone = sharded(tmp_path / "gone", parts, legacy=legacy)
    (gone / "2.bin").unlink()
    refused(gone, rf"2\.bin: listed in {INDEX} but missing", FileNotFoundError)


@pytest.mark.parametrize("name", ["../1.bin", "/etc/passwd", "sub/../../1.bin"])
def test_an_index_that_points_outside_is_refused(tmp_path: Path, name: str) -> None:
    save({"b": torch.ones(2)}, tmp_path / "1.bin")
    refused(sharded(tmp_path / "x", {"2.bin": {"a": torch.ones(2)}}, b=name), "outside the folder")


@pytest.mark.parametrize("text", ['{"weight_map": {}}', "{}", '{"weight_map": ["a"]}', '{"weight_map": {"a": 1}}'])
def test_an_index_without_a_map_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / INDEX).write_text(text)
    refused(tmp_path, f"{INDEX}: no weight_map")
