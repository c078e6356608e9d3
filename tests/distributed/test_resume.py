"""Resume equals the straight run: bit for bit with the same ranks, to rounding with other ranks."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from conftest import messages_file, tiny_model
from rank_runner import RankRunner
from safetensors.torch import load_file

pytestmark = pytest.mark.distributed
ROOT = Path(__file__).resolve().parents[2]
Models = Callable[[str], Path]
Flags = dict[str, Any]


@pytest.fixture(scope="session")
def dropout_model(models: Models, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model whose attention drops weights: its run depends on every random number."""
    from transformers import AutoTokenizer

    folder = tmp_path_factory.mktemp("dropout")
    shutil.copytree(models("hunyuan_v1_dense"), folder, dirs_exist_ok=True)
    tiny_model("hunyuan_v1_dense", AutoTokenizer.from_pretrained(folder), attention_dropout=0.2).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def zero(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Path]:
    """ZeRO-2 and ZeRO-3 settings that really split a tiny model."""
    folder = tmp_path_factory.mktemp("zero")
    for stage in (2, 3):
        settings = json.loads((ROOT / "ds_configs" / f"ds_zero{stage}_no_offload.json").read_text())
        settings["zero_optimization"] |= {"stage3_param_persistence_threshold": 0} if stage == 3 else {}
        (folder / f"z{stage}.json").write_text(json.dumps(settings))
    return {stage: folder / f"z{stage}.json" for stage in (2, 3)}


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return messages_file(tmp_path_factory.mktemp("rows") / "train.jsonl")


def words(model: Path, data: Path, out: Path, more: Flags) -> list[object]:
    values: Flags = {
        "model_name_or_path": model, "train_data_file": data, "output_dir": out, "logging_steps": 1, "learning_rate": 1e-3,
        "lr_scheduler_type": "cosine", "warmup_steps": 2, "weight_decay": 0.1, "max_grad_norm": 0.5, "disable_tqdm": "true",
        "report_to": "none",
    } | more  # fmt: skip
    return [word for name, value in values.items() for word in (f"--{name}", value)]


def steps_of(out: Path) -> dict[int, tuple[float, float, float]]:
    """Loss, gradient norm and learning rate of every step that the last checkpoint knows."""
    last = max(out.glob("checkpoint-*"), key=lambda path: int(path.name.split("-")[1]))
    log = json.loads((last / "trainer_state.json").read_text())["log_history"]
    return {
        entry["step"]: (entry["loss"], entry["grad_norm"], entry["learning_rate"]) for entry in log if "loss" in entry
    }


def weights(out: Path, step: int) -> dict[str, Any]:
    (file,) = (out / f"checkpoint-{step}").glob("*model.safetensors")
    return load_file(file)


def assert_same(straight: Path, resumed: Path, step: int) -> None:
    assert steps_of(straight) == steps_of(resumed)
    one, other = weights(straight, step), weights(resumed, step)
    assert one.keys() == other.keys()
    assert [name for name in one if not one[name].equal(other[name])] == []


# 24 rows, 4 to a step: an epoch has 6 steps; packed into rows of 128 tokens it has about 7 rows, 2 to a step.
PLAIN: Flags = {"per_device_train_batch_size": 2, "gradient_accumulation_steps": 2, "dataloader_num_workers": 2}
PACKED: Flags = {"per_device_train_batch_size": 1, "packing": "true", "max_seq_length": 128}
ADAPTER: Flags = {
    "per_device_train_batch_size": 1, "gradient_accumulation_steps": 2, "use_lora": "true", "lora_rank": 4,
    "lora_dropout": 0.3,
}  # fmt: skip
NO_MASTERS: Flags = {"per_device_train_batch_size": 2, "bf16": "true", "master_weights": "bf16_stochastic"}
KAHAN: Flags = {"master_weights": "bf16_kahan"}


