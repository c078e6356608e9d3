"""A run whose launcher is killed or meets a full disk: the next start makes what the first would have, and nothing is left."""

import os
import random
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import load_weights
from run_trials import launch

Trial = Callable[[int, str], dict[str, Any]]
TRIALS = int(os.environ.get("FINEBRIDGE_TRIALS", "50"))
SHOWN = 8


@pytest.fixture(scope="module")
def trial(
    trials: Callable[[str], Callable[..., Any]],
    models: Callable[[str], Path],
    train_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Trial:
    """All stages around the training, under a fault and then without."""
    ask, home = trials("run_trials.py"), tmp_path_factory.mktemp("run")
    words = [
        "run", "--model_name_or_path", models("qwen3"), "--train_data_file", train_file, "--max_steps", 2, "--output_dir", "out",
        "--enable_hf2mg_convert", "--mg_cache_dir", "mg", "--tp", 2, "--output_prefix", "tok/x", "--export_mcore", "tp=2",
        "--preprocessing_num_workers", 1,
    ]  # fmt: skip
    return lambda at, act: ask(words=list(map(str, words)), home=str(home), at=at, act=act)


@pytest.fixture(scope="module")
def straight(trial: Trial) -> dict[str, Any]:
    """Without a fault."""
    done = trial(0, "kill")
    assert (done["code"], done["again"], done["left"]) == (0, 0, [])
    assert {name.split("/")[-1] for name in done["made"]} >= {"checkpoint-2", "hf-2", "mcore-2", "mg"}
    assert not [name for name, files in done["made"].items() if isinstance(files, str)]
    return done


def assert_recovers(done: dict[str, Any], straight: dict[str, Any]) -> None:
    """Nothing that is not whole has the name of an artifact, and the next start makes the rest."""
    assert all(straight["made"].get(name) == files for name, files in done["faulty"].items()), done["at"]
    assert done["again"] == 0, done["told"]
    assert done["made"] == straight["made"], done["at"]
    assert done["left"] == [], done["at"]


def assert_ended(done: dict[str, Any], act: str, straight: dict[str, Any]) -> None:
    """Killed, or told once what lacks; a disk that is full when all is done is no fault."""
    if act == "kill":
        assert done["code"] == -signal.SIGKILL, done
        return
    assert done["code"] == 28 or (done["code"] == 0 and done["faulty"] == straight["made"]), done
    assert "Traceback" not in done["text"]
    errors = [line for line in done["text"].splitlines() if line.startswith("error: ")]
    assert len(errors) == (1 if done["code"] else 0), done["text"]


@pytest.mark.parametrize("act", ["kill", "enospc"])
def test_some_write_points(trial: Trial, straight: dict[str, Any], act: str) -> None:
    step = straight["points"] // SHOWN
    for at in range(1 + (step // 2 if act == "kill" else 0), straight["points"] + 1, step):
        done = trial(at, act)
        assert_ended(done, act, straight)
        assert_recovers(done, straight)


@pytest.mark.slow
@pytest.mark.parametrize("act", ["kill", "enospc"])
def test_every_write_point(trial: Trial, straight: dict[str, Any], act: str) -> None:
    for at in range(1, straight["points"] + 1):
        done = trial(at, act)
        assert_ended(done, act, straight)
        assert_recovers(done, straight)


@pytest.mark.slow
def test_kills_at_any_time_with_real_ranks(models: Callable[[str], Path], train_file: Path, tmp_path: Path) -> None:
    """SIGKILL of launcher and ranks together, one after another until the run is through: the bits are those of one run."""
    chance = random.Random(8)
    words = ["--save_steps", "1", "--learning_rate", "1e-2", "--report_to", "none", "--max_steps", "4"]
    words += ["--train_data_file", str(train_file), "--model_name_or_path", str(models("qwen3"))]
    began = time.monotonic()
    process = launch(tmp_path, *words, "--output_dir", "straight")
    assert process.wait() == 0
    whole, expected = time.monotonic() - began, load_weights(tmp_path / "straight" / "hf-4")
    kills = runs = 0
    while kills < TRIALS:
        out, runs = f"out{runs}", runs + 1
        while True:
            process = launch(tmp_path, *words, "--output_dir", out)
            try:
                process.communicate(timeout=chance.uniform(0, 1.2 * whole) if kills < TRIALS else None)
            except Exception:  # noqa: BLE001 - it runs still
                os.killpg(process.pid, signal.SIGKILL)
                process.communicate()
                kills += 1
                continue
            assert process.returncode == 0
            break
        made = load_weights(tmp_path / out / "hf-4")
        assert all((made[name] == expected[name]).all() for name in expected)
        assert not list((tmp_path / out).glob(".*tmp-*"))
    assert kills >= TRIALS
