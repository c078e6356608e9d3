"""Whatever happens to a published artifact is detected and named; "newest" is the highest verified step."""

import json
import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.storage.manifest import (
    ManifestError,
    describe,
    file_sha256,
    newest_verified,
    safetensors_header,
    steps,
    verify,
)
from finebridge.storage.publish import publish
from safetensors.torch import save_file


def make(target: Path) -> Path:
    with publish(target, kind="checkpoint", made_from={"step": 1}) as folder:
        (folder / "sub").mkdir()
        (folder / "sub" / "a.bin").write_bytes(bytes(100))
        (folder / "b.txt").write_text("text")
        save_file({"w": torch.ones(2, 3), "v": torch.zeros(4, dtype=torch.bfloat16)}, folder / "m.safetensors")
    return target


def flip(path: Path, at: int, mask: int = 1) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= mask
    path.write_bytes(data)


def test_manifest_says_what_the_artifact_is(tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    manifest = verify(folder)
    assert manifest == json.loads((folder / "manifest.json").read_text())
    assert manifest["tensors"] == {"m.safetensors": {"w": ["F32", 2, 3], "v": ["BF16", 4]}}
    assert manifest["files"]["b.txt"] == {"size": 4, "xxh3_128": "c5a64efff9224e392680525687aac7c5"}
    assert (
        file_sha256(folder / "b.txt") == "982d9e3eb996f559e633f4d194def3761d909f5a3b647d1a851fead67c32c9d1"
    )  # sha256sum of "text"


DAMAGE: dict[str, tuple[Callable[[Path], object], str]] = {
    "one bit at the start": (lambda x: flip(x / "sub" / "a.bin", 0), r"sub/a\.bin.*checksum"),
    "one bit at the end": (lambda x: flip(x / "m.safetensors", -1, 128), r"m\.safetensors.*checksum"),
    "truncated": (lambda x: os.truncate(x / "sub" / "a.bin", 99), r"sub/a\.bin: 99 bytes.*100"),
    "emptied": (lambda x: os.truncate(x / "b.txt", 0), r"b\.txt: 0 bytes"),
    "appended": (lambda x: (x / "b.txt").write_text("text\n"), r"b\.txt: 5 bytes"),
    "deleted": (lambda x: (x / "b.txt").unlink(), r"b\.txt: missing"),
    "added": (lambda x: (x / "sub" / "c.py").touch(), r"sub/c\.py: not listed"),
    "added hidden": (lambda x: (x / ".hidden").touch(), r"\.hidden: not listed"),
    "renamed": (lambda x: (x / "b.txt").rename(x / "c.txt"), r"b\.txt: missing"),
    "symbolic link added": (lambda x: (x / "link").symlink_to("b.txt"), "link: .*symbolic"),
    "manifest deleted": (lambda x: (x / "manifest.json").unlink(), r"no manifest\.json"),
    "manifest cut": (lambda x: os.truncate(x / "manifest.json", 200), r"manifest\.json: not JSON"),
    "manifest not UTF-8": (lambda x: flip(x / "manifest.json", 5, 128), r"manifest\.json: not JSON"),
    "manifest of another tool": (lambda x: (x / "manifest.json").write_text("{}"), r"manifest\.json: not a manifest"),
    "manifest a list": (lambda x: (x / "manifest.json").write_text("[]"), r"manifest\.json: not a manifest"),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_detected_and_the_file_named(tmp_path: Path, name: str) -> None:
    damage, message = DAMAGE[name]
    folder = make(tmp_path / "x")
    damage(folder)
    with pytest.raises(ManifestError, match=message) as caught:
        verify(folder)
    assert str(folder) in str(caught.value)


def test_a_file_swapped_for_a_link_to_the_same_bytes_is_refused(tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    (folder / "b.txt").rename(tmp_path / "moved.txt")
    (folder / "b.txt").symlink_to(tmp_path / "moved.txt")
    with pytest.raises(ManifestError, match=r"b\.txt: .*symbolic"):
        verify(folder)


def test_without_hashes_sizes_and_presence_are_still_checked(tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    flip(folder / "b.txt", 0)
    assert verify(folder, hashes=False)["kind"] == "checkpoint"
    os.truncate(folder / "b.txt", 1)
    with pytest.raises(ManifestError, match=r"b\.txt: 1 bytes"):
        verify(folder, hashes=False)


@pytest.mark.parametrize("manifest", [{"format": 1}, {"format": 1, "files": []}, {"format": 1, "files": {"b.txt": {}}}])
def test_a_manifest_without_its_parts_is_a_manifest_error(tmp_path: Path, manifest: dict[str, Any]) -> None:
    folder = make(tmp_path / "x")
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(ManifestError, match="x"):
        verify(folder)


def test_every_bit_of_an_artifact_counts(tmp_path: Path) -> None:
    """One flipped bit or a cut anywhere, in a file or in the manifest itself: passed over, and by no other error."""
    folder = make(tmp_path / "checkpoint-1")
    assert newest_verified(tmp_path) == (folder, [])
    generator = random.Random(4)
    trusted: list[tuple[str, int, int]] = []
    for path in [path for path in folder.rglob("*") if path.is_file()]:
        whole = path.read_bytes()
        ends = {len(whole) - 1, *generator.sample(range(len(whole)), min(60, len(whole)))}
        places = range(len(whole)) if path.name == "manifest.json" else generator.choices(range(len(whole)), k=250)
        for at, bit in [(at, generator.randrange(8)) for at in places] + [(at, -1) for at in ends]:
            flip(path, at, 1 << bit) if bit >= 0 else os.truncate(path, at)
            if newest_verified(tmp_path)[0]:
                trusted.append((path.name, at, bit))
            path.write_bytes(whole)
    assert not trusted


def test_artifacts_of_the_first_format_stay_readable(tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest |= {"format": 1}
    del manifest["checksum"]
    manifest["files"] = {
        name: {"size": entry["size"], "sha256": file_sha256(folder / name)} for name, entry in manifest["files"].items()
    }
    (folder / "manifest.json").write_text(json.dumps(manifest))
    assert verify(folder) == manifest
    flip(folder / "b.txt", 0)
    with pytest.raises(ManifestError, match=r"b\.txt: its checksum \(sha256\)"):
        verify(folder)


def test_a_file_of_another_size_than_was_written_is_not_published(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("cut")
    with pytest.raises(ManifestError, match="a: 3 bytes on disk, 4 were written"):
        describe(tmp_path, "t", {}, {"a": {"size": 4, "xxh3_128": "00"}})


HEADERS: dict[str, bytes] = {
    "empty file": b"",
    "cut length": b"\x10\x00\x00",
    "length beyond the file": struct.pack("<Q", 1000) + b"{}",
    "length of terabytes": struct.pack("<Q", 2**63) + b"{}",
    "length 0": struct.pack("<Q", 0) + b"{}",
    "not JSON": struct.pack("<Q", 8) + b"{'w': 1}",
    "not UTF-8": struct.pack("<Q", 4) + b'{"\xff"',
    "a list": struct.pack("<Q", 2) + b"[]",
}


@pytest.mark.parametrize("name", HEADERS)
def test_a_damaged_safetensors_header_is_named_and_not_published(tmp_path: Path, name: str) -> None:
    path = tmp_path / "m.safetensors"
    path.write_bytes(HEADERS[name])
    with pytest.raises(ManifestError, match=r"m\.safetensors"):
        safetensors_header(path)
    with (
        pytest.raises(ManifestError, match=r"m\.safetensors"),
        publish(tmp_path / "x", kind="t", made_from={}) as folder,
    ):
        (folder / "m.safetensors").write_bytes(HEADERS[name])
    assert [path.name for path in tmp_path.iterdir()] == ["m.safetensors"]


def test_the_safetensors_header_leaves_out_the_metadata(tmp_path: Path) -> None:
    save_file({"w": torch.ones(2)}, tmp_path / "m.safetensors", metadata={"format": "pt"})
    assert safetensors_header(tmp_path / "m.safetensors") == {
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}
    }


def test_describe_lists_a_nested_manifest_but_not_its_own(tmp_path: Path) -> None:
    folder = make(tmp_path / "x")
    (folder / "sub" / "manifest.json").write_text("{}")
    assert set(describe(folder, "t", {})["files"]) == {"b.txt", "m.safetensors", "sub/a.bin", "sub/manifest.json"}


def test_steps_are_ordered_by_number_and_only_folders_of_the_exact_form_count(tmp_path: Path) -> None:
    for name in (
        "checkpoint-9",
        "checkpoint-10",
        "checkpoint-2",
        "checkpoint-x",
        "checkpoint-3.bak",
        ".checkpoint-7.tmp-a",
    ):
        (tmp_path / name).mkdir()
    (tmp_path / "checkpoint-99").touch()
    assert [step for step, _ in steps(tmp_path)] == [10, 9, 2]
    assert steps(tmp_path / "absent") == []
    (tmp_path / "a.b-4").mkdir()
    (tmp_path / "a_b-5").mkdir()
    assert steps(tmp_path, "a.b-") == [(4, tmp_path / "a.b-4")]


def test_newest_is_the_highest_verified_step_never_the_latest_mtime(tmp_path: Path) -> None:
    for age, step in enumerate((1, 9, 10, 11, 12)):  # the lowest step gets the latest modification time
        folder = make(tmp_path / f"checkpoint-{step}")
        for path in (*folder.rglob("*"), folder):
            os.utime(path, (2_000_000_000 - age, 2_000_000_000 - age))
    flip(tmp_path / "checkpoint-12" / "b.txt", 0)
    (tmp_path / "checkpoint-11" / "manifest.json").unlink()
    (tmp_path / ".checkpoint-13.tmp-host-1-ab").mkdir()
    found, passed_over = newest_verified(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert len(passed_over) == 2
    assert "checkpoint-12/b.txt" in passed_over[0]
    assert "checksum" in passed_over[0]
    assert "checkpoint-11: no manifest.json" in passed_over[1]


def test_newest_of_nothing_and_of_only_damaged_ones(tmp_path: Path) -> None:
    assert newest_verified(tmp_path / "absent") == (None, [])
    make(tmp_path / "checkpoint-1")
    (tmp_path / "checkpoint-1" / "b.txt").unlink()
    found, passed_over = newest_verified(tmp_path)
    assert found is None
    assert [reason.endswith("b.txt: missing") for reason in passed_over] == [True]
