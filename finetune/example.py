"""The built-in example: a tiny model learns two-digit addition from messages, in slow and in fast think.

    bash finetune/finetune.sh            (or: finebridge example [--output_dir DIR])

It runs the real thing on a small scale: ``finebridge run`` for full fine-tuning with ZeRO-2, then for LoRA that teaches a new
habit and is merged, and held-out questions put to what came out. Recipes and data lie in ``example_data/``.
"""

import argparse
import os
import shlex
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from ..data_tools.thinking import NO_THINK, parse
from ..storage.publish import publish
from .launch import gpu_count
from .recipe import read_recipe
from .run import run

FOLDER = Path(__file__).parent / "example_data"
POLITE = "Answer politely."  # the system prompt that the LoRA stage teaches the model to follow
GOAL = 0.9
_MARK = ".finebridge-example"
_NEW_TOKENS = 48
_RANKS = 1


@dataclass(frozen=True, slots=True)
class Score:
    """Share of held-out questions answered exactly: plainly in both modes, and politely when asked to be polite."""

    slow: float
    fast: float
    polite: float


def main(argv: Sequence[str] | None = None) -> int:
    """Run the example; exit code 0 when the merged model reaches the goal in both modes."""
    parser = argparse.ArgumentParser("finebridge example", description="the built-in example", allow_abbrev=False)
    parser.add_argument("--output_dir", type=Path, default=Path("output/example"), help="default: output/example")
    out: Path = parser.parse_args(argv).output_dir
    began = time.monotonic()
    _clear(out)
    if gpu_count() == 0:
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # silences a warning of DeepSpeed's
    questions = [orjson.loads(line) for line in (FOLDER / "heldout.jsonl").read_bytes().splitlines()]

    print("example 1/4: a new tiny hunyuan_v1_dense model, untrained", flush=True)
    base = make_base(out / "base")
    scores = {"untrained": ask(base, questions).score}
    print("example 2/4: full fine-tuning, ZeRO-2", flush=True)
    full = _run("full.yaml", base, out / "full")
    scores["full fine-tuning"] = ask(full, questions).score
    print("example 3/4: LoRA on top of it (a new habit: be polite when the system prompt says so), merged", flush=True)
    merged = _run("lora.yaml", full, out / "lora")
    print("example 4/4: held-out questions to the merged model", flush=True)
    answers = ask(merged, questions)
    scores["LoRA, merged"] = answers.score
    _report(scores, answers.shown, merged, time.monotonic() - began)
    return 0 if min(answers.score.slow, answers.score.fast) >= GOAL else 1


def make_base(folder: Path) -> Path:
    """A model with random weights from ``example_data/config.json``, with the shipped tokenizer beside it."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, set_seed

    tokenizer = AutoTokenizer.from_pretrained(FOLDER)
    set_seed(1)
    model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(FOLDER), dtype=torch.float32)
    with publish(folder, kind="model", made_from={"config": str(FOLDER / "config.json")}) as staging:
        model.save_pretrained(staging)
        tokenizer.save_pretrained(staging)
    return folder


@dataclass(frozen=True, slots=True)
class Answers:
    """What a model said: its score, and one question and answer of each mode to look at."""

    score: Score
    shown: list[tuple[str, str]]


def ask(folder: Path, questions: Sequence[dict[str, str]]) -> Answers:
    """Put every held-out question to a model, greedily, in slow think, fast think and politely."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils.logging import disable_progress_bar

    disable_progress_bar()
    tokenizer = AutoTokenizer.from_pretrained(folder, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    shown: list[tuple[str, str]] = []

    def share(prefix: str, system: str | None, ending: str) -> float:
        chats: list[list[dict[str, str]]] = []
        for question in questions:
            turns = [{"role": "system", "content": system}] if system else []
            chats.append([*turns, {"role": "user", "content": prefix + question["question"]}])
        texts = _generate(model, tokenizer, chats)
        shown.append((chats[0][-1]["content"], texts[0]))
        right = [_answer(text) == row["answer"] + ending for row, text in zip(questions, texts, strict=True)]
        return sum(right) / len(right)

    slow, fast = share("", None, ""), share(NO_THINK, None, "")
    return Answers(Score(slow, fast, share(NO_THINK, POLITE, ", with pleasure!")), shown)


def _generate(model: Any, tokenizer: Any, chats: Sequence[Any]) -> list[str]:
    import torch

    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    with torch.inference_mode():
        ids = model.generate(**batch, max_new_tokens=_NEW_TOKENS, do_sample=False, pad_token_id=tokenizer.pad_token_id)
    return tokenizer.batch_decode(ids[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)


def _answer(text: str) -> str | None:
    """The answer in a generated text; None when the text is not of the think/answer form."""
    try:
        value = parse(text)
    except ValueError:
        return None
    return value.answer if value else None


def _run(recipe: str, model: Path, output_dir: Path) -> Path:
    """``finebridge run`` of a recipe; the model that it leaves. Ends with its exit code when it fails: it has said why."""
    values = read_recipe(FOLDER / recipe)
    given = {
        "model_name_or_path": model,
        "train_data_file": FOLDER / values["train_data_file"],
        "output_dir": output_dir,
        "nproc_per_node": _RANKS,
    }
    words = [str(FOLDER / recipe), *(f"{name}={value}" for name, value in given.items())]
    print(f"$ {shlex.join(['finebridge', 'run', *words])}", flush=True)
    if code := run(words):
        print(f"error: {recipe} ended with exit code {code}; its messages stand above", file=sys.stderr)
        raise SystemExit(code)
    return output_dir / f"hf-{values['max_steps']}"


def _clear(out: Path) -> None:
    """Remove what an earlier example left; refuse a folder that something else made. Raises ValueError."""
    if out.exists() and any(out.iterdir()) and not (out / _MARK).exists():
        raise ValueError(f"--output_dir {out}: not empty and not from an earlier example; choose another folder")
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    (out / _MARK).touch()


def _report(scores: dict[str, Score], shown: Sequence[tuple[str, str]], merged: Path, seconds: float) -> None:
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    for question, text in shown:
        console.print(f"\n[bold]{question}[/bold]\n{text.strip()}", soft_wrap=True)
    table = Table(title="\nheld-out exact match (100 questions that no training row contains)", title_justify="left")
    for name in ("model", "slow think", "fast think", "polite (LoRA's lesson)"):
        table.add_column(name, justify="left" if name == "model" else "right")
    for name, score in scores.items():
        table.add_row(name, f"{score.slow:.2f}", f"{score.fast:.2f}", f"{score.polite:.2f}")
    console.print(table)
    console.print(f"took {seconds:.0f} s; the merged model: {merged} (AutoModelForCausalLM loads it)", soft_wrap=True)
    console.print(
        "your own data:  bash finetune/finetune.sh run lora.yaml model_name_or_path=MODEL train_data_file=data.jsonl "
        "output_dir=out",
        soft_wrap=True,
    )


if __name__ == "__main__":
    sys.exit(main())
