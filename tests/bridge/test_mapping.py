"""The rules run backwards to what they started from, for any shapes."""

import pytest
import torch
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.mapping import QKV, Copy, Gated, Stacked, Vocab
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
    ],
)
def test_shapes_that_do_not_fit(work: object, message: str) -> None:
    with pytest.raises(BridgeError, match=message):
        work()  # pyright: ignore[reportCallIssue]
