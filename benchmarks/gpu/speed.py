"""Training speed on one GPU through ``finebridge sft``: full fine-tuning of 0.6B and 4B, LoRA on 8B, in Qwen3's shapes.

    python benchmarks/gpu/speed.py [--rows 0.6b,4b,...] [--seconds 25] [--minutes 8] [--profile] [-- FLAGS]

Needs no download: weights are random, samples are random ids whose lengths are log-normal (median 600, sigma 0.9, 16 to 4096
tokens), and every token carries loss. A row is a process of its own with real flags, packed, that logs every 4 steps; what is
told is the median of its log lines behind the first two, in which kernels are compiled. After ``--seconds`` of lines it is
stopped; a row that fails is told with its last lines, and the next one begins. MFU is the share of what this GPU does in 3 s
of bf16 matrix products without a pause. Rows go into ``gpu_speed.csv`` as they are done, failed ones too.

A row ``NAME:trl`` is the same by TRL (``trl_way.py``), left out in one line where TRL is not importable.

``--profile`` lists, in place of measuring, what two steps of each row spend their time on. ``--rows tiny`` tries the script
itself, on a CPU too.
"""

import argparse
import importlib.util
import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT / "benchmarks"))

from results import add_rows, circumstances  # noqa: E402 - found through the line above

LONGEST = 4096
PEER = ":trl"
EVERY = 4  # steps between two log lines
WARM = 2  # log lines that are not counted
PACKAGES = (
    "torch",
    "transformers",
    "deepspeed",
    "peft",
    "accelerate",
    "triton",
    "flash-attn",
    "flash-attn-4",
    "liger-kernel",
    "trl",
)


@dataclass(frozen=True)
class Row:
    """A model's shape, and the flags of its run."""

    config: Mapping[str, Any]
    flags: Mapping[str, Any]
    samples: int = 20_000
    longest: int = LONGEST
    words: int = 151936


def qwen3(hidden: int, inner: int, layers: int, heads: int, *, tied: bool) -> dict[str, Any]:
    """A config with the names of Qwen3's own."""
    return {
        "model_type": "qwen3", "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers,
        "num_attention_heads": heads, "num_key_value_heads": 8, "head_dim": 128, "max_position_embeddings": 40960,
        "tie_word_embeddings": tied, "rope_theta": 1_000_000.0, "rms_norm_eps": 1e-6, "use_cache": False,
    }  # fmt: skip


def flags(length: int, accumulation: int, **more: object) -> dict[str, object]:
    """16,384 tokens a step in any case, ZeRO-2."""
    return {
        "max_seq_length": length, "gradient_accumulation_steps": accumulation, "per_device_train_batch_size": 1,
        "deepspeed": "ds_zero2_no_offload", "bf16": "true", **more,
    }  # fmt: skip


B0_6, B4, B8 = (
    qwen3(1024, 3072, 28, 16, tied=True), qwen3(2560, 9728, 36, 32, tied=True), qwen3(4096, 12288, 36, 32, tied=False),
)  # fmt: skip
LORA = {
    "use_lora": "true", "lora_rank": 16, "lora_alpha": 16,
    "lora_target": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj",
}  # fmt: skip
PURE = {"master_weights": "bf16_stochastic"}
RECOMPUTED, KEPT = ({"gradient_checkpointing": value} for value in ("true", "false"))
ROWS: dict[str, Row] = {
    "0.6b": Row(B0_6, flags(16384, 1, **PURE, **KEPT)),
    "4b": Row(B4, flags(8192, 2, **PURE, **KEPT)),
    "8b-lora": Row(B8, flags(4096, 4, **LORA, **KEPT)),
    # when asked for
    "0.6b-masters": Row(B0_6, flags(16384, 1, **KEPT)),
    "0.6b-4k": Row(B0_6, flags(4096, 4, **PURE, **KEPT)),
    "4b-16k": Row(B4, flags(16384, 1, **PURE)),  # what is recomputed is chosen by memory
    "4b-4k": Row(B4, flags(4096, 4, **PURE, **KEPT)),
    "8b-lora-16k": Row(B8, flags(16384, 1, **LORA)),
    "8b-lora-8k": Row(B8, flags(8192, 2, **LORA, **KEPT)),
    "4b-gc": Row(B4, flags(16384, 1, **PURE, **RECOMPUTED)),
    "8b-lora-gc": Row(B8, flags(16384, 1, **LORA, **RECOMPUTED)),
    "tiny": Row(
        {**qwen3(64, 128, 2, 2, tied=True), "num_key_value_heads": 1, "head_dim": 32},
        {"max_seq_length": 256, "gradient_accumulation_steps": 1, "per_device_train_batch_size": 1},
        samples=2000, longest=200, words=4000,
    ),
}  # fmt: skip


