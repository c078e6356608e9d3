"""What an adapter's config names as trained and its file does not hold: that is said, or stops the merge.

PEFT asks the names of the config when it makes an adapter and those of the file when it loads one; where they differ it
warns at most. A file that lost tensors on its way would be merged as if they had never been trained.
"""

import re
from collections.abc import Iterable

from .adapter import CONFIG, WEIGHTS, Adapter
from .lora_delta import AdapterError
from .placement import Placement, PlacementError

# Settings that leave out modules which ``target_modules`` names.
_EXCUSES = ("ensure_weight_tying", "exclude_modules", "layers_to_transform")


def lacking(adapter: Adapter, base: Iterable[str], placement: Placement, *, allow_unchanged: bool) -> list[str]:
    """Lines about what has no factors though the config names it, or though others of its kind have.

    ``base`` are the names of the tensors on disk. Raises AdapterError when nothing of a name in the lists
    ``target_modules`` and ``target_parameters`` is in the file although the model has it, no setting leaves it out, and it
    is not allowed.
    """
    modules = {module for module, _ in adapter.factors}
    known = modules | {name.rpartition(".")[0] for name in adapter.whole if not name.endswith(".bias")}
    said = _of_a_kind(adapter, known, base)
    for key, ending in (("target_modules", ".weight"), ("target_parameters", "")):
        named = adapter.config.get(key)
        for entry in named if isinstance(named, list) else ():
            owner = entry if ending else entry.rpartition(".")[0]
            if owner and any(f".{module}".endswith(f".{owner}") for module in known):
                continue
            found = _in_model(placement, f"{entry}{ending}", modules)
            if any(name.rpartition(".")[0] in known for name in found):
                continue
            said.append(
                f"{adapter.folder / CONFIG}: {key} names {entry!r}, {WEIGHTS} holds nothing of it"
                + ("" if found else ", nor was a weight of that name found in the model")
            )
            excused = allow_unchanged or any(adapter.config.get(excuse) not in (None, False, []) for excuse in _EXCUSES)
            if found and not excused:
                raise AdapterError(
                    f"{said[-1]}, but the model has {found[0]}; the file is not whole. If it was never trained, give "
                    "--allow_unchanged"
                )
    return said


def _in_model(placement: Placement, end: str, modules: set[str]) -> list[str]:
    """Parameters that the adapter's lists may mean; none when the model cannot be built."""
    try:
        return placement.ending(end, modules)
    except PlacementError:
        return []


def _of_a_kind(adapter: Adapter, known: set[str], base: Iterable[str]) -> list[str]:
    """A line when modules have no factors though those of other layers have, by the names on disk."""
    kinds = {r"\.".join(r"\d+" if part.isdecimal() else re.escape(part) for part in name.split(".")) for name in known}
    there = {found[1]: None for kind in sorted(kinds) for name in base if (found := re.match(rf"({kind})\.", name))}
    without = [name for name in there if name not in known]
    if not without:
        return []
    return [
        f"{adapter.folder}: {len(without)} modules stay as in the base, they have no factors where their like in other "
        f"layers have: {without[0]}" + (" ..." if without[1:] else "")
    ]
