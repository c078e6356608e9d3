"""Where parameters of the model in memory lie on disk; the oracle is what transformers itself saves and loads."""

import json
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from families import SMALL, tiny
from finebridge.merge.placement import Part, Placement, PlacementError
from safetensors.torch import load_file, save_file
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GptOssConfig,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    conversion_mapping,
)
from transformers.core_model_loading import (
    Chunk,
    Concatenate,
    ConversionOps,
    MergeModulelist,
    PermuteForRope,
    Transpose,
    WeightConverter,
)

EXPERTS = "model.layers.1.mlp.experts.gate_up_proj"


def gpt_oss() -> Any:
    return AutoModelForCausalLM.from_config(
        GptOssConfig(hidden_size=32, intermediate_size=16, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
                     head_dim=8, vocab_size=64, num_local_experts=4, pad_token_id=0)
    )  # fmt: skip


def pictures() -> Any:
    text = {key: value for key, value in SMALL.items() if "expert" not in key} | {
        "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    }
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": 32,
        "patch_size": 4,
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision))


MODELS: dict[str, Callable[[], Any]] = {
    name: lambda name=name: tiny(name)
    for name in (
        "qwen3_moe",
        "mixtral",
        "hunyuan_v1_moe",
        "deepseek_v3",
        "glm4_moe",
        "llama",
        "hunyuan_v1_dense",
        "mamba",
    )
} | {"gpt_oss": gpt_oss, "pictures": pictures}


