"""A step's rows may be cut into micro-batches in any way: the step is the same."""

from pathlib import Path
from typing import Any

import pytest
from finebridge.train.arguments import parse
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.micro_batches import cut, micro_batches
from packed_trials import flags
from rank_runner import RankRunner


def test_the_cut_is_whole_and_the_largest_that_fits() -> None:
    for rows in range(1, 40):
        for length in (1, 100, 4096):
            for tokens in (1, 100, 4096, 16_384, 10**6):
                size, count = cut(rows, length, tokens)
                assert size * count == rows
                assert size == 1 or size * length <= tokens
                larger = [n for n in range(size + 1, rows + 1) if rows % n == 0]
                assert all(n * length > tokens for n in larger)


def made(tmp_path: Path, models: Any, train_file: Path, *, on_gpu: bool = True, **more: Any) -> Any:
    given: dict[str, Any] = {"max_seq_length": 4096, "gradient_accumulation_steps": 4, **more}
    words = flags(models("hunyuan_v1_dense"), train_file, tmp_path / "out", **given)
    if "per_device_train_batch_size" not in more:
        place = words.index("--per_device_train_batch_size")
        del words[place : place + 2]
    args = parse([str(word) for word in words])
    said: list[str] = []
    return micro_batches(args, None, said.append, on_gpu=on_gpu), said


def test_when_rows_are_cut_anew(tmp_path: Path, models: Any, train_file: Path) -> None:
    new = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 8}
    assert made(tmp_path, models, train_file)[0] == new  # the Trainer's default is 8 rows
    assert made(tmp_path, models, train_file, on_gpu=False) == ({}, [])
    assert made(tmp_path, models, train_file, per_device_train_batch_size=2) == ({}, [])
    assert made(tmp_path, models, train_file, packing="false") == ({}, [])
    again, said = made(tmp_path, models, train_file, per_device_train_batch_size=2, tokens_per_micro_batch="auto")
    assert again == {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2}
    assert said == [
        "micro-batches: 2 of 4 x 4096 tokens a step in place of 4 of 2 x 4096; the step is the same "
        "(--tokens_per_micro_batch auto)"
    ]
    words = {"per_device_train_batch_size": 2, "tokens_per_micro_batch": 4096}
    assert made(tmp_path, models, train_file, on_gpu=False, **words)[0] == {
        "per_device_train_batch_size": 1, "gradient_accumulation_steps": 8,
    }  # fmt: skip


def test_what_cannot_be_is_refused(tmp_path: Path, models: Any, train_file: Path) -> None:
    for more, why in (
        ({"packing": "false"}, "rows are padded"), ({"loss_normalization": "batch"}, "changes the loss"),
        ({"tokens_per_micro_batch": "many"}, "a number of tokens, or auto"),
    ):  # fmt: skip
        with pytest.raises(ArgumentsError, match=why):
            made(tmp_path, models, train_file, **{"tokens_per_micro_batch": 4096, **more})


@pytest.mark.distributed
def test_a_run_is_the_same_with_another_cut(
    ranks: RankRunner, models: Any, train_file: Path, tmp_path: Path, history: Any
) -> None:
    seen: list[list[float]] = []
    for tokens in (160, 640):
        out = tmp_path / str(tokens)
        words = flags(
            models("hunyuan_v1_dense"), train_file, out, gradient_accumulation_steps=4, save_strategy="no",
            tokens_per_micro_batch=tokens,
        )  # fmt: skip
        done = ranks.run(words, out / "log", ranks=1).check()
        assert ("micro-batches: 1 of 4 x 160 tokens" in done.text) == (tokens == 640)
        seen.append([value for step in history(out) for value in (step["loss"], step["grad_norm"])])
    assert len(seen[0]) == 6
    assert seen[1] == pytest.approx(seen[0], rel=1e-5)
