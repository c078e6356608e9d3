"""How the HF Trainer takes its steps: our order of samples, our loss, a look at every step, evaluation by tokens."""

from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any, cast

import torch
from torch import nn
from torch.utils.data import DataLoader
from transformers import Trainer
from transformers.trainer_utils import EvalLoopOutput, SaveStrategy, seed_worker

from ..data_tools.batches import CheckedSamples, Order, StepBatches, Window, epoch_order
from ..data_tools.dataset import Samples
from . import heartbeat, runtime
from .chunked_loss import ChunkedHead, Targets, targets
from .guards import DivergedError, StepGuard
from .losses import evaluation_sums, share, summed_loss
from .model_arguments import Normalization
from .stopping import EvaluationCut, stopped

_SHOWN = 3


@dataclass
class Step:
    """What one optimizer step of this rank is made of."""

    samples: list[list[int]]  # numbers of each micro-batch; FILLER is none
    divisor: torch.Tensor  # what the step's summed losses are divided by, over all ranks
    targets: list[Targets] = field(default_factory=list[Targets])  # of each micro-batch, on the CPU; with a head alone
    losses: list[torch.Tensor] = field(default_factory=list[torch.Tensor])  # share of each micro-batch, as made


class StepTrainer(Trainer):
    """Trainer that sees each sample once an epoch, in an order that the number of ranks does not change.

    ``normalization`` is that of ``losses``; ``guard`` looks at every step; with ``head`` no whole logits are made.
    """

    normalization: Normalization
    head: ChunkedHead | None = None
    train_collator: Any = None  # that of training batches alone
    loss_is_scaled_for_ga = True  # compute_loss divides by the whole step's tokens
    _batches: StepBatches
    _step: Step
    _auxiliary: list[torch.Tensor]  # the router loss of each micro-batch since the last log line
    _checked = 0
    _epoch_of_run: tuple[int, int, int] = (0, 0, 1)  # epoch, micro-steps done before this run, micro-steps

    def __init__(self, *args: Any, guard: StepGuard, normalization: Normalization = "token", **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.guard, self.normalization = guard, normalization
        self._auxiliary = []

    # ---- data

    def get_train_dataloader(self) -> DataLoader[Any]:
        """Micro-batches of this rank; nothing is left for accelerate to shard, repeat or skip."""
        args = self.args
        window = Window(args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps)
        self._batches = self._batches_of(
            cast("Samples", self.train_dataset), window, cast("Order", args.train_sampling_strategy),
            drop_last=args.dataloader_drop_last,
        )  # fmt: skip
        return self._loader(
            cast("Samples", self.train_dataset), self._batches, self.train_collator or self.data_collator
        )

    def get_eval_dataloader(self, eval_dataset: Any = None) -> DataLoader[Any]:
        """Micro-batches of this rank in the data's own order."""
        data = cast("Samples", self.eval_dataset if eval_dataset is None else eval_dataset)
        window = Window(self.args.world_size, self.args.per_device_eval_batch_size, 1)
        return self._loader(data, self._batches_of(data, window, "sequential", drop_last=False), self.data_collator)

    def _batches_of(self, data: Samples, window: Window, kind: Order, *, drop_last: bool) -> StepBatches:
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        anew = getattr(data, "reshuffle", False)  # a mixture, or its packs, with other samples each epoch

        def order(epoch: int) -> Any:
            lengths = cast("Any", data).lengths_of(epoch) if anew else data.lengths
            return epoch_order(kind, lengths, window.size, seed, epoch)

        cost = getattr(data, "cost", data.lengths)
        cost_of = cast("Any", data).cost_of if anew else None
        return StepBatches(order, cost, window, self.args.process_index, drop_last=drop_last, cost_of=cost_of)

    def _loader(self, data: Samples, batches: StepBatches, collate: Any) -> DataLoader[Any]:
        args = self.args
        return DataLoader(
            cast("Any", CheckedSamples(data, int(cast("Any", self.model).config.get_text_config().vocab_size))),
            batch_sampler=cast("Any", batches),
            collate_fn=collate,
            num_workers=args.dataloader_num_workers,
            pin_memory=args.dataloader_pin_memory and runtime.has_accelerator(),
            persistent_workers=args.dataloader_persistent_workers,
            multiprocessing_context=args.dataloader_multiprocessing_context,
            prefetch_factor=args.dataloader_prefetch_factor,
            worker_init_fn=partial(seed_worker, num_workers=args.dataloader_num_workers, rank=args.process_index),
            generator=torch.Generator(),  # starting an epoch draws from it, not from the numbers that dropout draws
        )

    def _run_epoch(self, **values: Any) -> None:  # pyright: ignore[reportIncompatibleMethodOverride] - called by name
        """An epoch from the micro-step on that the run resumes at. Nothing is skipped: the order starts there."""
        done = values["steps_trained_in_current_epoch"] if values["epoch"] == values["epochs_trained"] else 0
        accumulation = self.args.gradient_accumulation_steps
        self._batches.begin(values["epoch"], done // accumulation)
        self._epoch_of_run = (values["epoch"], done, values["steps_in_epoch"])
        values["steps_trained_in_current_epoch"] = 0
        values["steps_in_epoch"] -= done
        values["num_update_steps_per_epoch"] -= done // accumulation
        super()._run_epoch(**values)

    def _prepare_input(self, data: Any) -> Any:
        """To the device; what lies in pinned memory is copied while the device still works."""
        if isinstance(data, torch.Tensor) and not data.is_floating_point():
            return data.to(self.args.device, non_blocking=True)
        return super()._prepare_input(data)

    # ---- loss

    def get_batch_samples(
        self, epoch_iterator: Iterator[Any], num_batches: int, device: torch.device
    ) -> tuple[list[Any], torch.Tensor | int | None]:
        """The micro-batches of one optimizer step and what their summed loss is divided by."""
        batches, divisor = super().get_batch_samples(epoch_iterator, num_batches, device)
        self._step = Step([batch.pop("samples") for batch in batches], cast("torch.Tensor", divisor))
        if self.head:  # now, as the batches are still on the CPU: later the device would be waited for
            self._step.targets = [targets(batch, self.normalization) for batch in batches]
        return batches, divisor

    def _get_num_items_in_batch(self, batch_samples: list[Any], device: torch.device) -> torch.Tensor:
        heartbeat.enter("count")  # the first time in a step that one rank waits for another
        divisor = torch.stack([share(batch, self.normalization) for batch in batch_samples]).sum().to(device)
        runtime.reduce(divisor)
        return divisor

    def compute_loss(
        self,
        model: nn.Module,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> Any:
        """This micro-batch's share of the step's loss, times the ranks, whose gradients are averaged afterwards."""
        smoothing = self.args.label_smoothing_factor
        wanted = self._step.targets[len(self._step.losses)].to(self.args.device) if self.head else None
        with self.head.loss_for(wanted, smoothing) if self.head and wanted else nullcontext():
            outputs = model(**{name: value for name, value in inputs.items() if name != "labels"})
        total = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
        if not self.head:
            total = summed_loss(total, inputs, self.normalization, smoothing)
        loss = total / cast("torch.Tensor", num_items_in_batch) * self.args.world_size
        self._step.losses.append(loss.detach())
        auxiliary = outputs.get("aux_loss") if isinstance(outputs, dict) else None
        if auxiliary is not None:
            self._auxiliary.append(auxiliary.detach())
            scale = cast("Any", self.model).config.get_text_config().router_aux_loss_coef / len(self._step.samples)
            loss = loss + scale * auxiliary
        heartbeat.enter("backward")
        return (loss, outputs) if return_outputs else loss

    def training_step(
        self, model: nn.Module, inputs: dict[str, Any], num_items_in_batch: torch.Tensor | int | None = None
    ) -> torch.Tensor:
        """Forward and backward; the cross entropy alone is what is logged as loss."""
        heartbeat.enter("forward")
        super().training_step(model, inputs, num_items_in_batch)
        return self._step.losses[-1]

    # ---- every step

    def _maybe_log_save_evaluate(self, tr_loss: torch.Tensor, grad_norm: Any, *args: Any, **kwargs: Any) -> None:
        epoch, done, micro_steps = self._epoch_of_run
        if self.state.global_step > self._checked:
            self._checked = self.state.global_step
            here = done + round((self.state.epoch - epoch) * (micro_steps - done))
            self.state.epoch = epoch + here / micro_steps  # super()._run_epoch knows of the rest of the epoch only
            self._look(grad_norm)
        super()._maybe_log_save_evaluate(tr_loss, grad_norm, *args, **kwargs)

    def _look(self, grad_norm: Any) -> None:
        """Check the step on all ranks. Raises DivergedError on all of them."""
        losses = torch.stack(self._step.losses).double()
        mean = losses.sum() / self.args.world_size
        runtime.reduce(mean)
        norm = None if grad_norm is None else float(grad_norm)
        self.guard.check(self.state.global_step, float(mean), norm, lambda: self._seen(losses))

    def _seen(self, losses: torch.Tensor) -> str:
        """The samples of this step on all ranks, those of micro-batches without a finite loss alone if there are any."""
        bad = (~torch.isfinite(losses)).tolist()
        numbers = [n for n, is_bad in zip(self._step.samples, bad, strict=True) if is_bad or not any(bad)]
        data = cast("Samples", self.train_dataset)
        names = [data.name_of(number) for batch in numbers for number in batch if number >= 0]
        ranks = runtime.gather((any(bad), names))
        worst = any(is_bad for is_bad, _ in ranks)
        shown = [
            f"rank {rank}: {', '.join(names[:_SHOWN])}" + (f" and {len(names) - _SHOWN} more" if names[_SHOWN:] else "")
            for rank, (is_bad, names) in enumerate(ranks)
            if names and (is_bad or not worst)
        ]
        return "samples of " + "; ".join(shown)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Log, with the mean router loss of the steps since the last line."""
        if "loss" in logs and self._auxiliary:
            mean = torch.stack(self._auxiliary).float().mean() / self.args.world_size
            runtime.reduce(mean)
            logs["aux_loss"] = float(mean)
            self._auxiliary.clear()
        super().log(logs, start_time)

    # ---- evaluation

    def _evaluate(self, trial: Any, ignore_keys_for_eval: list[str] | None, skip_scheduler: bool = False) -> Any:
        """Evaluate; left for a checkpoint when the run is asked to stop."""
        heartbeat.enter("evaluate")
        step = self.state.global_step
        try:
            return super()._evaluate(trial, ignore_keys_for_eval, skip_scheduler)
        except EvaluationCut:
            if step == 0 or self.args.save_strategy == SaveStrategy.NO:
                raise stopped(step, None) from None
            self._save_checkpoint(cast("nn.Module", self.model), trial)
            raise stopped(step, f"{self.args.output_dir}/checkpoint-{step}") from None

    def evaluation_loop(
        self,
        dataloader: DataLoader[Any],
        description: str,  # noqa: ARG002 - the signature is the Trainer's
        *_: Any,
        metric_key_prefix: str = "eval",
        **__: Any,
    ) -> EvalLoopOutput:
        """Mean loss and accuracy over all loss tokens of the evaluation data, each sample once. Raises DivergedError."""
        model = self._wrap_model(cast("nn.Module", self.model), training=False)
        was_training = model.training
        model.eval()
        cast("Any", self.callback_handler).eval_dataloader = dataloader
        sums = torch.zeros(3, dtype=torch.float64, device=self.args.device)
        with torch.no_grad():
            for batch in dataloader:
                batch.pop("samples")
                inputs = self._prepare_inputs(batch)
                labels = inputs.pop("labels")
                wanted = self.head.sums_for(targets({"labels": labels}, "token")) if self.head else nullcontext()
                with self.compute_loss_context_manager(), wanted:
                    outputs = model(**inputs)
                made = outputs["logits"] if isinstance(outputs, dict) else outputs[0]
                sums += made if self.head else evaluation_sums(made, labels)
                self.control = self.callback_handler.on_prediction_step(self.args, self.state, self.control)
        model.train(was_training)
        runtime.reduce(sums)
        loss, right, tokens = sums.tolist()
        metrics = {"loss": loss / tokens, "accuracy": right / tokens, "tokens": tokens}
        if not metrics["loss"] < float("inf"):
            raise DivergedError(
                f"step {self.state.global_step}: eval_loss is {metrics['loss']}; the weights are spoilt"
            )
        named = {f"{metric_key_prefix}_{name}": value for name, value in metrics.items()}
        count = len(cast("CheckedSamples", dataloader.dataset))
        return EvalLoopOutput(cast("Any", None), None, named, count)
