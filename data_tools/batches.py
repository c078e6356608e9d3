"""Which samples each rank takes in each micro-step of an epoch, and where a run that resumes goes on.

The order of an epoch follows from the data, a seed and the epoch alone. Each optimizer step takes the next
``ranks x batch x accumulation`` samples of it, so two runs that split the same global batch in different ways see the same
samples in each step, in any number of ranks. The last step of an epoch takes what is left: no sample is repeated and none
is left out. A rank without a sample there gets ``FILLER``, so that all ranks make the same number of steps.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from .dataset import IGNORE_INDEX, Item, Samples
from .kernels import machine_code
from .packing import shuffled
from .schema import DataError

FILLER = -1
_FILLER_TOKENS = 8
_BLOCK = 64  # optimizer steps whose samples are sorted by length together

Ints = npt.NDArray[np.int64]
Order = Literal["random", "sequential", "group_by_length"]


@dataclass(frozen=True)
class Window:
    """The samples of one optimizer step: ``ranks`` x ``batch`` x ``accumulation``."""

    ranks: int
    batch: int
    accumulation: int

    @property
    def size(self) -> int:
        """Samples of one optimizer step over all ranks."""
        return self.ranks * self.batch * self.accumulation


def epoch_order(kind: Order, lengths: Ints, size: int, seed: int, epoch: int) -> Ints:
    """The samples of an epoch in the order in which steps of ``size`` take them; int64, shape [samples].

    ``group_by_length`` sorts blocks of 64 random steps by length and shuffles the steps: less padding, less random.
    """
    if kind == "sequential":
        return np.arange(len(lengths))
    order = shuffled(len(lengths), seed, 2, epoch)
    if kind == "group_by_length":
        block = np.arange(len(order)) // (size * _BLOCK)
        order = order[np.lexsort((-lengths[order], block))]
        whole = order[: len(order) // size * size].reshape(-1, size)
        order = np.concatenate([whole[shuffled(len(whole), seed, 3, epoch)].ravel(), order[whole.size :]])
    return order


def deal(order: Ints, cost: Ints, window: Window) -> Ints:
    """Deal the samples of each step to ranks and micro-steps; int64, shape [micro-steps, ranks, batch], FILLER where none is.

    ``cost`` (shape [samples]) is what each sample costs. From the costliest of a step down, each goes to the rank that has
    least so far, and each rank takes its own in that order: so all ranks have nearly the same to do, samples of one
    micro-step are alike (little padding, and under ZeRO-3 ranks wait for one another in each), and the largest come first.
    """
    at_once = window.ranks * window.batch
    padded = np.concatenate([order, np.full(-len(order) % at_once, FILLER)])
    step = np.arange(len(padded)) // window.size
    falling = padded[np.lexsort((np.where(padded < 0, 0, -cost[padded]), step))]  # stable: equal costs keep their order
    dealt = _dealt(falling, cost, window.ranks, window.batch, window.accumulation)
    return dealt.reshape(-1, window.ranks, window.batch)


class StepBatches:
    """A batch sampler: the sample numbers of each micro-step of one rank, ``[FILLER]`` where it has none.

    ``begin`` sets the epoch and the optimizer step to start with: where a run goes on costs nothing to find. With
    ``cost_of`` each epoch has samples of its own, as many as ``cost`` is long, whose numbers go on from epoch to epoch.
    """

    def __init__(
        self,
        order: Callable[[int], Ints],
        cost: Ints,
        window: Window,
        rank: int,
        *,
        drop_last: bool,
        cost_of: Callable[[int], Ints] | None = None,
    ) -> None:
        self.order, self.cost, self.window, self.rank = order, cost, window, rank
        self._cost_of = cost_of
        count = len(cost) // window.size * window.size if drop_last else len(cost)
        if not count:
            raise DataError(
                f"{len(cost)} rows are fewer than the {window.size} of one step, and --dataloader_drop_last leaves them out"
            )
        self._count = count
        self._epoch, self._first = 0, 0

    def begin(self, epoch: int, step: int = 0) -> None:
        """The next iteration is of this epoch, from this optimizer step on."""
        self._epoch, self._first = epoch, step

    def __len__(self) -> int:
        """Micro-steps of a whole epoch."""
        at_once = self.window.ranks * self.window.batch
        return (self._count + at_once - 1) // at_once

    def __iter__(self) -> Iterator[list[int]]:
        order = self.order(self._epoch)[self._first * self.window.size : self._count]
        cost, first = self.cost, 0
        if self._cost_of:
            cost, first = self._cost_of(self._epoch), self._epoch * len(self.cost)
        for batch in deal(order, cost, self.window)[:, self.rank]:
            yield (batch[batch >= 0] + first).tolist() or [FILLER]


class CheckedSamples:
    """Another dataset whose items know their ``number`` and are fit for the model that is trained.

    Raises DataError, naming file and line, for a sample without a token that carries loss and for ids that the model's
    vocabulary does not have (on a GPU these end in an assertion that names nothing). ``FILLER`` gives a few tokens of the
    first sample without loss.
    """

    def __init__(self, data: Samples, vocabulary: int) -> None:
        self.data, self.vocabulary = data, vocabulary

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, number: int) -> Item:
        if number == FILLER:
            item = {name: values[:_FILLER_TOKENS] for name, values in self.data[0].items()}
            item["labels"] = np.full_like(item["labels"], IGNORE_INDEX)
            if "lengths" in item:
                item["lengths"] = np.array([len(item["labels"])])
            return {**item, "number": np.array(FILLER)}
        item = self.data[number]
        ids, labels = item["input_ids"], item["labels"]
        if not (labels[1:] != IGNORE_INDEX).any():
            raise DataError(
                f"{self.data.name_of(number)}: no token of this sample carries loss, so it cannot be trained on"
            )
        for what, values in (("token", ids), ("label", labels[labels != IGNORE_INDEX])):
            low, high = int(values.min()), int(values.max())
            if low < 0 or high >= self.vocabulary:
                wrong = low if low < 0 else high
                raise DataError(
                    f"{self.data.name_of(number)}: {what} {wrong} is not in the model's vocabulary of {self.vocabulary}; "
                    "was the data prepared with another model's tokenizer?"
                )
        return {**item, "number": np.array(number)}


@machine_code
def _dealt(order: Ints, cost: Ints, ranks: int, batch: int, accumulation: int) -> Ints:
    """Samples that fall in cost inside each step, dealt to ranks and laid out micro-step by micro-step."""
    window = ranks * batch * accumulation
    result = np.empty_like(order)
    total = np.zeros(ranks, np.int64)
    filled = np.zeros(ranks, np.int64)
    for start in range(0, len(order), window):
        size = min(window, len(order) - start)
        total[:] = 0
        filled[:] = 0
        for chosen in order[start : start + size]:
            least = -1
            for rank in range(ranks):
                if filled[rank] * ranks < size and (least < 0 or total[rank] < total[least]):
                    least = rank
            micro, place = filled[least] // batch, filled[least] % batch
            result[start + (micro * ranks + least) * batch + place] = chosen
            filled[least] += 1
            if chosen >= 0:
                total[least] += cost[chosen]
    return result
