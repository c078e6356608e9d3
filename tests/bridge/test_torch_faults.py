"""Checkpoints of the format ``torch`` that are broken, incomplete or hostile: refused with what is wrong and where."""

import errno
import os
import pickle
import re
import shutil
import subprocess
import zipfile
from argparse import Namespace
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from canonical_models import EMBEDDING, OUTPUT, read, tiny_model, write
from finebridge.bridge import torch_writer
from finebridge.bridge.errors import BridgeError
from finebridge.bridge.parallel import Layout
from finebridge.bridge.torch_format import FILE, TorchCheckpoint
from finebridge.bridge.torch_writer import write_torch
from finebridge.storage.megatron_folder import TRACKER
from finebridge.storage.safe_load import UnsafeFileError
from finebridge.storage.safe_pickle import Inert, load_namespace_file
from finebridge.storage.safetensors_io import Spec

Edit = Callable[[dict[str, Any]], object]
NORM = "decoder.layers.0.self_attention.linear_qkv.layer_norm_weight"


def refused(folder: Path, said: str, kind: type[Exception] = BridgeError) -> None:
    with pytest.raises(kind, match=said):
        read(folder)


def change(path: Path, edit: Edit) -> None:
    """Save a rank's file again with something changed."""
    content = torch.load(path / FILE, weights_only=False)
    edit(content)
    torch.save(content, path / FILE)


def arguments(**values: Any) -> Edit:
    return lambda content: vars(content["args"]).update(values)


# Files that are missing, broken or of several checkpoints


@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(pp=2), Layout(tp=2, pp=2, ep=2), Layout(ep=4), Layout(tp=2, ep=4, etp=1)], ids=str
)
def test_every_missing_file_is_named(tmp_path: Path, layout: Layout) -> None:
    write(tmp_path, tiny_model(experts=4), layout)
    for folder in sorted((tmp_path / "release").iterdir()):
        (folder / FILE).rename(tmp_path / "away")
        refused(tmp_path, f"{folder / FILE}", FileNotFoundError)
        folder.rename(tmp_path / "gone")
        refused(
            tmp_path, f"{re.escape(str(folder / FILE))}: missing; the checkpoint has TP {layout.tp}, PP {layout.pp}"
        )
        (tmp_path / "gone").rename(folder)
        (tmp_path / "away").rename(folder / FILE)
    assert read(tmp_path)


def test_a_file_cut_anywhere_is_refused_by_name(tmp_path: Path) -> None:
    write(tmp_path, tiny_model(1), Layout(tp=2))
    path = tmp_path / "release" / "mp_rank_01" / FILE
    whole = path.read_bytes()
    for size in [*range(0, len(whole), len(whole) // 23), len(whole) - 1]:
        path.write_bytes(whole[:size])
        refused(tmp_path, "mp_rank_01/model_optim_rng.pt: broken", UnsafeFileError)


def test_a_file_that_was_packed_again_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tiny_model(1))
    path = tmp_path / "release" / "mp_rank_00" / FILE
    torch.save(torch.load(path, weights_only=False), tmp_path / "whole")  # with checksums, which zipfile looks at
    with zipfile.ZipFile(tmp_path / "whole") as whole, zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as packed:
        for entry in whole.infolist():
            packed.writestr(entry.filename, whole.read(entry))
    refused(tmp_path, "is compressed", UnsafeFileError)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("mp_rank_02", "mp_rank_02: no folder of a checkpoint with TP 2, PP 1, EP 1, which its arguments say"),
        ("mp_rank_00_000", "its folders are of several checkpoints"),
    ],
)
def test_a_folder_too_many_is_refused(tmp_path: Path, name: str, said: str) -> None:
    write(tmp_path, tiny_model(1), Layout(tp=2))
    shutil.copytree(tmp_path / "release" / "mp_rank_00", tmp_path / "release" / name)
    refused(tmp_path, said)


