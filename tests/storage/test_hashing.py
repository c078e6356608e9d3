"""What is hashed while it is written is what lies on disk; a failing disk is told by its own error."""

import errno
import hashlib
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from finebridge.storage.hashing import HashingFile, Ledger, algorithm_of, file_digest, file_entry


class FullDisk:
    """A stream that takes ``room`` bytes."""

    def __init__(self, stream: object, room: int) -> None:
        self.stream, self.room = stream, room

    def __getattr__(self, name: str) -> object:
        return getattr(self.stream, name)

    def write(self, data: bytes) -> int:
        self.room -= len(data)
        if self.room < 0:
            raise OSError(28, "No space left on device")
        return self.stream.write(data)  # pyright: ignore[reportAttributeAccessIssue]


def test_the_entry_is_that_of_the_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    with HashingFile(path) as stream:
        assert stream.write(b"one") == 3
        stream.write(memoryview(b"two" * 100_000))
        assert stream.write(memoryview(b"four" * 10).cast("i")) == 40, "bytes, not items"
    assert path.read_bytes() == b"one" + b"two" * 100_000 + b"four" * 10
    assert stream.entry() == file_entry(path)
    assert algorithm_of(stream.entry()) == "xxh3_128"
    assert file_digest(path, "sha256") == hashlib.sha256(path.read_bytes()).hexdigest()
    assert algorithm_of({"size": 1, "md5": "x"}) is None


def test_a_ledger_enters_what_torch_saves_and_what_it_is_renamed_to(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path)
    (tmp_path / "sub").mkdir()
    value = {"w": torch.randn(1000), "same": torch.ones(3)}
    ledger.write(tmp_path / "sub" / "a.tmp", lambda stream: torch.save(value, stream))
    ledger.rename(tmp_path / "sub" / "a.tmp", tmp_path / "a.pt")
    assert ledger.entries == {"a.pt": file_entry(tmp_path / "a.pt")}
    back = torch.load(tmp_path / "a.pt", weights_only=True)
    assert torch.equal(back["w"], value["w"])


@pytest.mark.parametrize("room", [0, 500, 3000])
def test_a_full_disk_is_an_oserror_through_torch_too(tmp_path: Path, room: int) -> None:
    def save(stream: HashingFile) -> None:
        stream._stream = FullDisk(stream._stream, room)  # pyright: ignore[reportAttributeAccessIssue]
        torch.save({"w": torch.randn(1000)}, stream)

    with pytest.raises(OSError, match="No space left.*a.pt"):
        Ledger(tmp_path).write(tmp_path / "a.pt", save)
    patient = Ledger(tmp_path, patient=True)
    patient.write(tmp_path / "a.pt", save)
    assert [error.errno for error in patient.errors if isinstance(error, OSError)] == [28]
    assert patient.entries == {}
    patient.rename(tmp_path / "a.pt", tmp_path / "b.pt")
    assert [path.name for path in tmp_path.iterdir()] == ["a.pt"]


def test_another_error_of_the_block_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError):
        Ledger(tmp_path).write(tmp_path / "a", lambda _: 1 // 0)
    patient = Ledger(tmp_path, patient=True)
    patient.write(tmp_path / "no" / "folder", lambda stream: stream.write(b"x"))
    assert [type(error) for error in patient.errors] == [FileNotFoundError]


def failing(broken: str) -> Callable[[int], None]:
    """A ``fsync`` of a device that fails on files of one name, whatever their ending."""
    honest = os.fsync

    def fsync(handle: int) -> None:
        if Path(f"/proc/self/fd/{handle}").readlink().stem == broken:
            raise OSError(errno.EIO, "Input/output error")
        honest(handle)

    return fsync


def test_a_failing_device_is_told_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", failing("b"))
    patient = Ledger(tmp_path, patient=True)
    for name in "abc":
        patient.write(tmp_path / name, lambda stream: stream.write(b"x"))
        patient.rename(tmp_path / name, tmp_path / f"{name}.bin")
    assert [getattr(error, "filename", None) for error in patient.errors] == [str(tmp_path / "b")]
    assert set(patient.entries) == {"a.bin", "b.bin", "c.bin"}
    with pytest.raises(OSError, match="Input/output error.*b"):
        Ledger(tmp_path).write(tmp_path / "b", lambda stream: stream.write(b"x"))


def test_who_asks_a_patient_ledger_waits_for_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    going, synced, honest = threading.Event(), list[int](), os.fsync

    def slow(handle: int) -> None:
        going.wait(10)
        honest(handle)
        synced.append(handle)

    monkeypatch.setattr(os, "fsync", slow)
    ledger = Ledger(tmp_path, patient=True)
    for name in "ab":
        ledger.write(tmp_path / name, lambda stream: stream.write(b"x"))
    assert not synced, "a write does not wait"
    going.set()
    assert set(ledger.entries) == {"a", "b"}
    assert len(synced) == 2


def test_all_in_the_background_has_ended_when_its_error_is_raised(tmp_path: Path) -> None:
    ledger, done = Ledger(tmp_path), list[int]()
    ledger.later(lambda: done.append(1 // 0))
    ledger.later(lambda: (time.sleep(0.1), done.append(2))[1])
    with pytest.raises(ZeroDivisionError):
        ledger.settle()
    assert done == [2]
    ledger.settle()
