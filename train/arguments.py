"""All training flags: the users' names and defaults, obsolete ones mapped with one warning each.

Three sources meet in one namespace: ``ModelArguments``, ``DataArguments`` of the data stage, and the fields of the
installed transformers' ``TrainingArguments``. Nothing here imports torch.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, fields, replace
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..data_tools.arguments import DataArguments
from ..data_tools.filters import unfiltered
from ..data_tools.mixture import mixture_file
from ..data_tools.mixture_index import check_mixture
from ..data_tools.prepared import KIND_NAMES, prepared_folder
from ..data_tools.preprocess import check_sources
from ..data_tools.schema import DataError, Kind
from ..data_tools.token_files import check_reading, read_tokens, token_prefix
from ..ds_configs.resolve import FIXED_BY_FLAGS, check_fixed, check_precision, resolve, zero_stage
from ..storage.assets import read_json
from ..storage.megatron_folder import is_megatron
from .fp8 import check_fp8
from .hf_flags import ArgumentsError, convert, hf_flags, hf_value, nearest
from .masters import check_masters
from .model_arguments import ADAPTER_CONFIG, ARCHITECTURE, ModelArguments, check_model_path
from .obsolete import OBSOLETE, RENAMED, map_obsolete
from .schedule import schedule


@dataclass(frozen=True)
class Arguments:
    """A checked command line: what each room reads, the HF fields as given, and warnings for the user.

    ``kind`` is what is trained on: conversations (sft) or documents (pretrain).
    """

    model: ModelArguments
    data: DataArguments
    hf: dict[str, Any]
    given: frozenset[str]
    warnings: list[str]
    kind: Kind = "chat"

    @property
    def shares_rows(self) -> bool:
        """Whether samples or documents share rows without reading one another."""
        text = self.kind == "document" and not self.data.use_dummy_data
        return self.data.packing or (text and not self.data.cross_document_attention)


# HF's own defaults that a fine-tuning run wants otherwise; a given flag always wins.
HF_DEFAULTS: dict[str, Any] = {
    "output_dir": "output",
    "optim": "adamw_torch_fused",
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "report_to": "tensorboard" if find_spec("tensorboard") else "none",
}


def parse(argv: Sequence[str], kind: Kind = "chat") -> Arguments:
    """The flags of one run, checked without torch: ``--name value``, ``--name=value`` or a bare ``--switch``.

    Raises ArgumentsError (unknown flag with the nearest name, wrong type, contradiction) and DataError.
    """
    arguments = build(read_flags(argv), kind)
    model = arguments.model.model_name_or_path
    if model and is_megatron(Path(model)):
        raise ArgumentsError(
            f"--model_name_or_path {model}: a Megatron checkpoint; start with finebridge, which converts it first, or convert it "
            "with: finebridge convert --to hf"
        )
    return arguments


def read_flags(argv: Sequence[str]) -> dict[str, str | bool]:
    """``--name value`` pairs as a dictionary; a switch without a value is True. The last one of a name wins."""
    values: dict[str, str | bool] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not re.match(r"--?[A-Za-z]", word):
            raise ArgumentsError(f"{word!r}: a flag (--name value) is expected here")
        name, has_value, value = word.lstrip("-").partition("=")
        name = name.replace("-", "_")
        given: str | bool = True
        if has_value:
            given = value
        elif words and not re.match(r"--[A-Za-z]", words[0]):
            given = words.pop(0)
            if name in hf_flags() and "list" in hf_flags()[name].kinds:  # --report_to tensorboard wandb
                more = list(takewhile(lambda word: not re.match(r"--[A-Za-z]", word), words))
                del words[: len(more)]
                given = json.dumps([given, *more]) if more else given
        values.pop(name, None)  # what is given later stands later, also under an older name of the same flag
        values[name] = given
    return values


def as_word(name: str, value: Any) -> str | bool:
    """A recipe's value as it would be written on a command line: lists of our own flags by commas, of HF's as JSON."""
    if isinstance(value, str | bool):
        return value
    if isinstance(value, list) and name not in hf_flags():
        return ",".join(map(str, value))
    return json.dumps(value) if isinstance(value, list | dict) else str(value)


def build(values: Mapping[str, Any], kind: Kind = "chat") -> Arguments:
    """Arguments from raw values by name (of a command line or a recipe). Raises ArgumentsError, DataError."""
    values = {name: as_word(name, value) for name, value in values.items()}
    warnings = map_obsolete(values)
    own = {f.name: (cls, f) for cls in (ModelArguments, DataArguments) for f in fields(cls)}
    parsed: dict[type, dict[str, Any]] = {ModelArguments: {}, DataArguments: {}}
    hf: dict[str, Any] = {}
    if values.get("resume_from_checkpoint") is True:  # the bare switch: the newest of the output folder
        values["resume_from_checkpoint"] = "true"
    for name, raw in values.items():
        if name in own:
            cls, spec = own[name]
            parsed[cls][name] = own_value(name, raw, spec.type)
        elif name.startswith("no_") and name[3:] in own and str(raw).lower() == "true":
            cls, _ = own[name[3:]]
            parsed[cls][name[3:]] = False
        elif name == "activation_checkpointing" and str(raw).lower() == "auto":
            hf[name] = "auto"  # ours, see recompute.py
        elif name in hf_flags():
            hf[name] = convert(hf_flags()[name], raw)
        elif name.startswith("no_") and name[3:] in hf_flags() and str(raw).lower() == "true":
            hf[name[3:]] = False
        else:
            raise ArgumentsError(f"unknown flag --{name}{nearest(name, known_flags())}")
    _init_from(parsed[ModelArguments], hf)
    if isinstance(resume := hf.get("resume_from_checkpoint"), str) and resume.lower() not in ("true", "false"):
        if not {"model_name_or_path", "config_name"} & set(values):
            parsed[ModelArguments]["model_name_or_path"] = resume  # as the Hunyuan README resumes: no model path given
    elif isinstance(resume, str):
        hf["resume_from_checkpoint"] = resume.lower() == "true" or None
    arguments = Arguments(
        ModelArguments(**parsed[ModelArguments]),
        _effective(DataArguments(**parsed[DataArguments]), kind, warnings),
        {**HF_DEFAULTS, **hf},
        frozenset(values),
        warnings,
        kind,
    )
    _check_together(arguments)
    return arguments


# Flags that mean nothing to the other kind of data, and why.
_IDLE: dict[Kind, tuple[tuple[str, ...], str]] = {
    "chat": (("append_eod", "cross_document_attention"), "conversations; they are for pretraining text"),
    "document": (
        ("chat_template", "think_mode", "enable_thinking", "mask_compat", "over_long", "packing"),
        "pretraining text, which is cut into full rows",
    ),
}


def _effective(data: DataArguments, kind: Kind, warnings: list[str]) -> DataArguments:
    """The data flags without those that mean nothing to this kind of data, which is warned of."""
    plain = DataArguments()
    names, why = _IDLE[kind]
    given = [name for name in names if getattr(data, name) != getattr(plain, name)]
    if given:
        warnings.append(f"--{', --'.join(given)}: no effect on {why}")
    return replace(data, **{name: getattr(plain, name) for name in given})


def _init_from(model: dict[str, Any], hf: Mapping[str, Any]) -> None:
    """``--init_from_checkpoint``: a full checkpoint is the model to start from, an adapter goes on top of its base.

    Raises ArgumentsError when the folder holds neither, or a resume or a new model is asked for too.
    """
    path = model.get("init_from_checkpoint")
    if path is None:
        return
    folder = Path(path)
    for other, given in (("resume_from_checkpoint", hf), ("config_name", model)):
        if given.get(other) not in (None, False, "false"):
            raise ArgumentsError(
                f"--init_from_checkpoint and --{other} exclude each other: weights alone, or all the state"
            )
    if not (folder / ADAPTER_CONFIG).is_file():
        check_model_path("--init_from_checkpoint", path, hub=False)
        model["model_name_or_path"] = path
        return
    config = read_json(folder / ADAPTER_CONFIG)
    model.setdefault("model_name_or_path", config.get("base_model_name_or_path"))
    model["use_lora"] = True
    targets = config.get("target_modules")
    told = {
        "lora_rank": config.get("r"),
        "lora_alpha": config.get("lora_alpha"),
        "lora_dropout": config.get("lora_dropout"),
        "lora_target": ",".join(sorted(targets)) if isinstance(targets, list) else targets,
    }
    for name, value in told.items():
        if model.setdefault(name, value) != value:
            raise ArgumentsError(f"--{name} {model[name]}: the adapter of --init_from_checkpoint {path} has {value}")


def known_flags() -> list[str]:
    """Every name that a command line or recipe may use."""
    own = [f.name for cls in (ModelArguments, DataArguments) for f in fields(cls)]
    return [*own, *hf_flags(), *RENAMED, *OBSOLETE]


def own_flags() -> dict[str, tuple[str, Any, str]]:
    """Finebridge's own flags: name -> (type, default, help)."""
    return {
        f.name: (str(f.type), None if f.default is MISSING else f.default, f.metadata["help"])
        for cls in (ModelArguments, DataArguments)
        for f in fields(cls)
    }


