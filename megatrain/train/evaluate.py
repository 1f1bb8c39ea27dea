"""Validation: loss and bits per byte on the held-out split."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from megatrain.data.loader import Batch
from megatrain.train.step import loss_sum


@dataclass(frozen=True, slots=True)
class Evaluation:
    loss: float
    """Nats a token."""
    bits_per_byte: float | None
    """Total nats / (ln 2 · bytes of text that the predicted tokens stand for); None where tokens have no text."""


@torch.no_grad()
def evaluate(model: nn.Module, batches: Sequence[Batch], token_bytes: np.ndarray | None) -> Evaluation:
    """Mean loss over every valid token of `batches`; the model's mode and weights are left as they were.

    token_bytes: `(vocab,)` bytes of text of each token, 0 for special tokens.
    """
    nats = 0.0
    valid = text_bytes = 0
    for batch in batches:
        nats += loss_sum(model, batch).item()
        targets = batch.targets[batch.targets >= 0].numpy()
        valid += targets.size
        if token_bytes is not None:
            text_bytes += int(token_bytes[targets].sum())
    bits_per_byte = nats / (math.log(2) * text_bytes) if text_bytes else None
    return Evaluation(loss=nats / max(valid, 1), bits_per_byte=bits_per_byte)
