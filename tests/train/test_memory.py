"""What a pass holds, told without data, is what autograd keeps of real tensors; short models tell of long ones."""

from typing import Any

import pytest
import torch
from finebridge.ds_configs.resolve import FOLDER, resolve
from finebridge.train import memory
from finebridge.train.memory import Activations, Batch, LiveBytes, Moment, UnknownMemoryError, one_pass, without_data
from finebridge.train.memory_gauge import SavedGauge
from finebridge.train.memory_runs import activations
from finebridge.train.recompute import checkpointed_layers
from finebridge.train.zero_memory import Held, Weight, Zero, held, micro_batch, optimizer_step, read_zero, save_peak
from packed_trials import SIZES
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM

MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32}
KINDS: dict[str, dict[str, Any]] = {
    "qwen3": {}, "gemma3_text": {}, "qwen3_moe": {**MOE, "mlp_only_layers": [0, 1]}, "hunyuan_v1_moe": {"num_experts": 4},
}  # fmt: skip


def made(kind: str, dtype: torch.dtype, layers: int = 6) -> Any:
    config = AutoConfig.for_model(kind, **{**SIZES, **KINDS[kind], "num_hidden_layers": layers})
    return AutoModelForCausalLM.from_config(config, dtype=dtype)


def fake(kind: str, dtype: torch.dtype = torch.bfloat16, layers: int = 6) -> Any:
    return without_data(lambda: made(kind, dtype, layers), lambda _: dtype)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("qwen3", torch.float32), ("qwen3", torch.bfloat16), ("qwen3_moe", torch.bfloat16)]
)
def test_a_layer_keeps_what_autograd_keeps_of_real_tensors(kind: str, dtype: torch.dtype) -> None:
    real, gauge = made(kind, dtype).train(), SavedGauge()
    kept: list[int] = []
    AttentionInterface.register(memory.NAME, memory._attend)
    real.set_attn_implementation(memory.NAME)
    for layer in checkpointed_layers(real):
        layer.register_forward_pre_hook(lambda *_: kept.append(-gauge.now()))
        layer.register_forward_hook(lambda *_: kept.append(gauge.now()))
    ids = torch.zeros(1, 96, dtype=torch.int64)
    with gauge.counting():
        real(input_ids=ids, position_ids=torch.arange(96)[None], use_cache=False)
    sizes = [before + after for before, after in zip(kept[::2], kept[1::2], strict=True)]
    found = one_pass(fake(kind, dtype), Batch(1, 96, None), recompute=False)
    assert found.kept[1:-1] == sizes[1:-1]
    assert sorted(moment.name for moment in found.moments) == sorted(name for name, _ in real.named_parameters())


@pytest.mark.parametrize("kind", ["qwen3", "qwen3_moe"])
def test_a_short_model_tells_of_a_long_one(kind: str) -> None:
    model, batch = fake(kind, layers=8), Batch(1, 64, 20)
    names = [name for name, _ in model.named_parameters()]
    whole = Activations(one_pass(model, batch, recompute=False), one_pass(model, batch, recompute=True))
    short = activations(model, batch)
    assert short == whole
    assert [name for name, _ in model.named_parameters()] == names
    peaks = [max(moment.peak for moment in short.moments(number)) for number in range(9)]
    assert peaks == sorted(peaks, reverse=True)
    assert peaks[8] < peaks[0] / 2


def test_some_recomputed_layers_are_foretold_from_none_and_all() -> None:
    """The passes of a model that really recomputes its first layers."""
    model, batch = fake("qwen3"), Batch(1, 64, 20)
    told = activations(model, batch).moments(2)
    for layer in checkpointed_layers(model)[2:]:
        layer.forward = type(layer).forward.__wrapped__.__get__(layer)  # its own, which knows nothing of checkpoints
    real = one_pass(model, batch, recompute=True).moments
    assert [moment.name for moment in real] == [moment.name for moment in told]
    assert max(moment.peak for moment in told) == pytest.approx(max(moment.peak for moment in real), rel=0.02)


