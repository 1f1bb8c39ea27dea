"""Duplicates in a corpus: exact ones by a hash, similar ones by MinHash and locality-sensitive hashing.

A document's fingerprint is made where the document is read, in any process; `find_duplicates` sees all fingerprints at
once. It needs about 50 bytes per document beside them (an exact copy is 16 bytes of fingerprint, `near_duplicates`
another 4 x num_perm), and does not depend on how the fingerprints were made.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from megatrain.data.clean.config import CleanStep, CorpusStep, ExactDuplicatesStep, NearDuplicatesStep
from megatrain.data.clean.packages import library
from megatrain.data.clean.words import MULTIPLIER, WordHashes, ngram_hashes, words_of

DIGEST_BYTES = 16
SEED = 1
"""Seed of the hash functions."""
RECALL = 0.99
"""Probability with which two documents exactly as similar as the threshold are compared at all."""
MAX_ROUNDS = 64
"""Documents of one bucket that others are compared with. Only thousands of documents that are alike in a few places,
but not duplicates, fill a bucket so; the rest of such a bucket stays."""
BLOCK = 1 << 16
"""Pairs compared at a time, which bounds the memory."""


@dataclass(frozen=True, slots=True)
class Removed:
    """Removed documents in ascending order: `documents`, the index of the step that removed each (`steps`), and the
    document that is kept in its place (`kept`); each (removed,) int64. `seen` is the number of documents before each
    corpus step, by the step's index."""

    documents: np.ndarray
    steps: np.ndarray
    kept: np.ndarray
    seen: dict[int, int]


class Fingerprinter:
    """Fingerprints of documents for the corpus steps among `steps`."""

    def __init__(self, steps: tuple[CleanStep, ...], hashes: WordHashes) -> None:
        """Import rensa if a step needs it.

        Raises:
            UserError: it is not installed.
        """
        self.steps = [step for step in steps if isinstance(step, CorpusStep)]
        self.hashes = hashes
        self.minhash = minhasher() if any(isinstance(step, NearDuplicatesStep) for step in steps) else None

    def __call__(self, text: str) -> bytes:
        """Return the fingerprint of `text`, `width(steps)` bytes."""
        return b"".join(self._of_step(step, text) for step in self.steps)

    def _of_step(self, step: CorpusStep, text: str) -> bytes:
        if isinstance(step, ExactDuplicatesStep):
            return hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest()[:DIGEST_BYTES]
        assert self.minhash is not None
        words = self.hashes.of(words_of(text) or [text])
        return self.minhash(ngram_hashes(words, min(step.ngram, len(words))), step.num_perm).tobytes()


def minhasher() -> Callable[[np.ndarray, int], np.ndarray]:
    """Return the function that makes the MinHash signature, (num_perm,) uint32, of 64-bit hashes, (hashes,) uint64.

    Raises:
        UserError: rensa is not installed.
    """
    with library("rensa", "near_duplicates"):
        from rensa import RMinHash

    def signature(hashes: np.ndarray, num_perm: int) -> np.ndarray:
        table = RMinHash.digest_matrix_from_flat_token_hashes(hashes, [0, len(hashes)], num_perm, SEED)
        return np.array(table.to_rows()[0], "<u4")

    return signature


def width(steps: tuple[CleanStep, ...]) -> int:
    """Return the size of a fingerprint in bytes."""
    return sum(_width(step) for step in steps if isinstance(step, CorpusStep))


