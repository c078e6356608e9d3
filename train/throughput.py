"""How fast a run really is: real and trained tokens, padding, and the share of the device's peak that they need (MFU).

Counted is the work that the model asks for, not the work that was done: padding and what gradient checkpointing computes
again are left out. A product of a matrix with a token costs 2 FLOPs a weight forward, 2 more when its input needs a
gradient, 2 more when the matrix itself is trained. With everything trained that is the well-known 6 a parameter; with
LoRA about 4. Of routed experts only those count that a token is sent to. Attention is added by the samples' own
lengths. Source of the convention: https://arxiv.org/abs/2204.02311, appendix B.
"""

import math
import re
import resource
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from ..data_tools.dataset import IGNORE_INDEX
from .moe import moe_blocks

# Dense bf16 TFLOP/s by the makers' data sheets, by a word of torch's device name; the first that fits counts.
_PEAKS = (
    ("B200", 2250.0), ("GB200", 2500.0), ("H200 NVL", 835.5), ("H200", 989.4), ("GH200", 989.4), ("H100 PCIe", 756.0),
    ("H100 NVL", 835.5), ("H100", 989.4), ("H800", 989.4), ("H20", 148.0), ("A100", 312.0), ("A800", 312.0),
    ("L40S", 362.0), ("L40", 181.0), ("L20", 119.5), ("L4", 121.0), ("A40", 149.7), ("A30", 165.0), ("A10", 125.0),
    ("RTX 4090", 165.2), ("MI300X", 1307.4),
)  # fmt: skip
_TOP_K = ("top_k", "topk", "num_experts_per_tok", "moe_topk")
_ATTENDING = ("full_attention", "sliding_attention", "chunked_attention", "attention")  # of a config's layer types
_STACK = 3  # dimensions of experts in one parameter


class UnknownShapeError(LookupError):
    """The FLOPs of a model cannot be told; the message says what is missing."""


@dataclass(frozen=True, slots=True)
class Counts:
    """Tokens of one micro-batch: ``real`` ones, those with loss (``trained``), ``padded`` places, ``lengths`` of its samples.

    A sample without any loss token is no sample: such rows only fill the last step of an epoch. They count as padding.
    """

    real: int
    trained: int
    padded: int
    lengths: tuple[int, ...]


def count(batch: Mapping[str, Any]) -> Counts:
    """Counts of a batch that is padded (``attention_mask`` [rows, length]) or packed (``position_ids`` [1, tokens])."""
    has_loss = (batch["labels"] != IGNORE_INDEX).cpu().numpy()
    if "attention_mask" in batch:
        lengths = batch["attention_mask"].sum(-1).cpu().numpy()
        trained = has_loss[:, 1:].sum(-1)  # the first token is never predicted
    else:
        starts = np.flatnonzero(batch["position_ids"].cpu().numpy().ravel() == 0)
        lengths = np.diff(starts, append=has_loss.size)
        flat = has_loss.ravel()
        trained = np.add.reduceat(flat.astype(np.int64), starts) - flat[starts]
    kept = lengths[trained > 0]
    real = int(kept.sum())
    return Counts(real, int(trained.sum()), has_loss.size - real, tuple(kept.tolist()))


@dataclass(frozen=True, slots=True)
class Attention:
    """One layer's attention over earlier tokens: ``width`` is heads x (query and key size + value size).

    ``reach`` is how many tokens back it sees (a sliding window), ``chunk`` the size of blocks that it stays in; None
    means all. ``passes`` is 1 for forward only, 3 with backward.
    """

    width: int
    reach: int | None
    chunk: int | None
    passes: int

    def flops(self, lengths: Sequence[int]) -> float:
        """FLOPs over samples of these lengths: 2 x width for each pair of tokens, half of the square being masked."""
        size = np.asarray(lengths, dtype=np.float64)
        if self.chunk:
            whole, rest = np.divmod(size, self.chunk)
            pairs = whole * self.chunk**2 / 2 + rest**2 / 2
        else:
            reach = np.minimum(size, self.reach or np.inf)
            pairs = size * reach - reach**2 / 2
        return float(2 * self.width * self.passes * pairs.sum())


@dataclass(frozen=True, slots=True)
class Flops:
    """What a model needs for training: FLOPs a token in matrix products, and its layers' attention with their number."""

    per_token: float
    attention: Mapping[Attention, int]

    def of(self, lengths: Sequence[int]) -> float:
        """FLOPs of one forward and backward pass over samples of these lengths."""
        layers = sum(times * layer.flops(lengths) for layer, times in self.attention.items())
        return self.per_token * sum(lengths) + layers


