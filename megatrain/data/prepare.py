"""From a data config to tokens: list, hash, split, train the tokenizer, encode, and cache the result.

The held-out split is chosen by a hash of each document's text, so that it does not depend on names or order
and equal documents fall on one side. When that leaves one side empty (one document, or few), the tail of the
longest document is held out instead: its last `val_fraction`, from the next line start on.
"""

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from megatrain.config.errors import UserError
from megatrain.data.config import DataConfig
from megatrain.data.store import (
    FORMAT_VERSION,
    SplitWriter,
    SyntheticStore,
    TokenStore,
    build_once,
    cache_root,
    open_split,
    read_index,
    write_index,
)
from megatrain.data.text import TEXT_HINT, Corpus, find_corpus
from megatrain.data.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    load_tokenizer,
    read_tokenizer,
    tokenizer_files,
    train_bpe,
)

Progress = Callable[[str, float], None]
"""Progress callback: the name of a phase and its completed fraction, 0 to 1."""

RECIPE_VERSION = 1  # part of every cache key: increment it when the same input would give other tokens
PIECE_CHARS = 1 << 20  # longer documents are encoded in pieces: work for all cores, and bounded memory
BATCH_CHARS = 8 << 20
TRAIN_CHARS = 128 << 20  # a tokenizer is trained on at most about this much text, spread over the corpus


@dataclass(frozen=True, slots=True)
class Contents:
    """What was read to make the tokens."""

    origin: str
    files: int | None
    """None in a cache of an earlier version, which doesn't count them."""
    documents: int
    train_tokens: int
    val_tokens: int
    text_bytes: int
    """Size of the text in UTF-8 bytes, both splits together."""
    left_out: dict[str, int]
    """What was not read, and how many of each: kind (`empty`, `binary`, ...) -> number."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """Tokenized data, ready to be read.

    `token_bytes` `(vocab_size,)`: bytes of text per token id; all 0 for synthetic data.
    """

    train: TokenStore | SyntheticStore
    val: TokenStore | SyntheticStore | None
    tokenizer: Tokenizer
    fingerprint: str
    token_bytes: np.ndarray
    contents: Contents | None
    """None for synthetic data."""
    directory: Path | None = None
    """The token cache; None for synthetic data."""


class Piece(NamedTuple):
    """A piece of a document and the split that it belongs to."""

    split: str
    text: str
    ends_document: bool


@dataclass(frozen=True, slots=True)
class Survey:
    """Results of one pass over the corpus.

    `tail_document` is the index of the document whose tail is held out, None if full documents are. `skipped` counts
    excluded documents by reason.
    """

    chars: int
    documents: int
    tail_document: int | None
    skipped: dict[str, int]


def prepare(cfg: DataConfig, *, progress: Progress, vocab_size: int | None = None) -> Prepared:
    """Return the tokens of `cfg`, from the cache if they are there.

    `vocab_size` is the model's: synthetic tokens are drawn from it, and a larger tokenizer is refused.

    Raises:
        UserError: the input, the tokenizer or the cache directory is unusable.
    """
    if cfg.kind == "synthetic":
        assert vocab_size is not None, "synthetic tokens are drawn from the model's vocabulary"
        return _synthetic(cfg, vocab_size)
    corpus = find_corpus(cfg.path, text_field=cfg.text_field)
    root = cache_root(cfg.cache_dir)
    shortcut = root / "shortcuts" / _key(cfg, corpus.stamp(), _stamp(tokenizer_files(cfg.tokenizer)))
    directory = _follow(shortcut, root)
    if directory is None:
        is_settled = corpus.is_settled()
        directory = _find_or_build(cfg, corpus, root, progress)
        if is_settled:
            _write_shortcut(shortcut, directory)
    return _open(directory, corpus.origin, vocab_size)


def held_out(text: str, val_fraction: float) -> bool:
    """Return whether the document `text` belongs to the validation split."""
    digest = hashlib.sha256(text.encode()).digest()
    return int.from_bytes(digest[:8], "big") < val_fraction * 2.0**64


def _synthetic(cfg: DataConfig, vocab_size: int) -> Prepared:
    train = SyntheticStore(vocab_size)
    return Prepared(
        train=train,
        val=SyntheticStore(vocab_size, seed=1) if cfg.val_fraction else None,
        tokenizer=ByteTokenizer(),
        fingerprint=train.fingerprint,
        token_bytes=np.zeros(vocab_size, dtype=np.int64),
        contents=None,
    )


def _find_or_build(cfg: DataConfig, corpus: Corpus, root: Path, progress: Progress) -> Path:
    progress("reading", 0.0)
    contents = [_content_digest(file) for file in tokenizer_files(cfg.tokenizer)]
    directory = root / _key(cfg, corpus.content_digest(), contents)
    build_once(
        directory,
        lambda unfinished: _build(cfg, corpus, unfinished, progress),
        waiting=lambda: progress("waiting for another process that prepares the same data", 0.0),
    )
    return directory


def _open(directory: Path, origin: str, vocab_size: int | None) -> Prepared:
    index = read_index(directory)
    if index is None:
        raise UserError(f"the token cache {directory} was removed or damaged while in use; start again")
    tokenizer = load_tokenizer(directory / "tokenizer")
    if vocab_size is not None and tokenizer.vocab_size > vocab_size:
        raise UserError(
            f"model.vocab_size={vocab_size}: must be at least the tokenizer's {tokenizer.vocab_size} tokens"
        )
    train = open_split(directory, "train", index)
    assert train is not None
    return Prepared(
        train=train,
        val=open_split(directory, "val", index),
        tokenizer=tokenizer,
        fingerprint=index["fingerprint"],
        token_bytes=np.load(directory / "token_bytes.npy"),
        contents=_contents(index, origin),
        directory=directory,
    )


def _contents(index: dict[str, Any], origin: str) -> Contents:
    """Return what the index says; equal texts share a cache, so it doesn't know where these come from."""
    train = index["splits"]["train"]
    val = index["splits"].get("val", {"tokens": 0, "documents": 0, "text_bytes": 0})
    return Contents(
        origin=origin,
        files=index.get("files_read"),
        documents=index.get("documents_read", train["documents"] + val["documents"]),
        train_tokens=train["tokens"],
        val_tokens=val["tokens"],
        text_bytes=train["text_bytes"] + val["text_bytes"],
        left_out=index["skipped"],
    )


