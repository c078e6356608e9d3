"""Packs hold every sample once, ranks share them evenly, and a packed batch is its samples side by side."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from finebridge.data_tools.collator import FlatteningCollator
from finebridge.data_tools.dataset import PackedDataset, PreparedDataset
from finebridge.data_tools.indexed import IndexedWriter
from finebridge.data_tools.packing import Packs, pack, shuffled
from finebridge.data_tools.schema import DataError
from finebridge.storage.publish import publish
from hypothesis import given, settings
from hypothesis import strategies as st

LENGTHS = st.lists(st.integers(1, 300), min_size=1, max_size=120)


def lognormal(count: int, longest: int, seed: int = 0) -> np.ndarray:
    drawn = np.exp(np.random.default_rng(seed).normal(np.log(600), 0.9, count))
    return np.clip(drawn, 16, longest).astype(np.int64)


def check_whole(packs: Packs, lengths: np.ndarray) -> None:
    assert packs.samples.dtype == packs.offsets.dtype == np.int64
    assert sorted(packs.samples.tolist()) == list(range(len(lengths)))
    assert packs.offsets[0] == 0
    assert packs.offsets[-1] == len(lengths)
    assert (np.diff(packs.offsets) > 0).all()
    sums = [int(lengths[packs[number]].sum()) for number in range(len(packs))]
    assert max(sums) <= packs.capacity
    assert packs.tokens(lengths).tolist() == sums
    assert packs.cost(lengths).tolist() == [int((lengths[packs[n]] ** 2).sum()) for n in range(len(packs))]


def plain_best_fit(lengths: list[int], capacity: int) -> int:
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    return len(rooms)


@settings(deadline=None)
@given(LENGTHS, st.integers(300, 5000), st.integers(0, 5))
def test_every_sample_is_in_one_pack_and_fits(lengths: list[int], capacity: int, seed: int) -> None:
    packs = pack(np.array(lengths), capacity, seed)
    check_whole(packs, np.array(lengths))
    assert len(packs) == plain_best_fit(lengths, capacity)
    again = pack(np.array(lengths, dtype=np.int32), capacity, seed)
    assert again.key == packs.key


@pytest.mark.parametrize("capacity", [64, 4095, 4096, 4097, 131072, 300_000])
def test_word_borders_of_the_bitmap(capacity: int) -> None:
    lengths = [
        capacity,
        capacity,
        1,
        1,
        capacity - 1,
        capacity // 2,
        capacity - capacity // 2,
        max(1, capacity - 64),
        63,
        1,
    ]
    packs = pack(np.array(lengths), capacity, 0)
    check_whole(packs, np.array(lengths))
    assert len(packs) == plain_best_fit(lengths, capacity)


def test_fill_of_real_lengths() -> None:
    lengths = lognormal(100_000, 8192)
    packs = pack(lengths, 8192, 0)
    assert lengths.sum() / (len(packs) * 8192) > 0.999
    sizes = packs.tokens(lengths) - packs.tokens(lengths).mean()
    assert abs(np.corrcoef(np.arange(len(packs)), packs.cost(lengths))[0, 1]) < 0.02, (
        "the order tells nothing of lengths"
    )
    assert sizes.max() < 8192 * 0.01


def test_packs_are_the_same_on_every_platform() -> None:
    """A resumed run may stand on another machine: a change of these words makes every packed checkpoint unusable."""
    lengths = (np.arange(1, 200) * 37) % 90 + 1
    assert pack(lengths, 128, 7).key == "72 packs of 128 tokens (e08ff3bc62cf3c8b)"
    assert shuffled(8, 1, 2).tolist() == [4, 1, 6, 3, 0, 2, 7, 5]


def test_seed_changes_the_packs() -> None:
    lengths = lognormal(500, 2048)
    assert pack(lengths, 2048, 1).key != pack(lengths, 2048, 2).key


@pytest.mark.parametrize(
    ("lengths", "message"),
    [([5, 9, 2], "sample 1 has 9 tokens, a pack takes 8"), ([5, 0], "sample 1 has no token"), ([], "no sample")],
)
def test_what_cannot_be_packed_is_an_error(lengths: list[int], message: str) -> None:
    with pytest.raises(DataError, match=message):
        pack(np.array(lengths, dtype=np.int64), 8, 0)


def prepared(parent: Path, lengths: list[int]) -> PreparedDataset:
    rng = np.random.default_rng(0)
    with publish(parent / "data", kind="dataset", made_from={}) as folder:
        with IndexedWriter(folder / "text_document") as tokens, IndexedWriter(folder / "spans_document") as spans:
            for length in lengths:
                tokens.add(rng.integers(0, 90, length, dtype=np.int32))
                spans.add(np.array([0, 1, length // 2, length], dtype=np.int32))
        np.save(folder / "rows.npy", np.zeros((len(lengths), 2), np.int64))
        (folder / "report.json").write_text(json.dumps({"kind": "chat", "terminators": [2], "files": ["a.jsonl"]}))
    return PreparedDataset(parent / "data", 40, over_long="truncate", say=lambda _: None)


def test_a_packed_batch_is_its_samples_side_by_side(tmp_path: Path) -> None:
    samples = prepared(tmp_path, [12, 30, 7, 33, 60, 9, 5, 20, 11, 40])
    assert samples.lengths.tolist() == [len(samples[n]["input_ids"]) for n in range(len(samples))]
    packs = pack(samples.lengths, 64, 0)
    data = PackedDataset(samples, packs)
    batch: dict[str, Any] = FlatteningCollator(borders=True)([data[0], data[1]])
    numbers = [*packs[0].tolist(), *packs[1].tolist()]
    items = [samples[number] for number in numbers]
    sizes = [len(item["input_ids"]) for item in items]
    assert batch["input_ids"].tolist() == [[int(i) for item in items for i in item["input_ids"]]]
    assert batch["labels"].tolist() == [[int(i) for item in items for i in (-100, *item["labels"][1:])]]
    assert batch["position_ids"].tolist() == [[place for size in sizes for place in range(size)]]
    assert {value.dtype for name, value in batch.items() if name.endswith(("ids", "labels"))} == {torch.int64}
    assert batch["cu_seq_lens_q"].dtype == torch.int32
    assert batch["cu_seq_lens_q"].tolist() == batch["cu_seq_lens_k"].tolist() == np.cumsum([0, *sizes]).tolist()
    assert batch["max_length_q"] == batch["max_length_k"] == max(sizes)
    assert "attention_mask" not in batch
    assert set(FlatteningCollator(borders=False)([data[0]])) == {"input_ids", "labels", "position_ids"}
    assert (samples[numbers[0]]["labels"] == items[0]["labels"]).all(), "the samples themselves are untouched"


def test_batch_equals_that_of_transformers(tmp_path: Path) -> None:
    from transformers import DataCollatorWithFlattening

    samples = prepared(tmp_path, [12, 30, 7, 33])
    data = PackedDataset(samples, pack(samples.lengths, 90, 0))
    ours = FlatteningCollator(borders=True)([data[0]])
    theirs = DataCollatorWithFlattening(return_flash_attn_kwargs=True)([samples[int(n)] for n in data.packs[0]])
    assert ours.keys() == theirs.keys()
    for name, value in theirs.items():
        assert torch.equal(torch.as_tensor(ours[name]), torch.as_tensor(value)), name
