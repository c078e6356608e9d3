"""Decoder layers compiled by torch, one graph for all of them: norms, rotations and activations become a few fused kernels.

Compiled is a layer at a time, not the model: the graph is small, its making takes seconds, hooks between layers and the
checkpointing of activations stay as they are. A graph holds for one shape, so packed rows are filled up to full length
(``FlatteningCollator``), and for one kind of attention, an operator of ``flash``. Whatever else comes later (evaluation, a
row of another length) runs as before, uncompiled.

A model is taken when some of its layers gave the same outputs and gradients compiled as plain; all else is told in a line.
"""

import time
from collections.abc import Mapping
from functools import wraps
from typing import Any, cast

import numpy as np
import torch
import torch._dynamo as dynamo
from torch import nn
from torch._dynamo.utils import counters
from torch._functorch import config as functorch_config
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..data_tools.collator import FlatteningCollator
from . import runtime
from .attention import at_rest
from .flash import remember
from .packed_attention import PackedAttention

# Off: norms, rotations and activations are computed again in backward also where a matrix product reads them; a third less kept.
_KEEPS_LESS = "ban_recompute_materialized_backward"
_PARTITIONED = 3  # ZeRO stage
_SAMPLES = 3  # of the trial's row
_GRAPHS = 4  # for three layers; more of them, and each layer would be compiled for itself
_ROUNDING = {torch.float32: 1e-3}  # of the norm of an output or a gradient; compiled layers round less often
_ROUNDING_ELSE = 3e-2
Call = tuple[tuple[Any, ...], dict[str, Any]]


class CompiledLayers(TrainerCallback):
    """Compiles the layers when all else stands, before the first step, on every rank or on none.

    ``tokens`` is the length of every row of training.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,  # noqa: ARG002 - the signature is the Trainer's
        control: TrainerControl,  # noqa: ARG002
        model: Any = None,
        **_: Any,
    ) -> None:
        """Prove it, and compile."""
        began = time.monotonic()
        layers = decoder_layers(model)
        if hasattr(functorch_config, _KEEPS_LESS):
            setattr(functorch_config, _KEEPS_LESS, False)
        why = trial(model, layers, args.device, self.tokens)
        if why := next(filter(None, runtime.gather(why)), None):
            runtime.say(f"layers: not compiled, as {why}")
            return
        for layer in layers:
            _for_full_rows(layer, self.tokens)
        model.register_forward_pre_hook(_tell_row, with_kwargs=True)
        runtime.say(
            f"layers: {len(layers)} compiled for rows of {self.tokens} tokens, proven here against plain ones "
            f"({time.monotonic() - began:.0f} s)"
        )


def _hindrance(model: Any, layers: list[nn.Module]) -> str | None:
    name = model.config._attn_implementation  # noqa: SLF001 - transformers has no public name for it
    attention = ALL_ATTENTION_FUNCTIONS.get(name)
    if not isinstance(attention, PackedAttention):
        return f"{name} attention is no operator of torch"
    return attention.for_compiled() or (None if layers else "the model has no list of decoder layers")


def static_tokens(model: Any, stage: int, tokens: int, *, asked: bool | None, whole_model: bool) -> int:
    """The length that packed rows are filled up to, for layers that are compiled; 0 when they will not be.

    ``asked`` is --compile_layers, ``whole_model`` --torch_compile, ``tokens`` the largest row's. Where layers would be
    compiled for the asking and cannot, that is told.
    """
    if asked is False or (asked is None and (whole_model or not runtime.has_accelerator())):
        return 0
    why = None
    if whole_model:
        why = "--torch_compile compiles the whole model"
    elif stage == _PARTITIONED:
        why = "ZeRO-3 gathers the parameters of each module within them"
    elif getattr(model.config.get_text_config(), "output_router_logits", False):
        why = "the router's loss would count what fills a row up"
    if why:
        runtime.say(f"layers: not compiled, as {why}")
    return 0 if why else tokens


def decoder_layers(model: Any) -> list[nn.Module]:
    """The decoder's layers, in order; none when there is no list of them."""
    number = int(model.config.get_text_config().num_hidden_layers)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == number:
            layers = list(module)
            if all(isinstance(layer, GradientCheckpointingLayer) for layer in layers):
                return layers
    return []


def compile_layer(layer: nn.Module) -> None:
    """Compile its forward in its place; name, parameters and hooks stay. The first call makes the graph."""
    layer.forward = torch.compile(layer.forward, dynamic=False)


def _for_full_rows(layer: nn.Module, tokens: int) -> None:
    """Compile it for training on rows of this length: each other shape would take a graph of its own."""
    plain = layer.forward
    compile_layer(layer)
    compiled = layer.forward

    @wraps(plain)
    def forward(*args: Any, **kwargs: Any) -> Any:
        full = torch.is_grad_enabled() and kwargs.get("cu_seq_lens_q") is not None and args[0].shape[1] == tokens
        return (compiled if full else plain)(*args, **kwargs)

    layer.forward = forward


