r"""Words and n-grams of a text in any language, as arrays: what decontamination and the repetition rules count.

A word is a run of letters and digits, in NFKC and case-folded; punctuation, marks and white space part words. Of scripts that
are written without spaces (Chinese, Japanese, Thai, Lao, Burmese, Khmer) each character is a word of its own.
"""

import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

LONGEST, SHORTEST = 13, 8  # words of an n-gram that is looked for
_UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"
)
_WORD = re.compile(f"[{_UNSPACED}]|[^\\W_{_UNSPACED}]+")
_PARTING = {code: " " for code in range(128) if not chr(code).isalnum()}
_FACTOR = 0x9E3779B97F4A7C15
_FEWEST = 50  # words of a text whose repetitions are judged: Gopher keeps no shorter document
_LINES = 0.20
_TOP = {2: 0.20, 3: 0.18, 4: 0.16}
_REPEATED = {5: 0.15, 6: 0.14, 7: 0.13, 8: 0.12, 9: 0.11, 10: 0.10}

Numbers = npt.NDArray[np.uint64]


def words_of(text: str) -> list[str]:
    """The words of a text, in order."""
    if text.isascii():
        return text.lower().translate(_PARTING).split()  # the same, several times faster
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


def ngram_hashes(words: Numbers, n: int) -> Numbers:
    """A hash of each run of ``n`` numbers (uint64): a polynomial modulo 2**64; shape [words - n + 1], empty when shorter."""
    count = max(0, len(words) - n + 1)
    hashes = np.zeros(count, np.uint64)
    for place in range(n):
        hashes *= np.uint64(_FACTOR)
        hashes += words[place : place + count]
    return hashes


@dataclass(frozen=True, slots=True)
class Found:
    """An n-gram of an evaluation text: ``where`` is that text's file:line, ``words`` the n-gram."""

    where: str
    words: str


class EvaluationTexts:
    """Finds rows that hold a text of evaluation data, by the rule of GPT-3 (Brown et al. 2020, appendix C).

    Two texts overlap when they share ``LONGEST`` words in a row. An evaluation text of fewer words is looked for as a
    whole; one of fewer than ``SHORTEST`` is not (``too_short`` counts them): it would be found by chance. Where GPT-3
    cuts its documents around the overlap, here the row goes as a whole. Memory: 16 bytes a word of evaluation data.
    """

    def __init__(self, texts: Iterable[tuple[str, str]]) -> None:
        self.too_short = 0
        self._numbers: dict[str, int] = {}
        self._places: list[str] = []  # file:line, each text's that is looked for
        found: dict[int, list[tuple[Numbers, int]]] = {}
        for where, text in texts:
            words = words_of(text)
            size = min(len(words), LONGEST)
            if size < SHORTEST:
                self.too_short += 1
                continue
            self._places.append(where)
            numbers = [self._numbers.setdefault(word, len(self._numbers) + 1) for word in words]
            hashes = ngram_hashes(np.array(numbers, np.uint64), size)
            found.setdefault(size, []).append((hashes, len(self._places) - 1))
        self._tables = {size: _table(parts) for size, parts in sorted(found.items())}

    def __len__(self) -> int:
        return len(self._places)

    def find(self, texts: Iterable[str]) -> Found | None:
        """The first n-gram of these texts that an evaluation text holds too, of the shortest kind; None when there is none."""
        words: list[str] = []
        for text in texts:
            words += words_of(text)
            words.append("")  # no n-gram reaches over two texts
        number = self._numbers.get
        numbers = np.array([number(word, 0) for word in words], np.uint64)
        for size, (table, places) in self._tables.items():
            hashes = ngram_hashes(numbers, size)
            at = np.minimum(np.searchsorted(table, hashes), len(table) - 1)
            hits = np.flatnonzero(table[at] == hashes)
            if hits.size:
                first = int(hits[0])
                return Found(self._places[int(places[at[first]])], " ".join(words[first : first + size]))
        return None


def _table(parts: list[tuple[Numbers, int]]) -> tuple[Numbers, npt.NDArray[np.int64]]:
    """Hashes, each once and sorted, and the number of the first place that has each."""
    hashes, first = np.unique(np.concatenate([part for part, _ in parts]), return_index=True)
    places = np.repeat([place for _, place in parts], [len(part) for part, _ in parts])
    return hashes, places[first]


def repetition(text: str) -> str | None:
    """Which rule of Gopher against repetition a text breaks, in words; None when it breaks none, or is short.

    The rules and limits are those of table A1 of Rae et al. 2021 ("Scaling Language Models: Gopher") that count characters:
    the share in lines that came before, in the commonest run of 2, 3 or 4 words, and in runs of 5 to 10 words that come
    more than once, each character counted once. The rules that count lines or know a language are left out.
    """
    words = words_of(text)
    if len(words) < _FEWEST:
        return None
    if (share := _repeated_lines(text)) > _LINES:
        return f"{share:.0%} of its characters are in lines that came before (at most {_LINES:.0%})"
    known: dict[str, int] = {}
    numbers = np.array([known.setdefault(word, len(known) + 1) for word in words], np.uint64)
    sizes = np.array([len(word) for word in words])
    total = int(sizes.sum())
    for n, limit in (_TOP | _REPEATED).items():
        hashes = ngram_hashes(numbers, n)
        if n in _TOP:
            values, counts = np.unique(hashes, return_counts=True)
            if counts.max() == 1:
                return None  # and no longer run comes twice
            starts = np.flatnonzero(hashes == values[counts.argmax()])
            what = f"the {n} words {' '.join(words[starts[0] : starts[0] + n])!r}"
        else:
            starts, what = _repeated(hashes), f"runs of {n} words that come more than once"
        inside = int(sizes[_covered(starts, n, len(words))].sum())
        if inside > limit * total:
            return f"{inside / total:.0%} of its characters are in {what} (at most {limit:.0%})"
    return None


def _repeated_lines(text: str) -> float:
    lines = [line.strip() for line in text.split("\n")]
    seen: set[str] = set()
    again = 0
    for line in lines:
        again += len(line) if line in seen else 0
        seen.add(line)
    return again / max(1, sum(map(len, lines)))


def _repeated(hashes: Numbers) -> npt.NDArray[np.intp]:
    """The places of hashes that come more than once."""
    order = np.argsort(hashes)
    same = np.diff(hashes[order]) == 0
    return order[np.append(same, False) | np.append(False, same)]


def _covered(starts: npt.NDArray[np.intp], n: int, words: int) -> npt.NDArray[np.bool_]:
    """Which of the words lie in a run of ``n`` that begins at one of ``starts``."""
    steps = np.zeros(words + 1, np.int64)
    steps[starts] += 1
    steps[starts + n] -= 1
    return np.cumsum(steps)[:-1] > 0
