"""What one rank holds for parameters, gradients and the optimizer, and its highest marks: DeepSpeed's ZeRO, or none.

Read off the allocations of DeepSpeed 0.19 (``runtime/zero/stage_1_and_2.py``, ``stage3.py``, ``partition_parameters.py``)
and compared with those of real ranks in ``tests/distributed/test_memory.py``. The optimizer is AdamW with two moments.

============================== ======================================== ===========================================
what                           ZeRO-1 and ZeRO-2                        ZeRO-3
============================== ======================================== ===========================================
parameters                     all, trained ones in a buffer a group    this rank's part, small ones whole besides
master weights, moments        this rank's part                         this rank's part
gradients between micro-steps  parameters that touch this rank's part   this rank's part, always
in backward                    one or two buckets, and these gradients  a bucket, the parameters that are gathered
                               once more
============================== ======================================== ===========================================
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn
from transformers.trainer_pt_utils import get_parameter_names

from ..ds_configs.resolve import zero_stage
from .memory import Moment

_STEP = 4  # bytes of AdamW's own step counter, one a parameter group


@dataclass(frozen=True)
class Weight:
    """One parameter: its elements, bytes an element, whether it is trained and whether weight decay applies."""

    name: str
    numel: int
    size: int
    trained: bool
    decays: bool


@dataclass(frozen=True)
class Zero:
    """The settings that decide what is held. ``stage`` 0 is a run without DeepSpeed.

    ``master`` and ``moment`` are bytes an element; buckets and thresholds are elements; offloading is to the CPU.
    """

    stage: int = 0
    bucket: int = 0
    buckets: int = 1
    master: int = 4
    moment: int = 4
    persistent: int = 0
    live: int = 0
    prefetched: int = 0
    sub_group: int = 0
    optimizer_offloaded: bool = False
    weights_offloaded: bool = False


@dataclass(frozen=True)
class Held:
    """Bytes of one rank between two micro-batches of a step; ``host`` is memory of the machine, the rest of the device."""

    weights: int
    gradients: int
    master: int
    moments: int
    buffers: int = 0
    host: int = 0

    @property
    def device(self) -> int:
        """All of the device."""
        return self.weights + self.gradients + self.master + self.moments + self.buffers


def read_zero(settings: Mapping[str, Any] | None, hidden_size: int) -> Zero:
    """The settings with DeepSpeed's defaults, and with what transformers puts in the place of ``"auto"``."""
    stage = zero_stage(dict(settings or {}))
    if not settings or not stage:
        return Zero()
    zero: Mapping[str, Any] = settings["zero_optimization"]
    auto = {
        "reduce_bucket_size": hidden_size**2, "stage3_prefetch_bucket_size": int(0.9 * hidden_size**2),
        "stage3_param_persistence_threshold": 10 * hidden_size,
    }  # fmt: skip

    def number(name: str, default: float) -> int:
        value = zero.get(name, default)
        return int(auto[name] if value == "auto" else value)

    def offloaded(name: str) -> bool:
        return ((zero.get(name) or {}).get("device") or "none") != "none"

    bf16: Mapping[str, Any] = settings.get("bf16", {})
    overlap = zero.get("overlap_comm", stage == 3)  # noqa: PLR2004
    return Zero(
        stage=stage,
        bucket=number("reduce_bucket_size", 5e8),
        buckets=2 if overlap and stage < 3 else 1,  # noqa: PLR2004
        master=2 if bf16.get("bf16_master_weights_and_grads") else 4,
        moment=2 if bf16.get("bf16_optimizer_states") else 4,
        persistent=number("stage3_param_persistence_threshold", 1e5),
        live=number("stage3_max_live_parameters", 1e9),
        prefetched=number("stage3_prefetch_bucket_size", 5e7),
        sub_group=number("sub_group_size", 1e9),
        optimizer_offloaded=offloaded("offload_optimizer"),
        weights_offloaded=offloaded("offload_param"),
    )


