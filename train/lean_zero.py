"""DeepSpeed's ZeRO without the copies that its step makes of gradients and weights.

What DeepSpeed 0.19.8 does in each step, in bytes a parameter, bf16 gradients and one rank:

- ZeRO-1 and 2 look for overflow (4), take the norm of an fp64 copy (18, at its peak 8 of the largest tensor), flatten the
  gradients (4, its peak 2), multiply them by the clip (8, in bf16 4), and copy the masters back. A second buffer of gradients
  (2) is held while several micro-batches are summed, and each is divided by the number of ranks also when that is 1 (4).
- ZeRO-3 takes the norm and clips in the same way.
- Masters of the weights' own dtype (pure bf16, fp32 training) are a copy of the weights.

Here gradients are summed in the flat buffer that the optimizer reads (under ZeRO-2 one rank puts them there without a
bucket), the norm is taken of it in fp32 pieces (and tells of overflow), the clip is divided by in the optimizer's own pass,
and masters of the weights' dtype are the weights. What is offloaded to the CPU, Muon and DeepSpeed's own MoE layers go
DeepSpeed's way.
"""

# DeepSpeed has no public door to any of this.
# pyright: reportUntypedBaseClass=false

from typing import Any

import torch
from deepspeed import comm
from deepspeed.runtime import engine
from deepspeed.runtime.zero import stage3
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer

from .optimizers import clip_scale, takes_scale, total_norm

_Stock2: Any = DeepSpeedZeroOptimizer
_Stock3: Any = DeepSpeedZeroOptimizer_Stage3


def install() -> None:
    """Have DeepSpeed make these in place of its own; call before the engine is made."""
    engine.DeepSpeedZeroOptimizer = LeanZero  # pyright: ignore[reportPrivateImportUsage]
    stage3.DeepSpeedZeroOptimizer_Stage3 = LeanZero3


def uninstall() -> None:
    """Have DeepSpeed make its own again: to compare."""
    engine.DeepSpeedZeroOptimizer, stage3.DeepSpeedZeroOptimizer_Stage3 = _Stock2, _Stock3


class LeanZero(_Stock2):
    """ZeRO-1 and ZeRO-2."""

    def __init__(self, *args: Any, overlap_comm: bool = False, **kwargs: Any) -> None:
        # One rank has nothing to overlap, but would wait for the device after every micro-batch.
        super().__init__(*args, overlap_comm=overlap_comm and comm.get_world_size() > 1, **kwargs)
        if self._flat_gradients() and self.use_multi_rank_bucket_allreduce:
            self.reduce_scatter = False  # it is an all-reduce of the same bucket, in pieces that are copied twice

    def _flat_gradients(self) -> bool:
        """Whether gradients are summed in the flat buffer that the optimizer reads."""
        muon = "muon" in type(self.optimizer).__name__.lower()
        return bool(self.contiguous_gradients) and not (self.cpu_offload or self.zenflow or self.has_moe_layers or muon)

    def _use_compact_grad_partition_buffer(self, group_idx: int) -> bool:
        return self._flat_gradients() or super()._use_compact_grad_partition_buffer(group_idx)

    def _alone(self) -> bool:
        """Whether there is nobody to reduce with, so that gradients can go straight to the flat buffer."""
        return bool(self.partition_gradients) and self._flat_gradients() and comm.get_world_size() == 1

    def process_gradients(self, param: Any, i: int) -> None:
        """Take the gradient of a parameter that is done; of one rank into its place of the flat buffer, without a bucket."""
        if not self._alone():
            super().process_gradients(param, i)
            return
        number = self.get_param_id(param)
        place = self._get_compact_grad_partition_slice(i, 0, number, param.numel())
        written: set[int] = self.averaged_gradients[i].__dict__.setdefault("written", set())
        flat = param.grad.reshape(-1)
        if number in written:
            place.add_(flat)
        else:
            place.copy_(flat)
        written.add(number)
        param.grad = None

    def reduce_ipg_grads(self, comm_dtype: Any = None) -> None:
        """Reduce what waits in the buckets, which one rank has none of."""
        if not self._alone():
            super().reduce_ipg_grads(comm_dtype)

    def _link_all_hp_params(self) -> None:
        if not self.cpu_offload:
            for group, master in enumerate(self.single_partition_of_fp32_groups):
                rank = comm.get_rank(group=self.real_dp_process_group[group])
                _share(master, self.parallel_partitioned_bit16_groups[group][rank])
        super()._link_all_hp_params()

    def _check_overflow(self, partition_gradients: bool = True) -> None:
        if self.compute_grad_norm and self._flat_gradients():
            self.overflow = False  # the norm, which comes next, is not finite when a gradient is not
        else:
            super()._check_overflow(partition_gradients)

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> torch.Tensor:
        """The norm of one group's gradients over all ranks; -1 when it is not finite, as DeepSpeed tells it."""
        flat = getattr(gradients, "flat_partition", None)
        if flat is None or norm_type != 2 or self.mpu is not None:  # noqa: PLR2004
            return super().get_grad_norm_direct(gradients, params, norm_type)
        return _over_ranks(total_norm([flat]), self.dp_process_group)

    def unscale_and_clip_grads(self, grad_groups_flat: list[Any], total_norm: torch.Tensor) -> None:
        """Leave the division to the optimizer, where it can."""
        if not takes_scale(self.optimizer):
            super().unscale_and_clip_grads(grad_groups_flat, total_norm)
            return
        self.optimizer.grad_scale = _scale(self, total_norm)