def trial(model: Any, layers: list[nn.Module], device: torch.device, tokens: int) -> str | None:
    """Why layers do not give the same when compiled; None when the first two and the last one do.

    One forward pass of the model, then these layers forward and backward, of a row of ``tokens``. Every rank must call it.
    The model comes back in the mode it had; no random number is drawn.
    """
    if why := _hindrance(model, layers):
        return why
    chosen = list({id(layer): layer for layer in (layers[0], layers[min(1, len(layers) - 1)], layers[-1])}.values())
    try:
        calls = _calls(model, chosen, device, tokens)
        counters.clear()
        with torch.random.fork_rng([device] if device.type == "cuda" else [], device_type=device.type):
            for layer, call in zip(chosen, calls, strict=True):
                if why := _compare(layer, call):
                    return why
    except Exception as error:  # noqa: BLE001 - compilers may raise anything, and a run goes on without
        return f"{type(error).__name__}: {error}".strip().splitlines()[0][:160]
    if breaks := next(iter(counters["graph_break"]), None):
        return f"a graph ends within them: {breaks}".splitlines()[0][:160]
    graphs = int(counters["stats"]["unique_graphs"])
    return None if graphs <= _GRAPHS else f"{len(chosen)} of its layers need {graphs} graphs"


def _tell_row(_: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:  # noqa: ARG001 - torch's hook
    """What the graph cannot be told as a number: the longest sample; and that the number of samples may change."""
    starts = kwargs.get("cu_seq_lens_q")
    if starts is not None:
        remember(starts, kwargs["max_length_q"])
        dynamo.maybe_mark_dynamic(starts, 0)


def _calls(model: Any, layers: list[nn.Module], device: torch.device, tokens: int) -> list[Call]:
    """What the layers are called with in a forward pass over a row of three samples."""
    lengths = np.full(_SAMPLES, tokens // _SAMPLES)
    lengths[0] += tokens - lengths.sum()
    ids = np.arange(tokens) * 7 % int(model.config.get_text_config().vocab_size)
    batch = FlatteningCollator(borders=True)([{"input_ids": ids, "labels": ids, "lengths": lengths}])
    del batch["labels"]
    inputs = {name: value.to(device) if isinstance(value, torch.Tensor) else value for name, value in batch.items()}
    calls: dict[int, Call] = {}

    def note(layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        calls[id(layer)] = (args, kwargs)

    with at_rest(model):
        _tell_row(model, (), inputs)
        handles = [layer.register_forward_pre_hook(note, with_kwargs=True) for layer in layers]
        try:
            model(**inputs, logits_to_keep=1) if _keeps_logits(model) else model(**inputs)
        finally:
            for handle in handles:
                handle.remove()
    return [calls[id(layer)] for layer in layers]


def _keeps_logits(model: Any) -> bool:
    """Whether a forward pass can do without the logits of all tokens, which are large."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in base.forward.__code__.co_varnames


def _compare(layer: nn.Module, call: Call) -> str | None:
    """Why a layer is not the same when compiled. Random dropout cannot be compared, so it is left out."""
    random = any(isinstance(part, nn.Dropout) and part.p > 0 for part in layer.modules())
    before, mode, recompute = layer.__dict__.get("forward"), layer.training, layer.gradient_checkpointing
    layer.train(not random)
    cast("Any", layer).gradient_checkpointing = False
    try:
        expected = _outcome(layer, call)
        compile_layer(layer)
        made = _outcome(layer, call)
    finally:
        if before is None:
            layer.__dict__.pop("forward", None)
        else:
            layer.forward = before
        layer.train(mode)
        cast("Any", layer).gradient_checkpointing = recompute
    for name, one in made.items():
        other = expected[name].float()
        off = float((one.float() - other).norm() / other.norm().clamp_min(1e-30))
        if not off <= _ROUNDING.get(one.dtype, _ROUNDING_ELSE):
            return f"{name} of {type(layer).__name__} is {off:.2g} off"
    return None


def _outcome(layer: nn.Module, call: Call) -> dict[str, torch.Tensor]:
    """A layer's output, and the gradients of its input and of its parameters."""
    (hidden, *others), kwargs = call
    named = {name: value for name, value in layer.named_parameters() if value.requires_grad}
    leaf = hidden.detach().requires_grad_()
    with torch.enable_grad():
        made = layer(leaf, *others, **kwargs)
        out = made[0] if isinstance(made, tuple) else made
        outer = torch.linspace(-1, 1, out.shape[-1], dtype=out.dtype, device=out.device).expand_as(out)
        sources = [leaf, *named.values()]
        found: Any = torch.autograd.grad(out, sources, outer, allow_unused=True)  # experts that no token went to
    names = ("the gradient of the input", *(f"the gradient of {name}" for name in named))
    return {"the output": out.detach()} | {
        name: gradient for name, gradient in zip(names, found, strict=True) if gradient is not None
    }