def saved(model: Any, folder: Path) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The tensors of a model in memory and on disk."""
    model.save_pretrained(folder)
    return model.state_dict(), load_file(folder / "model.safetensors")


def stored(folder: Path, disk: dict[str, torch.Tensor]) -> Placement:
    return Placement(folder, disk, shapes={name: tuple(tensor.shape) for name, tensor in disk.items()})


def rebuilt(parts: list[Part], like: torch.Tensor, disk: dict[str, torch.Tensor]) -> torch.Tensor:
    """The parameter in memory, put together from tensors on disk; NaN where none was put."""
    made = torch.full_like(like, float("nan"))
    for part in parts:
        piece = disk[part.name].transpose(-1, -2) if part.transposed else disk[part.name]
        if like.ndim == 3:
            where = made if part.expert is None else made[part.expert]
            where[..., part.rows, part.cols] = piece
        else:
            made.reshape(len(made), -1)[part.rows, part.cols] = piece.reshape(len(piece), -1)
    return made


def every_weight_is_found(
    placement: Placement, memory: dict[str, torch.Tensor], disk: dict[str, torch.Tensor]
) -> dict[str, list[Part]]:
    """Hold every parameter against the disk, bit for bit; every tensor on disk is used once."""
    tied = dict(placement.tied(memory))
    found = {name: placement.parts(name, tuple(memory[name].shape)) for name in memory if name not in tied}
    for name, parts in found.items():
        assert torch.equal(rebuilt(parts, memory[name], disk), memory[name]), name
    used = Counter(part.name for parts in found.values() for part in parts)
    assert used == Counter(disk.keys())
    return found


@pytest.mark.parametrize("name", MODELS)
def test_every_weight_is_found_as_transformers_saves_it(name: str, tmp_path: Path) -> None:
    memory, disk = saved(MODELS[name](), tmp_path)
    found = every_weight_is_found(stored(tmp_path, disk), memory, disk)
    assert found == every_weight_is_found(Placement(tmp_path, list(disk)), memory, disk), "shapes change nothing here"


def test_experts_in_parts_and_fused(tmp_path: Path) -> None:
    memory, disk = saved(tiny("mixtral"), tmp_path)
    parts = stored(tmp_path, disk).parts(EXPERTS, tuple(memory[EXPERTS].shape))
    assert len(parts) == 8
    name = "model.layers.1.block_sparse_moe.experts.2.w3.weight"
    assert next(part for part in parts if part.name == name) == Part(name, 2, slice(64, 128), slice(0, 32))


def test_a_stack_with_its_matrices_turned_on_disk_is_told_by_its_shape(tmp_path: Path) -> None:
    memory, _ = saved(tiny("qwen3_moe"), tmp_path)
    disk = {name: t.transpose(1, 2).contiguous() if name == EXPERTS else t for name, t in memory.items()}
    parts = stored(tmp_path, disk).parts(EXPERTS, tuple(memory[EXPERTS].shape))
    assert parts == [Part(EXPERTS, None, slice(0, 32), slice(0, 32))], (
        "a square matrix is taken as it is, as transformers does"
    )
    down = EXPERTS.replace("gate_up", "down")
    disk[down] = memory[down].transpose(1, 2).contiguous()
    parts = stored(tmp_path, disk).parts(down, tuple(memory[down].shape))
    assert parts == [Part(down, None, slice(0, 32), slice(0, 16), transposed=True)]
    assert torch.equal(rebuilt(parts, memory[down], disk), memory[down])


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "llama"])
def test_a_base_without_the_prefix_of_the_base_model(name: str, tmp_path: Path) -> None:
    model = tiny(name, tie_word_embeddings=True)
    memory, disk = saved(model, tmp_path)
    disk = {key.removeprefix("model."): tensor for key, tensor in disk.items()}
    save_file(disk, tmp_path / "model.safetensors", {"format": "pt"})
    again = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert all(torch.equal(again[key], memory[key]) for key in memory), "transformers reads such a base"
    every_weight_is_found(stored(tmp_path, disk), memory, disk)


def test_names_of_the_language_tower_old_and_new(tmp_path: Path) -> None:
    memory, disk = saved(pictures(), tmp_path)
    name = "model.language_model.layers.0.self_attn.q_proj.weight"
    assert name in memory
    assert name not in disk, "the files have the old names"
    assert stored(tmp_path, disk).parts(name, (32, 32))[0].name == "model.layers.0.self_attn.q_proj.weight"
    every_weight_is_found(stored(tmp_path, memory), memory, memory)


def test_a_text_model_in_a_base_of_pictures_and_text(tmp_path: Path) -> None:
    text = {key: value for key, value in SMALL.items() if "expert" not in key} | {
        "layer_types": ["full_attention"] * 2, "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 8,
        "linear_value_head_dim": 8, "tie_word_embeddings": False,
    }  # fmt: skip
    vision = {
        "depth": 1,
        "hidden_size": 16,
        "num_heads": 2,
        "intermediate_size": 16,
        "out_hidden_size": 32,
        "patch_size": 4,
    }
    import transformers

    config = AutoConfig.for_model("qwen3_5", text_config=text, vision_config=vision, tie_word_embeddings=False)
    memory, disk = saved(transformers.Qwen3_5ForConditionalGeneration(config), tmp_path)
    placement = stored(tmp_path, disk)
    every_weight_is_found(placement, memory, disk)
    language = AutoModelForCausalLM.from_pretrained(tmp_path).state_dict()
    assert language.keys() - disk.keys(), "its names are not those on disk"
    for name, weight in language.items():
        assert torch.equal(rebuilt(placement.parts(name, tuple(weight.shape)), weight, disk), weight), name


@pytest.mark.parametrize("weight", ["gate_proj", "up_proj", "down_proj"])
def test_an_experts_own_weight_in_a_fused_base(weight: str, tmp_path: Path) -> None:
    memory, apart = saved(tiny("qwen3_moe"), tmp_path)
    placement = stored(tmp_path, memory)
    name = f"model.layers.1.mlp.experts.3.{weight}.weight"
    fused, part = placement.fused(name) or pytest.fail("not found")
    assert (
        fused == part.name == EXPERTS.replace("gate_up_proj", "down_proj" if weight == "down_proj" else "gate_up_proj")
    )
    assert part.expert == 3
    assert torch.equal(memory[fused][3, part.rows, part.cols], apart[name])
    assert stored(tmp_path, apart).fused(name) is None, "on disk as it is"
    bare = {key.removeprefix("model."): tensor for key, tensor in apart.items()}
    assert stored(tmp_path, bare).fused(name) is None, "the base holds no fused one"
    assert placement.fused("model.layers.1.mlp.experts.3.other.weight") is None
    assert placement.fused("model.layers.1.mlp.experts.4.up_proj.weight") is None, "there are four experts"


@pytest.fixture
def conversion(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Give a model class a conversion of its own, as transformers keeps them."""
    conversion_mapping.get_checkpoint_conversion_mapping("llama")  # makes the table
    table = conversion_mapping._checkpoint_conversion_mapping_cache

    def give(kind: str, *conversions: Any) -> None:
        monkeypatch.setitem(table, kind, list(conversions))

    return give


TURNED = Transpose(dim0=0, dim1=1)
STACKS = [".moe.gate.weight", ".moe.up.weight"]
LISTS = [".moe.*.gate.weight", ".moe.*.up.weight"]
UP = ".mlp.experts.gate_up_proj"


