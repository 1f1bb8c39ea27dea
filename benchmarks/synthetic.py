"""Random tokens to train on, packed as a run on text packs its documents."""

import math
from typing import Literal

import numpy as np

from megatrain.data.loader import StepBatch, make_batch
from megatrain.train.config import Config

Documents = Literal["text", "short"]
MEAN_OF_TEXT = 1128
"""Mean tokens of a document of OpenWebText with GPT-2's tokenizer: 9,040,017,095 tokens of 8,013,769 documents
(karpathy/nanoGPT, data/openwebtext/readme.md)."""
SPREAD_OF_TEXT = 1.0
"""Standard deviation of the logarithm of a length. An assumption: no published figure is behind it. With it half of
the documents have under 684 tokens, and one in a hundred over 7,000."""
MEAN_OF_SHORT = 128
"""Mean tokens of a short document, for sequences of some hundred tokens."""


def document_lengths(kind: Documents, tokens: int, generator: np.random.Generator) -> np.ndarray:
    """Draw lengths of documents, 1 or more each, that hold `tokens` tokens and more together.

    Args:
        kind: "text" draws from a log-normal distribution with `MEAN_OF_TEXT` and `SPREAD_OF_TEXT`, "short" from a
            geometric one with `MEAN_OF_SHORT`.
    """
    mean = MEAN_OF_TEXT if kind == "text" else MEAN_OF_SHORT
    found = np.zeros(0, dtype=np.int64)
    while found.sum() < tokens:
        count = 2 + 2 * tokens // mean
        if kind == "short":
            drawn = 1 + generator.geometric(1 / mean, size=count)
        else:
            logarithm = math.log(mean) - SPREAD_OF_TEXT**2 / 2  # of the median
            drawn = np.ceil(generator.lognormal(logarithm, SPREAD_OF_TEXT, size=count)).astype(np.int64)
        found = np.concatenate([found, drawn])
    return found


def random_batch(cfg: Config, seed: int, *, packed: Documents | None = None) -> StepBatch:
    """Draw one step of random tokens: one document a sequence, or `packed` ones whose attention is separate."""
    generator = np.random.default_rng(seed)
    rows, seq_len = cfg.global_batch_size, cfg.seq_len
    tokens = generator.integers(cfg.model.vocab_size, size=(rows, seq_len + 1))
    starts = np.arange(rows) * seq_len
    documents = None
    if packed is not None:
        lengths = document_lengths(packed, rows * seq_len, generator)
        documents = np.concatenate([[0], np.cumsum(lengths)])
    size = cfg.resolved_micro_batch_size
    parts = [
        make_batch(tokens[cut : cut + size], starts[cut : cut + size], documents)
        for cut in range(0, rows, size)
    ]
    valid = sum(int((part.targets >= 0).sum()) for part in parts)
    return StepBatch(0, np.arange(rows), parts, valid, "")


def visible_pairs(batch: StepBatch) -> float:
    """Return the query-key pairs that causal attention inside documents computes, as a mean over the sequences."""
    pairs, rows = 0, 0
    for part in batch.micro_batches:
        pairs += int((part.positions + 1).sum())  # positions restart in each document
        rows += part.positions.shape[0]
    return pairs / rows


def mean_document(batch: StepBatch) -> float:
    """Return the mean length of a document, as the ends of sequences cut them."""
    tokens = sum(part.positions.numel() for part in batch.micro_batches)
    return tokens / sum(int((part.positions == 0).sum()) for part in batch.micro_batches)
