"""What Megatron-Core 0.16 and 0.19 store, name by name, for a tiny model of each kind: ``golden/keys_*.json``.

The installed version is asked again whether it still stores that; so is 0.19 where FINEBRIDGE_MEGATRON_019 names a folder
with its unpacked wheel. FINEBRIDGE_WRITE_GOLDEN=1 writes the files anew.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed.checkpoint as dcp
from canonical_models import args_of, tiny_model, write
from finebridge.bridge.dist_format import DistCheckpoint, write_dist
from finebridge.bridge.torch_format import TorchCheckpoint
from finebridge.storage.safe_pickle import load_namespace_file
from finebridge.storage.safetensors_io import Spec
from torch.distributed.checkpoint.metadata import TensorStorageMetadata

from .dist_by_hand import ByHand
from .oracle import NEWER, PIECES, ask, fill, joined, load, needs_megatron, save

Keys = dict[str, list[int] | None]  # the shape of a tensor, null of an object
GOLDEN = Path(__file__).parent / "golden"
SMALL = {"layers": 2, "vocab": 8, "hidden": 8, "heads": 2, "groups": 2, "ffn": 12}
KINDS: dict[str, dict[str, Any]] = {
    "dense": {"bias": True},
    "tied": {"tied": True},
    "experts": {"experts": 2, "dense": 0},
    "mixed with further tokens": {"experts": 2, "mtp": 1},
    "latent": {"experts": 2, "mla": True},
}
FORMS = {"torch_dist mcore": "mcore", "torch_dist mcore-local": "mcore-local", "torch": "mcore"}
VERSIONS = ["0.16", "0.19"]
FILE = "model_optim_rng.pt"


def golden(version: str) -> dict[str, dict[str, Keys]]:
    return json.loads((GOLDEN / f"keys_{version}.json").read_text())


def keys_in(folder: Path, form: str) -> Keys:
    """Names and shapes in a checkpoint, read without Megatron and without the bridge's rules."""
    if form == "torch":
        state = load_namespace_file(folder / "mp_rank_00" / FILE)["model"]
        return {name: None if value is None else list(value.shape) for name, value in sorted(state.items())}
    table = dcp.FileSystemReader(folder).read_metadata().state_dict_metadata
    return {
        key: list(entry.size) if isinstance(entry, TensorStorageMetadata) else None
        for key, entry in sorted(table.items())
    }


def stored(kind: str, folder: Path, core: str) -> dict[str, Keys]:
    """What Megatron-Core stores of a kind, by form."""
    made, found = SMALL | KINDS[kind], {}
    for form, dialect in FORMS.items():
        place = folder / form
        steps = fill(tiny_model(gate=False, **made)), save(place, form.split()[0])
        ask(args_of(**made), *steps, dialect=dialect, core=core)
        found[form] = keys_in(place, form)
    return found


def assert_stored(version: str, folder: Path, core: str) -> None:
    found = {kind: stored(kind, folder / kind, core) for kind in KINDS}
    if os.environ.get("FINEBRIDGE_WRITE_GOLDEN"):
        lines = re.sub(r"\[[\d,\s]+\]", lambda shape: re.sub(r"\s+", " ", shape[0]), json.dumps(found, indent=1))
        (GOLDEN / f"keys_{version}.json").write_text(lines + "\n")
    assert found == golden(version)


@needs_megatron
def test_the_installed_megatron_stores_what_is_written_down(tmp_path: Path) -> None:
    assert_stored("0.16", tmp_path, "")


needs_newer = pytest.mark.skipif(
    not NEWER, reason="FINEBRIDGE_MEGATRON_019 names no unpacked wheel of megatron-core 0.19"
)


@needs_newer
def test_the_newer_megatron_stores_what_is_written_down(tmp_path: Path) -> None:
    assert_stored("0.19", tmp_path, NEWER)


MOVED = (
    "mixed with further tokens",
    "torch",
)  # 0.19 cannot load what 0.16 saved either: a name in its model is another


