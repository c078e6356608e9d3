"""All ranks start again when a machine was at fault, not the input: ``--max_restarts``, and ``--elastic`` with fewer nodes.

The launching side decides. What a user must mend (bad input, a full disk), what would come again (a loss that diverged, a
second failure at the same step) and what was asked for (Ctrl-C, SIGTERM) ends the run as without these flags.
"""

import json
import signal
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..storage.manifest import steps
from ..storage.space import EXIT_DISK_FULL
from ..train.arguments import read_flags
from ..train.hf_flags import ArgumentsError
from ..train.verdicts import EXIT_HANG
from .launch import EXIT_STOPPED, EXIT_UNREACHED, Ended, say
from .nodes import Node

_NO_FAULT = (0, EXIT_UNREACHED, EXIT_DISK_FULL, 128 + signal.SIGINT, EXIT_STOPPED)
_INIT = "--init_from_checkpoint="
Attempt = Callable[[Sequence[Node], Sequence[str], str], Ended]  # nodes, words, what ranks are told of the restart


@dataclass(frozen=True, slots=True)
class Course:
    """The words of a run's ranks (``--name=value`` each), and what they become when it goes on.

    ``split`` is the batch size per device and the gradient accumulation of ``ranks`` ranks. ``base`` are the flags that
    take the place of ``--init_from_checkpoint`` once a checkpoint of this run holds more than the weights it names.
    """

    argv: Sequence[str]
    output_dir: Path
    ranks: int
    split: tuple[int, int]
    base: Mapping[str, str] = field(default_factory=dict[str, str])

    @property
    def batch(self) -> int:
        """Rows of a step, of all ranks; it stays the same, so that each step sees the same samples."""
        return self.ranks * self.split[0] * self.split[1]

    def check(self) -> None:
        """Raise ArgumentsError when a restart could take an older run's checkpoint for one of this run."""
        newest = next((folder for _, folder in steps(self.output_dir)), None)
        resume = str(read_flags(self.argv).get("resume_from_checkpoint", "false"))
        if newest is None or resume.lower() == "true" or Path(resume).resolve() == newest.resolve():
            return
        raise ArgumentsError(
            f"--max_restarts: a restart would go on from {newest}, which this run did not make. Choose another "
            "--output_dir, or go on from it with --resume_from_checkpoint true"
        )

    def new_split(self, ranks: int) -> tuple[int, int] | None:
        """Batch size per device, as large as it was where that is possible, and accumulation for other ranks, or None."""
        rows, rest = divmod(self.batch, ranks)
        size = max((size for size in range(1, self.split[0] + 1) if rows % size == 0), default=0)
        return None if rest or not size else (size, rows // size)

    def again(self, ranks: int) -> list[str]:
        """The words with which ``ranks`` ranks go on from the newest whole checkpoint; as at first where there is none."""
        words = list(self.argv)
        if steps(self.output_dir):
            if any(word.startswith(_INIT) for word in words):
                words = [word for word in words if not word.startswith(_INIT)]
                words += [f"--{name}={value}" for name, value in self.base.items()]
            words.append("--resume_from_checkpoint=true")
        split = self.new_split(ranks)
        if ranks != self.ranks and split:
            words += [f"--per_device_train_batch_size={split[0]}", f"--gradient_accumulation_steps={split[1]}"]
        return words


@dataclass(frozen=True, slots=True)
class Restarts:
    """How often all ranks may start again, and whether with fewer nodes."""

    most: int
    elastic: bool
    course: Course

    def run(self, nodes: Sequence[Node], attempt: Attempt) -> int:
        """Run it until it is done, or ends with what no restart cures; the exit code of the last attempt."""
        words, told, number, step = self.course.argv, "", 0, None
        while True:
            ended = attempt(nodes, words, told)
            if number and ended.code == EXIT_UNREACHED and ended.lost and not ended.asked:
                left = self._without(nodes, ended)
                if left is None:
                    return EXIT_HANG
                nodes = left  # nothing had started, so this is no other restart
            else:
                again = number > 0 and ended.step == step
                if (why := self._final(ended, number, again=again)) is not None:
                    if why:
                        say(f"no restart: {why}")
                    return ended.code
                number, step = number + 1, ended.step
                cause = _cause(ended)
                told = json.dumps({"number": number, "of": self.most, "cause": cause})
                since = "the newest whole checkpoint" if steps(self.course.output_dir) else "the beginning"
                left_over = f"{self.most - number} more remain" if number < self.most else "the last one"
                say(f"restart {number} of {self.most} ({left_over}) from {since}, as {cause}")
            words = self.course.again(_ranks(nodes))

    def _final(self, ended: Ended, number: int, *, again: bool) -> str | None:
        """Why this was the end, "" where that needs no word, or None for a fault that a restart may cure."""
        if ended.code in _NO_FAULT or ended.asked:
            return ""
        if ended.diverged:
            return "the run diverged, and would again"
        if again:
            at = "before the first step" if ended.step is None else f"at step {ended.step + 1}"
            return f"it failed {at} for the second time in a row; a fault that repeats is not the machine's"
        return f"--max_restarts {self.most} are used up" if number == self.most else None

    def _without(self, nodes: Sequence[Node], ended: Ended) -> Sequence[Node] | None:
        """The nodes to go on with when some cannot be reached, which is told; None when the run ends instead."""
        gone = ", ".join(ended.lost)
        if not self.elastic:
            say(f"no restart: {gone} cannot be reached; with --elastic the run would go on without")
            return None
        if nodes[0].host in ended.lost:
            say(f"no restart: {nodes[0].host} is the first node, and without it there is no run")
            return None
        there = [node for node in nodes if node.host not in ended.lost]
        count = next((count for count in range(len(there), 0, -1) if self.course.new_split(_ranks(there[:count]))), 0)
        if not count:
            say(
                f"no restart: without {gone} a global batch of {self.course.batch} is not divisible by the number of ranks; "
                "another one would give each step other samples"
            )
            return None
        used, idle = there[:count], there[count:]
        ranks = _ranks(used)
        size, accumulation = self.course.new_split(ranks) or self.course.split
        also = f" ({', '.join(node.host for node in idle)} stay idle, for the batch must divide)" if idle else ""
        say(
            f"elastic: without {gone}; world size {_ranks(nodes)} -> {ranks}{also}; the global batch stays "
            f"{self.course.batch}: --per_device_train_batch_size {size}, --gradient_accumulation_steps {accumulation}"
        )
        return used


def _ranks(nodes: Sequence[Node]) -> int:
    return sum(node.slots or 1 for node in nodes)


def _cause(ended: Ended) -> str:
    """Why a run ended, for a line."""
    why = ended.why or f"rank {ended.rank} ended with exit code {ended.code}"
    if ended.code == EXIT_HANG and not ended.lost and ended.verdict:
        why = ended.verdict
    return why if ended.step is None else f"{why}; {ended.step} steps were done"
