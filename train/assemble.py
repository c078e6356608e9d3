"""Arguments to a Trainer: tokenizer, data, ranks, model, adapter, Trainer, in that order.

Data comes before the process group exists, so that no collective can time out while one rank tokenises.
"""

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, cast

import torch
from transformers import (
    EarlyStoppingCallback,
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)

from ..data_tools.collator import FlatteningCollator, PaddingCollator
from ..data_tools.dataset import DummyDataset, PackedDataset, Samples
from ..data_tools.filters import unfiltered
from ..data_tools.mixture_dataset import MixtureDataset, RepackedDataset, open_chats, prepare_chats, template_of
from ..data_tools.packing import pack
from ..data_tools.schema import Origin
from ..data_tools.templates import template_source
from ..data_tools.text_dataset import open_text
from ..data_tools.tokenizer_files import TokenizerSource, load_tokenizer
from ..ds_configs.resolve import resolve, zero_stage
from ..storage.publish import write_text
from ..storage.space import parse_size
from . import heartbeat, runtime
from .arguments import Arguments
from .attention import IsolationProof, check_trainable, takes_borders
from .callbacks import Phases, SaveLastStep
from .checkpoint import check_shared, on_main, put_back
from .chunked_loss import HeadSearch
from .compiled import CompiledLayers, static_tokens
from .defaults import default_lines
from .drift import allowed_names
from .fp8 import check_device, use_fp8
from .freeze import choose_trained
from .guards import StepGuard
from .hf_flags import ArgumentsError, hf_value
from .lora import add_lora
from .lora_products import LoraProducts
from .masters import without_masters
from .meeting import together
from .micro_batches import micro_batches
from .model import load_model
from .moe import LeafCheck, has_listed_experts, make_leaf_modules
from .optimizers import BF16AdamW, has_fused
from .packed_attention import take_packed
from .precision import asked_in_fp32, keep_in_fp32
from .progress import ProgressLine
from .recompute import AUTO, RecomputeBudget, asks_for_budget, recompute_kwargs
from .record import about_data
from .resume import Resume, check_init, find_resume
from .router import set_aux_loss
from .run_shape import run_shape
from .schedule import schedule
from .shards import refuse_pickles
from .space import SpaceCheck
from .stopping import StopWhenAsked
from .throughput import make_meter
from .trainer import FinetuneTrainer


@dataclass
class Run:
    """A Trainer that is ready, the checkpoint that it goes on from, its progress line, and what the report tells of it."""

    trainer: FinetuneTrainer
    resume_from: str | None
    progress: ProgressLine
    about: dict[str, Any]


