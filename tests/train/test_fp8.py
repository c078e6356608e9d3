"""fp8: which layers, how near the loss is to bf16's, and that nothing of it is in a checkpoint."""

from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.train import fp8
from finebridge.train.fp8 import check_device, check_fp8, use_fp8
from finebridge.train.hf_flags import ArgumentsError

STEPS = 24


def build(model_type: str = "qwen3", device: str = "cpu", **changes: Any) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM, set_seed

    sizes: dict[str, Any] = {
        "vocab_size": 48, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64, "tie_word_embeddings": False,
    }  # fmt: skip
    set_seed(0)
    config = AutoConfig.for_model(model_type, **sizes | changes)
    return AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).to(device)


def needs_torchao() -> None:
    pytest.importorskip("torchao", reason="the extra fp8")


def curve(model: Any) -> torch.Tensor:
    """Losses of a run with fp32 masters on sentences in which each word decides the next."""
    draw = torch.Generator().manual_seed(1)
    masters = [weight.detach().float().clone() for weight in model.parameters()]
    adamw = torch.optim.AdamW(masters, lr=3e-3)
    losses: list[float] = []
    for _ in range(STEPS):
        words = torch.randint(48, (8, 1), generator=draw)
        while words.shape[1] < 12:
            words = torch.cat([words, (words[:, -1:] * 5 + 7) % 48], dim=1)
        words = words.to(model.device)
        loss = model(input_ids=words, labels=words, use_cache=False).loss
        model.zero_grad()
        loss.backward()
        for weight, master in zip(model.parameters(), masters, strict=True):
            master.grad = weight.grad.float()
        adamw.step()
        for weight, master in zip(model.parameters(), masters, strict=True):
            weight.data.copy_(master)
        losses.append(float(loss.detach()))
    return torch.tensor(losses)


def assert_near(plain: torch.Tensor, ours: torch.Tensor) -> None:
    """Within 0.02 of each step's loss on average, after a run that learns 2."""
    assert plain[:3].mean() - plain[-3:].mean() > 2
    assert (plain - ours).abs().mean() < 0.02
    assert not plain.equal(ours)


def test_loss_stays_near_that_of_bf16() -> None:
    needs_torchao()
    model = build()
    use_fp8(model, lambda _: None, emulate=True)
    assert_near(curve(build()), curve(model))


@pytest.mark.gpu
def test_loss_on_a_gpu_stays_near_that_of_bf16() -> None:
    needs_torchao()
    if not torch.cuda.is_available() or torch.cuda.get_device_capability() < (8, 9):
        pytest.skip("needs a GPU with fp8 units")
    model = build(device="cuda")
    use_fp8(model, lambda _: None)
    assert_near(curve(build(device="cuda")), curve(model))


def test_which_layers_and_what_is_saved(tmp_path: Path) -> None:
    needs_torchao()
    model, said = build(), list[str]()
    kept = {name: weight.clone() for name, weight in model.state_dict().items()}
    names = use_fp8(model, said.append, emulate=True)
    parts = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    assert {name.rpartition(".")[2] for name in names} == set(parts)
    assert said == ["fp8: 14 linear layers of the decoder multiply in fp8"]
    assert type(model.lm_head) is torch.nn.Linear
    assert {name: (weight.dtype, weight.shape) for name, weight in model.state_dict().items()} == {
        name: (weight.dtype, weight.shape) for name, weight in kept.items()
    }
    model.save_pretrained(tmp_path)
    from transformers import AutoModelForCausalLM

    back, told = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16, output_loading_info=True)
    assert not told["missing_keys"]
    assert not told["unexpected_keys"]
    assert all(weight.equal(kept[name]) for name, weight in back.state_dict().items())


def test_odd_sizes_and_moe_blocks_stay() -> None:
    needs_torchao()
    said: list[str] = []
    names = use_fp8(build(intermediate_size=88), said.append, emulate=True)
    assert {name.rpartition(".")[2] for name in names} == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert said == ["fp8: 8 linear layers of the decoder multiply in fp8, 6 stay in bf16 (experts, routers, odd sizes)"]
    sparse = build("mixtral", num_local_experts=16, num_experts_per_tok=2)
    assert not [name for name in use_fp8(sparse, said.append, emulate=True) if "mlp" in name or "moe" in name]
    with pytest.raises(ArgumentsError, match="no linear layer"):
        use_fp8(build(hidden_size=40, head_dim=10, intermediate_size=88), said.append, emulate=True)


def test_what_it_is_refused_with(monkeypatch: pytest.MonkeyPatch) -> None:
    fine = {"bf16_weights": True, "stage": 2, "use_lora": False}
    for wrong, why in (
        ({"use_lora": True}, "full training"), ({"stage": 3}, "ZeRO-3"), ({"bf16_weights": False}, "weights in bf16"),
    ):  # fmt: skip
        with pytest.raises(ArgumentsError, match=why):
            check_fp8(**{**fine, **wrong})
    monkeypatch.setattr(fp8, "find_spec", lambda _: None)
    with pytest.raises(ArgumentsError, match=r"pip install finebridge\[fp8\]"):
        check_fp8(**fine)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ArgumentsError, match="no GPU"):
        check_device()
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A100")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (8, 0))
    with pytest.raises(ArgumentsError, match=r"A100 has compute capability 8\.0"):
        check_device()
