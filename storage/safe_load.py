"""Weights in ``.bin`` files (``pytorch_model.bin``, or shards with an index), read without running what they hold.

They are pickles, which may name any code. ``torch.load`` is told ``weights_only=True`` here in so many words: then it
builds tensors and plain containers only, whatever the environment says
(https://pytorch.org/docs/stable/notes/serialization.html). ``safe_pickle.py`` reads files that hold more than tensors.
"""

import math
import re
import threading
import zipfile
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from .safetensors_io import INDEX_NAME, SINGLE_NAME, Checkpoint, indexed_files

BIN_INDEX_NAME = "pytorch_model.bin.index.json"
BIN_SINGLE_NAME = "pytorch_model.bin"
Tensors = dict[str, torch.Tensor]


class UnsafeFileError(ValueError):
    """A pickle is broken or names what it should not; the message names the file."""


def open_weights(folder: Path) -> "Weights":
    """The weights of a model's folder. Of both kinds safetensors wins, as in transformers.

    Raises FileNotFoundError when there are none, ValueError when files or index are wrong.
    """
    safe = any((folder / name).is_file() for name in (SINGLE_NAME, INDEX_NAME))
    pickled = any((folder / name).is_file() for name in (BIN_SINGLE_NAME, BIN_INDEX_NAME))
    return BinCheckpoint(folder) if pickled and not safe else Checkpoint(folder)


