"""The HF Trainer with checkpoints that are whole or absent and that load alone."""

from pathlib import Path
from typing import Any

from torch import nn
from transformers import Trainer

from ..data_tools.dataset import PackedDataset
from ..data_tools.packing import PackOrder, Window
from ..storage.assets import carry
from .callbacks import DivergedError
from .checkpoint import SaveError, finite_on_all_ranks, open_staging, publish_checkpoint, rotate
from .precision import split_groups
from .runtime import say
from .schedule import decay_steps


class FinetuneTrainer(Trainer):
    """Trainer whose saves are staged, hashed and renamed into place.

    ``base`` is the local folder that the model came from: its remote code and other files are carried into every full
    checkpoint. ``made_from`` goes into the checkpoint's manifest. ``keep`` is how many checkpoints stay (the Trainer's
    own ``save_total_limit`` would go by time and may delete the last one).
    """

    base: Path | None = None
    keep: int | None = None
    made_from: dict[str, Any] = {}  # noqa: RUF012 - replaced per instance by assemble
    _staging: Path | None = None

    def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
        """The optimizer; weights that stay in fp32 under DeepSpeed get groups of their own."""
        optimizer = super().create_optimizer(*args, **kwargs)
        split_groups(optimizer)
        return optimizer

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
        return super().create_scheduler(num_training_steps, optimizer)

    def _get_train_sampler(self, train_dataset: Any = None) -> Any:
        """Packs come in an order of their own, in which ranks have nearly the same to do."""
        data = train_dataset or self.train_dataset
        if not isinstance(data, PackedDataset):
            return super()._get_train_sampler(train_dataset)
        args = self.args
        window = Window(args.world_size, args.per_device_train_batch_size, args.gradient_accumulation_steps)
        seed = args.seed if args.data_seed is None else args.data_seed
        return PackOrder(data.packs.cost(data.data.lengths), window, seed, lambda: data.epoch)

    def _get_output_dir(self, trial: Any) -> str:
        return str(self._staging) if self._staging else super()._get_output_dir(trial)

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        output_dir = Path(self._get_output_dir(trial))
        step = self.state.global_step
        if not finite_on_all_ranks(self.model):
            raise DivergedError(
                f"step {step}: the weights are not finite any more, so no checkpoint of this step is written. Lower "
                "--learning_rate or lengthen the warm-up"
            )
        self._staging = open_staging(output_dir, step)
        try:
            super()._save_checkpoint(model, trial)
            best = self.state.best_model_checkpoint
            if best and Path(best).parent == self._staging:
                self.state.best_model_checkpoint = str(output_dir / Path(best).name)
                if self.args.should_save:
                    self.state.save_to_json(str(Path(best) / "trainer_state.json"))
            publish_checkpoint(self._staging, output_dir, step, {**self.made_from, "step": step})
        finally:
            self._staging = None
        if self.args.should_save:
            rotate(output_dir, self.keep, self.state.best_model_checkpoint)

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        folder = Path(output_dir or str(self.args.output_dir))
        try:
            super()._save(output_dir, state_dict)
            if self.args.should_save and (folder / "adapter_config.json").is_file():
                model: Any = self.accelerator.unwrap_model(self.model)
                model.generation_config.save_pretrained(folder)
            if self.args.should_save and self.base is not None and (folder / "config.json").is_file():
                carry(self.base, folder)
        except ValueError as error:
            # The Trainer takes any ValueError here for "weights were not gathered" and saves without them.
            raise SaveError(f"{folder}: {error}") from error
