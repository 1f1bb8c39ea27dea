"""Documents that share an n-gram with a benchmark's texts.

The whole document is removed: one with a hole in it would be taken for running text, and what stands around a test
question is often its answer.
"""

import hashlib
import json
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import numpy as np

from megatrain.config.errors import UserError
from megatrain.data.clean.config import DecontaminateStep
from megatrain.data.clean.outcome import Refusal, excerpt
from megatrain.data.clean.words import WORD, WordHashes, ngram_hashes, words_of
from megatrain.data.sources.formats import format_of
from megatrain.data.sources.left_out import LeftOut
from megatrain.data.sources.listing import SourceFile, list_path
from megatrain.data.sources.streams import decode, open_bytes


class Benchmarks:
    """The n-grams of the benchmarks' texts: 8 bytes for each different one."""

    def __init__(self, step: DecontaminateStep, hashes: WordHashes) -> None:
        """Read the files of `step`.

        Raises:
            UserError: a file cannot be read, or has no text of `step.ngram` words.
        """
        self.n, self.hashes = step.ngram, hashes
        self.ngrams = np.unique(np.concatenate([self._of_file(file) for file in _files(step.against)]))

    def _of_file(self, file: SourceFile) -> np.ndarray:
        found = [self._ngrams(text) for text in _texts(file)]
        if not sum(map(len, found)):
            raise UserError(
                f"{file.path}: no text has as many as {self.n} words, so nothing could be found; set a smaller ngram "
                "in data.clean's step decontaminate, or leave the file out"
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
    found = []
    for file in _files(step.against):
        with file.open() as stream:
            found.append(hashlib.file_digest(stream, "sha256").hexdigest())  # type: ignore[arg-type]
    return sorted(found)


def _offset_of_word(text: str, index: int) -> int:
    """Return where the word of this index begins; about, where a letter's case changes its length."""
    for number, found in enumerate(WORD.finditer(text.casefold())):
        if number == index:
            return found.start()
    return 0


def _files(paths: tuple[str, ...]) -> list[SourceFile]:
    """Return the files that `paths` name, as `data.path` does."""
    return [file for path in paths for file in list_path(path, LeftOut())[0]]


def _texts(file: SourceFile) -> Iterator[str]:
    """Yield each text of a file: all strings of JSON, or the whole of any other."""
    kind = format_of(file.name)
    if kind in ("parquet", "arrow", "tar", "zip"):
        raise UserError(
            f"data.clean's step decontaminate reads text and JSON, and {file.path} is {kind}; convert it"
        )
    with open_bytes(file) as stream:
        text = decode(stream.read(), file.path, "auto")
    if kind not in ("jsonl", "json"):
        yield text
        return
    if kind == "json":
        with suppress(ValueError, RecursionError):
            yield from _strings(json.loads(text))
            return
    for number, line in enumerate(text.split("\n"), 1):  # a .json file may hold lines, too
        if line.strip():
            try:
                row = json.loads(line)
            except (ValueError, RecursionError) as error:
                raise UserError(f"{file.path}:{number} is not JSON: {error}") from None
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
