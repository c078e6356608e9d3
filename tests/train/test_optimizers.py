"""AdamW without fp32 masters: what it loses (nothing on average), what it keeps, and that it can be taken up again."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from finebridge.train import optimizers
from finebridge.train.optimizers import BF16AdamW, clip_scale, takes_scale, total_norm
from torch import nn

WORDS, STEPS, RATE = 48, 240, 1e-4  # updates of 1e-4 on weights of 0.05 to 3: most are below bf16's resolution


class SmallLM(nn.Module):
    """The next word from the last two."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, 32)
        self.inner = nn.Linear(64, 96)
        self.head = nn.Linear(96, WORDS, bias=False)

    def forward(self, words: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.inner(self.embed(words[:, :2]).flatten(1)))
        return nn.functional.cross_entropy(self.head(hidden).float(), words[:, 2])


def texts() -> Iterator[torch.Tensor]:
    """Batches of three words; the third follows from the others, with noise."""
    draw = torch.Generator().manual_seed(3)
    rule = torch.randint(WORDS, (WORDS, WORDS), generator=draw) % 7
    while True:
        words = torch.randint(WORDS, (64, 3), generator=draw)
        right = torch.rand(64, generator=draw) < 0.9
        words[:, 2] = torch.where(right, rule[words[:, 0], words[:, 1]], words[:, 2])
        yield words


def fresh(seed: int = 0) -> SmallLM:
    torch.manual_seed(seed)
    return SmallLM().bfloat16()


Step = Callable[[SmallLM], None]


def with_masters(model: SmallLM) -> Step:
    masters = [weight.detach().float().clone() for weight in model.parameters()]
    adamw = torch.optim.AdamW(masters, lr=RATE, fused=True)

    def step(model: SmallLM) -> None:
        for weight, master in zip(model.parameters(), masters, strict=True):
            master.grad = weight.grad.float()
        adamw.step()
        for weight, master in zip(model.parameters(), masters, strict=True):
            weight.data.copy_(master)

    return step


def without(optimizer: Any) -> Step:
    return lambda _: optimizer.step()


WAYS: dict[str, Callable[[SmallLM], Step]] = {
    "fp32": with_masters,
    "nearest": lambda model: without(torch.optim.AdamW(model.parameters(), lr=RATE, fused=True, weight_decay=0.01)),
    "stochastic": lambda model: without(BF16AdamW(model.parameters(), lr=RATE, weight_decay=0.01)),
    "kahan": lambda model: without(BF16AdamW(model.parameters(), lr=RATE, weight_decay=0.01, kahan=True)),
}


def curve(way: str) -> torch.Tensor:
    """Loss of every step."""
    model, data = fresh(), texts()
    step = WAYS[way](model)
    losses: list[float] = []
    for _ in range(STEPS):
        loss = model(next(data))
        model.zero_grad()
        loss.backward()
        step(model)
        losses.append(float(loss.detach()))
    return torch.tensor(losses)


def test_without_masters_the_curve_is_the_masters() -> None:
    """Rounded to nearest the run stalls; both options follow fp32 masters, on average within 0.003 of each step's loss."""
    curves = {way: curve(way) for way in WAYS}
    gain = {way: float(losses[:5].mean() - losses[-40:].mean()) for way, losses in curves.items()}
    assert gain["fp32"] > 0.2
    assert gain["nearest"] < 0.3 * gain["fp32"]
    for way in ("stochastic", "kahan"):
        assert (curves[way] - curves["fp32"]).abs().mean() < 0.003, way
        assert gain[way] == pytest.approx(gain["fp32"], rel=0.03), way


def rows(*sizes: int, dtype: torch.dtype = torch.bfloat16) -> list[nn.Parameter]:
    """Weights with gradients."""
    draw = torch.Generator().manual_seed(5)
    made = [nn.Parameter(torch.randn(size, generator=draw).to(dtype)) for size in sizes]
    for weight in made:
        weight.grad = torch.randn(weight.shape, generator=draw).to(dtype)
    return made


def test_rounding_is_right_on_average() -> None:
    """Between two neighbours in bf16, as often up as the value is near the upper one; what bf16 holds stays."""
    value = torch.full((200_000,), 1 + 0.3 / 128).neg()
    noise = optimizers._mix(torch.arange(200_000, dtype=torch.int32) ^ 12345)
    for bits in (noise, noise >> 16):
        rounded = optimizers._rounded(value, bits, torch.bfloat16)
        assert set(rounded.tolist()) == {-1.0, -1 - 1 / 128}
        assert float(rounded.mean()) == pytest.approx(-1 - 0.3 / 128, abs=4e-5)  # four standard errors
        exact = torch.linspace(-3, 3, 200_000).bfloat16().float()
        assert optimizers._rounded(exact, bits, torch.bfloat16).equal(exact)
    assert abs(float(torch.corrcoef(torch.stack([noise & 0xFFFF, noise >> 16]).double())[0, 1])) < 0.01


