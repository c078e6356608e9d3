"""Cross entropy of a model's head, a piece of rows at a time: the logits of a batch are never there as a whole.

With 150,000 words the logits of 16,000 tokens are 10 GB in fp32, and their gradient is as much again. Here the head sees
only the tokens that carry loss, some hundred MB of logits at a time, and the gradients of its input and of its weights are
made at once from these logits; backward only scales them. So nothing is computed twice, a masked prompt costs no logits,
and the head's weights are needed in its forward alone, where ZeRO-3 has gathered them.

No model is known by name: within its forward its output embedding gives the loss in place of logits. That is right when the
head is called once, for all tokens, and nothing comes behind it (soft caps, scales). ``find_head`` finds that out on a tiny
batch before the first step, compares loss and gradients with those of whole logits, and tells why not.
"""

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple, cast

import torch
from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from ..data_tools.dataset import IGNORE_INDEX
from . import runtime
from .attention import at_rest
from .losses import row_divisors
from .model_arguments import Normalization
from .softmax_gradient import softmax_gradient

Run = Callable[[torch.Tensor], torch.Tensor]  # hidden states [rows, width] to logits [rows, words]

WORTH = 2**26  # logits of a micro-batch from which on pieces pay
_PIECE = {"cpu": 2**25}  # logits that are there at a time, by the device's kind
_PIECE_ELSEWHERE = 2**29
_ROUNDING = {torch.float32: (1e-5, 1e-4), torch.float16: (1e-3, 5e-3)}  # of the loss, of a gradient's norm
_ROUNDING_BF16 = (5e-3, 2e-2)


class Targets(NamedTuple):
    """What a batch's loss is made of, one entry for each token that carries loss.

    ``rows``: the place, counted over the flattened batch, of the token before it (int64); ``ids``: the token (int64);
    ``weights``: what its cross entropy counts (fp32).
    """

    rows: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor

    def to(self, device: torch.device) -> "Targets":
        """The same on a device, which is not waited for."""
        if device.type == "cpu":
            return self
        return Targets(*(value.pin_memory().to(device, non_blocking=True) for value in self))


def targets(inputs: Mapping[str, Any], how: Normalization) -> Targets:
    """The targets of a padded or packed batch with ``labels``. Cheap on the CPU; elsewhere the device is waited for."""
    ahead: torch.Tensor = inputs["labels"].roll(-1, 1)
    ahead[:, -1] = IGNORE_INDEX
    rows = (ahead != IGNORE_INDEX).flatten().nonzero().squeeze(1)
    divisors = torch.ones_like(ahead)
    divisors[:, :-1] = row_divisors(inputs, how)
    return Targets(rows, ahead.flatten()[rows], 1.0 / divisors.flatten()[rows])


@dataclass(frozen=True)
class ChunkedHead:
    """The output embedding of a model, of which it was proven that its loss can be made in pieces of ``rows``."""

    module: nn.Module
    rows: int

    @contextmanager
    def loss_for(self, wanted: Targets, smoothing: float) -> Generator[None]:
        """Within this context the model's ``logits`` are the summed, weighted cross entropy; fp32, scalar."""
        with _in_place_of(
            self.module,
            lambda run, hidden: head_loss(run, list(self.module.parameters()), hidden, wanted, smoothing, self.rows),
        ):
            yield

    @contextmanager
    def sums_for(self, wanted: Targets) -> Generator[None]:
        """Within this context the model's ``logits`` are what ``losses.evaluation_sums`` makes of them."""
        with _in_place_of(self.module, lambda run, hidden: head_sums(run, hidden, wanted, self.rows)):
            yield


def head_loss(
    run: Run, parameters: Sequence[torch.Tensor], hidden: torch.Tensor, wanted: Targets, smoothing: float, rows: int
) -> torch.Tensor:
    """The weighted sum of the cross entropies of ``run(hidden)``; fp32, scalar, with gradients.

    ``hidden`` has the shape [..., width]; ``parameters`` are all that ``run`` uses.
    """
    return cast("torch.Tensor", _HeadLoss.apply(run, wanted, smoothing, rows, hidden, *parameters))


