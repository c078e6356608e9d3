"""Whether the shapes of a model's tensors fit together, beyond what each rule sees of its own parts."""

import re
from collections.abc import Iterable, Mapping, Sequence

from .errors import BridgeError
from .family import Row

_LAYER = re.compile(r"(?:decoder\.layers\.\d+|mtp\.layers\.\d+\.transformer_layer)\.(.+)")
_NUMBER = re.compile(r"\.\d+\.")
_WIDTHS: Mapping[str, Sequence[int | None]] = {  # sides that are so many times the model's width; None: any size
    "word_embeddings.weight": (None, 1), "output_layer.weight": (None, 1), "final_layernorm.weight": (1,),
    "enorm.weight": (1,), "hnorm.weight": (1,), "eh_proj.weight": (1, 2),
    "input_layernorm.weight": (1,), "pre_mlp_layernorm.weight": (1,), "linear_qkv.layer_norm_weight": (1,),
    "linear_fc1.layer_norm_weight": (1,), "in_proj.layer_norm_weight": (1,),
    "linear_qkv.weight": (None, 1), "linear_proj.weight": (1, None), "in_proj.weight": (None, 1), "out_proj.weight": (1, None),
    "linear_q_proj.weight": (None, 1), "linear_q_down_proj.weight": (None, 1), "linear_kv_down_proj.weight": (None, 1),
    "linear_wk.weight": (None, 1), "linear_weights_proj.weight": (None, 1),
    "linear_fc1.weight": (None, 1), "linear_fc2.weight": (1, None), "router.weight": (None, 1), "gate_weight": (None, 1),
}  # fmt: skip


def check_shapes(rows: Iterable[Row], shapes: Mapping[str, tuple[int, ...]], width: int | None, *, hf: bool) -> None:
    """Raise BridgeError when a tensor has not the model's width or not the shape that it has in other layers.

    ``shapes`` by canonical name; ``width`` is the config's hidden_size; ``hf``: errors give the names on disk of a Hugging
    Face folder. An MLP's down projection must take what its up projection gives.
    """
    known: dict[tuple[str, object], tuple[str, tuple[int, ...]]] = {}
    for row in rows:
        shape, said = shapes[row.mcore], row.hf[0] if hf else row.mcore
        wanted = _wanted(row.mcore, shape, shapes, width)
        if wanted != shape:
            raise BridgeError(f"{said}: its shape {shape} should be {wanted} by the config and the tensors beside it")
        if found := _LAYER.fullmatch(row.mcore):
            other, like = known.setdefault((_NUMBER.sub(".", found[1]), row.rule), (said, shape))
            if like != shape:
                raise BridgeError(
                    f"{said}: its shape {shape} is not that of {other}, {like}; layers of a model are alike"
                )


def _wanted(
    name: str, shape: tuple[int, ...], shapes: Mapping[str, tuple[int, ...]], width: int | None
) -> tuple[int, ...]:
    """The shape with the sides in it that are known."""
    ending = ".".join(name.rsplit(".", 2)[-2:])
    widths = _WIDTHS.get(ending) or _WIDTHS.get(name.rpartition(".")[2])
    if widths and width:
        sides = [*shape, *[0] * (len(widths) - len(shape))][: len(widths)]
        shape = tuple(width * times if times else side for side, times in zip(sides, widths, strict=True))
    if name.endswith(".linear_fc2.weight"):
        up = shapes[name.replace("linear_fc2", "linear_fc1")]
        shape = (*shape[:1], up[0] // 2)
    return shape
