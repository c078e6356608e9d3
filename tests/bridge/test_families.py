"""What single families have that others have not: norms around one, shared keys, values a layer, further-token layers."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.args import to_args
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.families import family_of
from finebridge.bridge.run_flags import run_flags
from finebridge.bridge.source import open_source
from finebridge.finetune.cli import main
from finebridge.storage.safetensors_io import Checkpoint
from safetensors.torch import save_file

Models = Callable[[str], Path]
Tensors = dict[str, torch.Tensor]


def tensors(folder: Path) -> Tensors:
    with Checkpoint(folder) as checkpoint:
        return {name: checkpoint.get(name).clone() for name in checkpoint}


def edited(folder: Path, to: Path, change: Callable[[Tensors], object], **config: Any) -> Path:
    values = tensors(folder)
    change(values)
    to.mkdir()
    content = json.loads((folder / "config.json").read_text()) | config
    (to / "config.json").write_text(json.dumps(content))
    save_file({name: value.contiguous() for name, value in values.items()}, to / "model.safetensors")
    return to


def convert(source: Path, target: Path, words: str = "") -> int:
    return main(["convert", "--load", str(source), "--save", str(target), *words.split()])


def assert_there_and_back(base: Path, tmp_path: Path, *words: str, flag: str = "") -> None:
    for number, form in enumerate(words):
        made, back = tmp_path / f"mcore{number}", tmp_path / f"back{number}"
        assert convert(base, made, f"--to mcore {form} {flag}") == 0
        assert convert(made, back, f"--to hf {flag}") == 0
        before, after = tensors(base), tensors(back)
        assert before.keys() == after.keys()
        for name, value in before.items():
            assert value.dtype == after[name].dtype
            assert torch.equal(value, after[name]), name


TORCH, DIST = "--ckpt_format torch --tp 2 --pp 2 --ep 2", "--ckpt_format torch_dist"


def test_norms_around_one_come_back_whatever_they_are(hf_models: Models, tmp_path: Path) -> None:
    """In bf16 most weights below 0.5 are not what they were when one is taken away and added again."""

    def spread(values: Tensors) -> None:
        values |= {name: value.bfloat16() for name, value in values.items()}
        for name in (name for name in values if name.endswith("linear_attn.norm.weight")):
            values[name] = torch.logspace(-4, 2, len(values[name])).bfloat16()
            assert not torch.equal(values[name] - 1 + 1, values[name])

    base = edited(hf_models("qwen3_next"), tmp_path / "base", spread)
    assert_there_and_back(base, tmp_path, TORCH, DIST)
    with open_source(tmp_path / "mcore1").tensors as made:
        assert made.dtypes["decoder.layers.0.self_attention.out_norm.weight"] == torch.float32
    tiny = edited(base, tmp_path / "tiny", lambda t: t["model.layers.2.linear_attn.norm.weight"].fill_(1e-7))
    assert convert(tiny, tmp_path / "none", "--to mcore") == 2


def test_what_megatron_trained_is_rounded_and_told(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A Megatron of bf16 stores bf16 distances from one."""
    import finebridge.bridge.dist_format as dist

    assert convert(hf_models("qwen3_next"), tmp_path / "mcore", "--to mcore --dtype bf16") == 0
    with open_source(tmp_path / "mcore").tensors as made:
        specs = [dist.Spec(name, torch.bfloat16, shape) for name, shape in made.shapes.items()]
        trained = tmp_path / "trained"
        trained.mkdir()
        dist.write_dist(
            trained, specs, lambda name: made.get(name).bfloat16(), args=made.args, iteration=1, uniform=False
        )
    shutil.copy(tmp_path / "mcore/config.json", trained)
    capsys.readouterr()
    assert convert(trained, tmp_path / "back", "--to hf") == 0
    assert "2 norms that Megatron-Core keeps as distances from one are rounded" in capsys.readouterr().out
    assert tensors(tmp_path / "back")["model.layers.0.linear_attn.norm.weight"].dtype == torch.bfloat16


@pytest.mark.parametrize("told", [True, False])
def test_qwen3_next_has_a_layer_that_predicts_a_further_token(told: bool, hf_models: Models, tmp_path: Path) -> None:
    """Its config may keep silent about it."""

    def add(values: Tensors) -> None:
        last = "model.layers.3."
        values |= {
            f"mtp.layers.0.{name.removeprefix(last)}": value + 1 for name, value in values.items() if last in name
        }
        values |= {
            f"mtp.{name}.weight": torch.randn(32) for name in ("norm", "pre_fc_norm_embedding", "pre_fc_norm_hidden")
        }
        values["mtp.fc.weight"] = torch.randn(32, 64)

    more = {"num_nextn_predict_layers": 1} if told else {}
    base = edited(hf_models("qwen3_next"), tmp_path / "base", add, **more)
    assert_there_and_back(base, tmp_path, *([TORCH] if told else [DIST]))
    with open_source(tmp_path / "mcore0").tensors as made:
        assert made.shapes["mtp.layers.0.eh_proj.weight"] == (32, 64)
        assert "mtp.layers.0.transformer_layer.self_attention.linear_qkv.weight" in made.shapes
        assert made.args["mtp_num_layers"] == 1
    with pytest.raises(BridgeError, match="qwen3-next has tensors for one such layer"):
        list(family_of({"model_type": "qwen3_next"}).rows(open_source(base).config | {"num_nextn_predict_layers": 2}))


