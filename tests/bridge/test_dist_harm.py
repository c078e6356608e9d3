"""Damaged and hostile ``torch_dist`` checkpoints are refused, and nothing of them is run."""

import pickle
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from finebridge.bridge.dist_format import DistCheckpoint
from finebridge.bridge.errors import BridgeError
from torch.distributed.checkpoint.filesystem import _StorageInfo

from .dist_by_hand import ByHand, read_all, refused, same, simple

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


@pytest.mark.parametrize("length", [0, 1, 100])
def test_a_common_state_that_was_cut_is_named(tmp_path: Path, length: int) -> None:
    folder = simple(tmp_path / "x")[0].close()
    (folder / "common.pt").write_bytes((folder / "common.pt").read_bytes()[:length])
    refused(folder, r"/common\.pt")


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


def flipped(path: Path, count: int) -> Iterator[int]:
    """The file with one bit changed, at so many places in turn; it is whole again at the end."""
    content = path.read_bytes()
    for place in range(0, len(content), max(1, len(content) // count)):
        changed = bytearray(content)
        changed[place] ^= 1 << place % 8
        path.write_bytes(changed)
        yield place
    path.write_bytes(content)


@pytest.mark.parametrize("name", [".metadata", "common.pt"])
def test_a_flipped_bit_never_breaks_out(tmp_path: Path, name: str) -> None:
    folder = simple(tmp_path / "x")[0].close()
    met = 0
    for _ in flipped(folder / name, 150):
        try:
            read_all(folder)
        except BridgeError:
            met += 1
    assert met > 30


def test_a_flipped_bit_of_a_tensor_is_never_read(tmp_path: Path) -> None:
    made, tensors = simple(tmp_path / "x")
    folder = made.close()
    told: list[str] = []
    for place in flipped(folder / "__0_0.distcp", 200):
        try:
            with DistCheckpoint(folder) as checkpoint:
                assert all(same(checkpoint.get(name), tensor) for name, tensor in tensors.items()), place
        except BridgeError as error:
            told.append(str(error))
    assert len(told) > 50
    assert all("__0_0.distcp at" in text for text in told)


# Each touches the file MARK, or imports the module mark_module, which does.
PAYLOADS = {
    "posix": b"cposix\nsystem\n(S'touch MARK'\ntR.",
    "os": b"cos\nsystem\n(S'touch MARK'\ntR.",
    "eval": b'cbuiltins\neval\n(S\'open("MARK","w")\'\ntR.',
    "exec": b'cbuiltins\nexec\n(S\'open("MARK","w")\'\ntR.',
    "open": b"cio\nopen\n(S'MARK'\nS'w'\ntR.",
    "popen": b"csubprocess\nPopen\n((lS'touch'\naS'MARK'\natR.",
    "getoutput": b"csubprocess\ngetoutput\n(S'touch MARK'\ntR.",
    "import": b"cbuiltins\n__import__\n(S'mark_module'\ntR.",
    "import_module": b"cimportlib\nimport_module\n(S'mark_module'\ntR.",
    "class_of_module": b"cmark_module\nAnything\n(tR.",
    "global_only": b"cmark_module\nAnything\n.",
    "instance": b"(S'touch MARK'\nios\nsystem\n.",
    "object": b"(cos\nsystem\nS'touch MARK'\no.",
    "new_object": b"\x80\x02csubprocess\nPopen\n((lS'touch'\naS'MARK'\nat\x81.",
    "stack_global": b"\x80\x04\x8c\x02os\x8c\x06system\x93S'touch MARK'\n\x85R.",
    "dotted": b"\x80\x04\x8c\x07pathlib\x8c\x0aPath.touch\x93cpathlib\nPath\n(S'MARK'\ntR\x85R.",
    "megatron_dotted": b"\x80\x04\x8c\x0dmegatron.core\x8c\x09os.system\x93S'touch MARK'\n\x85R.",
    "numpy": b'cnumpy.testing._private.utils\nrunstring\n(S\'open("MARK","w")\'\n(dtR.',
    "distributed": b"ctorch.distributed.run\nmain\n((lS'--no-python'\naS'touch'\naS'MARK'\natR.",
    "getattr": b"cbuiltins\ngetattr\n(cos\nsystem\nS'__call__'\ntR(S'touch MARK'\ntR.",
    "state_of_class": b"cargparse\nNamespace\n(N(dS'__setstate__'\ncos\nsystem\nstbS'touch MARK'\nb.",
    "state": b"cargparse\nNamespace\n(tR(dS'__setstate__'\ncos\nsystem\nsbS'touch MARK'\nb.",
    "partial": b"cfunctools\npartial\n(cos\nsystem\nS'touch MARK'\ntR(tR.",
    "hub": b"ctorch.hub\n_import_module\n(S'mark_module'\nS'FOLDER/mark_module.py'\ntR.",
    "runpy": b"crunpy\nrun_path\n(S'FOLDER/mark_module.py'\ntR.",
    "memo": b"cos\nsystem\np0\n0g0\n(S'touch MARK'\ntR.",
    "extension": b"\x80\x02\x82\x01.",
    "persistent": b"S'MARK'\nQ.",
}


def payload(name: str, folder: Path) -> bytes:
    """The pickle, with its file and module in this folder."""
    (folder / "mark_module.py").write_text(f"open({str(folder / 'mark')!r}, 'w')\nAnything = dict\n")
    return PAYLOADS[name].replace(b"MARK", bytes(folder / "mark")).replace(b"FOLDER", bytes(folder))


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


@pytest.mark.parametrize(
    ("place", "told"), [(in_metadata, r"/\.metadata"), (in_common, r"/common\.pt"), (in_record, r"/__9_9\.distcp")]
)
@pytest.mark.parametrize("name", PAYLOADS)
def test_nothing_of_a_pickle_is_run(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    place: Callable[[ByHand, bytes], None],
    told: str,
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    made, _ = simple(tmp_path / "x")
    place(made, payload(name, tmp_path))
    refused(made.folder, told)
    assert not (tmp_path / "mark").exists()
    assert "mark_module" not in sys.modules


# Of these the parts alone are dangerous, or they end the process or outlive the test.
INERT = {"megatron_dotted", "distributed", "popen", "new_object", "extension", "persistent", "state_of_class"}


@pytest.mark.parametrize("name", sorted(PAYLOADS.keys() - INERT))
def test_the_same_pickles_do_run_where_they_are_trusted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.syspath_prepend(tmp_path)
    pickle.loads(payload(name, tmp_path))
    sys.modules.pop("mark_module", None)
    assert (tmp_path / "mark").exists()
