"""The end of a run."""

import gc
import weakref

import torch.distributed as dist
from finebridge.train.runtime import finish


def test_the_process_group_is_left_and_never_freed() -> None:
    """Freeing gloo's group waits for threads that may wait for Python's lock: one run in some dozens never ended."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = weakref.ref(dist.group.WORLD)
    finish()
    assert not dist.is_initialized()
    gc.collect()
    assert group() is not None
