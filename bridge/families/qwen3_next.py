"""Qwen3-Next: layers of gated attention and of gated delta nets, experts with a gated shared one, norms around zero.

Sources: transformers ``models/qwen3_next``; Megatron-Core ``ssm/gated_delta_net.py``, ``transformer/attention.py``;
Megatron-Bridge ``models/qwen/qwen3_next_bridge.py`` (the layer that predicts a further token, which transformers skips).
"""

from dataclasses import replace

from ..family import (
    ATTENTION,
    EXPERT,
    MLP,
    MOE,
    QK_NORM,
    TOP,
    Config,
    Family,
    Line,
    copy,
    delta_net,
    every,
    gated,
    gated_qkv,
    minus_one,
)  # fmt: skip

_FULL, _LINEAR = "full_attention", "linear_attention"
_QKV, _A, _D = "self_attention.linear_qkv.weight", "self_attention", "linear_attn"
_ATTENTION = tuple(replace(line, rule=gated_qkv) if line.mcore == _QKV else line for line in ATTENTION)
_DELTA_NET = (
    Line(f"{_A}.in_proj.layer_norm_weight", copy, ("input_layernorm.weight",)),
    Line(f"{_A}.in_proj.weight", delta_net, (f"{_D}.in_proj_qkvz.weight", f"{_D}.in_proj_ba.weight")),
    Line(f"{_A}.conv1d.weight", copy, (f"{_D}.conv1d.weight",)),
    Line(f"{_A}.A_log", copy, (f"{_D}.A_log",)),
    Line(f"{_A}.dt_bias", copy, (f"{_D}.dt_bias",)),
    Line(f"{_A}.out_norm.weight", minus_one, (f"{_D}.norm.weight",)),
    Line(f"{_A}.out_proj.weight", copy, (f"{_D}.out_proj.weight",)),
)
_S = "mlp.shared_expert"
_SHARED = (
    Line("mlp.shared_experts.linear_fc1.weight", gated, (f"{_S}.gate_proj.weight", f"{_S}.up_proj.weight")),
    Line("mlp.shared_experts.linear_fc2.weight", copy, (f"{_S}.down_proj.weight",)),
    Line("mlp.shared_experts.gate_weight", copy, (f"{_S}_gate.weight",)),
)
_MTP = tuple(
    Line(f"{ours}.weight", copy, (f"/mtp.{theirs}.weight",))
    for ours, theirs in [
        ("enorm", "pre_fc_norm_embedding"), ("hnorm", "pre_fc_norm_hidden"), ("eh_proj", "fc"), ("final_layernorm", "norm"),
    ]
)  # fmt: skip


def _kind(config: Config, layer: int) -> str:
    if layer >= int(config["num_hidden_layers"]):  # predicts a further token
        return _FULL
    every_nth = int(config.get("full_attention_interval") or 4)
    kinds = config.get("layer_types")
    return kinds[layer] if kinds else _LINEAR if (layer + 1) % every_nth else _FULL


FAMILY = Family(
    "qwen3-next", ("qwen3_next",), top=TOP, layer=(), attention={_FULL: (*_ATTENTION, *QK_NORM), _LINEAR: _DELTA_NET},
    kind=_kind, dense=MLP, moe=(*MOE, *_SHARED), expert=EXPERT, sparse=every(), mtp=_MTP, mtp_prefix="mtp.layers.{l}.",
    implied={
        "apply_layernorm_1p": True, "attention_output_gate": True, "norm_topk_prob": True, "partial_rotary_factor": 0.25,
    },
)  # fmt: skip
