"""The rules run backwards to what they started from, for any shapes."""

import pytest
import torch
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.mapping import (
    QKV,
    Copy,
    DeltaNet,
    Gated,
    GatedQKV,
    MinusOne,
    Stacked,
    Vocab,
    hf_dtype,
    mcore_dtype,
)
from hypothesis import given, settings
from hypothesis import strategies as st


@settings(deadline=None, max_examples=60)
@given(groups=st.integers(1, 4), ratio=st.integers(1, 4), size=st.integers(1, 6), hidden=st.integers(0, 5))
def test_query_groups(groups: int, ratio: int, size: int, hidden: int) -> None:
    rule = QKV(groups * ratio, groups, size)
    tail = (hidden,) if hidden else ()
    parts = [torch.randn(rows * size, *tail) for rows in (groups * ratio, groups, groups)]
    whole = rule.to_mcore(parts)
    assert whole.shape == ((groups * ratio + 2 * groups) * size, *tail)
    assert all(torch.equal(a, b) for a, b in zip(rule.to_hf(whole), parts, strict=True))
    first = whole[: (ratio + 2) * size]
    assert torch.equal(first[: ratio * size], parts[0][: ratio * size]), "the first group's queries stand first"
    assert torch.equal(first[ratio * size :][:size], parts[1][:size])


@given(groups=st.integers(1, 3), ratio=st.integers(1, 3), size=st.integers(1, 4), hidden=st.integers(1, 4))
def test_parts_in_one_tensor(groups: int, ratio: int, size: int, hidden: int) -> None:
    inner = QKV(groups * ratio, groups, size)
    rows = (groups * ratio * size, groups * size, groups * size)
    parts = [torch.randn(count, hidden) for count in rows]
    rule = Stacked(inner, rows)
    whole = rule.to_mcore([torch.cat(parts)])
    assert torch.equal(whole, inner.to_mcore(parts))
    (back,) = rule.to_hf(whole)
    assert torch.equal(back, torch.cat(parts))


@given(rows=st.integers(1, 9), hidden=st.integers(1, 5))
def test_gated(rows: int, hidden: int) -> None:
    gate, up = torch.randn(2, rows, hidden)
    whole = Gated().to_mcore([gate, up])
    assert torch.equal(whole[:rows], gate)
    assert all(torch.equal(a, b) for a, b in zip(Gated().to_hf(whole), (gate, up), strict=True))


@settings(deadline=None, max_examples=40)
@given(groups=st.integers(1, 3), ratio=st.integers(1, 3), size=st.integers(1, 4), hidden=st.integers(1, 3))
def test_gated_query_groups(groups: int, ratio: int, size: int, hidden: int) -> None:
    rule = GatedQKV(groups * ratio, groups, size)
    parts = [torch.randn(rows * size, hidden) for rows in (2 * groups * ratio, groups, groups)]
    whole = rule.to_mcore(parts)
    assert all(torch.equal(a, b) for a, b in zip(rule.to_hf(whole), parts, strict=True))
    heads = parts[0].view(groups * ratio, 2, size, hidden)
    last = whole.view(groups, -1, hidden)[-1].split(size)
    assert torch.equal(last[0], heads[-ratio, 0]), "queries of a group stand first"
    assert torch.equal(last[2 * ratio - 1], heads[-1, 1]), "then their gates"
    assert torch.equal(last[2 * ratio], parts[1][-size:])


@settings(deadline=None, max_examples=40)
@given(heads=st.integers(1, 3), ratio=st.integers(1, 3), key=st.integers(1, 4), value=st.integers(1, 4))
def test_gated_delta_net(heads: int, ratio: int, key: int, value: int) -> None:
    rule = DeltaNet(heads, heads * ratio, key, value)
    parts = [torch.randn(heads * (2 * key + 2 * ratio * value), 3), torch.randn(heads * 2 * ratio, 3)]
    whole = rule.to_mcore(parts)
    assert all(torch.equal(a, b) for a, b in zip(rule.to_hf(whole), parts, strict=True))
    by_head = parts[0].view(heads, -1, 3)
    assert torch.equal(whole[: heads * key], by_head[:, :key].reshape(-1, 3)), "all queries stand first"
    assert torch.equal(whole[-heads * ratio :], parts[1].view(heads, 2, ratio, 3)[:, 1].reshape(-1, 3)), "alphas last"


