"""The loss head: a seam that vocabulary parallelism may replace."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from megatrain_kernels import linear_cross_entropy


class LossHead(nn.Module):
    """From hidden states to logits, or to the loss without holding the logits; the matrix is the caller's."""

    def __init__(self, softcap: float | None) -> None:
        super().__init__()
        self.softcap = softcap

    def forward(
        self, hidden: Tensor, weight: Tensor, targets: Tensor | None = None, z_loss: float = 0.0
    ) -> Tensor:
        """hidden `(batch, seq, hidden)`, weight `(vocab, hidden)`, targets `(batch, seq)`.

        Without targets the logits `(batch, seq, vocab)`; else the sum over valid targets (not -100), a float32
        scalar.
        """
        if targets is not None:
            return linear_cross_entropy(
                hidden, weight, targets, z_loss=z_loss, softcap=self.softcap, reduction="sum"
            )
        logits = linear(hidden, weight)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