def head_sums(run: Run, hidden: torch.Tensor, wanted: Targets, rows: int) -> torch.Tensor:
    """Summed cross entropy, rightly predicted tokens and tokens of ``run(hidden)``; no gradients; float64, shape [3]."""
    flat = hidden.reshape(-1, hidden.shape[-1])
    sums = torch.zeros(3, dtype=torch.float64, device=hidden.device)
    for piece in _pieces(wanted, rows):
        logits = run(flat[piece.rows])
        sums[0] += nn.functional.cross_entropy(logits.float(), piece.ids, reduction="none").double().sum()
        sums[1] += (logits.argmax(-1) == piece.ids).sum()
        sums[2] += len(piece.ids)
    return sums


class _HeadLoss(torch.autograd.Function):
    """Gradients are made in forward, of unscaled loss; those of weights are summed over the pieces in fp32."""

    @staticmethod
    def forward(
        ctx: Any,
        run: Run,
        wanted: Targets,
        smoothing: float,
        rows: int,
        hidden: torch.Tensor,
        *parameters: torch.Tensor,
    ) -> torch.Tensor:
        of_hidden, *of_parameters = ctx.needs_input_grad[4:]
        trained = [p for p, needed in zip(parameters, of_parameters, strict=True) if needed]
        flat = hidden.reshape(-1, hidden.shape[-1])
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        parts: list[torch.Tensor] = []
        sums: list[torch.Tensor] = []
        for piece in _pieces(wanted, rows):
            leaf = flat[piece.rows].requires_grad_(of_hidden)
            with torch.enable_grad():
                logits = run(leaf)
            gradient = logits.detach()
            total += (softmax_gradient(gradient, piece.ids, piece.weights, smoothing) * piece.weights).sum()
            if sources := [leaf, *trained] if of_hidden else trained:
                found = list(torch.autograd.grad(logits, sources, gradient))
                parts += [found.pop(0)] if of_hidden else []
                sums = [a.float().add_(b) for a, b in zip(sums, found, strict=True)] if sums else found
        ctx.made = (wanted.rows, parts, sums)
        ctx.inputs = [(tensor.shape, tensor.dtype) for tensor in (hidden, *parameters)]
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - called by place
        ctx: Any, *grads: torch.Tensor
    ) -> tuple[torch.Tensor | None, ...]:
        (scale,) = grads
        rows, parts, sums = ctx.made
        left = iter(sums)
        made: list[torch.Tensor | None] = []
        for place, (shape, dtype) in enumerate(ctx.inputs):
            gradient = None
            if ctx.needs_input_grad[4 + place]:
                gradient = torch.zeros(shape, dtype=dtype, device=scale.device)
                if place and sums:
                    torch.mul(next(left), scale, out=gradient)
                elif parts:
                    gradient.view(-1, shape[-1])[rows] = torch.cat(parts).mul(scale)
            made.append(gradient)
        return (None, None, None, None, *made)


def _pieces(wanted: Targets, rows: int) -> Iterator[Targets]:
    """The targets in pieces of about equal size, each of at most ``rows``."""
    count = len(wanted.rows)
    size = -(-count // max(1, -(-count // rows)))
    for start in range(0, count, max(1, size)):
        yield Targets(*(values[start : start + size] for values in wanted))


@contextmanager
def _in_place_of(module: nn.Module, made: Callable[[Run, torch.Tensor], torch.Tensor]) -> Generator[None]:
    """Have a module give ``made(its own forward, its input)``. Hooks around its forward, ZeRO-3's too, stay as they are."""
    run, before = module.forward, module.__dict__.get("forward")

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return made(run, hidden)

    module.forward = forward
    try:
        yield
    finally:
        if before is None:
            del module.forward
        else:
            module.forward = before


class HeadSearch(TrainerCallback):
    """Gives the trainer its ``head``, by ``find_head``, when the engine stands and before the first step."""

    def __init__(self, trainer: Any, largest: int) -> None:
        self.trainer, self.largest = trainer, largest

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,  # noqa: ARG002 - the signature is the Trainer's
        control: TrainerControl,  # noqa: ARG002
        model: Any = None,
        **_: Any,
    ) -> None:
        """Find it."""
        if args.torch_compile:
            runtime.say("loss: from whole logits, as --torch_compile compiles the head with the model")
            return
        self.trainer.head = find_head(model, args.device, self.largest, args.label_smoothing_factor, runtime.say)