@given(
    st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=1),
    st.sampled_from(["bf16", "fp16", "fp32"]),
)
def test_a_distance_from_one_has_room_for_all_digits(values: list[float], kind: str) -> None:
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[kind]
    weight = torch.tensor(values).to(dtype)
    weight[(weight.abs() < 2**-15) | (weight.abs() > 2**15)] = 0.25  # what is refused, and what fp16 does not hold
    made = MinusOne().to_mcore([weight])
    assert made.dtype == mcore_dtype(MinusOne(), dtype)
    assert torch.equal(made.double(), weight.double() - 1)
    back = MinusOne().to_hf(made)[0].to(hf_dtype(MinusOne(), made.dtype, dtype))
    assert back.dtype == dtype
    assert torch.equal(back, weight)


def test_the_type_of_a_distance_from_one() -> None:
    bf16, fp32, fp64 = torch.bfloat16, torch.float32, torch.float64
    assert hf_dtype(MinusOne(), fp64, bf16) == fp32, "a norm that is wider than its model comes back so"
    assert hf_dtype(MinusOne(), bf16, bf16) == bf16, "Megatron wrote it"
    assert hf_dtype(MinusOne(), fp32, fp32) == fp32, "Megatron wrote it"
    assert (hf_dtype(Copy(), fp32, bf16), mcore_dtype(Copy(), bf16)) == (fp32, bf16)


def test_padded_rows_of_the_vocabulary_go() -> None:
    table = torch.randn(10, 3)
    assert Vocab(10).to_mcore([table]) is table
    assert torch.equal(Vocab(10).to_hf(torch.cat([table, torch.zeros(6, 3)]))[0], table)
    assert Copy().to_hf(Copy().to_mcore([table]))[0] is table


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: Vocab(10).to_mcore([torch.ones(12, 3)]), "12 rows, config.json says vocab_size 10"),
        (lambda: Vocab(10).to_hf(torch.ones(9, 3)), "9 rows, config.json says vocab_size 10"),
        (lambda: Gated().to_mcore([torch.ones(4, 3), torch.ones(5, 3)]), r"gate \(4, 3\) and up \(5, 3\) differ"),
        (lambda: Gated().to_hf(torch.ones(5, 3)), "5 rows are no gate and up"),
        (lambda: QKV(4, 2, 8).to_mcore([torch.ones(32, 3), torch.ones(8, 3), torch.ones(16, 3)]), "8 rows where 16"),
        (lambda: QKV(4, 2, 8).to_hf(torch.ones(60, 3)), "60 rows where 64 are expected"),
        (lambda: Stacked(QKV(4, 2, 8), (32, 16, 16)).to_mcore([torch.ones(60, 3)]), "60 rows where 64 are expected"),
        (
            lambda: GatedQKV(4, 2, 8).to_mcore([torch.ones(32, 3), torch.ones(16, 3), torch.ones(16, 3)]),
            "32 rows where 64",
        ),
        (lambda: GatedQKV(4, 2, 8).to_hf(torch.ones(64, 3)), "64 rows where 96 are expected"),
        (lambda: DeltaNet(2, 4, 8, 8).to_mcore([torch.ones(96, 3), torch.ones(6, 3)]), "6 rows where 8 are expected"),
        (lambda: DeltaNet(2, 4, 8, 8).to_hf(torch.ones(100, 3)), "100 rows where 104 are expected"),
        (lambda: MinusOne().to_mcore([torch.tensor([1e-6]).bfloat16()]), "so close to 0"),
        (lambda: MinusOne().to_mcore([torch.tensor([-0.0])]), "so close to 0"),
    ],
)
def test_shapes_that_do_not_fit(work: object, message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        work()  # pyright: ignore[reportCallIssue]
