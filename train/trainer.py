"""The HF Trainer with checkpoints that are whole or absent and that load alone."""

from contextlib import nullcontext
from functools import partial
from typing import Any

from torch import nn

from . import heartbeat
from .optimizers import clip_scale, takes_scale, total_norm
from .precision import split_groups
from .recompute import RecomputeBudget
from .renew import FreshSettings, separate_steps
from .runtime import say
from .saving import SavingTrainer
from .schedule import decay_steps
from .steps import StepTrainer
from .throughput import Meter, count


class FinetuneTrainer(SavingTrainer, StepTrainer):
    """The Trainer of a run: how it saves is ``SavingTrainer``'s, how it steps ``StepTrainer``'s.

    ``renewed`` names the settings that a resume takes from the flags although the checkpoint has others. ``meter``
    measures training alone; what it tells goes into every log line of the loss, and the FLOPs that it counts are the
    Trainer's ``total_flos``.
    """

    meter: Meter
    recompute: RecomputeBudget | None = None
    renewed: frozenset[str] = frozenset()
    _rate: float | None = None
    _fresh: FreshSettings | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer; weights that stay in fp32 under DeepSpeed get groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        split_groups(optimizer)
        return optimizer

    def _clip_grad_norm(self, model: Any) -> Any:
        """The gradients' norm; what is over the limit is divided by in the optimizer's own pass, where it can."""
        inner: Any = getattr(self.optimizer, "optimizer", self.optimizer)
        if self.is_deepspeed_enabled or self.args.fp16 or not takes_scale(inner):
            return super()._clip_grad_norm(model)
        norm = total_norm([weight.grad for weight in model.parameters() if weight.grad is not None]).float()
        inner.grad_scale = clip_scale(norm, self.args.max_grad_norm)
        return norm

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule; DeepSpeed's ZeRO optimizers get the ``defaults`` that schedules with a floor read the peak from."""
        wrapped = getattr(optimizer or self.optimizer, "optimizer", None)
        if wrapped is not None and not hasattr(wrapped, "defaults"):
            wrapped.defaults = {"lr": self.args.learning_rate}
        args: Any = self.args
        kwargs, warmup = args.lr_scheduler_kwargs, args.get_warmup_steps(num_training_steps)
        if chosen := decay_steps(args.lr_scheduler_type, kwargs, num_training_steps, warmup):
            args.lr_scheduler_kwargs = {**(kwargs or {}), "num_decay_steps": chosen}
            say(
                f"schedule: the learning rate falls in the last {chosen} of {num_training_steps} steps (chosen for you)"
            )
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._fresh = FreshSettings(optimizer or self.optimizer, scheduler)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._fresh is not None:
            self._fresh.put_back(self.renewed, self.optimizer, self.lr_scheduler)
            separate_steps(self.optimizer)
            if self.is_deepspeed_enabled:  # what is loaded later, the best checkpoint, is as it was saved
                engine: Any = self.model_wrapped
                engine._config.load_universal_checkpoint = False  # noqa: SLF001 - DeepSpeed has no other switch

    def training_step(self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: Any = None) -> Any:
        """Forward and backward. The learning rate is noted before: DeepSpeed moves the schedule on within backward."""
        self.meter.start()
        self._rate = super()._get_learning_rate()
        with self.recompute.watched(inputs["input_ids"].numel()) if self.recompute else nullcontext():
            return super().training_step(model, inputs, num_items_in_batch)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        """Forward; a second time with more layers recomputed where memory was out and the budget allows it."""
        forward = partial(super().compute_loss, *args, **kwargs)
        return self.recompute.attempt(forward) if self.recompute else forward()

    def _get_learning_rate(self) -> float:
        return super()._get_learning_rate() if self._rate is None else self._rate

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """FLOPs of a micro-batch that was just trained."""
        return round(self.meter.add(count(inputs)))

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, the loss with what the meter tells, the end with its figures of the whole run."""
        if "loss" in logs:
            logs.update(self.meter.read())
        elif "train_runtime" in logs:
            self.meter.read()
            logs.update(self.meter.total(self.args.world_size))
        super().log(logs, start_time)

    def _evaluate(self, *args: Any, **kwargs: Any) -> dict[str, float]:
        with self.meter.paused():
            return super()._evaluate(*args, **kwargs)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        heartbeat.enter("save")
        with self.meter.paused():
            super()._save_checkpoint(model, trial)
