"""A save that is killed or meets a full disk at any of its write points: the next start always finds a whole checkpoint."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import messages_file, zero_settings
from finebridge.storage.manifest import verify
from rank_runner import RankRunner

Trial = Callable[..., dict[str, Any]]
Models = Callable[[str], Path]
KINDS = {"full": [], "lora": ["--use_lora", "true", "--lora_rank", "4"]}
slow = pytest.mark.slow


@pytest.fixture(scope="module")
def train(models: Models, tmp_path_factory: pytest.TempPathFactory) -> list[object]:
    folder = tmp_path_factory.mktemp("data")
    return [
        "--model_name_or_path", models("hunyuan_v1_dense"), "--train_data_file", messages_file(folder / "train.jsonl", 8),
        "--prepared_data_dir", folder / "prepared", "--save_steps", 1, "--save_total_limit", 1, "--disable_tqdm", "true",
        "--per_device_train_batch_size", 2, "--report_to", "none", "--logging_steps", 1, "--max_shard_size", "60KB",
        "--lr_scheduler_type", "constant",
    ]  # fmt: skip


def zero(stage: int, folder: Path) -> list[object]:
    return ["--deepspeed", zero_settings(f"ds_zero{stage}_no_offload", folder)]


@pytest.mark.parametrize(("kind", "stride"), [
    ("full", 9), ("lora", 17), pytest.param("full", 1, marks=slow), pytest.param("lora", 1, marks=slow),
])  # fmt: skip
def test_a_save_killed_anywhere(kind: str, stride: int, trial: Trial, train: list[object], tmp_path: Path) -> None:
    argv = [*train, "--max_steps", 1, *KINDS[kind]]
    points = int(trial(argv, tmp_path, at=0, act="kill")["text"])
    assert points > 60
    results = [trial(argv, tmp_path, at=at, act="kill") for at in [*range(1, points, stride), points]]
    assert {result["code"] for result in results} == {-9}
    found = [result["found"] for result in results]
    assert set(found) == {"checkpoint-1", "checkpoint-2"}, "at most one save is lost, and nothing else is ever taken"
    assert found == sorted(found), "once the new one stands, it is the newest"
    assert not any(result["after"] for result in results), "the next start clears what the killed one left"


@pytest.mark.parametrize(("kind", "stride"), [
    ("full", 13), ("lora", 29), pytest.param("full", 1, marks=slow), pytest.param("lora", 1, marks=slow),
])  # fmt: skip
def test_a_disk_full_from_any_point_on(
    kind: str, stride: int, trial: Trial, train: list[object], tmp_path: Path
) -> None:
    argv = [*train, "--max_steps", 1, *KINDS[kind]]
    points = int(trial(argv, tmp_path, at=0, act="enospc")["text"])
    results = [trial(argv, tmp_path, at=at, act="enospc") for at in range(1, points + 1, stride)]
    full = [result for result in results if result["code"] == 28]
    assert len(full) > len(results) // 2
    assert all(result["code"] in (0, 28) for result in results), [r["text"] for r in results if r["code"] == 1]
    for result in results:
        assert result["found"] == ("checkpoint-1" if result["code"] else "checkpoint-2")
        assert not result["left"], "the partial one is removed by the run itself"
    for result in full:
        assert "/trial/" in result["text"], "the place is named"
        assert "bytes, " in result["text"]
        assert "are free" in result["text"]


SOME = [(2, 0, 60), (2, 1, 4), (3, 0, 90), (3, 1, 9)]


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "rank", "at"), SOME)
def test_one_rank_is_killed(
    stage: int, rank: int, at: int, trial: Trial, train: list[object], ranks: RankRunner, tmp_path: Path
) -> None:
    argv = [*train, *zero(stage, tmp_path)]
    result = trial([*argv, "--max_steps", 2], tmp_path, rank=rank, at=at, act="kill")
    assert result["codes"][rank] == -9
    assert result["codes"][1 - rank] != 0, "no rank takes half a save for a whole one"
    assert result["found"] == "checkpoint-1"
    if at != 9:
        return
    out = tmp_path / "trial"
    done = ranks.run(
        [*argv, "--output_dir", out, "--max_steps", 3, "--resume_from_checkpoint", "true"], tmp_path / "log2", ranks=2
    ).check()
    assert f"resume: {out / 'checkpoint-1'}" in done.text
    assert verify(out / "checkpoint-3")["made_from"]["step"] == 3
    assert not list(out.glob(".checkpoint*"))


@pytest.mark.distributed
@pytest.mark.parametrize(("stage", "rank", "at"), [(2, 1, 4), (3, 0, 30)])
def test_the_disk_of_one_rank_is_full(
    stage: int, rank: int, at: int, trial: Trial, train: list[object], tmp_path: Path
) -> None:
    argv = [*train, *zero(stage, tmp_path), "--max_steps", 2]
    assert_full(trial(argv, tmp_path, rank=rank, at=at, act="enospc"), tmp_path, rank)


def assert_full(result: dict[str, Any], home: Path, rank: int) -> None:
    assert result["codes"] == [28, 28], "\n".join(result["texts"])[-3000:]
    assert result["found"] == "checkpoint-1"
    assert not result["left"]
    errors = [line for text in result["texts"] for line in text.splitlines() if line.startswith("error")]
    assert len(errors) == 1, "one message, from one rank"
    assert str(home / "trial") in errors[0]
    assert f"rank {rank} saved a checkpoint" in errors[0] or "a checkpoint is saved there" in errors[0]
    assert "Traceback" not in "".join(result["texts"])


@pytest.mark.slow
@pytest.mark.distributed
@pytest.mark.parametrize("act", ["kill", "enospc"])
@pytest.mark.parametrize(("stage", "kind"), [(2, "full"), (3, "full"), (3, "lora")])
def test_every_point_of_every_rank(
    stage: int, kind: str, act: str, trial: Trial, train: list[object], tmp_path: Path
) -> None:
    argv = [*train, *zero(stage, tmp_path), *KINDS[kind], "--max_steps", 2]
    points = trial(argv, tmp_path, rank="all", at=0, act=act)["points"]
    assert all(count > 3 for count in points)
    for rank, count in enumerate(points):
        for at in range(1, count + 1):
            result = trial(argv, tmp_path, rank=rank, at=at, act=act)
            assert result["found"] in ("checkpoint-1", "checkpoint-2"), result
            if act == "kill":
                assert result["codes"][rank] == -9, result
            elif result["codes"] != [0, 0]:
                assert_full(result, tmp_path, rank)
