"""The check of a token cache: every hash again, and whether the tokens and documents can be what the index says."""

import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.data.store import FORMAT_VERSION, INDEX_FILE, SPLIT_PARTS, index_fault, token_dtype
from megatrain.data.tokenizer import META_FILE

CHUNK_BYTES = 8 << 20


@dataclass(frozen=True, slots=True)
class Damage:
    """Something that is wrong with a file of a cache."""

    file: str
    """Its name within the cache."""
    what: str
    offset: int | None = None
    """Where the first wrong value stands, in bytes; None if the whole file is meant."""


def verify(directory: Path, *, progress: Callable[[float], None], documents: bool = True) -> list[Damage]:
    """Read the whole cache `directory`; return what is wrong with it, nothing if it is whole.

    The hash of every file is compared with the index. Beside that, every token id lies below the vocabulary size, the
    documents' starts ascend from 0, and each document ends with the end-of-text token; so a cache that was written
    wrongly is found, too. `progress` is called with the fraction of bytes read, 0 to 1.

    Without `documents` they are not looked at: that takes memory in proportion to their number.
    """
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        version = index["version"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        return [Damage(INDEX_FILE, f"can't be read: {_in_words(error)}")]
    if version != FORMAT_VERSION:
        return [Damage(INDEX_FILE, f"has format {version}, and this program reads format {FORMAT_VERSION}")]
    try:
        fault = index_fault(index)
        damages = _verify(directory, index, progress, documents)
        return damages if fault is None else [Damage(INDEX_FILE, fault), *damages]
    except (KeyError, TypeError, AttributeError, ValueError) as error:
        return [Damage(INDEX_FILE, f"is not what this program writes: {_in_words(error)}")]


def _verify(
    directory: Path, index: dict[str, Any], progress: Callable[[float], None], documents: bool
) -> list[Damage]:
    expected_bytes = max(1, sum(entry["size"] for entry in index["files"].values()))
    tokens = {f"{name}.{SPLIT_PARTS[0]}" for name in index["splits"]}
    damages: list[Damage] = []
    unreadable: set[str] = set()
    read = 0
    for name, entry in index["files"].items():
        check = _IdCheck(index["vocab_size"]) if name in tokens else None
        digest = hashlib.sha256()
        try:
            for chunk in _chunks(directory / name):
                digest.update(chunk)
                read += len(chunk)
                if check is not None:
                    check.take(chunk)
                progress(min(1.0, read / expected_bytes))
            size = (directory / name).stat().st_size
        except OSError as error:
            damages.append(Damage(name, f"can't be read: {_in_words(error)}"))
            unreadable.add(name)
            continue
        if size != entry["size"]:
            damages.append(Damage(name, f"has {size:,} bytes, and should have {entry['size']:,}"))
            unreadable.add(name)
        elif digest.hexdigest() != entry["sha256"]:
            damages.append(
                Damage(name, "has the right size and other content than when it was written (SHA-256)")
            )
        if check is not None and check.found is not None:
            offset, token = check.found
            what = f"has token id {token:,}, and the vocabulary has {index['vocab_size']:,} tokens"
            damages.append(Damage(name, what, offset))
    for name, counts in index["splits"].items():
        if documents and unreadable.isdisjoint(f"{name}.{part}" for part in SPLIT_PARTS):
            damages += _document_damages(directory, name, counts, token_dtype(index["vocab_size"]))
    progress(1.0)
    return damages


class _IdCheck:
    """The search for the first token id outside the vocabulary in the chunks of a file."""

    def __init__(self, vocab_size: int) -> None:
        self._dtype, self._vocab_size = token_dtype(vocab_size), vocab_size
        self._offset = 0
        self.found: tuple[int, int] | None = None
        """Its offset in bytes, and the id."""

    def take(self, chunk: bytes) -> None:
        """Look at the next chunk; only the last one may have a length that is no multiple of an id's."""
        ids = np.frombuffer(chunk, dtype=self._dtype, count=len(chunk) // self._dtype.itemsize)
        if self.found is None and len(ids) and int(ids.max()) >= self._vocab_size:
            place = int(np.argmax(ids >= self._vocab_size))
            self.found = (self._offset + place * self._dtype.itemsize, int(ids[place]))
        self._offset += len(chunk)


def _document_damages(directory: Path, name: str, counts: dict[str, int], dtype: np.dtype) -> list[Damage]:
    """Check where the documents of one split start and end."""
    tokens_file, documents_file = (f"{name}.{part}" for part in SPLIT_PARTS)
    for file, count in (
        (tokens_file, counts["tokens"] * dtype.itemsize),
        (documents_file, counts["documents"] * 8),
    ):
        size = (directory / file).stat().st_size
        if size != count or not count:
            return [Damage(file, f"has {size:,} bytes, and the index counts {count:,}")]
    starts = np.memmap(directory / documents_file, dtype="<i8", mode="r")
    tokens = np.memmap(directory / tokens_file, dtype=dtype, mode="r")
    if starts[0] != 0:
        return [Damage(documents_file, f"begins with {starts[0]}; the first document starts at token 0", 0)]
    for wrong, what in (
        (np.diff(starts, prepend=-1) <= 0, "does not start after the one before it"),
        (starts >= len(tokens), "starts after the last token"),
    ):
        if wrong.any():
            place = int(np.argmax(wrong))
            return [Damage(documents_file, f"document {place:,} {what}", place * 8)]
    eos_id = _end_token(directory)
    ends = np.append(starts[1:], len(tokens)) - 1
    if eos_id is not None and (wrong := tokens[ends] != eos_id).any():
        place = int(np.argmax(wrong))
        what = f"document {place:,} does not end with the end-of-text token ({eos_id})"
        return [Damage(tokens_file, what, int(ends[place]) * dtype.itemsize)]
    return []


def _end_token(directory: Path) -> int | None:
    """Return the id that ends documents; None if its file is damaged, which its hash has told."""
    try:
        return int(json.loads((directory / "tokenizer" / META_FILE).read_text(encoding="utf-8"))["eos_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _chunks(file: Path) -> Iterator[bytes]:
    with open(file, "rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            yield chunk


def _in_words(error: Exception) -> str:
    return (isinstance(error, OSError) and error.strerror) or f"{type(error).__name__}: {error}"
