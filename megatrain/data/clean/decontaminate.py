"""Documents that share an n-gram with a benchmark's texts.

The whole document is removed: one with a hole in it would be taken for running text, and what stands around a test
question is often its answer.
"""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.config.errors import UserError
from megatrain.data.clean.config import DecontaminateStep
from megatrain.data.clean.outcome import Refusal, excerpt
from megatrain.data.clean.words import WORD, WordHashes, ngram_hashes, words_of


class Benchmarks:
    """The n-grams of the benchmarks' texts: 8 bytes for each different one."""

    def __init__(self, step: DecontaminateStep, hashes: WordHashes) -> None:
        """Read the files of `step`.

        Raises:
            UserError: a file cannot be read, or has no text of `step.ngram` words.
        """
        self.n, self.hashes = step.ngram, hashes
        self.ngrams = np.unique(np.concatenate([self._of_file(path) for path in step.against]))

    def _of_file(self, path: str) -> np.ndarray:
        found = [self._ngrams(text) for text in _texts(path)]
        if not sum(map(len, found)):
            raise UserError(
                f"{path}: no text has as many as {self.n} words, so nothing could be found; set a smaller ngram in "
                "data.clean's step decontaminate, or leave the file out"
            )
        return np.concatenate(found)

    def _ngrams(self, text: str) -> np.ndarray:
        return ngram_hashes(self.hashes.of(words_of(text)), self.n)

    def hit(self, text: str) -> Refusal | None:
        """Return the first n-gram that `text` shares with a benchmark; None if it shares none."""
        found = self._ngrams(text)
        places = np.searchsorted(self.ngrams, found)
        is_hit = self.ngrams[np.minimum(places, len(self.ngrams) - 1)] == found
        if not is_hit.any():
            return None
        reason = f"shares {self.n} words in a row with a benchmark"
        return Refusal(reason, excerpt(text, _offset_of_word(text, int(is_hit.argmax()))))


def digests(step: DecontaminateStep) -> list[str]:
    """Return the SHA-256 of each file of `step`, sorted.

    Raises:
        UserError: a file cannot be read.
    """
    return sorted(hashlib.sha256(_read(path)).hexdigest() for path in step.against)


def _offset_of_word(text: str, index: int) -> int:
    """Return where the word of this index begins; about, where a letter's case changes its length."""
    for number, found in enumerate(WORD.finditer(text.casefold())):
        if number == index:
            return found.start()
    return 0


def _texts(path: str) -> Iterator[str]:
    """Yield each text of a file: all strings of a JSONL file, or the whole of any other."""
    try:
        text = _read(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(
            f"{path} is not UTF-8: the byte at offset {error.start}. Convert it, e.g. with iconv."
        ) from None
    if not path.lower().endswith((".jsonl", ".ndjson")):
        yield text
        return
    for number, line in enumerate(text.split("\n"), 1):
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"{path}:{number} is not JSON: {error}. A .jsonl file contains one JSON object per line."
                ) from None
            yield from _strings(row)


def _strings(value: Any) -> Iterator[str]:
    """Yield every string in a JSON value, but for the names of its keys."""
    left = [value]
    while left:
        value = left.pop()
        if isinstance(value, str):
            yield value
        elif isinstance(value, dict):
            left += value.values()
        elif isinstance(value, list):
            left += value


def _read(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except (OSError, ValueError) as error:
        said = getattr(error, "strerror", None) or error
        raise UserError(f"data.clean's step decontaminate cannot read {path}: {said}") from None
