"""Training of a real Megatron-Core model on the CPU, to be saved with its optimizer and random numbers and resumed.

For ``megatron_server.py``. The package megatron-core has no ``megatron.training``; what it does around the core is done here
in its way (Megatron-LM core_v0.16.1, ``training/{training,checkpointing}.py``): the data-parallel wrapper, Megatron's
optimizers over an Adam of our own, ``rng_state`` as a sharded object of each rank. Stages of a pipeline are not trained.
"""

import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch.overrides import TorchFunctionMode

RATE, BATCH, LENGTH = 0.01, 2, 16


class OnCpu(TorchFunctionMode):
    """Megatron's optimizers make small tensors on ``device="cuda"`` and ask whether parameters are CUDA's tensors."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if kwargs.get("device") == "cuda":
            kwargs["device"] = "cpu"
        found = func(*args, **kwargs)
        return found.replace("torch.", "torch.cuda.") if func is torch.Tensor.type and isinstance(found, str) else found


class Adam(torch.optim.Optimizer):
    """AdamW with the count of steps in its groups, as Transformer Engine's and Apex's have it.

    Megatron's distributed optimizer rests on that: with torch's, which counts for each parameter, 0.16.1 cannot load one.
    """

    def __init__(self, params: Any, **settings: Any) -> None:
        super().__init__(params, settings)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # noqa: ARG002 - torch passes none here
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            first, second = group["betas"]
            for param in (param for param in group["params"] if param.grad is not None):
                state = self.state[param]
                for key in ("exp_avg", "exp_avg_sq"):
                    state.setdefault(key, torch.zeros_like(param))
                mean = state["exp_avg"].lerp_(param.grad, 1 - first)
                square = state["exp_avg_sq"].mul_(second).addcmul_(param.grad, param.grad, value=1 - second)
                scale = (square / (1 - second ** group["step"])).sqrt_().add_(group["eps"])
                param.mul_(1 - group["lr"] * group["weight_decay"])
                param.addcdiv_(mean / (1 - first ** group["step"]), scale, value=-group["lr"])


class Run:
    """A run: the model in Megatron's wrapper, its optimizer, and how many steps it has made."""

    def __init__(self, chunk: Any, *, distributed: bool) -> None:
        from megatron.core import optimizer
        from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
        from megatron.core.optimizer import distrib_optimizer

        optimizer.Adam = distrib_optimizer.Adam = Adam
        optimizer.USING_PYTORCH_OPTIMIZER, distrib_optimizer.HAVE_APEX_OR_TE = False, True
        self.chunk, self.steps = chunk.train(), 0
        with OnCpu():
            self.part = DistributedDataParallel(
                chunk.config, DistributedDataParallelConfig(use_distributed_optimizer=distributed), chunk
            )
            settings = optimizer.OptimizerConfig(lr=RATE, clip_grad=0.0, use_distributed_optimizer=distributed)
            self.optimizer = optimizer.get_megatron_optimizer(settings, [self.part])

    def step(self) -> float:
        """One step on a batch that its number makes; the loss."""
        from megatron.core.distributed import finalize_model_grads

        self.steps += 1
        generator = torch.Generator().manual_seed(self.steps)
        ids = torch.randint(0, 60, (BATCH, LENGTH + 1), generator=generator)
        with OnCpu():
            self.part.zero_grad_buffer()
            self.optimizer.zero_grad()
            logits = self.part(ids[:, :-1], torch.arange(LENGTH).expand(BATCH, LENGTH), None)
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            finalize_model_grads([self.part])
            stepped, _, _ = self.optimizer.step()
        assert stepped
        return loss.item()

    def state(self, metadata: dict[str, Any], *, loading: bool, left_out: Sequence[str] = ()) -> dict[str, Any]:
        """What a ``torch_dist`` checkpoint of a run holds beside its arguments; ``optimizer`` may be left out."""
        from megatron.core import parallel_state as ranks
        from megatron.core.dist_checkpointing.mapping import ShardedObject

        more = {**metadata, "dp_cp_group": ranks.get_data_parallel_group(with_context_parallel=True)}
        model = self.chunk.sharded_state_dict(metadata=more)
        found = {"model": model, "iteration": self.steps}
        if "optimizer" not in left_out:  # what is made for loading is not filled until it is loaded
            with OnCpu():
                found["optimizer"] = self.optimizer.sharded_state_dict(
                    {"model": model}, is_loading=loading, metadata=more
                )
        numbers = {
            "random_rng_state": random.getstate(), "np_rng_state": np.random.get_state(),  # noqa: NPY002 - as Megatron-LM
            "torch_rng_state": torch.get_rng_state(),
        }  # fmt: skip
        place = ranks.get_pipeline_model_parallel_rank(), ranks.get_tensor_model_parallel_rank()
        sizes = ranks.get_pipeline_model_parallel_world_size(), ranks.get_tensor_model_parallel_world_size()
        copy = ranks.get_data_parallel_rank(with_context_parallel=True)
        if "rng_state" not in left_out:
            found["rng_state"] = ShardedObject("rng_state", [numbers], sizes, place, replica_id=copy)
        return found

    def resume(self, folder: str, left_out: list[str]) -> None:
        """Go on from a checkpoint with all that it holds, or all but ``optimizer`` or ``rng_state``."""
        from megatron.core import dist_checkpointing

        metadata = dist_checkpointing.load_content_metadata(folder)
        found = dist_checkpointing.load(self.state(metadata, loading=True, left_out=left_out), folder)
        self.chunk.load_state_dict(found["model"], strict=True)
        self.steps = found["iteration"]
        with OnCpu(), torch.no_grad():
            if "optimizer" not in left_out:
                self.optimizer.load_state_dict(found["optimizer"])
            else:
                self.optimizer.reload_model_params()
        if "rng_state" not in left_out:
            numbers = found["rng_state"][0]
            random.setstate(numbers["random_rng_state"])
            np.random.set_state(numbers["np_rng_state"])  # noqa: NPY002 - as Megatron-LM
            torch.set_rng_state(numbers["torch_rng_state"])
