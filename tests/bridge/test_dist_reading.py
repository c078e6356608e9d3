"""What others may write as ``torch_dist``: keys of other layers and releases, and what lies beside the model."""

import sys
import types
from argparse import Namespace
from enum import Enum
from pathlib import Path

import pytest
import torch
from finebridge.bridge.dist_format import DistCheckpoint
from finebridge.bridge.errors import BridgeError
from torch.distributed.checkpoint.metadata import (
    Metadata,
)

from .dist_by_hand import ByHand, bits, refused, same, simple

# The keys


def rules(folder: Path, keys: dict[str, tuple[int, ...]]) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.Tensor]]:
    """Canonical names and shapes of a checkpoint with these keys, and its tensors by key."""
    made = ByHand(folder)
    tensors = {key: bits(shape, torch.float32, seed) for seed, (key, shape) in enumerate(keys.items())}
    for key, tensor in tensors.items():
        made.add(key, tensor)
    with DistCheckpoint(made.close()) as checkpoint:
        return checkpoint.shapes, {name: checkpoint.get(name).clone() for name in checkpoint} | tensors


def test_norms_of_the_local_spec_get_their_name(tmp_path: Path) -> None:
    at = "decoder.layers."
    shapes, _ = rules(
        tmp_path / "x",
        {
            f"{at}0.input_layernorm.weight": (1,), f"{at}0.self_attention.linear_qkv.weight": (2, 1),
            f"{at}0.pre_mlp_layernorm.weight": (3,), f"{at}0.mlp.linear_fc1.weight": (4, 1),
            f"{at}0.mlp.linear_fc2.weight": (1, 2),
            f"{at}1.input_layernorm.weight": (5,), f"{at}1.self_attention.linear_q_up_proj.weight": (6, 1),
            f"{at}1.self_attention.q_layernorm.weight": (7,), f"{at}1.self_attention.kv_layernorm.weight": (8,),
            f"{at}1.self_attention.linear_kv_up_proj.weight": (9, 1), f"{at}1.mlp.linear_fc1.layer_norm_weight": (10,),
            f"{at}1.mlp.router.weight": (11, 1), f"{at}1.self_attention.linear_q_down_proj.weight": (12, 1),
            "mtp.layers.0.mtp_model_layer.pre_mlp_layernorm.weight": (13,), "mtp.layers.0.enorm.weight": (14,),
            "mtp.layers.0.mtp_model_layer.mlp.router.weight": (15, 1),
        },
    )  # fmt: skip
    assert shapes == {
        f"{at}0.self_attention.linear_qkv.layer_norm_weight": (1,), f"{at}0.self_attention.linear_qkv.weight": (2, 1),
        f"{at}0.mlp.linear_fc1.layer_norm_weight": (3,), f"{at}0.mlp.linear_fc1.weight": (4, 1),
        f"{at}0.mlp.linear_fc2.weight": (1, 2), f"{at}1.input_layernorm.weight": (5,),
        f"{at}1.self_attention.linear_q_up_proj.weight": (6, 1),
        f"{at}1.self_attention.linear_q_up_proj.layer_norm_weight": (7,),
        f"{at}1.self_attention.linear_kv_up_proj.layer_norm_weight": (8,),
        f"{at}1.self_attention.linear_kv_up_proj.weight": (9, 1), f"{at}1.pre_mlp_layernorm.weight": (10,),
        f"{at}1.mlp.router.weight": (11, 1), f"{at}1.self_attention.linear_q_down_proj.weight": (12, 1),
        "mtp.layers.0.transformer_layer.pre_mlp_layernorm.weight": (13,), "mtp.layers.0.enorm.weight": (14,),
        "mtp.layers.0.transformer_layer.mlp.router.weight": (15, 1),
    }  # fmt: skip


def test_halves_of_a_gated_layer_are_joined(tmp_path: Path) -> None:
    at = "decoder.layers.mlp.experts.experts."
    shapes, found = rules(
        tmp_path / "x", {f"{at}1.linear_fc1.weight_w": (2, 3, 4), f"{at}1.linear_fc1.weight_v": (2, 3, 4), "a": (1,)}
    )
    name = "decoder.layers.{}.mlp.experts.local_experts.1.linear_fc1.weight"
    assert shapes == {name.format(0): (6, 4), name.format(1): (6, 4), "a": (1,)}
    halves = [found[f"{at}1.linear_fc1.weight_{half}"] for half in "wv"]
    for number in range(2):
        assert same(found[name.format(number)], torch.cat([half[number] for half in halves]))


