"""Megatron-Core as an oracle: what it computes from canonical tensors, what it writes, and whether it loads what we write.

All of it runs in processes of ``megatron_server.py``: a server that starts with the first question and ends with this process.
The model is built from Megatron's arguments alone, so that each answer proves ``bridge.args.to_args`` too.
"""

import atexit
import functools
import importlib.metadata
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.args import to_args
from torch import Tensor

from .megatron_parts import sections


def _installed() -> str:
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return "none"


needs_megatron = pytest.mark.skipif(
    not _installed().startswith("0.16."),
    reason=f"the oracle is megatron-core 0.16, what stands in for CUDA fits no other; installed is {_installed()}",
)


# A folder with an unpacked wheel of megatron-core 0.19, to be asked too; what it stores is in golden/.
NEWER = os.environ.get("FINEBRIDGE_MEGATRON_019", "")


@functools.cache
def _server(core: str) -> subprocess.Popen[str]:
    script = Path(__file__).with_name("megatron_server.py")
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the server
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [core, os.environ.get("PYTHONPATH")]))},
    )  # fmt: skip

    def end() -> None:
        server.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        server.wait(30)
        log.close()

    atexit.register(end)
    return server


def ask(
    model: Any, *steps: Mapping[str, Any], rows: int | None = None, dialect: str = "mcore", stages: str = "", core: str = "",
    distributed: bool = False, **sizes: int,
) -> list[list[Any]]:  # fmt: skip
    """Do the steps of ``megatron_server.STEPS`` in ranks; what each answers, by rank and by step.

    ``model``: a config of transformers, the content of a config.json, or Megatron's arguments. ``sizes`` are tp, pp, vpp, ep,
    etp; ``distributed`` tells the optimizer of training; ``core`` is a folder with another megatron-core. Raises
    AssertionError with the ranks' tracebacks.
    """
    args = dict(model) if isinstance(model, Mapping) else model.to_dict()
    if "num_layers" not in args:
        after = str(args["model_type"]).startswith("hunyuan")  # what --allow_patched_attention asks for
        args = to_args(args) | {"norms_after_rotation": after}
    if any(step["do"] in ("logits", "lora") for step in steps):
        args["mtp_num_layers"] = None  # without labels core 0.16.1 cannot run these layers
    with tempfile.TemporaryDirectory() as folder:
        request = {
            "args": args, "rows": rows or args["vocab_size"], "fused": dialect == "mcore", "stages": stages, "out": folder,
            "distributed": distributed,
            "sizes": {"tp": 1, "pp": 1, "vpp": None, "ep": 1, "etp": sizes.get("tp", 1), **sizes},
            "steps": [_on_disk(step, Path(folder, f"step{number}")) for number, step in enumerate(steps)],
        }  # fmt: skip
        server = _server(core)
        print(json.dumps(request, default=str), file=server.stdin, flush=True)
        answer = server.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
        assert answer, "the Megatron server has ended"
        failed = json.loads(answer)["failed"]
        assert not failed, failed
        ranks = sorted(Path(folder).glob("*.pt"), key=lambda path: int(path.stem))
        return [torch.load(rank, weights_only=True) for rank in ranks]


def _on_disk(step: Mapping[str, Any], path: Path) -> dict[str, Any]:
    if "canonical" not in step:
        return dict(step)
    torch.save(dict(step["canonical"]), path)
    return {**step, "canonical": path}


def fill(canonical: Mapping[str, Tensor]) -> dict[str, Any]:
    """The step that gives the model canonical tensors."""
    return {"do": "fill", "canonical": canonical}


