"""Pickles, read without running what they hold: weights in ``.bin`` files, and what Megatron writes.

Such a file may name any code. For weights (``pytorch_model.bin``, or shards with an index) ``torch.load`` is told
``weights_only=True`` here in so many words: then it builds tensors and plain containers only, whatever the environment says
(https://pytorch.org/docs/stable/notes/serialization.html); ``load_namespace_file`` does so for files that hold settings
beside tensors. Megatron's files may hold objects of its own classes too; ``read_pickle`` and ``read_torch`` make an
``Inert`` of each: no class of the file is imported, no function of it is called.
"""

import io
import math
import pickle
import re
import threading
import zipfile
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, NoReturn, Self

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
        raise _refusal(path, error, "more than tensors") from None
    if not isinstance(loaded, dict):
        raise UnsafeFileError(f"{path}: holds a {type(loaded).__name__}; a dictionary of tensors by name is expected")
    tensors = {_name(name, path): _dense(name, value, path) for name, value in loaded.items()}
    storages = {value.untyped_storage().data_ptr(): value.untyped_storage().nbytes() for value in tensors.values()}
    if sum(storages.values()) > path.stat().st_size:
        raise UnsafeFileError(f"{path}: {path.stat().st_size} bytes, its tensors have more; the file was cut")
    return tensors if mapped or content else {name: tensor.to("meta") for name, tensor in tensors.items()}


class Stub:
    """What stands for an object of a class that is not loaded: it keeps what the file says of it and does nothing."""

    arguments: tuple[object, ...]

    def __new__(cls, *arguments: object) -> Self:
        self = super().__new__(cls)
        self.arguments = arguments
        return self

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"{type(self).__name__}({', '.join(map(repr, self.arguments))})"


# What checkpoints of Megatron-Core and its kin name beside tensors: settings, states of random numbers and of fp8.
_KNOWN = re.compile(
    r"(megatron|mindspeed|mindspeed_llm|transformer_engine)\..+|types\.SimpleNamespace|signal\.Signals|_?io\.BytesIO"
    r"|pathlib\.(Pure)?(Posix|Windows)?Path|enum\.\w+|datetime\.\w+|collections\.(deque|defaultdict)"
    r"|numpy(\._?core\.multiarray)?\.(_reconstruct|scalar|ndarray|dtype)|numpy\.dtypes\.\w+DType|torch\.nn\.functional\.\w+"
)


def load_namespace_file(path: Path) -> dict[str, Any]:
    """A file of ``torch.save`` with an ``argparse.Namespace`` and other settings in it, its tensors mapped; runs nothing.

    Objects of the classes that such checkpoints are known to hold become ``Stub``; a file that names anything else is
    refused. Raises FileNotFoundError, UnsafeFileError.
    """
    if not _is_zip(path):
        raise UnsafeFileError(f"{path}: broken, or not in the format that torch.save writes since 1.6")
    try:
        _check_stored(path)
        named = torch.serialization.get_unsafe_globals_in_checkpoint(str(path))
        stubs: list[Any] = [
            (type(name.rpartition(".")[2], (Stub,), {}), name) for name in named if _KNOWN.fullmatch(name)
        ]
        with torch.serialization.safe_globals([Namespace, *stubs]):
            loaded: Any = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except OSError:
        raise
    except Exception as error:  # noqa: BLE001 - torch raises many kinds for a broken or hostile file
        raise _refusal(path, error, "more than a checkpoint does") from None
    if not isinstance(loaded, dict) or not all(isinstance(key, str) for key in loaded):
        raise UnsafeFileError(f"{path}: a dictionary by name is expected, as training writes it")
    return loaded