def own_value(name: str, raw: str | bool, kind: Any) -> Any:
    """A raw value as the type of an own field (its annotation). Raises ArgumentsError."""
    if isinstance(raw, bool) and any("true" in get_args(part) for part in (kind, *get_args(kind))):
        raw = str(raw).lower()  # a choice of words; YAML made a truth value of it
    if get_origin(kind) is Literal or any(get_origin(part) is Literal for part in get_args(kind)):
        choices = next(get_args(part) for part in (kind, *get_args(kind)) if get_origin(part) is Literal)
        if str(raw) not in choices:
            raise ArgumentsError(f"--{name} {raw}: choose one of {', '.join(choices)}{_near_choice(str(raw), choices)}")
        return str(raw)
    options = get_args(kind) or (kind,)
    if isinstance(raw, bool):
        if bool not in options:
            raise ArgumentsError(f"--{name} needs a value")
        return raw
    if bool in options:
        if raw.lower() not in ("true", "false", "1", "0", "yes", "no"):
            raise ArgumentsError(f"--{name} {raw}: true or false is expected")
        return raw.lower() in ("true", "1", "yes")
    for option in (int, float):
        if option in options:
            try:
                return option(raw)
            except ValueError:
                raise ArgumentsError(f"--{name} {raw}: a number is expected") from None
    return raw


