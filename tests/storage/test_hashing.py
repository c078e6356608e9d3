"""What is hashed while it is written is what lies on disk; a failing disk is told by its own error."""

import hashlib
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
    assert path.read_bytes() == b"one" + b"two" * 100_000
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
