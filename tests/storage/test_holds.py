"""Who uses an artifact is seen by whoever would remove it."""

import shutil
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from finebridge.storage import holds
from finebridge.storage.holds import alone, hold, release
from finebridge.storage.publish import publish


@pytest.fixture(autouse=True)
def nothing_stays_held() -> Iterator[None]:
    """This process lives on, unlike a command."""
    yield
    for folder in list(holds._held):
        release(folder)


def make(target: Path) -> Path:
    with publish(target, kind="test", made_from={}, replace=True) as folder:
        (folder / "data").write_text("x")
    return target


def is_free(folder: Path) -> bool:
    with alone(folder) as unused:
        return unused


def test_what_is_held_is_not_free_until_it_is_released(tmp_path: Path) -> None:
    target = make(tmp_path / "x")
    assert is_free(target)
    hold(target)
    hold(target)
    assert not is_free(target)
    release(target)
    assert is_free(target)
    release(target)


def test_what_came_in_its_place_is_held_by_who_asks_again(tmp_path: Path) -> None:
    target = make(tmp_path / "x")
    hold(target)
    make(target)
    assert is_free(target)
    hold(target)
    assert not is_free(target)
    assert len(holds._held) == 1


def test_who_comes_while_it_is_removed_waits_and_holds_what_then_stands_there(tmp_path: Path) -> None:
    target = make(tmp_path / "x")
    user = threading.Thread(target=hold, args=(target,))
    with alone(target) as unused:
        assert unused
        user.start()
        user.join(0.1)
        assert user.is_alive()
        target.rename(tmp_path / "doomed")
        make(target)
    user.join()
    shutil.rmtree(tmp_path / "doomed")
    assert not is_free(target)


def test_a_process_holds_a_bounded_number(tmp_path: Path) -> None:
    folders = [make(tmp_path / str(number)) for number in range(holds._MOST + 1)]
    for folder in folders:
        hold(folder)
    assert [is_free(folder) for folder in folders] == [True] + [False] * holds._MOST


def test_nothing_to_hold_is_no_error(tmp_path: Path) -> None:
    hold(tmp_path / "nowhere")
    assert not holds._held
