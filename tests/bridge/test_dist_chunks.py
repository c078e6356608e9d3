"""The chunks of ``torch_dist`` tensors: any that tile a shape make up the tensor, others are refused."""

import random

import pytest
import torch
from finebridge.bridge.dist_format import DistCheckpoint
from finebridge.bridge.dist_records import Chunk, Record, Stored, check_tiling
from finebridge.bridge.errors import BridgeError
from hypothesis import given, settings
from hypothesis import strategies as st

from .dist_by_hand import Box, ByHand, bits, same


def cut(shape: tuple[int, ...], draw: random.Random, times: int) -> list[Box]:
    """Boxes that tile a shape, in any order; they need not be a grid."""
    boxes: list[Box] = [((0,) * len(shape), shape)]
    for _ in range(times if shape else 0):
        offset, size = boxes.pop(draw.randrange(len(boxes)))
        axis = draw.randrange(len(shape))
        if size[axis] < 2:
            boxes.append((offset, size))
            continue
        at = draw.randrange(1, size[axis])
        boxes.append((offset, (*size[:axis], at, *size[axis + 1 :])))
        boxes.append(
            (
                (*offset[:axis], offset[axis] + at, *offset[axis + 1 :]),
                (*size[:axis], size[axis] - at, *size[axis + 1 :]),
            )
        )
    draw.shuffle(boxes)
    return boxes


@settings(max_examples=40, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), max_size=4).map(tuple),
    dtype=st.sampled_from([torch.bfloat16, torch.float32, torch.float8_e4m3fn, torch.int64, torch.bool, torch.float16]),
    seed=st.integers(0, 10**6),
    times=st.integers(0, 9),
)
def test_any_chunks_make_up_the_tensor(
    tmp_path_factory: pytest.TempPathFactory, shape: tuple[int, ...], dtype: torch.dtype, seed: int, times: int
) -> None:
    tensor = torch.randint(0, 2, shape).bool() if dtype == torch.bool else bits(shape, dtype, seed)
    made = ByHand(tmp_path_factory.mktemp("chunks") / "x", files=3)
    made.add("any.weight", tensor, cut(shape, random.Random(seed), times))
    with DistCheckpoint(made.close()) as checkpoint:
        assert (checkpoint.shapes, checkpoint.dtypes) == ({"any.weight": shape}, {"any.weight": dtype})
        assert same(checkpoint.get("any.weight"), tensor)


@settings(max_examples=60, deadline=None)
@given(
    shape=st.lists(st.integers(1, 6), min_size=1, max_size=3).map(tuple),
    seed=st.integers(0, 10**6),
    times=st.integers(1, 9),
    fault=st.sampled_from(["lost", "twice", "wider", "moved"]),
)
def test_chunks_that_do_not_tile_are_refused(shape: tuple[int, ...], seed: int, times: int, fault: str) -> None:
    draw = random.Random(seed)
    boxes = cut(shape, draw, times)
    check_tiling("x", stored(shape, boxes))
    number = draw.randrange(len(boxes))
    offset, size = boxes[number]
    axis = draw.randrange(len(shape))
    if fault == "lost":
        del boxes[number]
    elif fault == "twice":
        boxes.append(boxes[number])
    elif fault == "wider":
        boxes[number] = offset, (*size[:axis], size[axis] + 1, *size[axis + 1 :])
    else:
        boxes[number] = (*offset[:axis], offset[axis] + 1, *offset[axis + 1 :]), size
    with pytest.raises(BridgeError, match="tensor x: (its chunk|chunks are missing)"):
        check_tiling("x", stored(shape, boxes))


def stored(shape: tuple[int, ...], boxes: list[Box]) -> Stored:
    return Stored(torch.int8, shape, [Chunk(*box, Record("a", 0, 10**6)) for box in boxes])


def test_empty_tensors_are_refused() -> None:
    with pytest.raises(BridgeError, match="tensor x is empty"):
        check_tiling("x", stored((3, 0), [((0, 0), (3, 0))]))


def test_a_pinwheel_is_a_tiling_too() -> None:
    boxes: list[Box] = [((0, 0), (1, 2)), ((0, 2), (2, 1)), ((2, 1), (1, 2)), ((1, 0), (2, 1)), ((1, 1), (1, 1))]
    check_tiling("x", stored((3, 3), boxes))
    with pytest.raises(BridgeError, match="overlap"):
        check_tiling("x", stored((3, 3), [*boxes[:4], ((1, 1), (2, 1))]))
