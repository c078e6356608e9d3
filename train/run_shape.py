"""What shapes a run, as plain values under the names of ``drift.TABLE``: written into every checkpoint's manifest."""

import hashlib
import json
from collections.abc import Mapping
from typing import Any, cast

from transformers import AutoConfig, TrainingArguments

from ..data_tools.dataset import PackedDataset
from ..ds_configs.resolve import zero_stage
from ..storage.manifest import tool_versions
from .arguments import Arguments
from .drift import TABLE
from .model_arguments import ARCHITECTURE, ModelArguments

# Fields of a model's config that do not change what it computes, or that saving a checkpoint writes anew.
_NO_MODEL = frozenset({
    "transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache", "architectures", "auto_map", "bos_token_id",
    "eos_token_id", "pad_token_id", "_attn_implementation",
})  # fmt: skip


def run_shape(
    args: Arguments, hf: TrainingArguments, data: Any, settings: Mapping[str, Any] | None, tokenizer: Any
) -> dict[str, Any]:
    """Every name of ``TABLE`` with this run's value, JSON types only.

    ``settings`` are the resolved DeepSpeed settings. Tokenizer, template and model config are hashes.
    """
    model = args.model
    zero = (settings or {}).get("zero_optimization", {})
    config, dropout = _model_config(args)
    steps = hf.max_steps if hf.max_steps > 0 else None
    # Fused or not, the moments are the same; without fp32 masters they are others.
    kind = str(hf.optim).removesuffix("_FUSED")
    kept = None if model.master_weights == "fp32" else model.master_weights
    optimizer = [kind, kept, hf.optim_args, (settings or {}).get("optimizer", {}).get("type")]
    values: dict[str, Any] = {
        "model_config": config,
        "trained": _trained(model),
        "lora": _lora(model) if model.use_lora else None,
        "optimizer": " ".join(str(part) for part in optimizer if part),
        "zero_stage": zero_stage(dict(settings)) if settings else None,
        "precision": "bf16" if hf.bf16 else "fp16" if hf.fp16 else "fp32",
        "data": data.key,
        "samples": len(data),
        "data_seed": hf.seed if hf.data_seed is None else hf.data_seed,
        "global_batch": hf.world_size * hf.per_device_train_batch_size * hf.gradient_accumulation_steps,
        "packs": data.packs.key if isinstance(data, PackedDataset) else None,
        "max_steps": steps,
        "num_train_epochs": None if steps else hf.num_train_epochs,
        "betas": [hf.adam_beta1, hf.adam_beta2],
        "epsilon": hf.adam_epsilon,
        "lora_alpha": model.lora_alpha if model.use_lora else None,
        "dropout": dropout,
        "lora_dropout": model.lora_dropout if model.use_lora else None,
        "offload": {name: (zero.get(name) or {}).get("device") for name in ("offload_optimizer", "offload_param")},
        "activation_checkpointing": bool(hf.gradient_checkpointing or hf.activation_checkpointing),
        "fp8": model.fp8 or None,
        "attention": "flash_attention_2" if model.use_flash_attn else None,
        "model": str(model.model_name_or_path or model.config_name),
        "tokenizer": _tokenizer_hash(tokenizer),
        "chat_template": _hash(tokenizer.chat_template),
        **{name: tool_versions().get(name) for name in ("transformers", "torch", "deepspeed", "peft")},
    }
    own = {**vars(args.data), **vars(model)}  # flags under their own names, then those of TrainingArguments
    for name in TABLE.keys() - values.keys():
        values[name] = own[name] if name in own else getattr(hf, name, None)
    return cast(
        "dict[str, Any]", json.loads(json.dumps(values, default=lambda value: getattr(value, "value", str(value))))
    )


def _trained(model: ModelArguments) -> str:
    """Which parameters train, in the words of the flags."""
    if model.use_lora:
        return "adapter"
    only = "*self_attn*" if model.train_attention_params_only else model.train_only
    return f"{only or 'all'}" + (f" but {model.freeze}" if model.freeze else "")


def _lora(model: ModelArguments) -> dict[str, Any]:
    return {"rank": model.lora_rank, "target": model.lora_target, "experts": model.lora_experts}


def _model_config(args: Arguments) -> tuple[str, dict[str, Any]]:
    """A hash of the model's config without what does not change the model, and its dropout rates."""
    model = args.model
    if model.config_name:
        return _hash(
            [model.config_name, *(str(getattr(model, name)) for name in (*ARCHITECTURE, "model_max_length"))]
        ), {}
    try:
        loaded = AutoConfig.from_pretrained(
            str(model.model_name_or_path), trust_remote_code=model.trust_remote_code, cache_dir=model.cache_dir
        )
    except (OSError, ValueError, KeyError):
        return "", {}  # the model does not load either, and says it better
    fields: dict[str, Any] = {name: value for name, value in loaded.to_dict().items() if name not in _NO_MODEL}
    dropout = {name: fields.pop(name) for name in sorted(fields) if "dropout" in name or name.endswith("pdrop")}
    return _hash(fields), dropout


def _tokenizer_hash(tokenizer: Any) -> str:
    """A hash of a tokenizer's words and special tokens; of which files it was loaded says nothing."""
    return _hash([tokenizer.get_vocab(), {name: str(token) for name, token in tokenizer.special_tokens_map.items()}])


def _hash(value: Any) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True, default=str).encode()).hexdigest()[:16]
