"""What a micro-batch makes a device hold, found without a device: forward and backward on tensors that have no data.

The model's own code runs, so every architecture counts as it is. What cannot run without data has a stand-in that keeps
what the real one keeps: attention kernels (query, key, value, output and one fp32 number a head and token) and the
softmax of the head's pieces, which is made in place. A model whose code asks for values (experts in a Python loop) is
refused with its own words.
"""

import weakref
from collections.abc import Callable, Generator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, cast

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface, initialization

from . import chunked_loss
from .chunked_loss import ChunkedHead, Targets
from .losses import summed_loss
from .recompute import checkpointed_layers, kinds_of

NAME = "without_data"


class UnknownMemoryError(ValueError):
    """What a model holds cannot be told; the message says why."""


@dataclass(frozen=True)
class Batch:
    """A micro-batch: ``rows`` of ``length`` tokens; logits are made ``head_rows`` rows at a time, or (None) all at once."""

    rows: int
    length: int
    head_rows: int | None

    @property
    def tokens(self) -> int:
        """Tokens of all rows."""
        return self.rows * self.length


@dataclass(frozen=True)
class Moment:
    """The time up to the end of one parameter's gradient: the most bytes held, without parameters and other gradients.

    ``layer`` is the number of the layer that it belongs to, or None.
    """

    name: str
    numel: int
    layer: int | None
    peak: int


@dataclass(frozen=True)
class Pass:
    """A forward and a backward pass: its moments in order, and what each layer kept in forward; bytes."""

    moments: Sequence[Moment]
    kept: Sequence[int]


@dataclass(frozen=True)
class Activations:
    """The passes of one micro-batch without recomputed layers and with all of them; ``layers`` is their number."""

    plain: Pass
    recomputed: Pass

    @property
    def layers(self) -> int:
        """How many layers can be recomputed."""
        return len(self.plain.kept)

    def moments(self, recomputed: int) -> list[Moment]:
        """The moments of a pass that recomputes the first ``recomputed`` layers."""
        let_go = sum(map(int.__sub__, self.plain.kept[:recomputed], self.recomputed.kept[:recomputed]))
        others = {moment.name: moment for moment in self.recomputed.moments}
        made: list[Moment] = []
        below = False  # what comes behind the first recomputed layer, as backward goes down
        for moment in self.plain.moments:
            below = below or (moment.layer is not None and moment.layer < recomputed)
            peak = others[moment.name].peak if below else moment.peak - let_go
            made.append(Moment(moment.name, moment.numel, moment.layer, peak))
        return made


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of all storages that operations made and that are still referred to."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self._peak = 0
        self._seen: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Do the operation and count what it made."""
        made = func(*args, **(kwargs or {}))
        for value in tree_leaves(made):
            if isinstance(value, torch.Tensor):
                self._count(value, value.untyped_storage().nbytes())
        return made

    def leave_out(self, tensor: torch.Tensor) -> None:
        """Do not count this tensor's storage."""
        self._count(tensor, 0)

    def take_peak(self) -> int:
        """The most since the last call."""
        peak, self._peak = self._peak, self.now
        return peak

    def _count(self, tensor: torch.Tensor, size: int) -> None:
        storage: Any = tensor.untyped_storage()
        if storage in self._seen:
            return
        self._seen[storage] = size
        self.now += size
        self._peak = max(self._peak, self.now)
        weakref.finalize(storage, self._free, size)

    def _free(self, size: int) -> None:
        self.now -= size


