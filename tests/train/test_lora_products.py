"""LoRA's products made at once are PEFT's: loss, gradients, what is saved for backward, and where PEFT's own forward stays."""

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from families import tiny
from finebridge.train import chunked_loss
from finebridge.train.lora_products import LoraProducts, take_products
from finebridge.train.losses import summed_loss
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from torch import nn
from transformers import TrainerControl, TrainerState, set_seed

CPU = torch.device("cpu")
ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
ALL = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]
TOGETHER = "those of q_proj+k_proj+v_proj, gate_proj+up_proj at once"


def adapted(model_type: str = "qwen3", dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A tiny model whose adapters are not zero, in one dtype."""
    changes = more.pop("model", {})
    config = LoraConfig(**{"r": 4, "lora_alpha": 6, "init_lora_weights": False, "target_modules": ALL, **more})
    set_seed(0)
    return get_peft_model(tiny(model_type, **changes).to(dtype), config, autocast_adapter_dtype=False).to(dtype)


def ours(model: Any, wanted: str = "") -> Any:
    said: list[str] = []
    before = torch.get_rng_state()
    take_products(model, CPU, said.append)
    assert torch.equal(before, torch.get_rng_state())
    assert model.training
    assert wanted in said[-1], said
    return model


def trained(model: Any) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss of a batch with masked tokens, and the gradient of everything that trains and was used."""
    ids = torch.arange(40).view(2, 20) * 7 % 60
    labels = ids.masked_fill(ids % 3 == 0, -100)
    loss = model(input_ids=ids, labels=labels, use_cache=False).loss
    loss.backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def off(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    """The largest difference of a gradient, as a share of its norm."""
    assert one.keys() == other.keys()
    return max(float((one[n].double() - other[n]).norm() / other[n].double().norm()) for n in one)


KINDS: dict[str, tuple[str, dict[str, Any], str]] = {
    "dense": ("qwen3", {}, f"of 14 linears added in place, {TOGETHER}"),
    "with a bias": ("llama", {"model": {"attention_bias": True, "mlp_bias": True}}, TOGETHER),
    "rsLoRA, ranks of their own": (
        "llama",
        {"use_rslora": True, "rank_pattern": {"k_proj": 2, "up_proj": 7}},
        TOGETHER,
    ),
    "some of q, k, v": ("hunyuan_v1_dense", {"target_modules": ["k_proj", "v_proj"]}, "those of k_proj+v_proj at once"),
    "one that reads alone": ("llama", {"target_modules": ["o_proj"]}, "of 2 linears added in place"),
    "the head": ("llama", {"target_modules": ["q_proj", "lm_head"]}, "of 3 linears added in place"),
    "experts with adapters of their own": (
        "qwen3_moe",
        {
            "model": {"experts_implementation": "eager"},
            "target_modules": ATTENTION,
            "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
        },
        "of 8 linears added in place, those of q_proj+k_proj+v_proj at once",
    ),
}


@pytest.mark.parametrize("name", KINDS)
def test_loss_and_gradients_are_those_of_peft(name: str) -> None:
    """In float64, so that nothing hides behind rounding; a gradient that PEFT has not, we have not either."""
    model_type, more, wanted = KINDS[name]
    loss, gradients = trained(adapted(model_type, **more))
    own_loss, own_gradients = trained(ours(adapted(model_type, **more), wanted))
    assert own_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert off(own_gradients, gradients) < 1e-10
    assert all("lora_" in name for name in own_gradients)


@pytest.mark.parametrize("reentrant", [False, True])
def test_with_gradient_checkpointing(reentrant: bool) -> None:
    loss, gradients = trained(adapted())
    model = ours(adapted(), TOGETHER)
    model.enable_input_require_grads()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    own_loss, own_gradients = trained(model)
    assert own_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert off(own_gradients, gradients) < 1e-10


def test_in_bf16_it_is_no_worse_than_peft() -> None:
    exact = trained(adapted(dtype=torch.float32))[1]
    theirs, own = trained(adapted(dtype=torch.bfloat16))[1], trained(ours(adapted(dtype=torch.bfloat16)))[1]
    errors = [sum(float((found[n].double() - exact[n]).norm()) for n in exact) for found in (theirs, own)]
    assert all(gradient.dtype == torch.bfloat16 for gradient in own.values())
    assert 0 < errors[1] < 1.1 * errors[0]


class Saved:
    """What autograd keeps besides parameters, each storage once, in bytes."""

    def __init__(self, model: nn.Module) -> None:
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}
        self._own, self._kept = own, list[torch.Tensor]()
        self.sizes: dict[int, int] = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._kept.append(tensor)  # no address is given away twice
            self.sizes[storage.data_ptr()] = storage.nbytes()
        return tensor

    def of(self, run: Callable[[], object]) -> int:
        with torch.autograd.graph.saved_tensors_hooks(self, lambda tensor: tensor):
            run()
        return sum(self.sizes.values())


def test_adapters_in_fp32_under_autocast_cast_no_input_up() -> None:
    """A plain run with --bf16: a frozen base in bf16, adapters in fp32."""

    def build() -> Any:
        model = adapted(dtype=torch.bfloat16)
        for name, parameter in model.named_parameters():
            if "lora_" in name:
                parameter.data = parameter.data.float()
        return model

    exact = trained(adapted(dtype=torch.float32))[1]
    kept: list[int] = []
    errors: list[float] = []
    for model in (build(), ours(build(), TOGETHER)):
        with torch.autocast("cpu", torch.bfloat16):
            kept.append(Saved(model).of(lambda model=model: trained(model)))
        errors.append(sum(float((p.grad - exact[n]).norm()) for n, p in model.named_parameters() if p.grad is not None))
        assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}
    assert kept[1] < 0.9 * kept[0]
    assert 0 < errors[1] < 1.1 * errors[0]


