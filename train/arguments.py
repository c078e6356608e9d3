"""All training flags: the users' names and defaults, obsolete ones mapped with one warning each.

Three sources meet in one namespace: ``ModelArguments`` here, ``DataArguments`` of the data stage, and the fields of the
installed transformers' ``TrainingArguments``. Nothing here imports torch.
"""

import json
import os
import re
import sys
from collections.abc import Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, replace
from importlib.util import find_spec
from itertools import takewhile
from pathlib import Path
from typing import Any, Literal, get_args, get_origin

from ..data_tools.arguments import DataArguments
from ..data_tools.prepared import prepared_folder
from ..data_tools.preprocess import check_sources
from ..data_tools.schema import DataError, Kind
from ..data_tools.token_files import check_reading, read_tokens, token_prefix
from ..ds_configs.resolve import FIXED_BY_FLAGS, check_fixed, check_precision, resolve, zero_stage
from ..storage.assets import read_json
from ..storage.manifest import steps
from ..storage.space import parse_size
from .drift import allowed_names
from .hf_flags import ArgumentsError, convert, hf_flags, hf_value, nearest
from .obsolete import OBSOLETE, RENAMED, map_obsolete
from .schedule import schedule

Normalization = Literal["token", "sequence", "batch"]
SpikePolicy = Literal["warn", "stop", "off"]

