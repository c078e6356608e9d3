"""FLOPs by hand for tiny models of each kind, counts of batches, and the meter's clock."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from finebridge.data_tools.collator import FlatteningCollator, PaddingCollator
from finebridge.train.throughput import (
    Attention,
    Counts,
    Flops,
    Meter,
    UnknownShapeError,
    count,
    peak_of,
    training_flops,
)
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

# hidden 8, 2 heads of 4, 1 key-value head: q 8x8, k 8x4, v 8x4, o 8x8; MLP 3 x 8 x 16; vocabulary 32.
QKVO = 64 + 32 + 32 + 64
MLP = 3 * 8 * 16
HEAD = 8 * 32
WIDTH = 2 * (4 + 4)  # heads x (key + value size)


def model(kind: str, **more: Any) -> Any:
    values: dict[str, Any] = {
        "vocab_size": 32, "hidden_size": 8, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2,
        "num_key_value_heads": 1, "head_dim": 4, "tie_word_embeddings": False,
    } | more  # fmt: skip
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **values))


def layers(flops: Flops) -> list[Attention]:
    return [layer for layer, times in flops.attention.items() for _ in range(times)]


@pytest.mark.parametrize("tied", [False, True])
def test_dense_model_is_six_a_matrix_weight(tied: bool) -> None:
    """A tied head is a matrix product all the same; the embedding is looked up; norms are no matrices."""
    flops = training_flops(model("qwen3", tie_word_embeddings=tied))
    assert flops.per_token == 6 * (2 * (QKVO + MLP) + HEAD)
    assert layers(flops) == [Attention(WIDTH, None, None, 3)] * 2


def test_attention_of_causal_samples_by_hand() -> None:
    """Samples of 10 and 4 tokens: 58 pairs, 2 x 16 FLOPs a pair, two layers, forward and twice that backward."""
    flops = training_flops(model("qwen3"))
    assert flops.of([10, 4]) == 14 * flops.per_token + 2 * 3 * 2 * WIDTH * (100 + 16) / 2
    assert flops.of([10]) + flops.of([4]) == flops.of([10, 4])
    assert flops.of([14]) > flops.of([10, 4])


@pytest.mark.parametrize(
    ("layer", "pairs"),
    [
        (Attention(1, None, None, 1), 50 + 8),
        (Attention(1, 5, None, 1), (5 * 5 / 2 + 5 * 5) + 8),  # the first 5 tokens see a triangle, the others 5 each
        (Attention(1, None, 5, 1), 2 * 5 * 5 / 2 + 8),
        (Attention(1, None, 3, 1), (3 * 9 / 2 + 1 / 2) + (9 / 2 + 1 / 2)),
    ],
)
def test_windows_and_chunks(layer: Attention, pairs: float) -> None:
    assert layer.flops([10, 4]) == 2 * pairs


def test_windows_come_from_the_config() -> None:
    kinds = ["sliding_attention", "full_attention"]
    config: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 6, "layer_types": kinds}
    assert [layer.reach for layer in layers(training_flops(model("qwen3", **config)))] == [6, None]
    linear = model("qwen3", layer_types=["full_attention"] * 2)
    linear.config.layer_types = ["linear_attention", "full_attention"]
    assert len(layers(training_flops(linear))) == 1


@pytest.mark.parametrize("kind", ["qwen3_moe", "mixtral"])
def test_a_token_passes_the_chosen_experts_alone(kind: str) -> None:
    """4 experts of 3 x 8 x 16 stacked in 3-D parameters, 2 chosen; the router has a row an expert."""
    name = "num_local_experts" if kind == "mixtral" else "num_experts"
    flops = training_flops(
        model(kind, moe_intermediate_size=16, num_experts_per_tok=2, sliding_window=None, **{name: 4})
    )
    assert flops.per_token == 6 * (2 * (QKVO + 4 * 8 + 2 * MLP) + HEAD)


def test_shared_experts_are_passed_by_every_token() -> None:
    """DeepSeek: one dense layer, then 4 experts of which 1 is chosen, and a shared one; latent attention."""
    moe = model(
        "deepseek_v3", num_key_value_heads=2, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=1,
        n_shared_experts=1, n_group=1, topk_group=1, first_k_dense_replace=1, q_lora_rank=None, kv_lora_rank=6,
        qk_nope_head_dim=4, qk_rope_head_dim=2, v_head_dim=5,
    )  # fmt: skip
    latent = 8 * 2 * 6 + 8 * (6 + 2) + 6 * 2 * (4 + 5) + 2 * 5 * 8
    flops = training_flops(moe)
    assert flops.per_token == 6 * (2 * latent + MLP + (4 * 8 + MLP + MLP) + HEAD)
    assert layers(flops) == [Attention(2 * (6 + 5), None, None, 3)] * 2


def listed(top_k: str) -> Any:
    """A model of another maker: experts in a list of modules."""

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.gate = nn.Linear(8, 4, bias=False)
            self.experts = nn.ModuleList([nn.Linear(8, 8, bias=False) for _ in range(4)])
            setattr(self, top_k, 1)

    built = nn.Sequential(nn.Linear(8, 8), Block())
    built.config = AutoConfig.for_model("mamba", num_hidden_layers=2)
    return built


def test_experts_in_a_list() -> None:
    assert training_flops(listed("top_k")).per_token == 4 * 64 + 6 * (4 * 8 + 64)
    with pytest.raises(UnknownShapeError, match=r"1\.experts: the block has none of top_k"):
        training_flops(listed("number"))


def test_lora_leaves_out_the_frozen_weights_gradient() -> None:
    """Rank 2 on v alone: A is 2 x 8, B is 4 x 2. What lies before the first A needs no input gradient."""
    flops = training_flops(get_peft_model(model("qwen3"), LoraConfig(r=2, target_modules=["v_proj"])))
    before = 2 * (64 + 32 + 32)  # q, k and v of the first layer: forward alone
    first_a = 4 * 16  # its input needs no gradient
    frozen = 4 * (64 + MLP + QKVO + MLP + HEAD)
    lora = 6 * (8 + 16 + 8)
    assert flops.per_token == before + first_a + frozen + lora
    assert layers(flops) == [Attention(WIDTH, None, None, 3)] * 2


def test_lora_on_stacked_experts() -> None:
    """PEFT adapts a stack of experts with factors of all experts in one; a token passes those of its own alone."""
    moe = model("qwen3_moe", moe_intermediate_size=16, num_experts_per_tok=2, num_experts=4, num_hidden_layers=1)
    config = LoraConfig(r=2, target_modules=[], target_parameters=["mlp.experts.down_proj"])
    flops = training_flops(get_peft_model(moe, config))
    before = 2 * (QKVO + 2 * MLP)
    a, b = 2 * 2 * 16, 2 * 2 * 8  # 2 experts, rank 2, in 16 and out 8
    after = 4 * (4 * 8 + HEAD)
    assert flops.per_token == before + 4 * a + 6 * b + after


def test_nothing_flows_below_the_first_trained_layer() -> None:
    """Only the second layer's MLP trains: the first layer, and all before it in the second, run forward alone."""
    frozen = model("qwen3")
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("layers.1.mlp" in name)
    flops = training_flops(frozen)
    mlp = 4 * 128 + 6 * 2 * 128  # gate: no input gradient; up and down: all
    assert flops.per_token == 2 * (2 * QKVO + MLP) + mlp + 4 * HEAD
    assert layers(flops) == [Attention(WIDTH, None, None, 1), Attention(WIDTH, None, None, 3)]
    for name, parameter in frozen.named_parameters():
        parameter.requires_grad_("lm_head" in name)
    assert training_flops(frozen).per_token == 2 * 2 * (QKVO + MLP) + 4 * HEAD
    assert {layer.passes for layer in layers(training_flops(frozen))} == {1}


