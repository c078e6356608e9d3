"""The same training by TRL at its best known settings, which ``speed.py --rows 0.6b:trl,...`` runs where TRL is importable.

Packing (best fit decreasing), Liger's kernels where they are importable, FlashAttention-2, no recomputation, everything in bf16,
fused AdamW. There is no wheel of ``flash_attn``: where it is missing a stand-in gives transformers torch's own
FlashAttention-2 kernels under its name.
"""

import argparse
import importlib.util
import json
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

FLASH = """
import torch
__version__ = "2.8.3"
def flash_attn_varlen_func(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0,
                           softmax_scale=None, causal=False, window_size=(-1, -1), deterministic=False, **_):
    return torch.ops.aten._flash_attention_forward(
        q, k, v, cu_seqlens_q, cu_seqlens_k, int(max_seqlen_q), int(max_seqlen_k), dropout_p, causal, False,
        scale=softmax_scale)[0]
def flash_attn_func(q, k, v, dropout_p=0.0, softmax_scale=None, causal=False, **_):
    return torch.ops.aten._flash_attention_forward(
        q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, causal, False, scale=softmax_scale)[0]
flash_attn_with_kvcache = flash_attn_func
"""
PADDING = "def pad_input(*_): raise NotImplementedError\ndef unpad_input(*_): raise NotImplementedError\n"


def stand_in(folder: Path) -> None:
    """A package ``flash_attn`` in a folder that is put before all others."""
    package, told = folder / "flash_attn", folder / "flash_attn-2.8.3.dist-info"
    package.mkdir(parents=True)
    told.mkdir()
    (package / "__init__.py").write_text(FLASH, encoding="utf-8")
    (package / "bert_padding.py").write_text(PADDING, encoding="utf-8")
    (told / "METADATA").write_text("Metadata-Version: 2.1\nName: flash-attn\nVersion: 2.8.3\n", encoding="utf-8")
    (told / "top_level.txt").write_text("flash_attn\n", encoding="utf-8")
    (told / "RECORD").write_text("flash_attn/__init__.py,,\n", encoding="utf-8")
    sys.path.insert(0, str(folder))


def main(argv: Sequence[str] | None = None) -> None:
    """Train until SIGTERM; ``trainer_state.json`` then has a line every few steps."""
    parser = argparse.ArgumentParser("trl_way.py", allow_abbrev=False)
    for name in ("--config", "--data", "--tokenizer", "--output"):
        parser.add_argument(name, type=Path, required=True)
    for name in ("--length", "--rows", "--accumulation", "--every", "--vocab_size", "--lora_rank"):
        parser.add_argument(name, type=int, default=0)
    parser.add_argument("--peak", type=float, default=0.0)
    args = parser.parse_args(argv)
    import torch

    on_gpu = torch.cuda.is_available()
    found = importlib.util.find_spec("flash_attn")  # of FlashAttention-4 alone there is a folder without a module
    if on_gpu and (found is None or found.origin is None):
        stand_in(args.output / "stand_in")
    train(args, on_gpu=on_gpu)


def packed(samples: list[list[int]], length: int) -> Any:
    """A table of packs by TRL's own packing, a thousand samples at a time, as its data stage makes it."""
    import pyarrow as pa
    from trl.data_utils import _pack_bfd  # pyright: ignore[reportMissingImports]

    parts = [samples[start : start + 1000] for start in range(0, len(samples), 1000)]
    return pa.concat_tables([_pack_bfd(pa.table({"input_ids": part, "labels": part}), length) for part in parts])


def train(args: argparse.Namespace, *, on_gpu: bool) -> None:
    """Build model and data, train, write what was logged."""
    import torch
    from datasets import Dataset
    from finebridge.data_tools.indexed import IndexedReader
    from finebridge.train.throughput import training_flops
    from peft import LoraConfig
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, TrainerCallback, set_seed
    from trl import SFTConfig, SFTTrainer  # pyright: ignore[reportMissingImports]

    reader = IndexedReader(args.data / "text_document")
    samples = [reader[number] for number in range(min(4000, len(reader)))]
    lengths = [len(sample) for sample in samples]
    data = Dataset(packed([sample.tolist() for sample in samples], args.length))
    values = json.loads(args.config.read_text(encoding="utf-8"))
    config = AutoConfig.for_model(values.pop("model_type"), **values, vocab_size=args.vocab_size)
    set_seed(42)
    with torch.device("cuda" if on_gpu else "cpu"):
        attention = {"attn_implementation": "flash_attention_2"} if on_gpu else {}
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, **attention)
    lora = (
        LoraConfig(r=args.lora_rank, lora_alpha=args.lora_rank, target_modules="all-linear") if args.lora_rank else None
    )
    settings = SFTConfig(
        output_dir=str(args.output), packing=True, max_length=args.length, per_device_train_batch_size=args.rows,
        gradient_accumulation_steps=args.accumulation, gradient_checkpointing=False, bf16=True, logging_steps=args.every,
        max_steps=100_000, learning_rate=1e-5, lr_scheduler_type="constant", save_strategy="no", report_to="none",
        optim="adamw_torch_fused", disable_tqdm=True, use_cpu=not on_gpu, dataset_kwargs={"skip_prepare_dataset": True},
        use_liger_kernel=on_gpu and importlib.util.find_spec("liger_kernel") is not None,
    )  # fmt: skip
    history: list[dict[str, Any]] = []
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))

    class Rates(TrainerCallback):
        before = (time.perf_counter(), 0.0)

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            control.should_training_stop |= bool(asked)

        def on_log(self, *given: Any, logs: Any = None, **_: Any) -> None:
            if "loss" not in logs:
                return
            now = (time.perf_counter(), float(logs["num_tokens"]))
            rate = (now[1] - self.before[1]) / (now[0] - self.before[0])
            self.before = now
            line = {"loss": float(logs["loss"]), "tokens_per_second": rate, "trained_tokens_per_second": rate}
            line["memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 3) if on_gpu else 0.0
            if args.peak:
                line["mfu"] = round(per_token * rate / (args.peak * 1e12), 4)
            history.append(line)
            print(f"\nstep {given[1].global_step}  {line}", flush=True)

    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    trainer = SFTTrainer(
        model=model,
        args=settings,
        train_dataset=data,
        processing_class=tokenizer,
        peft_config=lora,
        callbacks=[Rates()],
    )
    per_token = training_flops(trainer.model).of(lengths) / sum(lengths)
    trainer.train()
    (args.output / "trainer_state.json").write_text(json.dumps({"log_history": history}), encoding="utf-8")


if __name__ == "__main__":
    main()
