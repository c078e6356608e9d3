"""Megatron's format ``torch``: what is written is read, also by Megatron itself, and what Megatron writes is read."""

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from canonical_models import EMBEDDING, OUTPUT, read, tiny_model, write
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.parallel import Layout
from finebridge.bridge.torch_format import FILE, TorchCheckpoint
from finebridge.bridge.torch_writer import write_torch
from finebridge.storage.hashing import file_entry
from finebridge.storage.safetensors_io import Spec

from .conftest import thinned


def same(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], tensor) for name, tensor in wanted.items())


# There and back

LAYOUTS = [
    Layout(), Layout(tp=2), Layout(tp=4, pp=2), Layout(tp=2, pp=2, vpp=2), Layout(pp=4), Layout(pp=2, layer_list=(1, 3)),
    Layout(tp=2, pp=2, vpp=2, layer_list=(0, 1, 1, 2)),
]  # fmt: skip
EXPERT_LAYOUTS = [Layout(tp=2, ep=2), Layout(tp=2, pp=2, ep=2, etp=1), Layout(tp=4, ep=4, etp=2), Layout(ep=4)]
DENSE: list[dict[str, Any]] = [{"bias": True}, {"tied": True, "dtype": torch.bfloat16}, {"tied": True, "mtp": 2}]
SPARSE: list[dict[str, Any]] = [{"experts": 4}, {"experts": 4, "mla": True, "mtp": 1, "dtype": torch.float16}]


PRODUCT = [
    *((layout, dialect) for layout in (*LAYOUTS, *EXPERT_LAYOUTS) for dialect in ("mcore", "mcore-local")),
    *((layout, dialect) for layout in (*LAYOUTS[3:], *EXPERT_LAYOUTS[:3]) for dialect in ("mindspeed", "pai")),
]
KEPT = [
    (Layout(), "mcore-local"), (Layout(tp=2, pp=2, vpp=2, layer_list=(0, 1, 1, 2)), "mcore"),
    (Layout(tp=4, ep=4, etp=2), "mcore"), (Layout(tp=2, pp=2, ep=2, etp=1), "mcore-local"),
    (EXPERT_LAYOUTS[1], "mindspeed"), (EXPERT_LAYOUTS[2], "pai"),
]  # fmt: skip


@pytest.mark.parametrize(("layout", "dialect"), thinned(PRODUCT, KEPT), ids=str)
def test_what_is_written_is_read(tmp_path: Path, layout: Layout, dialect: str) -> None:
    if dialect == "mindspeed" and ((layout.layer_list and layout.vpp) or layout.etp == 2):
        with pytest.raises(BridgeError, match="MindSpeed-LLM has"):
            write(tmp_path, tiny_model(experts=4), layout, dialect=dialect)
        return
    for number, made in enumerate([*DENSE, *SPARSE] if layout.ep == 1 else SPARSE):
        model = tiny_model(**made)
        write(tmp_path / str(number), model, layout, dialect=dialect)
        with TorchCheckpoint(tmp_path / str(number)) as checkpoint:
            assert checkpoint.layout == Layout(
                layout.tp, layout.pp, layout.vpp, layout.ep, layout.expert_tp, layout.layer_list
            )
            assert dialect in checkpoint.dialects
        assert same(read(tmp_path / str(number)), model)


def test_the_names_of_files_and_what_they_hold(tmp_path: Path) -> None:
    model = tiny_model(experts=4)
    for number, (layout, iteration, names) in enumerate(
        [
            (Layout(), None, ["release/mp_rank_00"]),
            (Layout(tp=2), 12, ["iter_0000012/mp_rank_00", "iter_0000012/mp_rank_01"]),
            (Layout(pp=2), None, ["release/mp_rank_00_000", "release/mp_rank_00_001"]),
            (Layout(ep=2), None, ["release/mp_rank_00_000", "release/mp_rank_00_001"]),
            (Layout(pp=2, ep=2), None, [f"release/mp_rank_00_{pp:03d}_{ep:03d}" for pp in (0, 1) for ep in (0, 1)]),
        ]
    ):
        folder = tmp_path / str(number)
        entries = write(folder, model, layout, iteration=iteration)
        tracker = "latest_checkpointed_iteration.txt"
        assert sorted(entries) == sorted([tracker, *(f"{name}/{FILE}" for name in names)])
        assert entries == {name: file_entry(folder / name) for name in entries}
        assert (folder / tracker).read_text() == ("release" if iteration is None else str(iteration))
        content = torch.load(folder / names[0] / FILE, weights_only=False)
        assert list(content) == ["args", "checkpoint_version", "iteration", "model"]
        assert (content["checkpoint_version"], content["iteration"]) == (3.0, iteration or 0)
        with TorchCheckpoint(folder) as checkpoint:
            assert checkpoint.iteration == iteration
            assert checkpoint.args == vars(content["args"])
        with TorchCheckpoint(folder / names[0].partition("/")[0]) as checkpoint:
            assert checkpoint.iteration == iteration


