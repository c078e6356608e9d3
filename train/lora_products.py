"""LoRA's thin products: made at once for linears that read one tensor, added in place, nothing saved but what they need.

PEFT makes of each linear five kernels as large as its output or its input (the product with B, its scaling, a sum, and in
backward the scaled gradient and a sum of input gradients), and casts the input up where adapters are in fp32. Here a linear is

    forward    y = x W^T;  y += s (x A^T) B^T       one product with all A of the linears that read x, one in place for each B
    backward   dX = dY W, into the buffer of the linear before;  dX += (s dY B) A, for all A at once

and autograd keeps x (once, no copy) and the thin x A^T. The input gradients of q, k and v meet in one buffer as each linear
hands its input on to the next one: behind it they are summed by the products themselves. Adapters in fp32 are cast to the
dtype of the products, not the inputs to theirs. A compiler that traces a layer gets the plain sum, with all A at once, and
joins it to what is computed next.

No model is known by name: which linears read the same tensor is seen in a trial pass, and looked at again in every forward
(the tensor itself, unchanged). What PEFT has beside plain LoRA is PEFT's own (``_reason``), and so is everything under ZeRO-3,
which gathers the parameters of each module by hooks that these products pass by.
"""

from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from typing import Any, cast

import torch
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import nn
from torch.nn.functional import linear
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from . import runtime
from .attention import at_rest


class LoraProducts(TrainerCallback):
    """Has the linears of a PEFT model made as above, from before the first step on; told in one line, with what is not."""

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,  # noqa: ARG002 - the signature is the Trainer's
        control: TrainerControl,  # noqa: ARG002
        model: Any = None,
        **_: Any,
    ) -> None:
        """Do it."""
        if args.torch_compile:
            runtime.say("LoRA: by PEFT's own forward, as --torch_compile compiles the whole model, trial passes too")
            return
        take_products(model, args.device, runtime.say)


def take_products(model: Any, device: torch.device, say: Callable[[str], None]) -> None:
    """Replace the forward of every linear of plain LoRA. Where it is called, adapters have their last device and dtype.

    One forward pass of 13 tokens, when no parameter is partitioned; no random number is drawn.
    """
    taken: dict[str, LoraLinear] = {}
    left: Counter[str] = Counter()
    for name, module in model.named_modules():
        if isinstance(module, LoraLinear) and "forward" not in module.__dict__:
            if reason := _reason(module):
                left[reason] += 1
            else:
                taken[name] = module
    for reason, count in left.items():
        say(f"LoRA: {count} linears by PEFT's own forward, as {reason}")
    if not taken:
        return
    together = _readers_of_one(model, taken, device, say)
    served: set[str] = set()
    for name in taken:
        if name in served:
            continue
        parent, _, last = name.rpartition(".")
        kin = next((kin for kin in together.get(type(model.get_submodule(parent)), ()) if last in kin), (last,))
        names = [full for child in kin if (full := f"{parent}.{child}") in taken]
        group = _Group([taken[full] for full in names])
        for place, full in enumerate(names):
            _serve(taken[full], group, place)
        served.update(names)
    kinds = dict.fromkeys("+".join(kin) for found in together.values() for kin in found)
    told = f", those of {', '.join(kinds)} at once" if kinds else ""
    say(f"LoRA: thin products of {len(taken)} linears added in place{told}")


def _reason(layer: Any) -> str | None:
    """Why a linear stays with PEFT, or None."""
    base = layer.base_layer
    adapters = list(layer.lora_A)
    if type(layer) is not LoraLinear or type(base) is not nn.Linear or layer.fan_in_fan_out:
        return f"{type(base).__name__} is no plain linear"
    if len(adapters) != 1 or list(layer.active_adapters) != adapters or layer.merged or layer.disable_adapters:
        return "one adapter, active and not merged, is needed"
    name = adapters[0]
    if layer.lora_variant or layer.lora_bias[name]:
        return "it is a variant of LoRA" if layer.lora_variant else "lora_B has a bias"
    if not isinstance(layer.lora_dropout[name], nn.Identity):
        return "--lora_dropout makes another input for each adapter"
    if any(parameter.requires_grad for parameter in base.parameters()):
        return "their weights train too"
    if any(hasattr(parameter, "ds_id") for parameter in layer.parameters()):
        return "ZeRO-3 gathers their parameters one by one"
    return None


