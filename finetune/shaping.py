"""Which flags shape what a training makes: all but those that say where things lie, how fast, and what is shown."""

from dataclasses import fields
from typing import Any

from ..data_tools.arguments import DataArguments
from ..data_tools.filters import FILTER_FLAGS
from ..ds_configs.resolve import resolve
from ..train.arguments import Arguments
from ..train.model_arguments import ModelArguments
from ..train.record import default_of

# Paths, in whose place the hashes of what lies there count.
_PLACES = frozenset({
    "model_name_or_path", "tokenizer_name_or_path", "config_name", "train_data_file", "eval_data_file", "init_from_checkpoint",
    "output_dir", "prepared_data_dir", "cache_dir", "deepspeed", "resume_from_checkpoint",
})  # fmt: skip
# In the hash of the prepared data already.
_DATA = frozenset({
    "data_format", "map_keys", "handler_name", "chat_template", "think_mode", "enable_thinking", "append_eod", "mask_compat",
    *FILTER_FLAGS,
})  # fmt: skip
# Nothing that is learned depends on them.
_IDLE = frozenset({
    "trust_remote_code", "preprocessing_num_workers", "max_rejects", "heartbeat_timeout", "peak_tflops", "allow_drift",
    "max_shard_size", "model_size", "complex_data", "report_to", "project", "trackio_space_id", "run_name", "disable_tqdm",
    "log_level", "log_level_replica", "log_on_each_node", "logging_strategy", "logging_first_step", "logging_steps",
    "logging_nan_inf_filter", "save_strategy", "save_steps", "save_total_limit", "save_only_model", "do_train", "do_eval",
    "do_predict", "dataloader_num_workers", "dataloader_pin_memory", "dataloader_persistent_workers",
    "dataloader_prefetch_factor", "push_to_hub", "ddp_timeout", "skip_memory_metrics", "include_num_input_tokens_seen",
})  # fmt: skip


def shaping_flags(args: Arguments) -> dict[str, Any]:
    """Name -> value of every flag that shapes what is trained and is not at its default; DeepSpeed's settings as they are."""
    found: dict[str, Any] = {}
    for part, cls in ((args.model, ModelArguments), (args.data, DataArguments)):
        found |= {f.name: getattr(part, f.name) for f in fields(cls) if getattr(part, f.name) != f.default}
    found |= {name: value for name, value in args.hf.items() if value != default_of(name)}
    kept = {
        name: value
        for name, value in found.items()
        if name not in _PLACES | _DATA | _IDLE and not name.startswith("hub_") and value is not None
    }
    if args.hf.get("deepspeed"):
        kept["deepspeed"] = resolve(str(args.hf["deepspeed"]))
    return kept
