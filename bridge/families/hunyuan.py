"""Hunyuan v1, dense and with experts (A13B, Large): heads of query and key are normed after they are rotated.

In Hunyuan-Large only every second layer has keys and values of its own, the next one takes them over (``use_cla``).
Sources: transformers ``models/hunyuan_v1_dense``, ``models/hunyuan_v1_moe``; Tencent-Hunyuan/Hunyuan-A13B
``models/modeling_hunyuan.py``; MindSpeed-LLM ``tasks/models/transformer/hunyuan_large_attention.py``.
"""

from dataclasses import replace

from ..family import ATTENTION, EXPERT, MLP, MOE, QK_NORM, TOP, Config, Family, Line, Support, at, copy, gated, renamed

_REASON = (
    "query and key are normed after they are rotated, there before, and with use_cla layers share keys and values; "
    "MindSpeed-LLM's Hunyuan attention does as the model, with the names of --dialect mcore-local or mindspeed"
)


def _is_normed(config: Config) -> bool:
    return bool(config.get("use_qk_norm", True))


def _is_mixed(config: Config) -> bool:
    return bool(config.get("use_mixed_mlp_moe", True))


def _support(config: Config) -> Support:
    factor = config.get("cla_share_factor") if config.get("use_cla") else None
    if factor not in (None, 2):
        return Support("none", f"cla_share_factor {factor}: MindSpeed-LLM lets other layers share unless it is 2")
    return Support("needs_patch", _REASON) if factor or _is_normed(config) else Support("stock")


def _kind(config: Config, layer: int) -> str:
    return "cross" if config.get("use_cla") and layer % config["cla_share_factor"] else "self"


_NAMES = {f"self_attn.{head[0]}_norm.weight": f"self_attn.{head}_layernorm.weight" for head in ("query", "key")}
_NORMS = tuple(replace(line, when=_is_normed) for line in renamed(QK_NORM, _NAMES))
_QUERY = Line("self_attention.linear_qkv.weight", copy, ("self_attn.q_proj.weight",))
_CROSS = tuple(_QUERY if line.mcore == _QUERY.mcore else line for line in ATTENTION)
_SHARED = "mlp.shared_mlp"
_SHARED_MLP = (
    Line(
        "mlp.shared_experts.linear_fc1.weight",
        gated,
        (f"{_SHARED}.gate_proj.weight", f"{_SHARED}.up_proj.weight"),
        _is_mixed,
    ),
    Line("mlp.shared_experts.linear_fc2.weight", copy, (f"{_SHARED}.down_proj.weight",), _is_mixed),
)

FAMILY = Family(
    "hunyuan", ("hunyuan", "hunyuan_v1_dense", "hunyuan_v1_moe"), top=TOP, layer=_NORMS, dense=MLP,
    attention={"self": ATTENTION, "cross": _CROSS}, kind=_kind,
    moe=(*renamed(MOE, {"mlp.gate.weight": "mlp.gate.wg.weight"}), *_SHARED_MLP), expert=EXPERT,
    sparse=lambda config, layer: at(config.get("num_experts", 1), layer) > 1, experts=("num_experts",),
    keys={
        "num_experts_per_tok": "moe_topk", "moe_intermediate_size": "intermediate_size",
        "n_shared_experts": "num_shared_expert",
    },
    implied={"norm_topk_prob": True}, support=_support,
)  # fmt: skip
