"""The loss in pieces is that of whole logits, down to every gradient; a head with something behind it is left alone."""

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.train import chunked_loss, softmax_gradient
from finebridge.train.chunked_loss import find_head, head_loss, head_sums, targets
from finebridge.train.losses import evaluation_sums, summed_loss
from peft import LoraConfig, get_peft_model
from rank_runner import RankRunner
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModelForCausalLM, set_seed

CPU = torch.device("cpu")
WIDTH, WORDS = 16, 211
SIZES = {
    "vocab_size": 60, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 256, "pad_token_id": 0, "use_cache": False,
}  # fmt: skip


def batch(rows: int = 3, tokens: int = 40) -> dict[str, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    labels = torch.randint(0, WORDS, (rows, tokens), generator=draw)
    labels[:, : tokens // 3] = -100
    labels[0, 20:] = -100
    return {"labels": labels}


def packed() -> dict[str, torch.Tensor]:
    positions = torch.cat([torch.arange(n) for n in (30, 1, 49, 40)])[None]
    return {"labels": batch()["labels"].view(1, -1), "position_ids": positions}


def both(
    dtype: torch.dtype, inputs: dict[str, torch.Tensor], how: Any, smoothing: float, bias: bool = False
) -> Iterator[tuple[torch.Tensor, tuple[torch.Tensor, ...]]]:
    """Loss and gradients from whole logits, then in pieces of 7 rows; the last scale is that of a step's division."""
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, WORDS, bias=bias).to(dtype)
    hidden = torch.randn(*inputs["labels"].shape, WIDTH).to(dtype).requires_grad_()
    sources = [hidden, *head.parameters()]
    whole = summed_loss(head(hidden), inputs, how, smoothing)
    yield whole, torch.autograd.grad(whole / 37, sources)
    total = head_loss(head.forward, list(head.parameters()), hidden, targets(inputs, how), smoothing, 7)
    yield total, torch.autograd.grad(total / 37, sources)


def off(one: torch.Tensor, other: torch.Tensor) -> float:
    return float((one.double() - other.double()).norm() / other.double().norm())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("how", ["token", "sequence", "batch"])
@pytest.mark.parametrize("inputs", [batch(), packed()], ids=["padded", "packed"])
def test_pieces_are_the_whole(inputs: dict[str, torch.Tensor], how: Any, smoothing: float) -> None:
    (whole, expected), (total, made) = both(torch.float32, inputs, how, smoothing, bias=True)
    assert total.dtype == torch.float32
    assert total.item() == pytest.approx(whole.item(), rel=1e-6)
    assert max(map(off, made, expected)) < 1e-6


def test_in_bf16_pieces_are_no_worse_than_the_whole() -> None:
    (whole, expected), (total, made) = both(torch.bfloat16, batch(), "token", 0.0)
    (true, exact), _ = both(torch.float32, batch(), "token", 0.0)
    assert total.item() == pytest.approx(whole.item(), rel=1e-3)
    assert total.item() == pytest.approx(true.item(), rel=5e-3)
    for one, other, best in zip(made, expected, exact, strict=True):
        assert one.dtype == torch.bfloat16
        assert off(one, best) < 1.2 * off(other, best) + 1e-3


def test_a_batch_without_loss_gives_zero_gradients_to_all() -> None:
    inputs = {"labels": torch.full((1, 9), -100)}
    head = nn.Linear(WIDTH, WORDS)
    hidden = torch.randn(1, 9, WIDTH, requires_grad=True)
    total = head_loss(head.forward, list(head.parameters()), hidden, targets(inputs, "token"), 0.0, 7)
    total.backward()
    assert total.item() == 0
    for tensor in (hidden, *head.parameters()):
        assert tensor.grad is not None
        assert not tensor.grad.any()


def test_only_what_trains_gets_a_gradient() -> None:
    head = nn.Linear(WIDTH, WORDS, bias=False).requires_grad_(False)
    hidden = torch.randn(3, 40, WIDTH, requires_grad=True)
    head_loss(head.forward, [head.weight], hidden, targets(batch(), "token"), 0.0, 7).backward()
    assert head.weight.grad is None
    assert hidden.grad is not None
    head.requires_grad_()
    head_loss(head.forward, [head.weight], hidden.detach(), targets(batch(), "token"), 0.0, 7).backward()
    assert head.weight.grad is not None


def test_evaluation_in_pieces_counts_the_same() -> None:
    head, hidden = nn.Linear(WIDTH, WORDS), torch.randn(3, 40, WIDTH)
    with torch.no_grad():
        expected = evaluation_sums(head(hidden), batch()["labels"])
        made = head_sums(head.forward, hidden, targets(batch(), "token"), 7)
    assert made.tolist() == pytest.approx(expected.tolist(), rel=1e-6)


class Largest(TorchDispatchMode):
    """Remembers the largest tensor that an operation made, in bytes; views of the given ones are none."""

    def __init__(self, *given: torch.Tensor) -> None:
        super().__init__()
        self.bytes = 0
        self._given = {tensor.untyped_storage().data_ptr() for tensor in given}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for value in made if isinstance(made, (tuple, list)) else (made,):
            if isinstance(value, torch.Tensor) and value.untyped_storage().data_ptr() not in self._given:
                self.bytes = max(self.bytes, value.numel() * value.element_size())
        return made


def test_logits_are_never_there_as_a_whole() -> None:
    head, inputs = nn.Linear(WIDTH, 4000, bias=False), batch(8, 64)
    hidden = torch.randn(8, 64, WIDTH, requires_grad=True)
    with Largest() as whole:
        summed_loss(head(hidden), inputs, "token").backward()
    with Largest() as pieces:
        head_loss(head.forward, [head.weight], hidden, targets(inputs, "token"), 0.0, 16).backward()
    assert whole.bytes >= 4 * 8 * 63 * 4000
    assert pieces.bytes <= 4 * max(16 * 4000, head.weight.numel(), hidden.numel())


def test_a_frozen_head_is_only_read() -> None:
    """LoRA: no gradient of its weights, no copy of them, and of a prompt no logits."""
    head, inputs = nn.Linear(WIDTH, 4000, bias=False).requires_grad_(False), batch(8, 64)
    hidden, seen = torch.randn(8, 64, WIDTH, requires_grad=True), list[int]()

    def run(rows: torch.Tensor) -> torch.Tensor:
        seen.append(len(rows))
        return head(rows)

    with Largest(head.weight, hidden) as made:
        head_loss(run, [head.weight], hidden, targets(inputs, "token"), 0.0, 8).backward()
    assert made.bytes <= 4 * 8 * 4000 < 4 * head.weight.numel()
    assert sum(seen) == int((inputs["labels"][:, 1:] != -100).sum()) < 8 * 64
    assert head.weight.grad is None
    assert hidden.grad is not None


def build(model_type: str, **more: Any) -> Any:
    set_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**SIZES, **more}), dtype=torch.float32)


