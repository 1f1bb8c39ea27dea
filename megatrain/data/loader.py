"""The data loader: which samples each rank reads in a step, and their tensors.

Sample i of a store is its tokens [i * seq_len, (i + 1) * seq_len]: `seq_len` inputs and, shifted by one, as many
targets. (Examples are packed into samples as wholes, `packing.py`.) Step s (counted from 0) takes `global_batch_size`
samples from number s * global_batch_size on, in the order of `order.py`; each rank reads only its own rows. The step is
the only state of the loader.
"""

import hashlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import cast

import numpy as np
import torch

from megatrain.config.errors import UserError
from megatrain.data.order import sample_ids
from megatrain.data.packing import IGNORED, ExampleSource
from megatrain.data.store import DamagedDataError, TokenSource, file_of

BLOCK_SAMPLES = 4096
"""Sample ids that are computed at a time, where an epoch has so many: those of few samples would take as long."""


@dataclass(frozen=True, slots=True)
class Batch:
    """One micro-batch: int64 tensors `(micro_batch, seq_len)`. A position with target -100 has no loss.

    `doc_ids` numbers the documents of each row from 0; None if attention crosses documents.
    """

    tokens: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    doc_ids: torch.Tensor | None
    token_numbers: torch.Tensor | None = None
    """Each token's number in the run, the same in every layout, where something is drawn by it; None: nothing is."""
    factors: torch.Tensor | None = None
    """Float `(micro_batch, seq_len)` by which the loss of each token is multiplied; None: 1."""
    teacher: torch.Tensor | None = None
    """Hidden states of a teacher, as this rank has them, `(micro_batch, seq_len of the rank, hidden)`."""
    examples: tuple[tuple[int, ...], ...] | None = None
    """Of each row the numbers of its examples in the data, in the order of `doc_ids`; None: the data has none."""


@dataclass(frozen=True, slots=True)
class StepBatch:
    """The data of one rank for one optimizer step.

    `sample_ids` `(global_batch_size,)` int64, `valid_tokens` (number of targets that are not -100) and `digest` (of the
    sample ids) describe the global batch and are the same on every rank.
    """

    step: int
    sample_ids: np.ndarray
    micro_batches: list[Batch]
    valid_tokens: int
    digest: str
    examples: int = 0
    """Number of examples in the global batch."""