def _build(cfg: DataConfig, corpus: Corpus, directory: Path, progress: Progress) -> None:
    survey = _survey(corpus, cfg.val_fraction, progress)
    pieces = partial(_pieces, corpus, cfg.val_fraction, survey)
    if cfg.tokenizer.kind == "bpe":
        sample = _training_sample(pieces(), survey, progress)
        assert cfg.tokenizer.vocab_size != "auto"
        tokenizer: Tokenizer = train_bpe(sample, vocab_size=cfg.tokenizer.vocab_size)
    else:
        tokenizer = read_tokenizer(cfg.tokenizer)
    splits = _encode(
        pieces(), tokenizer, directory, progress=lambda n: progress("tokenizing", n / survey.chars)
    )
    train_tokens = splits["train"]["tokens"] - splits["train"]["documents"]
    if train_tokens < 2:
        raise UserError(
            f"{corpus.origin} has too little text: {train_tokens} training tokens, but at least 2 are needed"
        )
    if find_corpus(cfg.path, text_field=cfg.text_field).stamp() != corpus.stamp():
        raise UserError(f"{corpus.origin} was modified while it was being read; start again")
    tokenizer.save(directory / "tokenizer")
    np.save(directory / "token_bytes.npy", tokenizer.token_bytes())
    write_index(
        directory,
        splits=splits,
        tokenizer_digest=tokenizer.digest(),
        metadata={
            "origin": corpus.origin,
            "vocab_size": tokenizer.vocab_size,
            "files_read": len(corpus.files),
            "documents_read": survey.documents,
            "skipped": survey.skipped,
        },
    )


def _encode(
    pieces: Iterator[Piece], tokenizer: Tokenizer, directory: Path, *, progress: Callable[[int], None]
) -> dict[str, dict[str, int]]:
    """Write the tokens of `pieces` and return the counts of each split.

    A validation split of a single token is dropped, since it has no target.
    """
    sizes = {"vocab_size": tokenizer.vocab_size, "eos_id": tokenizer.eos_id}
    chars = 0
    with SplitWriter(directory, "train", **sizes) as train, SplitWriter(directory, "val", **sizes) as val:
        for batch in _batches(pieces):
            progress(chars)
            for piece, ids in zip(batch, tokenizer.encode_batch([p.text for p in batch]), strict=True):
                writer = val if piece.split == "val" else train
                writer.append(ids, text_bytes=len(piece.text.encode()), ends_document=piece.ends_document)
                chars += len(piece.text)
    progress(chars)
    splits = {"train": train.counts(), "val": val.counts()}
    if splits["val"]["tokens"] - splits["val"]["documents"] < 2:
        del splits["val"]
        val.discard()
    return splits


