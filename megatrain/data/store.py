"""Tokens on disk, memory-mapped, and the cache directory that holds them.

A data set is a directory: `index.json` (sizes and hashes of all files, counts, fingerprint), for each split
`<split>.tokens` (uint16 or uint32, little-endian, documents one after the other, each ending with the
end-of-text token) and `<split>.documents` (int64, where each document starts), `token_bytes.npy` and
`tokenizer/`. It is written under a temporary name and renamed, so that a directory with its final name is
complete.
"""

import fcntl
import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, Protocol

import numpy as np

from megatrain.config.errors import StalledError, UserError
from megatrain.data.labels import LabelSet
from megatrain.data.order import keys_of, mix64
from megatrain.runtime.alive import WINDOW_S, signs_of_work
from megatrain.runtime.paths import cache_dir

INDEX_FILE = "index.json"
DAMAGED_FILE = "index.damaged.json"
"""The index of a data set in which a check found damage: nothing reads it any more, and it is built again."""
SOURCES_FILE = "sources.json"
"""What a data set was made from: path, name, size and SHA-256 of each file."""
FORMAT_VERSION = 1
SEAL = "sha256"
"""Entry of an index: the SHA-256 of all others."""
PATIENCE_S = 600.0
"""How long a process waits for another one that prepares the same data and stands still."""
POLL_S = 0.2
SPLIT_PARTS = ("tokens", "documents")
EXAMPLE_PARTS = ("answers", "rows")
"""Further files of a split of examples: uint8, 1 for each token that has a loss; the name of each example's row, a
line of JSON each."""
LABEL_PARTS = ("labels", "rows")
"""Further files of a split of labelled documents: int64, the label of each, or the bits of several; and the names."""


class UnfinishedError(UserError):
    """A data set could not be completed, and what is done of it is kept for the next attempt."""


class DamagedDataError(UserError):
    """A data set is not what it was when it was written."""