@pytest.mark.parametrize(
    ("world", "stage", "more", "kill_at"),
    [
        pytest.param(1, 0, PLAIN, 5, id="plain, accumulated, workers, mid-epoch"),
        pytest.param(2, 3, PACKED, 3, id="ZeRO-3, packed, mid-epoch"),
        pytest.param(2, 2, ADAPTER, 7, id="ZeRO-2, LoRA, accumulated, end of epoch"),
        pytest.param(2, 2, NO_MASTERS, 5, id="ZeRO-2, stochastic rounding", marks=pytest.mark.slow),
        pytest.param(2, 3, NO_MASTERS | KAHAN, 5, id="ZeRO-3, Kahan", marks=pytest.mark.slow),
        pytest.param(1, 0, NO_MASTERS | KAHAN, 5, id="plain, Kahan", marks=pytest.mark.slow),
    ],
)
def test_killed_and_resumed_equals_straight(
    world: int, stage: int, more: Flags, kill_at: int, ranks: RankRunner, dropout_model: Path, rows: Path,
    zero: dict[int, Path], tmp_path: Path,
) -> None:  # fmt: skip
    more = {"max_steps": 8, "save_steps": 2} | more | ({"deepspeed": zero[stage]} if stage else {})
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    ranks.run(words(dropout_model, rows, straight, more), straight / "log", ranks=world).check()
    more = more | {"dataloader_num_workers": 0}  # how many workers read says nothing of what is read
    argv = [*words(dropout_model, rows, resumed, more), "--resume_from_checkpoint"]
    dead = ranks.run(argv, resumed / "log", ranks=world, KILL_AT_STEP=str(kill_at))
    assert -9 in dead.codes
    damaged = resumed / f"checkpoint-{kill_at + 40}"
    damaged.mkdir()
    (damaged / "trainer_state.json").write_text("{}")
    done = ranks.run(argv, resumed / "log2", ranks=world).check()
    assert f"resume: passed over {damaged}" in done.text
    assert f"resume: {resumed / f'checkpoint-{kill_at - 1}'}" in done.text
    shutil.rmtree(damaged)
    assert_same(straight, resumed, 8)


def assert_close(straight: Path, resumed: Path, step: int) -> None:
    one, other = steps_of(straight), steps_of(resumed)
    assert one.keys() == other.keys()
    for at, values in one.items():
        assert other[at] == pytest.approx(values, rel=1e-5), f"step {at}"
    after, expected = weights(resumed, step), weights(straight, step)
    assert max(float((after[name] - expected[name]).abs().max()) for name in expected) < 1e-6


