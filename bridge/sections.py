"""Tensors that join several ones, each of which Megatron-Core cuts by itself: those of gated delta nets.

``in_proj.weight`` joins query, key, value, gate (z), beta and alpha, ``conv1d.weight`` the first three. Source:
megatron-core 0.16.1 ``ssm/gated_delta_net.py``.
"""

from collections.abc import Mapping, Sequence

from .errors import BridgeError

_INPUT = ".self_attention.in_proj.weight"
NAMES = {"in_proj": ("query", "key", "value", "z", "beta", "alpha"), "conv1d": ("query", "key", "value")}


def sections_of(shapes: Mapping[str, Sequence[int]]) -> dict[str, tuple[int, ...]]:
    """Of each tensor that joins several ones the rows of each, from the shapes of a whole model.

    Raises BridgeError when the shapes do not fit together.
    """
    found: dict[str, tuple[int, ...]] = {}
    for name, shape in shapes.items():
        if not name.endswith(_INPUT):
            continue
        start = name.removesuffix("in_proj.weight")
        beside = [shapes.get(start + other, ()) for other in ("A_log", "out_proj.weight", "conv1d.weight")]
        if [len(shape) for shape in beside] != [1, 2, 3]:
            raise BridgeError(f"tensor {name}: {start}A_log, out_proj.weight or conv1d.weight is missing or misshapen")
        heads, value, mixed = beside[0][0], beside[1][1], beside[2][0]
        keys, odd = divmod(mixed - value, 2)
        if odd or keys < 1 or shape[0] != 2 * (keys + value + heads):
            raise BridgeError(
                f"tensor {name}: {shape[0]} rows do not fit to {heads} heads, {value} values, {mixed} convolved"
            )
        found[name] = (keys, keys, value, value, heads, heads)
        found[f"{start}conv1d.weight"] = (keys, keys, value)
    return found
