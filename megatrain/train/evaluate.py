"""Validation: loss and bits per byte on the held-out split."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import nn

from megatrain.data.loader import Batch


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
    device = next(model.parameters()).device
    loss_sum = torch.zeros((), dtype=torch.float64, device=device)
    valid = text_bytes = 0
    for batch in batches:
        part = batch.to(device)
        loss_sum += model(part.tokens, targets=part.targets, positions=part.positions, doc_ids=part.doc_ids)
        targets = batch.targets[batch.targets >= 0].numpy()
        valid += targets.size
        if token_bytes is not None:
            text_bytes += int(token_bytes[targets].sum())
    nats = loss_sum.item()
    bits_per_byte = nats / (math.log(2) * text_bytes) if text_bytes else None
    return Evaluation(loss=nats / max(valid, 1), bits_per_byte=bits_per_byte)