def assert_from_other_ranks(
    before: int, after: int, more: Flags, ranks: RankRunner, model: Path, rows: Path, tmp_path: Path
) -> str:
    """What a resume with other ranks says; its run must go on as the straight one."""
    more = {"max_steps": 8, "save_steps": 4} | more
    straight, resumed = tmp_path / "straight", tmp_path / "resumed"
    first = {**more, "per_device_train_batch_size": 4 // before}
    ranks.run(words(model, rows, straight, first), straight / "log", ranks=before).check()
    shutil.copytree(straight / "checkpoint-4", resumed / "checkpoint-4")
    argv = words(model, rows, resumed, {**more, "per_device_train_batch_size": 4 // after})
    done = ranks.run([*argv, "--resume_from_checkpoint"], resumed / "log", ranks=after).check()
    assert f"world_size was {before}, is {after}" in done.text
    assert_close(straight, resumed, 8)
    return done.text


@pytest.mark.parametrize(
    ("stage", "before", "after", "more"),
    [
        pytest.param(3, 2, 1, {}, id="ZeRO-3 2-1"),
        pytest.param(2, 1, 2, {}, id="ZeRO-2 1-2"),
        pytest.param(3, 1, 2, ADAPTER, id="ZeRO-3 1-2 LoRA", marks=pytest.mark.slow),
        pytest.param(2, 2, 1, ADAPTER, id="ZeRO-2 2-1 LoRA", marks=pytest.mark.slow),
        pytest.param(3, 1, 2, {}, id="ZeRO-3 1-2", marks=pytest.mark.slow),
        pytest.param(2, 2, 1, {}, id="ZeRO-2 2-1", marks=pytest.mark.slow),
    ],
)
def test_deepspeed_with_other_ranks(
    stage: int, before: int, after: int, more: Flags, ranks: RankRunner, models: Models, rows: Path, zero: dict[int, Path],
    tmp_path: Path,
) -> None:  # fmt: skip
    more = {**more, "lora_dropout": 0, "gradient_accumulation_steps": 1, "deepspeed": zero[stage]}
    said = assert_from_other_ranks(before, after, more, ranks, models("hunyuan_v1_dense"), rows, tmp_path)
    (built,) = (tmp_path / "resumed" / "reshaped").glob("checkpoint-4-*")
    assert f"resume: {built} holds the state for any number of ranks" in said
    assert not list((tmp_path / "resumed" / "reshaped").glob(".checkpoint*.tmp-*"))


@pytest.mark.slow
@pytest.mark.parametrize("stage", [2, 3])
def test_without_masters_with_other_ranks(
    stage: int, ranks: RankRunner, models: Models, rows: Path, zero: dict[int, Path], tmp_path: Path
) -> None:
    """bf16 weights and moments come back as they were; each part rounds by other noise from there on. Kahan is refused."""
    more = NO_MASTERS | {"max_steps": 8, "save_steps": 4, "deepspeed": zero[stage]}
    model, straight = models("hunyuan_v1_dense"), tmp_path / "straight"
    ranks.run(words(model, rows, straight, more), straight / "log", ranks=2).check()
    resumed, refused = tmp_path / "resumed", tmp_path / "refused"
    shutil.copytree(straight / "checkpoint-4", resumed / "checkpoint-4")
    argv = words(model, rows, resumed, more | {"per_device_train_batch_size": 4})
    ranks.run([*argv, "--resume_from_checkpoint"], resumed / "log").check()
    one, other = steps_of(straight), steps_of(resumed)
    assert one.keys() == other.keys()
    assert other[5][:2] == pytest.approx(one[5][:2], rel=1e-3)  # nothing was rounded yet
    assert other[8][0] == pytest.approx(one[8][0], rel=5e-3)
    kahan = more | KAHAN
    ranks.run(words(model, rows, refused, kahan | {"max_steps": 4}), refused / "log", ranks=2).check()
    done = ranks.run(
        [
            *words(model, rows, refused, kahan | {"max_steps": 4, "per_device_train_batch_size": 4}),
            "--resume_from_checkpoint",
        ],
        refused / "log2",
    )
    assert done.codes == [2]
    assert "--master_weights bf16_kahan keeps beside each weight" in done.text


@pytest.mark.slow
@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2)])
def test_plain_with_other_ranks(
    before: int, after: int, ranks: RankRunner, models: Models, rows: Path, tmp_path: Path
) -> None:
    assert_from_other_ranks(before, after, {}, ranks, models("hunyuan_v1_dense"), rows, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "stage", "more", "at"),
    [
        pytest.param(1, 0, PLAIN, range(1, 40), id="plain, every step"),
        pytest.param(2, 3, PACKED, range(1, 40, 6), id="ZeRO-3, packed"),
        pytest.param(2, 2, ADAPTER, range(1, 40, 6), id="ZeRO-2, LoRA"),
    ],
)
def test_resume_at_each_step_of_forty(
    world: int, stage: int, more: Flags, at: range, ranks: RankRunner, dropout_model: Path, rows: Path,
    zero: dict[int, Path], tmp_path: Path,
) -> None:  # fmt: skip
    more = {"max_steps": 40, "save_steps": 1} | more | ({"deepspeed": zero[stage]} if stage else {})
    straight = tmp_path / "straight"
    ranks.run(words(dropout_model, rows, straight, more), straight / "log", ranks=world, limit=900).check()
    for step in at:
        resumed = tmp_path / f"resumed{step}"
        again = {
            **more,
            "save_steps": 100,
            "dataloader_num_workers": 0,
            "resume_from_checkpoint": straight / f"checkpoint-{step}",
        }
        ranks.run(words(dropout_model, rows, resumed, again), resumed / "log", ranks=world).check()
        assert_same(straight, resumed, 40)
