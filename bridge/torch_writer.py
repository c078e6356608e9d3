"""Write Megatron's older checkpoint format ``torch``, without Megatron, in memory for one tensor whatever the model.

The ranks' files are made with holes in place of the tensors first; then each tensor is written into all files that hold
a part of it. They are no maps, so that a full disk is an error and not a signal.
"""

import errno
import io
import os
import zipfile
from argparse import Namespace
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple, cast

import torch

from ..storage.hashing import PIECE, file_entry
from ..storage.megatron_folder import TRACKER
from ..storage.progress import Progress, Say
from ..storage.publish import fsync_path
from ..storage.safetensors_io import Spec, bytes_of
from ..storage.space import free_bytes
from .dialects import LANGUAGE, adapted_name, check_dialect, extra_states, slot_of
from .errors import BridgeError
from .lora import factor_of
from .parallel import (
    EMBEDDING,
    OUTPUT,
    Layout,
    Model,
    Piece,
    Rank,
    Slot,
    check_layout,
    is_carried,
    model_of,
    padded_rows,
    pieces,
)
from .sections import sections_of
from .torch_format import FILE, VERSION, rank_folder

_LOCAL_HEADER = 30  # bytes of a zip file's entry before its name and extra field


def write_torch(
    folder: Path,
    specs: Sequence[Spec],
    get: Callable[[str], torch.Tensor],
    layout: Layout,
    *,
    args: Mapping[str, Any],
    iteration: int | None = None,
    dialect: str = "mcore",
    make_vocab_size_divisible_by: int = 128,
    workers: int = 1,
    model: Model | None = None,
    say: Say = print,
) -> dict[str, dict[str, Any]]:
    """Write a checkpoint of the format ``torch`` into ``folder``; the manifest's entries of its files.

    ``get`` is asked for each tensor of ``specs`` once, in their order; two are in memory at most. ``args`` are completed by
    what follows from the layout and the tensors. ``model`` is needed when ``specs`` are only a part of one. ``iteration``
    None writes what the dialect has, as a rule a release. The files are made with holes first and filled tensor by tensor,
    so the memory does not grow with the model. Raises BridgeError before anything is written, OSError with ENOSPC when
    there is no room for all of it, also before.
    """
    kind = check_dialect(dialect, "torch")
    iteration = kind.iteration if iteration is None else iteration
    if iteration is not None and iteration < 1:
        raise BridgeError(f"iteration {iteration}: Megatron reads checkpoints from iteration 1 on")
    plan = _Plan(specs, layout, args, dialect, make_vocab_size_divisible_by, model)
    needed = sum(spec.size for chunk in plan.chunks.values() for spec in chunk.stored.values())
    if needed > free_bytes(folder):
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: the checkpoint needs {needed:,} bytes", str(folder))
    name = "release" if iteration is None else f"iter_{iteration:07d}"
    base = {"args": Namespace(**plan.args), "checkpoint_version": VERSION, "iteration": iteration or 0}
    paths = {rank: folder / name / rank_folder(rank, layout) / FILE for rank in layout.ranks()}
    starts = {rank: _write_holes(path, base, plan.content(rank)) for rank, path in paths.items()}

    def fill(name: str, tensor: torch.Tensor) -> Path:
        for piece in plan.pieces[name]:
            place = plan.chunks[piece.rank, piece.chunk].places[piece.name]
            start = starts[piece.rank][piece.chunk, place.name] + place.offset
            _fill(paths[piece.rank], start, piece, tensor, turned=place.turned)
        progress.advance(tensor.nbytes)
        return paths[plan.pieces[name][0].rank]

    with Progress("conversion", sum(spec.size for spec in specs), "written", say) as progress:
        _stream(specs, get, fill)
    (folder / TRACKER).write_text("release" if iteration is None else str(iteration), encoding="utf-8")
    return _finish(folder, [*paths.values(), folder / TRACKER], workers, say)


def _stream(
    specs: Sequence[Spec], get: Callable[[str], torch.Tensor], fill: Callable[[str, torch.Tensor], Path]
) -> None:
    """Fetch each tensor while the one before it is written, and the device takes what was."""
    with ThreadPoolExecutor(1) as writer, ThreadPoolExecutor(1) as device:
        filled: Future[Path] | None = None
        synced: Future[None] = device.submit(lambda: None)
        for spec in specs:
            tensor = get(spec.name)
            if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
                raise BridgeError(
                    f"tensor {spec.name} is {tuple(tensor.shape)} {tensor.dtype}; {spec.shape} {spec.dtype} was announced"
                )
            path = filled.result() if filled else None
            if path and synced.done():
                synced.result()  # the system tells an error of the device once: here, not at the end
                synced = device.submit(fsync_path, path)
            filled = writer.submit(fill, spec.name, tensor)
            del tensor
        if filled:
            filled.result()
        synced.result()