def test_what_is_no_checkpoint_is_told(tmp_path: Path) -> None:
    refused(tmp_path, f"no {TRACKER} and no folder mp_rank_00")
    refused(tmp_path / "x", "x: no such folder", FileNotFoundError)
    (tmp_path / "__0_0.distcp").touch()
    refused(tmp_path, "of the format torch_dist, not torch")
    (tmp_path / TRACKER).write_text("5")
    refused(tmp_path, "iter_0000005: .* but it is missing", FileNotFoundError)
    for text in ("", "latest", "-1", "../release"):
        (tmp_path / TRACKER).write_text(text)
        refused(tmp_path, '"release" or an iteration is expected')


# Contents that contradict each other


@pytest.mark.parametrize(
    ("edit", "said"),
    [
        (arguments(tensor_model_parallel_size=4), "mp_rank_01/.*: is of another run: {'tp': 2, .*}, others {'tp': 4"),
        (arguments(vocab_size=1000), "has 112 rows, a vocabulary of 1000 is asked for"),
        (lambda content: content.update(checkpoint_version=2.0), "checkpoint_version 2.0; only 3.0 is read"),
        (lambda content: content.pop("checkpoint_version"), "checkpoint_version 0"),
        (lambda content: content.pop("model"), "no model in it; it holds args"),
        (lambda content: content.update(model=3), "model is a int; tensors by name"),
        (lambda content: content["model"].update(x=3), "x in model is a int, no plain tensor"),
        (lambda content: content["model"].update(x=torch.eye(2).to_sparse()), "x in model is a _rebuild_sparse_tensor"),
        (lambda content: content["model"].update(x=torch.ones(2)), "tensor x: how Megatron-Core spreads it"),
        (lambda content: content["model"].pop(NORM), f"mp_rank_00/.*: tensor {NORM} is missing; it is a part of"),
        (
            lambda content: content["model"].pop("decoder.layers.1.mlp.linear_fc2.weight"),
            "mp_rank_00/.*: tensor decoder.layers.1.mlp.linear_fc2.weight is missing",
        ),
        (lambda content: content["model"].update({NORM: torch.ones(4)}), r"layer_norm_weight is \(16,\) .* it is \(4,\)"),
        (lambda content: content["model"].update({NORM: torch.ones(16).half()}), "float32, in mp_rank_00 it is .*float16"),
    ],
)  # fmt: skip
def test_what_does_not_fit_the_rest_is_refused(tmp_path: Path, edit: Edit, said: str) -> None:
    write(tmp_path, tiny_model(2), Layout(tp=2))
    change(tmp_path / "release" / "mp_rank_00", edit)
    refused(tmp_path, said)


@pytest.mark.parametrize(
    ("values", "said"),
    [
        (
            {"tensor_model_parallel_size": 4},
            "mp_rank_02/model_optim_rng.pt: missing; the checkpoint has TP 4, PP 1, EP 1",
        ),
        (
            {"tensor_model_parallel_size": 1, "expert_tensor_parallel_size": 1},
            "mp_rank_01: no folder .* with TP 1, PP 1",
        ),
        ({"pipeline_model_parallel_size": 2}, "mp_rank_00: no folder of a checkpoint with TP 2, PP 2"),
        ({"expert_model_parallel_size": 2}, "mp_rank_00: no folder of a checkpoint with TP 2, PP 1, EP 2"),
    ],
)
def test_other_sizes_in_the_arguments_than_in_the_names_are_refused(
    tmp_path: Path, values: dict[str, int], said: str
) -> None:
    write(tmp_path, tiny_model(1), Layout(tp=2))
    for folder in (tmp_path / "release").iterdir():
        change(folder, arguments(**values))
    refused(tmp_path, said)


def test_a_layer_that_is_missing_is_told(tmp_path: Path) -> None:
    def drop(content: dict[str, Any]) -> None:
        content["model"] = {name: value for name, value in content["model"].items() if "layers.0." not in name}

    write(tmp_path, tiny_model(2))
    change(tmp_path / "release" / "mp_rank_00", drop)
    refused(tmp_path, "decoder.layers.0 is missing, decoder.layers.1 is there")


def test_a_tensor_on_the_wrong_stage_is_told(tmp_path: Path) -> None:
    write(tmp_path, tiny_model(2), Layout(pp=2))
    change(
        tmp_path / "release" / "mp_rank_00_000",
        lambda content: content["model"].update({"decoder.final_layernorm.weight": torch.ones(16)}),
    )
    refused(tmp_path, "mp_rank_00_000/.*: tensor decoder.final_layernorm.weight is not expected there")


