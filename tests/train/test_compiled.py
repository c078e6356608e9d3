"""Layers that are compiled are the same layers: one graph for all, whatever the rows' samples are, and a line where not."""

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from finebridge.data_tools.collator import FlatteningCollator
from finebridge.train import assemble, compiled, flash, packed_attention
from finebridge.train.attention_kernels import PLAIN
from finebridge.train.compiled import CompiledLayers, decoder_layers, static_tokens, trial
from finebridge.train.packed_attention import PackedAttention, give
from packed_trials import CPU, OPERATOR, build, flags, operator
from peft import LoraConfig, get_peft_model
from rank_runner import RankRunner
from torch._dynamo.utils import counters

TOKENS = 48


def graph_alone(layer: torch.nn.Module) -> None:
    """Compile without machine code, which takes a minute."""
    layer.forward = torch.compile(layer.forward, backend="aot_eager", dynamic=False)


def is_compiled(model: Any) -> bool:
    return all("forward" in layer.__dict__ for layer in decoder_layers(model))


@pytest.fixture(autouse=True)
def without_code(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Graphs are made and differentiated as always."""
    monkeypatch.setattr(compiled, "compile_layer", graph_alone)
    monkeypatch.setattr(packed_attention, "seconds", lambda *_: 1.0)
    torch.compiler.reset()
    yield
    torch.compiler.reset()
    flash.PAIRS.pop(OPERATOR, None)


def row(lengths: list[int], tokens: int = TOKENS) -> dict[str, Any]:
    ids = np.random.default_rng(len(lengths)).integers(0, 60, sum(lengths))
    return FlatteningCollator(borders=True, tokens=tokens)([{"input_ids": ids, "labels": ids, "lengths": lengths}])


def outcome(model: Any, batch: dict[str, Any]) -> list[torch.Tensor]:
    model.zero_grad()
    loss = model(**batch).loss
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for p in model.parameters() if p.grad is not None)]


def begin(model: Any, tokens: int = TOKENS) -> CompiledLayers:
    callback = CompiledLayers(tokens)
    nothing: Any = SimpleNamespace()
    callback.on_train_begin(SimpleNamespace(device=CPU), nothing, nothing, model=model)  # pyright: ignore[reportArgumentType]
    return callback


def model_of(model_type: str, **more: Any) -> Any:
    model = build(model_type, **more)
    give(model, PackedAttention(lambda _: None, [operator(), PLAIN]))
    model(**row([7, 30]))  # chooses the kernel, as the proof of isolation does in a run
    return model.train()


MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {}, "hunyuan_v1_dense": {},
    "gemma2": {"sliding_window": 8, "attn_logit_softcapping": 2.0},
    "gpt_oss": {"sliding_window": 8, "num_local_experts": 4, "num_experts_per_tok": 2},
}  # fmt: skip


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("model_type", ["qwen3", pytest.param("gemma2", marks=pytest.mark.slow)])
def test_compiled_layers_are_the_same(model_type: str, recompute: bool) -> None:
    """Rows of other samples need no other graph; what is filled up changes nothing."""
    more = {"num_hidden_layers": 6, **MODELS[model_type]}
    rows = [row([48]), row([7, 30]), row([1, 2, 3, 4, 5, 6, 7]), row([20, 20])]
    expected = [outcome(build(model_type, "eager", **more).train(), row(part, 0)) for part in ([48], [7, 30])]
    model = model_of(model_type, **more)
    if recompute:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    plain_ones = [outcome(model, batch) for batch in rows]
    begin(model)
    assert is_compiled(model)
    counters.clear()
    made = [outcome(model, batch) for batch in rows]
    graphs = counters["stats"]["unique_graphs"]
    assert graphs <= (2 if model_type == "gemma2" else 1), counters["stats"]
    assert not counters["graph_break"]
    for one, other in zip(made, plain_ones, strict=True):
        for a, b in zip(one, other, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    for one, other in zip(made, expected, strict=False):
        torch.testing.assert_close(one[0], other[0], rtol=1e-4, atol=1e-5)


def test_all_but_full_rows_of_training_run_uncompiled() -> None:
    """Another length, no gradients, padded rows: none of them makes a graph or fails."""
    model = model_of("qwen3")
    begin(model)
    assert is_compiled(model)
    outcome(model, row([7, 30]))
    counters.clear()
    expected = outcome(model_of("qwen3"), row([7, 30], 64))
    for a, b in zip(outcome(model, row([7, 30], 64)), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    with torch.no_grad():
        ids = torch.arange(10).view(2, 5)
        assert torch.isfinite(model.eval()(input_ids=ids, attention_mask=torch.ones_like(ids)).logits).all()
    assert not counters["stats"]["unique_graphs"]


def test_lora_on_frozen_layers_is_compiled() -> None:
    model = model_of("qwen3")
    torch.manual_seed(0)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False))
    before = outcome(adapted, row([7, 30]))
    begin(adapted)
    for a, b in zip(outcome(adapted, row([7, 30])), before, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert is_compiled(adapted)


def spoil(layer: torch.nn.Module) -> None:
    """A compiler that gets a layer wrong."""
    run = type(layer).forward
    layer.forward = lambda *args, **kwargs: 1.1 * run(layer, *args, **kwargs)


def fail(layer: torch.nn.Module) -> None:
    def call(*_: Any, **__: Any) -> None:
        raise RuntimeError("no compiler\nat all")

    layer.forward = call


@pytest.mark.parametrize(
    ("compiler", "why"),
    [(spoil, "the output of Qwen3DecoderLayer is 0.1 off"), (fail, "RuntimeError: no compiler")],
)
def test_a_compiler_that_errs_is_told_and_left(
    compiler: Callable[..., None], why: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(compiled, "compile_layer", compiler)
    model = model_of("qwen3")
    expected = outcome(model, row([7, 30]))
    begin(model)
    assert f"layers: not compiled, as {why}\n" in capsys.readouterr().out
    assert all(torch.equal(a, b) for a, b in zip(outcome(model, row([7, 30])), expected, strict=True))
    assert model.training
    assert not is_compiled(model)


def test_attention_that_is_no_operator_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("qwen3")
    begin(model)
    assert "layers: not compiled, as sdpa attention is no operator of torch" in capsys.readouterr().out
    give(model, PackedAttention(lambda _: None, [PLAIN]))
    model(**row([7, 30]))
    begin(model)
    assert "not compiled, as plain products, sample by sample is no operator" in capsys.readouterr().out


@pytest.mark.slow
def test_layers_that_each_need_a_graph_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compiled, "_GRAPHS", 1)
    model = model_of("gemma2", **MODELS["gemma2"])
    assert trial(model, decoder_layers(model), CPU, TOKENS) == "2 of its layers need 2 graphs"


def test_a_graph_that_ends_within_a_layer_is_told() -> None:
    model = model_of("qwen3")
    layer = decoder_layers(model)[0].mlp
    run = layer.forward

    def forward(hidden: torch.Tensor) -> torch.Tensor:
        return run(hidden) * float(hidden.sum() * 0 + 1)  # the device is waited for

    layer.forward = forward
    assert "a graph ends within them: " in str(trial(model, decoder_layers(model), CPU, TOKENS))


def test_the_trial_draws_no_random_number_and_leaves_no_gradient() -> None:
    model = model_of("qwen3")
    before = torch.get_rng_state()
    assert trial(model, decoder_layers(model), CPU, TOKENS) is None
    assert torch.equal(before, torch.get_rng_state())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_when_rows_are_filled_up(capsys: pytest.CaptureFixture[str]) -> None:
    model = build("qwen3")
    for asked, stage, whole, tokens in (
        (None, 2, False, 0), (False, 2, False, 0), (True, 2, True, 0), (True, 2, False, 96), (True, 3, False, 0),
    ):  # fmt: skip
        assert static_tokens(model, stage, 96, asked=asked, whole_model=whole) == tokens
    said = capsys.readouterr().out
    assert said.count("layers: not compiled, as ZeRO-3 gathers") == 1
    assert said.count("layers: not compiled, as --torch_compile compiles the whole model") == 1
    moe = build("qwen3_moe", output_router_logits=True, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16)
    assert static_tokens(moe, 2, 96, asked=True, whole_model=False) == 0
    assert "the router's loss would count" in capsys.readouterr().out


def test_a_row_that_is_filled_up() -> None:
    batch = row([7, 30])
    assert batch["cu_seq_lens_q"].tolist() == [0, 7, 37, 48]
    assert (batch["labels"][0, 37:] == -100).all()
    assert batch["position_ids"][0, 35:40].tolist() == [28, 29, 0, 1, 2]
    assert batch["max_length_q"] == 30
    assert batch["input_ids"].dtype == batch["labels"].dtype == torch.long
    assert row([48])["cu_seq_lens_q"].tolist() == [0, 48]


def as_on_a_gpu() -> None:
    """Our attention and compiled layers in a CPU's run, by an operator that a CPU has."""
    from packed_trials import operator

    kernel = operator()
    assemble.take_packed = lambda model, _, say, **__: give(model, PackedAttention(say, [kernel, PLAIN]))

    def graph_alone(layer: Any) -> None:
        layer.forward = torch.compile(layer.forward, backend="aot_eager", dynamic=False)

    compiled.compile_layer = graph_alone


@pytest.mark.distributed
@pytest.mark.parametrize("lora", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_a_run_on_two_ranks_is_the_same_with_compiled_layers(
    lora: bool, ranks: RankRunner, models: Any, train_file: Path, tmp_path: Path, history: Any, zero: Any
) -> None:
    """Through the real trainer: ZeRO-2, evaluation between steps, rows that are not full."""
    more: dict[str, Any] = {"use_lora": "true", "lora_rank": 4} if lora else {}
    more |= {"deepspeed": zero(2), "eval_data_file": train_file, "eval_strategy": "steps", "eval_steps": 2}
    seen: list[list[float]] = []
    for asked in ("false", "true"):
        out = tmp_path / asked
        argv = flags(models("hunyuan_v1_dense"), train_file, out, save_strategy="no", compile_layers=asked, **more)
        done = ranks.run(argv, out / "log", ranks=2, before=as_on_a_gpu).check()
        assert ("compiled for rows of 160 tokens, proven here" in done.text) == (asked == "true")
        seen.append([value for step in history(out) for value in (step["loss"], step["grad_norm"])])
    assert len(seen[0]) == 6
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)


@pytest.mark.slow
def test_machine_code_gives_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own compiler, for the CPU."""
    monkeypatch.undo()
    model = model_of("qwen3")
    expected = outcome(model, row([7, 30]))
    begin(model)
    assert is_compiled(model)
    for a, b in zip(outcome(model, row([7, 30])), expected, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-5)


@pytest.mark.gpu
def test_on_a_gpu_layers_are_compiled_for_a_flash_kernel(capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    monkeypatch.undo()
    sizes = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 3}
    model = build("qwen3", dtype=torch.bfloat16, **sizes).cuda().train()
    give(model, PackedAttention(print))
    lengths = [100, 300, 112]
    batch = {name: value.cuda() if hasattr(value, "cuda") else value for name, value in row(lengths, 512).items()}
    expected = outcome(model, batch)
    callback = CompiledLayers(512)
    nothing: Any = SimpleNamespace()
    callback.on_train_begin(SimpleNamespace(device=torch.device("cuda", 0)), nothing, nothing, model=model)  # pyright: ignore[reportArgumentType]
    assert "layers: 3 compiled for rows of 512 tokens, proven here" in capsys.readouterr().out
    made = outcome(model, batch)
    assert float(made[0]) == pytest.approx(float(expected[0]), rel=1e-2)
    for a, b in zip(made[1:], expected[1:], strict=True):
        assert float((a - b).float().norm() / b.float().norm()) < 0.05