def _refusal(path: Path, error: Exception, more: str) -> UnsafeFileError:
    """What to tell of a file that torch could not load, or would not."""
    if named := re.search(r"GLOBAL (\S+)", str(error)):
        return UnsafeFileError(
            f"{path}: holds {more} (it names {named[1]}), which could run code; it was not read. Ask its makers for safetensors"
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


class Inert:
    """Stands for an object of a class, or for the result of a function, that a file names: nothing was imported or run.

    ``named`` is the full name, ``args`` what it was to be called with, ``state`` what was to become its attributes.
    """

    __slots__ = ("args", "state")
    named = ""

    def __new__(cls, *args: object, **_kwargs: object) -> Self:
        self = super().__new__(cls)
        self.args, self.state = args, None
        return self

    def __init__(self, *args: object, **kwargs: object) -> None:
        """Nothing: all is done when it is made, which is all that a pickle may do."""

    def __setstate__(self, state: object) -> None:
        self.state = state

    def __repr__(self) -> str:
        return f"<{self.named}>"


class _Storage(NamedTuple):
    """The bytes of a tensor's storage and the type of what lies in them."""

    dtype: torch.dtype
    data: memoryview


# What files of Megatron, of torch.distributed.checkpoint and of the numpy states beside them name. All become ``Inert``.
_EXPECTED = re.compile(
    r"(megatron|transformer_engine|nvidia_resiliency_ext|mindspeed|mindspeed_llm|torch\.distributed|numpy)\..+"
    r"|argparse\.Namespace|types\.SimpleNamespace|io\.BytesIO|signal\.Signals|pathlib\.\w+|pathlib\._local\.\w+"
    r"|torch\.(device|\w+Storage|storage\.UntypedStorage|serialization\._get_layout|nn\.parameter\.Parameter)"
    r"|torch\._utils\._rebuild_(tensor_v2|tensor_v3|parameter)|torch\._tensor\._rebuild_from_type_v2"
    r"|(builtins|__builtin__)\.(set|frozenset|complex|slice|bytearray)|_codecs\.encode|datetime\.\w+"
    r"|collections\.defaultdict|copyreg\._reconstructor|enum\.\w+"
)
_DTYPES = {f"torch.{name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
_STORAGES = {
    "torch.DoubleStorage": torch.float64, "torch.FloatStorage": torch.float32, "torch.HalfStorage": torch.float16,
    "torch.BFloat16Storage": torch.bfloat16, "torch.LongStorage": torch.int64, "torch.IntStorage": torch.int32,
    "torch.ShortStorage": torch.int16, "torch.CharStorage": torch.int8, "torch.ByteStorage": torch.uint8,
    "torch.BoolStorage": torch.bool, "torch.storage.UntypedStorage": torch.uint8,
}  # fmt: skip


class _InertUnpickler(pickle.Unpickler):
    """Makes plain values, dtypes and ``Inert``; ``records`` are the storages that a file of torch.save has beside it."""

    def __init__(self, stream: io.BytesIO, records: dict[str, memoryview]) -> None:
        super().__init__(stream, encoding="utf-8")
        self._records = records
        self._made: dict[str, type] = {}  # new ones for each file: what a pickle does to a class ends with it

    def find_class(self, module: str, name: str, /) -> Any:
        named = f"{module}.{name}"
        if named in _DTYPES:
            return _DTYPES[named]
        if named == "torch.Size":
            return tuple
        if named == "collections.OrderedDict":
            return OrderedDict
        if not _EXPECTED.fullmatch(named):
            raise _ForeignNameError(named)
        if named not in self._made:
            self._made[named] = type(name, (Inert,), {"__slots__": (), "named": named})
        return self._made[named]

    def persistent_load(self, pid: Any, /) -> _Storage:
        """The storage that ("storage", its class, its record's name, device, elements) means."""
        _, kind, key, _, count = pid
        dtype, data = _STORAGES[kind.named], self._records[f"data/{key}"]
        if len(data) != count * dtype.itemsize:
            raise ValueError(f"storage {key} has {len(data)} bytes in place of {count * dtype.itemsize}")
        return _Storage(dtype, data)


class _ForeignNameError(Exception):
    """A pickle names what no file of its kind names."""


def read_pickle(data: bytes, where: object) -> Any:
    """What a plain pickle holds: plain values, tuples for torch.Size, dtypes, and ``Inert`` for all else.

    ``where`` names the file in messages. Raises UnsafeFileError when it is broken or names code that has no place in
    files of Megatron or torch.distributed.checkpoint.
    """
    return _unpickle(data, {}, where)


def read_torch(data: memoryview, where: object) -> Any:
    """What torch.save wrote into these bytes, as ``read_pickle`` gives it; its tensors are for ``tensor_bytes``.

    Nothing is copied but the pickle. Raises UnsafeFileError, also for a file that is no zip.
    """
    try:
        records = _records_of(data)
        pickled = bytes(records["data.pkl"])
    except Exception as error:  # noqa: BLE001 - zipfile raises many kinds for a broken file
        _broken(error, where)
    return _unpickle(pickled, records, where)


def _unpickle(data: bytes, records: dict[str, memoryview], where: object) -> Any:
    try:
        return _InertUnpickler(io.BytesIO(data), records).load()
    except _ForeignNameError as error:
        raise UnsafeFileError(
            f"{where}: names {error}, which has no place in a checkpoint of Megatron and could run code; it was not read"
        ) from None
    except Exception as error:  # noqa: BLE001 - a broken pickle raises any kind
        _broken(error, where)


def _broken(error: Exception, where: object) -> NoReturn:
    cause = f"{type(error).__name__}: {error}".partition("\n")[0]
    raise UnsafeFileError(f"{where}: broken, or not what torch.save wrote ({cause})") from None


def _records_of(data: memoryview) -> dict[str, memoryview]:
    """The records of a zip file that torch.save wrote by their names below its top folder, each a view.

    zipfile reads the table only: it would refuse the records of a file that was written without checksums.
    """
    records: dict[str, memoryview] = {}
    with zipfile.ZipFile(_Window(data)) as archive:
        for entry in archive.infolist():
            if entry.compress_type != zipfile.ZIP_STORED:
                raise ValueError(f"{entry.filename} is compressed, which torch.save never does")
            head = data[entry.header_offset : entry.header_offset + 30]
            if bytes(head[:4]) != b"PK\x03\x04":
                raise ValueError(f"{entry.filename} does not begin where the table says")
            start = (
                entry.header_offset + 30 + int.from_bytes(head[26:28], "little") + int.from_bytes(head[28:30], "little")
            )
            if start + entry.file_size > len(data):
                raise ValueError(f"{entry.filename} is cut")
            records[entry.filename.partition("/")[2]] = data[start : start + entry.file_size]
    if bytes(records.get("byteorder", b"little")) != b"little":
        raise ValueError("its bytes are in the order of another machine")
    return records


class _Window(io.RawIOBase):
    """Bytes in memory as a file, without copying them as BytesIO does."""

    def __init__(self, data: memoryview) -> None:
        super().__init__()
        self._data, self._at = data, 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        self._at = max(0, offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: len(self._data)}[whence])
        return self._at

    def readinto(self, buffer: Any, /) -> int:
        part = self._data[self._at : self._at + len(buffer)]
        buffer[: len(part)] = part
        self._at += len(part)
        return len(part)


def tensor_bytes(value: object, where: object) -> tuple[torch.Tensor, torch.dtype]:
    """A tensor that ``read_torch`` met: its bytes as uint8, and its dtype.

    The bytes have one more dimension than the tensor, the last: those of an element. They are a view of the file's, so that
    it does not matter at which address they lie; ``typed`` makes a tensor of them. Raises UnsafeFileError when ``value`` is
    no plain dense tensor or reaches over the end of its storage.
    """
    if isinstance(value, Inert) and value.named == "torch._utils._rebuild_parameter":
        return tensor_bytes(value.args[0], where)
    if not isinstance(value, Inert) or not value.named.startswith("torch._utils._rebuild_tensor_v"):
        raise UnsafeFileError(f"{where}: holds a {value!r} in place of a plain tensor")
    try:
        storage, offset, shape, strides = value.args[:4]
        dtype = value.args[6] if value.named.endswith("3") else storage.dtype
        return _view(storage.data, offset, shape, strides, dtype.itemsize), dtype
    except Exception as error:  # noqa: BLE001 - what a broken file gives in place of numbers raises any kind
        _broken(error, where)


def _view(data: memoryview, offset: int, shape: Sequence[int], strides: Sequence[int], size: int) -> torch.Tensor:
    """Elements of ``size`` bytes; torch itself checks nothing of this."""
    if min((offset, *shape, *strides)) < 0:
        raise ValueError(f"a tensor of the shape {shape}, the strides {strides} at {offset}")
    if 0 in shape:
        return torch.empty(*shape, size, dtype=torch.uint8)
    last = offset + sum((count - 1) * stride for count, stride in zip(shape, strides, strict=True))
    if (last + 1) * size > len(data):
        raise ValueError(f"a tensor of the shape {shape} reaches over the end of its storage")
    flat = torch.frombuffer(data, dtype=torch.uint8)
    return flat.as_strided((*shape, size), (*(stride * size for stride in strides), 1), offset * size)


def typed(data: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The tensor of what ``tensor_bytes`` gave, or of a part: a view when it is dense and its address fits the type."""
    if not data.is_contiguous() or data.data_ptr() % dtype.itemsize:
        data = data.clone(memory_format=torch.contiguous_format)
    return data.view(dtype).squeeze(-1)
