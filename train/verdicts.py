"""What the beats of all ranks say: is one of them stopped, or stuck while others wait for it? No clock, no socket here."""

from collections.abc import Mapping
from dataclasses import dataclass

EXIT_HANG = 75  # of every rank of a run in which one was found dead, stopped or stuck
FIRST_STEP = 10  # the first step may take so many limits: kernels are compiled and memory is mapped
_WAITING = {
    "data": "waiting for a batch",
    "count": "counting tokens with the others",
    "forward": "in the forward pass",
    "backward": "in the backward pass",
    "optimizer": "in the optimizer's step",
}  # the phases in which the others may not be kept waiting; loading, saving and evaluating take as long as they take
_ADVICE = {
    "data": "look at the storage of its data and its DataLoader workers",
    "forward": "look at its device (nvidia-smi, dmesg), or whether it got another batch than the others",
}
_ADVICE["count"] = _ADVICE["backward"] = _ADVICE["optimizer"] = _ADVICE["forward"]


@dataclass(frozen=True, slots=True)
class Beat:
    """Where a rank is: finished optimizer steps, micro-step, phase, and ``turn``, the phases entered since that step.

    ``still`` is how many seconds it has been there, ``silent`` for how many nothing was heard of it, ``fresh`` whether
    it has not finished a step of this run yet.
    """

    rank: int
    host: str = "?"
    pid: int = 0
    step: int = 0
    micro: int = 0
    phase: str = "start"
    turn: int = 0
    still: float = 0.0
    silent: float = 0.0
    fresh: bool = True

    @property
    def name(self) -> str:
        """The rank and where it runs."""
        return f"rank {self.rank} (host {self.host}, process {self.pid})"

    @property
    def place(self) -> str:
        """Where in the run it is."""
        if self.phase == "start":
            return "the start, before the first step"
        micro = f", micro-step {self.micro}" if self.micro > 1 else ""
        return f"step {self.step + 1}{micro}, {_WAITING.get(self.phase, f'in {self.phase}')}"


def dead(beat: Beat) -> str:
    """The verdict on a rank whose connection broke without a goodbye."""
    return (
        f"{beat.name} has died; {beat.silent:.0f} s before it was at {beat.place}. Its own log says why; when that ends "
        "without a word, the machine ran out of memory or somebody killed it (dmesg)"
    )


def silent(beat: Beat) -> str:
    """The verdict on a rank that says nothing any more."""
    return (
        f"{beat.name} has said nothing for {beat.silent:.0f} s; it was at {beat.place}. It is stopped or frozen, or its "
        "machine or network is gone"
    )


def failed(beat: Beat, error: str) -> str:
    """The verdict on a rank that said goodbye with an error."""
    return f"{beat.name} failed at {beat.place}: {error}"


def judge(beats: Mapping[int, Beat], limit: float) -> str | None:
    """The verdict on the ranks that still run, or None: one silent for ``limit`` seconds, or one behind the others.

    A rank is stuck when it has not moved for ``limit`` seconds in a phase in which others are kept waiting, and another
    that is further has not moved for as long. When all are equally far nobody is: a slow step is no fault.
    """
    for beat in beats.values():
        if beat.silent > limit:
            return silent(beat)
    if not beats:
        return None
    last = min(beats.values(), key=_progress)
    if (apart := _apart(beats, limit)) is not None:
        return apart
    waiting = [beat for beat in beats.values() if _progress(beat) > _progress(last) and beat.still > limit]
    allowed = limit * FIRST_STEP if last.fresh and last.phase != "data" else limit
    if not waiting or last.phase not in _WAITING or last.still <= allowed:
        return None
    first = min(waiting, key=_progress)
    return (
        f"{last.name} is stuck at {last.place} for {last.still:.0f} s, while rank {first.rank} is at {first.place} and "
        f"waits for it; {_ADVICE[last.phase]}. If it is only slow, give a larger --heartbeat_timeout"
    )


def _apart(beats: Mapping[int, Beat], limit: float) -> str | None:
    """The verdict on ranks that have entered as many phases and wait in different ones: one has left something out.

    It is the rarest phase; of two ranks, that which is further in its step.
    """
    order, phases = list(_WAITING), [beat.phase for beat in beats.values()]
    if len(set(phases)) == 1 or len({_progress(beat) for beat in beats.values()}) > 1 or not set(phases) <= set(order):
        return None
    if min(beat.still for beat in beats.values()) <= limit * (
        FIRST_STEP if any(b.fresh for b in beats.values()) else 1
    ):
        return None
    odd = min(beats.values(), key=lambda beat: (phases.count(beat.phase), -order.index(beat.phase)))
    other = next(beat for beat in beats.values() if beat.phase != odd.phase)
    return (
        f"{odd.name} is at {odd.place} for {odd.still:.0f} s, while rank {other.rank} is at {other.place}: they wait for each "
        f"other. One of them has left a batch out, or got another one; {_ADVICE['data']}, and at code that differs by rank"
    )


def _progress(beat: Beat) -> tuple[int, int]:
    return beat.step, beat.turn
