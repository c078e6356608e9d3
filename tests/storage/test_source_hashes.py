"""Hashes of source files, and the memory that saves reading files again."""

import hashlib
import json
import os
import threading
from pathlib import Path

import pytest
from finebridge.storage import source_hashes
from finebridge.storage.source_hashes import source_sha256


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files that are read to be hashed."""
    names: list[str] = []
    honest = source_hashes.file_sha256
    monkeypatch.setattr(
        source_hashes, "file_sha256", lambda path, **more: (names.append(path.name), honest(path, **more))[1]
    )
    return names


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def test_files_are_read_once(tmp_path: Path, reads: list[str]) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    one.write_bytes(b"1")
    two.write_bytes(b"22")
    for _ in range(3):
        assert source_sha256([one, two, one], tmp_path / "cache") == {one: sha(b"1"), two: sha(b"22")}
    assert sorted(reads) == ["one", "two"]


def test_many_files_are_read_at_once(tmp_path: Path, reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads wait for each other: what each file is does not depend on which was read first."""
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {0, 1})
    files = [tmp_path / f"{number}" for number in range(6)]
    for number, file in enumerate(files):
        file.write_bytes(os.urandom(number * 1_000_000))
    together, inner = threading.Barrier(2), source_hashes.file_sha256
    monkeypatch.setattr(source_hashes, "file_sha256", lambda *a, **k: (together.wait(60), inner(*a, **k))[1])
    expected = {file: sha(file.read_bytes()) for file in files}
    found = source_sha256(files, tmp_path / "cache")
    assert list(found.items()) == list(expected.items())
    assert source_sha256(files, tmp_path / "cache") == expected
    assert sorted(reads) == [file.name for file in files]


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path, reads: list[str]) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").mkdir()
    with pytest.raises(IsADirectoryError, match="two"):
        source_sha256([tmp_path / "one", tmp_path / "two"], tmp_path / "cache")
    assert source_sha256([tmp_path / "one"], tmp_path / "cache")[tmp_path / "one"] == sha(b"1")
    assert reads.count("one") == 2, "nothing is remembered of a call that failed"


def test_other_bytes_of_the_same_size_under_the_same_times_are_seen(tmp_path: Path, reads: list[str]) -> None:
    file = tmp_path / "one"
    file.write_bytes(b"old")
    before = file.stat()
    assert source_sha256([file], tmp_path / "cache")[file] == sha(b"old")
    file.write_bytes(b"new")
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert source_sha256([file], tmp_path / "cache")[file] == sha(b"new")
    assert reads == ["one", "one"]


def test_another_file_moved_to_the_same_name_is_seen(tmp_path: Path) -> None:
    file, other = tmp_path / "one", tmp_path / "other"
    file.write_bytes(b"old")
    other.write_bytes(b"new")
    stat = file.stat()
    assert source_sha256([file], tmp_path / "cache")[file] == sha(b"old")
    os.utime(other, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    other.replace(file)
    assert source_sha256([file], tmp_path / "cache")[file] == sha(b"new")


def test_a_touched_file_is_read_again_and_is_the_same(tmp_path: Path, reads: list[str]) -> None:
    file = tmp_path / "one"
    file.write_bytes(b"1")
    first = source_sha256([file], tmp_path / "cache")
    os.utime(file, ns=(1, 1))
    assert source_sha256([file], tmp_path / "cache") == first
    assert reads == ["one", "one"]


@pytest.mark.parametrize(
    "damage",
    [
        "",
        "{",
        '{"a": 1',
        "null",
        "[]",
        '"x"',
        '{"PATH": null}',
        '{"PATH": [1]}',
        '{"PATH": []}',
        '{"PATH": 5}',
        '{"PATH": {"a": 1}}',
    ],
)
def test_a_damaged_memory_only_costs_time(tmp_path: Path, reads: list[str], damage: str) -> None:
    file = tmp_path / "one"
    file.write_bytes(b"1")
    source_sha256([file], tmp_path / "cache")
    memory = next((tmp_path / "cache").iterdir())
    memory.write_text(damage.replace("PATH", str(file)))
    assert source_sha256([file], tmp_path / "cache") == {file: sha(b"1")}
    assert reads == ["one", "one"]
    assert source_sha256([file], tmp_path / "cache") == {file: sha(b"1")}
    assert reads == ["one", "one"]


def test_the_memory_keeps_other_files(tmp_path: Path, reads: list[str]) -> None:
    for name in ("one", "two", "one", "two"):
        (tmp_path / name).touch()
        source_sha256([tmp_path / name], tmp_path / "cache")
    assert len(json.loads(next((tmp_path / "cache").iterdir()).read_text())) == 2
    assert reads[:2] == ["one", "two"]


def test_a_link_is_the_file_that_it_names(tmp_path: Path) -> None:
    (tmp_path / "one").write_bytes(b"1")
    (tmp_path / "two").write_bytes(b"2")
    link = tmp_path / "link"
    link.symlink_to(tmp_path / "one")
    assert source_sha256([link], tmp_path / "cache")[link] == sha(b"1")
    link.unlink()
    link.symlink_to(tmp_path / "two")
    assert source_sha256([link], tmp_path / "cache")[link] == sha(b"2")
