"""The fast engine: which tokenizers it takes, that it gives the ids of ``tokenizers``, and that its proof finds errors."""

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from finebridge.data_tools.engine import EngineDiffers, FastEngine, check_texts, fast_engine
from random_chats import WORDS


def changed(backend: Any, change: Callable[[dict[str, Any]], None]) -> Any:
    """A copy of a ``tokenizers.Tokenizer`` with other settings."""
    settings = orjson.loads(backend.to_str())
    change(settings)
    return type(backend).from_str(orjson.dumps(settings).decode())


def added(**flags: bool) -> Callable[[dict[str, Any]], None]:
    return lambda settings: settings["added_tokens"][0].update(flags)


REFUSED: list[tuple[Callable[[dict[str, Any]], None], str]] = [
    (lambda s: s["model"].update(byte_fallback=True), "not byte-level BPE"),
    (lambda s: s["model"].update(dropout=0.5), "not byte-level BPE"),
    (lambda s: s["model"].update(unk_token="a"), "not byte-level BPE"),
    (lambda s: s.update(decoder=None), "not byte-level BPE"),
    (lambda s: s.update(pre_tokenizer={"type": "Whitespace"}), "not byte-level BPE"),
    (lambda s: s["pre_tokenizer"].update(add_prefix_space=True), "not byte-level BPE"),
    (lambda s: s.update(normalizer={"type": "NFKC"}), "it changes texts with NFKC"),
    (lambda s: s.update(normalizer={"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}),
     "it changes texts with NFC, Lowercase"),
    (added(lstrip=True), "its control tokens swallow spaces"),
    (added(rstrip=True), "its control tokens swallow spaces"),
    (added(single_word=True), "its control tokens swallow spaces"),
    (lambda s: (s.update(normalizer={"type": "NFC"}), added(normalized=True)(s)),
     "its control tokens are found after normalising"),
]  # fmt: skip


@pytest.mark.parametrize(("change", "reason"), REFUSED)
def test_tokenizers_that_it_does_not_take_are_told(
    tokenizers_by_template: dict[str, Any], change: Callable[[dict[str, Any]], None], reason: str
) -> None:
    said: list[str] = []
    backend = tokenizers_by_template["qwen3"].backend_tokenizer
    assert fast_engine(backend, said.append) is not None
    assert fast_engine(changed(backend, change), said.append) is None
    assert said == [f"data: tokenising with tokenizers ({reason})"]


def test_a_difference_is_found_before_anything_is_encoded(
    tokenizers_by_template: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    honest = FastEngine.encode

    def wrong(self: FastEngine, texts: Any) -> Any:
        ids, offsets = honest(self, texts)
        ids[len(ids) // 2] += 1
        return ids, offsets

    monkeypatch.setattr(FastEngine, "encode", wrong)
    backend = tokenizers_by_template["qwen3"].backend_tokenizer
    engine = fast_engine(backend)
    assert engine is not None
    with pytest.raises(EngineDiffers, match="the text "):
        engine.check(backend)


def test_check_texts_are_always_the_same_and_plain(tokenizers_by_template: dict[str, Any]) -> None:
    settings = orjson.loads(tokenizers_by_template["qwen3"].backend_tokenizer.to_str())
    texts = check_texts(settings)
    assert texts == check_texts(settings)
    assert len(texts) == 2000
    assert not any(token["content"] in text for token in settings["added_tokens"] for text in texts)
    letters = set("".join(texts))
    assert {"的", "и", "😀", "\u0301", "\u3000", "\r", "\x00"} <= letters


@pytest.mark.parametrize("name", ["qwen3", "llama3_1", "deepseek_v3"])
def test_real_tokenizers(npm_tokenizer: Callable[[str], Path], name: str) -> None:
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(npm_tokenizer(name) / "tokenizer.json"))
    assert_same_ids(backend, 600)


def test_small_tokenizers(tokenizers_by_template: dict[str, Any]) -> None:
    for tokenizer in tokenizers_by_template.values():
        assert_same_ids(tokenizer.backend_tokenizer, 300)


def assert_same_ids(backend: Any, count: int) -> None:
    engine = fast_engine(backend)
    assert engine is not None
    chance = random.Random(9)
    words = [word for word in WORDS if not any(mark in word for mark in ("<|", "|>", "｜"))]
    texts = ["".join(chance.choices([*words, " ", "x", "\n"], k=chance.randint(0, 20))) for _ in range(count)]
    texts = [engine.normalize(text) for text in texts]
    ids, offsets = engine.encode(texts)
    assert ids.dtype == np.int32
    assert len(offsets) == len(texts) + 1
    for number, truth in enumerate(backend.encode_batch(texts, add_special_tokens=False)):
        assert ids[offsets[number] : offsets[number + 1]].tolist() == truth.ids, texts[number]
    assert engine.holds(ids, offsets, texts).all()


def test_the_proof_finds_every_wrong_token(tokenizers_by_template: dict[str, Any]) -> None:
    """Texts of every length from nothing on: one token replaced, left out or put in makes its text, and no other, wrong."""
    engine = fast_engine(tokenizers_by_template["qwen3"].backend_tokenizer)
    assert engine is not None
    chance = random.Random(3)
    texts = ["".join(chance.choices("ab think的\n😀", k=length)) for length in range(40)]
    ids, offsets = engine.encode(texts)
    assert engine.holds(ids, offsets, texts).all()
    size = 256
    for number in range(1, len(texts)):
        start, end = int(offsets[number]), int(offsets[number + 1])
        place = chance.randrange(start, end)
        later = np.arange(len(offsets)) > number
        replaced = ids.copy()
        replaced[place] = next(token for token in chance.sample(range(10, size), 50) if token != ids[place])
        for wrong, bounds in (
            (replaced, offsets),
            (np.delete(ids, place), offsets - later),
            (np.insert(ids, place, ids[place]), offsets + later),
        ):
            good = engine.holds(wrong.astype(np.int32), bounds, texts)
            assert not good[number]
            assert good.sum() == len(texts) - 1


def test_no_added_token_is_recognised(tokenizers_by_template: dict[str, Any]) -> None:
    tokenizer = tokenizers_by_template["qwen3"]
    engine = fast_engine(tokenizer.backend_tokenizer)
    assert engine is not None
    texts = list(tokenizer.get_added_vocab())
    ids, offsets = engine.encode(texts)
    assert set(tokenizer.get_added_vocab().values()).isdisjoint(ids.tolist())
    assert engine.holds(ids, offsets, texts).all()
