"""AdamW on bf16 weights without fp32 masters: stochastic rounding or Kahan's compensation keeps what bf16 would drop.

bf16 has 8 bits of mantissa: a weight of 1 does not change by an update below 0.002, and a mean of squares that decays by a
thousandth never falls. Rounded to nearest such a run stalls in silence. Here arithmetic is in fp32, and what is stored is
rounded up or down at random so that the mean over steps is exact (https://arxiv.org/abs/2010.06192); ``kahan`` stores in a
second bf16 number what the weight lost. Moments are rounded at random in both.

Bytes a parameter with its gradient: 8, with Kahan 10; with fp32 masters and moments 16.
"""

import hashlib
import struct
from collections.abc import Callable
from functools import cache
from typing import Any

import torch

CHUNK = 1 << 26  # elements a kernel takes at once: what it holds in fp32 when it is not compiled stays small


class BF16AdamW(torch.optim.Optimizer):
    """AdamW whose weights, moments and gradients are bf16; fp32 parameters are updated in fp32 as usual.

    ``seed`` and the number of steps that a parameter has had decide every rounding, so that a resumed run rounds as the
    uninterrupted one. Ranks that hold the same weights need the same seed, ranks with parts of their own another.
    ``grad_scale``, when set, is what gradients are divided by in the same pass (a scalar tensor, as torch's own fused
    optimizers take it).
    """

    def __init__(
        self,
        params: Any,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        kahan: bool = False,
        seed: tuple[int, int] = (0, 0),
    ) -> None:
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})
        self.kahan, self.seed = kahan, seed
        self.grad_scale: torch.Tensor | None = None
        self._step_supports_amp_scaling = True
        # Which noise is whose: the given parameters in their order, then those that ZeRO puts in their place, in its own.
        given = [weight for group in self.param_groups for weight in group["params"]]
        self._numbers: dict[torch.Tensor, int] = {weight: number for number, weight in enumerate(given)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Update every parameter that has a gradient; there is no closure."""
        assert closure is None
        work = [(group, weight) for group in self.param_groups for weight in group["params"] if weight.grad is not None]
        if not work:
            return
        device = work[0][1].device
        keys: list[int] = []
        settings: list[list[float]] = []
        for group, weight in work:
            state = self._state_of(weight)
            state["step"] += 1
            done = int(state["step"])
            settings.append(_settings(group, done))
            number = self._numbers.setdefault(weight, len(self._numbers))
            keys += [_key(*self.seed, done, number, start) for start in range(0, weight.numel(), CHUNK)]
        key = iter(torch.tensor(keys, dtype=torch.int32, device=device))
        told = torch.tensor(settings, dtype=torch.float32, device=device)
        scale = torch.ones((), device=device) if self.grad_scale is None else self.grad_scale.to(device).reshape(())
        for (_, weight), row in zip(work, told, strict=True):
            state = self.state[weight]
            names = ("exp_avg", "exp_avg_sq", "compensation")
            parts = [weight.view(-1), weight.grad.reshape(-1)]
            parts += [state[name].view(-1) for name in names if name in state]
            for chunk in zip(*(part.split(CHUNK) for part in parts), strict=True):
                _kernel(device.type)(*chunk, settings=row, scale=scale, key=next(key))

    def _state_of(self, weight: torch.Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[weight]
        state.setdefault("step", torch.zeros(()))
        names = ["exp_avg", "exp_avg_sq"]
        if self.kahan and weight.dtype == torch.bfloat16:
            names.append("compensation")
        for name in names:
            if name not in state:
                state[name] = torch.zeros_like(weight)
        return state


def has_fused() -> bool:
    """Whether torch has a fused AdamW for the device that is trained on."""
    from torch.utils import _foreach_utils as kernels

    device = torch.accelerator.current_accelerator(check_available=True)
    return (device.type if device else "cpu") in kernels._get_fused_kernels_supported_devices()  # noqa: SLF001 # pyright: ignore[reportPrivateUsage]


def takes_scale(optimizer: Any) -> bool:
    """Whether an optimizer divides the gradients by its ``grad_scale`` while it reads them, as torch's fused ones do."""
    fused = all(group.get("fused", True) for group in optimizer.param_groups)  # a loaded state may say otherwise
    return fused and bool(getattr(optimizer, "_step_supports_amp_scaling", False))


def clip_scale(norm: torch.Tensor, limit: float) -> torch.Tensor:
    """What gradients of that norm are divided by, so that it is no longer than ``limit``: a scalar fp32 tensor, at least 1."""
    return ((norm.float() + 1e-6) / limit).clamp(min=1.0)


def total_norm(tensors: list[torch.Tensor]) -> torch.Tensor:
    """The 2-norm of all elements, a scalar fp64 tensor on their device; summed in fp32 pieces, without copies."""
    pieces = [piece for tensor in tensors for piece in tensor.detach().reshape(-1).split(1 << 24)]
    foreach: Any = torch
    return torch.linalg.vector_norm(torch.stack(foreach._foreach_norm(pieces, 2, dtype=torch.float32)).double())  # noqa: SLF001


def _settings(group: dict[str, Any], step: int) -> list[float]:
    beta1, beta2 = group["betas"]
    rate = float(group["lr"])
    return [
        1 - rate * group["weight_decay"], rate / (1 - beta1**step), beta1, 1 - beta1, beta2, 1 - beta2,
        (1 - beta2**step) ** -0.5, group["eps"],
    ]  # fmt: skip


def _key(*parts: int) -> int:
    """32 signed bits that say which noise a chunk gets."""
    made = hashlib.blake2b(struct.pack(f"<{len(parts)}q", *parts), digest_size=4).digest()
    return int.from_bytes(made, "little", signed=True)


def adamw(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    mean: torch.Tensor,
    square: torch.Tensor,
    lost: torch.Tensor | None = None,
    *,
    settings: torch.Tensor,
    scale: torch.Tensor,
    key: torch.Tensor,
) -> None:
    """One step on flat tensors of one length, in place. Element-wise throughout: compiled it is one kernel."""
    keep, rate, beta1, rest1, beta2, rest2, correct, epsilon = settings.unbind()
    slope = gradient.float() / scale
    new_mean = mean.float() * beta1 + slope * rest1
    new_square = square.float() * beta2 + slope * slope * rest2
    value = weight.float() if lost is None else weight.float() + lost.float()
    value = value * keep - rate * new_mean / (new_square.sqrt() * correct + epsilon)
    first = _mix(torch.arange(weight.numel(), dtype=torch.int32, device=weight.device) ^ key)
    second = _mix(first + 0x3C6EF372)
    mean.copy_(_rounded(new_mean, first, mean.dtype))
    square.copy_(_rounded(new_square, second, square.dtype))
    if lost is None:
        weight.copy_(_rounded(value, first >> 16, weight.dtype))
        return
    # To nearest by its bits: of a cast to bf16 and back the compiler makes nothing, and nothing would be lost.
    nearest = _rounded(value, 0x7FFF + ((value.view(torch.int32) >> 16) & 1), weight.dtype)
    weight.copy_(nearest)
    lost.copy_(value - nearest.float())


def _rounded(value: torch.Tensor, noise: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """fp32 with a mantissa that bf16 holds, up or down by the low 16 bits of ``noise``; in fp32 as it is."""
    if dtype == torch.float32:
        return value
    bits = value.view(torch.int32) + (noise & 0xFFFF)
    return (bits & -0x10000).view(torch.float32)


def _mix(bits: torch.Tensor) -> torch.Tensor:
    """Each int32 made to look random: the bijection ``lowbias32`` of https://nullprogram.com/blog/2018/07/31/."""
    bits = (bits ^ ((bits >> 16) & 0xFFFF)) * 0x7FEB352D
    bits = (bits ^ ((bits >> 15) & 0x1FFFF)) * (0x846CA68B - (1 << 32))
    return bits ^ ((bits >> 16) & 0xFFFF)


@cache
def _kernel(device: str) -> Callable[..., None]:
    """``adamw``, on a GPU compiled; where it cannot be compiled as it is, which is told once."""
    if device == "cpu":
        return adamw
    compiled: Any = torch.compile(adamw, dynamic=True, fullgraph=True)
    failed: list[str] = []

    def run(*tensors: torch.Tensor, **settings: torch.Tensor) -> None:
        from torch._dynamo.exc import TorchDynamoException

        if not failed:
            try:
                return compiled(*tensors, **settings)
            except TorchDynamoException as error:
                failed.append(str(error).partition("\n")[0])
                print(f"optimizer: its kernel cannot be compiled here ({failed[0]}); slower without", flush=True)
        return adamw(*tensors, **settings)

    return run
