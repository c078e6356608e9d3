"""Files packed with gzip or Zstandard, unpacked as they are read: a bomb or a cut-off file ends in a DataError."""

import io
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Protocol, cast

from .schema import DataError
from .tables import check_ratio

PACKED = (".gz", ".zst")
_GZIP = 31  # zlib's window bits for a gzip header and trailer
_WINDOW = 1 << 27  # bytes; what zstd -19 --long=27 uses at most
_STEPS = {".gz": 1 << 14, ".zst": 1 << 10}  # packed bytes a step: at worst they unpack to 16 and 32 MiB


class _Frame(Protocol):
    """A gzip member or a Zstandard frame while it is unpacked."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


def open_unpacked(file: Path) -> BinaryIO:
    """The file's content as a stream of bytes, unpacked when its name ends in ``.gz`` or ``.zst``.

    Reading raises DataError when the packed data is broken, ends too early or unpacks to more than any text would.
    """
    if file.suffix not in PACKED:
        return file.open("rb")
    return cast("BinaryIO", io.BufferedReader(_Unpacked(file), 1 << 17))


class _Unpacked(io.RawIOBase):
    def __init__(self, file: Path) -> None:
        self._file = file
        self._packed = file.open("rb")
        self._step = _STEPS[file.suffix]
        self._frame: _Frame | None = None
        self._input = b""
        self._ready = memoryview(b"")
        self._in = self._out = 0

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self._packed.close()
        super().close()

    def readinto(self, buffer: Any, /) -> int:
        """Fill the buffer; 0 at the end of the file."""
        while not self._ready:
            if not self._input:
                self._input = self._packed.read(self._step)
                self._in += len(self._input)
            if not self._input:
                if self._frame is not None:
                    raise DataError(f"{self._file}: the file is cut off; copy or make it again")
                return 0
            self._ready = memoryview(self._unpack())
            self._out += len(self._ready)
            check_ratio(self._file, self._out, self._in)
        count = min(len(buffer), len(self._ready))
        buffer[:count] = self._ready[:count]
        self._ready = self._ready[count:]
        return count

    def _unpack(self) -> bytes:
        """What the waiting input holds, up to the end of its frame."""
        try:
            if self._frame is None:
                self._frame = _new_frame(self._file)
            data = self._frame.decompress(self._input)
        except Exception as error:
            if not isinstance(error, zlib.error) and type(error).__name__ != "ZstdError":
                raise
            raise DataError(f"{self._file}: the packed data is broken: {error}") from None
        self._input = b""
        if self._frame.eof:
            self._input = self._frame.unused_data
            self._frame = None
            if self._file.suffix == ".gz":
                self._input = self._input.lstrip(b"\0")  # padding that some writers leave between members
        return data


def _new_frame(file: Path) -> _Frame:
    if file.suffix == ".gz":
        return zlib.decompressobj(_GZIP)
    import zstandard

    return cast("_Frame", zstandard.ZstdDecompressor(max_window_size=_WINDOW).decompressobj())
