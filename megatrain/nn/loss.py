"""The loss head. Tensor parallelism replaces it by one over a sharded vocabulary."""

import torch
from torch import Tensor, nn
from torch.nn.functional import linear

from megatrain_kernels import linear_cross_entropy


class LossHead(nn.Module):
    """Hidden states to logits, or to the loss without materializing the logits; the matrix is the caller's."""

    def __init__(self, softcap: float | None) -> None:
        super().__init__()
        self.softcap = softcap

    def forward(
        self,
        hidden: Tensor,
        weight: Tensor,
        targets: Tensor | None = None,
        z_loss: float = 0.0,
        keep: Tensor | None = None,
    ) -> Tensor:
        """Return logits `(batch, seq, vocab)`, or with `targets` their loss summed over valid ones (float32 scalar).

        Args:
            hidden: `(batch, seq, hidden)`.
            weight: `(vocab, hidden)`.
            targets: `(batch, seq)` int64, -100 where there is none.
            z_loss: factor on the squared log-partition (PaLM, arXiv 2204.02311).
            keep: `(kept,)` indices of the tokens whose logits are wanted; None: all.
        """
        if targets is not None:
            return linear_cross_entropy(
                hidden, weight, targets, z_loss=z_loss, softcap=self.softcap, reduction="sum"
            )
        logits = linear(hidden if keep is None else hidden[:, keep], weight)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
