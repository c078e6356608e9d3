"""How many layers are recomputed: what is foretold, what is chosen, and that a real run loses nothing by it."""

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finebridge.train.arguments import parse
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.memory_gauge import SavedGauge
from finebridge.train.recompute import (
    Look,
    RecomputeBudget,
    asks_for_budget,
    checkpointed_layers,
    costs_of,
    fewest,
    foretold,
    kinds_of,
)
from packed_trials import build

LAYERS = {"hidden_size": 32, "num_hidden_layers": 6}
CPU, CUDA = torch.device("cpu"), torch.device("cuda")


def a_look(kept: list[int], plain: set[int], *, tokens: int = 100, before: int = 1000, peak: int = 5000) -> Look:
    return Look(tokens, before, peak, kept, frozenset(plain))


def test_a_peak_is_foretold_from_one_plain_layer_of_each_kind() -> None:
    look, alike = a_look([10, 10, 10, 110], {3}), [0] * 4
    costs = costs_of([look], alike)
    assert costs == {0: 1.0}  # bytes a token
    assert [foretold(look, alike, costs, 100, number) for number in range(5)] == [5300, 5200, 5100, 5000, 4900]
    assert foretold(look, alike, costs, 200, 3) == 9000  # twice the tokens, but not twice what was held before
    assert foretold(look, alike, costs, 50, 3) == 5000
    later = a_look([0] * 4, {2, 3}, peak=5200)  # another step: what was foretold for it was 5100
    assert foretold(later, alike, costs, 100, 3) == 5100
    mixed = a_look([10, 10, 60, 110], {2, 3})
    costs = costs_of([mixed, a_look([10, 10, 50, 130], {2, 3}, tokens=200)], [0, 1, 0, 1])
    assert costs == {0: 0.5, 1: 1.0}
    assert foretold(mixed, [0, 1, 0, 1], costs, 100, 0) == 5000 + 50 + 100
    assert foretold(mixed, [0, 1, 0, 1], costs, 100, 3) == 5000 - 50


def test_as_few_layers_as_fit_every_look_are_recomputed() -> None:
    looks = [a_look([10, 10, 10, 110], {3}), a_look([10, 10, 10, 110], {3}, before=1200, peak=5200)]
    costs = {0: 1.0}
    assert fewest(looks[:1], [0] * 4, costs, 100, 5300) == 0
    assert fewest(looks, [0] * 4, costs, 100, 5300) == 2
    assert fewest(looks, [0] * 4, costs, 100, 5100) == 4
    assert fewest(looks, [0] * 4, costs, 100, 10) == 4  # nothing fits: the least that can be held


def test_layers_are_alike_by_class_and_shapes() -> None:
    model = build("qwen3_moe", num_hidden_layers=4, decoder_sparse_step=2, num_experts=4, num_experts_per_tok=2)
    layers = checkpointed_layers(model)
    assert kinds_of(layers) == [0, 1, 0, 1]


def test_auto_is_asked_for_by_name_or_by_a_budget() -> None:
    assert asks_for_budget({"activation_checkpointing": "auto"}, None)
    assert asks_for_budget({}, 3.0)
    assert not asks_for_budget({}, None)
    assert not asks_for_budget({"activation_checkpointing": False}, 3.0)
    assert not asks_for_budget({"activation_checkpointing": True}, 3.0)


def test_flags() -> None:
    words = ["--config_name", "qwen3", "--tokenizer_name_or_path", ".", "--use_dummy_data"]
    assert parse([*words, "--gradient_checkpointing", "auto"]).hf["activation_checkpointing"] == "auto"
    warned = parse([*words, "--gradient_checkpointing", "true", "--memory_budget_gib", "3"]).warnings
    assert any("--memory_budget_gib has no effect" in text for text in warned)
    with pytest.raises(ArgumentsError, match="--memory_budget_gib 0: a positive number"):
        parse([*words, "--memory_budget_gib", "0"])
    for name in ("use_reentrant", "every_n_layers"):
        with pytest.raises(ArgumentsError, match=f"{name} is not for --gradient_checkpointing auto"):
            RecomputeBudget({name: True}, 10, None, CPU, retries=True)


def begun(budget: int | None, **more: Any) -> tuple[RecomputeBudget, Any]:
    model = build("qwen3", **LAYERS).train()
    found = RecomputeBudget({}, 24, budget, CPU, retries=True)
    found.on_train_begin(SimpleNamespace(torch_compile=False, **more), None, None, model=model)  # pyright: ignore[reportArgumentType]
    return found, model


def one_step(found: RecomputeBudget, model: Any) -> tuple[float, list[torch.Tensor]]:
    ids = torch.arange(24)[None] % 60
    model.zero_grad()
    with found.watched(ids.numel()):
        loss = found.attempt(lambda: model(input_ids=ids, labels=ids, use_cache=False).loss)
        loss.backward()
    found.on_step_end(None, None, None)  # pyright: ignore[reportArgumentType]
    return loss.item(), [parameter.grad.clone() for parameter in model.parameters()]


