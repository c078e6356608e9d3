"""How the Trainer saves: staged, hashed while it is written, whole or absent, and told on every rank when it fails."""

import os
from collections.abc import Generator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, cast

import torch
from accelerate.utils import DeepSpeedSchedulerWrapper
from peft import PeftModel
from torch import nn
from transformers import Trainer
from transformers.dynamic_module_utils import custom_object_save

from ..storage.assets import carry
from ..storage.hashing import Ledger
from .checkpoint import agree, discard, finite_on_all_ranks, open_staging, publish_checkpoint, rotate
from .guards import DivergedError
from .runtime import place
from .space import checkpoint_bytes
from .weights import gathered, partitioned_only, write_adapter, write_weights


class SavingTrainer(Trainer):
    """Trainer whose saves appear whole or not at all.

    ``base`` is the local folder that the model came from: its remote code and other files are carried into every full
    checkpoint. ``made_from`` goes into the checkpoint's manifest. ``keep`` is how many checkpoints stay (the Trainer's
    own ``save_total_limit`` would go by time and may delete the last one). ``max_shard_size`` is in bytes.

    While a save runs no error of one rank's own work is raised there: the others would wait for it in the next
    collective. It is kept in the ledger, and all ranks raise it together before anything is published.
    """

    base: Path | None = None
    keep: int | None = None
    made_from: dict[str, Any] = {}  # noqa: RUF012 - replaced per instance by assemble
    max_shard_size: int = 5 * 10**9
    _staging: Path | None = None
    _ledger: Ledger | None = None
    _latest: str | None = None

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
        needed = checkpoint_bytes(self.model, self.args)
        folder = open_staging(output_dir, step, needed)
        ledger = self._ledger = Ledger(folder, patient=True)
        self._staging, self._latest = folder.parent, None
        try:
            with ledger.guard(), torch_saves_through(ledger):
                super()._save_checkpoint(model, trial)
                self._name_best(output_dir)
            agree(ledger, needed)
            publish_checkpoint(ledger, output_dir, {**self.made_from, "step": step}, needed, self._latest)
        except BaseException:
            ledger.settle()  # nothing is written there any more
            discard(self._staging)
            raise
        finally:
            self._staging = self._ledger = None
        if self.args.push_to_hub:
            self._push_from_checkpoint(str(output_dir / folder.name))
        if self.args.should_save:
            rotate(output_dir, self.keep, self.state.best_model_checkpoint)

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        """What is pushed is read from the disk: not before it is published."""
        if not self._staging:
            super()._push_from_checkpoint(checkpoint_folder)

    def _name_best(self, output_dir: Path) -> None:
        """The best checkpoint is known by its final name, not by the staging folder's."""
        best = self.state.best_model_checkpoint
        if best and Path(best).parent == self._staging:
            self.state.best_model_checkpoint = str(output_dir / Path(best).name)
            if self.args.should_save:
                self.state.save_to_json(str(Path(best) / "trainer_state.json"))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Write the model, or its adapter alone, with all that it needs to load; every rank must call it.

        Inside a save of a checkpoint errors are kept for later; called alone it raises DiskFullError or SaveError.
        """
        folder = Path(output_dir or str(self.args.output_dir))
        if self._ledger:
            self._write_model(folder, self._ledger)
            return
        folder.mkdir(parents=True, exist_ok=True)
        ledger = Ledger(folder, patient=True)
        with torch_saves_through(ledger):
            self._write_model(folder, ledger)
        agree(ledger, checkpoint_bytes(self.model, self.args))
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _write_model(self, folder: Path, ledger: Ledger) -> None:
        model: Any = self.accelerator.unwrap_model(self.model, keep_torch_compile=False)
        with partitioned_only(self.model_wrapped):
            if isinstance(model, PeftModel):
                write_adapter(model, folder, ledger, writes=self.args.should_save)
            else:
                held = model.state_dict(keep_vars=True)
                rank, world = place()
                write_weights(
                    model, folder, self.max_shard_size, ledger,
                    lambda names: gathered({name: held[name] for name in names}), rank=rank, world=world,
                )  # fmt: skip
        if self.args.should_save:
            with ledger.guard():
                self._write_beside(model, folder)

    def _write_beside(self, model: Any, folder: Path) -> None:
        """Config, generation config, tokenizer, arguments, and what came with the model; on one rank."""
        if isinstance(model, PeftModel):
            model.create_or_update_model_card(str(folder))
            config = model.peft_config["default"]
            trains, config.inference_mode = config.inference_mode, True
            config.save_pretrained(str(folder))
            config.inference_mode = trains
        else:
            model.config.dtype = str(model.dtype).removeprefix("torch.")
            model.config.architectures = [type(model).__name__]
            if model.is_remote_code():
                custom_object_save(model, folder, config=model.config)
            model.config.save_pretrained(folder)
        if model.generation_config is not None:
            model.generation_config.save_pretrained(folder)
        if self.processing_class is not None:
            self.processing_class.save_pretrained(folder)
        torch.save(self.args, folder / "training_args.bin")
        if self.base is not None and not isinstance(model, PeftModel):
            carry(self.base, folder)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self.is_deepspeed_enabled:
            super()._save_optimizer_and_scheduler(output_dir)
            return
        assert self._ledger is not None, "optimizer states are only saved inside a checkpoint"
        engine: Any = self.model_wrapped
        schedule: Any = self.lr_scheduler
        copy = engine._copy_recovery_script  # noqa: SLF001 - rank 0 alone runs it, between two collectives
        engine._copy_recovery_script = self._ledger.guard()(copy)  # noqa: SLF001
        try:
            # Not its own file "latest": rank 0 would write it while others still write their parts.
            frozen_too = not isinstance(self.model, PeftModel)
            engine.save_checkpoint(output_dir, save_latest=False, exclude_frozen_parameters=not frozen_too)
        finally:
            engine._copy_recovery_script = copy  # noqa: SLF001
        self._latest = f"global_step{engine.global_steps}"
        if self.args.should_save and not isinstance(schedule, DeepSpeedSchedulerWrapper):
            torch.save(schedule.state_dict(), Path(output_dir) / "scheduler.pt")


@contextmanager
def torch_saves_through(ledger: Ledger) -> Generator[None]:
    """Inside, ``torch.save`` to a path below the ledger's folder is entered in it: hashed while it writes, fsynced.

    So the state files of the Trainer and of DeepSpeed keep their own writers. The zip's CRC, a third of the time of a
    save, is left out beside our checksum.
    """
    plain, crc = torch.save, torch.serialization.get_crc32_options()

    def save(obj: object, f: Any, *args: Any, **kwargs: Any) -> None:
        if not isinstance(f, str | os.PathLike) or not Path(f).is_relative_to(ledger.folder):
            plain(obj, f, *args, **kwargs)
            return
        ledger.write(Path(f), lambda stream: plain(obj, cast("IO[bytes]", stream), *args, **kwargs))

    torch.save = save
    torch.serialization.set_crc32_options(False)
    try:
        yield
    finally:
        torch.save = plain
        torch.serialization.set_crc32_options(crc)