class LeanZero3(_Stock3):
    """ZeRO-3."""

    def _create_fp32_partitions(self) -> None:
        super()._create_fp32_partitions()
        if not self.offload_optimizer:
            for master, weights in zip(
                self.fp32_partitioned_groups_flat, self.fp16_partitioned_groups_flat, strict=True
            ):
                if weights is not None:
                    _share(master, weights)

    def get_grad_norm_direct(self, gradients: Any, params: Any, norm_type: float = 2) -> torch.Tensor:
        """The norm of one group's gradients over all ranks; -1 when it is not finite, as DeepSpeed tells it."""
        parallel = self.model_parallel_group is not None or self._autoep_expert_parallel_group(params) is not None
        if norm_type != 2 or parallel or not gradients:  # noqa: PLR2004
            return super().get_grad_norm_direct(gradients, params, norm_type)
        return _over_ranks(total_norm(list(gradients)), self._get_param_partition_group(params[0]))

    def unscale_and_clip_grads(self, sub_group_id: int, total_norm: torch.Tensor) -> None:
        """Leave the division to the optimizer, where it can."""
        if self.offload_optimizer or not takes_scale(self.optimizer):
            super().unscale_and_clip_grads(sub_group_id, total_norm)
            return
        self.optimizer.grad_scale = _scale(self, total_norm)


def _share(master: torch.Tensor, weights: torch.Tensor) -> None:
    """Make the weights their own masters when those have nothing more to say: in fp32, or both in bf16."""
    if weights.dtype in (torch.float32, master.dtype) and weights.device == master.device:
        master.data = weights.data


def _over_ranks(norm: torch.Tensor, group: Any) -> torch.Tensor:
    squares = norm.square()
    comm.all_reduce(squares, op=comm.ReduceOp.SUM, group=group)
    norm = squares.sqrt().float()
    return torch.where(norm.isfinite(), norm, -1.0)


def _scale(zero: Any, norm: torch.Tensor) -> torch.Tensor | None:
    """Loss scale and clip in one number; None when there is neither."""
    scale: float = zero.loss_scale
    if zero.clip_grad > 0:
        return clip_scale(norm / scale, zero.clip_grad) * scale
    return None if scale == 1 else norm.new_full((), scale, dtype=torch.float32)
