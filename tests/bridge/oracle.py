"""Megatron-Core as an oracle: what it computes from canonical tensors, what it writes, and whether it loads what we write.

All of it runs in processes of ``megatron_ranks.py``: a server that starts with the first question and ends with this process.
The model is built from ``bridge.args.to_args`` alone, so that each answer proves the arguments too.
"""

import atexit
import functools
import importlib.metadata
import json
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from finebridge.bridge.args import to_args
from torch import Tensor


def _installed() -> str:
    try:
        return importlib.metadata.version("megatron-core")
    except importlib.metadata.PackageNotFoundError:
        return "none"


needs_megatron = pytest.mark.skipif(
    not _installed().startswith("0.16."),
    reason=f"the oracle is megatron-core 0.16, what stands in for CUDA fits no other; installed is {_installed()}",
)


@functools.cache
def _server() -> subprocess.Popen[str]:
    script = Path(__file__).with_name("megatron_ranks.py")
    log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - open as long as the server
    server = subprocess.Popen(
        [sys.executable, "-W", "ignore", str(script)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
    )  # fmt: skip

    def end() -> None:
        server.stdin.close()  # pyright: ignore[reportOptionalMemberAccess]
        server.wait(30)
        log.close()

    atexit.register(end)
    return server


def _ask(
    do: str, config: Any, *, rows: int | None, dialect: str = "mcore", sizes: Mapping[str, int], **more: Any
) -> list[Any]:
    """Run a request in ranks; what each of them answers, by rank. Raises AssertionError with the ranks' tracebacks."""
    args = to_args(config if isinstance(config, Mapping) else config.to_dict())
    if do == "logits":
        args["mtp_num_layers"] = None  # without labels core 0.16.1 cannot run these layers
    given = {name: more.pop(name) for name in ("canonical", "ids") if name in more}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(given, Path(folder, "input"))
        request = {
            "do": do, "args": args, "out": folder,
            "sizes": {"tp": 1, "pp": 1, "vpp": None, "ep": 1, "etp": sizes.get("tp", 1), **sizes},
            "input": str(Path(folder, "input")), "rows": rows or args["vocab_size"], "fused": dialect == "mcore", **more,
        }  # fmt: skip
        server = _server()
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
        assert answer, "the Megatron server has ended"
        failed = json.loads(answer)["failed"]
        assert not failed, failed
        ranks = sorted(Path(folder).glob("*.pt"), key=lambda path: int(path.stem))
        return [torch.load(rank, weights_only=True) for rank in ranks]


def megatron_logits(config: Any, canonical: Mapping[str, Tensor], ids: Tensor, *, tp: int = 1) -> Tensor:
    """Logits [batch, sequence, vocabulary] that Megatron-Core computes from canonical tensors, in fp32.

    ``config`` is transformers' or the content of a config.json. Every canonical tensor must have a place in the model, and
    every one of the model be given; layers that predict further tokens have no part in logits and are left out.
    """
    return _ask("logits", config, rows=None, canonical=dict(canonical), ids=ids, sizes={"tp": tp})[0]


def lora_logits(
    config: Any, folder: Path, settings: Mapping[str, Any], ids: Tensor, *, base: Path | None, rows: int, tp: int
) -> Tensor:
    """Logits of a model with LoRA, ``folder`` being that of an iteration: a ``torch`` checkpoint with both, computed by PEFT's
    layers on Megatron's, or with ``base`` a ``torch_dist`` one with LoRA alone, computed as in Megatron-Bridge.

    ``settings`` are r, lora_alpha and target_modules, ``rows`` those of the vocabulary, padded in ``torch``.
    """
    form = {"form": "torch_dist", "base": str(base)} if base else {"form": "torch"}
    given = {"folder": str(folder), "lora": dict(settings), "ids": ids, **form}
    return _ask("lora", config, rows=rows, sizes={"tp": tp}, **given)[0]


def save_with_megatron(
    config: Any, canonical: Mapping[str, Tensor], folder: Path, *, form: str = "torch_dist", rows: int | None = None,
    dialect: str = "mcore", metadata: dict[str, Any] | None = None, **sizes: int,
) -> None:  # fmt: skip
    """Let Megatron-Core write a checkpoint of the form ``torch_dist`` or ``torch`` into ``folder``, that of an iteration.

    ``sizes`` are tp, pp, vpp, ep, etp; ``rows`` of the vocabulary, with padding. ``dialect`` mcore gives ``torch_dist`` the
    keys of Transformer Engine's modules, mcore-local those of the local spec; ``torch`` files are always of the latter.
    ``metadata`` is Megatron's content metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    _ask(
        "save", config, rows=rows, dialect=dialect, sizes=sizes, canonical=dict(canonical), folder=str(folder),
        form=form, metadata=metadata,
    )  # fmt: skip


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
    ranks = _ask("load", config, rows=rows, dialect=dialect, sizes=sizes, folder=str(folder), form=form)
    pieces: dict[str, dict[int, Tensor]] = {}
    axes: dict[str, int | None] = {}
    for name, tensor, axis, number in (piece for rank in ranks for piece in rank):
        axes[name] = axis
        known = pieces.setdefault(name, {}).setdefault(number, tensor)
        assert torch.equal(known, tensor), f"{name}: ranks differ"
    return {name: _joined(name, [parts[key] for key in sorted(parts)], axes[name]) for name, parts in pieces.items()}


def _joined(name: str, parts: list[Tensor], axis: int | None) -> Tensor:
    if axis is None:
        return parts[0]
    if name.endswith("linear_fc1.weight"):  # each rank has rows of the gate, then rows of the up projection
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(parts, axis)
