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
        *,
        factors: Tensor | None = None,
        per_token: bool = False,
    ) -> Tensor:
        """Return logits `(batch, seq, vocab)`, or with `targets` their loss summed over valid ones (float32 scalar).

        Args:
            hidden: `(batch, seq, hidden)`.
            weight: `(vocab, hidden)`.
            targets: `(batch, seq)` int64, -100 where there is none.
            z_loss: factor on the squared log-partition (PaLM, arXiv 2204.02311).
            keep: `(kept,)` indices of the tokens whose logits are wanted; None: all.
            factors: `(batch, seq)`, by which the loss of each token is multiplied; None: 1.
            per_token: whether the losses of the tokens are wanted, `(batch, seq)`, and not their sum; without a
                gradient in a sharded vocabulary.
        """
        if targets is not None:
            return linear_cross_entropy(
                hidden,
                weight,
                targets,
                factors=factors,
                z_loss=z_loss,
                softcap=self.softcap,
                reduction="none" if per_token else "sum",
            )
        logits = linear(hidden if keep is None else hidden[:, keep], weight)
        return logits if self.softcap is None else self.softcap * torch.tanh(logits / self.softcap)