class _Attention(torch.autograd.Function):
    """Keeps what the flash kernels keep."""

    @staticmethod
    def forward(ctx: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
        out = query.new_empty(*query.shape[:-1], value.shape[-1])
        ctx.save_for_backward(query, key, value, out, query.new_empty(query.shape[:-1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *_: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attend(
    module: nn.Module,  # noqa: ARG001 - the signature is that of transformers
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *_: Any,
    **__: Any,
) -> tuple[torch.Tensor, None]:
    rows, _heads, tokens, _width = query.shape
    dtype = torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else value.dtype
    parts = (part.transpose(1, 2).flatten(0, 1).to(dtype) for part in (query, key, value))
    return cast("torch.Tensor", _Attention.apply(*parts)).unflatten(0, (rows, tokens)), None


def _softmax_gradient(logits: torch.Tensor, _: Any, weights: torch.Tensor, __: float) -> torch.Tensor:
    """What ``softmax_gradient`` holds where it is compiled: the logits, changed in place, and a number a row."""
    logits.mul_(1)
    return torch.empty_like(weights)


def without_data(build: Callable[[], Any], dtype_of: Callable[[nn.Parameter], torch.dtype]) -> Any:
    """The model that ``build`` makes, of any size in a second, its tensors without data and as if on a CPU.

    ``dtype_of`` tells the dtype that a parameter gets, whatever it was made in.
    """
    with initialization.meta_device_safe_creation_ops(), torch.device("meta"):
        model = build()
    made: dict[int, torch.Tensor] = {}  # tied ones stay one
    with FakeTensorMode():
        for parameter in model.parameters():
            empty = torch.empty(parameter.shape, dtype=dtype_of(parameter))
            made[id(parameter)] = nn.Parameter(empty, requires_grad=parameter.requires_grad)
        for module in model.modules():
            for name, buffer in list(module._buffers.items()):  # noqa: SLF001
                if buffer is not None:
                    module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype)  # noqa: SLF001
            for name, parameter in list(module._parameters.items()):  # noqa: SLF001
                if parameter is not None:
                    module._parameters[name] = made[id(parameter)]  # noqa: SLF001
    return model


def one_pass(model: Any, batch: Batch, *, recompute: bool, autocast: torch.dtype | None = None) -> Pass:
    """Forward and backward of one micro-batch with all layers recomputed or none. Raises UnknownMemoryError."""
    layers = checkpointed_layers(model)
    place = {id(parameter): number for number, layer in enumerate(layers) for parameter in layer.parameters()}
    marks = [0] * (len(layers) + 1)  # bytes held when each layer begins, and when the last one ends
    moments: list[Moment] = []
    live = LiveBytes()
    for tensor in (*model.parameters(), *model.buffers()):
        live.leave_out(tensor)

    def done(name: str, parameter: torch.Tensor) -> None:
        moments.append(Moment(name, parameter.numel(), place.get(id(parameter)), live.take_peak()))
        parameter.grad = None

    def mark(number: int, *_: Any) -> None:
        marks[number] = live.now

    mode = next(iter(model.parameters())).fake_mode
    with ExitStack() as stack:
        for number, layer in enumerate(layers):
            layer.gradient_checkpointing = recompute
            layer._gradient_checkpointing_func = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)  # noqa: SLF001
            stack.callback(setattr, layer, "gradient_checkpointing", False)
            stack.callback(layer.register_forward_pre_hook(partial(mark, number)).remove)
            stack.callback(layer.register_forward_hook(partial(mark, number + 1)).remove)
        for name, parameter in model.named_parameters():
            if parameter.requires_grad:
                stack.callback(parameter.register_post_accumulate_grad_hook(partial(done, name)).remove)
        for context in (mode, live, _stand_ins(model)):
            stack.enter_context(context)
        model.train()
        try:
            with torch.autocast("cpu", autocast) if autocast else nullcontext():
                loss = _loss(model, batch)
            loss.backward()
        except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
            first = str(error).strip().splitlines()[0]
            raise UnknownMemoryError(
                f"{type(model).__name__} does not run on tensors without data ({type(error).__name__}: {first})"
            ) from error
    return Pass(moments, _kept(marks, kinds_of(layers)))


def _kept(marks: Sequence[int], kinds: Sequence[int]) -> list[int]:
    """What each layer keeps; of the last one its input is still held when it ends, so that it counts as one of its kind."""
    kept = [after - before for before, after in pairwise(marks)]
    if kinds and kinds[-1] in kinds[:-1]:
        kept[-1] = kept[len(kinds) - 2 - kinds[-2::-1].index(kinds[-1])]
    return kept


def _loss(model: Any, batch: Batch) -> torch.Tensor:
    """The summed loss of a packed row (or of several of one sample each), as ``StepTrainer.compute_loss`` makes it."""
    ids = torch.zeros(batch.rows, batch.length, dtype=torch.int64)
    inputs: dict[str, Any] = {"input_ids": ids, "position_ids": torch.arange(batch.length).expand(batch.rows, -1)}
    if batch.head_rows is None:
        logits = model(**inputs, use_cache=False)["logits"]
        return summed_loss(logits, {"labels": torch.zeros_like(ids)}, "token", 0.0)
    count = batch.rows * (batch.length - 1)
    wanted = Targets(torch.zeros(count, dtype=torch.int64), torch.zeros(count, dtype=torch.int64), torch.ones(count))
    with ChunkedHead(model.get_output_embeddings(), batch.head_rows).loss_for(wanted, 0.0):
        return cast("torch.Tensor", model(**inputs, use_cache=False)["logits"])


@contextmanager
def _stand_ins(model: Any) -> Generator[None]:
    """Within it attention and the head's softmax need no data."""
    AttentionInterface.register(NAME, _attend)
    before, stock = model.config._attn_implementation, chunked_loss.softmax_gradient  # noqa: SLF001
    model.set_attn_implementation(NAME)
    chunked_loss.softmax_gradient = _softmax_gradient
    try:
        yield
    finally:
        chunked_loss.softmax_gradient = stock
        model.set_attn_implementation(before)
