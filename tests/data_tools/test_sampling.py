"""Which rows are taken: exact counts by the stated rule, and choices that nothing else changes."""

import random
from fractions import Fraction
from math import floor

import numpy as np
import pytest
from finebridge.data_tools.sampling import amount, rank_order, ranks_taken, row_hashes, times_taken

RATIOS = ("0.3", "1", "1.0", "2.5", "0.001", "1/3", "7", "0.999", "1e-2", "0.15")


@pytest.mark.parametrize("ratio", RATIOS)
def test_counts_are_those_of_the_stated_rule(ratio: str) -> None:
    for rows in (1, 2, 3, 7, 10, 99, 100, 101, 12_345, 10**9 + 1):
        wanted = floor(Fraction(ratio) * rows + Fraction(1, 2))
        assert amount(Fraction(ratio), None, rows) == wanted
        assert amount(Fraction(ratio), 50, rows) == min(wanted, 50)


def test_decimal_halves_are_not_lost_to_binary_fractions() -> None:
    assert amount(Fraction("0.15"), None, 10) == 2  # 1.5, which the double nearest to 0.15 falls short of
    assert amount(Fraction("0.35"), None, 10) == 4


def test_each_row_comes_as_often_as_any_other_or_once_more() -> None:
    chance = random.Random(1)
    for _ in range(200):
        rows, count, epoch = chance.randint(1, 40), chance.randint(0, 130), chance.randint(0, 9)
        order = rank_order(row_hashes(chance.randint(0, 9), "s", np.zeros(rows, np.int64), np.arange(1, rows + 1)))
        times = times_taken(order, count, epoch)
        assert times.sum() == count
        assert set(times.tolist()) <= {count // rows, count // rows + 1}
        if epoch == 0:  # the first of the rank order come once more
            assert (np.flatnonzero(times > count // rows) == np.sort(order[: count % rows])).all()


def test_epochs_take_turns_before_any_row_has_a_second_one() -> None:
    seen = np.zeros(10, int)
    for epoch in range(10):
        taken = ranks_taken(10, 3, epoch)
        assert len(set(taken.tolist())) == 3
        seen[taken] += 1
        assert seen.max() - seen.min() <= 1
    assert (seen == 3).all()


def test_a_larger_share_holds_the_smaller_one() -> None:
    order = rank_order(row_hashes(0, "s", np.zeros(1000, np.int64), np.arange(1000)))
    few, many = times_taken(order, 120), times_taken(order, 345)
    assert ((many - few) >= 0).all()


def test_hashes_are_the_same_for_ever() -> None:
    """Written down once: another version, platform or engine must choose the same rows."""
    files, lines = np.array([0, 0, 1, 5]), np.array([1, 2, 1, 10**9])
    assert [f"{value:016x}" for value in row_hashes(7, "gsm", files, lines).tolist()] == [
        "45ba3d473c86a406",
        "a77bf9d1423c4006",
        "7924c5dd059ddb78",
        "516b95a1d2b360a5",
    ]


def test_hashes_are_one_to_one_in_a_file_and_even() -> None:
    hashes = row_hashes(3, "s", np.zeros(100_000, np.int64), np.arange(1, 100_001))
    assert len(np.unique(hashes)) == len(hashes)
    counts = np.bincount((hashes >> np.uint64(60)).astype(int))
    assert abs(counts - 6250).max() < 6 * 6250**0.5  # six standard deviations


def test_seed_source_and_file_each_choose_anew() -> None:
    lines = np.arange(1, 2001)
    zero = np.zeros(2000, np.int64)
    plain = row_hashes(0, "s", zero, lines)
    others = (row_hashes(1, "s", zero, lines), row_hashes(0, "t", zero, lines), row_hashes(0, "s", zero + 1, lines))
    for other in others:
        both = np.isin(rank_order(plain)[:600], rank_order(other)[:600]).sum()
        assert 120 < both < 240  # 180 by chance


def test_files_behind_change_nothing_for_those_before() -> None:
    files, lines = np.repeat([0, 1], 50), np.tile(np.arange(50), 2)
    one = row_hashes(0, "s", files[:50], lines[:50])
    assert (row_hashes(0, "s", files, lines)[:50] == one).all()
    assert row_hashes(0, "s", files[:0], lines[:0]).shape == (0,)