def _near_choice(raw: str, choices: Sequence[str]) -> str:
    return nearest(raw, choices).replace("--", "")


# What --report_to names, and the module that must be installed for it.
_REPORTERS = {
    "tensorboard": "tensorboard",
    "wandb": "wandb",
    "mlflow": "mlflow",
    "swanlab": "swanlab",
    "trackio": "trackio",
}


# Flags of the Trainer's own loader, which this one does not have: name -> the value refused, and why.
_NOT_WITH_OUR_ORDER = {
    "train_sampling_strategy": ("batch_rebalance", "ranks are balanced in every order here; leave the flag out"),
    "ignore_data_skip": ("True", "samples would be repeated; to start anew from weights use --init_from_checkpoint"),
    "auto_find_batch_size": ("True", "another batch size is another run; set --per_device_train_batch_size"),
}


def _check_hf(args: Arguments) -> None:
    """What transformers would say late, or not at all. Raises ArgumentsError; adds warnings."""
    hf = args.hf
    evaluates = str(hf_value(hf, "eval_strategy")) != "no"
    if args.data.eval_data_file and not evaluates:
        args.warnings.append("--eval_data_file is never evaluated: say when with --eval_strategy steps or epoch")
    if evaluates and not args.data.eval_data_file:
        raise ArgumentsError(f"--eval_strategy {hf['eval_strategy']} needs --eval_data_file")
    if args.model.early_stopping_patience and not evaluates:
        raise ArgumentsError(
            "--early_stopping_patience needs evaluations: give --eval_data_file and --eval_strategy steps"
        )
    if not hf_value(hf, "average_tokens_across_devices"):
        args.warnings.append("--average_tokens_across_devices has no effect, see --loss_normalization")
    for name, (wrong, why) in _NOT_WITH_OUR_ORDER.items():
        if str(hf_value(hf, name)) == wrong:
            raise ArgumentsError(f"--{name} {wrong}: {why}")
    if args.model.min_lr and {"min_lr", "min_lr_rate", "min_lr_ratio", "lr_end"} & set(
        hf.get("lr_scheduler_kwargs") or {}
    ):
        raise ArgumentsError("--min_lr and --lr_scheduler_kwargs both set a floor; give one of them")
    if hf.get("save_on_each_node"):
        raise ArgumentsError(
            "--save_on_each_node is not supported: --output_dir must be one folder that all ranks share"
        )
    wanted = hf.get("report_to") or []
    for name in [wanted] if isinstance(wanted, str) else wanted:
        if name in _REPORTERS and find_spec(_REPORTERS[name]) is None:
            raise ArgumentsError(
                f"--report_to {name}: not installed; {sys.executable} -m pip install {_REPORTERS[name]}"
            )
    output = Path(hf["output_dir"]).absolute()
    there = next(path for path in (output, *output.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise ArgumentsError(
            f"--output_dir {hf['output_dir']}: {there} is {'not writable' if there.is_dir() else 'a file'}"
        )


def _check_raw(name: str, data: DataArguments, kind: Kind) -> None:
    """What can be told of files that are not prepared before torch is imported. Raises DataError."""
    if file := mixture_file(name):
        if kind != "chat":
            raise DataError(f"{name}: a mixture is for finebridge sft; {KIND_NAMES[kind]} are not mixed yet")
        check_mixture(file, data, kind)
        return
    prefix = token_prefix(name)
    if prefix is None:
        check_sources([name], data, kind)
    elif kind == "document":
        check_reading(prefix, data)
        read_tokens(prefix)
    else:
        raise DataError(
            f"{name}: Megatron's token files hold plain text for finebridge pretrain; files of chats are read by "
            "finebridge data import"
        )


def _check_together(args: Arguments) -> None:
    """What one flag alone cannot tell. Raises ArgumentsError, DataError, DeepSpeedConfigError; adds warnings."""
    model, data, hf = args.model, args.data, args.hf
    if not (data.use_dummy_data or data.train_data_file):
        raise ArgumentsError("--train_data_file is missing (or --use_dummy_data for a speed test)")
    for name, flags in ((data.train_data_file, data), (data.eval_data_file, unfiltered(data))):
        if name and not prepared_folder([name]):
            _check_raw(name, flags, args.kind)
    _check_hf(args)
    if hf.get("bf16") and hf.get("fp16"):
        raise ArgumentsError("--bf16 and --fp16 exclude each other")
    schedule(hf_value(hf, "lr_scheduler_type"), model.min_lr, float(hf_value(hf, "learning_rate")))
    stage, settings = 0, None
    if hf.get("deepspeed"):
        settings = resolve(str(hf["deepspeed"]))
        check_precision(settings, bf16=bool(hf.get("bf16")), fp16=bool(hf.get("fp16")), where=str(hf["deepspeed"]))
        fixed = {name: hf_value(hf, name) for name in FIXED_BY_FLAGS.values()}
        check_fixed(settings, fixed, where=str(hf["deepspeed"]))
        stage = zero_stage(settings)
    if warning := check_masters(model.master_weights, hf, settings, use_lora=model.use_lora):
        args.warnings.append(warning)
    if model.fp8:
        in_bf16 = bool(hf.get("bf16")) and (settings is not None or model.master_weights != "fp32")
        check_fp8(bf16_weights=in_bf16, stage=stage, use_lora=model.use_lora)
    if model.make_moe_param_leaf_module and stage != 3:  # noqa: PLR2004
        args.warnings.append("--make_moe_param_leaf_module has no effect without ZeRO-3 (--deepspeed ds_zero3_...)")
    if model.memory_budget_gib is not None and isinstance(hf.get("activation_checkpointing"), bool):
        args.warnings.append("--memory_budget_gib has no effect: --gradient_checkpointing says whether to recompute")
    if model.train_attention_params_only and model.use_lora:
        args.warnings.append("--train_attention_params_only has no effect with --use_lora: only the adapter is trained")
    if model.model_name_or_path and (unused := sorted(args.given & set(ARCHITECTURE))):
        args.warnings.append(f"--{', --'.join(unused)}: ignored, {model.model_name_or_path} has its own config")
    resume = hf.get("resume_from_checkpoint")
    if isinstance(resume, str) and not Path(resume).is_dir():
        raise ArgumentsError(
            f"--resume_from_checkpoint {resume}: no such folder; 'true' takes the newest of --output_dir"
        )
