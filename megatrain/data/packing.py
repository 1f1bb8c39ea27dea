"""Packing of whole examples into samples: none is cut, and what is left of a sample is padding without a loss.

Best fit, the longest first (Ding et al., arXiv 2404.10830): each example goes into the sample with the least room that
still holds it. The result is a pure function of the examples' lengths and of the sample's.
"""

import hashlib
import json
from bisect import bisect_left, insort
from dataclasses import dataclass
from itertools import islice
from typing import Protocol

import numpy as np

from megatrain.config.errors import UserError
from megatrain.data.store import TokenSource, TokenStore

IGNORED = -100
"""Target value of positions without a loss, as in torch's cross entropy."""
SHOWN = 3


class ExampleSource(TokenSource, Protocol):
    """A stream of examples, of whose tokens some have no loss."""

    def targets(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Return the targets of the first `length` tokens from each of `starts`, `(rows, length)` int64.

        -100 where there is no loss. That of a token is the next one, or of a labelled document's last token its label.
        """
        ...

    def examples_of(self, start: int, length: int) -> list[int]:
        """Return the numbers, in the data, of the examples among tokens [start, start + length)."""
        ...


@dataclass(frozen=True, slots=True, eq=False)
class PackedExamples:
    """The examples of `store` as a stream in which token `row * seq_len` begins sample number `row`.

    An `ExampleSource`. Examples that are longer than a sample are not in it.
    """

    store: TokenStore
    seq_len: int
    order: np.ndarray
    """`(examples,)` numbers of the examples in the store, in the order of the stream."""
    places: np.ndarray
    """`(examples,)` token of the stream at which each of `order` begins."""
    document_starts: np.ndarray
    """Where the stream's documents begin: examples, and the padding of each sample that has some."""
    n_rows: int
    lengths: np.ndarray
    """`(documents,)` tokens of each example in the store."""
    how: str = "packed"
    """How, as a part of the fingerprint."""

    @property
    def n_tokens(self) -> int:
        return self.n_rows * self.seq_len + 1  # a sample reads one token more than it has, which has no loss

    @property
    def fingerprint(self) -> str:
        return hashlib.sha256(f"{self.how} {self.seq_len} {self.store.fingerprint}".encode()).hexdigest()

    def read(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Do as `TokenSource.read`; padding is token 0."""
        return self._filled(starts, length, answers=False)

    def targets(self, starts: np.ndarray, length: int) -> np.ndarray:
        """Do as `ExampleSource.targets`."""
        if self.store.labels is not None:
            return self._labels(starts, length)
        has_loss = self._filled(starts, length + 1, answers=True)[:, 1:]
        tokens = self._filled(starts, length + 1, answers=False)[:, 1:].astype(np.int64)
        return np.where(has_loss, tokens, IGNORED)

    def _labels(self, starts: np.ndarray, length: int) -> np.ndarray:
        found = np.full((len(starts), length), IGNORED, dtype=np.int64)
        for row, start in zip(found, starts.tolist(), strict=True):
            first, last = np.searchsorted(self.places, [start, start + length])
            numbers = self.order[first:last]
            ends = self.places[first:last] + self.lengths[numbers] - 1 - start
            labels = np.asarray(self.store.labels)[numbers]
            row[ends[ends < length]] = labels[ends < length]
        return found

    def examples_of(self, start: int, length: int) -> list[int]:
        """Do as `ExampleSource.examples_of`."""
        first, last = np.searchsorted(self.places, [start, start + length])
        found: list[int] = self.order[first:last].tolist()
        return found

    def left_out(self) -> np.ndarray:
        """Return the numbers of the examples that are longer than a sample, alone or with those of their pair."""
        return np.flatnonzero(_together(self.lengths, self.store.together) > self.seq_len)

    def _filled(self, starts: np.ndarray, length: int, *, answers: bool) -> np.ndarray:
        """Put what the store has of examples at their places; only those that begin in a row or before its end."""
        source = self.store
        rows = np.zeros((len(starts), length), dtype=np.bool_ if answers else source.tokens.dtype)
        for row, start in zip(rows, starts.tolist(), strict=True):
            first, last = np.searchsorted(self.places, [start, start + length])
            for number, place in zip(
                self.order[first:last].tolist(), self.places[first:last].tolist(), strict=True
            ):
                begin = int(source.document_starts[number])
                size = min(_end(source, number) - begin, start + length - place)
                if answers:
                    assert source.answers is not None
                    values = source.answers[begin : begin + size]
                else:
                    values = source.read(np.array([begin]), size)[0]
                row[place - start : place - start + size] = values
        return rows


def pack(store: TokenStore, *, seq_len: int, alone: bool = False) -> PackedExamples:
    """Pack the examples of `store` into samples of `seq_len` tokens, those that stay together as one.

    Args:
        alone: give each example a sample of its own.

    Raises:
        UserError: all examples are longer.
    """
    lengths, together = lengths_of(store), store.together
    sums = _together(lengths, together)[::together]
    fitting = np.flatnonzero(sums <= seq_len)
    if not len(fitting):
        raise UserError(
            f"seq_len={seq_len}: shorter than every example; the shortest has {int(sums.min())} tokens"
        )
    if alone:
        chosen, rows = fitting, np.arange(len(fitting))
    else:
        chosen, rows = _best_fit(fitting[np.argsort(-sums[fitting], kind="stable")], sums, seq_len)
    order = (chosen[:, None] * together + np.arange(together)).ravel()
    rows = np.repeat(rows, together)
    sizes = lengths[order]
    ends = np.cumsum(sizes)
    firsts = np.flatnonzero(np.diff(rows, prepend=-1))  # the first example of each sample
    before = np.repeat(ends[firsts] - sizes[firsts], np.diff(firsts, append=len(rows)))
    places = rows * seq_len + ends - sizes - before
    used = places + sizes  # where each example ends; the last one of a sample begins the padding
    lasts = np.append(firsts[1:], len(rows)) - 1
    padding = used[lasts][used[lasts] < (rows[lasts] + 1) * seq_len]
    starts = np.sort(np.concatenate([places, padding, [(rows[-1] + 1) * seq_len]]))
    how = "alone" if alone else "packed"
    return PackedExamples(store, seq_len, order, places, starts, int(rows[-1]) + 1, lengths, how)


def _together(lengths: np.ndarray, together: int) -> np.ndarray:
    """Return for each example the tokens of all that stay together with it."""
    return lengths if together == 1 else np.repeat(lengths.reshape(-1, together).sum(1), together)


def _best_fit(longest_first: np.ndarray, lengths: np.ndarray, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the examples in the order of samples, and the sample of each."""
    open_rows: list[list[int]] = [[] for _ in range(seq_len + 1)]  # by the room that they have
    rooms: list[int] = []  # those that some row has, ascending
    row_of = np.empty(len(longest_first), dtype=np.int64)
    n_rows = 0
    for place, length in enumerate(lengths[longest_first].tolist()):
        at = bisect_left(rooms, length)
        if at < len(rooms):
            room = rooms[at]
            row = open_rows[room].pop()
            if not open_rows[room]:
                del rooms[at]
        else:
            room, row, n_rows = seq_len, n_rows, n_rows + 1
        row_of[place] = row
        if left := room - length:
            if not open_rows[left]:
                insort(rooms, left)
            open_rows[left].append(row)
    by_row = np.argsort(row_of, kind="stable")
    return longest_first[by_row], row_of[by_row]


def too_long(packed: PackedExamples) -> str:
    """Say which examples are left out since they are longer than a sample; empty if none is."""
    numbers = packed.left_out()
    if not len(numbers):
        return ""
    wanted = set(numbers[:SHOWN].tolist())
    names = []
    if packed.store.rows is not None:
        with open(packed.store.rows, encoding="utf-8") as lines:
            names = [json.loads(line) for n, line in enumerate(islice(lines, max(wanted) + 1)) if n in wanted]
    longest = int(_together(packed.lengths, packed.store.together).max())
    more = ", ..." if len(numbers) > SHOWN else ""
    return (
        f"{len(numbers):,} example{'s' * (len(numbers) > 1)} of more than seq_len={packed.seq_len} tokens (the longest "
        f"has {longest:,}): {', '.join(names)}{more}"
    )


def lengths_of(store: TokenStore) -> np.ndarray:
    """Return the tokens of each document, `(documents,)`."""
    return np.diff(store.document_starts, append=store.n_tokens)


def _end(store: TokenStore, number: int) -> int:
    starts = store.document_starts
    return int(starts[number + 1]) if number + 1 < len(starts) else store.n_tokens