def assemble(args: Arguments) -> Run:
    """Everything that a run needs. Raises ArgumentsError, DataError, ModelError, RuntimeSetupError."""
    output_dir = Path(args.hf["output_dir"])
    if args.model.use_flash_attn and not runtime.has_accelerator():
        raise ArgumentsError(
            "--use_flash_attn: there is no GPU here; leave the flag out to use PyTorch's own attention"
        )
    if args.model.fp8:
        check_device()
    tokenizer = load_tokenizer(
        str(args.model.tokenizer_name_or_path or args.model.model_name_or_path),
        trust_remote_code=args.model.trust_remote_code,
        cache_dir=args.model.cache_dir,
    )
    with together(runtime.say_here):
        train_data, eval_data = _datasets(args, tokenizer, output_dir)
    settings = None
    if args.hf.get("deepspeed"):
        settings = resolve(str(args.hf["deepspeed"]), has_accelerator=runtime.has_accelerator())
        if args.model.make_moe_param_leaf_module is False:  # DeepSpeed marks some classes by itself
            settings["zero_optimization"].setdefault("leaf_module", {"classes": []})
        if args.model.master_weights != "fp32":
            settings = without_masters(settings)
        from .lean_zero import install

        install()
    stage = zero_stage(settings or {})
    runtime.start(settings)
    refuse_pickles(deepspeed=settings is not None)
    hf_args = _training_arguments(args, settings)
    runtime.check_world(hf_args.world_size)
    _check_loader(hf_args)
    heartbeat.start(args.model.heartbeat_timeout, output_dir)
    check_shared(output_dir)
    put_back(output_dir)
    if args.data.packing:
        train_data, eval_data = _packed(args, hf_args, train_data, eval_data)
    if args.model.init_from_checkpoint:
        source = Path(args.model.init_from_checkpoint)
        on_main(lambda: check_init(source, runtime.say), patience=timedelta(days=1))
    shape = run_shape(args, hf_args, train_data, settings, tokenizer)
    resume = _resume(args, hf_args, shape, output_dir)
    model = _model(args, hf_args, settings, tokenizer)
    _stop_at(model, train_data.terminators, tokenizer)
    if hf_args.ddp_find_unused_parameters is None:  # read without DeepSpeed; looking costs a pass over the graph a step
        hf_args.ddp_find_unused_parameters = has_listed_experts(model)
    trainer = FinetuneTrainer(
        model=model,
        args=hf_args,
        train_dataset=train_data,  # pyright: ignore[reportArgumentType] - map-style by its methods, as torch asks
        eval_dataset=eval_data,  # pyright: ignore[reportArgumentType]
        data_collator=_collator(args, model, tokenizer),
        processing_class=tokenizer,
        optimizer_cls_and_kwargs=_optimizer(args, hf_args, stage),
        callbacks=_callbacks(args, hf_args, stage, model),
        guard=StepGuard(args.model.loss_spike_policy, args.model.loss_spike_factor, runtime.say, fp16=hf_args.fp16),
        normalization=args.model.loss_normalization,
    )
    if args.model.model_name_or_path and Path(args.model.model_name_or_path).is_dir():
        trainer.base = Path(args.model.model_name_or_path)
    trainer.keep = args.hf.get("save_total_limit")
    trainer.max_shard_size = parse_size(args.model.max_shard_size)
    trainer.made_from = {"train_data_file": args.data.train_data_file, "run": shape}
    trainer.renewed = resume.renewed if resume else frozenset()
    _fast_parts(trainer, args, stage)
    _budget(trainer, args, train_data, stage)
    progress = _watch(trainer, model, args)
    about = {
        "model": f"{shape['model']}, {model_size(model)}",
        "device": runtime.device_name(hf_args.device),
        "ranks": hf_args.world_size,
        "data": {use: about_data(data) for use, data in (("training", train_data), ("evaluation", eval_data)) if data},
    }
    return Run(trainer, str(resume.folder) if resume else None, progress, about)


def _fast_parts(trainer: FinetuneTrainer, args: Arguments, stage: int) -> None:
    """The head in pieces and compiled layers: what is looked for when the engine stands, and proven before it is used."""
    hf_args, model, data = trainer.args, trainer.model, cast("Samples", trainer.train_dataset)
    rows = max(hf_args.per_device_train_batch_size, hf_args.per_device_eval_batch_size if trainer.eval_dataset else 1)
    trainer.add_callback(HeadSearch(trainer, rows * args.data.max_seq_length))
    if args.shares_rows and takes_borders(model):
        longest = args.data.max_seq_length if args.data.packing else int(data.lengths.max())
        tokens = static_tokens(
            model, stage, hf_args.per_device_train_batch_size * longest,
            asked=args.model.compile_layers, whole_model=hf_args.torch_compile,
        )  # fmt: skip
        if tokens:
            trainer.train_collator = FlatteningCollator(borders=True, tokens=tokens)
            trainer.add_callback(CompiledLayers(tokens))
    elif args.model.compile_layers:
        why = "its attention is not told the samples' borders" if args.shares_rows else "rows are padded (--packing)"
        runtime.say(f"layers: not compiled, as {why}")


def _optimizer(
    args: Arguments, hf_args: TrainingArguments, stage: int
) -> tuple[type[BF16AdamW], dict[str, Any]] | None:
    """The optimizer of a run without fp32 masters; None leaves it to ``--optim``."""
    if args.model.master_weights == "fp32":
        return None
    seed = (hf_args.seed, hf_args.process_index if stage else 0)  # without ZeRO all ranks have the same weights
    return BF16AdamW, {
        "lr": hf_args.learning_rate, "betas": (hf_args.adam_beta1, hf_args.adam_beta2), "eps": hf_args.adam_epsilon,
        "kahan": args.model.master_weights == "bf16_kahan", "seed": seed,
    }  # fmt: skip