class TokenSource(Protocol):
    """A stream of `n_tokens` tokens. Document d starts at token `document_starts[d]`, the first one at 0."""

    @property
    def n_tokens(self) -> int: ...
    @property
    def fingerprint(self) -> str: ...
    @property
    def document_starts(self) -> np.ndarray: ...

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return tokens [start, start + length) for each of `starts` `(rows,)`, as `(rows, length)` integers."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class TokenStore:
    """One split of a data set on disk; `tokens` `(n_tokens,)` and `document_starts` `(documents,)` are memory maps."""

    tokens: np.ndarray
    document_starts: np.ndarray
    fingerprint: str
    text_bytes: int
    """Size of the text in UTF-8 bytes, without end-of-text tokens."""
    vocab_size: int | None = None
    """Tokens of the vocabulary; None: ids are not checked as they are read."""
    answers: np.ndarray | None = None
    """`(n_tokens,)` bool: which tokens of examples have a loss; None: the documents are no examples."""
    rows: Path | None = None
    """File with the name of each example's row."""
    labels: np.ndarray | None = None
    """`(documents,)` int64: the label of each, or the bits of several; None: they have none."""
    label_set: LabelSet | None = None
    """What the labels are."""
    together: int = 1
    """Adjacent documents that stay in one sample."""

    @property
    def n_tokens(self) -> int:
        return len(self.tokens)

    @property
    def is_of_examples(self) -> bool:
        """Whether only some tokens have a loss: answers, or the last ones of labelled documents."""
        return self.answers is not None or self.labels is not None

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Do as `TokenSource.read`.

        Raises:
            DamagedDataError: a token id is outside the vocabulary.
        """
        rows = np.empty((len(starts), length), dtype=self.tokens.dtype)
        tokens = self.tokens.view(np.ndarray)  # slices of a memory map itself take longer to make
        for row, start in zip(rows, starts.tolist(), strict=True):
            row[:] = tokens[start : start + length]
        if self.vocab_size is not None and rows.size and int(rows.max()) >= self.vocab_size:
            row, column = np.argwhere(rows >= self.vocab_size)[0]
            raise DamagedDataError(self._wrong_id(int(starts[row] + column), int(rows[row, column])))
        return rows

    def _wrong_id(self, place: int, found: int) -> str:
        document = int(np.searchsorted(self.document_starts, place, side="right")) - 1
        return (
            f"{file_of(self.tokens)}: token {place:,} (byte {place * self.tokens.dtype.itemsize:,}), in document "
            f"{document:,}, has the id {found:,}, and the vocabulary has {self.vocab_size:,} tokens"
        )


@dataclass(frozen=True, slots=True)
class SyntheticStore:
    """Random tokens, uniform in [0, vocab_size): a pure function of seed and position, without files."""

    vocab_size: int
    seed: int = 0
    n_tokens: int = 1 << 44
    documents: int = 1
    """Number of documents, of random lengths (fewer where two would start at the same token)."""

    @property
    def fingerprint(self) -> str:
        text = f"synthetic {self.vocab_size} {self.seed}" + f" {self.documents}" * (self.documents > 1)
        return hashlib.sha256(text.encode()).hexdigest()

    @property
    def document_starts(self) -> np.ndarray:
        starts = keys_of("synthetic documents", self.seed, count=self.documents) % np.uint64(self.n_tokens)
        starts[0] = 0
        return np.unique(starts.astype(np.int64))

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        key = keys_of("synthetic", self.seed, count=1)[0]
        places = starts.astype(np.uint64)[:, None] + np.arange(length, dtype=np.uint64)
        return (mix64(mix64(places + key)) % np.uint64(self.vocab_size)).astype(np.int64)


def file_of(mapped: np.ndarray) -> str:
    """Return the file that an array is a memory map of."""
    return str(getattr(mapped, "filename", None) or "the data")


def token_dtype(vocab_size: int) -> np.dtype:
    """Return the narrowest little-endian dtype for ids in [0, vocab_size)."""
    return np.dtype("<u2" if vocab_size <= 1 << 16 else "<u4")


def write_index(
    directory: Path, *, splits: dict[str, dict[str, int]], tokenizer_digest: str, metadata: dict[str, Any]
) -> None:
    """Complete the data set in `directory`: hash and flush every file, then write the index.

    The fingerprint covers the tokens and documents of all splits and the meaning of the token ids, and nothing else.
    `metadata` (JSON) is stored in the index.
    """
    files: dict[str, dict[str, Any]] = {}
    for path in sorted(p for p in directory.rglob("*") if p.is_file()):
        with open(path, "rb") as file:
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            os.fsync(file.fileno())
        files[path.relative_to(directory).as_posix()] = {"size": path.stat().st_size, "sha256": digest}
    index = {
        "version": FORMAT_VERSION,
        "fingerprint": _fingerprint(tokenizer_digest, splits, files),
        "splits": splits,
        "tokenizer_digest": tokenizer_digest,
        **metadata,
        "files": files,
    }
    with open(directory / INDEX_FILE, "w", encoding="utf-8") as text:
        json.dump(sealed(index), text, indent=1)
        text.flush()
        os.fsync(text.fileno())


def _fingerprint(tokenizer_digest: str, splits: dict[str, Any], files: dict[str, dict[str, Any]]) -> str:
    hashes = [files[f"{name}.{part}"]["sha256"] for name in sorted(splits) for part in SPLIT_PARTS]
    beside = [f"{name}.{part}" for name in sorted(splits) for part in ("answers", "labels")]
    hashes += [files[name]["sha256"] for name in beside if name in files]
    return hashlib.sha256(" ".join([tokenizer_digest, *hashes]).encode()).hexdigest()


def sealed(index: dict[str, Any]) -> dict[str, Any]:
    """Return `index` (JSON) with the SHA-256 of its other entries, by which an edit is noticed."""
    body = {key: value for key, value in index.items() if key != SEAL}
    return body | {SEAL: hashlib.sha256(json.dumps(body).encode()).hexdigest()}


def index_fault(index: dict[str, Any]) -> str | None:
    """Return what shows that an index was edited after it was written; None if nothing does.

    Raises:
        KeyError, TypeError or AttributeError: it lacks what an index has.
    """
    if index["fingerprint"] != _fingerprint(index["tokenizer_digest"], index["splits"], index["files"]):
        return "has a fingerprint that is not that of the files which it lists"
    if SEAL in index and index != sealed(index):  # caches of earlier versions have none
        return "was edited after it was written (SHA-256)"
    return None


def read_index(directory: Path) -> dict[str, Any] | None:
    """Read the index; return None if the data set is missing, or a file has the wrong size, or the index was edited."""
    try:
        index = json.loads((directory / INDEX_FILE).read_text(encoding="utf-8"))
        if index["version"] != FORMAT_VERSION:
            return None
        if index_fault(index) is not None:
            return None
        for name, expected in index["files"].items():
            if (directory / name).stat().st_size != expected["size"]:
                return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return index


def open_split(directory: Path, name: str, index: dict[str, Any]) -> TokenStore | None:
    """Map one split into memory; return None if the data set has none of this name."""
    counts = index["splits"].get(name)
    if counts is None:
        return None
    hashes = [index["files"][f"{name}.{part}"]["sha256"] for part in SPLIT_PARTS]
    answers, labels, rows = (f"{name}.{part}" for part in ("answers", "labels", "rows"))
    has_answers, has_labels = (each in index["files"] for each in (answers, labels))
    hashes += [index["files"][each]["sha256"] for each in (answers, labels) if each in index["files"]]
    return TokenStore(
        tokens=np.memmap(directory / f"{name}.tokens", dtype=token_dtype(index["vocab_size"]), mode="r"),
        document_starts=np.memmap(directory / f"{name}.documents", dtype="<i8", mode="r"),
        fingerprint=hashlib.sha256("".join(hashes).encode()).hexdigest(),
        text_bytes=counts["text_bytes"],
        vocab_size=index["vocab_size"],
        answers=np.memmap(directory / answers, dtype=np.bool_, mode="r") if has_answers else None,
        rows=directory / rows if has_answers or has_labels else None,
        labels=np.memmap(directory / labels, dtype="<i8", mode="r") if has_labels else None,
        label_set=LabelSet(tuple(index["labels"]), index["multi_label"]) if has_labels else None,
        together=index.get("together", 1),
    )


def cache_root(chosen: str | None) -> Path:
    """Return the directory of token caches: `chosen`, else $MEGATRAIN_CACHE, else ~/.cache/megatrain."""
    return Path(chosen).absolute() if chosen else cache_dir().absolute()


def build_once(
    directory: Path,
    build: Callable[[Path], None],
    *,
    waiting: Callable[[], None],
    patience_s: float = PATIENCE_S,
) -> None:
    """Make the data set `directory` with `build(temporary directory)`, unless another process just did.

    A lock, which is released when its process ends, admits one builder at a time; `waiting` is called before waiting
    for it, and whenever it gave a sign of work. What a killed builder left is there when the next one begins.

    Raises:
        UserError: the cache cannot be written.
        StalledError: the builder has stood still for `patience_s`.
    """
    root = directory.parent
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root / f".lock-{directory.name}", waiting, patience_s):
            if read_index(directory) is not None:
                return
            partial = root / f".partial-{directory.name}"
            partial.mkdir(exist_ok=True)
            try:
                build(partial)
            except UnfinishedError:
                raise
            except Exception:  # an interrupted builder goes on later, one that failed would fail again
                shutil.rmtree(partial, ignore_errors=True)
                raise
            if directory.exists():  # damaged
                shutil.rmtree(directory)
            partial.rename(directory)
            _sync_directory(root)
    except OSError as error:
        raise UserError(
            f"cannot write the token cache in {root}: {error.strerror or error}. Free some space, or choose "
            "another directory with data.cache_dir or $MEGATRAIN_CACHE."
        ) from None


@contextmanager
def _locked(path: Path, waiting: Callable[[], None], patience_s: float) -> Iterator[None]:
    """Hold an exclusive lock on the file `path`, whose time of change tells others that its holder is at work."""
    with open(path, "a") as file:
        changed, since = -1, time.monotonic()
        while not _took(file):
            if (now := os.fstat(file.fileno()).st_mtime_ns) != changed:
                waiting()
                changed, since = now, time.monotonic()
            elif time.monotonic() - since >= patience_s:
                raise StalledError(
                    f"Another process prepares the same data, holds {path}, and has stood still for {patience_s:g} s. "
                    "End it (`fuser` names it), and start again: what it has done is kept."
                )
            time.sleep(POLL_S)
        os.utime(file.fileno())
        with signs_of_work(lambda: os.utime(file.fileno()), window_s=min(WINDOW_S, patience_s / 4)):
            yield


def _took(file: IO[str]) -> bool:
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