def adapted(**more: Any) -> Any:
    config = LoraConfig(r=2, init_lora_weights=False, target_modules=["q_proj", *more.pop("target", [])], **more)
    return get_peft_model(build("llama"), config)


HEADS: dict[str, Callable[[], Any]] = {
    "plain": lambda: build("llama"),
    "tied": lambda: build("qwen3", tie_word_embeddings=True),
    "LoRA elsewhere": adapted,
    "LoRA on the head": lambda: adapted(target=["lm_head"]),
    "head saved whole": lambda: adapted(modules_to_save=["lm_head"]),
    "experts": lambda: build("qwen3_moe", num_experts=4, moe_intermediate_size=16, num_experts_per_tok=2),
}


def test_under_autocast_pieces_are_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    """Plain runs: fp32 weights, products in bf16, gradients in fp32."""
    monkeypatch.setattr(chunked_loss, "WORTH", 0)
    monkeypatch.setitem(chunked_loss._PIECE, "cpu", 300)  # pyright: ignore[reportPrivateUsage]
    model = build("qwen3", tie_word_embeddings=True)
    model.forward = torch.autocast("cpu", torch.bfloat16)(model.forward)  # as accelerate does
    head = find_head(model, CPU, 100, 0.0, print)
    assert head is not None
    inputs = {"input_ids": torch.arange(40).view(2, 20) % 60, "labels": (torch.arange(40).view(2, 20) * 3) % 60}
    whole = summed_loss(model(input_ids=inputs["input_ids"]).logits, inputs, "token")
    expected = torch.autograd.grad(whole, list(model.parameters()))
    with head.loss_for(targets(inputs, "token"), 0.0):
        total = model(input_ids=inputs["input_ids"]).logits
    assert total.item() == pytest.approx(whole.item(), rel=1e-5)
    for one, other in zip(torch.autograd.grad(total, list(model.parameters())), expected, strict=True):
        assert one.dtype == torch.float32
        assert off(one, other) < 5e-3


