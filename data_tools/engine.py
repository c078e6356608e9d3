"""Fast tokenising of plain text, proven against ``tokenizers``.

``tokenizers`` (the library behind transformers' tokenizers) is the truth. ``fastokens`` gives the same ids some thirty
times faster; it is used when a start-up check of some thousand strings agrees and the tokenizer is byte-level BPE, where
every token stands for known bytes: so each text that it encodes is checked, byte by byte, to be what was put in.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, cast

import numpy as np
import numpy.typing as npt
import orjson

# Rows of what real text mixes: letters, digits, punctuation, spaces, line ends, CJK, marks, emoji, code.
_ALPHABETS = (
    "abcdefghijklmnopqrstuvwxyz", "ABCXYZ", "0123456789", " ", "\n", "\t", "\r\n", "\x00\x01\x7f\x85",
    ".,;:!?'\"-_()[]{}<>/\\|@#$%^&*+=~`", "'s't're'll'd", "éèüßñøåäöçÀÉ", "e\u0301n\u0303", "ﬁﬂ①Ⅳ㎏", "𝓗𝔢",
    "的一是不了人我在有他", "ひらがなカタカナ", "한국어", "Привет", "مرحبا", "नमस्ते", "สวัสดี",
    "😀👍🏽👨\u200d👩\u200d👧🇩🇪", "\u00a0\u2003\u3000\u200b\ufeff",
)  # fmt: skip
_WORDS = (
    "return",
    "def ",
    "    ",
    "  ",
    "\n\n",
    "\r\n\r\n",
    "http://",
    "1234567",
    "don't",
    "I'LL",
    "x=1",
    "...",
    "->",
    "\t\t",
)
_CHECKED = 2000


class EngineDiffers(RuntimeError):  # noqa: N818 - it names what happened; the build goes on with the other engine
    """The fast engine gave other ids than ``tokenizers``; the message shows the text."""


class FastEngine:
    """Plain text to token ids by ``fastokens``: no added token is ever recognised, no special token is added.

    ``normalize`` is the tokenizer's Unicode normaliser; texts must have passed through it before ``encode``. ``used`` says
    that one has encoded in this process, which then has threads of the engine's.
    """

    used: ClassVar[bool] = False

    def __init__(self, settings: dict[str, Any], vocab_size: int) -> None:
        import fastokens

        plain = settings | {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        self._engine = fastokens.Tokenizer.from_json_str(orjson.dumps(plain).decode())
        self._table, self._starts = _token_bytes(settings, vocab_size)
        self._heads = _heads(self._table, self._starts)
        self.normalize = normalize if _normalizers(settings.get("normalizer")) else str

    def encode(self, texts: Sequence[str]) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.int64]]:
        """Ids of all texts one after the other (int32) and where each begins and ends (int64, shape [len(texts) + 1])."""
        FastEngine.used = True
        ids, offsets = self._engine.encode_batch_flat(list(texts))
        return np.frombuffer(ids, "<u4").astype(np.int32), np.frombuffer(offsets, "<u8").astype(np.int64)

    def check(self, backend: Any) -> None:
        """Compare both engines on some thousand strings. Raises EngineDiffers, naming the text."""
        texts = check_texts(orjson.loads(backend.to_str()))
        ids, offsets = self.encode(texts)
        truth = backend.encode_batch_fast(texts, add_special_tokens=False)
        for number, (text, wanted) in enumerate(zip(texts, truth, strict=True)):
            if ids[offsets[number] : offsets[number + 1]].tolist() != wanted.ids:
                raise EngineDiffers(f"the text {text!r}")

    def holds(
        self, ids: npt.NDArray[np.int32], offsets: npt.NDArray[np.int64], texts: Sequence[str]
    ) -> npt.NDArray[np.bool_]:
        """For each text whether the bytes of its tokens are the text, to the last byte."""
        from .kernels import same_bytes

        raw = [text.encode() for text in texts]
        ends = np.zeros(len(raw) + 1, np.int64)
        np.cumsum([len(part) for part in raw], out=ends[1:])
        data = np.frombuffer(b"".join((*raw, bytes(16 - ends[-1] % 8))), "<u8")
        return same_bytes(ids, offsets, self._table, self._starts, self._heads, data, ends)


def fast_engine(backend: Any, say: Callable[[str], None] = print) -> FastEngine | None:
    """The fast engine for a ``tokenizers.Tokenizer``, not yet checked; None, with one line that says why, when there is none."""
    settings = orjson.loads(backend.to_str())
    if reason := _unsuited(settings):
        say(f"data: tokenising with tokenizers ({reason})")
        return None
    try:
        return FastEngine(settings, backend.get_vocab_size(with_added_tokens=True))
    except ValueError as error:
        say(f"data: tokenising with tokenizers (fastokens does not read this tokenizer: {error})")
        return None


def check_texts(settings: dict[str, Any]) -> list[str]:
    """The strings of the start-up check, always the same: mixed scripts and spaces, without any added token."""
    chance = random.Random(0)  # noqa: S311 - no secret
    added = [token["content"] for token in settings["added_tokens"]]
    texts: list[str] = []
    while len(texts) < _CHECKED:
        parts: list[str] = []
        for _ in range(chance.randint(1, 12)):
            alphabet = chance.choice(_ALPHABETS)
            word = "".join(chance.choice(alphabet) for _ in range(chance.randint(1, 6)))
            parts.append(word if chance.random() < 0.7 else chance.choice(_WORDS))  # noqa: PLR2004
        text = "".join(parts)
        if _normalizers(settings.get("normalizer")):
            text = normalize(text)
        if not any(token in text for token in added):
            texts.append(text)
    return texts


def normalize(text: str) -> str:
    """Unicode NFC, the one normaliser that the fast engine takes on."""
    import unicodedata

    return text if text.isascii() else unicodedata.normalize("NFC", text)


def _unsuited(settings: dict[str, Any]) -> str | None:
    """Why a tokenizer is not one whose every token stands for known bytes; None when it is."""
    model = settings["model"]
    if model["type"] != "BPE" or model.get("byte_fallback") or model.get("unk_token") or model.get("dropout"):
        return "not byte-level BPE"
    if (
        not _uses_byte_level(settings.get("pre_tokenizer"))
        or (settings.get("decoder") or {}).get("type") != "ByteLevel"
    ):
        return "not byte-level BPE"
    if (normalizers := _normalizers(settings.get("normalizer"))) not in ([], ["NFC"]):
        return f"it changes texts with {', '.join(normalizers)}"
    if any(token["lstrip"] or token["rstrip"] or token["single_word"] for token in settings["added_tokens"]):
        return "its control tokens swallow spaces"
    if normalizers and any(token["normalized"] for token in settings["added_tokens"]):
        return "its control tokens are found after normalising"
    return None


def _normalizers(settings: dict[str, Any] | None) -> list[str]:
    """The kinds of a normaliser, sequences opened."""
    if not settings:
        return []
    if settings["type"] == "Sequence":
        return [kind for part in settings["normalizers"] for kind in _normalizers(part)]
    return [settings["type"]]


def _uses_byte_level(pre_tokenizer: dict[str, Any] | None) -> bool:
    if not pre_tokenizer:
        return False
    if pre_tokenizer["type"] == "Sequence":
        return any(_uses_byte_level(part) for part in pre_tokenizer["pretokenizers"])
    return pre_tokenizer["type"] == "ByteLevel" and not pre_tokenizer.get("add_prefix_space")


def _token_bytes(settings: dict[str, Any], vocab_size: int) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.int32]]:
    """The bytes of every token, one after the other (uint8), and where each begins (int32, shape [vocab + 1]).

    Byte-level BPE writes each byte as one printable character; the map is GPT-2's ``bytes_to_unicode``.
    """
    shown = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    hidden = [byte for byte in range(256) if byte not in shown]
    table = {byte: byte for byte in shown} | {256 + place: byte for place, byte in enumerate(hidden)}
    vocab = cast("dict[str, int]", settings["model"]["vocab"])
    words: list[bytes] = [b""] * max(vocab_size, 1 + max(vocab.values()))
    for word, number in vocab.items():
        words[number] = word.translate(table).encode("latin-1", "replace")
    starts = np.zeros(len(words) + 1, np.int32)
    np.cumsum([len(word) for word in words], out=starts[1:])
    return np.frombuffer(b"".join(words), np.uint8), starts


def _heads(table: npt.NDArray[np.uint8], starts: npt.NDArray[np.int32]) -> npt.NDArray[np.uint64]:
    """The first eight bytes of every token as a little-endian word, zeros where it has fewer; shape [vocab]."""
    place = starts[:-1, None] + np.arange(8)
    inside = place < starts[1:, None]
    return np.where(inside, table[np.where(inside, place, 0)], 0).astype(np.uint8).view("<u8").ravel()
