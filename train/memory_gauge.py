"""How many bytes are held while a micro-batch is computed: of a CUDA device, or what autograd keeps where none is."""

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


class DeviceGauge:
    """The current CUDA device's bytes in tensors, as torch's allocator counts them."""

    @contextmanager
    def counting(self) -> Generator[None]:
        """Within it ``peak`` is that of this context. The device's own highest mark begins anew."""
        torch.cuda.reset_peak_memory_stats()
        yield

    def now(self) -> int:
        """Bytes held now."""
        return torch.cuda.memory_allocated()

    def peak(self) -> int:
        """The most since ``counting`` began."""
        return torch.cuda.max_memory_allocated()

    def room(self) -> int:
        """Bytes that this process could hold: what is free, and what the allocator has already."""
        free, _ = torch.cuda.mem_get_info()
        return free + torch.cuda.memory_reserved()


class SavedGauge:
    """Bytes of the tensors that autograd keeps for backward; parameters are not counted, a storage only once."""

    def __init__(self) -> None:
        self._storages: dict[int, int] = {}

    @contextmanager
    def counting(self) -> Generator[None]:
        """Within it what is saved is counted, from nothing on."""
        self._storages.clear()

        def pack(tensor: torch.Tensor) -> Any:
            if not isinstance(tensor, nn.Parameter) and not isinstance(tensor._base, nn.Parameter):  # noqa: SLF001
                storage = tensor.untyped_storage()
                self._storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept):
            yield

    def now(self) -> int:
        """Bytes saved so far."""
        return sum(self._storages.values())

    def peak(self) -> int:
        """As ``now``: nothing is given back before backward."""
        return self.now()

    def room(self) -> int:
        """A CPU tells none. Raises NotImplementedError."""
        raise NotImplementedError("the memory of a CPU has no limit that could be told")