def test_chunks_that_the_arguments_do_not_say_are_refused(tmp_path: Path) -> None:
    write(tmp_path, tiny_model(4), Layout(pp=2, vpp=2))
    for folder in (tmp_path / "release").iterdir():
        change(folder, arguments(virtual_pipeline_model_parallel_size=None))
    refused(tmp_path, "its files hold 2 chunks of layers, its arguments say 1")
    change(folder, lambda content: content.update(model1=content.pop("model0")))
    refused(tmp_path, "no model in it; it holds .*model1")


@pytest.mark.parametrize(
    ("layout", "name", "made"),
    [
        (Layout(tp=2), NORM, {}),
        (Layout(ep=2), "decoder.layers.0.mlp.linear_fc1.weight", {"experts": 2}),
        (Layout(ep=2), EMBEDDING, {"experts": 2}),
        (Layout(tp=2, pp=2), OUTPUT, {"tied": True}),
        (Layout(tp=4, ep=2, etp=1), "decoder.layers.1.mlp.experts.linear_fc1.weight0", {"experts": 2}),
    ],
    ids=["norm", "dense", "embedding", "tied", "expert"],
)
def test_copies_must_be_equal(tmp_path: Path, layout: Layout, name: str, made: dict[str, Any]) -> None:
    write(tmp_path, tiny_model(2, **made), layout)
    folder = max((tmp_path / "release").iterdir())

    def touch(content: dict[str, Any]) -> None:
        content["model"][name].view(-1)[-1] += 1

    assert read(tmp_path)
    change(folder, touch)
    refused(tmp_path, f"{folder.name}/{FILE}: .* is not equal to .* both must be the same part of")


def test_copies_with_nan_are_equal(tmp_path: Path) -> None:
    model = tiny_model(2)
    model[NORM][3] = float("nan")
    write(tmp_path, model, Layout(tp=2))
    assert read(tmp_path)[NORM].isnan().nonzero().tolist() == [[3]]


# Files without arguments, and of others


@pytest.mark.parametrize(
    "layout", [Layout(tp=2), Layout(pp=2), Layout(ep=2), Layout(2, 2, None, 2), Layout(pp=2, vpp=2)], ids=str
)
def test_without_arguments_the_names_tell_the_layout(tmp_path: Path, layout: Layout) -> None:
    model = tiny_model(vocab=128, experts=2)
    write(tmp_path, model, layout)
    for folder in (tmp_path / "release").iterdir():
        change(folder, lambda content: content.pop("args"))
    with TorchCheckpoint(tmp_path) as checkpoint:
        assert checkpoint.layout == layout
        assert checkpoint.args == {}
    found = read(tmp_path)
    assert [name for name, tensor in model.items() if not torch.equal(found[name], tensor)] == []


def test_files_of_all_pairs_of_ranks_are_read_too(tmp_path: Path) -> None:
    """With etp 1 Megatron has no rank (0, 1), other writers make a file for it."""
    model = tiny_model(2, experts=2)
    write(tmp_path, model, Layout(tp=2, ep=2, etp=1))
    release = tmp_path / "release"
    for target, dense, expert in [("00_001", "00_000", "01_001"), ("01_000", "01_001", "00_000")]:
        content = torch.load(release / f"mp_rank_{dense}" / FILE, weights_only=False)
        other = torch.load(release / f"mp_rank_{expert}" / FILE, weights_only=False)
        content["model"] |= {name: value for name, value in other["model"].items() if ".mlp.experts." in name}
        (release / f"mp_rank_{target}").mkdir()
        torch.save(content, release / f"mp_rank_{target}" / FILE)
    found = read(tmp_path)
    assert [name for name, tensor in model.items() if not torch.equal(found[name], tensor)] == []
    change(release / "mp_rank_00_001", lambda content: content["model"][NORM].add_(1))
    refused(tmp_path, "mp_rank_00_001/.* is not equal to")