@pytest.mark.parametrize(
    ("kind", "converter", "parts"),
    [
        ("qwen3_moe", WeightConverter(STACKS, UP, [Concatenate(dim=1)]), 2),
        ("qwen3_moe", WeightConverter(LISTS, UP, [MergeModulelist(dim=0), Concatenate(dim=2), Transpose(1, 2)]), 8),
        ("qwen3_moe", WeightConverter(".moe.up.weight", UP, [Transpose(1, 2)]), 1),
        (
            "llama",
            WeightConverter(["mlp.a.weight", "mlp.b.weight", "mlp.c.weight"], "mlp.up_proj.weight", [Concatenate(1)]),
            3,
        ),
        ("llama", WeightConverter("mlp.turned.weight", "mlp.down_proj.weight", [TURNED]), 1),
    ],
    ids=["stacks", "turned-lists", "turned-stack", "columns", "turned"],
)
def test_regions_of_every_form(
    kind: str, converter: WeightConverter, parts: int, conversion: Callable[..., None], tmp_path: Path
) -> None:
    model = tiny(kind, hidden_size=48, **({"moe_intermediate_size": 20} if kind == "qwen3_moe" else {}))
    conversion(kind, converter)
    memory, disk = saved(model, tmp_path)
    found = every_weight_is_found(stored(tmp_path, disk), memory, disk)
    assert max(map(len, found.values())) == parts


def test_a_conversion_that_looks_at_shapes(conversion: Callable[..., None], tmp_path: Path) -> None:
    names = [f".mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")]
    conversion("qwen3_moe", *(WeightConverter(name, name, [Transpose(1, 2, check_dims=True)]) for name in names))
    memory, disk = saved(tiny("qwen3_moe", moe_intermediate_size=20), tmp_path)
    disk = {key.removeprefix("model."): tensor for key, tensor in disk.items()}
    every_weight_is_found(stored(tmp_path, disk), memory, disk)
    turned = {key: tensor.transpose(1, 2).contiguous() if tensor.ndim == 3 else tensor for key, tensor in disk.items()}
    found = every_weight_is_found(stored(tmp_path, turned), memory, turned)
    assert all(part.transposed for part in found[EXPERTS])


class Doubled(ConversionOps):
    """Half of a weight is on disk; the way back loses the other half."""

    def convert(self, input_dict: dict[str, Any], target_patterns: list[str], **_: Any) -> dict[str, Any]:
        (tensors,) = input_dict.values()
        return {target_patterns[0]: tensors[0].chunk(2)[0]}

    @property
    def reverse_op(self) -> ConversionOps:
        return self


def test_what_is_no_region_is_refused(conversion: Callable[..., None], tmp_path: Path) -> None:
    model = tiny("llama")
    joined = WeightConverter("mlp.both.weight", ["mlp.gate_proj.weight", "mlp.up_proj.weight"], [Chunk(dim=0)])
    mixed = WeightConverter("self_attn.wq.weight", "self_attn.q_proj.weight", [PermuteForRope()])
    uneven = WeightConverter(
        [f"self_attn.o{n}.weight" for n in range(3)], "self_attn.o_proj.weight", [Concatenate(dim=1)]
    )
    cut = WeightConverter("self_attn.half.weight", "self_attn.v_proj.weight", [Doubled()])
    conversion("llama", joined, mixed, uneven, cut)
    memory, disk = saved(model, tmp_path)
    placement = stored(tmp_path, disk)
    for name, message in {
        "mlp.up_proj": r"it lies in .*mlp.both.weight, but not as a region of its own",
        "self_attn.q_proj": "in another order|fails on a part",
        "self_attn.v_proj": "in another order",
        "self_attn.o_proj": "not as a region of its own",
    }.items():
        weight = f"model.layers.0.{name}.weight"
        with pytest.raises(PlacementError, match=rf"^{weight}: .*({message})"):
            placement.parts(weight, tuple(memory[weight].shape))
    assert placement.parts("model.layers.0.self_attn.k_proj.weight", (16, 32))[0].name in disk


def test_which_way_round_experts_are_kept(tmp_path: Path) -> None:
    for name, model, expected in (("a", gpt_oss(), True), ("b", tiny("qwen3_moe"), False)):
        _, disk = saved(model, tmp_path / name)
        placement = stored(tmp_path / name, disk)
        assert placement.is_transposed("model.layers.0.mlp.experts") is expected
        with pytest.raises(PlacementError, match=r"layers\.9\.mlp\.experts: the model class"):
            placement.is_transposed("model.layers.9.mlp.experts")


