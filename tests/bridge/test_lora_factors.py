"""LoRA's factors of parts and of fused layers: the same change, and apart again, for any shapes; what is refused."""

from collections.abc import Callable
from fractions import Fraction

import pytest
import torch
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.family import Row
from finebridge.bridge.lora import Pair, to_hf, to_mcore
from finebridge.bridge.mapping import QKV, Copy, Gated
from hypothesis import given, settings
from hypothesis import strategies as st


def whole_numbers(seed: int) -> Callable[..., torch.Tensor]:
    """Random tensors whose products are exact in fp32, whatever the order of sums; without zeros."""
    source = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randint(1, 9, shape, generator=source).float()


@settings(deadline=None, max_examples=60)
@given(
    seed=st.integers(0, 10**6), gated=st.booleans(), shared=st.booleans(), there=st.sets(st.integers(0, 2), min_size=1)
)
def test_stacked_factors_are_the_same_change_and_come_apart(
    seed: int, gated: bool, shared: bool, there: set[int]
) -> None:
    numbers = whole_numbers(seed)
    rule, sizes = (Gated(), [6, 6]) if gated else (QKV(4, 2, 3), [12, 6, 6])
    row = Row("decoder.layers.0.x.linear_y.weight", rule, tuple(f"part{number}.weight" for number in range(len(sizes))))
    there = {number % len(sizes) for number in there}
    ranks = [2] * 3 if shared else [1 + (seed + number) % 3 for number in range(3)]
    same = numbers(2, 5)
    pairs = {
        row.hf[number]: Pair(
            same if shared else numbers(ranks[number], 5), numbers(sizes[number], ranks[number]), Fraction(3)
        )
        for number in there
    }
    fused = to_mcore(pairs, [row])
    (whole,) = fused.pairs.values()
    expected = [
        pairs[name].b @ pairs[name].a if name in pairs else torch.zeros(size, 5)
        for name, size in zip(row.hf, sizes, strict=True)
    ]
    assert torch.equal(whole.b @ whole.a, rule.to_mcore(expected))
    assert fused.alpha == 3 * fused.rank
    if shared:
        assert fused.rank == 2
    back = to_hf(fused.tensors("mindspeed"), [row], alpha=Fraction(fused.alpha))
    assert back.keys() == pairs.keys()
    for name, pair in pairs.items():
        assert (back[name].scale, back[name].rank) == (3, pair.rank)
        assert torch.equal(back[name].a, pair.a)
        assert torch.equal(back[name].b, pair.b)


def test_factors_trained_since_stay_whole_and_untrained_ones_too() -> None:
    numbers = whole_numbers(1)
    row = Row("decoder.layers.0.mlp.linear_fc1.weight", Gated(), ("gate.weight", "up.weight"))
    pairs = {name: Pair(numbers(2, 5), numbers(6, 2), Fraction(2)) for name in row.hf}
    factors = to_mcore(pairs, [row]).tensors("mindspeed")
    a, b = factors
    for trained, value in ((True, numbers(12, 4)), (False, torch.zeros(12, 4))):
        back = to_hf({a: factors[a], b: value}, [row], alpha=Fraction(8))
        assert [torch.equal(pair.a, factors[a]) for pair in back.values()] == [True, True]
        assert torch.equal(torch.cat([pair.b for pair in back.values()]), value), trained


def test_factors_by_part_are_hugging_faces() -> None:
    """Megatron-Bridge's CanonicalLoRA has a pair for query, key, value, gate and up each."""
    numbers, row = whole_numbers(1), Row("x.linear_qkv.weight", QKV(4, 2, 3), ("q", "k", "v"))
    a, b = numbers(2, 5), numbers(6, 2)
    name = "x.linear_qkv.adapter.adapter_k.linear_"
    assert to_hf({f"{name}in.weight": a, f"{name}out.weight": b}, [row], alpha=Fraction(4)) == {
        "k": Pair(a, b, Fraction(2))
    }
    row = Row("x.linear_qkv.weight", Copy(), ("qkv",))
    with pytest.raises(BridgeError, match=r"x.linear_qkv \(k\): LoRA on this part, but the layer is qkv"):
        to_hf({f"{name}in.weight": a, f"{name}out.weight": b}, [row], alpha=Fraction(4))
    with pytest.raises(BridgeError, match="LoRA of a kind that is not converted"):
        to_hf({"decoder.layers.0.x.linear_qkv.lora_A.other.weight": a}, [row], alpha=Fraction(4))


def test_layers_of_a_kind_are_filled_up_and_named() -> None:
    numbers, layers = whole_numbers(1), range(3)
    kinds = ["self_attention.linear_proj", "mlp.linear_fc2", "mlp.shared_experts.linear_fc2"]
    rows = [Row(f"decoder.layers.{n}.{kind}.weight", Copy(), (f"{n}.{kind}",)) for n in layers for kind in kinds]
    rows.append(Row("embedding.word_embeddings.weight", Copy(), ("embed",)))
    pair = Pair(numbers(2, 5), numbers(6, 2), Fraction(4))
    fused = to_mcore({"1.self_attention.linear_proj": pair, "0.mlp.linear_fc2": pair}, rows)
    assert fused.targets == ["linear_proj", "mlp.linear_fc2"]
    assert len(fused.pairs) == 6
    assert not fused.pairs["decoder.layers.0.self_attention.linear_proj.weight"].a.any()
    assert "4 of these layers are not in the adapter: zeros" in fused.said[1]


REFUSED: dict[str, tuple[dict[str, Pair], str]] = {
    "embedding": (
        {"embed": Pair(torch.ones(1, 3), torch.ones(4, 1), Fraction(1))},
        "embed: .* linear layers of attention",
    ),
    "scales": (
        {
            "q": Pair(torch.ones(1, 3), torch.ones(4, 1), Fraction(1)),
            "o": Pair(torch.ones(1, 4), torch.ones(3, 1), Fraction(2)),
        },
        "o is scaled by 2, q by 1",
    ),
    "alpha": ({"q": Pair(torch.ones(1, 3), torch.ones(4, 1), Fraction(1, 2))}, "alpha 0.5 for rank 1"),
    "rows": (
        {"q": Pair(torch.ones(1, 3), torch.ones(5, 1), Fraction(1))},
        "q, k, v: LoRA's B: 5 rows where 4 are expected",
    ),
    "columns": (
        {name: Pair(torch.ones(1, width), torch.ones(4, 1), Fraction(1)) for name, width in (("q", 3), ("k", 2))},
        "q, k, v: their A have the shapes",
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_megatron_has_not_is_refused(name: str) -> None:
    pairs, message = REFUSED[name]
    rows = [
        Row("embedding.word_embeddings.weight", Copy(), ("embed",)),
        Row("decoder.layers.0.self_attention.linear_qkv.weight", QKV(2, 2, 2), ("q", "k", "v")),
        Row("decoder.layers.0.self_attention.linear_proj.weight", Copy(), ("o",)),
    ]
    with pytest.raises(BridgeError, match=message):
        to_mcore(pairs, rows)
