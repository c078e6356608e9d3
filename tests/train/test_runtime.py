"""A rank's way into the run and out of it."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from rank_runner import RankRunner

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


def forget_that_there_is_no_gpu() -> None:
    """What made two ranks train two models in silence: the Trainer is not told to use the CPU."""
    from finebridge.train import runtime, sft

    runtime.has_accelerator = lambda: True
    sft._RANK_0_SPEAKS_WITHIN = 0.0


@pytest.mark.distributed
def test_ranks_that_would_train_a_model_each_are_refused(
    ranks: RankRunner, models: Callable[[str], Path], train_file: Path, tmp_path: Path
) -> None:
    argv = ["--model_name_or_path", models("hunyuan_v1_dense"), "--train_data_file", train_file]
    out = ["--output_dir", tmp_path / "out", "--max_steps", 1]
    done = ranks.run([*argv, *out], tmp_path / "log", ranks=2, before=forget_that_there_is_no_gpu)
    assert done.codes == [2, 2], done.texts
    assert "the launcher started 2 ranks but the Trainer sees 1: each would train a model of its own" in done.text
    assert not list((tmp_path / "out").glob("checkpoint-*"))


RANKS_MEET = """
import os, sys, torch, torch.distributed as dist
from finebridge.train import runtime

def meet(rank):
    least, total = torch.tensor(rank), torch.tensor(rank + 1)
    runtime.reduce(least, "MIN")
    runtime.reduce(total)
    return runtime.place(), runtime.gather(rank), runtime.from_main(f"of {rank}"), int(least), int(total)

assert meet(5) == ((0, 1), [5], "of 5", 5, 6)
first = os.fork()
rank = 0 if first else 1
dist.init_process_group("gloo", store=dist.FileStore(sys.argv[1], 2), rank=rank, world_size=2)
assert meet(rank) == ((rank, 2), [0, 1], "of 0", 0, 3)
runtime.finish()
code = os.waitstatus_to_exitcode(os.waitpid(first, 0)[1]) if first else 0
os._exit(code)
"""


@pytest.mark.distributed
def test_what_ranks_tell_one_another(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", RANKS_MEET, tmp_path / "store"], capture_output=True, text=True, timeout=120, check=False
    )
    assert done.returncode == 0, done.stderr


def test_an_architecture_that_deepspeed_cannot_read_is_taken_as_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    from finebridge.train import extensions

    said: list[str] = []
    for given, taken in (("9.0a", "9.0"), ("8.0;9.0a 10.0f+PTX", "8.0;9.0 10.0+PTX"), ("8.6", "8.6")):
        monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", given)
        extensions.plain_architectures(said.append)
        assert os.environ["TORCH_CUDA_ARCH_LIST"] == taken
    assert len(said) == 2
    assert "9.0a: taken as 9.0" in said[0]