@dataclass(frozen=True, slots=True, eq=False)
class Loader:
    """The loader of data-parallel rank `rank` of `size`.

    The rank's rows are a contiguous slice of the global batch. With `mask_documents`, positions restart at each
    document, and no target is the first token of another document. A thread prepares `prefetch` batches ahead.

    `on_damage` is called with the error where the data is damaged, and the rows then have tokens 0: their ranks stay in
    step with the others until all stop. Without it `step_batch` raises the error.

    Raises:
        UserError: the batch sizes do not divide, or the data is shorter than one sample.
    """

    store: TokenSource
    seq_len: int
    global_batch_size: int
    micro_batch_size: int
    seed: int
    mask_documents: bool
    rank: int = 0
    size: int = 1
    prefetch: int = 2
    numbers_tokens: bool = False
    on_damage: Callable[[DamagedDataError], None] | None = None

    def __post_init__(self) -> None:
        if self.global_batch_size % (self.micro_batch_size * self.size):
            raise UserError(
                f"global_batch_size={self.global_batch_size}: must be a multiple of micro_batch_size "
                f"({self.micro_batch_size}) times the data-parallel ranks ({self.size})"
            )
        if self.n_samples < 1:
            raise UserError(
                f"seq_len={self.seq_len}: longer than the training data, which has {self.store.n_tokens} "
                f"tokens; the largest legal seq_len is {self.store.n_tokens - 1}"
            )

    @property
    def n_samples(self) -> int:
        """Number of samples in an epoch; fewer than seq_len tokens at the end of the data are unused."""
        return (self.store.n_tokens - 1) // self.seq_len

    @property
    def _examples(self) -> ExampleSource | None:
        """The data, if it is of examples."""
        return as_examples(self.store)

    def batches(self, start_step: int) -> Iterator[StepBatch]:
        """Yield the batches of step `start_step` (the number of steps done before) and of all later ones."""
        return _ahead(self.step_batch, start_step, count=self.prefetch)

    def step_batch(self, step: int) -> StepBatch:
        """Make the batch of one step."""
        ids = self._sample_ids(step)
        rows = self.global_batch_size // self.size
        starts = ids[self.rank * rows : (self.rank + 1) * rows] * self.seq_len
        cuts = range(0, rows, self.micro_batch_size)
        first = step * self.global_batch_size + self.rank * rows
        return StepBatch(
            step=step,
            sample_ids=ids,
            micro_batches=[
                self._numbered(self._micro_batch(starts[cut : cut + self.micro_batch_size]), first + cut)
                for cut in cuts
            ],
            valid_tokens=self._valid_tokens(ids * self.seq_len),
            digest=hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()[:16],
            examples=sum(map(len, self._examples_of(ids * self.seq_len))),
        )

    def documents_of(self, ids: np.ndarray) -> list[list[int]]:
        """Return the first and the last document, numbered from 0 in the data, of each sample in `ids` `(samples,)`."""
        if self._examples is not None:
            found = [self._examples.examples_of(n * self.seq_len, self.seq_len) for n in ids.tolist()]
            return [[min(numbers), max(numbers)] for numbers in found]
        starts = self.store.document_starts
        if starts is None or not len(starts):
            return []
        first = np.searchsorted(starts, ids * self.seq_len, side="right") - 1
        last = np.searchsorted(starts, (ids + 1) * self.seq_len - 1, side="right") - 1
        pairs: list[list[int]] = np.maximum(np.stack([first, last], 1), 0).tolist()
        return pairs

    def _examples_of(self, starts: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """Return the numbers of the examples in the samples that begin at `starts`; of other data, none."""
        source = self._examples
        if source is None:
            return ()
        return tuple(tuple(source.examples_of(start, self.seq_len)) for start in starts.tolist())

    def _sample_ids(self, step: int) -> np.ndarray:
        """Return the ids of one step's samples, from those of a block of steps, which cost little more."""
        steps = max(1, min(BLOCK_SAMPLES, self.n_samples) // self.global_batch_size)
        block = _block_of_ids(
            step // steps * steps * self.global_batch_size,
            steps * self.global_batch_size,
            n=self.n_samples,
            seed=self.seed,
            fingerprint=self.store.fingerprint,
        )
        first = step % steps * self.global_batch_size
        return block[first : first + self.global_batch_size].copy()

    def _numbered(self, batch: Batch, first: int) -> Batch:
        """Return `batch`, whose first row is number `first` of the run, with the numbers of its tokens if wanted."""
        if not self.numbers_tokens:
            return batch
        numbers = torch.arange(first * self.seq_len, (first + len(batch.tokens)) * self.seq_len)
        return replace(batch, token_numbers=numbers.view_as(batch.tokens))

    def rows_batch(self, rows: np.ndarray, size: int) -> Batch:
        """Return a batch of `size` rows: samples number `rows`, and repetitions of the first one without examples."""
        starts = np.zeros(size, dtype=np.int64)
        starts[: len(rows)] = rows * self.seq_len
        batch = self._micro_batch(starts)
        if batch.examples is None:
            return batch
        return replace(batch, examples=(*batch.examples[: len(rows)], *[()] * (size - len(rows))))

    def _micro_batch(self, starts: np.ndarray) -> Batch:
        documents = self.store.document_starts if self.mask_documents else None
        try:
            batch = make_batch(self.store.read(starts, self.seq_len + 1), starts, documents)
            return batch if self._examples is None else with_targets(batch, self._examples, starts)
        except DamagedDataError as error:
            if self.on_damage is None:
                raise
            self.on_damage(error)
            rows = np.zeros((len(starts), self.seq_len + 1), dtype=np.int64)
            return make_batch(rows, starts, None if documents is None else np.zeros(1, dtype=np.int64))

    def _valid_tokens(self, starts: np.ndarray) -> int:
        """Count the targets of the global batch that have a loss, without reading its tokens.

        Each document that starts among a row's targets takes one away; of examples the answers or labels are counted.
        """
        if self._examples is not None:
            return int((self._examples.targets(starts, self.seq_len) != IGNORED).sum())
        valid = len(starts) * self.seq_len
        if self.mask_documents:
            begin, end = _documents_within(self.store.document_starts, starts, self.seq_len)
            valid -= int((end - begin).sum())
        return valid


def make_batch(rows: np.ndarray, starts: np.ndarray, document_starts: np.ndarray | None) -> Batch:
    """Make the tensors of `rows` `(batch, seq_len + 1)`, which begin at tokens `starts` `(batch,)` of the data.

    With `document_starts` `(documents,)` the documents of a row are separated.

    Raises:
        DamagedDataError: the starts do not ascend there.
    """
    batch, seq_len = rows.shape[0], rows.shape[1] - 1
    tokens, targets = rows[:, :-1].astype(np.int64), rows[:, 1:].astype(np.int64)
    if document_starts is None:
        positions = torch.arange(seq_len).repeat(batch, 1)
        return Batch(torch.from_numpy(tokens), torch.from_numpy(targets), positions, None)
    begin, end = _documents_within(document_starts, starts, seq_len)
    counts = end - begin
    if (counts < 0).any() or (counts > seq_len).any():
        raise _disordered(document_starts, starts)
    row = np.repeat(np.arange(batch), counts)
    nth = np.arange(len(row)) - np.repeat(np.cumsum(counts) - counts, counts)
    place = document_starts[np.repeat(begin, counts) + nth] - starts[row]  # 1 .. seq_len
    if len(place) and (place.min() < 1 or place.max() > seq_len):
        raise _disordered(document_starts, starts)
    targets[row, place - 1] = IGNORED
    # The parts of documents, in all rows one after the other: where each begins, and its number within its row.
    inside = place < seq_len
    firsts = np.concatenate([np.arange(batch) * seq_len, (row * seq_len + place)[inside]])
    numbers = np.concatenate([np.zeros(batch, dtype=np.int64), nth[inside] + 1])
    order = np.argsort(firsts, kind="stable")
    firsts, numbers = firsts[order], numbers[order]
    lengths = np.diff(firsts, append=batch * seq_len)
    within = np.repeat(firsts, lengths)
    np.subtract(_numbers(batch * seq_len), within, out=within)
    return Batch(
        tokens=torch.from_numpy(tokens),
        targets=torch.from_numpy(targets),
        positions=torch.from_numpy(within.reshape(batch, seq_len)),
        doc_ids=torch.from_numpy(np.repeat(numbers, lengths).reshape(batch, seq_len)),
    )


def as_examples(store: TokenSource) -> ExampleSource | None:
    """Return `store` if it tells which of its tokens have a loss; None if all have."""
    return cast(ExampleSource, store) if hasattr(store, "targets") else None


def with_targets(batch: Batch, store: ExampleSource, starts: np.ndarray) -> Batch:
    """Return `batch`, whose rows begin at tokens `starts` of `store`, with a loss on answers, or labels, alone."""
    length = batch.tokens.shape[1]
    return replace(
        batch,
        targets=torch.from_numpy(store.targets(starts, length)),
        examples=tuple(tuple(store.examples_of(start, length)) for start in starts.tolist()),
    )


def validation_batches(
    store: TokenSource, *, seq_len: int, tokens: int, micro_batch_size: int, mask_documents: bool
) -> Iterator[Batch]:
    """Yield about `tokens` tokens, spread evenly over `store`, in full micro-batches, the same every time.

    Unlike in training the last sequence may be shorter. Its missing tokens, and rows that pad the last micro-batch,
    have targets of -100.

    Raises:
        DamagedDataError: a token id is outside the vocabulary, or documents do not follow one another.
    """
    n_samples = -(-(store.n_tokens - 1) // seq_len)
    wanted = min(n_samples, -(-tokens // seq_len))
    ids = np.arange(wanted) * n_samples // max(wanted, 1)
    for cut in range(0, wanted, micro_batch_size):
        starts = np.zeros(micro_batch_size, dtype=np.int64)
        chosen = ids[cut : cut + micro_batch_size]
        starts[: len(chosen)] = chosen * seq_len
        lengths = np.minimum(seq_len + 1, store.n_tokens - starts)
        rows = np.zeros((micro_batch_size, seq_len + 1), dtype=np.int64)
        for row, length in enumerate(lengths):
            rows[row, :length] = store.read(starts[row : row + 1], int(length))[0]
        batch = make_batch(rows, starts, store.document_starts if mask_documents else None)
        if (examples := as_examples(store)) is not None:
            batch = with_targets(batch, examples, starts)
        missing = np.arange(seq_len) >= lengths[:, None] - 1
        missing[len(chosen) :] = True
        batch.targets[torch.from_numpy(missing)] = IGNORED
        if batch.examples is not None:
            batch = replace(
                batch, examples=(*batch.examples[: len(chosen)], *[()] * (micro_batch_size - len(chosen)))
            )
        yield batch


def ignored_batch(like: Batch) -> Batch:
    """Return `like` with all targets -100: a batch without loss, for a rank that has no data left."""
    examples = None if like.examples is None else ((),) * len(like.examples)
    return replace(like, targets=torch.full_like(like.targets, IGNORED), examples=examples)


def _documents_within(
    document_starts: np.ndarray, starts: np.ndarray, seq_len: int
) -> tuple[np.ndarray, np.ndarray]:
    """Return the range [begin, end) of documents that start in (start, start + seq_len], per element of `starts`."""
    begin = np.searchsorted(document_starts, starts, side="right")
    end = np.searchsorted(document_starts, starts + seq_len, side="right")
    return begin, end


def _disordered(document_starts: np.ndarray, starts: np.ndarray) -> DamagedDataError:
    return DamagedDataError(
        f"{file_of(document_starts)}: the documents near token {int(starts[0]):,} do not start one after the other"
    )


@lru_cache(maxsize=4)
def _numbers(count: int) -> np.ndarray:
    """Return 0, 1, ..., count - 1, to be read only."""
    return np.arange(count)


@lru_cache(maxsize=8)
def _block_of_ids(start: int, count: int, *, n: int, seed: int, fingerprint: str) -> np.ndarray:
    """Return the sample ids of a block of steps, to be read only."""
    return sample_ids(start, count, n=n, seed=seed, fingerprint=fingerprint)


def _ahead(make: Callable[[int], StepBatch], start: int, *, count: int) -> Iterator[StepBatch]:
    """Yield `make(start)`, `make(start + 1)`, ..., with `count` results prepared ahead by a thread."""
    if count == 0:
        step = start
        while True:
            yield make(step)
            step += 1
    pool = ThreadPoolExecutor(max_workers=1, thread_name_prefix="data-loader")
    pending: deque[Future[StepBatch]] = deque()
    try:
        while True:
            while len(pending) <= count:
                pending.append(pool.submit(make, start))
                start += 1
            yield pending.popleft().result()
    finally:
        pool.shutdown(wait=True, cancel_futures=True)
