"""Load the model, or build a new one; never a random weight where a trained one was asked for."""

from collections.abc import Callable, Collection
from contextlib import nullcontext
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

from ..data_tools.tokenizer_files import remote_code_hint, vocabulary_size
from ..storage.assets import read_json
from ..storage.safetensors_io import INDEX_NAME, Checkpoint
from .freeze import patterns
from .hf_flags import ArgumentsError, nearest
from .loading import ModelError, streamed_loading
from .model_arguments import ARCHITECTURE, ModelArguments


def load_model(
    args: ModelArguments, dtype: torch.dtype, tokenizer: Any, given: Collection[str], say: Callable[[str], None] = print
) -> PreTrainedModel:
    """The model to train on the CPU or, under ZeRO-3, already partitioned.

    Weights come in ``dtype``. Raises ModelError when a weight is missing from the checkpoint or an embedding is too
    small for the tokenizer, ArgumentsError when the folder does not hold a causal language model.
    """
    model = _new_model(args, dtype, tokenizer, given) if args.config_name else _pretrained(args, dtype, say)
    rows = _rows(model.get_input_embeddings())
    needed = vocabulary_size(tokenizer)
    if needed > rows:
        raise ModelError(
            f"the tokenizer's largest id is {needed - 1} but the model embeds only {rows} ids: they do not belong together"
        )
    return model


def _pretrained(args: ModelArguments, dtype: torch.dtype, say: Callable[[str], None]) -> PreTrainedModel:
    path = str(args.model_name_or_path)
    if not Path(path).exists():
        say(f"model: there is no folder {path} here; asking the Hub for it")
    try:
        _check_files(Path(path))
        with streamed_loading():
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=dtype,
                trust_remote_code=args.trust_remote_code,
                cache_dir=args.cache_dir,
                output_loading_info=True,
            )
    except ModelError:
        raise
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentsError(
            f"the model {path} does not load: {error}{remote_code_hint(Path(path), allowed=args.trust_remote_code)}"
        ) from error
    model, info = loaded
    _check_names(path, "missing", info["missing_keys"], args.allow_missing, say)
    _check_names(path, "unexpected", info["unexpected_keys"], args.allow_unexpected, say)
    return model


def _check_files(folder: Path) -> None:
    """Refuse a folder whose weight files are cut, missing, or outside of it, before anything is built from them."""
    if any(folder.glob("*.safetensors")) or (folder / INDEX_NAME).is_file():
        with Checkpoint(folder):
            pass


def _check_names(path: str, kind: str, names: Collection[str], allowed: str | None, say: Callable[[str], None]) -> None:
    """Refuse tensors that the checkpoint lacks, or has over, unless their names were allowed; say what was.

    An unexpected tensor comes as ``NAME in FILE``.
    """
    wanted = patterns(allowed)
    good = {name for name in names if any(fnmatchcase(name.partition(" in ")[0], pattern) for pattern in wanted)}
    if bad := sorted(set(names) - good):
        what = "are not in the checkpoint" if kind == "missing" else "have no place in this model"
        raise ModelError(
            f"{path}: {len(bad)} tensors {what}, the first is {bad[0]}; if that is right, --allow_{kind} "
            f"'{bad[0].partition(' in ')[0]}' (patterns, comma-separated)"
        )
    if good:
        fate = (
            "made at random, as they are not in the checkpoint" if kind == "missing" else "of the checkpoint not used"
        )
        say(f"model: {len(good)} tensors {fate} (--allow_{kind}), the first is {min(good)}")


def _new_model(args: ModelArguments, dtype: torch.dtype, tokenizer: Any, given: Collection[str]) -> PreTrainedModel:
    """A model with random weights from a config file or a model type; flags that were given override the file."""
    name = str(args.config_name)
    values = {field: getattr(args, flag) for flag, field in ARCHITECTURE.items() if flag in given}
    values.setdefault("vocab_size", vocabulary_size(tokenizer))
    if args.model_max_length:
        values["max_position_embeddings"] = args.model_max_length
    for token in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values[token] = getattr(tokenizer, token)
    where = f"--config_name {name}: no such file, and it"
    if Path(name).exists():
        path = Path(name) / "config.json" if Path(name).is_dir() else Path(name)
        values = {**read_json(path), **values}
        name = str(values.pop("model_type", None))
        where = f"{path}: model_type {name!r}"
    if name not in CONFIG_MAPPING:
        hint = nearest(name, CONFIG_MAPPING).replace("--", "")
        raise ArgumentsError(f"{where} is not a model type of transformers{hint}")
    config = AutoConfig.for_model(name, **values)
    fields = set(type(config)().to_dict())
    for flag, field in ARCHITECTURE.items():
        if flag in given and field not in fields and getattr(args, flag):
            raise ArgumentsError(f"--{flag}: a {config.model_type} model has no such setting")
    if getattr(config, "head_dim", 0) is None:
        config.head_dim = config.hidden_size // config.num_attention_heads
    place = nullcontext()
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if accelerator is not None and not is_deepspeed_zero3_enabled():  # random numbers by the billion are slow on a CPU
        place = torch.device(accelerator.type, torch.accelerator.current_device_index())
    with place:
        return AutoModelForCausalLM.from_config(config, dtype=dtype)


def _rows(embedding: Any) -> int:
    """Rows of an embedding; under ZeRO-3 the parameter itself is empty and ``ds_shape`` tells."""
    weight = embedding.weight
    return int(getattr(weight, "ds_shape", weight.shape)[0])