def _readers_of_one(
    model: Any, taken: dict[str, LoraLinear], device: torch.device, say: Callable[[str], None]
) -> dict[type[nn.Module], list[tuple[str, ...]]]:
    """By the class of a module, which of its linears read the same tensor in its forward, in their order."""
    seen: dict[str, list[tuple[torch.Tensor, int, list[str]]]] = {}

    def note(parent: str, name: str) -> Callable[..., None]:
        def hook(_: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
            for tensor, version, names in seen.setdefault(parent, []):
                if inputs and inputs[0] is tensor and _version(tensor) == version:
                    names.extend([] if name in names else [name])
                    return
            seen[parent].extend([(tensor, _version(tensor), [name]) for tensor in inputs[:1]])

        return hook

    ids = torch.arange(13, device=device)[None] % int(model.config.get_text_config().vocab_size)
    with at_rest(model), ExitStack() as stack:
        for full, layer in taken.items():
            parent, _, name = full.rpartition(".")
            stack.callback(layer.register_forward_pre_hook(note(parent, name)).remove)
        try:
            model(input_ids=ids, attention_mask=torch.ones_like(ids))
        except (TypeError, ValueError, RuntimeError, NotImplementedError) as error:
            say(f"LoRA: the A of each linear alone, as a trial failed: {type(error).__name__}: {error}")
            return {}
    found: dict[type[nn.Module], list[tuple[str, ...]]] = {}
    for parent, groups in seen.items():
        known = found.setdefault(type(model.get_submodule(parent)), [])
        for kin in (tuple(names) for _, _, names in groups if len(names) > 1):
            if not any(set(kin) & set(other) for other in known):
                known.append(kin)
    return {kind: kin for kind, kin in found.items() if kin}


def _serve(layer: Any, group: "_Group", place: int) -> None:
    """Give a linear its new forward; PEFT's own is behind it for what may change between two calls."""
    stock, (name,) = layer.forward, layer.lora_A

    def forward(x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        kind = x.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype
        changed = layer.merged or layer.disable_adapters or layer.active_adapters != [name] or len(layer.lora_A) != 1
        if changed or args or kwargs or layer.base_layer.weight.dtype != dtype:
            return stock(x, *args, **kwargs)
        return group.forward(place, x, dtype)

    layer.forward = forward


class _Group:
    """Linears that read one tensor, in the order of their calls; between two of them it keeps the products with A."""

    def __init__(self, layers: list[LoraLinear]) -> None:
        self.layers: list[Any] = layers
        self._read: torch.Tensor | None = None
        self._version = 0  # of what is read
        self._handed_on: torch.Tensor | None = None  # what is read, for autograd: behind the linears that were called
        self._thin: dict[int, torch.Tensor] = {}  # for those that were not

    def forward(self, place: int, x: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """The output of the linear at this place."""
        if not (self._read is x and self._version == _version(x) and place in self._thin):
            self._begin(place, x, dtype)
        layer: Any = self.layers[place]
        (name,) = layer.lora_A
        base, wide, scale = layer.base_layer, layer.lora_B[name].weight.to(dtype), layer.scaling[name]
        given, thin = cast("torch.Tensor", self._handed_on), self._thin.pop(place)
        if torch.compiler.is_compiling():  # which joins the sum to what is computed next
            out = linear(given, base.weight, base.bias) + linear(thin * scale, wide).view(*given.shape[:-1], -1)
        else:
            out, onward = _Add.apply(given, thin, wide, base.weight, base.bias, scale)
            self._handed_on = onward if given.requires_grad else given
        if not self._thin:
            self._read = self._handed_on = None
        return out

    def _begin(self, place: int, x: torch.Tensor, dtype: torch.dtype) -> None:
        layers = self.layers[place:]
        factors = [next(iter(layer.lora_A.values())).weight for layer in layers]
        ranks = [factor.shape[0] for factor in factors]
        stacked = (torch.cat(factors) if len(factors) > 1 else factors[0]).to(dtype)
        given = x.to(dtype)
        self._read, self._version, self._handed_on = x, _version(x), given
        if torch.compiler.is_compiling():
            thin = linear(_rows(given), stacked).split(ranks, 1)
        else:
            onward, *thin = _Shrink.apply(given, stacked, ranks)
            self._handed_on = onward if given.requires_grad else given
        self._thin = dict(enumerate(thin, place))


def _version(tensor: torch.Tensor) -> int:
    """Changes when the tensor does. A compiler cannot ask, nor do tensors of inference mode know."""
    if torch.compiler.is_compiling() or tensor.is_inference():
        return 0
    return tensor._version  # noqa: SLF001


class _Shrink(torch.autograd.Function):
    """x and its products with stacked A: x [..., in], ``stacked`` [sum of ranks, in] -> x, [tokens, rank] for each."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, stacked: torch.Tensor, ranks: list[int]) -> tuple[torch.Tensor, ...]:
        ctx.save_for_backward(x, stacked)
        ctx.set_materialize_grads(False)
        ctx.ranks = ranks
        return x, *(_rows(x) @ stacked.t()).split(ranks, 1)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride] - called by place
        ctx: Any, dx: torch.Tensor | None, *thin: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        x, stacked = ctx.saved_tensors
        if all(part is None for part in thin):
            return dx, None, None
        rows = next(part.shape[0] for part in thin if part is not None)
        parts = [
            stacked.new_zeros(rows, rank) if part is None else part for part, rank in zip(thin, ctx.ranks, strict=True)
        ]
        joined = torch.cat(parts, 1) if len(parts) > 1 else parts[0]
        factor = joined.t() @ _rows(x) if ctx.needs_input_grad[1] else None
        return _plus(dx, joined, stacked, x.shape) if ctx.needs_input_grad[0] else None, factor, None


class _Add(torch.autograd.Function):
    """``x W^T + bias + scale * thin B^T``, and x handed on; of W and the bias no gradient is made."""

    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, thin: torch.Tensor, wide: torch.Tensor, weight: torch.Tensor,
        bias: torch.Tensor | None, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        out = x.new_empty(*x.shape[:-1], weight.shape[0])  # not a view: its readers may change it
        rows = _rows(out)
        if bias is None:
            torch.mm(_rows(x), weight.t(), out=rows)
        else:
            torch.addmm(bias, _rows(x), weight.t(), out=rows)
        rows.addmm_(thin, wide.t(), alpha=scale)
        ctx.save_for_backward(thin, wide)
        ctx.set_materialize_grads(False)
        ctx.weight, ctx.scale, ctx.shape = weight, scale, x.shape
        return out, x

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(  # pyright: ignore[reportIncompatibleMethodOverride]
        ctx: Any, dy: torch.Tensor | None, dx: torch.Tensor | None
    ) -> tuple[torch.Tensor | None, ...]:
        if dy is None:
            return dx, None, None, None, None, None
        thin, wide = ctx.saved_tensors
        rows, nothing = _rows(dy), thin.new_zeros(())
        of_x, of_thin, of_wide, *_ = ctx.needs_input_grad
        dthin = torch.addmm(nothing, rows, wide, beta=0, alpha=ctx.scale) if of_thin else None
        dwide = torch.addmm(nothing, rows.t(), thin, beta=0, alpha=ctx.scale) if of_wide else None
        return _plus(dx, rows, ctx.weight, ctx.shape) if of_x else None, dthin, dwide, None, None, None


def _plus(buffer: torch.Tensor | None, left: torch.Tensor, right: torch.Tensor, shape: torch.Size) -> torch.Tensor:
    """``buffer + left @ right``, in the buffer, which nobody else has; without one in a new one."""
    if buffer is None:
        return (left @ right).view(shape)
    _rows(buffer).addmm_(left, right)
    return buffer


def _rows(tensor: torch.Tensor) -> torch.Tensor:
    """[..., width] as [tokens, width]."""
    return tensor.reshape(-1, tensor.shape[-1])
