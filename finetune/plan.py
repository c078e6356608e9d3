"""What a run will hold and take, before there is a GPU: every shipped ZeRO setting beside the others, and the one to use.

    finebridge plan MODEL --gpus N --gpu_memory GIB [the flags of finebridge sft]

MODEL is a folder or a config.json; its weights are not read. What a rank holds is computed (``train/memory.py``,
``train/zero_memory.py``); the time of a step is an estimate for GPUs of H100's kind within one machine, meant to compare.
"""

import argparse
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..ds_configs.resolve import resolve, shipped
from ..train.arguments import Arguments, build, read_flags
from ..train.hf_flags import ArgumentsError, hf_value
from ..train.masters import without_masters

if TYPE_CHECKING:
    from ..train.memory import Activations
    from ..train.throughput import Flops
    from ..train.zero_memory import Held, Weight, Zero

_GIB = 2**30
_CONTEXT = 0.8, 0.5  # GiB that CUDA, and NCCL when there are several GPUs, hold beside torch's tensors
_SPARE = 0.05  # as in recompute.py
_PLAIN = "without DeepSpeed"
# What a step's time is made of, on an H100 (benchmarks/gpu_speed.csv and the data sheets); for comparison only.
_TFLOPS, _REACHED = 680.0, 0.5  # of sustained bf16 products, and the share of them that training reaches
_MEMORY, _LINK, _HOST = 2.2e12, 3e11, 5e10  # bytes a second: device memory, between GPUs, to the machine's memory
_CPU_ADAM = 1e9  # elements a second, by the cores of one machine
_SIZES = ("weights", "gradients", "optimizer", "buffers", "pass", "step", "save", "host")
_SAMPLE = 1000  # tokens of a sample, in packed rows


@dataclass(frozen=True)
class Task:
    """What is trained on how much memory: the model's parts and the size of a step, as the flags say."""

    about: str
    weights: "Sequence[Weight]"
    activations: "Activations"
    flops: "Flops"
    parts: Mapping[str, int]
    lengths: Sequence[int]
    accumulation: int
    gpus: int
    limit: int
    recompute: bool | None
    fused: bool
    tflops: float


@dataclass(frozen=True)
class Choice:
    """One setting: bytes of a rank, recomputed layers (None: not even all are enough), seconds a step."""

    settings: str
    held: "Held"
    recomputed: int | None
    passes: int
    step: int
    save: int
    seconds: float

    @property
    def peak(self) -> int:
        """The most that is held at any time."""
        return max(self.passes, self.step, self.save)


def main(words: Sequence[str]) -> int:
    """Print the table and the flags to use; 1 when nothing fits. Raises ArgumentsError."""
    parser = argparse.ArgumentParser("finebridge plan", allow_abbrev=False, description=(__doc__ or "").splitlines()[0])
    parser.add_argument("model", type=Path, help="a model's folder, or a config.json")
    parser.add_argument("--gpus", type=int, required=True, help="ranks, one a GPU")
    parser.add_argument("--gpu_memory", type=float, required=True, help="GiB of each")
    given, more = parser.parse_known_args(words)
    if given.gpus < 1 or not given.gpu_memory > 0:
        raise ArgumentsError("--gpus and --gpu_memory: positive numbers are expected")
    args = arguments_of(given.model, more)
    limit = limit_of(given.gpu_memory, given.gpus)
    choices = list(plan(args, given.gpus, limit, print))
    best = min((choice for choice in choices if choice.recomputed is not None), key=lambda c: c.seconds, default=None)
    for line in table(choices, best, limit):
        print(line)
    if best is None:
        print("nothing fits: try a smaller --per_device_train_batch_size or --max_seq_length, --use_lora, or more GPUs")
        return 1
    print("use: " + " ".join(flags_of(best, args)))
    return 0


def limit_of(gpu_memory: float, gpus: int) -> int:
    """Bytes that torch's tensors may fill of a GPU of so many GiB, one of ``gpus``."""
    room = gpu_memory - _CONTEXT[0] - (_CONTEXT[1] if gpus > 1 else 0)
    return int(room * (1 - _SPARE) * _GIB)


def arguments_of(model: Path, words: Sequence[str]) -> Arguments:
    """The checked flags of a run of this model. Raises ArgumentsError, DataError, DeepSpeedConfigError."""
    config = model / "config.json" if model.is_dir() else model
    if not config.is_file():
        raise ArgumentsError(f"{model}: no such config.json; the folder of a model or its config.json is expected")
    values: dict[str, Any] = read_flags(words)
    for name in ("model_name_or_path", "config_name"):
        if name in values:
            raise ArgumentsError(f"--{name}: the model is named first, finebridge plan {values[name]} ...")
    values |= {"config_name": str(config), "tokenizer_name_or_path": str(config.absolute().parent)}
    if "train_data_file" not in values:
        values["use_dummy_data"] = True
    return build(values)