def test_only_the_input_and_thin_products_are_kept() -> None:
    model = ours(adapted())
    attention = model.base_model.model.model.layers[0].self_attn
    x = torch.randn(3, 20, 32, dtype=torch.float64, requires_grad=True)
    made: list[torch.Tensor] = []
    saved = Saved(model)
    size = saved.of(lambda: made.extend(part(x) for part in (attention.q_proj, attention.k_proj, attention.v_proj)))
    factors = 8 * 12 * 32  # the three A as one
    assert x.untyped_storage().data_ptr() in saved.sizes
    assert size == 8 * (60 * 32 + 60 * 12) + factors
    assert all(tensor.grad_fn is not None for tensor in made)


def calls(model: Any) -> tuple[Any, Any, Any, torch.Tensor]:
    attention = model.base_model.model.model.layers[0].self_attn
    torch.manual_seed(1)
    return attention.q_proj, attention.k_proj, attention.v_proj, torch.randn(5, 32, dtype=torch.float64)


CALLS: dict[str, Callable[[Any, Any, Any, torch.Tensor], Iterator[torch.Tensor]]] = {
    "in another order": lambda q, k, v, x: (part(x) for part in (v, q, k)),
    "one of them twice": lambda q, k, v, x: (part(x) for part in (q, q, k, v, k)),
    "not all of them": lambda q, k, v, x: (part(x) for part in (q, k, v) if part is not k),
    "of other tensors": lambda q, k, v, x: (part(y) for part, y in ((q, x), (k, x * 2), (v, x))),
    "and changed behind it": lambda q, k, v, x: (part(x).mul_(2) for part in (q, k, v)),
    "of equal tensors": lambda q, k, v, x: (part(x.clone()) for part in (q, k, v)),
}


@pytest.mark.parametrize("name", CALLS)
def test_linears_are_right_however_they_are_called(name: str) -> None:
    """What the trial has seen is not trusted: the tensor itself is looked at."""
    results: list[list[torch.Tensor]] = []
    for model in (adapted(), ours(adapted(), TOGETHER)):
        *parts, x = calls(model)
        base = torch.ones_like(x, requires_grad=True)
        outputs = list(CALLS[name](*parts, x * base))
        loss = sum((output * (number + 1)).square().sum() for number, output in enumerate(outputs))
        sources = [base, *(p for part in parts for p in part.parameters() if p.requires_grad)]
        results.append([*outputs, *(g for g in torch.autograd.grad(loss, sources, allow_unused=True) if g is not None)])
    theirs, own = results
    assert len(own) >= len(theirs)
    for one, other in zip([t for t in own if t.any()], [t for t in theirs if t.any()], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_a_tensor_that_was_changed_is_read_again() -> None:
    outputs: list[list[torch.Tensor]] = []
    for model in (adapted(), ours(adapted(), TOGETHER)):
        *parts, x = calls(model)
        with torch.no_grad():
            outputs.append([part(x.mul_(3)) for part in parts])
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-10)


def test_without_gradients_and_in_inference_mode() -> None:
    model, own = adapted().eval(), ours(adapted()).eval()
    ids = torch.arange(12)[None]
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            torch.testing.assert_close(own(input_ids=ids).logits, model(input_ids=ids).logits, rtol=1e-10, atol=1e-10)


def test_adapters_are_switched_off_merged_and_saved_as_ever() -> None:
    model, own, ids = adapted().eval(), ours(adapted()).eval(), torch.arange(12)[None]
    with torch.no_grad():
        live = own(input_ids=ids).logits
        with model.disable_adapter(), own.disable_adapter():
            off_logits = own(input_ids=ids).logits
            assert off_logits.equal(model(input_ids=ids).logits)
        assert (off_logits - live).abs().max() > 1e-3
        states = [get_peft_model_state_dict(each) for each in (model, own)]
        assert states[0].keys() == states[1].keys()
        assert all(states[0][name].equal(states[1][name]) for name in states[0])
        own.merge_adapter()
        torch.testing.assert_close(own(input_ids=ids).logits, live)
        own.unmerge_adapter()
        merged = own.merge_and_unload()
        assert type(merged.model.layers[0].self_attn.q_proj) is nn.Linear
        torch.testing.assert_close(merged(input_ids=ids).logits, live)


