"""Words and n-grams of a text, as 64-bit hashes that are the same on every machine."""

import re
from collections.abc import Sequence
from hashlib import blake2b

import numpy as np

UNSPACED = (
    "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
"""Scripts without spaces between words (Thai, Lao, Burmese, Khmer, kana, Han): each character counts as a word."""
WORD = re.compile(rf"[{UNSPACED}]|[^\W_{UNSPACED}]+")
MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)
MAX_REMEMBERED = 1 << 20


class WordHashes(dict[str, int]):
    """The hash of each word seen so far; forgotten when there are many. It only saves time."""

    def __missing__(self, word: str) -> int:
        digest = blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest()
        found = self[word] = int.from_bytes(digest, "little")
        return found

    def of(self, words: Sequence[str]) -> np.ndarray:
        """Return the hashes of `words`, (words,) uint64."""
        if len(self) > MAX_REMEMBERED:
            self.clear()
        return np.fromiter(map(self.__getitem__, words), np.uint64, len(words))


def words_of(text: str) -> list[str]:
    """Return the words of `text` without case, punctuation and white space, for comparing texts."""
    return WORD.findall(text.casefold())


def ngram_hashes(words: np.ndarray, n: int) -> np.ndarray:
    """Return the hash of every n-gram, (max(0, words - n + 1),) uint64, from the words' hashes.

    A polynomial modulo 2^64 in an odd constant: equal n-grams have equal hashes, and others differ but for a chance of
    about 2^-64 per pair.
    """
    count = max(0, len(words) - n + 1)
    found = words[:count].copy()
    for offset in range(1, n if count else 1):
        found *= MULTIPLIER
        found += words[offset : offset + count]
    return found
