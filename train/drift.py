"""How a run differs from the one whose checkpoint it goes on from: every difference named, each with what it does.

HF's Trainer compares the batch size. It goes on in silence with another seed, other data or another schedule, and takes
learning rate, betas and weight decay from the checkpoint whatever the flags say. Nothing here imports torch.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import Any

from .hf_flags import ArgumentsError, nearest


class Effect(Enum):
    """What a difference does to a run that goes on."""

    STATE = "the checkpoint's state does not fit; --init_from_checkpoint starts from its weights alone"
    ORDER = "samples would be repeated or skipped; --allow_drift NAME goes on all the same"
    COURSE = "loss or learning rate would take another way; --allow_drift NAME goes on, with the new value"
    SAID = "no harm"


_S, _O, _C, _N = Effect.STATE, Effect.ORDER, Effect.COURSE, Effect.SAID

# Name -> what a difference does, and why so. The order is that of the list which the user sees.
TABLE: dict[str, tuple[Effect, str]] = {
    "model_config": (_S, "another model"),
    "trained": (_S, "other parameters train"),
    "lora": (_S, "an adapter of another shape"),
    "optimizer": (_S, "another optimizer keeps other moments"),
    "zero_stage": (_S, "DeepSpeed's shards are for one stage"),
    "precision": (_S, "master weights are kept otherwise"),
    "data": (_O, "other tokens or labels"),
    "samples": (_O, "another number of rows"),
    "data_seed": (_O, "it decides the order"),
    "global_batch": (_O, "ranks x batch size x accumulation: a step takes other samples"),
    "packs": (_O, "other samples share a row"),
    "max_seq_length": (_O, "other samples are dropped or cut"),
    "over_long": (_O, "other samples are dropped or cut"),
    "train_sampling_strategy": (_O, "another order"),
    "dataloader_drop_last": (_O, "another end of each epoch"),
    "learning_rate": (_C, "the checkpoint's holds unless allowed"),
    "lr_scheduler_type": (_C, "another schedule"),
    "lr_scheduler_kwargs": (_C, "another schedule"),
    "min_lr": (_C, "another schedule"),
    "warmup_steps": (_C, "another schedule"),
    "max_steps": (_C, "the schedule is stretched over it, unless constant"),
    "num_train_epochs": (_C, "the schedule is stretched over it, unless constant"),
    "weight_decay": (_C, "the checkpoint's holds unless allowed"),
    "betas": (_C, "the checkpoint's hold unless allowed"),
    "epsilon": (_C, "the checkpoint's holds unless allowed"),
    "lora_alpha": (_C, "what the adapter adds is scaled by it"),
    "loss_normalization": (_C, "another loss"),
    "router_aux_loss_coef": (_C, "another loss"),
    "label_smoothing_factor": (_C, "another loss"),
    "neftune_noise_alpha": (_C, "another loss"),
    "average_tokens_across_devices": (_C, "another loss"),
    "max_grad_norm": (_N, "the new one holds from here"),
    "dropout": (_N, "the new rates hold from here"),
    "lora_dropout": (_N, "the new rate holds from here"),
    "seed": (_N, "random streams go on from the checkpoint's"),
    "world_size": (_N, "each step takes the same samples; dropout draws other numbers"),
    "per_device_train_batch_size": (_N, "another split of the global batch"),
    "gradient_accumulation_steps": (_N, "another split of the global batch"),
    "offload": (_N, "the same state elsewhere; the last bits may round otherwise"),
    "activation_checkpointing": (_N, "the same gradients, other memory"),
    "fp8": (_N, "the same weights; losses differ by fp8's rounding"),
    "attention": (_N, "the same sums in another order"),
    "model": (_N, "its weights are replaced by the checkpoint's; with LoRA it must be the same base"),
    "tokenizer": (_N, "the tokens trained are the same; it is saved with new checkpoints"),
    "chat_template": (_N, "the tokens trained are the same; it is saved with new checkpoints"),
    "save_steps": (_N, "the new interval holds"),
    "transformers": (_N, "another version may round otherwise"),
    "torch": (_N, "another version may round otherwise"),
    "deepspeed": (_N, "another version may round otherwise"),
    "peft": (_N, "another version may round otherwise"),
}  # fmt: skip

# What Trainer and optimizer take from the checkpoint in silence; when a difference is allowed it is set anew.
SCHEDULE = frozenset({
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "min_lr", "warmup_steps", "max_steps", "num_train_epochs",
})  # fmt: skip
GROUP_KEYS = {"weight_decay": "weight_decay", "betas": "betas", "epsilon": "eps"}
_LENGTHS = ("max_steps", "num_train_epochs")
_CONSTANT = ("constant", "constant_with_warmup")
_SHOWN = 60  # characters of a value in a message


@dataclass(frozen=True, slots=True)
class Drift:
    """One difference: the name in ``TABLE``, the checkpoint's value and this run's."""

    name: str
    then: Any
    now: Any

    def __str__(self) -> str:
        return f"{self.name} was {_short(self.then)}, is {_short(self.now)} ({TABLE[self.name][1]})"


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= _SHOWN else f"{text[:_SHOWN]}..."


def differences(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Drift]:
    """Every name of ``TABLE`` whose value differs, in its order; what was not recorded then counts as None."""
    return [Drift(name, then.get(name), now.get(name)) for name in TABLE if then.get(name) != now.get(name)]


def refused(drifts: Sequence[Drift], schedule: str, allowed: Collection[str]) -> list[Drift]:
    """Those of the differences that stop a resume; the others are only said.

    ``schedule`` is this run's ``lr_scheduler_type``: a constant one does not care how long the run is. ``allowed`` are
    the names of ``--allow_drift``.
    """
    return [
        drift
        for drift in drifts
        if TABLE[drift.name][0] is not Effect.SAID
        and drift.name not in allowed
        and not (drift.name in _LENGTHS and schedule in _CONSTANT)
    ]


def allowed_names(given: str | None) -> frozenset[str]:
    """The names of ``--allow_drift``. Raises ArgumentsError for one that is unknown or that nothing can allow."""
    names = frozenset(name.strip() for name in (given or "").split(",") if name.strip())
    for name in sorted(names):
        if name not in TABLE:
            near = nearest(name, TABLE).replace("--", "")
            raise ArgumentsError(f"--allow_drift {name}: no such name{near}; a refused resume tells them")
        if TABLE[name][0] is Effect.STATE:
            raise ArgumentsError(f"--allow_drift {name}: {Effect.STATE.value}")
    return names


def refusal(drifts: Sequence[Drift]) -> str:
    """What to tell of differences that stop a resume: one line each, grouped by what they do."""
    lines: list[str] = []
    for effect in Effect:
        group = [drift for drift in drifts if TABLE[drift.name][0] is effect]
        if group:
            names = ",".join(drift.name for drift in group)
            lines += [f"  {drift}" for drift in group] + [f"    -> {effect.value.replace('NAME', names)}"]
    return "\n".join(lines)