def test_steps_find_the_number_that_fits_and_change_no_loss_and_no_gradient(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("qwen3", **LAYERS).train()
    gauge = SavedGauge()
    ids = torch.arange(24)[None] % 60
    with gauge.counting():
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    whole = gauge.now()
    expected: list[Any] = []
    numbers: list[int] = []
    for share in (1.1, 0.6, 0.1):
        found, model = begun(int(whole * share))
        assert [layer.gradient_checkpointing for layer in found.layers] == [True] * 5 + [False]
        expected += [one_step(found, model) for _ in range(4)]
        numbers.append(found.recomputed)
        with gauge.counting():
            model(input_ids=ids, labels=ids, use_cache=False)
        assert gauge.now() <= whole * share or found.recomputed == 6
        assert f"recompute: {found.recomputed} of 6 layers (peak " in capsys.readouterr().out
    assert numbers[0] == 0 < numbers[1] < 6 == numbers[2]
    for loss, gradients in expected:
        assert loss == expected[0][0]
        assert all(torch.equal(one, other) for one, other in zip(gradients, expected[0][1], strict=True))


def test_a_cpu_without_a_budget_and_what_cannot_be_recomputed_stay_as_they_are(
    capsys: pytest.CaptureFixture[str],
) -> None:
    found, model = begun(None)
    assert not any(layer.gradient_checkpointing for layer in found.layers)
    assert "recompute: no layers, as a cpu tells no limit of its memory" in capsys.readouterr().out
    assert one_step(found, model)[0] > 0
    found = RecomputeBudget({"use_reentrant": False}, 24, 10, CPU, retries=True)
    found.on_train_begin(SimpleNamespace(torch_compile=False), None, None, model=torch.nn.Linear(2, 2))  # pyright: ignore[reportArgumentType]
    assert "recompute: no layers, as Linear has no layers" in capsys.readouterr().out


def test_a_forward_that_is_out_of_memory_is_done_again_once(capsys: pytest.CaptureFixture[str]) -> None:
    found, model = begun(2**40)
    for _ in range(3):
        expected = one_step(found, model)
    assert found.recomputed == 0
    left = [torch.OutOfMemoryError("no room for 3 GiB")]

    def fail(*_: Any) -> None:
        if left:
            raise left.pop()

    model.model.layers[3].register_forward_pre_hook(fail)
    again = one_step(found, model)
    assert again[0] == expected[0]
    assert found.recomputed == 6
    assert "recompute: all 6 layers from now on, 0 were too few (no room for 3 GiB)" in capsys.readouterr().out
    early, model = begun(2**40)
    left.append(torch.OutOfMemoryError("no room for 2 GiB"))
    model.model.layers[3].register_forward_pre_hook(fail)
    assert [one_step(early, model)[0], one_step(early, model)[0], early.recomputed] == [expected[0]] * 2 + [6]
    left.append(torch.OutOfMemoryError("no room for 4 GiB"))
    with pytest.raises(torch.OutOfMemoryError, match="4 GiB") as caught:
        one_step(found, model)
    assert "6 of 6 layers were recomputed; --memory_budget_gib" in caught.value.__notes__[0]


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [pytest.param(3, marks=pytest.mark.slow), pytest.param(2, marks=pytest.mark.slow)])
def test_a_run_with_a_budget_is_the_run_without(
    stage: int, ranks: Any, train_file: Path, tmp_path: Path, models: Any, zero: Any, history: Any
) -> None:
    """Two ranks through the real trainer: everything under ZeRO-3, LoRA under ZeRO-2."""
    words: list[object] = []
    for name, more in {
        "off": [],
        "auto": ["--activation_checkpointing", "auto", "--memory_budget_gib", 0.0026],
    }.items():
        words += [
            "+++", "--config_name", "qwen3", "--tokenizer_name_or_path", models("hunyuan_v1_dense"), "--num_layers", 6,
            "--hidden_size", 32, "--intermediate_size", 64, "--num_attention_heads", 2, "--num_key_value_heads", 1,
            "--train_data_file", train_file, "--output_dir", tmp_path / name, "--max_steps", 5, "--logging_steps", 1,
            "--learning_rate", 1e-2, "--disable_tqdm", "true", "--save_strategy", "no", "--deepspeed", zero(stage),
            "--prepared_data_dir", tmp_path / "prepared", "--per_device_train_batch_size", 2, *more,
            *(["--use_lora", "true", "--lora_rank", 4] if stage == 2 else []),
        ]  # fmt: skip
    done = ranks.run(words[1:], tmp_path / "log", ranks=2, entry="sft_many:main", limit=300).check()
    told = re.findall(r"recompute: (\d) of 6 layers", done.text)
    assert len(told) == 1, done.text
    assert 0 < int(told[0]) < 6, done.text
    seen = [[(step["loss"], step["grad_norm"]) for step in history(tmp_path / name)] for name in ("off", "auto")]
    assert len(seen[0]) == 5
    assert seen[0] == seen[1]
