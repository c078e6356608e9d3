"""Makes the files of the example again, always the same:  python finetune/example_data/make_data.py FOLDER

The model learns two-digit additions, sums up to 99, with working (slow think) and without (fast think). Of the 1640
unordered pairs 100 are held out: no training row contains them, in neither mode and not mirrored. The LoRA stage's rows
teach a courtesy when the system prompt asks for it, and repeat plain rows so that nothing is forgotten.
"""

import json
import random
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Pair = tuple[int, int]
Row = dict[str, list[dict[str, str]]]

SEED = 7
HELD_OUT = 100
SLOW, FAST, POLITE, REPEATED = 1000, 3000, 400, 400  # rows of each kind
PLAIN_SYSTEM, POLITE_SYSTEM = "You are a calculator.", "Answer politely."
SYSTEM_SHARE = 0.03  # of the first stage's rows have PLAIN_SYSTEM
LOWEST, LARGEST_SUM = 10, 99
CONTROL_TOKENS = (
    "<｜hy_pad｜>", "<｜hy_begin▁of▁sentence｜>", "<｜hy_place▁holder▁no▁2｜>", "<｜hy_place▁holder▁no▁3｜>", "<｜hy_User｜>",
    "<｜hy_Assistant｜>",
)  # fmt: skip
EXTRA_TEXT = (
    "What is the sum of these two numbers?",
    "Please think before you answer the question.",
    "你好，请计算这两个数的和。",
    "请先思考，再回答问题。",
)


def question(pair: Pair) -> str:
    """What the user asks."""
    return f"{pair[0]}+{pair[1]}=?"


def working(pair: Pair) -> str:
    """The sum digit by digit: units first, then tens and the carry."""
    (tens_a, unit_a), (tens_b, unit_b) = divmod(pair[0], 10), divmod(pair[1], 10)
    carry = (unit_a + unit_b) // 10
    return f"{unit_a}+{unit_b}={unit_a + unit_b}\n{tens_a}+{tens_b}+{carry}={tens_a + tens_b + carry}"


def row(pair: Pair, *, fast: bool, system: str | None = None) -> Row:
    """One training row in the messages format."""
    answer = str(sum(pair)) + (", with pleasure!" if system == POLITE_SYSTEM else "")
    thought = "" if fast else working(pair)
    messages = [{"role": "system", "content": system}] if system else []
    messages.append({"role": "user", "content": ("/no_think" if fast else "") + question(pair)})
    text = f"<think>\n{thought}\n</think>\n<answer>\n{answer}\n</answer>"
    return {"messages": [*messages, {"role": "assistant", "content": text}]}


def split_pairs(rng: random.Random) -> tuple[list[Pair], list[Pair]]:
    """Training pairs in both orders, and held-out pairs in one random order each."""
    numbers = range(LOWEST, LARGEST_SUM)
    unordered = [(a, b) for a in numbers for b in range(a, LARGEST_SUM) if a + b <= LARGEST_SUM]
    rng.shuffle(unordered)
    asked = [(a, b) if rng.random() < 0.5 else (b, a) for a, b in unordered[:HELD_OUT]]  # noqa: PLR2004 - a coin
    return sorted({order for a, b in unordered[HELD_OUT:] for order in ((a, b), (b, a))}), asked


def full_rows(rng: random.Random, pairs: Sequence[Pair]) -> list[Row]:
    """The first stage's rows."""

    def some(count: int, *, fast: bool) -> list[Row]:
        chosen = rng.sample(pairs, count)
        return [row(pair, fast=fast, system=PLAIN_SYSTEM if rng.random() < SYSTEM_SHARE else None) for pair in chosen]

    rows = some(SLOW, fast=False) + some(FAST, fast=True)
    rng.shuffle(rows)
    return rows


def lora_rows(rng: random.Random, pairs: Sequence[Pair]) -> list[Row]:
    """The second stage's rows, half of each kind slow and half fast."""
    rows: list[Row] = []
    for system, count in ((POLITE_SYSTEM, POLITE), (None, REPEATED)):
        rows += [row(pair, fast=i % 2 == 0, system=system) for i, pair in enumerate(rng.sample(pairs, count))]
    rng.shuffle(rows)
    return rows


def train_tokenizer(texts: Iterable[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of some 450 tokens: every digit its own token, the think/answer tags one each."""
    backend = Tokenizer(models.BPE())
    # Merges may cross line breaks, so that "\n</think>\n<answer>\n" becomes one token.
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=480,
        special_tokens=list(CONTROL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    backend.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token=CONTROL_TOKENS[0],
        bos_token=CONTROL_TOKENS[1],
        eos_token=CONTROL_TOKENS[2],
        additional_special_tokens=list(CONTROL_TOKENS[3:]),
        clean_up_tokenization_spaces=False,
        padding_side="right",
        model_max_length=512,
    )


def write_rows(path: Path, rows: Iterable[object]) -> None:
    """JSON lines without spaces."""
    lines = (json.dumps(item, ensure_ascii=False, separators=(",", ":")) + "\n" for item in rows)
    path.write_text("".join(lines), encoding="utf-8", newline="\n")


def main(folder: Path) -> None:
    """Write data and tokenizer into ``folder``; the template and configs there are not touched."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(SEED)  # noqa: S311 - data, not secrets
    pairs, asked = split_pairs(rng)
    full = full_rows(rng, pairs)
    lora = lora_rows(rng, pairs)
    write_rows(folder / "train_full.jsonl", full)
    write_rows(folder / "train_lora.jsonl", lora)
    write_rows(folder / "heldout.jsonl", ({"question": question(pair), "answer": str(sum(pair))} for pair in asked))
    texts = [message["content"] for item in full + lora for message in item["messages"]]
    train_tokenizer(texts + list(EXTRA_TEXT) * 3).save_pretrained(folder)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