def test_the_arguments_say_how_the_model_is_spread(tmp_path: Path) -> None:
    write(tmp_path, tiny_model(tied=True, mtp=1), Layout(tp=2, pp=2, layer_list=(1, 3)), args={"rotary_base": 500})
    with TorchCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.args == {
            "rotary_base": 500, "ckpt_format": "torch", "num_layers": 4, "vocab_size": 100, "padded_vocab_size": 112,
            "make_vocab_size_divisible_by": 8, "untie_embeddings_and_output_weights": False, "mtp_num_layers": 1,
            "tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2, "expert_model_parallel_size": 1,
            "expert_tensor_parallel_size": 2, "virtual_pipeline_model_parallel_size": None,
            "num_layers_per_virtual_pipeline_stage": None, "pipeline_model_parallel_layout": "Et*1|t*3mL",
            "transformer_impl": "transformer_engine", "moe_grouped_gemm": False,
        }  # fmt: skip


def test_the_arguments_say_which_layers_the_model_has(tmp_path: Path) -> None:
    write(tmp_path / "1", tiny_model(experts=2), Layout(pp=2, vpp=2))
    write(tmp_path / "2", tiny_model(experts=2), dialect="mcore-local")
    with TorchCheckpoint(tmp_path / "1") as grouped, TorchCheckpoint(tmp_path / "2") as local:
        assert (grouped.args["moe_grouped_gemm"], grouped.args["transformer_impl"]) == (True, "transformer_engine")
        assert (grouped.args["num_layers_per_virtual_pipeline_stage"], local.args["moe_grouped_gemm"]) == (1, False)
        assert local.args["transformer_impl"] == "local"


def test_the_vocabulary_is_padded_with_zeros_and_cut_again(tmp_path: Path) -> None:
    model = tiny_model(vocab=100)
    write(tmp_path, model, Layout(tp=4))
    for rank, rows in enumerate([32, 32, 32, 4]):
        content = torch.load(tmp_path / "release" / f"mp_rank_{rank:02d}" / FILE, weights_only=False)
        for name in (EMBEDDING, OUTPUT):
            assert torch.equal(content["model"][name][:rows], model[name][32 * rank : 32 * rank + rows])
            assert content["model"][name].shape == (32, 16)
            assert not content["model"][name][rows:].any()
    with TorchCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.said == [
            f"{name}: the last 28 of 128 rows are padding and left out" for name in (EMBEDDING, OUTPUT)
        ]
    assert read(tmp_path, vocab_size=128)[EMBEDDING].shape == (128, 16)
    assert torch.equal(read(tmp_path, vocab_size=90)[OUTPUT], model[OUTPUT][:90])
    with pytest.raises(BridgeError, match="has 128 rows, a vocabulary of 129 is asked for"):
        read(tmp_path, vocab_size=129)


def test_what_other_libraries_allow_in_files_changes_nothing(tmp_path: Path) -> None:
    """Megatron-Core, once imported, allows torch.load some classes of numpy, but not all that its files hold."""
    model = tiny_model(2)
    write(tmp_path, model)
    path = tmp_path / "release" / "mp_rank_00" / FILE
    content = torch.load(path, weights_only=False)
    torch.save(content | {"rng_state": [np.arange(4, dtype=np.uint32), np.float64(0.1)]}, path)
    with torch.serialization.safe_globals([np.dtype, np.ndarray]):
        allowed = set(torch.serialization.get_safe_globals())
        assert same(read(tmp_path), model)
        assert set(torch.serialization.get_safe_globals()) == allowed