def train_the_base(model: Any) -> Any:
    model.base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.requires_grad_()
    return model


def partition(model: Any) -> Any:
    for parameter in model.parameters():
        parameter.ds_id = 0
    return model


def two_adapters(model: Any) -> Any:
    model.add_adapter("other", LoraConfig(r=2, target_modules=["q_proj"]))
    return model


LEFT: dict[str, tuple[Callable[[], Any], int, str]] = {
    "dropout": (lambda: adapted(lora_dropout=0.1), 14, "--lora_dropout makes another input for each adapter"),
    "DoRA": (lambda: adapted(use_dora=True), 14, "it is a variant of LoRA"),
    "a bias of B": (lambda: adapted(lora_bias=True), 14, "lora_B has a bias"),
    "a base that trains": (lambda: train_the_base(adapted()), 1, "their weights train too"),
    "ZeRO-3": (lambda: partition(adapted()), 14, "ZeRO-3 gathers their parameters one by one"),
    "two adapters": (lambda: two_adapters(adapted()), 2, "one adapter, active and not merged, is needed"),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", LEFT)
def test_what_is_not_plain_lora_stays_with_peft(name: str) -> None:
    build, count, why = LEFT[name]
    said: list[str] = []
    model = build()
    take_products(model, CPU, said.append)
    assert f"LoRA: {count} linears by PEFT's own forward, as {why}" in said
    assert len(said) == 1 + (count < 14)
    assert sum("forward" in module.__dict__ for module in model.modules()) == 14 - count
    other = build()
    set_seed(0)
    loss, gradients = trained(model)
    set_seed(0)
    expected, theirs = trained(other)
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    assert off(gradients, theirs) < 1e-10


def test_an_adapted_head_gives_the_loss_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chunked_loss, "WORTH", 0)
    monkeypatch.setitem(chunked_loss._PIECE, "cpu", 64 * 5)  # pyright: ignore[reportPrivateUsage]
    model = ours(adapted("llama", torch.float32, target_modules=["q_proj", "lm_head"]))
    own = model.get_output_embeddings().forward
    head = chunked_loss.find_head(model, CPU, 100, 0.0, print)
    assert head is not None
    assert model.get_output_embeddings().forward is own
    inputs = {"labels": torch.arange(40).view(2, 20) * 3 % 60}
    ids = torch.arange(40).view(2, 20) % 60
    sources = [p for p in model.parameters() if p.requires_grad]
    whole = torch.autograd.grad(summed_loss(model(input_ids=ids).logits, inputs, "token"), sources)
    with head.loss_for(chunked_loss.targets(inputs, "token"), 0.0):
        pieces = torch.autograd.grad(model(input_ids=ids).logits, sources)
    for one, other in zip(pieces, whole, strict=True):
        assert float((one - other).norm() / other.norm()) < 1e-5


def test_a_trial_that_fails_leaves_each_a_alone() -> None:
    model = adapted()
    model.base_model.model.model.embed_tokens.register_forward_pre_hook(lambda *_: refuse())
    said: list[str] = []
    take_products(model, CPU, said.append)
    assert said[0] == "LoRA: the A of each linear alone, as a trial failed: ValueError: no such ids"
    assert said[1] == "LoRA: thin products of 14 linears added in place"


def refuse() -> None:
    raise ValueError("no such ids")


def test_a_compiler_traces_it_whole_once_for_all_layers() -> None:
    """Eight products instead of nine in a gated MLP, whose gate and up read the same."""
    graphs: list[int] = []

    def count(module: Any, inputs: Any) -> Any:
        graphs.append(sum("linear" in str(node.target) for node in module.graph.nodes))
        return module.forward

    loss, gradients = trained(adapted())
    model = ours(adapted(), TOGETHER)
    for layer in model.base_model.model.model.layers:
        layer.mlp.compile(backend=count, fullgraph=True)
    own_loss, own_gradients = trained(model)
    torch.compiler.reset()
    assert graphs == [8]
    assert own_loss.item() == pytest.approx(loss.item(), rel=1e-12)
    assert off(own_gradients, gradients) < 1e-10


def test_torch_compile_keeps_pefts_forward(capsys: pytest.CaptureFixture[str]) -> None:
    model: Any = adapted()
    args: Any = SimpleNamespace(torch_compile=True)
    LoraProducts().on_train_begin(args, TrainerState(), TrainerControl(), model=model)
    assert "LoRA: by PEFT's own forward, as --torch_compile" in capsys.readouterr().out
    assert not any("forward" in module.__dict__ for module in model.modules())
