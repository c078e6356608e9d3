"""Who is to blame for a wait, judged from beats alone."""

import pytest
from finebridge.train.verdicts import Beat, judge


def beat(rank: int, turn: int = 1, phase: str = "data", **more: float) -> Beat:
    return Beat(rank, f"node{rank}", 100 + rank, 7, 1, phase, turn, **{"fresh": False, **more})  # pyright: ignore[reportArgumentType]


def judged(*beats: Beat) -> str | None:
    return judge({beat.rank: beat for beat in beats}, 50)


def test_nobody_is_blamed_when_all_are_equally_far() -> None:
    assert judged() is None
    assert judged(beat(0, 3, "backward", still=900), beat(1, 3, "backward", still=900)) is None


def test_a_rank_that_keeps_the_others_waiting_is_stuck() -> None:
    said = judged(beat(0, 3, "backward", still=51), beat(1, still=51), beat(2, 3, "backward", still=51))
    assert said is not None
    assert said.startswith("rank 1 (host node1, process 101) is stuck at step 8, waiting for a batch for 51 s")
    assert "rank 0 is at step 8, in the backward pass" in said
    assert "storage" in said


@pytest.mark.parametrize(
    ("front", "back"),
    [
        ({"still": 51}, {"still": 49}),  # it has moved a while ago: slow, not stuck
        ({"still": 49}, {"still": 51}),  # nobody has waited so long for it
        ({"still": 900}, {"still": 900, "phase": "save"}),
        ({"still": 900}, {"still": 900, "phase": "evaluate"}),
        ({"still": 900}, {"still": 900, "phase": "start"}),
        ({"still": 400}, {"still": 400, "phase": "forward", "fresh": True}),  # compiling
    ],
)
def test_waits_that_are_no_fault(front: dict[str, float], back: dict[str, object]) -> None:
    assert judged(beat(0, 9, "backward", **front), beat(1, **back)) is None  # pyright: ignore[reportArgumentType]


def test_the_first_step_has_a_limit_too_and_its_data_the_usual_one() -> None:
    waits = beat(0, 9, "backward", still=501, fresh=True)
    assert "in the forward pass" in str(judged(waits, beat(1, 2, "forward", still=501, fresh=True)))
    assert "waiting for a batch" in str(judged(waits, beat(1, still=51, fresh=True)))


def test_ranks_that_wait_for_each_other_at_different_places_are_told_apart() -> None:
    skipped = beat(1, 3, "optimizer", still=51)
    said = judged(beat(0, 3, "forward", still=51), skipped)
    assert said is not None
    assert said.startswith(
        "rank 1 (host node1, process 101) is at step 8, in the optimizer's step for 51 s, while rank 0 is"
    )
    assert "step 8, in the forward pass: they wait for each other" in said
    assert str(judged(skipped, *(beat(rank, 3, "backward", still=60) for rank in (2, 3)))).startswith("rank 1 ")
    for other in (
        beat(0, 3, "forward", still=49),
        beat(0, 3, "save", still=900),
        beat(0, 3, "forward", still=60, fresh=True),
    ):
        assert judged(other, skipped) is None


def test_silence_is_told_first() -> None:
    said = judged(beat(0, 3, "backward", still=60), beat(1, still=60), beat(2, silent=51, phase="save"))
    assert said is not None
    assert said.startswith("rank 2 (host node2, process 102) has said nothing for 51 s; it was at step 8, in save")