def training_flops(model: Any) -> Flops:
    """FLOPs of a model as it is frozen and adapted now. Raises UnknownShapeError.

    An input's gradient is counted for every matrix behind the first trained parameter, in the order in which modules are
    defined. Linear attention and state-space layers count by their matrices alone.
    """
    passed = 0.0
    behind_trained = False
    shares = _expert_shares(model)
    for name, module in model.named_modules(remove_duplicate=False):
        for parameter in module.parameters(recurse=False):
            shape = _shape(parameter)
            if len(shape) > 1 and not isinstance(module, nn.Embedding):  # an embedding is looked up
                passed += 2 * math.prod(shape) * shares.get(name, 1.0) * (1 + behind_trained + parameter.requires_grad)
            behind_trained |= parameter.requires_grad
    return Flops(passed, Counter(_attention(model)))


def _expert_shares(model: Any) -> dict[str, float]:
    """Of every module that belongs to routed experts, by name: the share of its weights that one token passes."""
    shares: dict[str, float] = {}
    modules: dict[str, Any] = dict(model.named_modules(remove_duplicate=False))

    def put(name: str, experts: int) -> None:
        share = _chosen(modules, name) / experts
        shares.update({below: share for below in modules if below == name or below.startswith(f"{name}.")})

    for name, block in moe_blocks(model).items():
        for child, part in block.named_children():
            if isinstance(part, nn.ModuleList) and len({_shapes(expert) for expert in part}) == 1:
                put(f"{name}.{child}", len(part))
    for name, module in modules.items():
        experts: Any = getattr(module, "num_experts", None)
        own = [_shape(p) for p in module.parameters(recurse=False)]
        stacked = {shape[0] for shape in own if len(shape) == _STACK and not isinstance(module, nn.Conv1d)}
        if stacked:
            put(name, stacked.pop())
        elif experts and hasattr(module, "lora_A"):  # PEFT's adapter of stacked experts
            put(name, experts)
    return shares


def _chosen(modules: Mapping[str, Any], name: str) -> int:
    """Experts that a token is sent to, as the block around the module ``name`` or its router says. Raises UnknownShapeError."""
    above = name
    while above:
        above = above.rpartition(".")[0]
        for module in modules[above].modules():
            for word in _TOP_K:
                if isinstance(number := getattr(module, word, None), int):
                    return number
    raise UnknownShapeError(f"{name}: the block has none of {', '.join(_TOP_K)}")


def _attention(model: Any) -> Iterator[Attention]:
    """Every layer that attends to earlier tokens, by the model's config. Raises UnknownShapeError."""
    config = model.config.get_text_config()
    number = int(config.num_hidden_layers)
    window = getattr(config, "sliding_window", None)
    told = getattr(config, "layer_types", None) or getattr(config, "layers_block_type", None)
    kinds = told or ["sliding_attention" if window else "full_attention"] * number
    heads = getattr(config, "num_attention_heads", None)
    if not isinstance(heads, int):
        if told and any(kind in _ATTENDING for kind in told):
            raise UnknownShapeError("the model's config tells no number of attention heads")
        return
    value = key = getattr(config, "head_dim", None) or config.hidden_size // heads
    if getattr(config, "v_head_dim", None):  # multi-head latent attention: keys are wider than values
        value, key = config.v_head_dim, config.qk_nope_head_dim + config.qk_rope_head_dim
    first = _first_trained_layer(model, number)
    for layer, kind in enumerate(kinds):
        if kind in _ATTENDING:
            reach = window if kind == "sliding_attention" else None
            chunk = getattr(config, "attention_chunk_size", None) if kind == "chunked_attention" else None
            yield Attention(heads * (key + value), reach, chunk, 3 if layer >= first else 1)


def _first_trained_layer(model: Any, number: int) -> int:
    """The layer from which on gradients flow; ``number`` when no layer needs any."""
    lists = (name for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m) == number)
    layers = f"{next(lists, None)}."
    entered = False
    for name, parameter in model.named_parameters():
        entered |= name.startswith(layers)
        if parameter.requires_grad:
            return int(name[len(layers) :].partition(".")[0]) if name.startswith(layers) else number * entered
    return number