def _budget(trainer: FinetuneTrainer, args: Arguments, data: Samples, stage: int) -> None:
    """Have the trainer find how many layers to recompute, where that was left to it."""
    device, budget = trainer.args.device, args.model.memory_budget_gib
    if not asks_for_budget(args.hf, budget):
        return
    trainer.recompute = RecomputeBudget(
        trainer.args.activation_checkpointing_kwargs or {},  # pyright: ignore[reportArgumentType]
        trainer.args.per_device_train_batch_size * int(data.lengths.max()),
        None if budget is None else int(budget * 2**30),
        device,
        retries=stage != 3,  # noqa: PLR2004
    )
    trainer.add_callback(trainer.recompute)


def _callbacks(args: Arguments, hf_args: TrainingArguments, stage: int, model: Any) -> list[TrainerCallback]:
    """What is done at steps beside training, in this order."""
    callbacks: list[TrainerCallback] = [SpaceCheck(args.hf.get("save_total_limit"))]
    if args.model.use_lora:
        callbacks.append(LoraProducts())  # before all that proves something by the model's forward
    if args.model.early_stopping_patience:
        callbacks.append(EarlyStoppingCallback(args.model.early_stopping_patience, args.model.early_stopping_threshold))
    if stage == 3 and args.model.make_moe_param_leaf_module is not False:  # noqa: PLR2004
        callbacks.append(LeafCheck())
    if args.shares_rows:
        check_trainable(model, hf_args.device, runtime.say)
        cure = "leave --packing out" if args.data.packing else "give --cross_document_attention true"
        callbacks.append(IsolationProof(cure, only_flash=args.model.use_flash_attn))
    callbacks += [SaveLastStep(), StopWhenAsked(), Phases()]  # after what may stop the run
    return callbacks


def _check_loader(hf_args: TrainingArguments) -> None:
    """Refuse what only the Trainer's own loaders know, and keep one process to one GPU. Raises ArgumentsError."""
    if hf_args.n_gpu > 1:  # else the Trainer would wrap the model in DataParallel, which splits batches
        runtime.say(f"devices: one process uses one of {hf_args.n_gpu} GPUs; --nproc_per_node {hf_args.n_gpu} uses all")
        hf_args._n_gpu = 1  # noqa: SLF001 # pyright: ignore[reportPrivateUsage] - there is no flag for it
    told: Any = hf_args.accelerator_config
    if told.split_batches or told.dispatch_batches:
        raise ArgumentsError(
            "--accelerator_config: samples are dealt to ranks here; leave split_batches and dispatch_batches out"
        )


def _collator(args: Arguments, model: Any, tokenizer: Any) -> FlatteningCollator | PaddingCollator:
    if args.shares_rows:
        return FlatteningCollator(borders=takes_borders(model))
    pad_id = next(token for token in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if token is not None)
    return PaddingCollator(pad_id)


def _resume(args: Arguments, hf_args: TrainingArguments, shape: dict[str, Any], output_dir: Path) -> Resume | None:
    """What rank 0 finds to resume from, on every rank; hashing and rewriting large checkpoints may take hours."""
    wanted, allowed = args.hf.get("resume_from_checkpoint"), allowed_names(args.model.allow_drift)
    found: Resume | None = on_main(
        lambda: find_resume(wanted, output_dir, shape, allowed, runtime.say), patience=timedelta(days=1)
    )
    if found and found.universal and hf_args.hf_deepspeed_config is not None:
        hf_args.hf_deepspeed_config.config.setdefault("checkpoint", {})["load_universal"] = True
    return found


def _watch(trainer: FinetuneTrainer, model: Any, args: Arguments) -> ProgressLine:
    """What the user sees: the defaults now, a line a log step in place of the Trainer's own bar and dictionaries."""
    trainer.meter = make_meter(
        model, trainer.args.device, args.model.peak_tflops, trainer.accelerator.gather, runtime.say
    )
    progress = ProgressLine(runtime.say, live=not trainer.args.disable_tqdm)
    for theirs in (PrinterCallback, ProgressCallback):
        trainer.remove_callback(theirs)
    trainer.add_callback(progress)
    for line in default_lines(args, model):
        runtime.say(line)
    return progress


