"""The loss head: a seam that vocabulary parallelism may replace."""

from torch import Tensor, nn

from megatrain_kernels import linear_cross_entropy


class LossHead(nn.Module):
    """Cross entropy of the next token without holding the logits."""

    def __init__(self, softcap: float | None) -> None:
        super().__init__()
        self.softcap = softcap

    def forward(self, hidden: Tensor, weight: Tensor, targets: Tensor, z_loss: float) -> Tensor:
        """Sum over valid targets (not -100), a float32 scalar.

        hidden `(batch, seq, hidden)`, weight `(vocab, hidden)`, targets `(batch, seq)`.
        """
        return linear_cross_entropy(
            hidden, weight, targets, z_loss=z_loss, softcap=self.softcap, reduction="sum"
        )