def test_tensors_come_in_the_order_of_the_model(tmp_path: Path) -> None:
    model = tiny_model()
    write(tmp_path, model, Layout(pp=2, vpp=2))
    assert list(read(tmp_path)) == list(model)


def test_each_tensor_is_asked_for_once_in_order(tmp_path: Path) -> None:
    model, asked = tiny_model(experts=4), list[str]()

    def get(name: str) -> torch.Tensor:
        asked.append(name)
        return model[name]

    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in model.items()]
    write_torch(tmp_path, specs, get, Layout(tp=2, ep=2), args={})
    assert asked == list(model)


def test_tensors_that_do_not_lie_in_order_are_written_right(tmp_path: Path) -> None:
    model = {name: tensor.t().contiguous().t() if tensor.dim() > 1 else tensor for name, tensor in tiny_model().items()}
    write(tmp_path, model, Layout(tp=2))
    assert same(read(tmp_path), model)


def test_a_part_on_one_rank_is_no_copy(tmp_path: Path) -> None:
    write(tmp_path, tiny_model())
    with TorchCheckpoint(tmp_path) as checkpoint:
        name = "decoder.layers.0.mlp.linear_fc1.weight"
        assert checkpoint.get(name).data_ptr() == checkpoint.get(name).data_ptr()
        with pytest.raises(KeyError):
            checkpoint.get("decoder.layers.9.mlp.linear_fc1.weight")


# Memory

MEMORY = """
import sys, torch
from pathlib import Path
from finebridge.bridge.parallel import Layout
from finebridge.bridge.torch_format import TorchCheckpoint
from finebridge.bridge.torch_writer import write_torch
from finebridge.storage.safetensors_io import Spec

def own():
    text = Path("/proc/self/status").read_text()
    return int(text.partition("RssAnon:")[2].split()[0]) // 1024

names = {"embedding.word_embeddings.weight": (4096, 2048), "decoder.final_layernorm.weight": (2048,)}
for layer in range(16):
    at = f"decoder.layers.{layer}"
    names |= {f"{at}.self_attention.linear_proj.weight": (2048, 2048), f"{at}.mlp.linear_fc2.weight": (2048, 1024)}
    names |= {f"{at}.mlp.linear_fc1.weight": (2048, 2048)}
specs = [Spec(name, torch.bfloat16, shape) for name, shape in names.items()]
most = 0
def get(name):
    global most
    tensor = torch.full(names[name], 0.5, dtype=torch.bfloat16)
    most = max(most, own())
    return tensor

folder, layout = Path(sys.argv[1]), Layout(tp=2, pp=2, layer_list=(0, 16))
small = [Spec(spec.name, spec.dtype, (4, 4)[: len(spec.shape)]) for spec in specs]
write_torch(folder / "small", small, lambda name: torch.ones((4, 4)[: len(names[name])], dtype=torch.bfloat16), layout, args={})
begin, most = own(), 0
write_torch(folder, specs, get, layout, args={})
print(most - begin)
most, total = 0, 0.0
with TorchCheckpoint(folder) as checkpoint:
    for name in checkpoint.shapes:
        tensor = checkpoint.get(name)
        total += float(tensor.flatten()[:: tensor.shape[-1]].float().sum())
        most = max(most, own())
print(most - begin, sum(spec.size for spec in specs) // 2**20, total)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_is_that_of_two_tensors_whatever_the_model(tmp_path: Path) -> None:
    (tmp_path / "small").mkdir()
    # Freed memory goes back at once, as that of tensors over 32 MiB always does (mallopt(3)).
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    words = [sys.executable, "-c", MEMORY, tmp_path]
    done = subprocess.run(words, capture_output=True, text=True, check=False, env=environment)
    assert not done.returncode, done.stderr
    written, got, size, total = done.stdout.split()
    assert int(size) > 300, "MiB"
    assert float(total) == 0.5 * (4096 + 1 + 16 * 3 * 2048)
    assert int(written) <= 2 * 16 + 8, "MiB; the largest tensor has 16"
    assert int(got) <= 2 * 16 + 8
