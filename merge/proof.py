"""What a merge changed and what of it outlived the rounding, measured on the numbers that are written.

The change is exact. The loss of a large weight is measured on an eighth of it, evenly spread, and scaled up.
"""

import math
import re
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from .lora_delta import AdapterError
from .plan import Output

_ENOUGH = 0.99  # share of the change that a merge should keep
_NOTHING = 1e-3  # and the one below which it is no merge


@dataclass(slots=True)
class Sums:
    """Sums of squares over a weight's elements: of the change, of the base, and of what rounding took or added."""

    change: float = 0.0
    base: float = 0.0
    lost: float = 0.0

    def __iadd__(self, other: "Sums") -> Self:
        self.change += other.change
        self.base += other.base
        self.lost += other.lost
        return self

    @property
    def relative(self) -> float:
        """|dW| / |W|, Frobenius norms."""
        return math.sqrt(self.change / self.base) if self.base else math.inf

    @property
    def kept(self) -> float:
        """1 - |stored - (W + dW)| / |dW|, not below 0: the share of the change that the stored numbers hold."""
        return max(0.0, 1 - math.sqrt(self.lost / self.change)) if self.change else 0.0


class Proof:
    """The sums of every changed weight; the experts of a block count as one, for some may never have been chosen.

    ``carried`` names weights that no adapter changes and that are not finite, in the base as in the merged model.
    """

    def __init__(self, outputs: Sequence[Output]) -> None:
        self.sums: dict[str, Sums] = {_group(output.spec.name): Sums() for output in outputs if output.placed}
        self.carried: set[str] = set()

    def add(self, output: Output, sums: Sums | None) -> None:
        """Count one block of an output that was written; None when no adapter changes it."""
        if sums is not None:
            self.sums[_group(output.spec.name)] += sums

    def check(self, save_dtype: str, *, allow_unchanged: bool) -> None:
        """Raise AdapterError when the adapter changes nothing, leaves a weight of its own as it is, or is rounded away."""
        unchanged = [name for name, sums in self.sums.items() if not sums.change]
        if len(unchanged) == len(self.sums):
            raise AdapterError("the adapter changes nothing: every lora_B is zero, it was never trained")
        if unchanged and not allow_unchanged:
            raise AdapterError(
                f"{unchanged[0]}: the adapter leaves this weight as it is, with {len(unchanged)} of {len(self.sums)}; it "
                "was not trained there, or not saved whole. If that is right, give --allow_unchanged"
            )
        if all(sums.kept < _NOTHING for sums in self.sums.values()):
            raise AdapterError(
                f"the change is smaller than what {save_dtype} can hold: nothing of it is left; use fp32"
            )

    def table(self) -> dict[str, dict[str, float | None]]:
        """By weight: ``relative`` change (None where the base is 0) and share ``kept``, for the manifest."""
        return {
            name: {"relative": sums.relative if sums.base else None, "kept": sums.kept}
            for name, sums in self.sums.items()
        }

    def lines(self, save_dtype: str) -> list[str]:
        """What a user should know."""
        by_change = sorted(self.sums.items(), key=lambda item: item[1].relative)
        middle = statistics.median(sums.relative for _, sums in by_change)
        (low, least), (high, most) = by_change[0], by_change[-1]
        said = [
            f"change |dW|/|W|: median {middle:.2e}, least {least.relative:.2e} ({low}), most {most.relative:.2e} ({high})"
        ]
        total = Sums()
        for sums in self.sums.values():
            total += sums
        worst, sums = min(self.sums.items(), key=lambda item: item[1].kept)
        said.append(f"kept by {save_dtype}: {total.kept:.2%} of the change, least {sums.kept:.2%} ({worst})")
        few = sum(sums.kept < _ENOUGH for sums in self.sums.values())
        if few:
            said.append(
                f"warning: rounding to {save_dtype} keeps less than {_ENOUGH:.0%} of the change in {few} of {len(self.sums)} "
                "weights; --save_dtype fp32 keeps all"
            )
        if self.carried:
            said.append(
                f"warning: not finite, as in the base, and not changed by an adapter: {', '.join(sorted(self.carried))}"
            )
        return said


def _group(name: str) -> str:
    """A weight's name, one for all experts of a block."""
    return re.sub(r"(\.experts\.)\d+(?=\.)", r"\1*", name)
