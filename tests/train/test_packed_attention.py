"""Attention over packed rows: every kernel is held against plain products, and what one lacks another does."""

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from finebridge.data_tools.collator import FlatteningCollator
from finebridge.train import assemble, packed_attention, runtime
from finebridge.train.arguments import parse
from finebridge.train.attention import AttentionError, IsolationProof, check_isolation
from finebridge.train.attention_kernels import KERNELS, PLAIN, Kernel, Need, plain
from finebridge.train.attention_proof import refusal, seconds
from finebridge.train.flash import Borders, LackError
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.packed_attention import PackedAttention, give, take_packed
from packed_trials import CPU, build, flags, losses
from peft import LoraConfig, get_peft_model
from rank_runner import RankRunner
from torch import nn

NEED = Need(CPU, torch.float32, heads=4, key_heads=2, width=16, value_width=16, scale=0.25)
SDPA = next(kernel for kernel in KERNELS if kernel.name.startswith("SDPA"))
FLASH = Kernel("a flash kernel", flash=True, call=plain)
NEEDS = {
    "grouped": NEED,
    "bf16": replace(NEED, dtype=torch.bfloat16),
    "window": replace(NEED, window=512),
    "not causal": replace(NEED, causal=False),
    "not causal, window": replace(NEED, causal=False, window=40),
    "narrow values": replace(NEED, value_width=8, key_heads=4),
    "soft cap": replace(NEED, softcap=3.0),
    "sinks": replace(NEED, sinks=True, dtype=torch.bfloat16),
}


@pytest.mark.parametrize("name", NEEDS)
def test_the_proof_takes_what_is_right(name: str) -> None:
    before = torch.get_rng_state()
    lacks = {"soft cap": "has no softcap", "sinks": "has no sinks"}
    assert refusal(SDPA, NEEDS[name]) == lacks.get(name)
    assert refusal(FLASH, NEEDS[name]) is None
    assert torch.equal(before, torch.get_rng_state())


def wrong(change: Callable[..., Any], name: str = "wrong") -> Kernel:
    """A flash kernel that is right but for what ``change`` does to its arguments."""

    def call(query: Any, key: Any, value: Any, borders: Any, need: Any, sinks: Any, dropout: Any) -> torch.Tensor:
        given = {"query": query, "key": key, "value": value, "borders": borders, "need": need, "sinks": sinks}
        return plain(**{**given, **change(**given)}, dropout=dropout)

    return Kernel(name, flash=True, call=call)


def late(borders: Borders, **_: Any) -> dict[str, Any]:
    """The last border one token late, so that one token is read by another sample."""
    starts = borders.starts.clone()
    starts[-2] += 1
    return {"borders": Borders(starts, borders.longest)}