def plan(args: Arguments, gpus: int, limit: int, say: Any) -> Iterator[Choice]:
    """Every setting's memory and time. Raises ArgumentsError when the model does not run without data."""
    from ..train.memory import UnknownMemoryError
    from ..train.zero_memory import read_zero

    wanted = args.hf.get("deepspeed")
    names = [*shipped(), *([str(wanted)] if wanted and str(wanted).removesuffix(".json") not in shipped() else [])]
    hidden = config_of(args).get_text_config().hidden_size
    try:
        task = task_of(args, gpus, limit, deepspeed=True)
    except UnknownMemoryError as error:
        raise ArgumentsError(f"{error}; its memory cannot be foretold") from error
    say(f"plan: {task.about}")
    for name in names:
        settings = resolve(name)
        if args.model.master_weights != "fp32":
            settings = without_masters(settings)
        yield choose(name, task, read_zero(settings, hidden))
    try:
        yield choose(_PLAIN, task_of(args, gpus, limit, deepspeed=False), read_zero(None, hidden))
    except UnknownMemoryError as error:  # fp32 weights, for which some operations have no kernel
        say(f"{_PLAIN}: not foretold, as {error}")


def choose(name: str, task: Task, zero: "Zero") -> Choice:
    """A setting with as few recomputed layers as fit, or as the flags fix them."""
    from ..train.zero_memory import held, micro_batch, optimizer_step, save_peak

    kept = held(task.weights, zero, task.gpus, accumulates=task.accumulation > 1)
    step = optimizer_step(kept, task.weights, zero, task.gpus, fused=task.fused)
    save = save_peak(kept, task.parts, zero)
    layers = task.activations.layers
    numbers = range(layers + 1) if task.recompute is None else [layers * task.recompute]
    passes, number = 0, 0
    for number in numbers:
        passes = micro_batch(kept, task.activations.moments(number), task.weights, zero, task.gpus)
        if max(passes, step, save) <= task.limit:
            return Choice(name, kept, number, passes, step, save, seconds(task, zero, number))
    return Choice(name, kept, None, passes, step, save, seconds(task, zero, number))


def seconds(task: Task, zero: "Zero", recomputed: int) -> float:
    """An estimate of an optimizer step's time; what is sent between GPUs is counted as if nothing were computed meanwhile."""
    trained = [weight for weight in task.weights if weight.trained]
    size = sum(weight.numel * weight.size for weight in task.weights)
    sent = sum(weight.numel * weight.size for weight in trained)
    elements = sum(weight.numel for weight in trained)
    useful = task.flops.of(task.lengths)
    forward = useful / (3 if len(trained) == len(task.weights) else 2)
    again = forward * recomputed / max(1, task.activations.layers)
    speed = task.tflops * 1e12 * _REACHED
    total = task.accumulation * (useful + again) / speed
    part = elements / (task.gpus if zero.stage else 1)
    others = (task.gpus - 1) / task.gpus
    if zero.optimizer_offloaded:
        total += 4 * part / _HOST + elements / _CPU_ADAM
    else:
        total += part * (3 * zero.master + 4 * zero.moment + 2) / _MEMORY
    if zero.stage == 3:  # noqa: PLR2004
        total += task.accumulation * others * ((2 + bool(recomputed)) * size + sent) / _LINK
        total += task.accumulation * 2 * size / task.gpus / _HOST if zero.weights_offloaded else 0
    else:
        total += others * (2 * task.accumulation * sent + sent * bool(zero.stage)) / _LINK
    return total


def table(choices: Sequence[Choice], best: Choice | None, limit: int) -> Iterator[str]:
    """The lines that show all settings, GiB of one rank."""
    heads = ("settings", "recompute", "peak", *_SIZES, "s/step")
    yield f"GiB of one rank, of which {limit / _GIB:.1f} may be filled; 'pass' to 'save' are the peaks of the three"
    yield "  ".join(f"{name:>9}" if number else f"{name:<28}" for number, name in enumerate(heads))
    for choice in choices:
        kept = choice.held
        sizes = [
            choice.peak, kept.weights, kept.gradients, kept.master + kept.moments, kept.buffers, choice.passes, choice.step,
            choice.save, kept.host,
        ]  # fmt: skip
        name = f"{'* ' if choice is best else '  '}{Path(choice.settings).stem}"
        number = "no fit" if choice.recomputed is None else str(choice.recomputed)
        values = [number, *(f"{size / _GIB:.1f}" for size in sizes), f"{choice.seconds:.2f}"]
        yield "  ".join([f"{name:<28}", *(f"{value:>9}" for value in values)])


