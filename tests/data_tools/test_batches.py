"""Every rank's micro-steps together are the epoch's order, each sample once, however the global batch is split."""

from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from finebridge.data_tools.batches import FILLER, CheckedSamples, StepBatches, Window, deal, epoch_order
from finebridge.data_tools.collator import FlatteningCollator, PaddingCollator
from finebridge.data_tools.dataset import DummyDataset, PackedDataset
from finebridge.data_tools.packing import pack, shuffled
from finebridge.data_tools.schema import DataError
from hypothesis import given, settings
from hypothesis import strategies as st

WINDOWS = st.builds(Window, st.integers(1, 4), st.integers(1, 3), st.integers(1, 4))
ORDERS = st.sampled_from(["random", "sequential", "group_by_length"])


def lengths_of(count: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(1, 1000, count)


def batches(lengths: np.ndarray, window: Window, kind: Any = "random", *, drop_last: bool = False) -> list[StepBatches]:
    order = partial(epoch_order, kind, lengths, window.size, 3)
    return [StepBatches(order, lengths, window, rank, drop_last=drop_last) for rank in range(window.ranks)]


def steps(samplers: list[StepBatches], accumulation: int) -> list[list[int]]:
    """The samples of each optimizer step over all ranks, sorted."""
    ranks = [list(sampler) for sampler in samplers]
    assert len({len(rank) for rank in ranks}) == 1
    micro = [[n for rank in ranks for n in rank[i] if n != FILLER] for i in range(len(ranks[0]))]
    return [sorted(chain.from_iterable(micro[i : i + accumulation])) for i in range(0, len(micro), accumulation)]


@settings(deadline=None)
@given(st.integers(1, 60), WINDOWS, ORDERS, st.integers(0, 2))
def test_an_epoch_is_every_sample_once_in_its_order(count: int, window: Window, kind: Any, epoch: int) -> None:
    lengths = lengths_of(count)
    samplers = batches(lengths, window, kind)
    for sampler in samplers:
        sampler.begin(epoch)
    order = epoch_order(kind, lengths, window.size, 3, epoch)
    assert sorted(order) == list(range(count))
    expected = [sorted(order[i : i + window.size].tolist()) for i in range(0, count, window.size)]
    assert steps(samplers, window.accumulation) == expected
    for sampler in samplers:
        taken = list(sampler)
        assert len(sampler) == len(taken)
        assert all(batch == [FILLER] or (FILLER not in batch and 0 < len(batch) <= window.batch) for batch in taken)


@pytest.mark.parametrize(
    "window", [Window(1, 4, 2), Window(1, 1, 8), Window(2, 4, 1), Window(4, 1, 2), Window(8, 1, 1)]
)
def test_the_split_of_a_global_batch_changes_no_step(window: Window) -> None:
    lengths = lengths_of(45)
    for epoch in range(3):
        results = []
        for split in (Window(1, 8, 1), window):
            samplers = batches(lengths, split)
            for sampler in samplers:
                sampler.begin(epoch)
            results.append(steps(samplers, split.accumulation))
        assert results[0] == results[1]
        assert sum(map(len, results[0])) == 45


@settings(deadline=None)
@given(st.integers(1, 60), WINDOWS, st.integers(0, 10))
def test_a_resumed_epoch_is_the_rest_of_the_straight_one(count: int, window: Window, first: int) -> None:
    for sampler in batches(lengths_of(count), window):
        sampler.begin(1)
        straight = list(sampler)
        sampler.begin(1, first)
        assert list(sampler) == straight[first * window.accumulation :]


def test_epochs_differ_and_the_last_step_is_left_out_only_when_asked() -> None:
    (sampler,) = batches(lengths_of(11), Window(1, 2, 2), drop_last=True)
    taken = []
    for epoch in (0, 1):
        sampler.begin(epoch)
        taken.append([n for batch in sampler for n in batch])
    assert len(sampler) == 4
    assert [len(set(numbers)) for numbers in taken] == [8, 8]
    assert taken[0] != taken[1]
    with pytest.raises(DataError, match="3 rows are fewer than the 4 of one step"):
        batches(lengths_of(3), Window(1, 2, 2), drop_last=True)


def test_grouping_by_length_pads_less() -> None:
    lengths = lengths_of(4096)

    def padding(kind: Any) -> float:
        (sampler,) = batches(lengths, Window(1, 4, 1), kind)
        rows = [lengths[batch] for batch in sampler]
        return 1 - sum(row.sum() for row in rows) / sum(row.max() * len(row) for row in rows)

    assert padding("group_by_length") < 0.02
    assert padding("random") > 0.2
    order = epoch_order("group_by_length", lengths, 4, 3, 0)
    assert abs(np.corrcoef(np.arange(4096), lengths[order])[0, 1]) < 0.1, "steps come in random order"


@settings(deadline=None)
@given(st.integers(1, 60), WINDOWS, st.integers(0, 3))
def test_dealing_keeps_each_step_and_its_samples(count: int, window: Window, seed: int) -> None:
    order = shuffled(count, seed)
    dealt = deal(order, lengths_of(count, seed), window)
    assert dealt.shape[1:] == (window.ranks, window.batch)
    for start in range(0, count, window.size):
        micro = start // (window.ranks * window.batch)
        of_step = dealt[micro : micro + window.accumulation].ravel()
        assert sorted(of_step[of_step >= 0]) == sorted(order[start : start + window.size])


def test_dealing_evens_out_the_ranks() -> None:
    cost, window = lengths_of(6400) ** 2, Window(ranks=8, batch=1, accumulation=8)

    def slowest(by_rank: np.ndarray) -> tuple[float, float]:
        grouped = cost[by_rank].reshape(-1, 8, 8)
        by_micro_step = (grouped.max(2).sum(1) / grouped.mean(2).sum(1)).mean()
        return float((grouped.sum(1).max(1) / grouped.sum(1).mean(1)).mean()), float(by_micro_step)

    order = shuffled(6400, 0)
    before, after = slowest(order), slowest(deal(order, cost, window))
    assert before[0] > 1.2
    assert after[0] < 1.05
    assert after[1] < 1 + (before[1] - 1) / 4


class Fixed:
    """Samples as they are given."""

    key, terminators = "fixed", [2]

    def __init__(self, *rows: tuple[list[int], list[int]]) -> None:
        self.rows = rows
        self.lengths = np.array([len(ids) for ids, _ in rows])

    def __len__(self) -> int:
        return len(self.rows)

    def name_of(self, index: int) -> str:
        return f"data.jsonl:{index + 1}"

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        ids, labels = self.rows[index]
        return {"input_ids": np.array(ids), "labels": np.array(labels)}


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (([1, 2, 3], [-100, -100, -100]), "data.jsonl:1: no token of this sample carries loss"),
        (([1, 2, 3], [1, -100, -100]), "data.jsonl:1: no token of this sample carries loss"),
        (([1, 99, 3], [-100, -100, 3]), "data.jsonl:1: token 99 is not in the model's vocabulary of 50"),
        (([1, 2, -7], [-100, 2, -100]), "data.jsonl:1: token -7"),
        (([1, 2, 3], [-100, -100, 50]), "data.jsonl:1: label 50 is not in the model's vocabulary of 50"),
        (([1, 2, 3], [-100, 2, -5]), "data.jsonl:1: label -5"),
    ],
)
def test_a_sample_that_the_model_cannot_take_is_named(row: tuple[list[int], list[int]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        CheckedSamples(Fixed(row), 50)[0]


def test_fillers_carry_no_loss_and_items_know_their_number() -> None:
    samples = DummyDataset(50, 30, count=9)
    checked = CheckedSamples(samples, 50)
    batch = PaddingCollator(0)([checked[4], checked[FILLER]])
    assert batch["samples"] == [4, FILLER]
    assert (batch["labels"][1] == -100).all()
    assert batch["attention_mask"].sum(1).tolist() == [30, 8]
    packed = CheckedSamples(PackedDataset(samples, pack(samples.lengths, 64, 0)), 50)
    row = FlatteningCollator(borders=True)([packed[FILLER]])
    assert row["samples"] == [FILLER]
    assert row["input_ids"].shape == (1, 8)
    assert (row["labels"] == -100).all()
    assert row["cu_seq_lens_q"].tolist() == [0, 8]


def test_a_packs_name_is_its_samples(tmp_path: Path) -> None:
    samples = DummyDataset(50, 5, count=20)
    packs = pack(samples.lengths, 50, 0)
    data = PackedDataset(samples, packs)
    numbers = packs[1].tolist()
    assert data.name_of(1) == ", ".join(f"random sample {n}" for n in numbers[:5]) + " and 5 more"
    assert data.lengths.tolist() == [50, 50]
    assert data.cost.tolist() == [250, 250]