ADAPTER_CONFIG = "adapter_config.json"
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def _arg(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(kw_only=True)
class ModelArguments:
    """What is trained and how, beyond what ``TrainingArguments`` says. Raises ArgumentsError on contradictions."""

    model_name_or_path: str | None = _arg(None, "folder (or Hub name) of the model to fine-tune")
    tokenizer_name_or_path: str | None = _arg(None, "folder of the tokenizer; default: the model's")
    trust_remote_code: bool = _arg(False, "run the .py files that come with the model or tokenizer; read them first")
    cache_dir: str | None = _arg(None, "where downloads from the Hub are kept")
    use_flash_attn: bool = _arg(False, "use FlashAttention-2; an error where it cannot run")
    use_lora: bool = _arg(False, "train a LoRA adapter; only the adapter is saved")
    lora_rank: int = _arg(64, "rank of the adapter")
    lora_alpha: float = _arg(8, "the adapter's update is scaled by lora_alpha / lora_rank")
    lora_dropout: float = _arg(0.0, "dropout before the adapter")
    lora_target: str = _arg("q_proj,k_proj,v_proj,o_proj", "modules to adapt, comma-separated, or all-linear")
    lora_experts: bool = _arg(False, "adapt the experts of MoE blocks too, fused or in a list; found by structure")
    train_attention_params_only: bool = _arg(False, "train only parameters whose name contains self_attn")
    train_only: str | None = _arg(None, "train only parameters whose name matches, comma-separated: *self_attn*,*norm*")
    freeze: str | None = _arg(None, "do not train parameters whose name matches, comma-separated: *embed_tokens*")
    make_moe_param_leaf_module: bool | None = _arg(
        None, "ZeRO-3: fetch each MoE block as a whole (leaf module); default: yes when the model has such blocks"
    )
    router_aux_loss_coef: float | None = _arg(
        None, "add the routers' balancing loss times this; 0 leaves it out; default: as the model's config says"
    )
    allow_missing: str | None = _arg(
        None, "weights that the checkpoint may lack (made at random), comma-separated patterns"
    )
    allow_unexpected: str | None = _arg(None, "tensors of the checkpoint that may go unused, comma-separated patterns")
    loss_normalization: Normalization = _arg(  # noqa: RUF009 - it makes a field
        "token", "mean of a step's loss over its tokens, over its samples' means, or over its micro-batches' means"
    )
    loss_spike_policy: SpikePolicy = _arg(  # noqa: RUF009 - it makes a field
        "warn", "what to do when a loss is far over the last 50: warn, stop or off"
    )
    loss_spike_factor: float = _arg(3.0, "a loss over this many times the median of the last 50 steps is a spike")
    early_stopping_patience: int | None = _arg(
        None, "stop when --metric_for_best_model (eval_loss) has not improved for so many evaluations"
    )
    early_stopping_threshold: float = _arg(0.0, "how much better counts as improved")
    init_from_checkpoint: str | None = _arg(
        None, "start a new run from the weights (or the LoRA adapter) of this checkpoint folder, nothing else of it"
    )
    allow_drift: str | None = _arg(
        None,
        "names, comma-separated: resume although these differ from the checkpoint's run; a refused resume tells them",
    )
    peak_tflops: float | None = _arg(
        None, "dense bf16 TFLOP/s of one device, which MFU is a share of; default: the maker's figure where it is known"
    )
    min_lr: float = _arg(0.0, "absolute floor of the learning rate; must lie below --learning_rate")
    max_shard_size: str = _arg("5GB", "largest weight file of a checkpoint; each rank writes some of them")
    heartbeat_timeout: float = _arg(
        50.0, "seconds after which a rank that says nothing, or keeps the others waiting, ends the run; 0 is off"
    )
    config_name: str | None = _arg(
        None, "build a NEW model with random weights from this config.json, or of this transformers model type"
    )
    model_max_length: int | None = _arg(None, "only for --config_name: max_position_embeddings of the new model")
    hidden_size: int = _arg(2048, "only for --config_name")
    num_layers: int = _arg(24, "only for --config_name")
    num_attention_heads: int = _arg(16, "only for --config_name")
    num_key_value_heads: int = _arg(16, "only for --config_name")
    intermediate_size: int = _arg(8192, "only for --config_name")
    max_position_embeddings: int = _arg(2048, "only for --config_name; --model_max_length wins")
    vocab_size: int = _arg(
        50257, "only for --config_name, at least the tokenizer's; when not given the tokenizer's size"
    )
    type_vocab_size: int = _arg(1, "accepted and unused, as in the original")
    layer_norm_eps: float = _arg(1e-5, "only for --config_name: epsilon of the norms")
    moe_topk: int = _arg(4, "only for --config_name: experts a token goes to")
    num_experts: int = _arg(8, "only for --config_name: experts in an MoE block")
    num_shared_expert: int = _arg(1, "only for --config_name")
    use_cla: bool = _arg(False, "only for --config_name: cross-layer attention")
    cla_share_factor: int = _arg(2, "only for --config_name")
    use_mixed_mlp_moe: bool = _arg(False, "only for --config_name: a shared expert beside the routed ones")
    use_qk_norm: bool = _arg(False, "only for --config_name")
    tie_word_embeddings: bool = _arg(True, "only for --config_name")

    def __post_init__(self) -> None:
        for name in ("model_name_or_path", "tokenizer_name_or_path"):
            check_model_path(f"--{name}", getattr(self, name))
        if self.model_name_or_path and self.config_name:
            raise ArgumentsError("--model_name_or_path (pretrained) and --config_name (a new model) exclude each other")
        if not (self.model_name_or_path or self.config_name):
            raise ArgumentsError("--model_name_or_path is missing: the folder of the model to fine-tune")
        if self.config_name and not self.tokenizer_name_or_path:
            raise ArgumentsError(
                "--config_name needs --tokenizer_name_or_path: a new model has no tokenizer of its own"
            )
        if self.use_lora and (self.train_only or self.freeze):
            flag = "train_only" if self.train_only else "freeze"
            raise ArgumentsError(f"--{flag} and --use_lora exclude each other: only the adapter is trained")
        if self.lora_experts and not self.use_lora:
            raise ArgumentsError("--lora_experts needs --use_lora")
        if self.train_only and self.train_attention_params_only:
            raise ArgumentsError("--train_attention_params_only is --train_only *self_attn*; give one of them")
        allowed_names(self.allow_drift)
        self._check_numbers()

    def _check_numbers(self) -> None:
        try:
            parse_size(self.max_shard_size)
        except ValueError as error:
            raise ArgumentsError(f"--max_shard_size: {error}") from None
        if self.lora_rank < 1 or self.lora_alpha <= 0 or not 0 <= self.lora_dropout < 1:
            raise ArgumentsError("--lora_rank and --lora_alpha must be positive, --lora_dropout in [0, 1)")
        if self.router_aux_loss_coef is not None and self.router_aux_loss_coef < 0:
            raise ArgumentsError(f"--router_aux_loss_coef {self.router_aux_loss_coef:g}: 0 or more is expected")
        if self.loss_spike_factor <= 1:
            raise ArgumentsError(f"--loss_spike_factor {self.loss_spike_factor:g} must be over 1")
        if self.early_stopping_patience is not None and self.early_stopping_patience < 1:
            raise ArgumentsError("--early_stopping_patience must be at least 1")
        if self.peak_tflops is not None and self.peak_tflops <= 0:
            raise ArgumentsError(f"--peak_tflops {self.peak_tflops:g}: a positive number is expected")
        if not 0 <= self.heartbeat_timeout < float("inf"):
            raise ArgumentsError("--heartbeat_timeout: seconds are expected, 0 turns the watch off")


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


# Flags that describe a new model (--config_name); a pretrained one has its own config.
ARCHITECTURE = {
    "hidden_size": "hidden_size", "num_layers": "num_hidden_layers", "num_attention_heads": "num_attention_heads",
    "num_key_value_heads": "num_key_value_heads", "intermediate_size": "intermediate_size",
    "max_position_embeddings": "max_position_embeddings", "vocab_size": "vocab_size", "layer_norm_eps": "rms_norm_eps",
    "moe_topk": "moe_topk", "num_experts": "num_experts", "num_shared_expert": "num_shared_expert", "use_cla": "use_cla",
    "cla_share_factor": "cla_share_factor", "use_mixed_mlp_moe": "use_mixed_mlp_moe", "use_qk_norm": "use_qk_norm",
    "tie_word_embeddings": "tie_word_embeddings",
}  # fmt: skip

# HF's own defaults that a fine-tuning run wants otherwise; a given flag always wins.
HF_DEFAULTS: dict[str, Any] = {
    "output_dir": "output",
    "optim": "adamw_torch",
    "logging_steps": 10,
    "logging_nan_inf_filter": False,
    "report_to": "tensorboard" if find_spec("tensorboard") else "none",
}


def parse(argv: Sequence[str], kind: Kind = "chat") -> Arguments:
    """The flags of one run, checked without torch: ``--name value``, ``--name=value`` or a bare ``--switch``.

    Raises ArgumentsError (unknown flag with the nearest name, wrong type, contradiction) and DataError.
    """
    return build(read_flags(argv), kind)


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
            parsed[cls][name] = _own_value(name, raw, spec.type)
        elif name.startswith("no_") and name[3:] in own and str(raw).lower() == "true":
            cls, _ = own[name[3:]]
            parsed[cls][name[3:]] = False
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


def check_model_path(flag: str, value: str | None, *, hub: bool = True) -> None:
    """Refuse a local path that does not exist and a folder that holds no model; with ``hub`` ``owner/name`` may be there.

    Raises ArgumentsError.
    """
    if value is None:
        return
    path = Path(value)
    if path.is_dir():
        if flag == "--tokenizer_name_or_path" or (path / "config.json").is_file():
            return
        if (path / ADAPTER_CONFIG).is_file():
            raise ArgumentsError(
                f"{flag} {value}: an adapter; name its base here, and the adapter to --init_from_checkpoint"
            )
        inside = [folder for _, folder in steps(path)]
        hint = f"; did you mean {inside[0]}?" if inside else "; the folder of a model is expected"
        raise ArgumentsError(f"{flag} {value}: no config.json there{hint}")
    if path.exists():
        raise ArgumentsError(f"{flag} {value}: a file; the folder that holds it is expected")
    offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("", "0")
    beside = len(path.parts) > 1 and path.parent.is_dir()  # a mistyped folder, not a name on the Hub
    if not hub or not _HUB_NAME.fullmatch(value) or offline or beside:
        raise ArgumentsError(f"{flag} {value}: no such folder (the current folder is {Path.cwd()})")


def _own_value(name: str, raw: str | bool, kind: Any) -> Any:
    """A raw value as the type of an own field."""
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
    for name in (data.train_data_file, data.eval_data_file):
        if name and not prepared_folder([name]):
            _check_raw(name, data, args.kind)
    _check_hf(args)
    if hf.get("bf16") and hf.get("fp16"):
        raise ArgumentsError("--bf16 and --fp16 exclude each other")
    schedule(hf_value(hf, "lr_scheduler_type"), model.min_lr, float(hf_value(hf, "learning_rate")))
    if model.use_flash_attn and find_spec("flash_attn") is None:
        raise ArgumentsError(
            f"--use_flash_attn: the flash_attn package is not installed ({sys.executable} -m pip install flash-attn, needs a "
            "GPU); leave the flag out to use PyTorch's own attention"
        )
    stage = 0
    if hf.get("deepspeed"):
        settings = resolve(str(hf["deepspeed"]))
        check_precision(settings, bf16=bool(hf.get("bf16")), fp16=bool(hf.get("fp16")), where=str(hf["deepspeed"]))
        fixed = {name: hf_value(hf, name) for name in FIXED_BY_FLAGS.values()}
        check_fixed(settings, fixed, where=str(hf["deepspeed"]))
        stage = zero_stage(settings)
    if model.make_moe_param_leaf_module and stage != 3:  # noqa: PLR2004
        args.warnings.append("--make_moe_param_leaf_module has no effect without ZeRO-3 (--deepspeed ds_zero3_...)")
    if model.train_attention_params_only and model.use_lora:
        args.warnings.append("--train_attention_params_only has no effect with --use_lora: only the adapter is trained")
    if model.model_name_or_path and (unused := sorted(args.given & set(ARCHITECTURE))):
        args.warnings.append(f"--{', --'.join(unused)}: ignored, {model.model_name_or_path} has its own config")
    resume = hf.get("resume_from_checkpoint")
    if isinstance(resume, str) and not Path(resume).is_dir():
        raise ArgumentsError(
            f"--resume_from_checkpoint {resume}: no such folder; 'true' takes the newest of --output_dir"
        )
