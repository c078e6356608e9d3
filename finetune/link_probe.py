"""One node's part of an all-reduce over all nodes of a run: whether they reach one another, and how fast.

Started by ``preflight.py`` as ``node_probe.py`` is, one process a node. With GPUs on every node the first one of each is
used, by NCCL; else it is gloo. It waits for its number when torch is imported, so that no node waits for another's disk.
"""

import json
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from importlib import import_module
from typing import Any

from .interface import lead_gloo
from .node_job import Job
from .node_probe import spoken_to, tell, told

_IMPORT_WITHIN = 90  # seconds
_PAIR, _PAIR_GPU = 2**20, 2**24  # bytes that two nodes send each other
_TRIES, _TRY_FOR = 200, 0.3  # exchanges of a pair at most, and seconds
_LARGEST, _LONG_ENOUGH = 2**28, 0.25  # bytes of an all-reduce at most, and seconds that one should take


def main() -> int:
    """Measure; 0 when it could tell how that went."""
    found = told(sys.argv[1:])
    if isinstance(found, int):
        return found
    job, number = found
    signal.alarm(_IMPORT_WITHIN)
    asked: dict[str, Any] = json.loads(job.argv[0])
    lead_gloo(job)  # as the ranks will have it
    import_module("torch.distributed")  # it is what takes time
    if asked["gpu"]:
        import_module("torch").zeros(1, device="cuda")  # and so does CUDA

    tell(job, number, ready=True)
    spoken_to(number)
    signal.alarm(int(asked["limit"]) + 5)
    stage = ["connect" if number else "listen"]
    try:
        for words in _measure(job, number, gpu=asked["gpu"], limit=asked["limit"], stage=stage):
            tell(job, number, **words)
    except (RuntimeError, ValueError, OSError) as error:
        tell(job, number, failed=stage[0], why=_plain(str(error)))
    with suppress(OSError):
        sys.stdout.flush()
    os._exit(0)  # a process group whose peers are gone takes its time


def pairs(count: int) -> list[list[tuple[int, int]]]:
    """Rounds in which each node meets its neighbours in a ring, in pairs that do not disturb one another."""
    ring = [(a, (a + 1) % count) for a in range(count)] if count > 2 else [(0, 1)]  # noqa: PLR2004
    last = [ring.pop()] if count % 2 and count > 1 else []
    return [part for part in (ring[::2], ring[1::2], last) if part]


def _measure(job: Job, number: int, *, gpu: bool, limit: float, stage: list[str]) -> Iterator[dict[str, Any]]:
    import torch
    import torch.distributed as dist
    from torch._C._distributed_c10d import TCPStore

    count, patience = len(job.nodes), timedelta(seconds=limit)
    store = TCPStore(job.master, job.port, count, number == 0, patience, wait_for_workers=False)
    stage[0] = "wait"
    store.set(f"came/{number}", "")
    store.wait([f"came/{other}" for other in range(count)], patience)
    stage[0] = "link"
    yield {"met": True}
    dist.init_process_group("nccl" if gpu else "gloo", store=store, rank=number, world_size=count, timeout=patience)
    device = torch.device("cuda", 0) if gpu else torch.device("cpu")
    yield {"joined": True}
    for together in pairs(count):
        for a, b in together:
            if number in (a, b):
                speed = _exchange(number == a, b if number == a else a, device)
                yield {"pair": [a, b], "speed": speed} if number == a else {}
    yield {"speed": _all_reduce(device, count), "done": True}


def _exchange(first: bool, other: int, device: Any) -> float:
    """Bytes a second between two nodes, the best of some exchanges; the first of the two says when it is enough."""
    import torch
    import torch.distributed as dist

    words = torch.zeros((_PAIR_GPU if device.type == "cuda" else _PAIR) // 4, device=device)
    best, until = 0.0, time.monotonic() + _TRY_FOR
    for number in range(_TRIES):
        if first:
            words[0] = float(number < _TRIES - 1 and time.monotonic() < until)
            more = float(words[0])  # waits for the device, too
            began = time.monotonic()
            dist.send(words, other)
            dist.recv(words, other)
            float(words[-1])
            best = max(best, 2 * words.numel() * 4 / (time.monotonic() - began))
        else:
            dist.recv(words, other)
            more = float(words[0])
            dist.send(words, other)
        if not more:
            break
    return best


def _all_reduce(device: Any, count: int) -> float:
    """Bytes a second through each node's link in an all-reduce that is large enough to tell."""
    import torch
    import torch.distributed as dist

    size = 2**18
    while True:
        words = torch.ones(size // 4, device=device)
        dist.barrier()
        began = time.monotonic()
        dist.all_reduce(words)
        float(words[0])
        took = torch.tensor(time.monotonic() - began, device=device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        if (seconds := float(took)) > _LONG_ENOUGH or size >= _LARGEST:
            return 2 * (count - 1) / count * size / seconds
        size *= 4


def _plain(text: str) -> str:
    """The first line of an error, without what only a developer of torch reads."""
    return text.strip().partition("\n")[0].rpartition("] ")[2][:200] or text[:200]


if __name__ == "__main__":
    sys.exit(main())
