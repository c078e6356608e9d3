"""Ling 1 and 2 once more, in plain torch, from their rules: transformers has no class for them.

Names of tensors are those on disk. It is slow and says each rule as a sentence: what Megatron-Core computes is compared
with it. Source of the rules: https://github.com/inclusionAI/Ling-V2 ``models/modeling_bailing_moe_v2.py``.
"""

import json
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import linear, scaled_dot_product_attention, silu

DEFAULTS: dict[str, Any] = {
    "architectures": ["BailingMoeV2ForCausalLM"], "hidden_act": "silu", "rms_norm_eps": 1e-6, "rope_theta": 600000.0,
    "tie_word_embeddings": False, "use_bias": False, "use_qkv_bias": False, "use_qk_norm": True, "rope_scaling": None,
    "partial_rotary_factor": 0.5, "moe_router_enable_expert_bias": True, "score_function": "sigmoid", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "num_nextn_predict_layers": 1, "num_shared_experts": 1, "first_k_dense_replace": 1,
}  # fmt: skip


class LingConfig(SimpleNamespace):
    """The content of a config.json."""

    def to_dict(self) -> dict[str, Any]:
        return dict(vars(self))


class Ling:
    """A model with random weights, or those given; used as those of transformers are. It has its further-token layers."""

    def __init__(self, settings: dict[str, Any], state: dict[str, Tensor] | None = None) -> None:
        self.config = LingConfig(**{**DEFAULTS, **settings})
        self._state = {name: torch.randn(shape) * 0.02 for name, shape in self._shapes()} if state is None else state
        if state is None:
            for name, value in self._state.items():
                if "norm" in name:
                    value.add_(1)

    @classmethod
    def from_pretrained(cls, folder: Path) -> "Ling":
        return cls(json.loads((folder / "config.json").read_text()), load_file(folder / "model.safetensors"))

    def save_pretrained(self, folder: Path) -> None:
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(self.config.to_dict()))
        save_file(self._state, folder / "model.safetensors", metadata={"format": "pt"})

    def state_dict(self) -> dict[str, Tensor]:
        return self._state

    def named_parameters(self) -> Iterator[tuple[str, Tensor]]:
        return iter((name, value) for name, value in self._state.items() if not name.endswith("expert_bias"))

    def eval(self) -> "Ling":
        return self

    def _shapes(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        config = self.config
        hidden, size = config.hidden_size, config.head_dim
        queries, keys = config.num_attention_heads * size, config.num_key_value_heads * size
        yield "model.word_embeddings.weight", (config.vocab_size, hidden)
        yield "model.norm.weight", (hidden,)
        yield "lm_head.weight", (config.vocab_size, hidden)
        for layer in range(config.num_hidden_layers + config.num_nextn_predict_layers):
            start = f"model.layers.{layer}."
            yield f"{start}input_layernorm.weight", (hidden,)
            yield f"{start}post_attention_layernorm.weight", (hidden,)
            yield f"{start}attention.query_key_value.weight", (queries + 2 * keys, hidden)
            yield f"{start}attention.dense.weight", (hidden, queries)
            if config.use_qkv_bias:
                yield f"{start}attention.query_key_value.bias", (queries + 2 * keys,)
            for kind in ("query", "key") if config.use_qk_norm else ():
                yield f"{start}attention.{kind}_layernorm.weight", (size,)
            if layer < config.first_k_dense_replace:
                yield from self._mlp(f"{start}mlp.", config.intermediate_size)
                continue
            yield f"{start}mlp.gate.weight", (config.num_experts, hidden)
            if config.moe_router_enable_expert_bias:
                yield f"{start}mlp.gate.expert_bias", (config.num_experts,)
            for expert in range(config.num_experts):
                yield from self._mlp(f"{start}mlp.experts.{expert}.", config.moe_intermediate_size)
            yield from self._mlp(
                f"{start}mlp.shared_experts.", config.moe_intermediate_size * config.num_shared_experts
            )
            if layer >= config.num_hidden_layers:
                yield from ((f"{start}{norm}.weight", (hidden,)) for norm in ("enorm", "hnorm", "final_layernorm"))
                yield f"{start}eh_proj.weight", (hidden, 2 * hidden)

    def _mlp(self, place: str, inner: int) -> Iterator[tuple[str, tuple[int, ...]]]:
        hidden = self.config.hidden_size
        yield f"{place}gate_proj.weight", (inner, hidden)
        yield f"{place}up_proj.weight", (inner, hidden)
        yield f"{place}down_proj.weight", (hidden, inner)

    def __call__(self, ids: Tensor) -> SimpleNamespace:
        """Logits [batch, sequence, vocabulary]."""
        states = self._state["model.word_embeddings.weight"][ids]
        for layer in range(self.config.num_hidden_layers):
            start = f"model.layers.{layer}."
            states = states + self._attention(self._norm(states, f"{start}input_layernorm"), f"{start}attention.")
            seen, place = self._norm(states, f"{start}post_attention_layernorm"), f"{start}mlp."
            dense = layer < self.config.first_k_dense_replace
            states = states + (self._gated(seen, place) if dense else self._sparse(seen, place))
        return SimpleNamespace(logits=self._linear(self._norm(states, "model.norm"), "lm_head"))

    def _linear(self, states: Tensor, name: str) -> Tensor:
        return linear(states, self._state[f"{name}.weight"], self._state.get(f"{name}.bias"))

    def _norm(self, states: Tensor, name: str) -> Tensor:
        mean_square = states.pow(2).mean(-1, keepdim=True)
        return states * torch.rsqrt(mean_square + self.config.rms_norm_eps) * self._state[f"{name}.weight"]

    def _gated(self, states: Tensor, place: str) -> Tensor:
        gate, up = self._linear(states, f"{place}gate_proj"), self._linear(states, f"{place}up_proj")
        return self._linear(silu(gate) * up, f"{place}down_proj")

    def _attention(self, states: Tensor, place: str) -> Tensor:
        """Heads lie in rows: all queries, all keys, all values. Each is normed, then rotated, as query and key."""
        config = self.config
        heads, groups = config.num_attention_heads, config.num_key_value_heads
        all_heads = self._linear(states, f"{place}query_key_value").unflatten(-1, (-1, config.head_dim)).transpose(1, 2)
        query, key, value = all_heads[:, :heads], all_heads[:, heads : heads + groups], all_heads[:, heads + groups :]
        if config.use_qk_norm:
            query, key = self._norm(query, f"{place}query_layernorm"), self._norm(key, f"{place}key_layernorm")
        query, key = self._rotated(query), self._rotated(key)
        repeated = [part.repeat_interleave(heads // groups, dim=1) for part in (key, value)]
        seen = scaled_dot_product_attention(query, *repeated, is_causal=True)
        return self._linear(seen.transpose(1, 2).flatten(2), f"{place}dense")

    def _rotated(self, heads: Tensor) -> Tensor:
        """Of the first part of a head number i of its first half turns with number i of its second half."""
        size = int(self.config.head_dim * self.config.partial_rotary_factor)
        pairs = torch.arange(size // 2)
        angles = torch.outer(torch.arange(heads.shape[2]), self.config.rope_theta ** (-2.0 * pairs / size))
        one, other, rest = heads.split([size // 2, size // 2, heads.shape[-1] - size], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        return torch.cat([one * cos - other * sin, other * cos + one * sin, rest], dim=-1)

    def _sparse(self, states: Tensor, place: str) -> Tensor:
        """Token by token: the experts that ``_chosen`` names, by their weights, and the shared ones."""
        scores = self._linear(states, f"{place}gate").flatten(0, 1)
        results: list[Tensor] = []
        for token, score in zip(states.flatten(0, 1), scores, strict=True):
            weights = self._chosen(score, self._state.get(f"{place}gate.expert_bias"))
            results.append(sum(w * self._gated(token, f"{place}experts.{expert}.") for expert, w in weights.items()))  # type: ignore[arg-type]
        return torch.stack(results).view_as(states) + self._gated(states, f"{place}shared_experts.")

    def _chosen(self, logits: Tensor, bias: Tensor | None) -> dict[int, Tensor]:
        """The weight of each expert of one token.

        Ling 2: experts are ranked by score and bias, within the groups whose best two add up to most; the bias is no
        part of the weight. Ling 1: the best of a softmax over all.
        """
        config = self.config
        scores = logits.sigmoid() if config.score_function == "sigmoid" else logits.softmax(-1)
        rank = scores if bias is None else scores + bias
        each = len(rank) // config.n_group
        groups = [list(range(first, first + each)) for first in range(0, len(rank), each)]
        if config.n_group > 1:
            groups.sort(key=lambda group: -float(rank[group].sort(descending=True).values[:2].sum()))
        allowed = [expert for group in groups[: config.topk_group] for expert in group]
        best = sorted(allowed, key=lambda expert: -float(rank[expert]))[: config.num_experts_per_tok]
        whole = scores[best].sum() if config.norm_topk_prob else 1.0
        return {expert: scores[expert] / whole * config.routed_scaling_factor for expert in best}
