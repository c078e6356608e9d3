"""Gradient checkpointing: the mode that is right, and with ``auto`` as few layers recomputed as the memory asks for.

``use_reentrant`` false gives the loss of a run without it under ZeRO-2 and ZeRO-3 with full training, LoRA and LoRA on experts,
fused or in a list, and in plain runs (``tests/distributed/test_recompute.py``). It needs no input that requires a gradient (LoRA,
frozen embeddings) and is what torch develops; the reentrant mode gives the same under ZeRO-2 and
ZeRO-3, and fails in plain LoRA runs on several ranks ("mark a variable ready only once").

``auto`` looks at real steps and then stays as it is. In the first step all layers are recomputed but one of each kind, and
the optimizer makes its state. The second tells what is held and what a layer costs; the third, with layers let go, tells
both again, and what was foretold too high or too low is put right. The lowest layers are the ones recomputed: when backward
comes to them, what the others kept is free again.
"""

from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.modeling_layers import GradientCheckpointingLayer

from . import runtime
from .hf_flags import ArgumentsError
from .memory_gauge import DeviceGauge, SavedGauge

AUTO = "auto"
_SPARE = 0.05  # of the device: what the allocator cannot use, and what differs between steps
_STEPS = 3  # that are looked at


def recompute_kwargs(hf: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """``activation_checkpointing_kwargs`` with the mode filled in, unless the user gave one; said in one line."""
    given: dict[str, Any] | None = hf.get("activation_checkpointing_kwargs")
    if not hf.get("activation_checkpointing") or "use_reentrant" in (given or {}):
        return given
    if hf["activation_checkpointing"] != AUTO:
        say(
            "gradient checkpointing: use_reentrant false (chosen for you; --gradient_checkpointing_kwargs names another)"
        )
    return {**(given or {}), "use_reentrant": False}


def asks_for_budget(hf: Mapping[str, Any], budget_gib: float | None) -> bool:
    """Whether the number of recomputed layers is to be found: by ``auto``, or a budget alone."""
    wanted = hf.get("activation_checkpointing")
    return wanted == AUTO or (wanted is None and budget_gib is not None)


@dataclass(frozen=True)
class Look:
    """What one micro-batch showed: bytes held before it and at its highest, and how much each layer left behind.

    ``kept`` has an entry for every layer, 0 for one that was not called; ``plain`` are the numbers of those that were not
    recomputed.
    """

    tokens: int
    before: int
    peak: int
    kept: Sequence[int]
    plain: frozenset[int]


def costs_of(looks: Sequence[Look], kinds: Sequence[int]) -> dict[int, float]:
    """What a layer of each kind keeps a token when it is not recomputed, beyond what it keeps anyway; bytes.

    ``kinds`` tells which layers are alike; of each kind one was not recomputed.
    """
    costs: dict[int, float] = {}
    for look in looks:
        anyway = min((look.kept[number] for number in range(len(kinds)) if number not in look.plain), default=0)
        for number in look.plain:
            found = max(0, look.kept[number] - anyway) / look.tokens
            costs[kinds[number]] = max(costs.get(kinds[number], 0.0), found)
    return costs


def foretold(look: Look, kinds: Sequence[int], costs: Mapping[int, float], largest: int, recomputed: int) -> int:
    """The peak of such a micro-batch of ``largest`` tokens when the first ``recomputed`` layers are recomputed; bytes.

    A kind without costs is that of layers that were never left unrecomputed, as memory was out, and that stay so.
    """
    tokens = max(largest, look.tokens)
    change = sum(
        costs.get(kind, 0.0) * ((number >= recomputed) - (number in look.plain)) for number, kind in enumerate(kinds)
    )
    return int(look.before + (look.peak - look.before) * tokens / look.tokens + change * tokens)


def fewest(looks: Sequence[Look], kinds: Sequence[int], costs: Mapping[int, float], largest: int, limit: int) -> int:
    """The least number of recomputed layers whose foretold peak is within ``limit`` bytes; all of them when none is."""
    for number in range(len(kinds) + 1):
        if all(foretold(look, kinds, costs, largest, number) <= limit for look in looks):
            return number
    return len(kinds)


def checkpointed_layers(model: nn.Module) -> list[Any]:
    """The layers that can be recomputed one by one, in the order of the model."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def kinds_of(layers: Sequence[nn.Module]) -> list[int]:
    """For each layer the number of the first one that has its class and the shapes of its parameters."""
    seen: dict[Any, int] = {}
    shapes = [
        (type(layer), *((name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in layer.named_parameters()))
        for layer in layers
    ]
    return [seen.setdefault(shape, number) for number, shape in enumerate(shapes)]


@dataclass
class RecomputeBudget(TrainerCallback):
    """Finds the number of layers to recompute in the first steps, the same on all ranks, and keeps it.

    ``largest`` is the number of tokens of the largest micro-batch, ``budget`` the bytes that may be held (None: the
    device's). On a CPU what autograd keeps is counted, and nothing else. ``retries`` says that a forward pass may be
    done again: not under ZeRO-3, where the other ranks would be elsewhere.
    """

    kwargs: Mapping[str, Any]
    largest: int
    budget: int | None
    device: torch.device
    retries: bool
    layers: list[Any] = field(default_factory=list[Any])
    recomputed: int = 0
    _kinds: list[int] = field(default_factory=list[int])
    _searching: bool = False
    _steps: int = 0
    _least: int = 0  # what memory that was out has asked for
    _looks: list[Look] = field(default_factory=list[Look])
    _costs: dict[int, float] = field(default_factory=dict[int, float])
    _kept: dict[int, int] = field(default_factory=dict[int, int])
    _entered: int = 0
    _peak: int = 0
    _hooks: list[Any] = field(default_factory=list[Any])

    def __post_init__(self) -> None:
        self.kwargs = {"use_reentrant": False, **self.kwargs}
        for name in ("use_reentrant", "every_n_layers", "offload"):
            if self.kwargs.get(name):
                raise ArgumentsError(
                    f"--gradient_checkpointing_kwargs: {name} is not for --gradient_checkpointing auto; leave it "
                    "out, or give --gradient_checkpointing true"
                )
        self._gauge = DeviceGauge() if self.device.type == "cuda" else SavedGauge()

    # ---- which layers

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,  # noqa: ARG002 - the signature is the Trainer's
        control: TrainerControl,  # noqa: ARG002
        model: Any = None,
        **_: Any,
    ) -> None:
        """Begin with all layers recomputed but one of each kind; or say why none is."""
        self.layers = checkpointed_layers(model)
        why = None
        if self.device.type != "cuda" and self.budget is None:
            why = f"a {self.device.type} tells no limit of its memory; --memory_budget_gib does"
        elif args.torch_compile:
            why = "--torch_compile compiles all of them at once; --gradient_checkpointing true recomputes all"
        elif not self.layers:
            why = f"{type(model).__name__} has no layers that transformers recomputes one by one"
        if why:
            runtime.say(f"recompute: no layers, as {why}")
            return
        self._kinds = kinds_of(self.layers)
        last = {kind: number for number, kind in enumerate(self._kinds)}
        for number, layer in enumerate(self.layers):
            layer._gradient_checkpointing_func = partial(checkpoint, **self.kwargs)  # noqa: SLF001 - its documented name
            layer.gradient_checkpointing = number not in last.values()
            self._hooks.append(layer.register_forward_pre_hook(self._enter))
            self._hooks.append(layer.register_forward_hook(partial(self._leave, number)))
        self.recomputed = sum(layer.gradient_checkpointing for layer in self.layers)
        self._searching = True

    def recompute(self, number: int) -> None:
        """Recompute the first ``number`` layers, the others not."""
        self.recomputed = number
        for place, layer in enumerate(self.layers):
            layer.gradient_checkpointing = place < number

    # ---- one micro-batch

    @contextmanager
    def watched(self, tokens: int) -> Generator[None]:
        """Around forward and backward of a micro-batch: look at it, and say what helps when memory is out."""
        try:
            if not self._searching:
                yield
                return
            self._kept, self._peak = {}, 0
            with self._gauge.counting():
                before = self._gauge.now()
                yield
                peak = self._peak or self._gauge.peak()
            kept = [self._kept.get(number, 0) for number in range(len(self.layers))]
            plain = frozenset(n for n, layer in enumerate(self.layers) if not layer.gradient_checkpointing)
            self._looks.append(Look(tokens, before, peak, kept, plain))
        except torch.OutOfMemoryError as error:
            error.add_note(
                f"{self.recomputed} of {len(self.layers)} layers were recomputed; --memory_budget_gib with less than the "
                "device has leaves more room, --gradient_checkpointing true leaves most, and finebridge plan tells what fits"
            )
            raise

    def attempt(self, forward: Callable[[], Any]) -> Any:
        """Do a forward pass; when memory is out, once more with all layers recomputed, which then stays so on this rank."""
        if not self.retries or self.recomputed == len(self.layers):
            return forward()
        try:
            return forward()
        except torch.OutOfMemoryError as error:
            runtime.say_here(
                f"recompute: all {len(self.layers)} layers from now on, {self.recomputed} were too few ({error})"
            )
        self._least = len(self.layers)  # a search goes on: the other ranks will ask what this one wants
        self.recompute(self._least)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        return forward()

    def _enter(self, *_: Any) -> None:
        self._entered = self._gauge.now()

    def _leave(self, number: int, layer: nn.Module, _: Any, output: Any) -> None:
        if not layer.training:
            return
        self._kept[number] = self._gauge.now() - self._entered
        made = output[0] if isinstance(output, tuple) else output
        if number == len(self.layers) - 1 and made.requires_grad:
            made.register_hook(self._in_backward)

    def _in_backward(self, _: torch.Tensor) -> None:
        """Have the peak read when backward is through: the optimizer's step, which DeepSpeed takes at once, is no part."""
        engine = cast("Any", torch.autograd.Variable)._execution_engine  # noqa: SLF001 - as torch's own DDP does
        engine.queue_callback(self._behind_backward)

    def _behind_backward(self) -> None:
        self._peak = max(self._peak, self._gauge.peak())

    # ---- every step

    def on_step_end(
        self,
        args: TrainingArguments,  # noqa: ARG002
        state: TrainerState,  # noqa: ARG002
        control: TrainerControl,  # noqa: ARG002
        **_: Any,
    ) -> None:
        """Choose anew from what this step showed, on all ranks alike. Every rank comes here at the same steps."""
        if not self._searching:
            return
        looks, self._looks = self._looks, []
        self._steps += 1
        if self._steps == 1:  # the optimizer's state was made in that step
            return
        self._costs = self._costs or costs_of(looks, self._kinds)
        wanted = max(self._least, fewest(looks, self._kinds, self._costs, self.largest, self._limit()))
        peak = max(foretold(look, self._kinds, self._costs, self.largest, wanted) for look in looks)
        agreed = torch.tensor([wanted, peak], device=self.device)
        runtime.reduce(agreed, "MAX")
        wanted, peak = map(int, agreed.tolist())
        settled = wanted == self.recomputed
        self.recompute(wanted)
        if settled or self._steps == _STEPS:
            held = f"peak {peak / 2**30:.3g} of {self._room() / 2**30:.3g} GiB"
            runtime.say(f"recompute: {wanted} of {len(self.layers)} layers ({held})")
            self._fix()

    def _room(self) -> int:
        return self._gauge.room() if self.budget is None else self.budget

    def _limit(self) -> int:
        return int(self._room() * (1 - _SPARE)) if self.budget is None else self.budget

    def _fix(self) -> None:
        self._searching = False
        for hook in self._hooks:
            hook.remove()
        self._hooks.clear()
