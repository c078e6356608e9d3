"""Read Megatron's older checkpoint format ``torch``: one file a rank, ``mp_rank_TT[_PPP][_EEE]/model_optim_rng.pt``.

``RankFiles`` finds and opens the files and says how the model is spread over them, ``TorchCheckpoint`` gives the
canonical model, tensor by tensor; without Megatron. ``torch_writer.py`` writes the format. Source: Megatron-LM
``megatron/training/checkpointing.py`` (names of files, what a file holds).
"""

import re
from argparse import Namespace
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, Self

import torch

from ..storage.megatron_folder import TRACKER
from ..storage.safe_pickle import load_namespace_file
from . import mindspeed
from .dialects import canonical_names, cuts_of, dialects_of, ungrouped, unwrapped
from .errors import BridgeError
from .parallel import (
    EMBEDDING,
    LOCAL_CUTS,
    NO_CUTS,
    OUTPUT,
    Cuts,
    Layout,
    Rank,
    join,
    joined_shape,
    layers_of,
    model_of,
    part_count,
    pieces,
    shift,
)
from .sections import sections_of

FILE = "model_optim_rng.pt"
VERSION = 3.0  # of the order of rows in linear_qkv
_RANK = re.compile(r"mp_rank_(\d{2,})(?:_(\d{3,}))?(?:_(\d{3,}))?")
_CHUNK = re.compile(r"model(\d*)")
_POLICY, _REFERENCE = "policy_model", "ref_model"
_DROPPED = f"a checkpoint of a DPO run: the reference model ({_REFERENCE}) is left out, the policy is the model"
_READ = {"args", "checkpoint_version", "iteration"}
_SIZES = {  # a field of Layout -> its name among the training arguments
    "tp": "tensor_model_parallel_size", "pp": "pipeline_model_parallel_size", "ep": "expert_model_parallel_size",
    "etp": "expert_tensor_parallel_size", "vpp": "virtual_pipeline_model_parallel_size",
}  # fmt: skip

Tensor = torch.Tensor | mindspeed.Woven
State = dict[str, Tensor]  # one chunk of one rank, by canonical name in that rank's own counting


def tracked(folder: Path) -> Path:
    """Where the files of a Megatron checkpoint lie: the folder itself, or the one that its tracker file names.

    Raises FileNotFoundError, BridgeError when the tracker names none.
    """
    tracker = folder / TRACKER
    if not tracker.is_file():
        return folder
    text = tracker.read_text(encoding="utf-8", errors="replace").strip()
    if not text.isdecimal() and text != "release":
        raise BridgeError(f'{tracker}: says {text[:40]!r}; "release" or an iteration is expected')
    found = folder / (text if text == "release" else f"iter_{int(text):07d}")
    if not found.is_dir():
        raise FileNotFoundError(f"{found}: {tracker.name} names this checkpoint, but it is missing")
    return found


def checkpoint_folder(folder: Path) -> Path:
    """The folder with the ranks' files: ``folder`` itself, or the one that its tracker file names.

    Raises FileNotFoundError, BridgeError when there is no such checkpoint.
    """
    folder = tracked(folder)
    if not folder.is_dir():
        raise FileNotFoundError(f"{folder}: no such folder")
    if any(_RANK.fullmatch(path.name) for path in folder.iterdir()):
        return folder
    if any(folder.glob("*.distcp")):
        raise BridgeError(f"{folder}: a checkpoint of the format torch_dist, not torch")
    raise BridgeError(f"{folder}: no {TRACKER} and no folder mp_rank_00 or the like: no checkpoint of the format torch")


def rank_folder(rank: Rank, layout: Layout) -> str:
    """The name of the folder in which a rank's file lies."""
    stage = f"_{rank.pp:03d}" if layout.pp > 1 else ""
    return f"mp_rank_{rank.tp:02d}{stage}" + (f"_{rank.ep:03d}" if layout.ep > 1 else "")