@pytest.mark.parametrize(("kahan", "bytes_each"), [(False, 8), (True, 10)])
def test_bytes_of_a_parameter(kahan: bool, bytes_each: int) -> None:
    (weight,) = rows(1000)
    optimizer = BF16AdamW([weight], kahan=kahan)
    optimizer.step()
    held = [weight, weight.grad, *(value for value in optimizer.state[weight].values() if value.numel() > 1)]
    assert sum(tensor.nbytes for tensor in held) == bytes_each * weight.numel()


def test_fp32_parameters_are_updated_as_by_torch() -> None:
    ours, theirs = rows(50, 7, dtype=torch.float32), rows(50, 7, dtype=torch.float32)
    settings: dict[str, Any] = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.1}
    one, other = BF16AdamW(ours, kahan=True, **settings), torch.optim.AdamW(theirs, **settings)
    for _ in range(3):
        one.step()
        other.step()
    for mine, right in zip(ours, theirs, strict=True):
        assert torch.allclose(mine, right, rtol=1e-6, atol=1e-7)
        assert "compensation" not in one.state[mine]


@pytest.mark.parametrize("kahan", [False, True])
def test_a_loaded_state_goes_on_bit_for_bit(kahan: bool) -> None:
    straight, other = rows(40, 9), rows(40, 9)
    first = BF16AdamW(straight, kahan=kahan, seed=(3, 1))
    for _ in range(4):
        first.step()
    second = BF16AdamW(other, kahan=kahan, seed=(3, 1))
    second.step()
    second.step()
    third = BF16AdamW(other, kahan=kahan, seed=(3, 1))
    third.load_state_dict(copy.deepcopy(second.state_dict()))
    third.step()
    third.step()
    assert all(one.equal(two) for one, two in zip(straight, other, strict=True))
    if not kahan:  # Kahan's weights depend on the noise of the moments alone
        again = rows(40, 9)
        BF16AdamW(again, lr=1.0, seed=(3, 2)).step()
        elsewhere = rows(40, 9)
        BF16AdamW(elsewhere, lr=1.0, seed=(3, 1)).step()
        assert not again[0].equal(elsewhere[0])


def test_large_tensors_are_updated_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    whole, pieces = rows(300), rows(300)
    BF16AdamW(whole, lr=0.1, kahan=True).step()
    monkeypatch.setattr(optimizers, "CHUNK", 64)
    BF16AdamW(pieces, lr=0.1, kahan=True).step()
    assert torch.allclose(whole[0].float(), pieces[0].float(), atol=2**-7)


def test_clip_is_part_of_the_step() -> None:
    """Dividing in the optimizer's pass is clipping before it."""
    for make in (
        lambda weights: torch.optim.AdamW(weights, lr=0.1, fused=True),
        lambda weights: BF16AdamW(weights, lr=0.1),
    ):
        folded, before = rows(60, 5, dtype=torch.float32), rows(60, 5, dtype=torch.float32)
        optimizer: Any = make(folded)
        norm = total_norm([weight.grad for weight in folded])
        assert takes_scale(optimizer)
        optimizer.grad_scale = clip_scale(norm, 0.5)
        optimizer.step()
        assert float(norm) == pytest.approx(float(nn.utils.clip_grad_norm_(before, 0.5)), rel=1e-6)
        make(before).step()
        for mine, right in zip(folded, before, strict=True):
            assert torch.allclose(mine, right, rtol=1e-5, atol=1e-6)
    assert not takes_scale(torch.optim.AdamW(rows(3)))
    assert not takes_scale(torch.optim.SGD(rows(3)))
    assert float(clip_scale(torch.tensor(0.1), 1.0)) == 1.0


def test_norm_of_what_is_not_finite() -> None:
    assert total_norm([torch.tensor([1.0, float("inf")]), torch.ones(2)]).isinf()
    assert total_norm([torch.tensor([1.0, float("nan")])]).isnan()


@pytest.mark.gpu
@pytest.mark.parametrize("kahan", [False, True])
def test_compiled_is_eager(kahan: bool) -> None:
    """The kernel that torch compiles for a GPU: nearly every number the same, none further than a neighbour in bf16."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    eager, compiled = rows(100_003, 17), [nn.Parameter(weight.detach().cuda()) for weight in rows(100_003, 17)]
    for weight, source in zip(compiled, eager, strict=True):
        weight.grad = source.grad.cuda()
    for weights in (eager, compiled):
        optimizer = BF16AdamW(weights, lr=0.01, kahan=kahan)
        for _ in range(3):
            optimizer.step()
    for mine, right in zip(compiled, eager, strict=True):
        far = (mine.cpu().float() - right.float()).abs()
        assert (far > 0).float().mean() < 0.01
        assert (far <= right.float().abs() * 2**-6 + 1e-6).all()
