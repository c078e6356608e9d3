"""Packed rows train like their samples alone: each attention is proven on the model, and the real trainer resumes exactly."""

import json
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.train.attention import AttentionError, check_isolation, check_trainable, takes_borders
from finebridge.train.packed_attention import take_packed
from packed_trials import CPU, build, flags, losses
from rank_runner import RankRunner
from safetensors.torch import load_file
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

Models = Callable[[str], Path]
History = Callable[[Path], list[dict[str, Any]]]
EXPERTS = {"num_experts": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2, "moe_topk": 2}
LINEAR = {
    "linear_num_value_heads": 2, "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 8, "layer_types": ["linear_attention", "full_attention"],
}  # fmt: skip


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3", "hunyuan_v1_dense"])
def test_packed_loss_and_gradients_are_those_of_the_samples_alone(model_type: str, attention: str) -> None:
    row, alone, gradients = losses(build(model_type, attention))
    assert row == pytest.approx(alone, rel=1e-6)
    assert gradients < 1e-5


@pytest.mark.gpu
@pytest.mark.parametrize("attention", ["sdpa", "eager", "flex_attention", "packed"])
@pytest.mark.parametrize("model_type", ["llama", "qwen3"])
def test_on_a_gpu_samples_stay_apart_and_train_as_alone(model_type: str, attention: str) -> None:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    sizes = {"hidden_size": 256, "head_dim": 64}
    half = attention not in ("sdpa", "eager")
    own = None if attention == "packed" else attention
    model = build(model_type, own, torch.bfloat16 if half else torch.float32, **sizes).to("cuda")
    if own is None:
        take_packed(model, model.device, print, packed=True, only_flash=True)
    check_trainable(model, model.device, say=lambda _: None)
    check_isolation(model, model.device)
    row, alone, gradients = losses(model, (129, 150, 131, 200))  # FlexAttention has no backward pass under 128 tokens
    assert row == pytest.approx(alone, rel=1e-2 if half else 1e-4)
    assert gradients < (0.1 if half else 1e-2)


def by_borders(
    module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, attention_mask: Any, **more: Any
) -> tuple[torch.Tensor, None]:
    """Attention without masks, as FlashAttention's: one call a sample, cut by ``cu_seq_lens_q``."""
    borders = more.pop("cu_seq_lens_q", torch.tensor([0, query.shape[2]])).tolist()
    assert attention_mask is None
    parts = [
        sdpa_attention_forward(module, *(x[:, :, a:b] for x in (query, key, value)), None, **more)[0]
        for a, b in pairwise(borders)
    ]
    return torch.cat(parts, dim=1), None


def across_borders(*args: Any, **more: Any) -> tuple[torch.Tensor, None]:
    """The same, deaf to the borders."""
    more.pop("cu_seq_lens_q", None)
    return by_borders(*args, **more)


AttentionInterface.register("by_borders", by_borders)
AttentionInterface.register("across_borders", across_borders)


def test_attention_without_masks_is_told_the_borders() -> None:
    model = build("qwen3", "by_borders")
    assert takes_borders(model)
    assert not takes_borders(build("qwen3", "sdpa"))
    row, alone, _ = losses(model)
    assert row == pytest.approx(alone, rel=1e-6)
    check_isolation(model, CPU)