def flags_of(choice: Choice, args: Arguments) -> list[str]:
    """The flags that make a run this one, beside those that were given."""
    words = [] if choice.settings == _PLAIN else ["--deepspeed", choice.settings]
    return [*words, "--gradient_checkpointing", str(args.hf.get("activation_checkpointing", "auto")).lower()]


def config_of(args: Arguments) -> Any:
    """The model's config. Raises ArgumentsError."""
    from transformers import AutoConfig

    try:
        return AutoConfig.from_pretrained(
            str(args.model.config_name), trust_remote_code=args.model.trust_remote_code, cache_dir=args.model.cache_dir
        )
    except (OSError, ValueError, KeyError) as error:
        raise ArgumentsError(f"{args.model.config_name}: not a config that transformers reads: {error}") from error


def task_of(args: Arguments, gpus: int, limit: int, *, deepspeed: bool) -> Task:
    """What these flags train. Raises ArgumentsError, UnknownMemoryError, UnknownShapeError."""
    import torch

    from ..train.chunked_loss import WORTH, rows_of_piece
    from ..train.memory import Batch
    from ..train.memory_runs import activations
    from ..train.throughput import training_flops
    from ..train.weights import parts
    from ..train.zero_memory import weights_of

    half = torch.bfloat16 if args.hf.get("bf16") else torch.float16 if args.hf.get("fp16") else None
    model = planned_model(args, half or torch.float32, deepspeed=deepspeed)
    rows, length = int(hf_value(args.hf, "per_device_train_batch_size")), args.data.max_seq_length
    words = int(model.config.get_text_config().vocab_size)
    head = rows_of_piece(words, "cuda") if rows * length * words >= WORTH else None
    batch = Batch(1, rows * length, head) if args.shares_rows else Batch(rows, length, head)
    weights = weights_of(model)
    total, trained = (sum(w.numel for w in weights if w.trained or every) for every in (True, False))
    accumulation = int(hf_value(args.hf, "gradient_accumulation_steps"))
    bytes_of = {weight.name: weight.numel * weight.size for weight in weights}
    lengths = [_SAMPLE] * (rows * length // _SAMPLE) if args.shares_rows and length > _SAMPLE else [length] * rows
    wanted = args.hf.get("activation_checkpointing")
    return Task(
        about=f"{type(model).__name__}, {total:,} parameters, {trained:,} train; {gpus} GPUs; a step is {accumulation} x "
        f"{rows} x {length} tokens on each",
        weights=weights,
        activations=activations(model, batch, autocast=None if deepspeed else half),
        flops=training_flops(model),
        parts={names[0]: sum(bytes_of[name] for name in names) for names in parts(bytes_of)},
        lengths=lengths,
        accumulation=accumulation,
        gpus=gpus,
        limit=limit,
        recompute=wanted if isinstance(wanted, bool) else None,
        fused="fused" in str(args.hf["optim"]),
        tflops=args.model.peak_tflops or _TFLOPS,
    )


def planned_model(args: Arguments, half: Any, *, deepspeed: bool) -> Any:
    """The model as ``train/assemble.py`` makes it, without data; dtypes as DeepSpeed or a plain run has them."""
    import torch
    from transformers import AutoModelForCausalLM

    from ..train.freeze import choose_trained
    from ..train.lora import add_lora
    from ..train.memory import without_data
    from ..train.precision import asked_in_fp32

    config = config_of(args)
    base = half if deepspeed or args.model.use_lora else torch.float32
    full: set[int] = set()

    def make() -> Any:
        model: Any = AutoModelForCausalLM.from_config(
            config, dtype=base, trust_remote_code=args.model.trust_remote_code
        )
        asked = asked_in_fp32(model, base)
        full.update(id(parameter) for name, parameter in model.named_parameters() if name in asked)
        if args.model.use_lora:
            model = add_lora(model, args.model, lambda _: None)
        else:
            choose_trained(model, args.model)
        return model

    def dtype_of(parameter: Any) -> Any:
        alone = id(parameter) in full or (parameter.requires_grad and not deepspeed)
        return torch.float32 if alone else base

    return without_data(make, dtype_of)
