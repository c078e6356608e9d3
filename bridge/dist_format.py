"""Megatron-Core's ``torch_dist`` checkpoints, read and written without Megatron.

Such a checkpoint holds whole tensors in chunks, so that it serves every tensor, pipeline and expert parallel size. Beside
``.metadata`` and the ``.distcp`` files lie ``metadata.json`` and what is common to all ranks: ``common.pt`` up to
megatron-core 0.18, the object ``common_state`` since 0.19, which reads both
(https://github.com/NVIDIA/Megatron-LM/tree/main/megatron/core/dist_checkpointing).
"""

import json
import pickle
import re
from argparse import Namespace
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, NamedTuple, Self, cast

import torch

from ..storage.hashing import HashingFile, Ledger
from ..storage.progress import Progress, Say
from ..storage.safe_pickle import Inert
from ..storage.safetensors_io import Spec, bytes_of
from .dist_names import Piece, Place, dialects_of_keys, extra_states_of, pieces_of, places_of, section_places
from .dist_records import METADATA_NAME, Files, Record, check_tiling, read_metadata
from .errors import BridgeError
from .sections import sections_of

if TYPE_CHECKING:
    from torch.distributed.checkpoint.filesystem import _StorageInfo  # pyright: ignore[reportPrivateUsage]

COMMON_NAME = "common.pt"
_COMMON_OBJECT = "common_state/shard_0_1"
_BACKEND = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
_NO_MODEL = re.compile(r"(chained_\d+\.)?(optimizer|opt_param_scheduler|rng_state|rerun_state)\b.*")
_SINCE_GROUPED = 2  # the checkpoint_version since which linear_qkv has the order of today
_ALIGNED = 64  # bytes; torch.save aligns tensors so within its file