ISOLATING = [
    ("llama", "sdpa", {}), ("qwen3", "eager", {}), ("hunyuan_v1_dense", "sdpa", {}),
    ("gemma3_text", "sdpa", {"sliding_window": 4}), ("qwen3_moe", "sdpa", EXPERTS), ("hunyuan_v1_moe", "eager", EXPERTS),
    ("mixtral", "sdpa", {"num_local_experts": 4}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("model_type", "attention", "more"), ISOLATING)
def test_isolation_is_proven(model_type: str, attention: str, more: dict[str, Any], dtype: torch.dtype) -> None:
    model = build(model_type, attention, dtype, attention_dropout=0.5, **more)
    before = torch.get_rng_state()
    check_isolation(model, CPU)
    assert model.training
    assert torch.equal(before, torch.get_rng_state())
    assert not any(module._forward_hooks for module in model.modules())


LEAKING = [
    ("mamba", None, {"state_size": 8}, "read one another"),
    ("lfm2", "sdpa", {"layer_types": ["conv", "full_attention"]}, "read one another"),
    ("qwen3_next", "sdpa", {**EXPERTS, **LINEAR}, "read one another"),
    ("bloom", None, {"n_head": 4, "n_layer": 2}, "read one another"),
    ("qwen3", "across_borders", {}, "read one another"),
    ("qwen3", "sdpa", {"use_cache": True}, "read one another"),
]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("model_type", "attention", "more", "message"), LEAKING, ids=[f"{c[0]}-{c[1]}-{len(c[2])}" for c in LEAKING]
)
def test_models_that_mix_samples_are_refused(
    model_type: str, attention: str | None, more: dict[str, Any], message: str, dtype: torch.dtype
) -> None:
    with pytest.raises(AttentionError, match=message):
        check_isolation(build(model_type, attention, dtype, **more), CPU)


def test_a_leak_inside_an_expert_block_is_found() -> None:
    """Blocks are compared up to rounding only, so one that mixes tokens must not pass as rounding."""
    model = build("qwen3_moe", "sdpa", **EXPERTS)
    block = model.model.layers[1].mlp
    plain = block.forward
    block.forward = lambda states, **more: plain(states + states.roll(1, dims=1), **more)
    with pytest.raises(AttentionError, match="read one another"):
        check_isolation(model, CPU)


def test_weights_that_are_no_numbers_prove_nothing() -> None:
    model = build("llama", "sdpa")
    model.model.norm.weight.data[0] = float("nan")
    with pytest.raises(AttentionError, match="not finite"):
        check_isolation(model, CPU)


def test_a_model_that_refuses_positions_is_named() -> None:
    model = build("llama", "sdpa")
    model.forward = lambda input_ids: input_ids
    with pytest.raises(AttentionError, match="LlamaForCausalLM with sdpa does not take packed samples.*position_ids"):
        check_isolation(model, CPU)


def test_attention_that_cannot_train_here() -> None:
    said: list[str] = []
    model = build("llama", "sdpa")
    check_trainable(model, CPU, said.append)
    assert not said
    check_trainable(model, torch.device("cuda"), said.append)
    assert "masks the other samples" in said[0]
    model.config._attn_implementation = "flex_attention"
    with pytest.raises(AttentionError, match="no backward pass on a CPU"):
        check_trainable(model, CPU)


def evaluated(out: Path) -> list[float]:
    state = json.loads((out / "trainer_state.json").read_text())
    return [entry["eval_loss"] for entry in state["log_history"] if "eval_loss" in entry]


def test_one_step_is_the_same_packed_and_padded(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path, history: History
) -> None:
    """All samples in one step: loss, gradient and held-out loss do not tell how they were laid out, nor over how many ranks."""
    base = models("hunyuan_v1_dense")
    more = {
        "max_steps": 1,
        "eval_data_file": train_file,
        "eval_strategy": "steps",
        "eval_steps": 1,
        "save_strategy": "no",
    }
    padded = {"packing": "false", "per_device_train_batch_size": 24, "per_device_eval_batch_size": 24}
    one = {"per_device_train_batch_size": 24, "per_device_eval_batch_size": 24}
    two = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 12}
    seen: list[tuple[float, ...]] = []
    for number, (change, world) in enumerate([(padded, 1), (one, 1), (two, 2)]):
        out = tmp_path / str(number)
        done = ranks.run(flags(base, train_file, out, **more, **change), out / "log", ranks=world).check()
        assert ("packing: 24 training samples share" in done.text) is (number > 0)
        step = history(out)[0]
        seen.append((step["loss"], step["grad_norm"], *evaluated(out)))
    assert len(seen[0]) == 3
    assert seen[1] == pytest.approx(seen[0], rel=2e-5)
    assert seen[2] == pytest.approx(seen[0], rel=2e-5)


