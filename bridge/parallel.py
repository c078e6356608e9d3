"""How Megatron-Core spreads a model over ranks: tensor, pipeline, virtual pipeline and expert parallelism.

All of it follows from a tensor's canonical name and shape; nothing is loaded. ``pieces`` says which rank holds which part
under which name, ``join`` puts parts together. Source: megatron-core 0.16.1 ``parallel_state.py``,
``transformer/transformer_layer.py`` (layers of a stage), ``transformer/moe/experts.py``.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from .errors import BridgeError

EMBEDDING = "embedding.word_embeddings.weight"
OUTPUT = "output_layer.weight"
_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"\.experts\.local_experts\.(\d+)\.")
_MTP = re.compile(r"^mtp\.layers\.(\d+)\.")
_WHOLE = re.compile(  # what every tensor-parallel rank holds alike
    r"(layer_norm_weight|layer_norm_bias|norm\.weight|norm\.bias|router\.weight|expert_bias|gate_weight"
    r"|linear_proj\.bias|linear_fc2\.bias|linear_q_down_proj\.weight|linear_kv_down_proj\.weight"
    r"|indexer\.linear_(wq_b|wk|weights_proj)\.weight)$"
)


class Cut(NamedTuple):
    """A tensor is cut along ``axis`` into equal parts; with ``halves`` its two halves (gate over up) are, each by itself.

    What else joins several tensors, cut each by itself, is in ``sections.py``.
    """

    axis: int
    halves: bool = False


_CUTS = {
    "word_embeddings.weight": Cut(0), OUTPUT: Cut(0), "eh_proj.weight": Cut(0),
    "linear_qkv.weight": Cut(0), "linear_qkv.bias": Cut(0), "linear_q_proj.weight": Cut(0),
    "linear_q_up_proj.weight": Cut(0), "linear_kv_up_proj.weight": Cut(0), "linear_proj.weight": Cut(1),
    "self_attention.in_proj.weight": Cut(0), "self_attention.conv1d.weight": Cut(0), "self_attention.A_log": Cut(0),
    "self_attention.dt_bias": Cut(0), "self_attention.out_proj.weight": Cut(1),
    "linear_fc1.weight": Cut(0, halves=True), "linear_fc1.bias": Cut(0, halves=True), "linear_fc2.weight": Cut(1),
}  # fmt: skip
_LORA = re.compile(r"(.+)\.lora_([AB])\.default\.weight")  # PEFT's, on parallel layers: ``tuners/lora/tp_layer.py``
# Cuts that differ by where the layers are from. The local layer spec has no replicated linear layer, so its down projections
# are column-parallel.
Cuts = Mapping[str, Cut | None]
NO_CUTS: Cuts = {}
LOCAL_CUTS: Cuts = {"linear_q_down_proj.weight": Cut(0), "linear_kv_down_proj.weight": Cut(0)}
_LANGUAGE = ("decoder.", "mtp.", "embedding.", "output_layer.")


class Rank(NamedTuple):
    """One rank's place; the data-parallel copies of it are no ranks of their own here."""

    tp: int
    pp: int = 0
    ep: int = 0


