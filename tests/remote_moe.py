"""A model with its own code beside it, in the old layout: experts in a list, and a router that starves ranks.

Rank 0 sends tokens to the first half of the experts only, rank 1 to the second half: what ZeRO-3 then fetches differs
between ranks unless each block is a leaf module.
"""

import json
from pathlib import Path
from typing import Any

CODE = """
import os

import torch
from torch import nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM


class ListedConfig(Qwen3MoeConfig):
    model_type = "listed_moe"


class Expert(nn.Module):
    def __init__(self, hidden, inner):
        super().__init__()
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x):
        return self.down_proj(nn.functional.silu(self.up_proj(x)))


class ListedBlock(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(
            [Expert(config.hidden_size, config.moe_intermediate_size) for _ in range(config.num_experts)]
        )

    def forward(self, x):
        flat = x.reshape(-1, x.shape[-1])
        weights = self.gate(flat).softmax(-1)
        half = len(self.experts) // 2
        mine = torch.zeros_like(weights)
        start = half * (int(os.environ.get("RANK", "0")) % 2)
        mine[:, start : start + half] = weights[:, start : start + half]
        value, chosen = mine.max(-1)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            rows = (chosen == number).nonzero().flatten()
            if len(rows):
                out = out.index_add(0, rows, expert(flat[rows]) * value[rows, None])
        return out.view_as(x)


class ListedForCausalLM(Qwen3MoeForCausalLM):
    config_class = ListedConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            layer.mlp = ListedBlock(config)
        self.post_init()
"""


def write_listed_moe(folder: Path, tokenizer: Any) -> Path:
    """A saved model of this class with its ``.py`` and ``auto_map``; needs ``trust_remote_code``."""
    import torch
    from transformers import set_seed

    space: dict[str, Any] = {"__name__": "listed_moe"}
    exec(CODE, space)
    config = space["ListedConfig"](
        vocab_size=len(tokenizer), num_hidden_layers=2, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
        head_dim=8, num_experts=4, num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    set_seed(0)
    model = space["ListedForCausalLM"](config).to(torch.float32)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "modeling_listed.py").write_text(CODE)
    settings = json.loads((folder / "config.json").read_text())
    settings["auto_map"] = {
        "AutoConfig": "modeling_listed.ListedConfig",
        "AutoModelForCausalLM": "modeling_listed.ListedForCausalLM",
    }
    (folder / "config.json").write_text(json.dumps(settings))
    return folder