class BinCheckpoint:
    """The tensors of a checkpoint in ``.bin`` files, in the order of its files; use it as a context manager.

    Zip files (torch 1.6 and later) are memory-mapped and cost no memory of their own. Older files cannot be mapped: the
    one that was asked for last is in memory, so read in the order of the names. Several threads may read.

    Raises FileNotFoundError when there are no such weights, ValueError when the index is wrong, UnsafeFileError for a file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, torch.dtype] = {}
        self._where: dict[str, Path] = {}
        self._mapped: dict[Path, Tensors] = {}
        self._last: tuple[Path, Tensors] | None = None
        self._lock = threading.Lock()
        for path, tensors in _open_all(folder).items():
            for name, tensor in tensors.items():
                if name in self._where:
                    raise ValueError(f"{path}: tensor {name} is in {self._where[name].name} too")
                self._where[name] = path
                self.shapes[name] = tuple(tensor.shape)
                self.dtypes[name] = tensor.dtype
            if _is_zip(path):
                self._mapped[path] = tensors

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._mapped.clear()
        self._last = None

    def __contains__(self, name: str) -> bool:
        return name in self._where

    def __iter__(self) -> Iterator[str]:
        return iter(self._where)

    def __len__(self) -> int:
        return len(self._where)

    def loaded_with(self, name: str) -> Path | None:
        """The file that is read into memory whole for one tensor of it, as older files are; None for one that is mapped."""
        path = self._where[name]
        return None if path in self._mapped else path

    def get(self, name: str) -> torch.Tensor:
        """A copy of one tensor on the CPU in its stored dtype. Raises KeyError when there is none of that name."""
        shape = self.shapes[name]
        return self.read(name, 0, math.prod(shape)).view(shape)

    def read(self, name: str, start: int, stop: int) -> torch.Tensor:
        """Elements ``start`` to ``stop`` of a tensor seen flat in row-major order: a 1-D copy in its stored dtype."""
        path = self._where[name]
        if path in self._mapped:
            return _elements(self._mapped[path][name], start, stop)
        with self._lock:
            if self._last is None or self._last[0] != path:
                self._last = None  # before the next one is read: two are never in memory
                self._last = path, load_tensors(path)
            return _elements(self._last[1][name], start, stop)

    def view(self, name: str, start: int, stop: int) -> torch.Tensor:
        """As ``read``, but of a mapped file a view where the order allows it; not to be written to."""
        tensor = self._mapped.get(self._where[name], {}).get(name)
        if tensor is None or not tensor.is_contiguous():
            return self.read(name, start, stop)
        return tensor.view(-1)[start:stop]


def _elements(tensor: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """A copy of some elements; of a tensor that is stored in another order only the rows in question are put in order."""
    rows = torch.atleast_1d(tensor)
    if rows.numel():
        width = rows.numel() // len(rows)
        first = start // width
        rows = rows[first : -(-stop // width)]
        start, stop = start - first * width, stop - first * width
    return rows.reshape(-1)[start:stop].clone(memory_format=torch.contiguous_format)


Weights = Checkpoint | BinCheckpoint  # what open_weights gives


def _open_all(folder: Path) -> dict[Path, Tensors]:
    """The tensors of every file, in the order of the index; of files that cannot be mapped without content."""
    if (folder / BIN_SINGLE_NAME).is_file():
        return {folder / BIN_SINGLE_NAME: load_tensors(folder / BIN_SINGLE_NAME, content=False)}
    if not (folder / BIN_INDEX_NAME).is_file():
        raise FileNotFoundError(f"{folder}: no {BIN_SINGLE_NAME} and no {BIN_INDEX_NAME}")
    opened: dict[Path, Tensors] = {}

    def open_one(path: Path) -> Tensors:
        opened[path] = load_tensors(path, content=False)
        return opened[path]

    indexed_files(folder / BIN_INDEX_NAME, open_one)
    return opened


def load_tensors(path: Path, *, content: bool = True) -> Tensors:
    """The tensors of one ``.bin`` file by name, on the CPU; nothing in the file is run.

    A zip file is mapped. An older file is read into memory; with ``content`` false it is not, and its tensors lie on the
    meta device. Raises UnsafeFileError when the file holds anything but dense tensors by name, or is cut.
    """
    mapped = _is_zip(path)
    try:
        if mapped:
            _check_stored(path)
        with nullcontext() if mapped or content else torch.serialization.skip_data():
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - torch raises many kinds for a broken or hostile file
        raise _refusal(path, error) from None
    if not isinstance(loaded, dict):
        raise UnsafeFileError(f"{path}: holds a {type(loaded).__name__}; a dictionary of tensors by name is expected")
    tensors = {_name(name, path): _dense(name, value, path) for name, value in loaded.items()}
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    if sum(storages.values()) > path.stat().st_size:
        raise UnsafeFileError(f"{path}: {path.stat().st_size} bytes, its tensors have more; the file was cut")
    return tensors if mapped or content else {name: tensor.to("meta") for name, tensor in tensors.items()}


def _refusal(path: Path, error: Exception) -> UnsafeFileError:
    """What to tell of a file that torch could not load, or would not."""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return UnsafeFileError(
            f"{path}: holds more than tensors (it names {named[1]}), which could run code; it was not read. "
            "Ask its makers for safetensors"
        )
    cause = str(error).partition("\n")[0].partition(". ")[0] or type(error).__name__
    return UnsafeFileError(f"{path}: broken, or no file of tensors that torch.save wrote ({cause})")


def _is_zip(path: Path) -> bool:
    with path.open("rb") as stream:
        return stream.read(4) == b"PK\x03\x04"


def _check_stored(path: Path) -> None:
    """Raises UnsafeFileError for a zip file that was packed again: its bytes, mapped, are not the tensors'."""
    with zipfile.ZipFile(path) as archive:
        packed = [entry.filename for entry in archive.infolist() if entry.compress_type != zipfile.ZIP_STORED]
    if packed:
        raise UnsafeFileError(f"{packed[0]} is compressed, which torch.save never does")


def _name(name: object, path: Path) -> str:
    if not isinstance(name, str):
        raise UnsafeFileError(f"{path}: {name!r} is no tensor's name; a dictionary of tensors by name is expected")
    return name


def _dense(name: str, value: object, path: Path) -> torch.Tensor:
    if not isinstance(value, torch.Tensor):
        raise UnsafeFileError(
            f"{path}: {name!r} is of the type {type(value).__name__}; a dictionary of tensors by name is expected"
        )
    if value.layout != torch.strided or value.is_quantized or value.device.type != "cpu":
        raise UnsafeFileError(f"{path}: tensor {name} is sparse, quantised or without content; it must be plain")
    return value.detach()