def test_multi_token_prediction_may_be_on_any_stage(tmp_path: Path) -> None:
    """As ``--pipeline-model-parallel-layout Et|t|t|m|L`` puts it."""
    model = tiny_model(3, mtp=1)
    write(tmp_path, model, Layout(pp=4, layer_list=(1, 1, 1, 0)))
    stages = [tmp_path / "release" / f"mp_rank_00_{number:03d}" for number in range(4)]
    last = torch.load(stages[3] / FILE, weights_only=False)["model"]
    moved = {name: value for name, value in last.items() if name.startswith(("mtp.", EMBEDDING))}
    change(stages[2], lambda content: content["model"].update(moved))
    change(stages[3], lambda content: [content["model"].pop(name) for name in moved])
    found = read(tmp_path)
    assert [name for name, tensor in model.items() if not torch.equal(found[name], tensor)] == []
    change(stages[2], lambda content: content["model"][EMBEDDING].add_(1))
    refused(tmp_path, "mp_rank_00_002/.*: embedding.* is not equal to")


def test_a_tensor_under_two_names_is_refused(tmp_path: Path) -> None:
    write(tmp_path, tiny_model(2))
    change(
        tmp_path / "release" / "mp_rank_00",
        lambda content: content["model"].update({"decoder.layers.0.input_layernorm.weight": torch.ones(16)}),
    )
    refused(tmp_path, f"tensor {NORM} is there under two names")


# Hostile files


class Calls:
    """An object whose unpickling calls a function."""

    def __init__(self, function: Callable[..., object], *arguments: object) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


class Holds:
    """An object of an allowed class whose state is the result of a call."""

    def __init__(self, function: Callable[..., object], argument: object) -> None:
        self.call = (Namespace, (), {"x": Calls(function, argument)})

    def __reduce__(self) -> Any:
        return self.call


def hostile(canary: Path) -> list[dict[str, Any]]:
    touch = f"open({str(canary)!r}, 'w').close()"
    system, evaluate = Calls(os.system, f"touch {canary}"), Calls(eval, touch)
    run = Calls(subprocess.run, ["touch", str(canary)])
    calls: list[Any] = [
        system, evaluate, Calls(exec, touch), Calls(subprocess.Popen, ["touch", str(canary)]), run,
        Calls(getattr, Calls(__import__, "os"), "system"), Calls(pickle.loads, pickle.dumps(system)),
        Calls(torch.load, str(canary)), Calls(shutil.copy, "/bin/true", str(canary)), Calls(open, str(canary), "w"),
        Holds(os.system, f"touch {canary}"), Calls(map, os.system, [f"touch {canary}"]),
    ]  # fmt: skip
    base = {"checkpoint_version": 3.0, "args": Namespace(), "model": {"x": torch.ones(1)}}
    inside = [{**base, "args": Namespace(model_type=call)} for call in calls]
    outside = [{**base, key: {"state": [OrderedDict(x=(call,))]}} for key in ("optimizer", "model") for call in calls]
    return [*inside, *outside, {**base, "rng_state": {system: 1}}]


