"""--router_aux_loss_coef sets the model's own switches."""

import pytest
import torch
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.router import set_aux_loss
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3MoeConfig, Qwen3MoeForCausalLM


def moe(**config: object) -> Qwen3MoeForCausalLM:
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=16, hidden_size=8, intermediate_size=8, moe_intermediate_size=4, num_experts=4, head_dim=4,
            num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2, num_experts_per_tok=2, **config,
        )
    )  # fmt: skip


def aux(model: Qwen3MoeForCausalLM) -> torch.Tensor | None:
    return model(input_ids=torch.arange(6)[None]).get("aux_loss")


def test_a_coefficient_turns_the_loss_on_and_0_off() -> None:
    model = moe()
    said: list[str] = []
    set_aux_loss(model, None, said.append)
    assert aux(model) is None
    set_aux_loss(model, 0.25, said.append)
    assert aux(model) is not None
    assert (model.config.router_aux_loss_coef, model.router_aux_loss_coef) == (0.25, 0.25)
    set_aux_loss(model, 0.0, said.append)
    assert aux(model) is None
    assert not said


def test_a_config_that_has_it_on_is_told() -> None:
    said: list[str] = []
    set_aux_loss(moe(output_router_logits=True, router_aux_loss_coef=0.5), None, said.append)
    assert said == [
        "router loss: added, times 0.5, as the model's config.json says; --router_aux_loss_coef 0 leaves it out"
    ]


def test_a_model_without_router_loss_is_refused() -> None:
    model = LlamaForCausalLM(
        LlamaConfig(vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2)
    )
    set_aux_loss(model, None, print)
    with pytest.raises(ArgumentsError, match="a llama model computes no router loss"):
        set_aux_loss(model, 0.1, print)
