"""How gradient checkpointing recomputes: the mode that fits, chosen for the user.

Both of torch's modes give the loss of a run without it in every combination of plain, ZeRO-2 and ZeRO-3 with full training,
LoRA and LoRA on experts, fused or in a list (``tests/distributed/test_recompute.py``). The newer one, ``use_reentrant`` false,
needs no input that requires a gradient (LoRA, frozen embeddings) and is what torch develops.
"""

from collections.abc import Callable, Mapping
from typing import Any


def recompute_kwargs(hf: Mapping[str, Any], say: Callable[[str], None]) -> dict[str, Any] | None:
    """``activation_checkpointing_kwargs`` with the mode filled in, unless the user gave one; said in one line."""
    given: dict[str, Any] | None = hf.get("activation_checkpointing_kwargs")
    if not hf.get("activation_checkpointing") or "use_reentrant" in (given or {}):
        return given
    say("gradient checkpointing: use_reentrant false (chosen for you; --gradient_checkpointing_kwargs names another)")
    return {**(given or {}), "use_reentrant": False}