class DistCheckpoint:
    """The model in a ``torch_dist`` checkpoint, by canonical names; ``folder`` holds ``.metadata``. A context manager.

    ``shapes`` and ``dtypes`` come from ``.metadata`` alone, ``args`` (the plain values of Megatron's arguments) and
    ``iteration`` from the common state; ``dialects`` have its keys; ``said`` tells what is not read. The vocabulary is as it
    is stored, maybe padded.
    Raises BridgeError when a file is absent, cut, broken or unsafe, or when chunks do not make up a tensor.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.said: list[str] = []
        table = read_metadata(folder, lambda key: not _NO_MODEL.fullmatch(key))
        self._stored = table.tensors
        if not self._stored:
            raise BridgeError(f"{folder}: holds no tensor of a model")
        for key, stored in self._stored.items():
            check_tiling(key, stored)
        self._files = Files(folder)
        self._files.check([chunk.record for stored in self._stored.values() for chunk in stored.chunks])
        self._pieces = pieces_of(self._stored)
        self.shapes = {name: _joined_shape(name, pieces) for name, pieces in self._pieces.items()}
        self.dialects = dialects_of_keys(self._stored, self.shapes)
        self.dtypes = {name: self._stored[pieces[0].key].dtype for name, pieces in self._pieces.items()}
        self._say_skipped([*table.others, *(table.objects.keys() - {_COMMON_OBJECT})])
        common = self._common(table.objects)
        self.iteration = _iteration(common, folder)
        self.args = self._plain_args(common.get("args"))

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._files.close()

    def __contains__(self, name: str) -> bool:
        return name in self._pieces

    def __iter__(self) -> Iterator[str]:
        return iter(self._pieces)

    def __len__(self) -> int:
        return len(self._pieces)

    def get(self, name: str) -> torch.Tensor:
        """One tensor on the CPU in its stored dtype: a view of its file where one chunk holds it, else in memory.

        Not to be written to. Several threads may read. Raises KeyError when there is none of that name, BridgeError when its
        records are broken.
        """
        parts = [self._read(piece) for piece in self._pieces[name]]
        return parts[0] if len(parts) == 1 else torch.cat(parts)

    def _read(self, piece: Piece) -> torch.Tensor:
        stored = self._stored[piece.key]._replace(chunks=piece.chunks)
        offset, shape = piece.at + (0,) * len(piece.shape), (1,) * len(piece.at) + piece.shape
        return self._files.box(piece.key, stored, offset, shape).reshape(piece.shape)

    def _say_skipped(self, keys: Sequence[str]) -> None:
        kinds = Counter(
            "_extra_state" if "._extra_state/" in key else re.split(r"[./]", key, maxsplit=1)[0] for key in keys
        )
        self.said += [f"not read: {count} entries of {kind}" for kind, count in sorted(kinds.items())]

    def _common(self, objects: Mapping[str, Record]) -> dict[str, Any]:
        """What all ranks share: args, iteration, checkpoint_version and more."""
        path = self.folder / COMMON_NAME
        record = Record(COMMON_NAME, 0, path.stat().st_size) if path.is_file() else objects.get(_COMMON_OBJECT)
        if record is None:
            self.said.append(f"no {COMMON_NAME} and no common_state: nothing is known of Megatron's arguments")
            return {}
        self._files.check([record])
        found = self._files.read(record)
        if isinstance(found, list) and found:  # core 0.19 has it in a list, as all objects
            found = found[0]
        if not isinstance(found, dict):
            raise BridgeError(
                f"{self.folder / record.file}: holds {found!r} in place of a dictionary of Megatron's state"
            )
        return found

    def _plain_args(self, found: object) -> dict[str, Any]:
        fields = found.state if isinstance(found, Inert) else found
        if not isinstance(fields, dict):
            self.said.append("no args: nothing is known of Megatron's arguments")
            return {}
        args: dict[str, Any] = {}
        for name, value in fields.items():
            try:
                args[name] = _plain(value)
            except TypeError as error:
                self.said.append(f"args.{name} is left out: {error} is no plain value")
        return args


def _joined_shape(name: str, pieces: Sequence[Piece]) -> tuple[int, ...]:
    shapes = {piece.shape[1:] for piece in pieces}
    if len(shapes) > 1:
        raise BridgeError(f"tensor {name}: its halves have the shapes {[piece.shape for piece in pieces]}")
    if len(pieces) == 1:
        return pieces[0].shape
    return (sum(piece.shape[0] for piece in pieces), *shapes.pop())


def _iteration(common: Mapping[str, Any], folder: Path) -> int | None:
    version = common.get("checkpoint_version", _SINCE_GROUPED)
    if not isinstance(version, int | float) or version < _SINCE_GROUPED:
        raise BridgeError(
            f"{folder}: checkpoint_version {version!r} has another order of query, key and value; "
            "load and save it once with Megatron-LM"
        )
    iteration = common.get("iteration")
    return iteration if isinstance(iteration, int) else None


def _plain(value: object) -> Any:
    """A value without classes; a Namespace becomes a dictionary. Raises TypeError that names what it is not."""
    if value is None or isinstance(value, bool | int | float | str | torch.dtype):
        return value
    if isinstance(value, list | tuple):
        return type(value)(map(_plain, value))
    if isinstance(value, dict):
        return {_plain(name): _plain(inner) for name, inner in value.items()}
    if isinstance(value, Inert) and value.named in ("argparse.Namespace", "types.SimpleNamespace"):
        return _plain(value.state or {})
    raise TypeError(value)


def write_dist(
    folder: Path,
    specs: Sequence[Spec],
    get: Callable[[str], torch.Tensor],
    *,
    args: Mapping[str, Any],
    iteration: int,
    uniform: bool,
    dialect: str = "mcore",
    tower: bool = False,
    workers: int = 2,
    max_file_bytes: int = 4 * 2**30,
    say: Say = print,
) -> dict[str, dict[str, Any]]:
    """Write the canonical tensors as a ``torch_dist`` checkpoint into an empty folder; the manifest's entries of its files.

    ``get`` is asked for each tensor once, in the order of ``specs`` within each of the files that ``workers`` threads write;
    what it gives is all that is in memory. ``uniform`` when Megatron's model has plain integers for ``moe_layer_freq`` and
    the like: then it looks for all layers in one tensor. ``dialect`` (see ``dialects``) tells the keys of some norms.
    Readable by megatron-core (proven with 0.16.1) and by torch's own reader.
    Raises BridgeError when a tensor is not as its spec says or ``args`` hold more than plain values.
    """
    # Half a second to import, which reading and planning go without.
    from torch.distributed.checkpoint.metadata import BytesStorageMetadata, Metadata, MetadataIndex

    common = _common_state(args, iteration, uniform=uniform)
    places = places_of({spec.name for spec in specs}, uniform=uniform, dialect=dialect, tower=tower)
    sections = sections_of({spec.name: spec.shape for spec in specs})
    stored = {spec.name: _stored(spec, places[spec.name], sections.get(spec.name)) for spec in specs}
    table = _described([part for parts in stored.values() for part in parts])
    ledger = Ledger(folder)
    found: dict[MetadataIndex, _StorageInfo] = {}
    nothing: list[_StorageInfo] = []

    def write(number: int, part: Sequence[Spec]) -> None:
        def work(stream: HashingFile) -> None:
            records = _RecordWriter(stream, name)
            if number == 0:
                nothing.append(records.add([None]))
            with _without_checksums():  # torch keeps the setting for each thread
                for spec in part:
                    whole = _checked(get(spec.name), spec)
                    for one, place, first in stored[spec.name]:
                        record = records.add(_record(whole, one, first, len(place.at)))
                        found[MetadataIndex(place.key, _offset(one, place))] = record
                    progress.advance(spec.size)

        name = f"__{number}_0.distcp"
        ledger.write(folder / name, work)

    parts, size = _parts(specs, workers, max_file_bytes), sum(spec.size for spec in specs)
    with ThreadPoolExecutor(workers) as pool, Progress("conversion", size, "written", say) as progress:
        list(pool.map(write, range(len(parts)), parts))
        ledger.write(folder / COMMON_NAME, lambda stream: torch.save(common, cast("Any", stream)))
    for key in extra_states_of(places):
        table[key] = BytesStorageMetadata()
        found[MetadataIndex(key)] = nothing[0]  # one record serves all: none of them says anything
    order = sorted(
        found, key=lambda index: (index.fqn, tuple(index.offset or ()))
    )  # the same files from the same source
    metadata = pickle.dumps(Metadata(table, storage_data={index: found[index] for index in order}))
    ledger.write(folder / METADATA_NAME, lambda stream: stream.write(metadata))
    ledger.write(folder / "metadata.json", lambda stream: stream.write(json.dumps(_BACKEND).encode()))
    return ledger.entries


def _common_state(args: Mapping[str, Any], iteration: int, *, uniform: bool) -> dict[str, Any]:
    """What megatron.training looks for beside the model."""
    for name, value in args.items():
        try:
            _plain(value)
        except TypeError as error:
            raise BridgeError(f"args.{name}: {error} is no plain value and cannot be written") from None
    common: dict[str, Any] = {"args": Namespace(**args), "checkpoint_version": 3.0, "iteration": iteration}
    return common if uniform else common | {"content_metadata": {"non_homogeneous_layers": True}}


class _Stored(NamedTuple):
    """What is stored under a key: a tensor or one of those that it joins, from the row ``first`` on."""

    spec: Spec
    place: Place
    first: int


def _stored(spec: Spec, place: Place, rows: Sequence[int] | None) -> list[_Stored]:
    """What a canonical tensor is stored as; ``rows`` of each of the tensors that it joins, None when it joins none."""
    if rows is None:
        return [_Stored(spec, place, 0)]
    starts = [sum(rows[:number]) for number in range(len(rows))]
    return [
        _Stored(spec._replace(shape=(count, *spec.shape[1:])), one, start)
        for one, count, start in zip(section_places(place), rows, starts, strict=True)
    ]


def _described(parts: Sequence[_Stored]) -> dict[str, Any]:
    """What ``.metadata`` says of each tensor. Raises BridgeError when layers or experts that share one differ."""
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, TensorProperties, TensorStorageMetadata

    table: dict[str, Any] = {}
    for spec, place, _ in parts:
        key, at, lead = place
        size = torch.Size((*lead, *spec.shape))
        entry = table.setdefault(key, TensorStorageMetadata(TensorProperties(spec.dtype), size, []))
        if (entry.size, entry.properties.dtype) != (size, spec.dtype):
            raise BridgeError(
                f"tensor {spec.name}: {spec.dtype} {spec.shape}, others of {key} have {entry.properties.dtype} "
                f"{tuple(entry.size[len(lead) :])}"
            )
        sizes = torch.Size((1,) * len(at) + spec.shape)
        entry.chunks.append(ChunkStorageMetadata(torch.Size(_offset(spec, place)), sizes))
    return table


def _offset(spec: Spec, place: Place) -> tuple[int, ...]:
    return place.at + (0,) * len(spec.shape)


def _parts(specs: Sequence[Spec], workers: int, max_bytes: int) -> list[list[Spec]]:
    """Runs of the specs, one a file, of equal size: about ``max_bytes`` or so many that no worker is idle."""
    total = sum(spec.size for spec in specs)
    count = max(workers, -(-total // max_bytes))
    parts: list[list[Spec]] = [[]]
    size = 0
    for spec in specs:
        if size * count >= total * len(parts) > 0:
            parts.append([])
        parts[-1].append(spec)
        size += spec.size
    return parts


def _checked(tensor: torch.Tensor, spec: Spec) -> torch.Tensor:
    """The tensor. Raises BridgeError when it is not as its spec says."""
    if tensor.dtype != spec.dtype or tuple(tensor.shape) != spec.shape or not spec.size:
        raise BridgeError(
            f"tensor {spec.name}: {tensor.dtype} {tuple(tensor.shape)} in place of {spec.dtype} {spec.shape}"
            if spec.size
            else f"tensor {spec.name} is empty: {spec.shape}"
        )
    return tensor


def _record(tensor: torch.Tensor, spec: Spec, first: int, depth: int) -> torch.Tensor:
    """Rows from ``first`` on with their leading dimensions, on a storage of their size: torch.save writes whole ones."""
    rows = tensor[first : first + spec.shape[0]] if spec.shape else tensor
    flat = torch.frombuffer(bytes_of(rows), dtype=torch.uint8)
    return flat.view(spec.dtype).reshape((1,) * depth + spec.shape)


class _RecordWriter:
    """Writes files of torch.save one after another into a file, aligned so that their tensors can be mapped."""

    def __init__(self, stream: HashingFile, name: str) -> None:
        self._stream, self._name, self._at = stream, name, 0

    def write(self, data: Any) -> int:
        size = self._stream.write(data)
        self._at += size
        return size

    def flush(self) -> None:
        """Nothing is buffered here."""

    def add(self, value: object) -> "_StorageInfo":
        from torch.distributed.checkpoint.filesystem import _StorageInfo  # pyright: ignore[reportPrivateUsage]

        self.write(bytes(-self._at % _ALIGNED))
        start = self._at
        torch.save(value, cast("Any", self))
        return _StorageInfo(self._name, start, self._at - start)


@contextmanager
def _without_checksums() -> Generator[None]:
    """Checksums within torch's zip files take three times as long as all else; the manifest has those of whole files."""
    before = torch.serialization.get_crc32_options()
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.serialization.set_crc32_options(before)