class _Place(NamedTuple):
    """Where a part lies: so many bytes after the begin of what is stored under ``name``, maybe transposed."""

    name: str
    offset: int
    turned: bool


class _Chunk(NamedTuple):
    """What a chunk of a rank's file holds by its stored name, and where the parts of tensors lie in it."""

    stored: dict[str, Spec]
    places: dict[str, _Place]  # by the canonical name in the rank's counting
    extra: list[str]  # entries without content


class _Plan:
    """What every file will hold, from the headers alone. Raises BridgeError when the model cannot be spread so."""

    def __init__(
        self,
        specs: Sequence[Spec],
        layout: Layout,
        args: Mapping[str, Any],
        dialect: str,
        divisible_by: int,
        model: Model | None,
    ) -> None:
        check_layout(layout, args)
        shapes = {spec.name: spec.shape for spec in specs}
        model, kind = (model or model_of(shapes))._replace(sections=sections_of(shapes)), check_dialect(dialect)
        adapted = {factor.weight for name in shapes if (factor := factor_of(name))}
        if (EMBEDDING not in shapes and not adapted) or not model.layers:
            raise BridgeError(f"the model has no {EMBEDDING} or no layers; it is no model of Megatron-Core")
        self.layout = layout
        vocab = shapes[EMBEDDING][0] if EMBEDDING in shapes else int(args["vocab_size"])
        divisible_by = divisible_by if kind.padded else 1
        padded = padded_rows(vocab, divisible_by, layout.tp)
        if padded != vocab and not kind.padded:
            raise BridgeError(
                f"--tp {layout.tp}: the vocabulary of {vocab} rows cannot be cut evenly, and --dialect {dialect} does not pad it"
            )
        self.pieces: dict[str, list[Piece]] = {}
        parts: dict[tuple[Rank, int], list[tuple[Slot, Spec]]] = {
            (rank, chunk): [] for rank in layout.ranks() for chunk in range(layout.chunks)
        }
        for spec in specs:
            shape = (padded, *spec.shape[1:]) if spec.name in (EMBEDDING, OUTPUT) else spec.shape
            found = pieces(spec.name, shape, layout, model, cuts=kind.cuts)
            self.pieces[spec.name] = found
            for piece in found:
                slot = slot_of(piece.name, dialect, mtp=model.mtp > 0)
                if f"{spec.name.rpartition('.')[0]}.weight" in adapted:
                    slot = slot._replace(name=adapted_name(slot.name))
                parts[piece.rank, piece.chunk].append((slot, Spec(piece.name, spec.dtype, piece.shape(shape))))
        self.chunks = {at: _chunk(here, tower=model.tower, extra=kind.extra_states) for at, here in parts.items()}
        even = layout.layer_list is None and layout.chunks > 1
        self.args = dict(args) | {
            "ckpt_format": "torch", "num_layers": model.layers, "vocab_size": vocab, "padded_vocab_size": padded,
            "make_vocab_size_divisible_by": divisible_by, "untie_embeddings_and_output_weights": not model.tied,
            "mtp_num_layers": model.mtp or None, "tensor_model_parallel_size": layout.tp,
            "pipeline_model_parallel_size": layout.pp, "expert_model_parallel_size": layout.ep,
            "expert_tensor_parallel_size": layout.expert_tp,
            "virtual_pipeline_model_parallel_size": layout.vpp if layout.chunks > 1 else None,
            "num_layers_per_virtual_pipeline_stage": model.layers // layout.pp // layout.chunks if even else None,
            "pipeline_model_parallel_layout": layout.megatron_layout(model.layers, model.mtp),
            "transformer_impl": "local" if kind.local else "transformer_engine",
            "moe_grouped_gemm": dialect != "mcore-local" and model.experts > 0, **kind.own_args(layout),
        }  # fmt: skip

    def content(self, rank: Rank) -> dict[str, _Chunk]:
        """The chunks of a rank's file by their key."""
        keys = [f"model{chunk}" for chunk in range(self.layout.chunks)] if self.layout.chunks > 1 else ["model"]
        return {key: self.chunks[rank, chunk] for chunk, key in enumerate(keys)}


def _chunk(parts: Sequence[tuple[Slot, Spec]], *, tower: bool, extra: bool) -> _Chunk:
    """Parts by their canonical names as they are stored; ``tower``: beside them is something that is no language model."""
    shared: dict[str, list[tuple[Slot, Spec]]] = {}
    for slot, spec in parts:
        shared.setdefault(slot.name, []).append((slot, spec))
    names = {
        name: f"{LANGUAGE if tower and not is_carried(spec.name) else ''}{name}"
        for name, [(_, spec), *_] in shared.items()
    }
    found = _Chunk({}, {}, [])
    for name, members in shared.items():
        offset = 0
        members.sort(key=lambda member: member[0].order)
        for slot, spec in members:
            found.places[spec.name] = _Place(names[name], offset, slot.turned)
            offset += spec.size
        found.stored[names[name]] = _joined(names[name], members)
    if extra:
        own = [slot.name for slot, spec in parts if not is_carried(spec.name)]
        last = any(spec.name == "decoder.final_layernorm.weight" for _, spec in parts)
        found.extra.extend(f"{LANGUAGE if tower else ''}{name}" for name in extra_states(own, last_stage=last))
    return found