@pytest.mark.parametrize("name", HEADS)
def test_a_models_loss_in_pieces(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "WORTH", 0)
    monkeypatch.setitem(chunked_loss._PIECE, "cpu", 300)  # pyright: ignore[reportPrivateUsage]
    said: list[str] = []
    model = HEADS[name]()
    before = torch.get_rng_state()
    head = find_head(model, CPU, 100, 0.0, said.append)
    assert torch.equal(before, torch.get_rng_state())
    assert head is not None, said
    assert head.rows == 5
    assert "5 rows of logits at a time" in said[0]
    assert model.training
    assert "forward" not in head.module.__dict__
    inputs = {"input_ids": torch.arange(40).view(2, 20) % 60, "labels": (torch.arange(40).view(2, 20) * 3) % 60}
    trained = [p for p in model.parameters() if p.requires_grad]
    whole = summed_loss(model(input_ids=inputs["input_ids"]).logits, inputs, "token")
    expected = torch.autograd.grad(whole, trained)
    with head.loss_for(targets(inputs, "token"), 0.0):
        total = model(input_ids=inputs["input_ids"]).logits
    assert float(total) == pytest.approx(float(whole), rel=1e-6)
    assert max(map(off, torch.autograd.grad(total, trained), expected)) < 1e-5


REFUSED = {
    "gemma2": ({"final_logit_softcapping": 30.0, "sliding_window": 8}, "changes its logits behind the head"),
    "granite": ({"logits_scaling": 8.0}, "changes its logits behind the head"),
    "cohere": ({"logit_scale": 0.0625}, "changes its logits behind the head"),
}


@pytest.mark.parametrize("model_type", REFUSED)
def test_a_head_with_something_behind_it_is_left_alone(model_type: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "WORTH", 0)
    more, why = REFUSED[model_type]
    said: list[str] = []
    assert find_head(build(model_type, **more), CPU, 100, 0.0, said.append) is None
    assert why in said[0]