def held(weights: Sequence[Weight], zero: Zero, ranks: int, *, accumulates: bool) -> Held:
    """What the fullest rank holds when the optimizer's state exists; ``accumulates``: a step has several micro-batches."""
    groups = _groups(weights)
    frozen = [weight for weight in weights if not weight.trained]
    if zero.stage == 0:
        trained = sum(weight.numel * weight.size for group in groups for weight in group)
        states = sum(len(group) * _STEP for group in groups)
        return Held(trained + _bytes(frozen), trained, 0, 2 * trained + states)
    if zero.stage == 3:  # noqa: PLR2004
        return _held_by_stage_3(groups, frozen, zero, ranks)
    padded = [_padded(group, ranks) for group in groups]
    sizes = [group[0].size for group in groups]
    parts = sum(numel // ranks for numel in padded)
    inside = _own_gradients(groups, ranks)
    counters = len(groups) * _STEP
    kept = Held(
        weights=sum(numel * size for numel, size in zip(padded, sizes, strict=True)) + _bytes(frozen),
        gradients=inside if accumulates else 0,
        master=parts * zero.master,
        moments=2 * parts * zero.moment + counters,
    )
    if not zero.optimizer_offloaded:
        return kept
    largest = max(weight.numel * weight.size for group in groups for weight in group)
    half = sum(numel // ranks * size for numel, size in zip(padded, sizes, strict=True))
    host = kept.master * 2 + kept.moments + half + largest + (inside if accumulates else 0)
    return Held(kept.weights, 0, 0, 0, buffers=largest, host=host)


def _held_by_stage_3(groups: Sequence[Sequence[Weight]], frozen: Sequence[Weight], zero: Zero, ranks: int) -> Held:
    every = [weight for group in groups for weight in group]
    parts = sum(math.ceil(weight.numel / ranks) for weight in every)
    partitioned = sum(math.ceil(weight.numel / ranks) * weight.size for weight in (*every, *frozen))
    whole = sum(weight.numel * weight.size for weight in (*every, *frozen) if weight.numel <= zero.persistent)
    gradients = sum(math.ceil(weight.numel / ranks) * every[0].size for weight in every)
    counters = _STEP * len(_sub_groups(groups, zero, ranks))
    master, moments = parts * zero.master, 2 * parts * zero.moment + counters
    bucket = zero.bucket * every[0].size
    if not zero.optimizer_offloaded:
        kept = Held(partitioned + whole, gradients, master, moments, bucket)
    else:
        kept = Held(partitioned + whole, 0, 0, 0, bucket, host=gradients + 2 * master + moments)
    if zero.weights_offloaded:
        kept = replace(kept, weights=whole, host=kept.host + partitioned)
    return kept


def micro_batch(kept: Held, moments: Sequence[Moment], weights: Sequence[Weight], zero: Zero, ranks: int) -> int:
    """The highest mark of a forward and backward pass; device bytes. What a pass adds to ``kept`` comes with ``moments``."""
    size = {weight.name: weight.size for weight in weights}
    if zero.stage == 0:
        return kept.device + max(moment.peak for moment in moments)  # its gradients are there in any case
    if zero.stage == 3:  # noqa: PLR2004
        total = sum(weight.numel for weight in weights if weight.numel > zero.persistent)
        largest = max(weight.numel * weight.size for weight in weights)
        gathered = min(total, zero.live + zero.prefetched) * min(size.values())
        return kept.device + max(gathered, largest) + max(moment.peak for moment in moments)
    groups = _groups(weights)
    once = _own_gradients(groups, ranks)
    highest = filled = added = waiting = 0
    for moment in moments:
        highest = max(highest, moment.peak + added + waiting)
        if not added:
            added = zero.buckets * zero.bucket * size[moment.name]
        if filled + moment.numel > zero.bucket:
            if filled and not zero.optimizer_offloaded:
                added = zero.buckets * zero.bucket * size[moment.name] + once
            filled = waiting = 0
        filled += moment.numel
        if moment.numel > zero.bucket:  # its gradient stays where it is until the next reduction
            waiting = moment.numel * size[moment.name]
        several = min(filled, zero.bucket) * size[moment.name] if ranks > 1 else 0  # flattened for the reduction
        highest = max(highest, added + waiting + several)
    return kept.device + highest


def optimizer_step(kept: Held, weights: Sequence[Weight], zero: Zero, ranks: int, *, fused: bool) -> int:
    """The highest mark of the optimizer's step; device bytes. Without ``fused`` kernels AdamW makes a root of a moment."""
    groups = _groups(weights)
    if zero.optimizer_offloaded:
        return kept.device
    if zero.stage == 0:
        return kept.device + (0 if fused else max(map(_bytes, groups)))
    if zero.stage == 3:  # noqa: PLR2004
        parts, size = max(_sub_groups(groups, zero, ranks)), groups[0][0].size
        gradients = 0
    else:
        parts, size = max(_padded(group, ranks) // ranks for group in groups), groups[0][0].size
        gradients = 0 if kept.gradients else parts * size  # those of the only micro-batch
    root = 0 if fused else parts * zero.moment
    flat = parts * size
    if zero.master == size:  # the flat copy is the gradient
        return kept.device + gradients + flat + root
    return kept.device + gradients + parts * zero.master + max(flat, root)


def save_peak(kept: Held, parts: Mapping[str, int], zero: Zero) -> int:
    """The highest mark of a save; ``parts`` are the bytes of what is gathered and written together (a layer, a module)."""
    return kept.device + (max(parts.values()) if zero.stage == 3 else 0)  # noqa: PLR2004


def _groups(weights: Iterable[Weight]) -> list[list[Weight]]:
    """Trained parameters as the optimizer's groups: with and without weight decay, each dtype by itself."""
    groups: dict[tuple[bool, int], list[Weight]] = {}
    for weight in weights:
        if weight.trained:
            groups.setdefault((not weight.decays, weight.size), []).append(weight)
    return [groups[key] for key in sorted(groups)]


def _sub_groups(groups: Sequence[Sequence[Weight]], zero: Zero, ranks: int) -> list[int]:
    """Elements of the pieces in which ZeRO-3's optimizer steps."""
    sizes: list[int] = []
    for group in groups:
        filled = 0
        for number, weight in enumerate(group):
            filled += math.ceil(weight.numel / ranks)
            if filled >= zero.sub_group or number == len(group) - 1:
                sizes.append(filled)
                filled = 0
    return sizes


def _padded(group: Sequence[Weight], ranks: int) -> int:
    """Elements of a group's flat buffer: a multiple of two for each rank."""
    numel = sum(weight.numel for weight in group)
    return math.ceil(numel / (2 * ranks)) * 2 * ranks


def _own_gradients(groups: Sequence[Sequence[Weight]], ranks: int) -> int:
    """Bytes of the gradients that ZeRO-2 keeps, on the rank that keeps most."""
    return max(sum(_inside(group, _padded(group, ranks), ranks, rank) for group in groups) for rank in range(ranks))


def _inside(group: Sequence[Weight], padded: int, ranks: int, rank: int) -> int:
    """Bytes of the parameters of a group that begin, end or lie in a rank's part."""
    begin, end, place, total = padded // ranks * rank, padded // ranks * (rank + 1), 0, 0
    for weight in group:
        if place < end and place + weight.numel > begin:
            total += weight.numel * weight.size
        place += weight.numel
    return total


def _bytes(weights: Iterable[Weight]) -> int:
    return sum(weight.numel * weight.size for weight in weights)


def weights_of(model: Any) -> list[Weight]:
    """The parameters of a model, tied ones once."""
    patterns = [r"bias", r"layernorm", r"rmsnorm", r"(?:^|\.)norm(?:$|\.)", r"_norm(?:$|\.)"]  # those of the Trainer
    decaying = set(get_parameter_names(model, [nn.LayerNorm], patterns))
    return [
        Weight(name, parameter.numel(), parameter.element_size(), parameter.requires_grad, name in decaying)
        for name, parameter in model.named_parameters()
    ]