@dataclass
class Told:
    """What a run printed and logged."""

    code: int
    text: str
    lines: list[dict[str, Any]] = field(default_factory=list[dict[str, Any]])


def make_tokenizer(folder: Path, words: int) -> Path:
    """A tokenizer of that many words, which nobody reads."""
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    target = folder / f"tokenizer-{words}"
    if not target.exists():
        backend = Tokenizer(models.WordLevel({f"w{number}": number for number in range(words)}, "w1"))
        made = PreTrainedTokenizerFast(tokenizer_object=backend, **dict.fromkeys(("eos_token", "pad_token"), "w0"))
        made.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
        made.save_pretrained(target)
    return target


def make_data(folder: Path, row: Row) -> Path:
    """A prepared dataset of random samples of all words, every token with loss."""
    import numpy as np
    from finebridge.data_tools.encoder import EncodedChunk
    from finebridge.data_tools.writer import DatasetWriter
    from finebridge.storage.once import build_once

    draw = np.random.default_rng(0)
    lengths = np.clip(draw.lognormal(np.log(600), 0.9, row.samples), 16, row.longest).astype(np.int32)
    ids = draw.integers(0, row.words, int(lengths.sum()), dtype=np.int32)
    ids[np.cumsum(lengths) - 1] = 0  # what ends an answer
    spans = np.stack([np.zeros_like(lengths), lengths], axis=1)
    target = folder / f"data-{row.words}"

    def build(inside: Path, _: object) -> dict[str, Any]:
        with DatasetWriter(inside, [Path("random")], "chat") as writer:
            counts, lines = np.ones_like(lengths), np.arange(1, len(lengths) + 1)
            writer.add((0, EncodedChunk(Path("random"), len(lengths), 0, 0, ids, lengths, spans, counts, lines)))
        return {}

    build_once(target, build, kind="dataset", say=lambda _: None)
    return target


def command(name: str, folder: Path, peak: float | None, more: Sequence[str], entry: Sequence[str]) -> list[str]:
    """The words of a row's run."""
    row = ROWS[name]
    config = folder / f"{name}.json"
    config.write_text(json.dumps(row.config), encoding="utf-8")
    tokenizer, data = make_tokenizer(folder, row.words), make_data(folder, row)
    given: dict[str, object] = {
        "config_name": config, "tokenizer_name_or_path": tokenizer, "train_data_file": data,
        "output_dir": folder / name, "packing": "true", "max_steps": 100_000, "logging_steps": EVERY, "save_strategy": "no",
        "learning_rate": 1e-5, "lr_scheduler_type": "constant", "disable_tqdm": "true", "report_to": "none", **row.flags,
    }  # fmt: skip
    if peak:
        given["peak_tflops"] = round(peak, 1)
    return [
        sys.executable,
        *entry,
        *(str(word) for flag, value in given.items() for word in (f"--{flag}", value)),
        *more,
    ]


def peer_command(name: str, folder: Path, peak: float | None) -> list[str]:
    """The words of the same row by TRL, whose packs hold 4096 tokens."""
    row, given = ROWS[name], ROWS[name].flags
    rows, accumulation = (4, 1) if name == "0.6b" else (1, 4)
    config = folder / f"{name}.json"
    config.write_text(json.dumps(row.config), encoding="utf-8")
    words = {
        "config": config, "data": make_data(folder, row), "tokenizer": make_tokenizer(folder, row.words),
        "output": folder / f"{name}:trl",
        "length": row.longest, "rows": rows, "accumulation": accumulation, "every": EVERY, "peak": peak or 0,
        "vocab_size": row.words, "lora_rank": given.get("lora_rank", 0),
    }  # fmt: skip
    script = Path(__file__).resolve().parent / "trl_way.py"
    return [sys.executable, str(script), *(str(word) for key, value in words.items() for word in (f"--{key}", value))]