def item(length: int, first_loss: int) -> dict[str, Any]:
    ids = torch.arange(length).numpy()
    labels = ids.copy()
    labels[:first_loss] = -100
    return {"input_ids": ids, "labels": labels, "lengths": torch.tensor([length]).numpy()}


def test_padded_and_packed_batches_count_alike() -> None:
    """8 tokens with 3 with loss and 4 with 2; the third row fills the step and is padding."""
    items = [item(8, 5), item(4, 2), item(3, 3)]
    padded = count(PaddingCollator(0)(items))
    assert padded == Counts(real=12, trained=5, padded=12, lengths=(8, 4))
    packed = count(FlatteningCollator(borders=False)(items))
    assert packed == Counts(real=12, trained=5, padded=3, lengths=(8, 4))


def test_the_first_token_is_never_trained() -> None:
    assert count(PaddingCollator(0)([item(4, 0)])).trained == 3
    assert count(FlatteningCollator(borders=False)([item(4, 0)])).trained == 3


def meter(clock: Sequence[float], ranks: int = 1, peak: float | None = 1e-9) -> Meter:
    times = iter(clock)
    made = Meter(
        Flops(10.0, {}), peak, torch.device("cpu"), lambda row: row.repeat(ranks, 1), clock=lambda: next(times)
    )
    made.start()
    return made