@needs_newer
@pytest.mark.parametrize(("kind", "form"), [(kind, form) for kind in KINDS for form in FORMS if (kind, form) != MOVED])
def test_the_newer_megatron_loads_ours_and_its_own_is_read(kind: str, form: str, tmp_path: Path) -> None:
    canonical = written(tmp_path, kind, form)
    name = form.split(maxsplit=1)[0]
    steps = load(tmp_path / "ours", name), PIECES, save(tmp_path / "theirs", name)
    ranks = ask(args_of(**SMALL | KINDS[kind]), *steps, dialect=FORMS[form], core=NEWER)
    found = joined([rank[1] for rank in ranks])
    for tensors in (found, read(tmp_path / "theirs", form)):
        assert tensors.keys() == canonical.keys()
        assert [name for name, tensor in canonical.items() if not torch.equal(tensors[name], tensor)] == []


@needs_newer
def test_the_newer_megatron_has_another_name_in_files_for_one_layout(tmp_path: Path) -> None:
    kind, form = MOVED
    canonical = written(tmp_path, kind, form)
    args = args_of(**SMALL | KINDS[kind])
    with pytest.raises(AssertionError, match="Missing key.*mtp_model_layer"):
        ask(args, load(tmp_path / "ours", form), core=NEWER)
    ask(args, fill(canonical), save(tmp_path / "theirs", form), core=NEWER)
    found = read(tmp_path / "theirs", form)
    assert found.keys() == canonical.keys()
    assert [name for name, tensor in canonical.items() if not torch.equal(found[name], tensor)] == []


def written(folder: Path, kind: str, form: str) -> dict[str, torch.Tensor]:
    """Write a kind into ``ours``; its canonical tensors."""
    made = SMALL | KINDS[kind]
    canonical, args = tiny_model(gate=False, **made), args_of(**made)
    if form == "torch":
        write(folder / "run", canonical, dialect="mcore-local", args=args)
        (folder / "run" / "release").rename(folder / "ours")
        return canonical
    (folder / "ours").mkdir()
    specs = [Spec(name, tensor.dtype, tuple(tensor.shape)) for name, tensor in canonical.items()]
    uniform = not isinstance(args.get("moe_layer_freq"), list)
    more: dict[str, Any] = {"args": args, "iteration": 1, "uniform": uniform, "dialect": form.split()[1]}
    write_dist(folder / "ours", specs, canonical.__getitem__, **more)
    return canonical


def read(folder: Path, form: str) -> dict[str, torch.Tensor]:
    with TorchCheckpoint(folder) if form == "torch" else DistCheckpoint(folder) as checkpoint:
        return {name: checkpoint.get(name).clone() for name in checkpoint.shapes}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_has_the_keys_of_0_16(kind: str, tmp_path: Path) -> None:
    for form in FORMS:
        folder = tmp_path / form
        folder.mkdir()
        written(folder, kind, form)
        found, wanted = keys_in(folder / "ours", form), golden("0.16")[kind][form]
        tensors = {key: shape for key, shape in found.items() if shape}
        assert tensors == {key: shape for key, shape in wanted.items() if shape}
        objects = {key for key, shape in wanted.items() if shape is None}
        assert objects <= found.keys()
        assert form != "torch" or found == wanted


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("kind", KINDS)
def test_the_keys_of_both_versions_are_read(kind: str, version: str, tmp_path: Path) -> None:
    wanted = {name: tuple(tensor.shape) for name, tensor in tiny_model(gate=False, **SMALL | KINDS[kind]).items()}
    for form in FORMS:
        keys = golden(version)[kind][form]
        folder = tmp_path / form
        if form == "torch":
            state = {name: None if shape is None else torch.zeros(shape) for name, shape in keys.items()}
            (folder / "mp_rank_00").mkdir(parents=True)
            torch.save({"model": state, "checkpoint_version": 3.0}, folder / "mp_rank_00" / FILE)
            with TorchCheckpoint(folder) as checkpoint:
                assert checkpoint.shapes == wanted
            continue
        made = ByHand(folder)
        made.common = made.common if version == "0.16" else None
        for key, shape in keys.items():
            if shape:
                made.add(key, torch.zeros(shape))
            else:
                made.add_object(key, {"iteration": 5} if key.startswith("common_state") else None)
        with DistCheckpoint(made.close()) as checkpoint:
            assert checkpoint.shapes == wanted
            assert checkpoint.iteration == 5