WRONG: dict[str, Callable[..., Any]] = {
    "one row for all": lambda borders, **_: {"borders": Borders(borders.starts[[0, -1]], int(borders.starts[-1]))},
    "a border is late": late,
    "no scale": lambda need, **_: {"need": replace(need, scale=1.0)},
    "not causal": lambda need, **_: {"need": replace(need, causal=False)},
    "window off by one": lambda need, **_: {"need": replace(need, window=need.window + 1)},
    "no window": lambda need, **_: {"need": replace(need, window=None)},
    "values without a gradient": lambda value, **_: {"value": value.detach() + 0 * value},
    "keys' gradient doubled": lambda key, **_: {"key": 2 * key - key.detach()},
    "no numbers": lambda query, **_: {"query": query * float("nan")},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", WRONG)
def test_the_proof_refuses_what_is_wrong(name: str, dtype: torch.dtype) -> None:
    why = refusal(wrong(WRONG[name]), replace(NEED, window=30, dtype=dtype))
    assert why is not None
    assert "not finite" in why if name == "no numbers" else "is wrong here" in why


def test_sinks_that_are_left_out_are_found() -> None:
    need = replace(NEED, sinks=True)
    assert "wrong" in str(refusal(wrong(lambda sinks, **_: {"sinks": sinks - 5}), need))
    assert "wrong" in str(refusal(wrong(lambda sinks, **_: {"sinks": sinks.detach() + 0 * sinks}), need))


def broken(*_: Any) -> torch.Tensor:
    raise RuntimeError("no kernel image is available\nfor this device")


def lacking(*_: Any) -> torch.Tensor:
    raise LackError("not installed")


def model_with(attention: PackedAttention, monkeypatch: pytest.MonkeyPatch, **more: Any) -> Any:
    model = build(more.pop("model_type", "qwen3"), **more)
    give(model, attention)
    monkeypatch.setattr(packed_attention, "seconds", lambda *_: 1.0)
    return model


def test_the_first_proven_kernel_is_taken_and_told_once(monkeypatch: pytest.MonkeyPatch) -> None:
    said: list[str] = []
    kernels = [
        Kernel("one", flash=True, call=lacking), Kernel("two", flash=True, call=broken),
        wrong(WRONG["one row for all"], "three"), SDPA, PLAIN,
    ]  # fmt: skip
    attention = PackedAttention(said.append, kernels)
    model = model_with(attention, monkeypatch)
    row, alone, gradients = losses(model)
    assert row == pytest.approx(alone, rel=1e-6)
    assert gradients < 1e-5
    assert set(attention.chosen.values()) == {SDPA}
    assert len(said) == 1
    assert said[0].startswith("attention: SDPA, sample by sample, proven here for 4 heads of 8, 2 for keys, float32 (")
    assert "one: not installed; two: RuntimeError: no kernel image is available; three: its output is wrong" in said[0]


def test_the_fastest_of_several_flash_kernels_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    one, two = replace(FLASH, name="one"), replace(FLASH, name="two")
    for taken, expected in (({"one": 1.0, "two": 0.97}, one), ({"one": 1.0, "two": 0.5}, two)):
        attention = PackedAttention(lambda _: None, [one, two, PLAIN])
        model = model_with(attention, monkeypatch)
        monkeypatch.setattr(packed_attention, "seconds", lambda kernel, _, taken=taken: taken[kernel.name])
        losses(model)
        assert set(attention.chosen.values()) == {expected}


def proof(model: Any, *, only_flash: bool = False) -> None:
    IsolationProof("cure it", only_flash=only_flash).on_train_begin(
        SimpleNamespace(device=CPU), SimpleNamespace(), SimpleNamespace(), model=model  # pyright: ignore[reportArgumentType]
    )  # fmt: skip


MODELS: dict[str, dict[str, Any]] = {
    "llama": {}, "hunyuan_v1_dense": {}, "mistral": {"sliding_window": 6},
    "gemma3_text": {"sliding_window": 4, "layer_types": ["sliding_attention", "full_attention"]},
    "gemma2": {"sliding_window": 4, "attn_logit_softcapping": 2.0},
    "gpt_oss": {"sliding_window": 4, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {
        "q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8,
        "num_key_value_heads": 4, "first_k_dense_replace": 2, "n_routed_experts": 4, "n_group": 1, "topk_group": 1,
        "num_experts_per_tok": 2,
    },
}  # fmt: skip


@pytest.mark.parametrize("model_type", MODELS)
def test_models_train_as_with_their_own_attention(model_type: str) -> None:
    """Windows, soft caps, sinks, values narrower than keys: what SDPA lacks plain products do, and nothing is left out."""
    rows: list[tuple[float, float, float]] = []
    for ours in (False, True):
        model = build(model_type, **MODELS[model_type])
        if ours:
            give(model, PackedAttention(lambda _: None, [SDPA, PLAIN]))
        rows.append(losses(model))
    own_alone = rows[0][1]  # gpt_oss alone does not keep samples apart by itself
    assert rows[1][0] == pytest.approx(own_alone, rel=1e-5)
    assert rows[1][1] == pytest.approx(own_alone, rel=1e-5)
    assert rows[1][2] < 1e-4
    proof(model)
    assert model.config._attn_implementation == "packed"


def test_borders_are_made_once_for_all_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Borders] = []

    def note(query: Any, key: Any, value: Any, borders: Borders, *rest: Any) -> torch.Tensor:
        seen.append(borders)
        return plain(query, key, value, borders, *rest)

    monkeypatch.setattr(packed_attention, "refusal", lambda *_: None)
    model = model_with(PackedAttention(lambda _: None, [Kernel("noting", flash=True, call=note)]), monkeypatch)
    check_isolation(model, CPU)
    assert len(seen) == 4  # two passes of two layers
    assert seen[0] is seen[1]
    assert seen[2] is seen[3]
    assert seen[0] is not seen[2]


@pytest.mark.parametrize("lora", [False, True])
@pytest.mark.parametrize("reentrant", [None, False, True])
def test_checkpointed_layers_and_adapters(lora: bool, reentrant: bool | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The proof may even come within a checkpointed layer; gradients are those without."""
    gradients: list[list[torch.Tensor]] = []
    for ours in (True, False):
        model = build("qwen3")
        if ours:
            model = model_with(PackedAttention(lambda _: None, [SDPA, PLAIN]), monkeypatch)
        if lora:
            torch.manual_seed(0)
            model = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        if reentrant is not None and ours:
            model.gradient_checkpointing_enable({"use_reentrant": reentrant})
            model.enable_input_require_grads()
        model.train()
        batch = FlatteningCollator(borders=True)([packed_row()])
        model(**batch).loss.backward()
        gradients.append([p.grad for p in model.parameters() if p.requires_grad])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6)


def packed_row() -> dict[str, Any]:
    lengths = torch.tensor([17, 30, 5])
    ids = torch.arange(52) * 7 % 60
    return {"input_ids": ids.numpy(), "labels": ids.numpy(), "lengths": lengths.numpy()}


def test_rows_without_borders_are_a_sample_each(monkeypatch: pytest.MonkeyPatch) -> None:
    """Filling on the right needs no mask: no real token looks ahead."""
    ids, mask = torch.arange(40).view(2, 20) * 3 % 60, torch.ones(2, 20, dtype=torch.long)
    mask[1, 12:] = 0
    expected = build("qwen3")(input_ids=ids, attention_mask=mask).logits
    made = model_with(PackedAttention(lambda _: None, [FLASH, PLAIN]), monkeypatch)(input_ids=ids, attention_mask=mask)
    torch.testing.assert_close(made.logits[mask.bool()], expected[mask.bool()])


def test_a_flash_kind_that_was_asked_for_and_is_not_there_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = [Kernel("one", flash=True, call=lacking), SDPA, PLAIN]
    model = model_with(PackedAttention(lambda _: None, kernels, only_flash=True), monkeypatch)
    with pytest.raises(AttentionError, match=r"--use_flash_attn: no flash kernel .*one: not installed"):
        check_isolation(model, CPU)
    with pytest.raises(AttentionError, match="--use_flash_attn: flash kernels need a CUDA GPU"):
        take_packed(build("llama"), CPU, print, packed=True, only_flash=True)
    for model_type, more in (("bloom", {"n_head": 4, "n_layer": 2}), ("llama4_text", {"num_local_experts": 2})):
        with pytest.raises(AttentionError, match="does not follow the contract"):
            take_packed(build(model_type, **more), torch.device("cuda"), print, packed=True, only_flash=True)


def test_who_gets_it() -> None:
    cuda = torch.device("cuda")
    for device, packed, name in ((CPU, True, "sdpa"), (cuda, False, "sdpa"), (cuda, True, "packed")):
        model = build("llama")
        take_packed(model, device, print, packed=packed, only_flash=False)
        assert model.config._attn_implementation == name


@pytest.mark.parametrize("change", ["one row for all", "not causal"])
def test_a_model_on_which_it_fails_goes_back_to_its_own(
    change: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A kernel that only goes wrong within the model: by isolation, or by other outputs than before."""
    monkeypatch.setattr(packed_attention, "refusal", lambda *_: None)
    spoilt = PackedAttention(lambda _: None, [wrong(WRONG[change])])
    model = model_with(spoilt, monkeypatch)
    for parameter in model.parameters():
        parameter.data *= 3  # so that attention weighs something
    proof(model)
    assert model.config._attn_implementation == "sdpa"
    told = capsys.readouterr().out
    assert "attention: sdpa in place of our own: " in told
    assert ("read one another" if change == "one row for all" else "away from those with sdpa") in told
    model = model_with(spoilt, monkeypatch)
    for parameter in model.parameters():
        parameter.data *= 3
    with pytest.raises(AttentionError, match="read one another|away from"):
        proof(model, only_flash=True)


def test_what_the_contract_does_not_have_is_refused() -> None:
    attention = PackedAttention(lambda _: None, [PLAIN])
    query = torch.randn(1, 4, 5, 8)
    call = partial(attention, nn.Module(), query)
    with pytest.raises(AttentionError, match="a mask or a bias"):
        call(query, query, torch.ones(1, 1, 5, 5))
    with pytest.raises(AttentionError, match="a cache"):
        call(query.repeat(1, 1, 2, 1), query.repeat(1, 1, 2, 1), None)


def test_a_run_without_a_gpu_has_no_flash_kernel(
    models: Callable[[str], Path], train_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runtime, "has_accelerator", lambda: False)
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path / "out", use_flash_attn="true")
    with pytest.raises(ArgumentsError, match="--use_flash_attn: there is no GPU here"):
        assemble.assemble(parse([str(word) for word in argv]))
    assert not (tmp_path / "out").exists()


def as_on_a_gpu() -> None:
    """Our attention in a CPU's run, with the kernels that a CPU has."""
    assemble.take_packed = lambda model, _, say, **__: give(model, PackedAttention(say))


@pytest.mark.distributed
@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_a_run_on_two_ranks_is_that_with_the_models_own(
    stage: int, ranks: RankRunner, models: Any, train_file: Path, tmp_path: Path, history: Any, zero: Any
) -> None:
    """Through the real trainer: LoRA under ZeRO-2, everything under ZeRO-3, checkpointed layers, evaluation."""
    more: dict[str, Any] = {"use_lora": "true", "lora_rank": 4} if stage == 2 else {}
    more |= {
        "deepspeed": zero(stage), "gradient_checkpointing": "true", "eval_data_file": train_file, "eval_strategy": "steps",
        "eval_steps": 3, "save_strategy": "no",
    }  # fmt: skip
    seen: list[list[float]] = []
    for name, before in (("own", None), ("ours", as_on_a_gpu)):
        out = tmp_path / name
        argv = flags(models("hunyuan_v1_dense"), train_file, out, **more)
        done = ranks.run(argv, out / "log", ranks=2, before=before).check()
        assert ("attention: SDPA, sample by sample, proven here" in done.text) == (name == "ours")
        seen.append([value for step in history(out) for value in (step["loss"], step["grad_norm"])])
    assert len(seen[0]) == 6
    assert seen[1] == pytest.approx(seen[0], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("name", NEEDS)
def test_on_a_gpu_some_kernel_is_proven_and_timed(name: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    need = replace(NEEDS[name], device=torch.device("cuda"), dtype=torch.bfloat16, width=64)
    reasons = {kernel.name: refusal(kernel, need) for kernel in KERNELS}
    assert None in reasons.values(), reasons
    if "soft cap" not in name and "sinks" not in name:
        assert reasons["torch's own FlashAttention-2"] is None, reasons
    proven = [kernel for kernel in KERNELS if reasons[kernel.name] is None]
    assert all(seconds(kernel, need) > 0 for kernel in proven)
