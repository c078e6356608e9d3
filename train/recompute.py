"""How gradient checkpointing recomputes: the mode that fits, chosen for the user.

``use_reentrant`` false gives the loss of a run without it under ZeRO-2 and ZeRO-3 with full training, LoRA and LoRA on experts,
fused or in a list, and in plain runs (``tests/distributed/test_recompute.py``). It needs no input that requires a gradient (LoRA,
frozen embeddings) and is what torch develops; the reentrant mode gives the same under ZeRO-2 and
ZeRO-3, and fails in plain LoRA runs on several ranks ("mark a variable ready only once").
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