def test_live_bytes_are_those_of_storages() -> None:
    live = LiveBytes()
    with live:
        first = torch.empty(1000)
        view = first[10:]
        assert live.now == 4000
        second = first + 1
        assert live.now == 8000
        del first
        assert live.now == 8000  # the view holds it
        del view, second
    assert live.now == 0
    assert live.take_peak() == 8000
    assert live.take_peak() == 0


def test_a_model_that_asks_for_values_is_refused_with_its_words() -> None:
    model = fake("qwen3")
    model.model.layers[1].register_forward_hook(lambda *args: print(args[2].sum().item()))
    with pytest.raises(UnknownMemoryError, match="Qwen3ForCausalLM does not run on tensors without data"):
        one_pass(model, Batch(1, 16, None), recompute=False)


WEIGHTS = [
    Weight("embed", 1000, 2, True, True), Weight("norm", 10, 2, True, False), Weight("up", 301, 2, True, True),
    Weight("frozen", 500, 2, False, True),
]  # fmt: skip


def test_settings_are_read_as_deepspeed_and_transformers_read_them() -> None:
    names = sorted(path.stem for path in FOLDER.glob("*.json"))
    read = {name: read_zero(resolve(name), 64) for name in names}
    assert {zero.stage for zero in read.values()} == {2, 3}
    assert read["ds_zero2_no_offload"].buckets == 2  # communication overlaps
    assert read["ds_zero3_no_offload"] == Zero(3, 64**2, 1, 4, 4, 640, 10**9, int(0.9 * 64**2), 10**9)
    assert read["ds_zero3_offload"].optimizer_offloaded
    assert read["ds_zero3_offload"].weights_offloaded
    assert not read["ds_zero3_param_offload"].optimizer_offloaded
    assert read_zero(None, 64) == Zero()


def test_offloading_moves_bytes_to_the_host() -> None:
    kinds = {
        name: read_zero(resolve(name), 4) for name in ("ds_zero2_no_offload", "ds_zero2_offload", "ds_zero3_offload")
    }
    kept = {name: held(WEIGHTS, zero, 2, accumulates=True) for name, zero in kinds.items()}
    plain, two, three = kept.values()
    assert plain.host == 0 < three.host <= two.host
    assert plain.master == 4 * (652 + 6)  # 1301 and 10 elements, padded to multiples of four, shared by two
    assert (two.master, two.moments, two.gradients) == (0, 0, 0) == (three.master, three.moments, three.gradients)
    assert three.weights == 10 * 2  # what is small stays whole
    assert two.weights == plain.weights == 2 * (1304 + 12 + 500)


def test_peaks_of_a_step() -> None:
    moments = [Moment("up", 301, 0, 700), Moment("norm", 10, 0, 600), Moment("embed", 1000, None, 100)]
    kept = Held(weights=100, gradients=50, master=0, moments=0)
    zero = Zero(2, bucket=305)
    assert micro_batch(kept, moments, WEIGHTS, zero, 1) == 150 + 610 + 2622 + 2000
    # the bucket, all gradients once more when it is full, and one that is too large for it
    assert micro_batch(kept, moments, WEIGHTS, Zero(2, bucket=100), 1) == 150 + 200 + 2622 + 2000
    assert micro_batch(kept, moments, WEIGHTS, Zero(), 1) == 150 + 700
    assert optimizer_step(kept, WEIGHTS, Zero(2, master=2, moment=2), 1, fused=True) == 150 + 1302 * 2
    assert optimizer_step(kept, WEIGHTS, Zero(2, master=4), 1, fused=False) == 150 + 1302 * 4 + 1302 * 4
    assert optimizer_step(kept, WEIGHTS, Zero(2, optimizer_offloaded=True), 1, fused=False) == 150
    assert save_peak(kept, {"a": 7, "b": 9}, Zero(3)) == 159
    assert save_peak(kept, {"a": 7, "b": 9}, Zero(2)) == 150