def follow(words: Sequence[str], folder: Path, seconds: float, until: float) -> Told:
    """Run to ``seconds`` behind its warm lines, or to ``until``; stop it, and wait for its end."""
    log = folder / "log"
    with log.open("w", encoding="utf-8") as stream:
        process = subprocess.Popen(words, stdout=stream, stderr=subprocess.STDOUT, env=environment(folder.parent))
    end = until
    while process.poll() is None and time.monotonic() < end:
        time.sleep(0.2)
        warm = log.read_text(encoding="utf-8", errors="replace").count("\nstep ") >= WARM
        end = min(end, time.monotonic() + seconds) if warm and end == until else end
    if process.poll() is None:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
    told = Told(process.returncode, log.read_text(encoding="utf-8", errors="replace"))
    state = folder / "trainer_state.json"
    if state.is_file():
        told.lines = [line for line in json.loads(state.read_text(encoding="utf-8"))["log_history"] if "loss" in line]
    return told


def environment(folder: Path) -> dict[str, str]:
    """This process's, in which ``finebridge`` is this checkout."""
    link = folder / "finebridge"
    if not link.exists():
        link.symlink_to(ROOT)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])}


def result(name: str, told: Told, took: float) -> dict[str, object]:
    """A row of the CSV; an error has the last lines of the run."""
    counted = told.lines[WARM:]

    def middle(key: str) -> object:
        values = [line[key] for line in counted if key in line]
        return round(statistics.median(values), 4) if values else ""

    def said(start: str) -> str:
        return next((line for line in told.text.splitlines() if line.startswith(start)), "")

    return {
        "row": name, "tokens_per_second": middle("tokens_per_second"),
        "trained_tokens_per_second": middle("trained_tokens_per_second"), "mfu": middle("mfu"),
        "peak_gib": counted[-1].get("memory_gib", "") if counted else "", "lines": len(counted),
        "spread": _spread([line["tokens_per_second"] for line in counted if "tokens_per_second" in line]),
        "first_loss": told.lines[0]["loss"] if told.lines else "", "last_loss": told.lines[-1]["loss"] if told.lines else "",
        "seconds": round(took, 1), "attention": said("attention: "), "loss": said("loss: "),
        "layers": said("layers: "), "recompute": said("recompute: "),
        "error": "" if counted else f"exit code {told.code}: " + " | ".join(told.text.strip().splitlines()[-3:])[-300:],
    }  # fmt: skip


def _spread(values: Sequence[float]) -> object:
    """The standard deviation between log lines as a share of the mean; packs differ, too."""
    return round(statistics.stdev(values) / statistics.mean(values), 4) if len(values) > 1 else ""


def ceiling() -> float | None:
    """TFLOP/s of 8192-wide bf16 products during 3 s, in a process of its own; None without a GPU."""
    code = (
        "import time, torch\n"
        "a, b = (torch.randn(8192, 8192, device='cuda', dtype=torch.bfloat16) for _ in 'ab')\n"
        "a @ b\ntorch.cuda.synchronize()\nbegan, count = time.perf_counter(), 0\n"
        "while time.perf_counter() - began < 3:\n"
        "    for _ in range(20): a @ b\n"
        "    count += 20\n    torch.cuda.synchronize()\n"
        "print(count * 2 * 8192**3 / (time.perf_counter() - began) / 1e12)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    return float(done.stdout) if done.returncode == 0 else None


def device() -> str:
    """The GPU and its driver, or the processor alone."""
    query = ["nvidia-smi", "--query-gpu=name,driver_version,power.limit", "--format=csv,noheader"]
    try:
        return subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip().replace("\n", "; ")
    except (OSError, subprocess.CalledProcessError):
        return "CPU"


def profiled(words: Sequence[str]) -> None:
    """Train in this process and list what two steps behind the tenth spend their time on."""
    import torch
    from finebridge.train import assemble as assembling
    from finebridge.train import sft
    from torch.profiler import ProfilerActivity, profile, schedule
    from transformers import TrainerCallback

    class Profile(TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            kinds = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if torch.cuda.is_available() else [])]
            self.profile = profile(activities=kinds, schedule=schedule(wait=9, warmup=1, active=2, repeat=1))
            self.profile.start()

        def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:  # noqa: ARG002
            self.profile.step()
            if state.global_step == 12:  # noqa: PLR2004
                self.profile.stop()
                key = "self_device_time_total" if torch.cuda.is_available() else "self_cpu_time_total"
                averages = self.profile.key_averages()
                print(averages.table(sort_by=key, row_limit=45, max_name_column_width=90), flush=True)
                control.should_training_stop = True

    inner = assembling.assemble

    def assemble(args: Any) -> Any:
        run = inner(args)
        run.trainer.add_callback(Profile())
        return run

    assembling.assemble = assemble
    sft.leave(sft.main(words))


