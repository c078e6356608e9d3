"""Conversations by chance, seeded: all that real and hostile data hold."""

import json
import random
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from finebridge.data_tools.arguments import DataArguments
from finebridge.data_tools.encoder import EncodedChunk, RowEncoder
from finebridge.data_tools.engine import FastEngine, fast_engine
from finebridge.data_tools.formats import RowForm
from finebridge.data_tools.readers import Chunk

Row = dict[str, Any]
WORDS = (
    "hello", "the answer", "1234567", "don't", "的一是不了", "Привет", "नमस्ते", "한국어", "😀👍🏽", "👨\u200d👩\u200d👧",
    "e\u0301n\u0303", "\u212b\u037e\u212a", "ﬁ①", "\u00a0", "\u3000", "\u200b\ufeff", "\x00\x7f\x85", "\U000f0000",
    "\ue000\\0\ue001", "\ue000", "x" * 300, "    def f():\n\t", "\r\n", "\n\n", "  ", "{{ x }}", "{% if %}", "<", ">",
    "<|", "|>", "</", "\u0301", "a\\b\"c'", "NO", "/no_think",
)  # fmt: skip
TAGS = ("<think>", "</think>", "<answer>", "</answer>", "<tool_call>", "</tool_call>", "<tool_response>", "<think:x>")
TOOL = {"type": "function", "function": {"name": "look_up", "description": "d", "parameters": {"type": "object"}}}


class Chats:
    """Rows of the form ``messages``. ``control`` are tokens that stand in texts now and then."""

    def __init__(self, seed: int, control: Sequence[str] = (), *, tools: bool = False) -> None:
        self.chance = random.Random(seed)
        self.control = list(control)
        self.tools = tools

    def text(self, *, tags: float = 0.05) -> str:
        """Some words, perhaps with white space at the ends, tags and control tokens."""
        parts: list[str] = []
        for _ in range(self.chance.choice((1, 1, 1, 2, 3, 6))):
            parts.append(
                self.chance.choice(WORDS) if self.chance.random() < 0.5 else "word" + str(self.chance.randint(0, 99))
            )
            if self.chance.random() < tags:
                parts.append(self.chance.choice(TAGS))
            if self.control and self.chance.random() < 0.02:
                parts.append(self.chance.choice(self.control))
        text = self.chance.choice(("", " ")).join(parts)
        return self.chance.choice(("", "", "", " ", "\n")) + text + self.chance.choice(("", "", "", " ", "\n\n"))

    def answer(self) -> Row:
        """An assistant turn, perhaps with a thought in one of its two places, perhaps without loss."""
        turn: Row = {"role": "assistant", "content": self.text(tags=0.01)}
        kind = self.chance.randint(0, 9)
        if kind == 0:
            turn["content"] = f"<think>\n{self.text(tags=0)}\n</think>\n<answer>\n{turn['content']}\n</answer>"
        elif kind == 1:
            turn["content"] = f"<think>\n{self.text(tags=0)}\n</think>\n\n{turn['content']}"
        elif kind == 2:
            turn["reasoning_content"] = self.chance.choice(("", self.text(tags=0)))
        elif kind == 3:
            turn["loss"] = False
        return turn

    def row(self) -> Row:
        """A conversation."""
        turns: list[Row] = []
        if self.chance.random() < 0.4:
            turns.append({"role": "system", "content": self.chance.choice(("", "You are kind.", self.text()))})
        fields: Row = {}
        if self.tools and self.chance.random() < 0.15:
            fields["tools"] = self.chance.choice(([TOOL], [{"function": TOOL["function"], "type": "function"}]))
        for _ in range(self.chance.choice((1, 1, 1, 2, 3))):
            mark = "/no_think" if self.chance.random() < 0.1 else ""
            turns.append({"role": "user", "content": mark + self.text()})
            if self.tools and self.chance.random() < 0.1:
                call = {"type": "function", "function": {"name": "look_up", "arguments": {"x": self.text(tags=0)}}}
                turns.append(
                    {"role": "assistant", "content": self.chance.choice((None, "let me see")), "tool_calls": [call]}
                )
                turns.append({"role": "tool", "content": self.text()})
            turns.append(self.answer())
        return {"messages": turns, **fields}

    def rows(self, count: int) -> list[Row]:
        """This many conversations."""
        return [self.row() for _ in range(count)]


def chunk_of(rows: Sequence[Any]) -> Chunk:
    """Rows as a run of lines of a file."""
    return Chunk(Path("rows.jsonl"), 1, 0, "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode())


def encode_rows(encoder: RowEncoder, rows: Sequence[Any], form: Any = "messages") -> EncodedChunk:
    """The rows through an encoder."""
    return encoder(chunk_of(rows), RowForm(form))


@cache
def _engine_of(tokenizer: Any) -> FastEngine | None:
    return fast_engine(tokenizer.backend_tokenizer)


def both_ways(
    tokenizer: Any, args: DataArguments, rows: Sequence[Any], kind: Any = "chat", form: Any = "messages"
) -> EncodedChunk:
    """The rows through the fast engine, after checking that ``tokenizers`` alone gives the very same."""
    engine = _engine_of(tokenizer)
    assert engine is not None
    fast = encode_rows(RowEncoder(tokenizer, args, kind, engine), rows, form)
    slow = encode_rows(RowEncoder(tokenizer, args, kind, None), rows, form)
    told = 3 if args.mask_compat == "none" else 2  # of several reasons the first is told, which depends on the order
    assert [reject[:told] for reject in fast.rejects] == [reject[:told] for reject in slow.rejects]
    assert fast.rows == slow.rows == len(rows)
    assert fast.neutralised == slow.neutralised
    for name in ("lines", "lengths", "span_counts", "spans", "ids"):
        assert getattr(fast, name).tolist() == getattr(slow, name).tolist(), name
    assert sorted([*{reject[0] for reject in fast.rejects}, *set(fast.lines.tolist())]) == [*range(1, len(rows) + 1)]
    return fast