@pytest.mark.parametrize("tied", [True, False])
def test_tied_embeddings(tied: bool, tmp_path: Path) -> None:
    memory, disk = saved(tiny("llama", tie_word_embeddings=tied), tmp_path)
    pairs = [("lm_head.weight", "model.embed_tokens.weight")] if tied else []
    placement = stored(tmp_path, disk)
    assert placement.tied(["model.embed_tokens.weight"]) == pairs
    assert placement.tied(["model.norm.weight"]) == []
    assert ("lm_head.weight" in disk) is not tied
    if tied:
        with pytest.raises(
            PlacementError, match=r"^lm_head.weight: .* none of this weight; it is tied to model.embed_tokens"
        ):
            placement.parts("lm_head.weight", tuple(memory["lm_head.weight"].shape))


def test_names_that_are_on_disk_need_no_transformers(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"tie_word_embeddings": False}))
    code = (
        "import sys; from pathlib import Path; from finebridge.merge.placement import Placement\n"
        f"p = Placement(Path({str(tmp_path)!r}), ['a.weight', 'b.weight'], shapes={{'a.weight': (4, 6), 'b.weight': (4,)}})\n"
        "print(p.parts('a.weight', (4, 6)), p.parts('b.weight', (4,)), p.fused('a.weight'), p.tied(['a.weight']))\n"
        "print([m for m in ('torch', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, check=True)
    first, second = (
        Part("a.weight", None, slice(0, 4), slice(0, 6)),
        Part("b.weight", None, slice(0, 4), slice(0, 1)),
    )
    assert done.stdout.splitlines() == [f"[{first}] [{second}] None []", "[]"]


def test_what_has_no_place_is_told_by_name(tmp_path: Path) -> None:
    memory, disk = saved(tiny("qwen3_moe"), tmp_path)
    placement, shape = stored(tmp_path, disk), tuple(memory[EXPERTS].shape)
    with pytest.raises(
        PlacementError, match=r"layers.1.self_attn.p_proj.weight: .*; the nearest on disk is .*_proj.weight"
    ):
        placement.parts("model.layers.1.self_attn.p_proj.weight", (32, 32))
    with pytest.raises(PlacementError, match=r"gate_up_proj: the base's config gives it the shape \(4, 32, 32\), not"):
        placement.parts(EXPERTS, (8, 32, 32))
    with pytest.raises(PlacementError, match=r"q_proj.weight: of shape \(64, 32\), but the base's .* \(32, 32\)"):
        placement.parts("model.layers.1.self_attn.q_proj.weight", (64, 32))
    lost = {name: t for name, t in disk.items() if "layers.1.mlp.experts.2.up_proj" not in name}
    with pytest.raises(
        PlacementError, match=r"gate_up_proj: .*experts.2.up_proj.weight, which holds .*, is not on disk"
    ):
        stored(tmp_path, lost).parts(EXPERTS, shape)
    more = disk | {"model.layers.1.mlp.experts.4.up_proj.weight": torch.zeros(16, 32)}
    with pytest.raises(PlacementError, match=r"gate_up_proj: .*experts.4.up_proj.weight belongs to it, but"):
        stored(tmp_path, more).parts(EXPERTS, shape)
    short = disk | {"model.layers.1.mlp.experts.0.up_proj.weight": torch.zeros(8, 32)}
    with pytest.raises(PlacementError, match=r"experts.0.up_proj.weight has the shape \(8, 32\)"):
        stored(tmp_path, short).parts(EXPERTS, shape)


def test_a_base_that_transformers_cannot_build(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(
        json.dumps({"model_type": "no_such_model", "auto_map": {"AutoConfig": "a.B"}})
    )
    with pytest.raises(PlacementError, match=r"(?s)cannot build this model .*--trust_remote_code"):
        Placement(tmp_path, ["a.weight"]).parts("b.weight", (4, 4))


def test_a_base_with_code_of_its_own(listed_moe: Path, tmp_path: Path) -> None:
    base = shutil.copytree(listed_moe, tmp_path / "base")
    config = json.loads((base / "config.json").read_text()) | {"architectures": ["Qwen3MoeForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config))
    disk = load_file(base / "model.safetensors")
    module = "model.layers.0.mlp.experts.3.up_proj"
    assert Placement(base, disk, trust_remote_code=True).parameters(module) == [("weight", (16, 32))]
    with pytest.raises(PlacementError, match=r"(?s)cannot build this model .*--trust_remote_code"):
        Placement(base, disk).parameters(module)