class Forgetful(nn.Linear):
    """A head whose gradient is not that of its output."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:  # noqa: A002 - torch's name
        return super().forward(input if input.shape[0] > 5 else input.detach() * 1.0)


def test_what_cannot_be_proven_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "WORTH", 0)
    said: list[str] = []
    model = build("llama")
    model.lm_head.__class__ = Forgetful
    assert find_head(model, CPU, 100, 0.0, said.append) is None
    model = build("llama")
    model.forward = partial(type(model).forward, model, logits_to_keep=4)
    assert find_head(model, CPU, 100, 0.0, said.append) is None
    model = build("llama")
    monkeypatch.setattr(chunked_loss, "softmax_gradient", lambda *args: softmax_gradient.plainly(*args) * 1.01)
    assert find_head(model, CPU, 100, 0.0, said.append) is None
    assert len(said) == 3
    assert "the loss in pieces is 0.01 off" in said[2]


def test_a_small_batch_needs_no_pieces() -> None:
    said: list[str] = []
    assert find_head(build("llama"), CPU, 100, 0.0, said.append) is None
    assert not said


def test_a_compiled_form_that_is_wrong_or_fails_is_not_used(capsys: pytest.CaptureFixture[str]) -> None:
    logits, ids, weights = torch.randn(100, WORDS), torch.arange(100), torch.ones(100)

    def fails(*_: Any) -> torch.Tensor:
        raise RuntimeError("no compiler\nat all")

    def wrong(*args: Any) -> torch.Tensor:
        return softmax_gradient.plainly(*args) + 1

    for run in (fails, wrong):
        assert softmax_gradient.choose(run, logits.clone(), ids, weights, 0.0) is softmax_gradient.plainly
    told = capsys.readouterr().out.splitlines()
    assert "RuntimeError: no compiler" in told[0]
    assert "off" in told[1]
    assert len(told) == 2


@pytest.mark.slow
def test_compiled_is_eager() -> None:
    run = softmax_gradient.compile_it()
    for rows in (100, 64, 33):
        logits, ids, weights = torch.randn(rows, WORDS), torch.arange(rows), torch.rand(rows)
        expected, made = logits.clone(), logits.clone()
        losses = softmax_gradient.plainly(expected, ids, weights, 0.1)
        torch.testing.assert_close(run(made, ids, weights, 0.1), losses)
        torch.testing.assert_close(made, expected)


@pytest.mark.gpu
def test_on_a_gpu_it_is_compiled_and_right() -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    torch.manual_seed(0)
    head = nn.Linear(WIDTH, 50_000, bias=False, device="cuda", dtype=torch.bfloat16)
    hidden = torch.randn(3, 400, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    inputs = {"labels": batch(3, 400)["labels"].cuda()}
    whole = summed_loss(head(hidden), inputs, "token")
    expected = torch.autograd.grad(whole, [hidden, head.weight])
    for rows in (300, 130, 77):
        total = head_loss(head.forward, [head.weight], hidden, targets(inputs, "token"), 0.0, rows)
        assert total.item() == pytest.approx(whole.item(), rel=1e-3)
        assert max(map(off, torch.autograd.grad(total, [hidden, head.weight]), expected)) < 1e-2
    assert softmax_gradient._chosen[0] is not softmax_gradient.plainly  # pyright: ignore[reportPrivateUsage]


def in_pieces() -> None:
    """Of every run in this process, however small."""
    chunked_loss.WORTH = 0
    chunked_loss._PIECE["cpu"] = 330 * 9  # pyright: ignore[reportPrivateUsage]


@pytest.mark.distributed
@pytest.mark.parametrize("run", ["full", pytest.param("LoRA on the head", marks=pytest.mark.slow)])
def test_two_ranks_with_a_partitioned_head(
    run: str, ranks: RankRunner, models: Any, train_file: Path, tmp_path: Path, history: Any, zero: Any
) -> None:
    """ZeRO-3: the weights are there in the head's forward and their gradients arrive; evaluation too."""
    more = {} if run == "full" else {"use_lora": "true", "lora_rank": 4, "lora_target": "q_proj,lm_head"}
    values: dict[str, Any] = {
        "model_name_or_path": models("hunyuan_v1_dense"), "train_data_file": train_file, "eval_data_file": train_file,
        "max_steps": 3, "logging_steps": 1, "eval_strategy": "steps", "eval_steps": 3, "save_strategy": "no",
        "learning_rate": 1e-2, "per_device_train_batch_size": 2, "disable_tqdm": "true", "deepspeed": zero(3),
        "lr_scheduler_type": "constant", "gradient_accumulation_steps": 2, **more,
    }  # fmt: skip
    seen: list[list[float]] = []
    for name, before in (("whole", None), ("pieces", in_pieces)):
        out = tmp_path / name
        words = [w for flag, value in (values | {"output_dir": out}).items() for w in (f"--{flag}", value)]
        done = ranks.run(words, out / "log", ranks=2, before=before).check()
        assert ("rows of logits at a time" in done.text) == (name == "pieces" and run == "full")
        assert ("ZeRO-3 gathers one by one" in done.text) == (name == "pieces" and run != "full")
        steps = history(out)
        logged = json.loads((out / "trainer_state.json").read_text())["log_history"]
        held_out = next(entry for entry in logged if "eval_loss" in entry)
        seen.append([value for step in steps for value in (step["loss"], step["grad_norm"])])
        seen[-1] += [held_out["eval_loss"], held_out["eval_accuracy"]]
    assert len(seen[0]) == 8
    assert seen[1] == pytest.approx(seen[0], rel=2e-5)
