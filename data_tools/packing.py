"""Lengths to packs: which samples share a row of at most ``capacity`` tokens, as an index, never as a copy of tokens.

Best-fit-decreasing over all samples at once: the longest sample first, each into the fullest pack that still has room.
All randomness comes from the raw output of PCG64, which numpy keeps the same in every version and on every platform, so
every rank computes the same packs and no pack is sent from one to another.
"""

import hashlib
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import numpy.typing as npt

from .kernels import machine_code
from .schema import DataError

Ints = npt.NDArray[np.int64]


@dataclass(frozen=True)
class Packs:
    """Pack ``p`` holds the samples ``samples[offsets[p]:offsets[p + 1]]``.

    ``samples`` (int64, shape [samples]) is a permutation of all sample numbers, ``offsets`` int64, shape [packs + 1].
    """

    samples: Ints
    offsets: Ints
    capacity: int

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, pack: int) -> Ints:
        """Sample numbers of one pack, int64, shape [samples of it]."""
        return self.samples[self.offsets[pack] : self.offsets[pack + 1]]

    def tokens(self, lengths: npt.NDArray[np.integer]) -> Ints:
        """Tokens of every pack, int64, shape [packs]."""
        return np.add.reduceat(lengths[self.samples].astype(np.int64), self.offsets[:-1])

    def cost(self, lengths: npt.NDArray[np.integer]) -> Ints:
        """What the attention of every pack costs, up to a factor: the sum of squared lengths, int64, shape [packs]."""
        return np.add.reduceat(lengths[self.samples].astype(np.int64) ** 2, self.offsets[:-1])

    @cached_property
    def key(self) -> str:
        """A word that differs when any pack differs: for a checkpoint, which must go on with the same packs."""
        parts = (np.ascontiguousarray(part, dtype="<i8").tobytes() for part in (self.samples, self.offsets))
        digest = hashlib.sha256(b"".join(parts)).hexdigest()[:16]
        return f"{len(self)} packs of {self.capacity} tokens ({digest})"


def pack(lengths: npt.NDArray[np.integer], capacity: int, seed: int) -> Packs:
    """Packs of at most ``capacity`` tokens that hold every sample exactly once.

    ``lengths`` are tokens a sample, shape [samples]. The seed decides which of the equally long samples meet, the order
    inside a pack and the order of the packs. Raises DataError for a sample without tokens, one over the capacity, and
    when there is no sample.
    """
    lengths = np.ascontiguousarray(lengths, dtype=np.int64)
    if not len(lengths):
        raise DataError("there is no sample to pack")
    longest, shortest = int(lengths.argmax()), int(lengths.argmin())
    if lengths[longest] > capacity:
        raise DataError(f"sample {longest} has {lengths[longest]} tokens, a pack takes {capacity}")
    if lengths[shortest] < 1:
        raise DataError(f"sample {shortest} has no token, so it cannot be packed")
    drawn = shuffled(len(lengths), seed, 0)
    owner, count = _best_fit(_by_falling_length(drawn, lengths, capacity), lengths, capacity)
    place = shuffled(int(count), seed, 1)  # packs are made in the order of their longest sample
    samples, offsets = _grouped(drawn, place[owner], count)
    return Packs(samples, offsets, capacity)


def shuffled(count: int, *seeds: int) -> Ints:
    """A random order of ``count`` numbers that depends on the seeds alone; int64, shape [count]."""
    raw = np.random.PCG64(np.random.SeedSequence(seeds)).random_raw(count)
    return _fisher_yates(np.asarray(raw, dtype=np.uint64))


@machine_code
def _fisher_yates(raw: npt.NDArray[np.uint64]) -> Ints:
    order = np.arange(len(raw))
    for last in range(len(raw) - 1, 0, -1):
        other = np.int64(raw[last] % np.uint64(last + 1))
        order[last], order[other] = order[other], order[last]
    return order


@machine_code
def _by_falling_length(drawn: Ints, lengths: Ints, capacity: int) -> Ints:
    """The drawn samples, the longest first; equally long ones stay as drawn (a counting sort)."""
    start = np.zeros(capacity + 2, np.int64)
    for length in lengths:
        start[capacity - length + 1] += 1
    for key in range(capacity + 1):
        start[key + 1] += start[key]
    order = np.empty_like(drawn)
    for sample in drawn:
        key = capacity - lengths[sample]
        order[start[key]] = sample
        start[key] += 1
    return order


@machine_code
def _lowest_bit(word: np.uint64) -> int:
    """The place of the lowest set bit of a word that is not zero, by halving."""
    place = 0
    for width in (32, 16, 8, 4, 2, 1):
        if word & ((np.uint64(1) << np.uint64(width)) - np.uint64(1)) == 0:
            word >>= np.uint64(width)
            place += width
    return place


@machine_code
def _best_fit(order: Ints, lengths: Ints, capacity: int) -> tuple[Ints, int]:
    """The pack of every sample and the number of packs: each sample goes where it leaves the least room.

    ``top[room]`` is the newest pack with that much room and ``below`` chains the others. A bit in ``some`` says that
    there is one, a bit in ``words`` that a word of ``some`` is not zero, so the best fit is found in a few steps.
    """
    one, six, last = np.uint64(1), np.uint64(6), np.uint64(63)
    top = np.full(capacity + 1, -1, np.int64)
    below = np.empty(len(order), np.int64)
    some = np.zeros((capacity >> 6) + 1, np.uint64)
    words = np.zeros((len(some) >> 6) + 1, np.uint64)
    owner = np.empty(len(order), np.int64)
    packs = 0
    for sample in order:
        length = lengths[sample]
        word = length >> 6
        bits = some[word] >> (np.uint64(length) & last) << (np.uint64(length) & last)
        if bits == 0:
            index = (word + 1) >> 6
            rest = np.uint64(0)
            if index < len(words):
                shift = np.uint64(word + 1) & last
                rest = words[index] >> shift << shift
                while rest == 0 and index + 1 < len(words):
                    index += 1
                    rest = words[index]
            if rest != 0:
                word = (index << 6) + _lowest_bit(rest)
                bits = some[word]
        if bits != 0:
            room = (word << 6) + _lowest_bit(bits)
            chosen = top[room]
            top[room] = below[chosen]
            if top[room] < 0:
                some[word] ^= one << (np.uint64(room) & last)
                if some[word] == 0:
                    words[word >> 6] ^= one << (np.uint64(word) & last)
        else:
            chosen, room = packs, capacity
            packs += 1
        owner[sample] = chosen
        room -= length
        if room > 0:
            below[chosen] = top[room]
            top[room] = chosen
            some[room >> 6] |= one << (np.uint64(room) & last)
            words[room >> 12] |= one << ((np.uint64(room) >> six) & last)
    return owner, packs


@machine_code
def _grouped(drawn: Ints, owner: Ints, packs: int) -> tuple[Ints, Ints]:
    """The drawn samples pack by pack, as drawn inside a pack, and where each pack starts."""
    offsets = np.zeros(packs + 1, np.int64)
    for pack_number in owner:
        offsets[pack_number + 1] += 1
    for pack_number in range(packs):
        offsets[pack_number + 1] += offsets[pack_number]
    following = offsets.copy()
    samples = np.empty_like(drawn)
    for sample in drawn:
        pack_number = owner[sample]
        samples[following[pack_number]] = sample
        following[pack_number] += 1
    return samples, offsets
