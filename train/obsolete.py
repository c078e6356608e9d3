"""Flags that today's transformers no longer knows, mapped to what they mean now, one warning each.

To add one: a line in ``RENAMED`` when only the name changed, else a function in ``OBSOLETE``.
"""

import json
import os
from collections.abc import Callable
from typing import Any

Values = dict[str, Any]

RENAMED = {
    "evaluation_strategy": "eval_strategy",
    "no_cuda": "use_cpu",
    "gradient_checkpointing": "activation_checkpointing",
    "gradient_checkpointing_kwargs": "activation_checkpointing_kwargs",
    "max_bad_ratio": "max_rejects",
    # MindSpeed-LLM's names
    "data_path": "train_data_file",
    "prompt_type": "chat_template",
    "workers": "preprocessing_num_workers",
    "pack": "packing",
    "neat_pack": "packing",
    "load": "model_name_or_path",
    "save": "output_dir",
    "seq_length": "max_seq_length",
}


def _overwrite_output_dir(_values: Values, _raw: Any) -> str:
    return "--overwrite_output_dir is ignored: a checkpoint is replaced only by one of the same step, others stay"


def _save_safetensors(_values: Values, _raw: Any) -> str:
    return "--save_safetensors is ignored: weights are always saved as safetensors"


def _warmup_ratio(values: Values, raw: Any) -> str:
    if float(values.get("warmup_steps", 0)) != 0:
        return f"--warmup_ratio {raw} is ignored, --warmup_steps {values['warmup_steps']} is given too"
    values["warmup_steps"] = raw
    return f"--warmup_ratio is now --warmup_steps {raw} (below 1 it is a share of all steps)"


def _group_by_length(values: Values, raw: Any) -> str:
    if str(raw).lower() in ("false", "0", "no"):
        return "--group_by_length is gone; samples are drawn at random by default"
    values.setdefault("train_sampling_strategy", "group_by_length")
    return "--group_by_length is now --train_sampling_strategy group_by_length"


def _logging_dir(_values: Values, raw: Any) -> str:
    os.environ.setdefault("TENSORBOARD_LOGGING_DIR", str(raw))
    return f"--logging_dir is now the environment variable TENSORBOARD_LOGGING_DIR, set to {raw}"


def _json_keys(values: Values, raw: Any) -> str:
    columns = json.dumps({"text": raw})
    if values.setdefault("map_keys", columns) != columns:
        return f"--json_keys {raw} is ignored, --map_keys {values['map_keys']} is given too"
    if "handler_name" not in values:
        values.setdefault("data_format", "text")
    return f"--json_keys is now --map_keys '{columns}'"


def _n_subs(_values: Values, _raw: Any) -> str:
    return "--n_subs is not needed: memory is bounded, whatever the size of the data"


def _local_rank(_values: Values, _raw: Any) -> None:
    """Launchers pass it; the environment says the same."""


OBSOLETE: dict[str, Callable[[Values, Any], str | None]] = {
    "overwrite_output_dir": _overwrite_output_dir,
    "save_safetensors": _save_safetensors,
    "warmup_ratio": _warmup_ratio,
    "logging_dir": _logging_dir,
    "group_by_length": _group_by_length,
    "local_rank": _local_rank,
    "json_keys": _json_keys,
    "n_subs": _n_subs,
}


def map_obsolete(values: Values) -> list[str]:
    """Replace obsolete names in ``values`` in place; what to tell the user."""
    said: list[str] = []
    for old, new in RENAMED.items():
        if old in values:
            names = list(values)
            old_is_later = new not in values or names.index(old) > names.index(new)  # the last one given wins
            raw = values.pop(old)
            if old_is_later:
                values[new] = raw
            said.append(f"--{old} is now --{new}")
    for old, replace in OBSOLETE.items():
        if old in values and (text := replace(values, values.pop(old))):
            said.append(text)
    return said
