"""--freeze, --train_only and --train_attention_params_only by name patterns."""

from pathlib import Path
from typing import Any

import pytest
from finebridge.train.freeze import choose_trained
from finebridge.train.hf_flags import ArgumentsError
from finebridge.train.model_arguments import ModelArguments
from torch import nn


class Model(nn.Module):
    """Names as in a language model, the head tied to the embedding."""

    def __init__(self) -> None:
        super().__init__()
        self.embed_tokens = nn.Embedding(4, 2)
        self.self_attn = nn.Linear(2, 2, bias=False)
        self.mlp = nn.Linear(2, 2, bias=False)
        self.lm_head = nn.Linear(2, 4, bias=False)
        self.lm_head.weight = self.embed_tokens.weight


def trained(**flags: Any) -> set[str]:
    model = Model()
    choose_trained(
        model, ModelArguments(config_name="llama", tokenizer_name_or_path=str(Path(__file__).parent), **flags)
    )
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({}, {"embed_tokens.weight", "self_attn.weight", "mlp.weight"}),
        ({"train_attention_params_only": True}, {"self_attn.weight"}),
        ({"train_only": "*self_attn*, *mlp*"}, {"self_attn.weight", "mlp.weight"}),
        ({"train_only": "lm_head*"}, {"embed_tokens.weight"}),
        ({"freeze": "*embed*"}, {"self_attn.weight", "mlp.weight"}),
        ({"freeze": "lm_head.*,mlp.weight"}, {"self_attn.weight"}),
        ({"train_only": "*.weight", "freeze": "mlp*"}, {"embed_tokens.weight", "self_attn.weight"}),
        ({"train_attention_params_only": True, "freeze": "*embed*"}, {"self_attn.weight"}),
    ],
)
def test_what_trains(flags: dict[str, Any], expected: set[str]) -> None:
    assert trained(**flags) == expected


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            {"freeze": "*gate*"},
            r"--freeze \*gate\*: no parameter of this model has such a name; names are like lm_head",
        ),
        ({"train_only": "self_attn"}, "--train_only self_attn: no parameter"),
        ({"train_only": "*mlp*,*nothing*"}, r"--train_only \*nothing\*"),
        ({"freeze": "*"}, r"--freeze \*: no parameter is left to train"),
        ({"train_only": "mlp*", "freeze": "mlp*"}, r"--train_only mlp\*, --freeze mlp\*: no parameter is left"),
        ({"freeze": "*", "use_lora": True}, "--freeze and --use_lora exclude each other"),
        ({"train_only": "*", "train_attention_params_only": True}, "give one of them"),
    ],
)
def test_what_is_refused(flags: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentsError, match=message):
        trained(**flags)