def _datasets(args: Arguments, tokenizer: Any, output_dir: Path) -> tuple[Any, Any]:
    """Training and evaluation data; samples over the limit are listed in ``OUTPUT_DIR/over_long.jsonl``.

    ``tokenizer``, which is saved with every checkpoint, gets the chat template that the training data was made with.
    """
    data = args.data
    if data.use_dummy_data:
        if data.chat_template:
            tokenizer.chat_template = template_source(data.chat_template)
        return DummyDataset(len(tokenizer), data.max_seq_length, seed=int(args.hf.get("seed", 42))), None
    # Not the tokenizer itself: preparing sets its template, and each data set is prepared from what is on disk.
    source = TokenizerSource(tokenizer.name_or_path, args.model.trust_remote_code, args.model.cache_dir)
    cache = Path(data.prepared_data_dir) if data.prepared_data_dir else output_dir / "prepared_data"
    if args.kind == "document":
        seed = hf_value(args.hf, "seed" if args.hf.get("data_seed") is None else "data_seed")
        train_data = open_text(str(data.train_data_file), source, data, cache, runtime.say_here, seed)
        held_out = (
            open_text(data.eval_data_file, source, unfiltered(data), cache, runtime.say_here)
            if data.eval_data_file
            else None
        )
        return train_data, held_out
    made = [
        prepare_chats(name, source, flags, cache, runtime.say_here) if name else None
        for name, flags in ((data.train_data_file, data), (data.eval_data_file, unfiltered(data)))
    ]
    templates = [template_of(part) for part in made if part]
    if len(set(templates)) > 1:
        raise ArgumentsError(
            f"--eval_data_file {data.eval_data_file} was made with another chat template than the training data"
        )
    tokenizer.chat_template = templates[0] or tokenizer.chat_template
    sets = [open_chats(part, data.max_seq_length, data.over_long, runtime.say) if part else None for part in made]
    if runtime.is_main():
        _list_over_long(output_dir, [origin for dataset in sets if dataset for origin in dataset.over_long_rows])
    return sets[0], sets[1]


def _list_over_long(output_dir: Path, rows: Sequence[tuple[Origin, int]]) -> None:
    """Samples over the limit as ``OUTPUT_DIR/over_long.jsonl``, in place of an earlier run's."""
    output_dir.mkdir(parents=True, exist_ok=True)
    (output_dir / "over_long.jsonl").unlink(missing_ok=True)
    if rows:
        lines = [{"file": str(origin.file), "line": origin.line, "tokens": tokens} for origin, tokens in rows]
        text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        write_text(output_dir / "over_long.jsonl", text)


def _packed(
    args: Arguments, hf_args: TrainingArguments, train_data: Samples, eval_data: Samples | None
) -> tuple[Any, Any]:
    """Both datasets in packs of ``--max_seq_length`` tokens."""
    seed = hf_args.seed if hf_args.data_seed is None else hf_args.data_seed
    result: list[PackedDataset | None] = []
    for use, data in (("training", train_data), ("evaluation", eval_data)):
        if data is None:
            result.append(None)
            continue
        packs = pack(data.lengths, args.data.max_seq_length, seed)
        packed = PackedDataset(data, packs)
        if isinstance(data, MixtureDataset) and data.reshuffle:
            epochs = _epochs(hf_args, len(packs)) if use == "training" else 1
            packed = RepackedDataset(data, args.data.max_seq_length, seed, epochs)
            packs = packed.packs
        filled = int(data.lengths.sum()) / (len(packs) * packs.capacity)
        runtime.say(
            f"packing: {len(data)} {use} samples share {len(packs)} rows of {packs.capacity} tokens, {filled:.2%} full"
        )
        result.append(packed)
    return result[0], result[1]