def test_hostile_files_run_nothing_and_are_named(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    folder = tmp_path / "release" / "mp_rank_00"
    folder.mkdir(parents=True)
    files = hostile(canary)
    assert len(files) >= 20
    for content in files:
        torch.save(content, folder / FILE)
        refused(
            folder.parent, r"names \S+, which has no place in a checkpoint of Megatron and could run", UnsafeFileError
        )
        for protocol in (2, 4):
            (folder / FILE).write_bytes(pickle.dumps(content, protocol))
            refused(folder.parent, "broken, or not what torch.save wrote", UnsafeFileError)
    assert not canary.exists()


def test_the_payloads_would_run_where_they_are_trusted(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    for content in hostile(canary)[:5]:
        torch.save(content, tmp_path / FILE)
        torch.load(tmp_path / FILE, weights_only=False)
        for _ in range(100):
            if canary.exists():
                break
            subprocess.run(["sleep", "0.05"], check=True)
        assert canary.exists()
        canary.unlink()


class _Settings:
    """Stands for a class of Megatron: pickled under its name, never imported."""

    def __init__(self, value: object) -> None:
        self.value = value


def test_objects_of_megatron_are_kept_as_they_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys
    import types

    for module in ("megatron", "megatron.core", "megatron.core.made_up"):
        monkeypatch.setitem(sys.modules, module, types.ModuleType(module))
    monkeypatch.setattr(_Settings, "__module__", "megatron.core.made_up")
    monkeypatch.setattr(sys.modules["megatron.core.made_up"], "_Settings", _Settings, raising=False)
    content = {
        "one": _Settings(3),
        "two": Path("/x"),
        "three": torch.bfloat16,
        "four": deque([1], 2),
        "five": defaultdict(int, a=1),
    }
    torch.save({"args": Namespace(**content)}, tmp_path / FILE)
    args = load_namespace_file(tmp_path / FILE)["args"]
    assert isinstance(args.one, Inert)
    assert args.one.state == {"value": 3}
    assert (args.two.named, args.two.args) == ("pathlib.PosixPath", ("/", "x"))
    assert (args.three, args.four, args.five) == (torch.bfloat16, [1], {"a": 1})
    torch.save([Namespace()], tmp_path / FILE)
    with pytest.raises(UnsafeFileError, match="a dictionary by name is expected"):
        load_namespace_file(tmp_path / FILE)


# Writing


@pytest.mark.parametrize(
    ("layout", "changes", "said"),
    [
        (Layout(tp=4), {"args": {"num_query_groups": 2}}, "--tp 4: the model has 2 query groups"),
        (Layout(tp=16), {}, r"--tp 16: tensor .*linear_fc1.weight \(48, 16\) cannot be cut evenly"),
        (Layout(pp=3), {}, "2 layers cannot be spread evenly over --pp 3"),
        (Layout(ep=3), {}, "--ep 3: 2 experts"),
        (Layout(etp=2), {}, "--etp 2 does not divide --tp 1"),
        (Layout(), {"dialect": "nemo"}, "--dialect nemo: not known"),
        (
            Layout(tp=8),
            {"dialect": "mindspeed"},
            "--tp 8: the vocabulary of 100 rows cannot be cut evenly, and --dialect mind",
        ),
        (
            Layout(tp=8),
            {"dialect": "pai"},
            "--tp 8: the vocabulary of 100 rows cannot be cut evenly, and --dialect pai",
        ),
        (Layout(), {"iteration": 0}, "iteration 0: Megatron reads checkpoints from iteration 1 on"),
    ],
)
def test_what_cannot_be_written_is_told_before_anything_is(
    tmp_path: Path, layout: Layout, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(BridgeError, match=said):
        write(tmp_path, tiny_model(2, experts=2), layout, **changes)
    assert list(tmp_path.iterdir()) == []


def test_a_model_without_layers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BridgeError, match="no layers"):
        write(tmp_path, {EMBEDDING: torch.ones(8, 4)})


@pytest.mark.parametrize("wrong", [torch.ones(4), torch.ones(16).half()])
def test_a_tensor_that_is_not_what_was_announced_is_named(tmp_path: Path, wrong: torch.Tensor) -> None:
    model = tiny_model(2)
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in model.items()]
    with pytest.raises(BridgeError, match=rf"tensor {NORM} is .*; \(16,\) torch.float32 was announced"):
        write_torch(tmp_path, specs, (model | {NORM: wrong}).__getitem__, Layout(), args={})


def test_room_is_looked_for_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_writer, "free_bytes", lambda _: 1000)
    with pytest.raises(OSError, match=r"the checkpoint needs [\d,]+ bytes") as caught:
        write(tmp_path, tiny_model(2))
    assert caught.value.errno == errno.ENOSPC
    assert list(tmp_path.iterdir()) == []


def test_a_disk_that_fills_up_is_an_error_with_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(torch_writer.os, "pwrite", full)
    with pytest.raises(OSError, match="mp_rank_00/model_optim_rng.pt") as caught:
        write(tmp_path, tiny_model(2))
    assert caught.value.errno == errno.ENOSPC


def test_torch_writes_checksums_again_afterwards(tmp_path: Path) -> None:
    assert torch.serialization.get_crc32_options()
    write(tmp_path, tiny_model(2))
    assert torch.serialization.get_crc32_options()
