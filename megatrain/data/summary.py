"""What a token cache contains, in figures: documents, tokens, lengths, bytes per token, and what was left out."""

import json
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from megatrain.config.errors import UserError
from megatrain.data.order import sample_ids
from megatrain.data.packing import pack
from megatrain.data.store import TokenStore, open_split, read_index
from megatrain.data.tokenizer import META_FILE
from megatrain.data.tokenizer_files import load_tokenizer

MOST_BARS = 12


@dataclass(frozen=True, slots=True)
class Lengths:
    """Lengths of documents in tokens, each with its end-of-text token."""

    min: int
    median: int
    p90: int
    """Nine of ten documents are at most this long."""
    max: int
    longest: int
    """Number of the longest document."""
    histogram: tuple[tuple[int, int, int], ...]
    """Rows of (shortest, longest, number of documents); the widths grow by a constant factor."""


@dataclass(frozen=True, slots=True)
class SplitSummary:
    """Figures of one split."""

    documents: int
    tokens: int
    text_bytes: int
    bytes_per_token: float
    """Bytes of text per token, end-of-text tokens not counted."""
    lengths: Lengths


@dataclass(frozen=True, slots=True)
class Summary:
    """Figures of a token cache. `splits` has `train`, and `val` if anything is held out."""

    directory: str
    origin: str
    tokenizer: str
    vocab_size: int
    files: int | None
    left_out: list[dict[str, Any]]
    """What was not read, by reason (`LeftOut.as_json`)."""
    splits: dict[str, SplitSummary]
    made_from: dict[str, Any] | None
    """Files with their hashes, and how text became tokens, as the index says; None in caches of earlier versions."""


def summarize(directory: Path) -> Summary:
    """Return the figures of the cache `directory`.

    Raises:
        UserError: it is missing or incomplete.
    """
    index = _index(directory)
    splits = {}
    for name in index["splits"]:
        store = open_split(directory, name, index)
        assert store is not None
        splits[name] = _split_summary(store)
    return Summary(
        directory=str(directory),
        origin=index["origin"],
        tokenizer=json.loads((directory / "tokenizer" / META_FILE).read_text(encoding="utf-8"))["kind"],
        vocab_size=index["vocab_size"],
        files=index.get("files_read"),
        left_out=index["left_out"],
        splits=splits,
        made_from=index.get("made_from"),
    )


def document_texts(directory: Path, count: int, *, most_tokens: int) -> list[tuple[int, int, str]]:
    """Return (number, length in tokens, beginning) of `count` documents, spread evenly over the training split.

    Raises:
        UserError: the cache is missing or incomplete.
    """
    store, tokenizer = _train_split(directory), load_tokenizer(directory / "tokenizer")
    starts = store.document_starts
    count = min(count, len(starts))
    found = []
    for number in (np.arange(count) * len(starts) // max(count, 1)).tolist():
        begin, end = int(starts[number]), _end(store, number)
        ids = store.tokens[begin : min(end, begin + most_tokens)].tolist()
        found.append((number, end - begin, tokenizer.decode(ids)))
    return found


def first_sample(directory: Path, *, seq_len: int, seed: int) -> list[str]:
    """Return the text of the first sample that a run with this `seed` trains on, a part for each document in it.

    Raises:
        UserError: the cache is missing or incomplete, or shorter than a sample.
    """
    store, tokenizer = _train_split(directory), load_tokenizer(directory / "tokenizer")
    if store.is_of_examples:
        packed = pack(store, seq_len=seq_len)
        ids = sample_ids(0, 1, n=packed.n_rows, seed=seed, fingerprint=packed.fingerprint)
        numbers = packed.examples_of(int(ids[0]) * seq_len, seq_len)
        return [
            tokenizer.decode(store.tokens[store.document_starts[n] : _end(store, n)].tolist())
            for n in numbers
        ]
    n_samples = (store.n_tokens - 1) // seq_len
    if n_samples < 1:
        raise UserError(
            f"seq_len={seq_len}: longer than the training data, which has {store.n_tokens} tokens; the largest legal "
            f"seq_len is {store.n_tokens - 1}"
        )
    begin = int(sample_ids(0, 1, n=n_samples, seed=seed, fingerprint=store.fingerprint)[0]) * seq_len
    first, last = np.searchsorted(store.document_starts, [begin, begin + seq_len], side="left")
    cuts = [
        begin,
        *(int(start) for start in store.document_starts[first:last] if start > begin),
        begin + seq_len,
    ]
    return [tokenizer.decode(store.tokens[a:b].tolist()) for a, b in pairwise(cuts)]


def _train_split(directory: Path) -> TokenStore:
    store = open_split(directory, "train", _index(directory))
    assert store is not None
    return store


def _index(directory: Path) -> dict[str, Any]:
    index = read_index(directory)
    if index is None:
        raise UserError(
            f"the token cache {directory} is incomplete, or of another version; "
            f"`megatrain data verify {directory.name}` says what is wrong, and `megatrain data prepare` builds it again"
        )
    return index


def _end(store: TokenStore, number: int) -> int:
    """Return the token after the last one of document `number`."""
    starts = store.document_starts
    return int(starts[number + 1]) if number + 1 < len(starts) else store.n_tokens


def _split_summary(store: TokenStore) -> SplitSummary:
    lengths = np.diff(store.document_starts, append=store.n_tokens)
    of_text = store.n_tokens - len(lengths)
    return SplitSummary(
        documents=len(lengths),
        tokens=store.n_tokens,
        text_bytes=store.text_bytes,
        bytes_per_token=store.text_bytes / max(of_text, 1),
        lengths=Lengths(
            min=int(lengths.min()),
            median=int(np.quantile(lengths, 0.5, method="lower")),
            p90=int(np.quantile(lengths, 0.9, method="lower")),
            max=int(lengths.max()),
            longest=int(lengths.argmax()),
            histogram=_histogram(lengths),
        ),
    )


def _histogram(lengths: np.ndarray) -> tuple[tuple[int, int, int], ...]:
    """Count lengths in ranges whose bounds are powers of two, or of four and so on where those would be too many."""
    powers = np.frexp(lengths)[1] - 1  # the power of two at or below each length
    low, high = int(powers.min()), int(powers.max())
    step = -(-(high - low + 1) // MOST_BARS)
    rows = []
    for power in range(low, high + 1, step):
        count = int(((powers >= power) & (powers < power + step)).sum())
        rows.append((2**power, 2 ** (power + step) - 1, count))
    return tuple(rows)