def bands_and_rows(num_perm: int, threshold: float) -> tuple[int, int]:
    """Return how a signature is cut for locality-sensitive hashing: number of bands, and values per band.

    Documents of similarity s agree in some band with probability 1 - (1 - s^rows)^bands (Leskovec et al., Mining of
    Massive Datasets, section 3.4). Rows are as many as keep it above `RECALL` at the threshold.
    """
    rows = 1
    while rows < num_perm and 1 - (1 - threshold ** (rows + 1)) ** (num_perm // (rows + 1)) >= RECALL:
        rows += 1
    return num_perm // rows, rows


def find_duplicates(fingerprints: np.ndarray, steps: tuple[CleanStep, ...]) -> Removed:
    """Return the documents that the corpus steps remove; the first of each group of duplicates is kept.

    Groups are closed: if the second is a duplicate of the first, and the third of the second, all three are one group.

    Args:
        fingerprints: (documents, width(steps)) uint8, in the order of the documents; may be memory-mapped.
    """
    documents = len(fingerprints)
    keeper, removed_by = np.arange(documents), np.full(documents, -1)
    seen: dict[int, int] = {}
    offset = 0
    for index, step in enumerate(steps):
        if not isinstance(step, CorpusStep):
            continue
        left = np.flatnonzero(removed_by < 0)
        seen[index] = len(left)
        columns = fingerprints[:, offset : offset + _width(step)]
        offset += _width(step)
        if isinstance(step, ExactDuplicatesStep):
            first = _first_equal(np.ascontiguousarray(columns).view(np.uint64)[left])
        else:
            first = _first_similar(columns.view(np.uint32), left, step)
        gone = first != np.arange(len(left))
        removed_by[left[gone]] = index
        keeper[left[gone]] = left[first[gone]]
    removed = np.flatnonzero(removed_by >= 0)
    for _ in seen:  # a copy's original may itself have been removed, by a later step
        keeper[removed] = keeper[keeper[removed]]
    return Removed(removed, removed_by[removed], keeper[removed], seen)


def _width(step: CorpusStep) -> int:
    return DIGEST_BYTES if isinstance(step, ExactDuplicatesStep) else 4 * step.num_perm


def _first_equal(keys: np.ndarray) -> np.ndarray:
    """Return for each row of `keys`, (documents, 2) uint64, the index of the first equal row."""
    order = np.lexsort((keys[:, 1], keys[:, 0]))  # stable: equal rows stay in their order
    ordered = keys[order]
    is_start = np.concatenate([[True], (ordered[1:] != ordered[:-1]).any(axis=1)])[: len(keys)]
    starts = np.maximum.accumulate(np.where(is_start, np.arange(len(keys)), 0))
    first = np.empty_like(order)
    first[order] = order[starts]
    return first


def _buckets(keys: np.ndarray) -> Iterator[np.ndarray]:
    """Yield the indices of equal `keys`, ascending, for each key that stands more than once."""
    order = np.argsort(keys, kind="stable")
    ordered = keys[order]
    ends = np.flatnonzero(np.concatenate([ordered[1:] != ordered[:-1], [True]])) + 1
    starts = np.concatenate([[0], ends[:-1]])
    several = ends - starts > 1
    for start, end in zip(starts[several], ends[several], strict=True):
        yield order[start:end]


def _first_similar(signatures: np.ndarray, left: np.ndarray, step: NearDuplicatesStep) -> np.ndarray:
    """Return for each of the documents `left` the index, in `left`, of the first document of its group."""
    bands, rows = bands_and_rows(step.num_perm, step.threshold)
    needed = step.threshold * step.num_perm - 1e-9
    parent = np.arange(len(left))
    for band in range(bands):
        keys = np.zeros(len(left), np.uint64)
        for row in range(rows):
            keys = keys * MULTIPLIER + signatures[left, band * rows + row]
        for members in _buckets(keys):
            _join_similar(parent, members, signatures, left, needed)
    while (parent != (above := parent[parent])).any():
        parent = above
    return parent


def _join_similar(
    parent: np.ndarray, members: np.ndarray, signatures: np.ndarray, left: np.ndarray, needed: float
) -> None:
    """Join the documents of one bucket with the first that they are similar to."""
    for _ in range(MAX_ROUNDS):
        if len(members) < 2:
            return
        first, others = members[0], members[1:]
        alike = np.concatenate(
            [
                (signatures[left[others[start : start + BLOCK]]] == signatures[left[first]]).sum(axis=1)
                >= needed
                for start in range(0, len(others), BLOCK)
            ]
        )
        for other in others[alike]:
            a, b = _root(parent, first), _root(parent, other)
            parent[max(a, b)] = min(a, b)
        members = others[~alike]


def _root(parent: np.ndarray, index: int) -> int:
    """Return the first document of the group of `index`, and shorten the way there."""
    root = index
    while parent[root] != root:
        root = parent[root]
    while parent[index] != root:
        parent[index], index = root, parent[index]
    return int(root)