def test_figures_of_two_ranks_without_pauses() -> None:
    """2 ranks with 60 real tokens each in 8 s of which 5 were an evaluation; 600 FLOPs a rank in 3 s, of 1000 a second."""
    watch = meter([100.0, 101.0, 106.0, 108.0], ranks=2)
    assert watch.add(Counts(60, 12, 20, (30, 30))) == 600
    with watch.paused():
        pass
    figures = watch.read()
    assert figures.pop("memory_gib") > 0
    assert figures == {
        "tokens_per_second": 40.0, "trained_tokens_per_second": 8.0, "padding_share": 0.25, "mfu": 0.2,
    }  # fmt: skip
    assert watch.total(2)["tokens_per_second"] == 40.0


def test_each_line_tells_of_its_own_steps() -> None:
    watch = meter([0.0, 1.0, 3.0])
    watch.add(Counts(10, 5, 0, (10,)))
    assert watch.read()["tokens_per_second"] == 10.0
    watch.add(Counts(10, 5, 0, (10,)))
    assert watch.read()["tokens_per_second"] == 5.0
    assert watch.total(1)["tokens_per_second"] == pytest.approx(6.7)


def test_no_mfu_without_a_known_peak() -> None:
    watch = meter([0.0, 1.0], peak=None)
    watch.add(Counts(10, 5, 0, (10,)))
    assert "mfu" not in watch.read()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989.4), ("NVIDIA H100 PCIe", 756.0), ("NVIDIA H200", 989.4), ("NVIDIA GH200 480GB", 989.4),
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A10", 125.0), ("NVIDIA A10G", None), ("NVIDIA L40S", 362.0),
        ("NVIDIA B200", 2250.0), ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None), ("cpu", None),
    ],
)  # fmt: skip
def test_peaks(name: str, peak: float | None) -> None:
    assert peak_of(name) == peak


def test_a_real_shape_needs_what_was_derived_apart() -> None:
    """Qwen3 0.6B, sum(L^2)/sum(L) = 1624: 4.13 GFLOP a token, as 6 N + 6 x 1624 x heads x head size x layers has it."""
    with torch.device("meta"):
        flops = training_flops(
            model("qwen3", hidden_size=1024, intermediate_size=3072, num_hidden_layers=28, num_attention_heads=16,
                  num_key_value_heads=8, head_dim=128, vocab_size=151936, tie_word_embeddings=True)
        )  # fmt: skip
    assert flops.of([1624]) / 1624 == pytest.approx(4.13e9, rel=2e-3)
