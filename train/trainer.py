"""The HF Trainer with checkpoints that are whole or absent and that load alone."""

from typing import Any

from .renew import FreshSettings, separate_steps
from .saving import SavingTrainer
from .steps import StepTrainer


class FinetuneTrainer(SavingTrainer, StepTrainer):
    """The Trainer of a run: how it saves is ``SavingTrainer``'s, how it steps ``StepTrainer``'s.

    ``renewed`` names the settings that a resume takes from the flags although the checkpoint has others.
    """

    renewed: frozenset[str] = frozenset()
    _fresh: FreshSettings | None = None

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """The schedule; DeepSpeed's ZeRO optimizers get the ``defaults`` that schedules with a floor read the peak from."""
        wrapped = getattr(optimizer or self.optimizer, "optimizer", None)
        if wrapped is not None and not hasattr(wrapped, "defaults"):
            wrapped.defaults = {"lr": self.args.learning_rate}
        scheduler = super().create_scheduler(num_training_steps, optimizer)
        self._fresh = FreshSettings(optimizer or self.optimizer, scheduler)
        return scheduler

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        super()._load_optimizer_and_scheduler(checkpoint)
        if checkpoint is not None and self._fresh is not None:
            self._fresh.put_back(self.renewed, self.optimizer, self.lr_scheduler)
            separate_steps(self.optimizer)
        if self.is_deepspeed_enabled and checkpoint is not None:
            engine: Any = self.deepspeed
            engine._config.load_universal_checkpoint = False  # noqa: SLF001 - later loads are of checkpoints as saved
