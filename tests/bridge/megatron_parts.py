"""Parts of Megatron-Core 0.16.1 for the CPU that its local layer specs do not have: delta nets, the indexer, norms around one.

The computation is Megatron-Core's own wherever it is plain torch; what is left out or put in its place is said below.
"""

import copy
from typing import Any


def patch() -> None:
    """What these parts take for granted: flash-linear-attention, a norm around zero, the indexer as of core 0.19."""
    import torch
    from megatron.core.ssm import gated_delta_net
    from megatron.core.transformer import torch_norm
    from megatron.core.transformer.experimental_attention_variant import dsa

    gated_delta_net.HAVE_FLA = True
    gated_delta_net.l2norm = lambda x: x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6)
    gated_delta_net.chunk_gated_delta_rule = gated_delta_net.torch_chunk_gated_delta_rule
    dsa.rotate_activation = lambda x: x  # a Hadamard rotation of query and key alike: their products stay
    dsa.DSAIndexer._apply_rope = _rotate_first
    plain = torch_norm.WrappedTorchNorm.__new__

    def norm(cls: Any, config: Any, hidden_size: int, eps: float = 1e-5, **more: Any) -> Any:
        if config.layernorm_zero_centered_gamma:
            return zero_centred(hidden_size, eps)
        return plain(cls, config, hidden_size, eps, **more)

    torch_norm.WrappedTorchNorm.__new__ = norm


def zero_centred(size: int, epsilon: float) -> Any:
    """Transformer Engine's RMSNorm with ``zero_centered_gamma``."""
    import torch

    class Norm(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(size))

        def forward(self, x: Any) -> Any:
            return torch.nn.functional.rms_norm(x, (size,), 1 + self.weight, epsilon)

    return Norm()


def _rotate_first(self: Any, x: Any, rotary_pos_emb: Any, mscale: float) -> Any:
    """Core 0.19: the rotated dimensions are the first ones, interleaved or not; up to 0.18 they are the last, interleaved."""
    import torch
    from megatron.core.models.common.embeddings import apply_rotary_pos_emb

    config = copy.copy(self.config)
    config.multi_latent_attention = self.config.dsa_indexer_rope_interleaved
    rotated, rest = x.split([self.qk_pos_emb_head_dim, self.index_head_dim - self.qk_pos_emb_head_dim], -1)
    rotated = apply_rotary_pos_emb(
        rotated, rotary_pos_emb, config=config, mscale=mscale, cp_group=self.pg_collection.cp
    )
    return torch.cat([rotated, rest], -1)


def delta_net() -> Any:
    """The spec of Megatron-Core's gated delta net, with linear layers and a norm of the local spec."""
    from megatron.core.ssm.gated_delta_net import GatedDeltaNet, GatedDeltaNetSubmodules
    from megatron.core.tensor_parallel import ColumnParallelLinear, RowParallelLinear
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    return ModuleSpec(
        GatedDeltaNet, submodules=GatedDeltaNetSubmodules(ColumnParallelLinear, WrappedTorchNorm, RowParallelLinear)
    )


def sparse_attention() -> Any:
    """The spec of core attention that sees what Megatron-Core's indexer picks; linear layers that no rank shares."""
    import torch
    from megatron.core.transformer.experimental_attention_variant import dsa
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    class Linear(torch.nn.Linear):
        def __init__(self, inputs: int, outputs: int, **_: Any) -> None:
            super().__init__(inputs, outputs, bias=False)

        def forward(self, x: Any) -> Any:
            return super().forward(x), None

    indexer = ModuleSpec(dsa.DSAIndexer, submodules=dsa.DSAIndexerSubmodules(Linear, Linear, WrappedTorchNorm, Linear))
    return ModuleSpec(dsa.DSAttention, submodules=dsa.DSAttentionSubmodules(indexer))


def hunyuan_attention(*, shares: bool) -> Any:
    """Megatron-Core's attention, changed as Hunyuan needs it: query and key are normed after they are rotated.

    With ``shares`` every second layer, counted from 1 as in MindSpeed-LLM, has no keys and values: those of the one before.
    """
    from megatron.core.transformer.attention import SelfAttention

    last: list[Any] = []

    class Attention(SelfAttention):
        def __init__(self, *args: Any, **more: Any) -> None:
            super().__init__(*args, **more)
            norms, plain = (self.q_layernorm, self.k_layernorm), self.core_attention.forward
            self.core_attention.forward = lambda query, key, *rest, **named: plain(
                norms[0](query), norms[1](key), *rest, **named
            )
            self.takes_over = shares and self.layer_number % 2 == 0
            if self.takes_over:
                self.linear_qkv.weight.data = self.linear_qkv.weight.data[: self.query_projection_size]

        def get_query_key_value_tensors(self, hidden: Any, *args: Any, **more: Any) -> Any:
            if self.takes_over:
                query, _ = self.linear_qkv(hidden)
                return query.unflatten(-1, (-1, self.hidden_size_per_attention_head)), *last
            norms = self.q_layernorm, self.k_layernorm
            self.q_layernorm = self.k_layernorm = None
            try:
                query, key, value = super().get_query_key_value_tensors(hidden, *args, **more)
            finally:
                self.q_layernorm, self.k_layernorm = norms
            last[:] = key, value
            return query, key, value

    return Attention


def change(layers: list[Any], args: dict[str, Any]) -> None:
    """Give the specs of layers the parts that their arguments ask for."""
    attention = hunyuan_attention(shares=bool(args.get("cla_share_factor")))
    for number, layer in enumerate(layers):
        _change(layer, args, number, attention)


def _change(layer: Any, args: dict[str, Any], number: int, attention: Any) -> None:
    parts = layer.submodules
    if args.get("experimental_attention_variant") == "gated_delta_net" and args["linear_attention_freq"][number]:
        parts.self_attention = delta_net()
    elif args.get("experimental_attention_variant") == "dsa":
        parts.self_attention.submodules.core_attention = sparse_attention()
    elif args.get("norms_after_rotation"):
        parts.self_attention.module = attention


def sections(args: dict[str, Any], name: str) -> list[int] | None:
    """Rows of each tensor that a delta net's tensor joins, whose ranks cut each by itself; None for other tensors."""
    if not name.endswith((".in_proj.weight", ".conv1d.weight")):
        return None
    keys = args["linear_num_key_heads"] * args["linear_key_head_dim"]
    heads = args["linear_num_value_heads"]
    values = heads * args["linear_value_head_dim"]
    return [keys, keys, values] + ([values, heads, heads] if name.endswith(".in_proj.weight") else [])