def shared_keys(hf_models: Models, to: Path, **config: Any) -> Path:
    """Hunyuan-Large: every second layer has no keys and values of its own."""

    def drop(values: Tensors) -> None:
        for layer in (1, 3):
            for kind in "kv":
                del values[f"model.layers.{layer}.self_attn.{kind}_proj.weight"]

    more = {"model_type": "hunyuan", "use_cla": True, "cla_share_factor": 2, "use_qk_norm": True} | config
    return edited(hf_models("hunyuan_v1_moe"), to, drop, **more)


def test_hunyuan_large_shares_keys_and_values(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = shared_keys(hf_models, tmp_path / "base")
    assert convert(base, tmp_path / "none", "--to mcore") == 2
    assert "stock Megatron-Core computes hunyuan otherwise: query and key are normed after" in capsys.readouterr().err
    assert_there_and_back(base, tmp_path, TORCH, DIST, flag="--allow_patched_attention")
    assert "MindSpeed-LLM's Hunyuan attention does as the model, with the names of" in capsys.readouterr().out
    with open_source(tmp_path / "mcore0").tensors as made:
        query = tensors(base)["model.layers.1.self_attn.q_proj.weight"]
        assert torch.equal(made.get("decoder.layers.1.self_attention.linear_qkv.weight"), query)
        assert made.shapes["decoder.layers.2.self_attention.linear_qkv.weight"] == (64, 32)
        assert {"q_layernorm", "k_layernorm"} <= {name.split(".")[4] for name in made.shapes if ".3.self_att" in name}
        assert made.args["cla_share_factor"] == 2
    file = torch.load(tmp_path / "mcore0/release/mp_rank_01_000_000/model_optim_rng.pt", weights_only=False)
    assert torch.equal(file["model"]["decoder.layers.1.self_attention.linear_qkv.weight"], query[16:])


def test_hunyuan_has_the_names_that_mindspeed_reads(hf_models: Models, tmp_path: Path) -> None:
    """Those of its ``hunyuan_spec.py`` and ``hunyuan_large_attention.py``."""
    base = shared_keys(hf_models, tmp_path / "base")
    words = "--to mcore --ckpt_format torch --dialect mcore-local --allow_patched_attention"
    assert convert(base, tmp_path / "mcore", words) == 0
    file = torch.load(tmp_path / "mcore/release/mp_rank_00/model_optim_rng.pt", weights_only=False)
    start = "decoder.layers.1."
    experts = [f"mlp.experts.local_experts.{number}.linear_fc{part}.weight" for number in range(4) for part in (1, 2)]
    assert {name.removeprefix(start) for name, value in file["model"].items() if start in name and value is not None} == {
        "input_layernorm.weight", "self_attention.linear_qkv.weight", "self_attention.q_layernorm.weight",
        "self_attention.k_layernorm.weight", "self_attention.linear_proj.weight", "pre_mlp_layernorm.weight",
        "mlp.router.weight", "mlp.shared_experts.linear_fc1.weight", "mlp.shared_experts.linear_fc2.weight", *experts,
    }  # fmt: skip


def test_layers_that_mindspeed_shares_otherwise_have_no_form(
    hf_models: Models, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    base = edited(hf_models("hunyuan_v1_moe"), tmp_path / "base", len, use_cla=True, cla_share_factor=1)
    assert convert(base, tmp_path / "none", "--to mcore --allow_patched_attention") == 2
    assert "cla_share_factor 1: MindSpeed-LLM lets other layers share" in capsys.readouterr().err


A13B: dict[str, Any] = {  # of Tencent-Hunyuan/Hunyuan-A13B models/config.json, what shapes the model
    "model_type": "hunyuan", "attention_bias": False, "attention_head_dim": 128, "cla_share_factor": 2, "hidden_act": "silu",
    "hidden_size": 4096, "intermediate_size": 3072, "max_position_embeddings": 32768, "mlp_bias": False,
    "moe_intermediate_size": [3072] * 32, "moe_layer_num_skipped": 0, "moe_topk": [8] * 32, "n_group": None,
    "norm_topk_prob": True, "num_attention_heads": 32, "num_experts": 64, "num_hidden_layers": 32, "num_key_value_heads": 8,
    "num_shared_expert": [1] * 32, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "routed_scaling_factor": 1.0,
    "rope_scaling": {"alpha": 1000.0, "beta_fast": 32, "factor": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "type": "dynamic"},
    "tie_word_embeddings": True, "topk_group": None, "use_cla": False, "use_mixed_mlp_moe": True, "use_qk_norm": True,
    "vocab_size": 128167,
}  # fmt: skip


def test_hunyuan_a13b() -> None:
    args = to_args(A13B)
    wanted = {
        "num_experts": 64, "moe_router_topk": 8, "moe_ffn_hidden_size": 3072, "moe_shared_expert_intermediate_size": 3072,
        "moe_shared_expert_gate": False, "moe_router_pre_softmax": False, "moe_router_score_function": "softmax",
        "moe_layer_freq": 1, "qk_layernorm": True, "kv_channels": 128, "num_query_groups": 8,
        "untie_embeddings_and_output_weights": False,
    }  # fmt: skip
    assert {key: args[key] for key in wanted} == wanted
    assert args["rotary_base"] == pytest.approx(1e4 * 1000 ** (128 / 126))
    assert len(list(family_of(A13B).rows(A13B))) == 2 + 32 * (3 + 2 + 2 + 2 + 64 * 2)
    assert family_of(A13B).support(A13B | {"use_qk_norm": False}).kind == "stock"
    with pytest.raises(BridgeError, match=r"moe_topk differs by layer: \[6, 8\]; Megatron-Core has one for all"):
        to_args(A13B | {"moe_topk": [8] * 31 + [6]})
    uneven = A13B | {"num_experts": [64] * 31 + [32], "num_hidden_layers": 32}
    assert sum(row.mcore.startswith("decoder.layers.31.") for row in family_of(A13B).rows(uneven)) == 9 + 32 * 2


def test_arguments_of_an_indexer() -> None:
    config = {
        "model_type": "deepseek_v32", "vocab_size": 99, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
        "num_attention_heads": 4, "max_position_embeddings": 512, "rms_norm_eps": 1e-6, "q_lora_rank": 24, "kv_lora_rank": 16,
        "qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 12, "n_routed_experts": 8, "num_experts_per_tok": 2,
        "moe_intermediate_size": 24, "norm_topk_prob": True, "index_n_heads": 64, "index_head_dim": 128, "index_topk": 2048,
    }  # fmt: skip
    words = " ".join(run_flags(to_args(config)))
    assert "--experimental-attention-variant dsa --dsa-indexer-n-heads 64 --dsa-indexer-head-dim 128" in words
    assert "--dsa-indexer-topk 2048 --dsa-indexer-k-norm-epsilon 1e-06" in words
    assert family_of(config).support(config).reason.startswith("for Megatron-Core 0.19 or newer")


def test_layers_that_share_an_indexer(hf_models: Models, tmp_path: Path) -> None:
    """GLM-5.2: after the first layers every second one takes over what the one before has picked."""

    def drop(values: Tensors) -> None:
        for name in [name for name in values if ".2.self_attn.indexer." in name]:
            del values[name]

    more = {"indexer_types": None, "index_topk_freq": 2, "index_skip_topk_offset": 2}
    base = edited(hf_models("glm5"), tmp_path / "base", drop, **more)
    assert_there_and_back(base, tmp_path, TORCH, DIST)
    config = open_source(base).config
    args = to_args(config)
    assert (args["dsa_indexer_topk_freq"], args["dsa_indexer_skip_topk_offset"]) == (2, 2)
    assert args["dsa_indexer_rope_interleaved"] is True
    assert to_args(config | {"index_topk_pattern": "FFSF"}) == args
    assert to_args(config | {"indexer_types": ["full", "full", "shared", "full"]}) == args
    with pytest.raises(BridgeError, match="layer 3 lacks an indexer, Megatron-Core's rule"):
        to_args(config | {"index_topk_pattern": "FFSS"})


def test_arguments_of_delta_nets(hf_models: Models) -> None:
    config = json.loads((hf_models("qwen3_next") / "config.json").read_text())
    args = to_args(config)
    assert args["linear_attention_freq"] == [1, 0, 1, 0]
    assert args["apply_layernorm_1p"] is args["attention_output_gate"] is args["moe_shared_expert_gate"] is True
    assert args["rotary_percent"] == 0.25
    words = " ".join(run_flags(args))
    assert "--attention-output-gate --moe-shared-expert-gate --linear-attention-freq [1,0,1,0] " in words
    assert "--linear-key-head-dim 8 --linear-value-head-dim 12 --linear-num-key-heads 2" in words
    by_interval = {key: value for key, value in config.items() if key != "layer_types"} | {"full_attention_interval": 2}
    assert to_args(by_interval) == args