def _joined(name: str, members: Sequence[tuple[Slot, Spec]]) -> Spec:
    """What is stored of the parts that share a name."""
    (slot, first), *others = members
    if not others and not slot.turned:
        return first._replace(name=name)
    shapes = [spec.shape[::-1] if slot.turned else spec.shape for _, spec in members]
    if len({spec.dtype for _, spec in members}) > 1:
        raise BridgeError(
            f"tensor {name}: its parts have several types: {', '.join(str(spec.dtype) for _, spec in members)}"
        )
    shape = list(shapes[0])
    shape[slot.axis] = sum(shape[slot.axis] for shape in shapes)
    return Spec(name, first.dtype, tuple(shape))


def _write_holes(path: Path, base: Mapping[str, Any], chunks: Mapping[str, _Chunk]) -> dict[tuple[int, str], int]:
    """Write a rank's file with holes for its tensors; of each (chunk, stored name) the place where its bytes belong."""
    states: dict[str, dict[str, Any]] = {}
    for key, chunk in chunks.items():
        # Memory that is never touched is never taken: torch cannot save tensors without any.
        tensors = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in chunk.stored.items()}
        states[key] = tensors | dict.fromkeys(chunk.extra)
    path.parent.mkdir(parents=True)
    crc = torch.serialization.get_crc32_options()
    try:
        torch.serialization.set_crc32_options(False)
        with torch.serialization.skip_data(), _File(path, "wb") as stream:
            try:
                torch.save({**base, **states}, cast("Any", stream))
            except RuntimeError:
                if stream.error:
                    raise stream.error from None
                raise
    finally:
        torch.serialization.set_crc32_options(crc)
    order = [(number, item) for number, chunk in enumerate(chunks.values()) for item in chunk.stored.items()]
    places = _records(path)
    starts: dict[tuple[int, str], int] = {}
    for (chunk, (name, spec)), (start, size) in zip(order, places, strict=True):
        assert size == spec.size, f"{path}: the record of {name} has {size} bytes"
        starts[chunk, name] = start
    return starts


class _File(io.FileIO):
    """A file that keeps the error of a write: torch raises one in its place that does not tell what happened."""

    error: OSError | None = None

    def write(self, data: Any, /) -> int:
        """All of the bytes, which plain files may take in parts."""
        rest = memoryview(data).cast("B")
        size = len(rest)
        try:
            while rest:
                rest = rest[super().write(rest) :]
        except OSError as error:
            error.filename = self.name
            self.error = error
            raise
        return size


def _records(path: Path) -> list[tuple[int, int]]:
    """Where the tensors' bytes begin and how many they are, in the order in which torch numbered them."""
    with zipfile.ZipFile(path) as archive, path.open("rb") as stream:
        found: list[tuple[int, int, int]] = []
        for entry in archive.infolist():
            folder, _, number = entry.filename.rpartition("/data/")
            if not folder:
                continue
            stream.seek(entry.header_offset + _LOCAL_HEADER - 4)
            lengths = stream.read(4)
            names = int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
            found.append((int(number), entry.header_offset + _LOCAL_HEADER + names, entry.file_size))
    return [(start, size) for _, start, size in sorted(found)]


def _fill(path: Path, start: int, piece: Piece, tensor: torch.Tensor, *, turned: bool = False) -> None:
    """Write a piece of a tensor to its place. Rows of a vocabulary beyond the tensor's own stay zero: a hole."""
    views = [torch.cat(piece.views(tensor)).t()] if turned else piece.views(tensor)
    handle = os.open(path, os.O_WRONLY)
    try:
        for view in views:
            flat = view if view.dim() else view.reshape(1)
            rows = max(1, PIECE * len(flat) // max(1, flat.nbytes))
            for first in range(0, len(flat), rows):
                rest = bytes_of(flat[first : first + rows])
                while rest:
                    done = os.pwrite(handle, rest, start)
                    rest, start = rest[done:], start + done
    except OSError as error:
        error.filename = str(path)
        raise
    finally:
        os.close(handle)


def _finish(folder: Path, paths: Sequence[Path], workers: int, say: Say) -> dict[str, dict[str, Any]]:
    """Have the device take the files, and hash them."""

    def finish(path: Path) -> dict[str, Any]:
        entry = file_entry(path, progress.advance)
        fsync_path(path)
        return entry

    size = sum(path.stat().st_size for path in paths)
    with ThreadPoolExecutor(max(1, workers)) as pool, Progress("checksums", size, "read", say) as progress:
        entries = pool.map(finish, paths)
        return {path.relative_to(folder).as_posix(): entry for path, entry in zip(paths, entries, strict=True)}
