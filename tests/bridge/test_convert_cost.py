"""What a conversion must not do twice or needlessly: checksums, headers, arguments, copies, threads below threads."""

import threading
import zipfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge import convert as converting
from finebridge.bridge.convert import Target, convert, plan
from finebridge.bridge.source import open_source
from finebridge.storage import safetensors_io
from finebridge.storage.hashing import PIECE, HashingFile, file_entry
from finebridge.storage.safe_load import BinCheckpoint
from finebridge.storage.safetensors_io import Checkpoint

Models = Callable[[str], Path]


def checksums(file: Path) -> set[int]:
    """Of all records in a ``.distcp`` file: files of torch.save, one after another."""
    data, found = file.read_bytes(), set[int]()
    while data:
        end = data.index(b"PK\x05\x06") + 22  # the end of the first zip's table
        (file.parent / "one").write_bytes(data[:end])
        with zipfile.ZipFile(file.parent / "one") as archive:
            found |= {entry.CRC for entry in archive.infolist() if "/data/" in entry.filename}
        data = data[end:].lstrip(b"\0")
    return found


def test_tensors_of_torch_dist_are_written_without_checksums_on_every_thread(hf_models: Models, tmp_path: Path) -> None:
    source = open_source(hf_models("qwen3"))
    with source.tensors:
        convert(plan(source, Target("torch_dist", workers=3)), tmp_path / "out", say=lambda _: None)
    files = sorted((tmp_path / "out/release").glob("*.distcp"))
    assert len(files) == 3
    assert [checksums(file) for file in files] == [{0}] * 3
    assert torch.serialization.get_crc32_options()


def test_megatrons_arguments_are_made_once(hf_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[object] = []
    stock = converting.to_args
    monkeypatch.setattr(converting, "to_args", lambda *args, **named: (calls.append(args), stock(*args, **named))[1])
    source = open_source(hf_models("qwen3"))
    with source.tensors:
        made = plan(source, Target("torch"))
        assert made.lines() == made.lines()
        convert(made, tmp_path / "out", say=lambda _: None)
    assert len(calls) == 1


def test_each_header_is_read_once(hf_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(hf_models("qwen3"))
    with source.tensors:
        convert(plan(source, Target("hf", max_bytes=50_000)), tmp_path / "many", say=lambda _: None)
    calls: Counter[Path] = Counter()
    stock = safetensors_io.safetensors_header

    def counted(path: Path) -> dict[str, Any]:
        calls[path] += 1
        return stock(path)

    monkeypatch.setattr(safetensors_io, "safetensors_header", counted)
    with Checkpoint(tmp_path / "many") as checkpoint:
        assert len(checkpoint) > 2
    assert len(calls) > 1
    assert set(calls.values()) == {1}


def test_torch_uses_no_threads_of_its_own_meanwhile(
    hf_models: Models, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = torch.get_num_threads()
    seen: set[tuple[bool, int]] = set()
    stock = torch.Tensor.aminmax

    def noted(self: torch.Tensor) -> Any:
        seen.add((threading.current_thread() is threading.main_thread(), torch.get_num_threads()))
        return stock(self)

    monkeypatch.setattr(torch.Tensor, "aminmax", noted)
    torch.set_num_threads(2)
    try:
        for form in ("torch", "torch_dist"):
            source = open_source(hf_models("qwen3"))
            with source.tensors:
                convert(plan(source, Target(form)), tmp_path / form, say=lambda _: None)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    assert seen == {(True, 1), (False, 1)}


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_a_view_is_what_is_read_and_costs_no_copy(kind: str, tmp_path: Path) -> None:
    tensors = {"a": torch.randn(6, 4), "b": torch.randn(4, 6).T, "c": torch.tensor(2.5)}
    if kind == "bin":
        torch.save(tensors, tmp_path / "pytorch_model.bin")
        opened: Any = BinCheckpoint(tmp_path)
    else:
        write_file(tensors, tmp_path / "model.safetensors")
        opened = Checkpoint(tmp_path)
    with opened as checkpoint:
        for name, value in tensors.items():
            stop = value.numel()
            assert torch.equal(checkpoint.view(name, stop // 2, stop), value.reshape(-1)[stop // 2 :])
            assert torch.equal(checkpoint.view(name, 0, stop), checkpoint.read(name, 0, stop))
        assert checkpoint.view("a", 4, 9).data_ptr() == checkpoint.view("a", 4, 24).data_ptr()


def write_file(tensors: dict[str, torch.Tensor], path: Path) -> None:
    with HashingFile(path) as stream:
        safetensors_io.write_tensors(stream, tensors)


def test_a_file_is_hashed_whatever_the_size_of_what_is_written_at_once(tmp_path: Path) -> None:
    data = torch.randint(0, 256, (2 * PIECE + 12345,), dtype=torch.uint8).numpy().tobytes()
    with HashingFile(tmp_path / "file") as stream:
        assert stream.write(data) == len(data)
        assert stream.write(data[:7]) == 7
    assert (tmp_path / "file").read_bytes() == data + data[:7]
    assert stream.entry() == file_entry(tmp_path / "file")