def _shape(parameter: Any) -> tuple[int, ...]:
    """A parameter's full shape, also when ZeRO-3 has partitioned it."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def _shapes(module: nn.Module) -> tuple[tuple[int, ...], ...]:
    return tuple(_shape(parameter) for parameter in module.parameters())


def peak_of(device_name: str) -> float | None:
    """Dense bf16 TFLOP/s of a device by the name that torch gives it; None for one that is not known, or a slice of one."""
    if "MIG" in device_name:
        return None
    return next((peak for word, peak in _PEAKS if re.search(rf"\b{word}\b", device_name)), None)


class Meter:
    """Tokens, FLOPs and seconds of training from one log line to the next, over all ranks.

    ``peak`` is TFLOP/s of one rank's device. ``gather`` makes of one row of this rank the rows of all, shape [ranks, 6].
    The clock starts with ``start`` and stands still while ``paused``.
    """

    def __init__(
        self,
        flops: Flops | None,
        peak: float | None,
        device: torch.device,
        gather: Callable[[torch.Tensor], Any],
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._flops, self._peak, self._device, self._gather, self._clock = flops, peak, device, gather, clock
        self._since: float | None = None
        self._mine = np.zeros(4)  # real, trained, padded, FLOPs of this rank since the last line
        self._total = np.zeros(5)  # the same of all ranks since the start, and seconds

    def start(self) -> None:
        """Start the clock, unless it runs."""
        if self._since is None:
            self._since = self._clock()

    def add(self, counts: Counts) -> float:
        """Take in a micro-batch of this rank; its FLOPs, 0 when they cannot be told."""
        flops = self._flops.of(counts.lengths) if self._flops else 0.0
        self._mine += (counts.real, counts.trained, counts.padded, flops)
        return flops

    @contextmanager
    def paused(self) -> Generator[None]:
        """Time that is no training: evaluation and saving. The device is waited for first, as its queue is training."""
        if self._device.type != "cpu":
            torch.accelerator.synchronize()
        began = self._clock()
        try:
            yield
        finally:
            if self._since is not None:
                self._since += self._clock() - began

    def read(self) -> dict[str, float]:
        """The figures since the last call, for the log. Every rank must call it, after the device has done its work."""
        now = self._clock()
        since = now if self._since is None else self._since
        row = torch.tensor([[*self._mine, now - since, self._memory()]], dtype=torch.float64, device=self._device)
        rows = self._gather(row).cpu().numpy()
        self._since = now
        self._mine[:] = 0
        sums, seconds, ranks = rows[:, :4].sum(0), float(rows[:, 4].max()), len(rows)
        self._total += (*sums, seconds)
        return {**self._figures(sums, seconds, ranks), "memory_gib": round(float(rows[:, 5].max()), 3)}

    def total(self, ranks: int) -> dict[str, float]:
        """The figures from the start to the last ``read``."""
        return self._figures(self._total[:4], float(self._total[4]), ranks)

    def _figures(self, sums: Any, seconds: float, ranks: int) -> dict[str, float]:
        real, trained, padded, flops = map(float, sums)
        if not real or seconds <= 0:
            return {}
        figures = {
            "tokens_per_second": round(real / seconds, 1),
            "trained_tokens_per_second": round(trained / seconds, 1),
            "padding_share": round(padded / (real + padded), 4),
        }
        if self._peak and self._flops:
            figures["mfu"] = round(flops / seconds / (self._peak * 1e12 * ranks), 4)
        return figures

    def _memory(self) -> float:
        """The most that this rank has held so far, GiB: of its device, or of the process when it trains on the CPU."""
        if self._device.type != "cpu":
            return torch.accelerator.max_memory_allocated() / 2**30
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20


def make_meter(
    model: Any,
    device: torch.device,
    peak_tflops: float | None,
    gather: Callable[[torch.Tensor], Any],
    say: Callable[[str], None],
) -> Meter:
    """The meter of a run; says why when a GPU's run will show no MFU. ``peak_tflops`` wins over the known peaks."""
    flops = None
    try:
        flops = training_flops(model)
    except UnknownShapeError as error:
        say(f"no MFU will be shown: {error}")
    peak = peak_tflops
    if peak is None and device.type == "cuda":
        name = torch.cuda.get_device_name(device)
        peak = peak_of(name)
        if peak is None:
            say(f"no MFU will be shown: the peak of {name} is not known; --peak_tflops tells it")
    return Meter(flops, peak, device, gather)
