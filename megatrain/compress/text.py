"""The text of a compression: some to calibrate with, and other text to measure with."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from megatrain.config.errors import UserError
from megatrain.data.loader import Batch, make_batch, validation_batches
from megatrain.data.prepare import prepare
from megatrain.data.sources.corpus import find_corpus
from megatrain.train.build import packed
from megatrain.train.inference import TrainedModel

SAMPLES = 128
"""Sequences of calibration text, as in GPTQ and AWQ."""
LONGEST = 2048
"""Most tokens of a sequence of calibration text, as there."""
MEASURED_TOKENS = 65536
ROWS = 8
"""Sequences that pass through the model together."""
Progress = Callable[[str, float], None]


@dataclass(frozen=True)
class HeldOut:
    """The text that a run has held out, in two parts."""

    calibration: list[Batch]
    measured: list[Batch]
    """Other sequences than those above."""
    token_bytes: np.ndarray
    """`(vocab,)`: bytes of text of each token."""


def held_out(trained: TrainedModel, *, samples: int, progress: Progress) -> HeldOut | None:
    """Return what the run of `trained` has held out; None if it has no such text, as a Hugging Face directory.

    Raises:
        UserError: its data can't be read any more.
    """
    cfg = trained.cfg
    if trained.step is None or cfg.data.kind == "synthetic":
        return None
    data = prepare(cfg.data, progress=progress, vocab_size=cfg.model.vocab_size)
    if data.val is None:
        return None
    wanted = samples * cfg.seq_len + MEASURED_TOKENS
    rows = list(
        validation_batches(
            packed(cfg, data.val),
            seq_len=cfg.seq_len,
            tokens=wanted,
            micro_batch_size=1,
            mask_documents=cfg.data.mask_documents,
        )
    )
    first = min(samples, len(rows) // 2)
    return HeldOut(_joined(rows[:first]), _joined(rows[first:]), data.token_bytes)


def text_of(path: str, trained: TrainedModel, *, samples: int) -> list[Batch]:
    """Return up to `samples` sequences of the documents of `path`, which is as `data.path` takes it.

    Raises:
        UserError: it has no text.
    """
    seq_len = min(trained.context, LONGEST)
    tokenizer, tokens, starts = trained.tokenizer, [], []
    n_tokens = 0
    for document in find_corpus((path,)).documents():
        starts.append(n_tokens)
        tokens.append(
            np.append(np.asarray(tokenizer.encode(document.text), dtype=np.int64), tokenizer.eos_id)
        )
        n_tokens += len(tokens[-1])
        if n_tokens > samples * seq_len:
            break
    if n_tokens < 2:
        raise UserError(f"--calibration {path}: there is no text in it")
    stream = np.concatenate(tokens)
    seq_len = min(seq_len, n_tokens - 1)
    firsts = np.arange(min(samples, (n_tokens - 1) // seq_len)) * seq_len
    rows = np.stack([stream[first : first + seq_len + 1] for first in firsts])
    separate = np.asarray(starts) if trained.cfg.data.mask_documents else None
    batch = make_batch(rows, firsts, separate)
    return _joined([_rows(batch, n) for n in range(len(rows))])


def _rows(batch: Batch, n: int) -> Batch:
    """Return row `n` of `batch`."""
    ids = None if batch.doc_ids is None else batch.doc_ids[n : n + 1]
    return Batch(batch.tokens[n : n + 1], batch.targets[n : n + 1], batch.positions[n : n + 1], ids)


def _joined(rows: Sequence[Batch]) -> list[Batch]:
    """Return the rows in batches of `ROWS`."""
    found = []
    for start in range(0, len(rows), ROWS):
        part = rows[start : start + ROWS]
        ids = [row.doc_ids for row in part if row.doc_ids is not None]
        tokens, targets, positions = (
            torch.cat([getattr(row, name) for row in part]) for name in ("tokens", "targets", "positions")
        )
        found.append(Batch(tokens, targets, positions, torch.cat(ids) if ids else None))
    return found