def test_two_ranks_resume_in_the_middle_of_an_epoch_as_if_never_stopped(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path, history: History
) -> None:
    more = {
        "max_steps": 10, "save_steps": 5, "gradient_accumulation_steps": 2, "deepspeed": "ds_zero2_no_offload",
        "eval_data_file": train_file, "eval_strategy": "steps", "eval_steps": 5, "max_seq_length": 96,
    }  # fmt: skip
    base, straight, resumed = models("hunyuan_v1_dense"), tmp_path / "straight", tmp_path / "resumed"
    ranks.run(flags(base, train_file, straight, **more), straight / "log", ranks=2).check()
    state = json.loads((straight / "checkpoint-5" / "trainer_state.json").read_text())
    assert state["epoch"] > 1, "the resumed epoch is not the first one"
    assert state["epoch"] % 1, "and it is half done"
    resumed.mkdir()
    (straight / "checkpoint-5").rename(resumed / "checkpoint-5")
    argv = flags(base, train_file, resumed, resume_from_checkpoint="true", **more)
    ranks.run(argv, resumed / "log", ranks=2).check()
    ours, theirs = (load_file(path / "checkpoint-10" / "model.safetensors") for path in (resumed, straight))
    assert all(ours[name].equal(theirs[name]) for name in theirs)
    lost = [entry["loss"] for entry in history(straight)]
    assert [entry["loss"] for entry in history(resumed)] == lost
    assert evaluated(resumed) == evaluated(straight)
    assert len(evaluated(straight)) == 2
    assert sum(lost[-3:]) < sum(lost[:3])


def test_every_rank_proves_a_partitioned_model(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path, history: History
) -> None:
    from finebridge.ds_configs.resolve import resolve

    settings = resolve("ds_zero3_no_offload")
    settings["zero_optimization"]["stage3_param_persistence_threshold"] = 0
    (tmp_path / "ds.json").write_text(json.dumps(settings))
    argv = flags(models("hunyuan_v1_moe"), train_file, tmp_path, deepspeed=tmp_path / "ds.json")
    ranks.run(argv, tmp_path / "log", ranks=2).check()
    assert len(history(tmp_path)) == 3
    other = flags(models("hunyuan_v1_moe"), train_file, tmp_path, deepspeed=tmp_path / "ds.json", packing="false")
    done = ranks.run([*other, "--resume_from_checkpoint"], tmp_path / "log2", ranks=2)
    assert done.codes == [2, 2]
    assert "packs was" in done.text


def test_a_model_that_leaks_does_not_train(ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    base = models("hunyuan_v1_dense")
    tokenizer = AutoTokenizer.from_pretrained(base)
    tokenizer.save_pretrained(tmp_path / "mamba")
    build("mamba", state_size=8, vocab_size=len(tokenizer)).save_pretrained(tmp_path / "mamba")
    done = ranks.run(flags(tmp_path / "mamba", train_file, tmp_path / "out"), tmp_path / "log")
    assert done.codes != [0]
    assert "packed samples read one another" in done.text
    assert "'loss'" not in done.text
    assert not list((tmp_path / "out").glob("*checkpoint-*"))


def test_a_loader_of_another_kind_is_refused(
    ranks: RankRunner, models: Models, train_file: Path, tmp_path: Path
) -> None:
    argv = flags(models("hunyuan_v1_dense"), train_file, tmp_path, accelerator_config='{"split_batches": true}')
    done = ranks.run(argv, tmp_path / "log")
    assert done.codes == [2]
    assert "samples are dealt to ranks here" in done.text