def _epochs(hf_args: TrainingArguments, rows: int) -> int:
    """How many epochs of at least so many rows a run has at most."""
    if hf_args.max_steps <= 0:
        return math.ceil(hf_args.num_train_epochs)
    window = hf_args.world_size * hf_args.per_device_train_batch_size * hf_args.gradient_accumulation_steps
    return math.ceil(hf_args.max_steps / max(1, rows // window))


def _training_arguments(args: Arguments, settings: dict[str, Any] | None) -> TrainingArguments:
    values = dict(args.hf)
    name, kwargs = schedule(
        hf_value(values, "lr_scheduler_type"), args.model.min_lr, float(hf_value(values, "learning_rate"))
    )
    values["lr_scheduler_type"] = name
    values["lr_scheduler_kwargs"] = {**kwargs, **(values.get("lr_scheduler_kwargs") or {})} or None
    values["activation_checkpointing_kwargs"] = recompute_kwargs(values, runtime.say)
    if values.get("activation_checkpointing") == AUTO:
        values["activation_checkpointing"] = False  # RecomputeBudget turns it on, layer by layer
    if "optim" not in args.given and not has_fused():
        values["optim"] = "adamw_torch"
        runtime.say("optimizer: torch has no fused AdamW for this device, so --optim is adamw_torch")
    values["resume_from_checkpoint"] = None  # decided by find_resume
    values["save_total_limit"] = None  # kept by our own rotation
    values["remove_unused_columns"] = False
    if args.model.early_stopping_patience:
        values.setdefault("metric_for_best_model", "eval_loss")
    values["deepspeed"] = settings
    values |= micro_batches(args, settings, runtime.say, on_gpu=runtime.has_accelerator())
    if not runtime.has_accelerator():
        values["use_cpu"] = True
    try:
        return TrainingArguments(**values)
    except (ValueError, TypeError) as error:
        raise ArgumentsError(f"transformers refuses these arguments: {error}") from error


def _stop_at(model: Any, terminators: list[int], tokenizer: Any) -> None:
    """Make generation stop at what ends the trained answers: a chat template's end is not always the model's own."""
    known = model.generation_config.eos_token_id
    known = [] if known is None else [known] if isinstance(known, int) else list(known)
    if lacking := [token for token in terminators if token not in known]:
        model.generation_config.eos_token_id = [*known, *lacking]
        names = ", ".join(tokenizer.convert_ids_to_tokens(lacking))
        runtime.say(f"model: generation will stop at {names} too, which ends the trained answers")


def _model(args: Arguments, hf_args: TrainingArguments, settings: dict[str, Any] | None, tokenizer: Any) -> Any:
    stage = zero_stage(settings or {})
    dtype = torch.float32
    if settings or args.model.use_lora or args.model.master_weights != "fp32":
        # DeepSpeed keeps fp32 master weights and a frozen base needs none; a plain run's weights stay fp32 under autocast.
        dtype = torch.bfloat16 if hf_args.bf16 else torch.float16 if hf_args.fp16 else torch.float32
    set_seed(hf_args.seed)  # random weights and the adapter's A must not depend on what ran before
    model: Any = load_model(args.model, dtype, tokenizer, args.given, runtime.say)
    longest = getattr(model.config, "max_position_embeddings", None)
    if longest and args.data.max_seq_length > longest:
        runtime.say(f"warning: --max_seq_length {args.data.max_seq_length} is over the model's {longest} positions")
    if settings and (asked := asked_in_fp32(model, dtype)):
        keep_in_fp32(model, asked)
        runtime.say(f"model: {len(asked)} parameters stay in fp32, as the model asks: {min(asked)}")
    take_packed(model, hf_args.device, runtime.say, packed=args.shares_rows, only_flash=args.model.use_flash_attn)
    set_aux_loss(model, args.model.router_aux_loss_coef, runtime.say)
    if args.model.use_lora:
        model = add_lora(model, args.model, runtime.say)
    else:
        choose_trained(model, args.model)
    if args.model.fp8:
        use_fp8(model, runtime.say)
    if stage == 3:  # noqa: PLR2004
        make_leaf_modules(model, args.model.make_moe_param_leaf_module, runtime.say)
    runtime.say(f"model: {model_size(model)}, {dtype}")
    return model


def model_size(model: Any) -> str:
    """How many parameters there are and train, in words."""
    trainable = sum(_numel(p) for p in model.parameters() if p.requires_grad)
    total = sum(_numel(p) for p in model.parameters())
    return f"{total:,} parameters, {trainable:,} train ({trainable / total:.2%})"


def _numel(parameter: Any) -> int:
    return int(getattr(parameter, "ds_numel", parameter.numel()))