class RankFiles:
    """The opened files of a checkpoint; nothing but their headers is read.

    ``args``, ``iteration`` (None for a release), ``said`` (what is not taken over), ``layout``, ``layers`` (their number),
    ``cuts`` (see ``parallel.cut_of``), ``dialects`` whose names the files have, and ``states``: of each rank its chunks.
    Raises BridgeError, FileNotFoundError, UnsafeFileError when a file is missing, broken, or at odds with the others or
    with the arguments.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        contents = {
            path.name: load_namespace_file(path / FILE)
            for path in sorted(folder.iterdir())
            if _RANK.fullmatch(path.name)
        }
        arguments = {name: _arguments(content, folder / name / FILE) for name, content in contents.items()}
        self.args = next(iter(arguments.values()))
        for name, args in arguments.items():
            if _sizes(args) != _sizes(self.args):
                raise BridgeError(
                    f"{folder / name / FILE}: is of another run: {_sizes(args)}, others {_sizes(self.args)}"
                )
        mindspeed.check_args(self.args, folder)
        self._extended = bool(self.args.get("moe_tp_extend_ep"))
        number = re.fullmatch(r"iter_(\d+)", folder.name)
        self.iteration = int(number[1]) if number else None
        self.said = _skipped(contents, folder)
        chunks = {name: _chunks(content, folder / name / FILE, self.said) for name, content in contents.items()}
        self.layout = self._layout(chunks)
        self.states: dict[Rank, list[State]] = {}
        for name, states in chunks.items():
            self.states[self._rank(name)] = [_canonical(state, self.args, self.layout) for state in states]
        every = [state for states in chunks.values() for state in states]
        self.cuts = next((cuts for cuts in map(_cuts, every) if cuts), NO_CUTS)
        names = {name for states in self.states.values() for state in states for name in state}
        if not any("norm" in name for name in names) and self.args.get("transformer_impl") == "local":
            self.cuts = LOCAL_CUTS  # LoRA alone: no norm tells
        self.dialects = dialects_of({name for state in every for name in state}, names)
        self.layout, self.layers = self._with_layers()

    def path(self, rank: Rank) -> Path:
        """A rank's file."""
        return self.folder / self._folder(rank, self.layout) / FILE

    def _folder(self, rank: Rank, layout: Layout) -> str:
        """The name of a rank's folder; where tensor-parallel ranks have experts of their own, it leaves their number out."""
        if not self._extended:
            return rank_folder(rank, layout)
        return rank_folder(rank._replace(ep=rank.ep // layout.tp), replace(layout, ep=layout.ep // layout.tp))

    def _layout(self, chunks: Mapping[str, Sequence[Mapping[str, object]]]) -> Layout:
        """How many ranks of each kind, from the arguments and the names of the folders. Raises BridgeError."""
        numbers = [[int(part) for part in _RANK.fullmatch(name).groups() if part] for name in chunks]  # pyright: ignore[reportOptionalMemberAccess]
        counts = {len(states) for states in chunks.values()}
        if len({len(one) for one in numbers}) > 1 or len(counts) > 1:
            raise BridgeError(f"{self.folder}: its folders are of several checkpoints: {', '.join(chunks)}")
        if any(_SIZES[flag] in self.args for flag in ("tp", "pp", "ep")):
            layout = Layout(**_sizes(self.args))
            if _SIZES["vpp"] not in self.args and max(counts) > 1:  # MindSpeed's converter notes another size
                layout = replace(layout, vpp=max(counts))
            if self._extended:
                layout = replace(layout, ep=layout.ep * layout.tp, etp=1)
        else:
            most = [max(column) + 1 for column in zip(*numbers, strict=True)]
            if len(most) == 2 and all(_ends(states) for states in chunks.values()):  # noqa: PLR2004 - mp_rank_TT_EEE
                most.insert(1, 1)
            layout = Layout(*most[:2], vpp=max(counts) if max(counts) > 1 else None, ep=most[2] if len(most) > 2 else 1)  # noqa: PLR2004
        self._check_names(chunks, layout)
        if counts != {layout.chunks}:
            raise BridgeError(
                f"{self.folder}: its files hold {max(counts)} chunks of layers, its arguments say {layout.chunks}"
            )
        return layout

    def _check_names(self, names: Mapping[str, Any], layout: Layout) -> None:
        needed = {self._folder(rank, layout) for rank in layout.ranks()}
        grid = [Rank(t, p, e) for t in range(layout.tp) for p in range(layout.pp) for e in range(layout.ep)]
        sizes = f"TP {layout.tp}, PP {layout.pp}, EP {layout.ep}"
        if stray := sorted(names.keys() - {self._folder(rank, layout) for rank in grid}):
            raise BridgeError(
                f"{self.folder / stray[0]}: no folder of a checkpoint with {sizes}, which its arguments say"
            )
        if lost := sorted(needed - names.keys()):
            raise BridgeError(f"{self.folder / lost[0] / FILE}: missing; the checkpoint has {sizes}")

    def _rank(self, name: str) -> Rank:
        parts = [int(part) for part in name.removeprefix("mp_rank_").split("_")]
        stage = parts[1] if self.layout.pp > 1 else 0
        if not self._extended:
            return Rank(parts[0], stage, parts[-1] if self.layout.ep > 1 else 0)
        group = parts[-1] if self.layout.ep > self.layout.tp else 0
        return Rank(parts[0], stage, group * self.layout.tp + parts[0])

    def _with_layers(self) -> tuple[Layout, int]:
        """The layout with the layers that each chunk really holds, and how many there are in all."""
        pp, chunks = self.layout.pp, self.layout.chunks
        counts = [layers_of(self.states[Rank(0, stage)][chunk]) for chunk in range(chunks) for stage in range(pp)]
        uneven = tuple(counts) if len(set(counts)) > 1 else None
        return replace(self.layout, layer_list=uneven), sum(counts)


class _Part(NamedTuple):
    """What one rank holds of a canonical tensor."""

    rank: Rank
    chunk: int
    name: str  # canonical, in the rank's own counting
    tensor: Tensor


class TorchCheckpoint:
    """A checkpoint of the format ``torch`` as the canonical model; use it as a context manager.

    ``shapes`` and ``dtypes`` by canonical name; ``args``: the training arguments in the files; ``iteration``: None for a
    release; ``layout``: over which ranks it is spread; ``dialects`` that have its names; ``said``: what is not taken over.
    Files are mapped: opening reads no weights. ``vocab_size``: rows of the vocabulary to keep, else what the arguments
    name; the others are Megatron's padding. Raises BridgeError, FileNotFoundError, UnsafeFileError when a file is missing,
    broken, or at odds with the others or with the arguments.
    """

    def __init__(self, folder: Path, *, vocab_size: int | None = None) -> None:
        self._files = RankFiles(checkpoint_folder(folder))
        self.folder, self.layout, self.args = self._files.folder, self._files.layout, self._files.args
        self.iteration, self.said = self._files.iteration, list(self._files.said)
        self.dialects = self._files.dialects
        self._parts = self._collect()
        self.shapes = {
            name: joined_shape(name, parts[0].tensor.shape, self.layout, cuts=self._files.cuts)
            for name, parts in self._parts.items()
        }
        self.dtypes = {name: parts[0].tensor.dtype for name, parts in self._parts.items()}
        self._model = model_of(self.shapes)._replace(sections=sections_of(self.shapes))
        self._check()
        self._unpad(vocab_size)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, where: TracebackType | None
    ) -> None:
        self._parts.clear()
        self._files.states.clear()

    def get(self, name: str) -> torch.Tensor:
        """One tensor in its stored dtype: a view of the file when a rank holds all of it, else joined in memory.

        Raises KeyError, and BridgeError when ranks that must hold the same do not.
        """
        count = part_count(name, self.layout, cuts=self._files.cuts)
        chosen: dict[int, _Part] = {}
        for part in self._parts[name]:
            one = chosen.setdefault(part.rank.tp % count, part)
            if one is not part and not _same(one.tensor, part.tensor) and not self._is_idle(part):
                raise BridgeError(
                    f"{self._files.path(part.rank)}: {part.name} is not equal to {one.name} in "
                    f"{self._files.path(one.rank).parent.name}; both must be the same part of {name}"
                )
        sections = self._model.sections.get(name)
        parts = [_whole(chosen[number].tensor) for number in range(count)]
        whole = join(name, parts, sections, cuts=self._files.cuts)
        return whole[: self.shapes[name][0]] if name in (EMBEDDING, OUTPUT) else whole

    def _is_idle(self, part: _Part) -> bool:
        """Whether it is the output layer of a tied model beside multi-token prediction: Megatron never uses that copy."""
        return part.name == OUTPUT and self._model.tied and self._model.mtp > 0

    def _collect(self) -> dict[str, list[_Part]]:
        """The parts of every canonical tensor, in the order of the model."""
        tied = self.args.get("untie_embeddings_and_output_weights") is False
        spans = self.layout.layers(self._files.layers)
        found: dict[str, list[_Part]] = {}
        for chunk in range(self.layout.chunks):
            for rank in sorted(self._files.states, key=lambda rank: (rank.pp, rank.ep, rank.tp)):
                state = self._files.states[rank][chunk]
                experts = model_of(state).experts * rank.ep
                for name, tensor in state.items():
                    whole = EMBEDDING if tied and name == OUTPUT else shift(name, spans[rank.pp][chunk].start, experts)
                    found.setdefault(whole, []).append(_Part(rank, chunk, name, tensor))
        return found

    def _check(self) -> None:
        """Raise BridgeError unless the ranks hold exactly what the layout says, in equal shapes and dtypes."""
        grid = set(self.layout.ranks())
        for name, parts in self._parts.items():
            found = pieces(name, self.shapes[name], self.layout, self._model, cuts=self._files.cuts)
            wanted = {self._place(name, piece.rank, piece.chunk, piece.name): piece for piece in found}
            missing = dict(wanted)
            for part in parts:
                path = self._files.path(part.rank)
                place = self._place(name, *part[:3])
                missing.pop(place, None)
                if place not in wanted and part.rank in grid:
                    raise BridgeError(f"{path}: tensor {part.name} is not expected there; it is a part of {name}")
                if (mine := _kind(part.tensor)) != (other := _kind(parts[0].tensor)):
                    where = self._files.path(parts[0].rank).parent.name
                    raise BridgeError(f"{path}: tensor {part.name} is {mine}, in {where} it is {other}")
            for piece in missing.values():
                path = self._files.path(piece.rank)
                raise BridgeError(f"{path}: tensor {piece.name} is missing; it is a part of {name}")

    def _place(self, name: str, rank: Rank, chunk: int, local: str) -> tuple[object, ...]:
        """Where a part must be: the stage of multi-token prediction, with its copy of the embedding, may be any."""
        free = name.startswith("mtp.") or (local == EMBEDDING and self._model.mtp)
        return (rank.tp, rank.ep, local) if free else (*rank, chunk, local)

    def _unpad(self, vocab_size: int | None) -> None:
        """Leave the vocabulary's padding out. Raises BridgeError when there are fewer rows than asked for."""
        asked = vocab_size or self.args.get("vocab_size")
        for name in (EMBEDDING, OUTPUT):
            if not asked or name not in self.shapes:
                continue
            rows, *rest = self.shapes[name]
            if asked > rows:
                raise BridgeError(f"{self.folder}: {name} has {rows} rows, a vocabulary of {asked} is asked for")
            if asked < rows:
                self.said.append(f"{name}: the last {rows - asked} of {rows} rows are padding and left out")
            self.shapes[name] = (asked, *rest)


def _sizes(args: Mapping[str, Any]) -> dict[str, Any]:
    """The parallel sizes that training arguments name."""
    return {flag: args[key] for flag, key in _SIZES.items() if args.get(key)}


def _arguments(content: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """The training arguments in a file. Raises BridgeError for a checkpoint of an older form."""
    version = content.get("checkpoint_version", 0)
    if version != VERSION:
        raise BridgeError(
            f"{path}: checkpoint_version {version}; only {VERSION} is read: older ones order the rows of linear_qkv otherwise"
        )
    args = content.get("args")
    return dict(vars(args)) if isinstance(args, Namespace) else {}


def _skipped(contents: Mapping[str, Mapping[str, Any]], folder: Path) -> list[str]:
    """What the files hold beside the model, in words."""
    keys = {key for content in contents.values() for key in content if key not in _READ and not _CHUNK.fullmatch(key)}
    names = {path.name for path in folder.glob("mp_rank_*/*") if path.name != FILE}
    return [f"{folder}: not taken over: {', '.join(sorted(keys | names))}"] if keys | names else []


def _policy(state: Mapping[Any, Any], where: str, said: list[str]) -> Mapping[Any, Any]:
    """The trained one of the two models that a DPO run of AutoAlign saves: its state dict holds the other one once more."""
    if _POLICY not in state:
        return state
    if set(state) != {_POLICY, _REFERENCE} or not isinstance(state[_POLICY], dict):
        raise BridgeError(f"{where} holds {', '.join(map(str, state))}; {_POLICY} and {_REFERENCE} are expected")
    if _DROPPED not in said:
        said.append(_DROPPED)
    return {name: value for name, value in state[_POLICY].items() if not str(name).startswith(f"{_REFERENCE}.")}


def _chunks(content: Mapping[str, Any], path: Path, said: list[str]) -> list[dict[str, torch.Tensor]]:
    """The state dicts in a file, of each chunk, without entries that are no weights; ``said`` gets lines."""
    keys = sorted(key for key in content if _CHUNK.fullmatch(key))
    if keys != ["model"] and (not keys or set(keys) != {f"model{number}" for number in range(len(keys))}):
        raise BridgeError(f"{path}: no model in it; it holds {', '.join(map(str, content))}")
    chunks: list[dict[str, torch.Tensor]] = []
    for key in sorted(keys, key=lambda key: int(key.removeprefix("model") or 0)):
        if not isinstance(content[key], dict):
            raise BridgeError(f"{path}: {key} is a {type(content[key]).__name__}; tensors by name are expected")
        whole = _policy(content[key], f"{path}: {key}", said)
        state = {name: value for name, value in whole.items() if not str(name).endswith("_extra_state")}
        for name, value in state.items():
            if not isinstance(name, str) or not isinstance(value, torch.Tensor) or value.layout != torch.strided:
                raise BridgeError(f"{path}: {name} in {key} is a {type(value).__name__}, no plain tensor by name")
        chunks.append(state)
    return chunks


def _canonical(state: Mapping[str, torch.Tensor], args: Mapping[str, Any], layout: Layout) -> State:
    """A rank's state dict by canonical names, in its own counting."""
    bare: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if bare.setdefault(unwrapped(name), tensor) is not tensor:
            raise BridgeError(f"tensor {unwrapped(name)} is there under two names, one of them is {name}")
    parted = mindspeed.parted(ungrouped(bare, layout.ep), args, layout.tp)
    result: State = {}
    for name, canonical in canonical_names(parted).items():
        if canonical in result:
            raise BridgeError(f"tensor {canonical} is there under two names, one of them is {name}")
        tensor = parted[name]
        result[canonical] = tensor if isinstance(tensor, mindspeed.Woven) else tensor.detach()
    return result


def _cuts(state: Mapping[str, torch.Tensor]) -> Cuts:
    return cuts_of({name: tuple(tensor.shape) for name, tensor in state.items()})


def _whole(tensor: Tensor) -> torch.Tensor:
    return tensor.whole() if isinstance(tensor, mindspeed.Woven) else tensor


def _ends(states: Sequence[Mapping[str, object]]) -> bool:
    """Whether a rank holds the begin and the end of a model, which no single stage of a pipeline does."""
    names = {name for state in states for name in state}
    return {"embedding.word_embeddings.weight", "decoder.final_layernorm.weight"} <= names


def _kind(tensor: Tensor) -> str:
    return f"{tuple(tensor.shape)} {tensor.dtype}"


def _same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors of one dtype hold the same bits; NaN is equal to itself."""
    if isinstance(one, mindspeed.Woven) and isinstance(other, mindspeed.Woven):
        return all(map(_same, one.parts, other.parts))
    one, other = _whole(one), _whole(other)
    whole = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[one.element_size()]
    return torch.equal(one.view(whole), other.view(whole))