def main(argv: Sequence[str] | None = None) -> int:
    """Measure row by row; 1 when a row failed."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words[:1] == ["--profiled"]:
        profiled(words[1:])
    parser = argparse.ArgumentParser("speed.py", allow_abbrev=False, description="training speed on one GPU")
    parser.add_argument(
        "--rows", default="0.6b,0.6b:trl,4b,4b:trl,8b-lora,8b-lora:trl", help=f"comma-separated, of {', '.join(ROWS)}"
    )
    parser.add_argument(
        "--seconds", type=float, default=25, help="measured, behind the warm lines (default %(default)g)"
    )
    parser.add_argument("--minutes", type=float, default=8, help="for all rows together (default %(default)g)")
    parser.add_argument("--profile", action="store_true", help="list where two steps spend their time")
    parser.add_argument("--csv", type=Path, default=ROOT / "benchmarks" / "gpu_speed.csv", help="the file to add to")
    parser.add_argument("more", nargs="*", help="more flags for every run, after --")
    args = parser.parse_args(words)
    names = str(args.rows).split(",")
    if any(name.endswith(PEER) for name in names) and importlib.util.find_spec("trl") is None:
        print("rows by TRL are left out: it is not installed", flush=True)
        names = [name for name in names if not name.endswith(PEER)]
    if unknown := {name.removesuffix(PEER) for name in names} - ROWS.keys():
        parser.error(f"--rows: no {', '.join(sorted(unknown))}; there are {', '.join(ROWS)}")
    until = time.monotonic() + 60 * args.minutes
    failed = False
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work)
        sys.path.insert(0, environment(folder)["PYTHONPATH"].split(os.pathsep)[0])
        peak = ceiling()
        common = {"device": device(), "ceiling_tflops": round(peak, 1) if peak else "", **circumstances(PACKAGES)}
        print(
            f"{common['device']}: {common['ceiling_tflops']} TFLOP/s of bf16 products; {common['versions']}", flush=True
        )
        for row in _each(names, folder, args, peak, until):
            failed |= bool(row["error"])
            if not args.profile:
                add_rows(args.csv, [{**common, "flags": " ".join(args.more), **row}])
    return int(failed)


def _each(
    names: Sequence[str], folder: Path, args: argparse.Namespace, peak: float | None, until: float
) -> Iterator[dict[str, object]]:
    """Run every row in its share of the time that is left."""
    entry = [str(Path(__file__).resolve()), "--profiled"] if args.profile else None
    for number, name in enumerate(names):
        began = time.monotonic()
        share = (until - began) / (len(names) - number)
        (folder / name).mkdir()
        sft = entry or ["-m", "finebridge.finetune.cli", "sft", "--nproc_per_node", "1"]
        if name.endswith(PEER):
            words = peer_command(name.removesuffix(PEER), folder, peak)
        else:
            words = command(name, folder, peak, args.more, sft)
        told = follow(words, folder / name, args.seconds, began + share - 8)  # to end takes a while
        row = result(name, told, time.monotonic() - began)
        print(f"== {name}: " + ", ".join(f"{key} {value}" for key, value in row.items() if value != ""), flush=True)
        if row["error"] or args.profile:
            print("\n".join(told.text.splitlines()[-80 if args.profile else -40 :]), flush=True)
        yield row


if __name__ == "__main__":
    sys.exit(main())