def rows_of_piece(words: int, device_type: str) -> int:
    """How many rows of logits of so many words are there at a time."""
    return max(1, _PIECE.get(device_type, _PIECE_ELSEWHERE) // words)


class _NotInPiecesError(Exception):
    """Why a head's loss is made of whole logits."""


def find_head(
    model: Any, device: torch.device, largest: int, smoothing: float, say: Callable[[str], None]
) -> ChunkedHead | None:
    """The head of a model whose loss can be made in pieces, or None: told in one line, but when pieces would not pay.

    ``largest`` is the number of tokens of the largest micro-batch. Two forward passes of two rows of 13 tokens. Every rank must
    call it: under ZeRO-3 a forward is collective. The model comes back in the mode it had; no random number is drawn.
    """
    words = int(model.config.get_text_config().vocab_size)
    if largest * words < WORTH:
        return None
    why = ""
    head = model.get_output_embeddings()
    try:
        _prove(model, head, device, smoothing)
    except _NotInPiecesError as error:
        why = str(error)
    if why := next(filter(None, runtime.gather(why)), ""):
        say(f"loss: from whole logits, {largest * words * 4 / 2**30:.1f} GiB in fp32, as {why}")
        return None
    rows = rows_of_piece(words, device.type)
    say(f"loss: of the tokens with loss alone, {rows} rows of logits at a time (proven here against whole logits)")
    return ChunkedHead(head, rows)


def _prove(model: Any, head: Any, device: torch.device, smoothing: float) -> None:
    """Raises _NotInPiecesError when the loss in pieces is not that of the model's own logits, or might not be."""
    if head is None:
        raise _NotInPiecesError("the model names no output embedding")
    own = list(head.parameters(recurse=False))
    if any(hasattr(p, "ds_id") for p in head.parameters()) and len(own) < len(list(head.parameters())):
        raise _NotInPiecesError("its head is made of several modules, which ZeRO-3 gathers one by one")
    ids = (torch.arange(26, device=device) * 7 % int(model.config.get_text_config().vocab_size)).view(2, 13)
    labels = ids.masked_fill(ids % 3 == 0, IGNORE_INDEX)
    wanted = targets({"labels": labels}, "sequence")
    seen: list[torch.Tensor] = []

    def look(run: Run, hidden: torch.Tensor) -> torch.Tensor:
        if hidden.shape[:-1] != ids.shape:
            raise _NotInPiecesError(f"its head is called with the shape {list(hidden.shape)}")
        _compare(run, list(head.parameters()), hidden, wanted, smoothing)
        seen.append(run(hidden))
        return seen[-1]

    with at_rest(model), _in_place_of(head, look):
        try:
            outputs = model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            raise _NotInPiecesError(f"a trial failed: {type(error).__name__}: {error}") from error
    if len(seen) != 1:
        raise _NotInPiecesError(f"its head is called {len(seen)} times")
    logits = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
    if logits.shape != seen[0].shape or not torch.equal(logits.float(), seen[0].float()):
        raise _NotInPiecesError("the model changes its logits behind the head")


def _compare(
    run: Run, parameters: Sequence[torch.Tensor], hidden: torch.Tensor, wanted: Targets, smoothing: float
) -> None:
    """Loss and gradients of one and the same head, from whole logits and in pieces of 5 rows. Raises _NotInPiecesError."""
    with torch.enable_grad():
        leaf = hidden.detach().requires_grad_()
        sources = [leaf, *(p for p in parameters if p.requires_grad)]
        logits = run(leaf)
        losses = nn.functional.cross_entropy(
            logits.flatten(0, 1)[wanted.rows].float(), wanted.ids, reduction="none", label_smoothing=smoothing
        )
        whole = (losses * wanted.weights).sum()
        expected = torch.autograd.grad(whole, sources)
        total = head_loss(run, parameters, leaf, wanted, smoothing, 5)
        made = torch.autograd.grad(total, sources)
    loss_off, gradient_off = _ROUNDING.get(logits.dtype, _ROUNDING_BF16)
    off = float(((total - whole) / whole).detach().abs())
    if not off <= loss_off:
        raise _NotInPiecesError(f"the loss in pieces is {off:.1g} off")
    for one, other in zip(made, expected, strict=True):
        norms = [torch.linalg.vector_norm(values, dtype=torch.float32) for values in (one - other, other)]
        off = float(norms[0] / norms[1].clamp_min(1e-30))
        if not off <= gradient_off:
            raise _NotInPiecesError(f"a gradient in pieces is {off:.1g} off")
