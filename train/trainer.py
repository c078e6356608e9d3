"""The HF Trainer with checkpoints that are whole or absent and that load alone."""

from typing import Any

from ..data_tools.dataset import PackedDataset
from ..data_tools.packing import PackOrder, Window
from .saving import SavingTrainer


class FinetuneTrainer(SavingTrainer):
    """The Trainer of a run; how it saves is ``SavingTrainer``'s."""

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule; DeepSpeed's ZeRO optimizers get the ``defaults`` that schedules with a floor read the peak from."""
        wrapped = getattr(optimizer or self.optimizer, "optimizer", None)
        if wrapped is not None and not hasattr(wrapped, "defaults"):
            wrapped.defaults = {"lr": self.args.learning_rate}
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