def _survey(corpus: Corpus, val_fraction: float, progress: Progress) -> Survey:
    """Measure the text in one pass over all documents, and detect whether the hash leaves a split empty."""
    skipped: Counter[str] = Counter()
    chars = documents = held = longest = longest_chars = 0
    expected_bytes = max(1, sum(f.size for f in corpus.files))
    for document in corpus.documents(skipped):
        if len(document.text) > longest_chars:
            longest, longest_chars = documents, len(document.text)
        chars += len(document.text)
        documents += 1
        held += held_out(document.text, val_fraction)
        progress("reading", min(1.0, chars / expected_bytes))
    if not documents:
        left_out = ", ".join(f"{count} {reason}" for reason, count in skipped.items()) or "none"
        raise UserError(f"{corpus.origin} contains no text (excluded: {left_out}). {TEXT_HINT}")
    progress("reading", 1.0)
    one_side_empty = val_fraction > 0 and held in (0, documents)
    return Survey(chars, documents, longest if one_side_empty else None, dict(skipped))


def _pieces(corpus: Corpus, val_fraction: float, survey: Survey) -> Iterator[Piece]:
    """Yield all text, document by document, in pieces of at most PIECE_CHARS marked with their split."""
    for number, document in enumerate(corpus.documents()):
        if survey.tail_document is None:
            parts = [("val" if held_out(document.text, val_fraction) else "train", document.text)]
        elif number == survey.tail_document:
            cut = _tail_start(document.text, val_fraction)
            parts = [("train", document.text[:cut]), ("val", document.text[cut:])]
        else:
            parts = [("train", document.text)]
        for split, text in parts:
            for start in range(0, len(text), PIECE_CHARS):
                end = start + PIECE_CHARS
                yield Piece(split, text[start:end], ends_document=end >= len(text))


def _tail_start(text: str, val_fraction: float) -> int:
    """Return the index at which the held-out tail of a document starts: the next line start, if one is near."""
    cut = len(text) - int(len(text) * val_fraction)
    line = text.find("\n", cut - 1) + 1
    return line if 0 < line <= (cut + len(text)) // 2 else cut


def _training_sample(pieces: Iterator[Piece], survey: Survey, progress: Progress) -> Iterator[str]:
    """Yield training text for a tokenizer: all of it, or pieces spread evenly over it."""
    share = min(1.0, TRAIN_CHARS / survey.chars)
    seen = taken = 0
    for piece in pieces:
        seen += len(piece.text)
        progress("training the tokenizer", min(1.0, seen / survey.chars))
        if piece.split == "train" and taken <= seen * share:
            taken += len(piece.text)
            yield piece.text


def _batches(pieces: Iterator[Piece]) -> Iterator[list[Piece]]:
    """Yield pieces in groups of about BATCH_CHARS characters."""
    batch: list[Piece] = []
    chars = 0
    for piece in pieces:
        batch.append(piece)
        chars += len(piece.text)
        if chars >= BATCH_CHARS:
            yield batch
            batch, chars = [], 0
    if batch:
        yield batch


def _key(cfg: DataConfig, content: object, tokenizer_content: object) -> str:
    """Return the name of a cache entry: a digest of everything that determines its bytes."""
    tokenizer = cfg.tokenizer
    bpe_size = tokenizer.vocab_size if tokenizer.kind == "bpe" else None
    recipe = [RECIPE_VERSION, FORMAT_VERSION, cfg.path is None, cfg.text_field, cfg.val_fraction]
    parts = [*recipe, tokenizer.kind, bpe_size, content, tokenizer_content]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def _stamp(files: list[Path]) -> list[tuple[str, int, int, int]]:
    """Return names, sizes and times of `files`; equal stamps mean equal content."""
    stats = [(str(file.absolute()), file.stat()) for file in files]
    return [(name, s.st_size, s.st_mtime_ns, s.st_ctime_ns) for name, s in stats]


def _content_digest(file: Path) -> str:
    try:
        return hashlib.sha256(file.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror}") from None


def _follow(shortcut: Path, root: Path) -> Path | None:
    """Return the data set that the same file listing led to last time, if it is still complete."""
    try:
        directory = root / shortcut.read_text(encoding="utf-8").strip()
    except (OSError, ValueError):
        return None
    return directory if read_index(directory) is not None else None


def _write_shortcut(shortcut: Path, directory: Path) -> None:
    """Record which data set a file listing led to. A failure is harmless: hashing the content finds it too."""
    unfinished = shortcut.with_name(f"{shortcut.name}.{os.getpid()}")
    with suppress(OSError):
        shortcut.parent.mkdir(parents=True, exist_ok=True)
        unfinished.write_text(directory.name, encoding="utf-8")
        unfinished.replace(shortcut)
