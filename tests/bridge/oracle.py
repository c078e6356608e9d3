"""Megatron-Core as an oracle: what it computes from canonical tensors, what it writes, and whether it loads what we write.

All of it runs in processes of ``megatron_ranks.py``: a server that starts with the first question and ends with this process.
The model is built from ``bridge.args.to_args`` alone, so that each answer proves the arguments too.
"""

import atexit
import functools
import importlib.util
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

needs_megatron = pytest.mark.skipif(
    importlib.util.find_spec("megatron") is None, reason="megatron-core is not installed; it is the oracle here"
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


def _ask(config: Any, do: str, *, tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1, **more: Any) -> list[Any]:
    """Run a request in ranks; what each of them answers, by rank. Raises AssertionError with the ranks' tracebacks."""
    args = to_args(config if isinstance(config, Mapping) else config.to_dict())
    given = {name: more.pop(name) for name in ("canonical", "ids") if name in more}
    with tempfile.TemporaryDirectory() as folder:
        torch.save(given, Path(folder, "input"))
        request = {
            "do": do, "args": args, "sizes": {"tp": tp, "pp": pp, "ep": ep, "etp": etp}, "out": folder,
            "input": str(Path(folder, "input")), **more,
        }  # fmt: skip
        server = _server()
        print(json.dumps(request), file=server.stdin, flush=True)
        answer = server.stdout.readline()  # pyright: ignore[reportOptionalMemberAccess]
        assert answer, "the Megatron server has ended"
        failed = json.loads(answer)["failed"]
        assert not failed, failed
        ranks = sorted(Path(folder).glob("*.pt"), key=lambda path: int(path.stem))
        return [torch.load(rank, weights_only=True) for rank in ranks]


def megatron_logits(
    config: Any, canonical: Mapping[str, torch.Tensor], ids: torch.Tensor, *, tp: int = 1
) -> torch.Tensor:
    """Logits [batch, sequence, vocabulary] that Megatron-Core computes from canonical tensors, in fp32.

    ``config`` is transformers' or the content of a config.json. Every canonical tensor must have a place in the model, and
    every one of the model be given; layers that predict further tokens have no part in logits and are left out.
    """
    return _ask(config, "logits", canonical=dict(canonical), ids=ids, tp=tp)[0]


def save_with_megatron(
    config: Any, canonical: Mapping[str, torch.Tensor], folder: Path, *, tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1,
    rows: int | None = None, dialect: str = "mcore", metadata: dict[str, Any] | None = None,
) -> None:  # fmt: skip
    """Let Megatron-Core write a ``torch_dist`` checkpoint into ``folder``.

    ``rows`` of the vocabulary, padding included. ``dialect`` mcore has the keys of Transformer Engine's modules,
    mcore-local what the local spec gives. ``metadata`` is Megatron's content metadata.
    """
    folder.mkdir(parents=True, exist_ok=True)
    own = canonical["embedding.word_embeddings.weight"].shape[0]
    _ask(
        config, "save", tp=tp, pp=pp, ep=ep, etp=etp, canonical=dict(canonical), folder=str(folder), rows=rows or own,
        fused=dialect == "mcore", metadata=metadata,
    )  # fmt: skip


def load_with_megatron(
    config: Any, folder: Path, *, tp: int = 1, pp: int = 1, ep: int = 1, etp: int = 1, rows: int | None = None,
    dialect: str = "mcore",
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Canonical tensors of a ``torch_dist`` checkpoint as the ranks of Megatron-Core loaded it, default strictness.

    Ranks that hold the same must hold the same bits. Without ``rows`` the model has the vocabulary of the config.
    """
    size = config["vocab_size"] if isinstance(config, Mapping) else config.vocab_size
    ranks = _ask(
        config, "load", tp=tp, pp=pp, ep=ep, etp=etp, folder=str(folder), rows=rows or size, fused=dialect == "mcore"
    )
    pieces: dict[str, dict[int, torch.Tensor]] = {}
    axes: dict[str, int | None] = {}
    for rank in ranks:
        for name, (tensor, axis, number, _) in rank.items():
            axes[name] = axis
            known = pieces.setdefault(name, {}).setdefault(number, tensor)
            assert torch.equal(known, tensor), f"{name}: ranks differ"
    return {name: _joined(name, [parts[key] for key in sorted(parts)], axes[name]) for name, parts in pieces.items()}


def _joined(name: str, parts: list[torch.Tensor], axis: int | None) -> torch.Tensor:
    if axis is None:
        return parts[0]
    if name.endswith("linear_fc1.weight"):  # each rank has rows of the gate, then rows of the up projection
        halves = [part.chunk(2) for part in parts]
        return torch.cat([half[0] for half in halves] + [half[1] for half in halves])
    return torch.cat(parts, axis)