def save(folder: Path, form: str, metadata: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """The step that writes a checkpoint into ``folder``, that of an iteration; ``metadata`` is Megatron's content metadata."""
    return {"do": "save", "folder": folder, "form": form, "metadata": metadata}


def load(folder: Path, form: str) -> dict[str, Any]:
    """The step that reads one, with default strictness."""
    return {"do": "load", "folder": folder, "form": form}


PIECES = {"do": "pieces"}


def megatron_logits(config: Any, canonical: Mapping[str, Tensor], ids: Tensor, *, tp: int = 1) -> Tensor:
    """Logits [batch, sequence, vocabulary] that Megatron-Core computes from canonical tensors, in fp32.

    ``config`` is transformers' or the content of a config.json. Every canonical tensor must have a place in the model, and
    every one of the model be given; layers that predict further tokens have no part in logits and are left out.
    """
    own = {name: value for name, value in canonical.items() if not name.startswith("mtp.")}
    steps = fill(own), PIECES, {"do": "logits", "ids": ids.tolist()}
    ranks = ask(config, *steps, tp=tp)
    held = {piece[0] for rank in ranks for piece in rank[1]}
    assert not held ^ own.keys(), f"only in the model or only given: {sorted(held ^ own.keys())}"
    return ranks[0][2]


def lora_logits(
    config: Any, folder: Path, settings: Mapping[str, Any], ids: Tensor, *, base: Path | None, rows: int, tp: int
) -> Tensor:
    """Logits of a model with LoRA, ``folder`` being that of an iteration: a ``torch`` checkpoint with both, computed by PEFT's
    layers on Megatron's, or with ``base`` a ``torch_dist`` one with LoRA alone, computed as in Megatron-Bridge.

    ``settings`` are r, lora_alpha and target_modules, ``rows`` those of the vocabulary, padded in ``torch``.
    """
    step = {"do": "lora", "folder": folder, "base": base, "lora": dict(settings), "ids": ids.tolist()}
    return ask(config, step, rows=rows, tp=tp)[0][0]


def save_with_megatron(
    config: Any, canonical: Mapping[str, Tensor], folder: Path, *, form: str = "torch_dist", rows: int | None = None,
    dialect: str = "mcore", metadata: dict[str, Any] | None = None, **sizes: int,
) -> None:  # fmt: skip
    """Let Megatron-Core write a checkpoint of the form ``torch_dist`` or ``torch`` into ``folder``, that of an iteration.

    ``sizes`` are tp, pp, vpp, ep, etp; ``rows`` of the vocabulary, with padding. ``dialect`` mcore gives ``torch_dist`` the
    keys of Transformer Engine's modules, mcore-local those of the local spec; ``torch`` files are always of the latter.
    ``metadata`` is Megatron's content metadata.
    """
    ask(config, fill(canonical), save(folder, form, metadata), rows=rows, dialect=dialect, **sizes)


def load_with_megatron(
    config: Any,
    folder: Path,
    *,
    form: str = "torch_dist",
    rows: int | None = None,
    dialect: str = "mcore",
    **sizes: int,
) -> dict[str, Tensor]:
    """Canonical tensors of a checkpoint as the ranks of Megatron-Core loaded it, with default strictness.

    Ranks that hold the same must hold the same bits. Without ``rows`` the model has the vocabulary of the config.
    """
    ranks = ask(config, load(folder, form), PIECES, rows=rows, dialect=dialect, **sizes)
    return joined([rank[1] for rank in ranks], to_args(config if isinstance(config, Mapping) else config.to_dict()))


def joined(ranks: Sequence[list[Any]], args: Mapping[str, Any] | None = None) -> dict[str, Tensor]:
    """Canonical tensors of what ranks answer to PIECES; ``args`` are Megatron's, for models with delta nets."""
    parts: dict[str, dict[int, Tensor]] = {}
    axes: dict[str, int | None] = {}
    for name, tensor, axis, number in (piece for rank in ranks for piece in rank):
        axes[name] = axis
        known = parts.setdefault(name, {}).setdefault(number, tensor)
        assert torch.equal(known, tensor), f"{name}: ranks differ"
    return {
        name: _whole(name, [found[key] for key in sorted(found)], axes[name], sections(args or {}, name))
        for name, found in parts.items()
    }


def _whole(name: str, parts: list[Tensor], axis: int | None, rows: list[int] | None) -> Tensor:
    if axis is None:
        return parts[0]
    if rows:  # of each tensor that this one joins
        split = [part.split([size // len(parts) for size in rows]) for part in parts]
        return torch.cat([piece for pieces in zip(*split, strict=True) for piece in pieces])
    if name.endswith("linear_fc1.weight"):  # each rank has rows of the gate, then rows of the up projection
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(parts, axis)
