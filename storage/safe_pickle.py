"""Pickles of foreign classes, Megatron's above all, read without running what they hold.

Where ``weights_only=True`` would refuse a class that it does not know, here its objects become ``Inert``: no class that a
file names is imported, no function of it is called. Names that have no place in such files are refused all the same.
"""

import io
import mmap
import pickle
import re
import zipfile
import zlib
from argparse import Namespace
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn, Self

import torch

from .safe_load import UnsafeFileError, load_namespace_file

_PROTOCOL = 2  # the newest that torch.load reads with weights_only


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
    r"|(builtins|__builtin__)\.(dict|set|frozenset|complex|slice|bytearray)|_codecs\.encode|datetime\.\w+"
    r"|copyreg\._reconstructor|enum\.\w+"
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
        if named == "collections.defaultdict":
            return _plain_dict
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


def _plain_dict(*_: object) -> dict[Any, Any]:
    """What a dictionary with a default is read as: what makes the default is left out."""
    return {}


class _ForeignNameError(Exception):
    """A pickle names what no file of its kind names."""


def read_pickle(data: bytes, where: object) -> Any:
    """What a plain pickle holds: plain values, tuples for torch.Size, dtypes, and ``Inert`` for all else.

    ``where`` names the file in messages. Raises UnsafeFileError when it is broken or names code that has no place in
    files of Megatron or torch.distributed.checkpoint.
    """
    return _unpickle(data, {}, where)


def read_torch(data: memoryview, where: object, *, check: bool = True) -> Any:
    """What torch.save wrote into these bytes, as ``read_pickle`` gives it; its tensors are for ``tensor_bytes``.

    Nothing is copied but the pickle. With ``check`` the checksums in the file are compared, if it was written with any:
    torch itself never does; 2 GB a second. Raises UnsafeFileError, also for a file that is no zip.
    """
    try:
        records = _records_of(data, check=check)
        pickled = bytes(records["data.pkl"])
    except Exception as error:  # noqa: BLE001 - zipfile raises many kinds for a broken file
        _broken(error, where)
    return _unpickle(pickled, records, where)


def load_state_file(path: Path) -> dict[str, Any]:
    """``load_namespace_file``, also for a pickle of a protocol above 2, which torch does not read without running it.

    The tensors of such a file are views of it too; its objects stay ``Inert``, but for an argparse.Namespace. Raises
    FileNotFoundError, UnsafeFileError.
    """
    if _protocol(path) <= _PROTOCOL:
        return load_namespace_file(path)
    with path.open("rb") as stream:
        whole = memoryview(mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_COPY))
    found = _with_tensors(read_torch(whole, path, check=False), path)
    if not isinstance(found, dict) or not all(isinstance(key, str) for key in found):
        raise UnsafeFileError(f"{path}: a dictionary by name is expected, as training writes it")
    return found


def _protocol(path: Path) -> int:
    """That of the pickle in a file of torch.save; 0 for what is none."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("/data.pkl"))
            with archive.open(name) as pickled:
                head = pickled.read(2)
    except (zipfile.BadZipFile, StopIteration):
        return 0
    return head[1] if head[:1] == b"\x80" and head[1:] else 0


def _with_tensors(value: Any, where: object) -> Any:
    """A value of ``read_torch`` in which tensors are tensors again and settings a Namespace."""
    if isinstance(value, dict):
        return {key: _with_tensors(inner, where) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_with_tensors(inner, where) for inner in value)
    if isinstance(value, Inert) and value.named == "argparse.Namespace" and isinstance(value.state, dict):
        return Namespace(**_with_tensors(value.state, where))
    if isinstance(value, Inert) and value.named.startswith("torch._utils._rebuild_"):
        return typed(*tensor_bytes(value, where))
    return value


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


def _records_of(data: memoryview, *, check: bool) -> dict[str, memoryview]:
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
            record = data[start : start + entry.file_size]
            if check and entry.CRC and zlib.crc32(record) != entry.CRC:  # without checksums torch writes 0
                raise ValueError(f"the checksum of {entry.filename} is another; bits have changed")
            records[entry.filename.partition("/")[2]] = record
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
