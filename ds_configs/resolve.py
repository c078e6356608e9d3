"""DeepSpeed settings by name or path, checked before any model is loaded.

The shipped files keep the names that users of the Hunyuan scripts know (``ds_zero2_no_offload`` and so on); batch sizes
and precision are ``"auto"`` in all of them, filled in from the command line by the HF integration. Key reference:
https://www.deepspeed.ai/docs/config-json/
"""

import ast
import difflib
import json
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent

# The keys that fine-tuning settings are made of. A key that merely resembles one is a typing error; others pass through.
_KNOWN = (
    "activation_checkpointing", "bf16", "checkpoint", "communication_data_type", "expert_parallel", "flops_profiler", "fp16",
    "gradient_accumulation_steps", "gradient_clipping", "optimizer", "scheduler", "steps_per_print", "torch_autocast",
    "train_batch_size", "train_micro_batch_size_per_gpu", "wall_clock_breakdown", "zero_allow_untested_optimizer",
    "zero_force_ds_cpu_optimizer", "zero_optimization",
)  # fmt: skip


class DeepSpeedConfigError(ValueError):
    """DeepSpeed settings that would fail later or train something else; the message names the file and the key."""


def shipped() -> list[str]:
    """Names of the settings that come with finebridge."""
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def find(name_or_path: str) -> Path:
    """The file of a shipped name (with or without ``.json``) or of the user's own path.

    Raises DeepSpeedConfigError with the nearest names when there is no such file.
    """
    own = Path(name_or_path)
    if own.is_file():
        return own
    stem = own.name.removesuffix(".json")
    if stem in shipped() and own.parent == Path():
        return FOLDER / f"{stem}.json"
    near = difflib.get_close_matches(stem, shipped(), n=3, cutoff=0.5)
    raise DeepSpeedConfigError(
        f"--deepspeed {name_or_path}: no such file, and no shipped settings of that name; "
        + (f"did you mean {', '.join(near)}?" if near else f"shipped are {', '.join(shipped())}")
    )


def resolve(name_or_path: str, *, has_accelerator: bool = True) -> dict[str, Any]:
    """Checked DeepSpeed settings, ready for ``TrainingArguments(deepspeed=...)``.

    Without an accelerator ``pin_memory`` is turned off in the offload blocks: pinning host memory serves only copies to
    a device, and on a CPU DeepSpeed would compile an extension for it. Raises DeepSpeedConfigError.
    """
    path = find(name_or_path)
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DeepSpeedConfigError(f"{path}: not JSON: {error}") from None
    if not isinstance(settings, dict):
        raise DeepSpeedConfigError(f"{path}: a JSON object is expected")
    check(settings, str(path))
    if not has_accelerator:
        for block in ("offload_optimizer", "offload_param"):
            if settings["zero_optimization"].get(block):
                settings["zero_optimization"][block]["pin_memory"] = False
    return settings


def zero_stage(settings: dict[str, Any]) -> int:
    """The ZeRO stage of checked settings, 0 to 3."""
    return int(settings.get("zero_optimization", {}).get("stage", 0))


def offloads_optimizer(settings: dict[str, Any]) -> bool:
    """Whether the optimizer runs on the CPU, by DeepSpeed's compiled CPU Adam."""
    torch_adam = settings.get("optimizer", {}).get("params", {}).get("torch_adam", False)
    return _device(settings.get("zero_optimization", {}), "offload_optimizer") != "none" and not torch_adam


def compiled_ops(settings: dict[str, Any]) -> list[str]:
    """The parts that DeepSpeed would compile for checked settings, by its own names: ``cpu_adam``, ``fused_adam``, ...

    An optimizer block makes DeepSpeed build its own optimizer (``torch_adam`` for torch's); offload always needs its CPU
    Adam; offload to disk needs asynchronous reads into pinned memory.
    """
    zero: dict[str, Any] = settings.get("zero_optimization", {})
    kind = str(settings.get("optimizer", {}).get("type", "")).lower()
    on_cpu = _device(zero, "offload_optimizer") != "none"
    ops: list[str] = []
    if kind in ("adagrad", "lion") and on_cpu:
        ops.append(f"cpu_{kind}")
    elif kind in ("lamb", "lion"):
        ops.append(f"fused_{kind}")
    elif offloads_optimizer(settings):
        ops.append("cpu_adam")
    elif kind in ("adam", "adamw") and not settings["optimizer"].get("params", {}).get("torch_adam", False):
        ops.append("fused_adam")
    if "nvme" in (_device(zero, "offload_optimizer"), _device(zero, "offload_param")):
        ops += ["pin_memory", "async_io"]
    return ops