@pytest.mark.parametrize(
    ("keys", "match"),
    [
        ({"decoder.layers.0.mlp.linear_fc1.weight_w": (2, 2)}, "of its parts only"),
        ({"mlp.layers.0.mlp.linear_fc1.weight_w": (2, 2), "mlp.layers.0.mlp.linear_fc1.weight_v": (2, 3)}, "its halves"),
        ({"decoder.layers.a.weight": (2, 2), "decoder.layers.1.a.weight": (2,)}, "stored twice"),
        ({"decoder.layers.mlp.experts.experts.linear_fc1.weight": (2,)}, "no dimension for its layers or experts"),
        ({"optimizer.state.exp_avg.decoder.weight": (2,)}, "holds no tensor of a model"),
    ],
)  # fmt: skip
def test_keys_that_make_no_model_are_refused(tmp_path: Path, keys: dict[str, tuple[int, ...]], match: str) -> None:
    with pytest.raises(BridgeError, match=match):
        rules(tmp_path / "x", keys)


# What lies beside the model


class Backend(Enum):
    FLASH = 1


def test_what_is_skipped_is_said_and_foreign_classes_are_left_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    foreign = types.ModuleType("megatron.core.transformer.enums")
    monkeypatch.setitem(sys.modules, "megatron.core.transformer.enums", foreign)
    monkeypatch.setattr(Backend, "__module__", foreign.__name__)
    monkeypatch.setattr(foreign, "Backend", Backend, raising=False)
    kind = type("MCoreMetadata", (Metadata,), {"__module__": foreign.__name__, "__qualname__": "MCoreMetadata"})
    monkeypatch.setattr(foreign, "MCoreMetadata", kind, raising=False)

    made, tensors = simple(tmp_path / "x")
    made.add("optimizer.state.exp_avg.output_layer.weight", torch.zeros(3))
    made.add("chained_0.optimizer.state.exp_avg.output_layer.weight", torch.zeros(3))
    made.add_object("rng_state/shard_0.0_1.1", {"random": (3, (1, 2), None)})
    made.add_object("rerun_state_machine_state/shard_0_1", {})
    made.add_object("decoder.final_layernorm._extra_state/shard_0_1", None)
    plain = {"layers": 2, "dtype": torch.bfloat16, "list": [1, (2.5, None)], "inner": Namespace(x="y")}
    made.common["args"] = Namespace(**plain, attention=Backend.FLASH, nested=[Backend.FLASH])
    with DistCheckpoint(made.close(kind)) as checkpoint:
        assert set(checkpoint) == set(tensors)
        assert checkpoint.args == plain | {"inner": {"x": "y"}}
        assert checkpoint.iteration == 5
        assert sorted(checkpoint.said) == [
            "args.attention is left out: <megatron.core.transformer.enums.Backend> is no plain value",
            "args.nested is left out: <megatron.core.transformer.enums.Backend> is no plain value",
            "not read: 1 entries of _extra_state", "not read: 1 entries of chained_0",
            "not read: 1 entries of optimizer", "not read: 1 entries of rerun_state_machine_state",
            "not read: 1 entries of rng_state",
        ]  # fmt: skip


def test_the_common_state_of_core_0_19_is_read(tmp_path: Path) -> None:
    made, tensors = simple(tmp_path / "x")
    made.add_object("common_state/shard_0_1", made.common)
    made.common = None
    with DistCheckpoint(made.close()) as checkpoint:
        assert (checkpoint.args, checkpoint.iteration, checkpoint.said) == ({"num_layers": 2}, 5, [])
        assert all(same(checkpoint.get(name), tensor) for name, tensor in tensors.items())


def test_no_common_state_is_said(tmp_path: Path) -> None:
    made, _ = simple(tmp_path / "x")
    made.common = None
    with DistCheckpoint(made.close()) as checkpoint:
        assert (checkpoint.args, checkpoint.iteration) == ({}, None)
        assert any("nothing is known" in line for line in checkpoint.said)


@pytest.mark.parametrize("version", [0, 1.0, "3"])
def test_the_old_order_of_query_key_and_value_is_refused(tmp_path: Path, version: object) -> None:
    made, _ = simple(tmp_path / "x")
    made.common["checkpoint_version"] = version
    refused(made.close(), "another order of query, key and value")
