"""A rank's way out of the run."""

import os
import subprocess
import sys
from pathlib import Path

# Rank 0's gloo threads receive tensors that Python has forgotten: to free one they need the interpreter lock, which rank 0
# keeps until it leaves. On a busy machine it happens by chance; here always.
LEAVE_WHILE_GLOO_NEEDS_THE_LOCK = """
import ctypes, os, sys, time, torch, torch.distributed as dist
from finebridge.train import runtime

def train():
    model = torch.nn.parallel.DistributedDataParallel(torch.nn.Linear(4, 4))
    model(torch.ones(1, 4)).sum().backward()
    if first:
        sys.setswitchinterval(1000)
        for _ in range(50):
            dist.broadcast(torch.zeros(1), src=1, async_op=True)
        ctypes.PyDLL(None).usleep(1_000_000)
        runtime.finish()
    else:
        time.sleep(0.2)
        for _ in range(50):
            dist.broadcast(torch.ones(1), src=1)

first = os.fork()
store = dist.FileStore(sys.argv[1], 2)
dist.init_process_group("gloo", store=store, rank=0 if first else 1, world_size=2)
runtime.dist.barrier = lambda: None
train()
if first:
    print("left", flush=True)
    runtime.end(0)
else:
    time.sleep(1)
    os._exit(0)
"""


def test_leaving_the_process_group_does_not_wait_for_a_thread_that_waits_for_us(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", LEAVE_WHILE_GLOO_NEEDS_THE_LOCK, str(tmp_path / "store")],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "left\n"), done.stderr
