"""Random tokens to train on, packed as a run on text packs its documents."""

import numpy as np

from megatrain.data.loader import StepBatch, make_batch
from megatrain.train.config import Config

MEAN_DOCUMENT = 128
"""Mean number of tokens of a packed document."""


def random_batch(cfg: Config, seed: int, *, packed: bool = False) -> StepBatch:
    """Draw one step of random tokens: documents of one sequence each, or `packed` ones of random lengths."""
    generator = np.random.default_rng(seed)
    rows, seq_len = cfg.global_batch_size, cfg.seq_len
    tokens = generator.integers(cfg.model.vocab_size, size=(rows, seq_len + 1))
    starts = np.arange(rows) * seq_len
    documents = None
    if packed:
        lengths = 1 + generator.geometric(1 / MEAN_DOCUMENT, size=2 + 2 * rows * seq_len // MEAN_DOCUMENT)
        documents = np.concatenate([[0], np.cumsum(lengths)])
    size = cfg.resolved_micro_batch_size
    parts = [
        make_batch(tokens[cut : cut + size], starts[cut : cut + size], documents)
        for cut in range(0, rows, size)
    ]
    valid = sum(int((part.targets >= 0).sum()) for part in parts)
    return StepBatch(0, np.arange(rows), parts, valid, "")