@dataclass(frozen=True)
class Layout:
    """Over how many ranks a model is spread.

    ``vpp``: chunks of layers a pipeline stage has (None and 1: not interleaved). ``etp``: tensor parallelism inside an
    expert, None is ``tp``, as in Megatron. ``layer_list``: layers of each stage, or of each chunk in the order in which
    the model runs through them (chunk 0 of all stages, then chunk 1, ...). Raises BridgeError naming the flag.
    """

    tp: int = 1
    pp: int = 1
    vpp: int | None = None
    ep: int = 1
    etp: int | None = None
    layer_list: tuple[int, ...] | None = None

    def __post_init__(self) -> None:
        for flag in ("tp", "pp", "ep", "vpp", "etp"):
            value: int | None = getattr(self, flag)
            if value is not None and value < 1:
                raise BridgeError(f"--{flag} {value}: at least 1 is needed")
        if self.chunks > 1 and self.pp == 1:
            raise BridgeError(f"--vpp {self.vpp} needs --pp of at least 2: virtual stages are parts of pipeline stages")
        if self.layer_list is not None:
            allowed = {self.pp, self.pp * self.chunks}
            if len(self.layer_list) not in allowed or min(self.layer_list) < 0:
                raise BridgeError(
                    f"--num_layer_list {_words(self.layer_list)}: {' or '.join(map(str, sorted(allowed)))} numbers from 0 are "
                    f"expected for --pp {self.pp}" + (f" --vpp {self.vpp}" if self.chunks > 1 else "")
                )

    @property
    def chunks(self) -> int:
        """Chunks of layers that a stage holds; 1 when the pipeline is not interleaved."""
        return self.vpp or 1

    @property
    def expert_tp(self) -> int:
        """Ranks that share one expert."""
        return self.etp or self.tp

    def ranks(self) -> tuple[Rank, ...]:
        """Every rank that differs from the others, ordered by stage, expert rank, tensor rank.

        Dense and expert ranks are counted over the same processes, the tensor-parallel number first: with ``etp`` below
        ``tp`` only some pairs (tp, ep) exist. Raises BridgeError for an ``etp`` that does not divide ``tp``: then two
        ranks with other weights would have the same numbers, and so the same file.
        """
        if self.tp % self.expert_tp:
            raise BridgeError(f"--etp {self.etp} does not divide --tp {self.tp}: two ranks would have the same file")
        return _ranks(self)

    def layers(self, total: int) -> tuple[tuple[range, ...], ...]:
        """The layers of each stage's chunks: ``[stage][chunk]`` -> numbers over the whole model.

        Raises BridgeError when ``total`` cannot be spread so.
        """
        counts = self._counts(total)
        starts = [sum(counts[:number]) for number in range(len(counts))]
        spans = [range(start, start + count) for start, count in zip(starts, counts, strict=True)]
        return tuple(tuple(spans[stage :: self.pp]) for stage in range(self.pp))

    def megatron_layout(self, total: int, mtp: int) -> str | None:
        """The layers as ``--pipeline-model-parallel-layout`` writes them (``Et*2|t*3,L``); None when they are even."""
        if self.layer_list is None:
            return None
        stages = [f"t*{count}" if count else "" for count in self._counts(total)]
        stages[0] = f"E{stages[0]}"
        stages[-1] += ("m" * mtp) + "L"
        return "|".join(stages)

    def _counts(self, total: int) -> list[int]:
        """Layers of each chunk in the order in which the model runs through them."""
        places = self.pp * self.chunks
        if self.layer_list is None:
            if total % places:
                flags = f"--pp {self.pp}" + (f" x --vpp {self.vpp}" if self.chunks > 1 else "")
                raise BridgeError(f"{total} layers cannot be spread evenly over {flags}; give --num_layer_list")
            return [total // places] * places
        if sum(self.layer_list) != total:
            raise BridgeError(
                f"--num_layer_list {_words(self.layer_list)} makes {sum(self.layer_list)} layers, the model has {total}"
            )
        if len(self.layer_list) == places:
            return list(self.layer_list)
        if any(count % self.chunks for count in self.layer_list):
            raise BridgeError(
                f"--num_layer_list {_words(self.layer_list)}: a stage's layers are not divisible by --vpp {self.vpp}; "
                f"give all {places} numbers"
            )
        return [count // self.chunks for count in self.layer_list] * self.chunks


class Model(NamedTuple):
    """What the spreading of one tensor depends on beside its own name: see ``model_of``."""

    layers: int
    experts: int  # of a layer; 0 without
    mtp: int  # multi-token prediction layers
    tied: bool
    sections: Mapping[str, tuple[int, ...]] = MappingProxyType({})  # see ``sections.py``
    tower: bool = False  # a vision tower is beside the language model


class Piece(NamedTuple):
    """The part of a canonical tensor on one rank: its ranges along ``axis``, one after the other (all when None)."""

    rank: Rank
    chunk: int
    name: str
    axis: int | None
    ranges: tuple[tuple[int, int], ...]

    def shape(self, whole: Sequence[int]) -> tuple[int, ...]:
        """The shape of this part of a tensor of the shape ``whole``."""
        if self.axis is None:
            return tuple(whole)
        size = sum(stop - start for start, stop in self.ranges)
        return (*whole[: self.axis], size, *whole[self.axis + 1 :])

    def views(self, tensor: torch.Tensor) -> list[torch.Tensor]:
        """The parts of the canonical tensor that lie one after the other in this piece; nothing is copied."""
        if self.axis is None:
            return [tensor]
        size = tensor.shape[self.axis]  # less than planned for a vocabulary that the plan has padded
        bounds = [(min(start, size), min(stop, size)) for start, stop in self.ranges]
        return [tensor.narrow(self.axis, start, stop - start) for start, stop in bounds]


class Slot(NamedTuple):
    """Where a rank keeps its part of a tensor: under ``name``, after the parts of a lower ``order`` that share the name.

    ``turned``: it is transposed. ``axis``: along which the shapes of those that share a name add up; their bytes follow
    one another.
    """

    name: str
    order: int = 0
    turned: bool = False
    axis: int = 0


def layers_of(names: Collection[str]) -> int:
    """How many decoder layers these names speak of, counted from 0. Raises BridgeError when a number is missing."""
    return _count({int(found[1]) for name in names if (found := _LAYER.match(name))}, "decoder.layers")


def model_of(names: Collection[str]) -> Model:
    """Layers, experts and so on of a model by its canonical names. Raises BridgeError when numbers are missing."""
    experts: dict[str, set[int]] = {}
    for name in names:
        if found := _EXPERT.search(name):
            experts.setdefault(name[: found.start()], set()).add(int(found[1]))
    counts = {prefix: _count(numbers, f"{prefix}.experts.local_experts") for prefix, numbers in experts.items()}
    if len(set(counts.values())) > 1:
        raise BridgeError(f"the layers have different numbers of experts: {sorted(set(counts.values()))}")
    mtp = _count({int(found[1]) for name in names if (found := _MTP.match(name))}, "mtp.layers")
    tower = any(map(is_carried, names))
    return Model(layers_of(names), next(iter(counts.values()), 0), mtp, OUTPUT not in names, tower=tower)


def cut_of(name: str, *, cuts: Cuts = NO_CUTS) -> Cut | None:
    """How a tensor is cut over tensor-parallel ranks, None when each of them holds all of it.

    ``name`` may be canonical or a rank's. ``cuts`` go before what holds for TransformerEngine's layers. Raises BridgeError
    for a name of which this is not known.
    """
    if is_carried(name):
        return None
    if lora := _LORA.fullmatch(name):  # the factor on the side on which the layer's own weight is cut is cut alike
        cut = cut_of(f"{lora[1]}.weight", cuts=cuts)
        return cut if cut and cut.axis == (lora[2] == "A") else None
    parts = name.split(".")
    for key in (".".join(parts[-2:]), ".".join(parts[-3:])):
        if key in cuts:
            return cuts[key]
        if key in _CUTS:
            return _CUTS[key]
    if _WHOLE.search(name):
        return None
    raise BridgeError(f"tensor {name}: how Megatron-Core spreads it over ranks is not known; it cannot be converted")


def is_expert(name: str) -> bool:
    """Whether a tensor belongs to one expert (not to a shared one)."""
    return bool(_EXPERT.search(name))


def is_carried(name: str) -> bool:
    """Whether a tensor is none of the language model's: that of a vision tower, which goes along under its own name.

    Every tensor-parallel rank of the first stage holds it whole.
    """
    return not name.startswith(_LANGUAGE)


def shift(name: str, layers: int, experts: int) -> str:
    """A name with its layer's and expert's number moved by so much: from a rank's own counting to the model's or back."""
    name = _LAYER.sub(lambda found: f"decoder.layers.{int(found[1]) + layers}.", name)
    return _EXPERT.sub(lambda found: f".experts.local_experts.{int(found[1]) + experts}.", name)


def pieces(name: str, shape: Sequence[int], layout: Layout, model: Model, *, cuts: Cuts = NO_CUTS) -> list[Piece]:
    """Every rank that holds a part of the canonical tensor ``name``, with the part and its name there.

    A tied embedding has a copy as output layer on the last stage, and the stage of multi-token prediction has a copy of
    the embedding. Raises BridgeError when the shape cannot be cut so.
    """
    ep, first_expert = None, 0
    if expert := _EXPERT.search(name):
        if model.experts % layout.ep:
            raise BridgeError(f"--ep {layout.ep}: {model.experts} experts cannot be spread evenly")
        per_rank = model.experts // layout.ep
        ep = int(expert[1]) // per_rank
        first_expert = ep * per_rank
    ranges = _ranges(name, shape, layout, model.sections.get(name), cuts=cuts)
    cut = cut_of(name, cuts=cuts)
    found: list[Piece] = []
    for stage, chunk, first_layer, here in _places(name, layout, model):
        local = shift(here, -first_layer, -first_expert)
        for rank in _ranks_of(layout, stage, ep):
            axis = cut.axis if cut and len(ranges) > 1 else None
            found.append(Piece(rank, chunk, local, axis, ranges[rank.tp % len(ranges)]))
    return found


def part_count(name: str, layout: Layout, *, cuts: Cuts = NO_CUTS) -> int:
    """Into how many parts a tensor is cut; rank ``tp`` holds part ``tp % part_count``."""
    cut = cut_of(name, cuts=cuts)
    return (layout.expert_tp if is_expert(name) else layout.tp) if cut else 1


def join(
    name: str, parts: Sequence[torch.Tensor], sections: Sequence[int] | None = None, *, cuts: Cuts = NO_CUTS
) -> torch.Tensor:
    """The tensor of its parts 0, 1, ... (``part_count`` of them); a single one is given as it is.

    ``sections``: see ``sections.py``.
    """
    cut = cut_of(name, cuts=cuts)
    if not cut or len(parts) == 1:
        return parts[0]
    sizes = _sections(cut, len(parts) * parts[0].shape[cut.axis], sections)
    split = [part.split([size // len(parts) for size in sizes], cut.axis) for part in parts]
    return torch.cat([piece for pieces in zip(*split, strict=True) for piece in pieces], cut.axis)


def joined_shape(name: str, shape: Sequence[int], layout: Layout, *, cuts: Cuts = NO_CUTS) -> tuple[int, ...]:
    """The shape of the canonical tensor when a rank's part has ``shape``."""
    cut = cut_of(name, cuts=cuts)
    if not cut:
        return tuple(shape)
    parts = part_count(name, layout, cuts=cuts)
    return (*shape[: cut.axis], shape[cut.axis] * parts, *shape[cut.axis + 1 :])


def padded_rows(rows: int, divisible_by: int, tp: int) -> int:
    """Rows of the vocabulary as Megatron pads them: a multiple of ``divisible_by`` on every rank."""
    return -(-rows // (divisible_by * tp)) * divisible_by * tp


def check_layout(layout: Layout, args: Mapping[str, Any]) -> None:
    """Raise BridgeError naming the flag when a model with these Megatron arguments cannot be spread so; absent ones pass."""
    if args.get("num_layers"):
        layout.layers(args["num_layers"])
    heads = args.get("num_attention_heads")
    if heads and heads % layout.tp:
        raise BridgeError(
            f"--tp {layout.tp}: {heads} attention heads cannot be spread evenly; choose a divisor of {heads}"
        )
    groups = args.get("num_query_groups")
    if groups and not args.get("multi_latent_attention") and groups % layout.tp:
        raise BridgeError(
            f"--tp {layout.tp}: the model has {groups} query groups (key/value heads), and a group cannot be split or "
            f"repeated over ranks; choose a divisor of {groups}"
        )
    keys = args.get("linear_num_key_heads") if args.get("experimental_attention_variant") == "gated_delta_net" else None
    if keys and keys % layout.tp:
        raise BridgeError(
            f"--tp {layout.tp}: {keys} linear key heads cannot be spread evenly; choose a divisor of {keys}"
        )
    experts = args.get("num_experts")
    if experts and experts % layout.ep:
        raise BridgeError(f"--ep {layout.ep}: {experts} experts cannot be spread evenly; choose a divisor of {experts}")
    if layout.ep > 1 and not experts and "num_experts" in args:
        raise BridgeError(f"--ep {layout.ep}: the model has no experts; leave it out")
    sizes = {"ffn_hidden_size": "tp", "moe_shared_expert_intermediate_size": "tp", "moe_ffn_hidden_size": "etp"}
    for key, flag in sizes.items():
        value, parts = args.get(key), layout.expert_tp if flag == "etp" else layout.tp
        if value and value % parts:
            raise BridgeError(f"--{flag} {parts}: {key} {value} cannot be spread evenly; choose a divisor of it")


def _words(numbers: Sequence[int]) -> str:
    return ",".join(map(str, numbers))


def _count(numbers: set[int], what: str) -> int:
    if numbers and numbers != set(range(len(numbers))):
        missing = min(set(range(max(numbers))) - numbers)
        raise BridgeError(f"{what}.{missing} is missing, {what}.{max(numbers)} is there")
    return len(numbers)


@cache
def _ranks(layout: Layout) -> tuple[Rank, ...]:
    processes = range(layout.tp * layout.expert_tp * layout.ep)  # after so many the pairs repeat
    pairs = {(number // layout.expert_tp % layout.ep, number % layout.tp) for number in processes}
    return tuple(Rank(tp, stage, ep) for stage in range(layout.pp) for ep, tp in sorted(pairs))


@cache
def _ranks_of(layout: Layout, stage: int, ep: int | None) -> tuple[Rank, ...]:
    return tuple(rank for rank in layout.ranks() if rank.pp == stage and ep in (None, rank.ep))


@cache
def _place_of_layers(layout: Layout, total: int) -> tuple[tuple[int, int, int], ...]:
    """Of each layer: stage, chunk, first layer of that chunk."""
    spans = layout.layers(total)
    placed = [
        (layer, (stage, chunk, span.start))
        for stage, chunks in enumerate(spans)
        for chunk, span in enumerate(chunks)
        for layer in span
    ]
    return tuple(place for _, place in sorted(placed))


def _places(name: str, layout: Layout, model: Model) -> list[tuple[int, int, int, str]]:
    """Where a tensor is: stage, chunk, first layer of that chunk, its name there in the model's counting."""
    last = (layout.pp - 1, layout.chunks - 1, 0)
    if found := _LAYER.match(name):
        return [(*_place_of_layers(layout, model.layers)[int(found[1])], name)]
    if is_carried(name):
        return [(0, 0, 0, name)]
    if not name.startswith("embedding."):
        return [(*last, name)]
    places = [(0, 0, 0, name)]
    if layout.pp > 1 and model.mtp:
        places.append((*last, name))
    if layout.pp > 1 and model.tied:
        places.append((*last, OUTPUT))
    return places


def _sections(cut: Cut, size: int, sections: Sequence[int] | None) -> Sequence[int]:
    """Sizes along the cut axis of what is cut each by itself."""
    return sections or ((size // 2, size - size // 2) if cut.halves else (size,))


def _ranges(
    name: str, shape: Sequence[int], layout: Layout, sections: Sequence[int] | None, *, cuts: Cuts
) -> list[tuple[tuple[int, int], ...]]:
    """Of each part its ranges along the cut axis; none for a tensor that is not cut."""
    cut = cut_of(name, cuts=cuts)
    parts = part_count(name, layout, cuts=cuts)
    if not cut or parts == 1:
        return [()]
    sizes = _sections(cut, shape[cut.axis], sections)
    if any(size % parts for size in sizes):
        flag = "etp" if is_expert(name) and layout.etp else "tp"
        raise BridgeError(
            f"--{flag} {parts}: tensor {name} {tuple(shape)} cannot be cut evenly along dimension {cut.axis}"
        )
    places = [(sum(sizes[:number]), size // parts) for number, size in enumerate(sizes)]
    return [tuple((start + part * step, start + (part + 1) * step) for start, step in places) for part in range(parts)]