def check(settings: dict[str, Any], where: str) -> None:
    """Refuse what DeepSpeed or the HF integration would reject late, or accept and do wrong.

    Raises DeepSpeedConfigError.
    """
    for key in settings:
        near = difflib.get_close_matches(key, _KNOWN, n=1, cutoff=0.85)
        if near and key not in _KNOWN:
            raise DeepSpeedConfigError(f"{where}: unknown key {key!r}; did you mean {near[0]!r}?")
    for key in ("bf16", "fp16", "optimizer", "zero_optimization"):
        if not isinstance(settings.get(key, {}), dict):
            raise DeepSpeedConfigError(f"{where}: {key} must be an object, not {json.dumps(settings[key])}")
    zero = settings.setdefault("zero_optimization", {})
    _check_zero(zero, where)
    stage = zero.get("stage", 0)
    if stage not in (0, 1, 2, 3):
        raise DeepSpeedConfigError(f"{where}: zero_optimization.stage is {stage!r}; it must be 0, 1, 2 or 3")
    if stage == 3 and zero.get("stage3_gather_16bit_weights_on_model_save") is not True:  # noqa: PLR2004
        raise DeepSpeedConfigError(
            f"{where}: zero_optimization.stage3_gather_16bit_weights_on_model_save must be true; "
            "without it checkpoints hold no Hugging Face weights and adapters are saved empty"
        )
    if stage < 3 and _device(zero, "offload_param") != "none":  # noqa: PLR2004
        raise DeepSpeedConfigError(f"{where}: offload_param needs ZeRO stage 3, the stage is {stage}")
    enabled = [name for name in ("bf16", "fp16") if settings.get(name, {}).get("enabled") is True]
    if len(enabled) > 1:
        raise DeepSpeedConfigError(f"{where}: bf16 and fp16 are both enabled")
    if "scheduler" in settings:
        raise DeepSpeedConfigError(
            f"{where}: a scheduler block would override --lr_scheduler_type, --min_lr and the warm-up; remove it"
        )


@cache
def zero_keys() -> frozenset[str]:
    """The keys of ``zero_optimization`` that the installed DeepSpeed knows, read from its source without importing it.

    Empty when DeepSpeed is not installed; its own check then comes later.
    """
    try:
        source = Path(str(metadata.distribution("deepspeed").locate_file("deepspeed/runtime/zero/config.py")))
        tree = ast.parse(source.read_text(encoding="utf-8"))
    except (metadata.PackageNotFoundError, OSError):
        return frozenset()
    keys: set[str] = set()
    for owner in (node for node in tree.body if isinstance(node, ast.ClassDef) and node.name == "DeepSpeedZeroConfig"):
        for node in owner.body:
            if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
                keys.add(node.target.id)
                aliases = node.value.keywords if isinstance(node.value, ast.Call) else []
                keys |= {
                    str(word.value.value)
                    for word in aliases
                    if word.arg == "alias" and isinstance(word.value, ast.Constant)
                }
    return frozenset(keys)


def _check_zero(zero: dict[str, Any], where: str) -> None:
    for key in zero:
        if zero_keys() and key not in zero_keys():
            near = difflib.get_close_matches(key, zero_keys(), n=1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise DeepSpeedConfigError(f"{where}: zero_optimization has the unknown key {key!r}{hint}")
    for block in ("offload_optimizer", "offload_param"):
        if not isinstance(zero.get(block) or {}, dict):
            raise DeepSpeedConfigError(f'{where}: {block} must be an object, for example {{"device": "cpu"}}')


def _device(zero: dict[str, Any], block: str) -> str:
    """Where an offload block sends to; "none" when it is absent or null."""
    return (zero.get(block) or {}).get("device") or "none"


def check_precision(settings: dict[str, Any], *, bf16: bool, fp16: bool, where: str) -> None:
    """Refuse settings whose fixed precision is not the command line's. Raises DeepSpeedConfigError."""
    for name, wanted in (("bf16", bf16), ("fp16", fp16)):
        enabled = settings.get(name, {}).get("enabled", "auto")
        if enabled != "auto" and bool(enabled) != wanted:
            raise DeepSpeedConfigError(
                f'{where}: {name}.enabled is {json.dumps(enabled)} but --{name} is {wanted}; set it to "auto"'
            )


# Keys that DeepSpeed settings may fix instead of "auto", and the flag that says the same.
FIXED_BY_FLAGS = {
    "train_micro_batch_size_per_gpu": "per_device_train_batch_size",
    "gradient_accumulation_steps": "gradient_accumulation_steps",
    "gradient_clipping": "max_grad_norm",
    "optimizer.params.lr": "learning_rate",
    "optimizer.params.weight_decay": "weight_decay",
    "optimizer.params.eps": "adam_epsilon",
}


def check_fixed(settings: dict[str, Any], flags: dict[str, Any], where: str) -> None:
    """Refuse settings that fix a value which the flags say otherwise. Raises DeepSpeedConfigError naming both."""
    for path, flag in FIXED_BY_FLAGS.items():
        value: Any = settings
        for key in path.split("."):
            value = value.get(key, "auto") if isinstance(value, dict) else "auto"
        if value == "auto":
            continue
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise DeepSpeedConfigError(f'{where}: {path} must be a number or "auto", not {json.dumps(value)}')
        if float(value) != float(flags[flag]):
            raise DeepSpeedConfigError(f'{where}: {path} is {value} but --{flag} is {flags[flag]}; set it to "auto"')
