"""The balance loss of a mixture of experts, and the count of each expert's tokens.

The balance loss is of one sequence, so it does not depend on how a batch is sharded. It enters the gradient where it
arises, in the layer: no value has to be carried to the end of the model, which may be in another process.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatrain.nn.config import ExpertsConfig

SequenceSum = Callable[[Tensor], Tensor]


class BalancePoint(nn.Module):
    """Count tokens and add the balance loss's gradient, in the backward pass of training only.

    What a backward pass does happens once for each micro-batch of training: not in evaluation, and not a second time
    where activations are recomputed.
    """

    SEAMS = ("sequence_sum",)

    def __init__(self, cfg: ExpertsConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.scale = 1.0
        """The loss of which gradients are taken is `scale` times the sum over tokens."""
        self.sequence_sum: SequenceSum = as_it_is
        """Sums over the shards of a sequence; the gradient goes to each shard as it is."""
        self.counts: Tensor | None = None
        """`(n_experts,)` int64: tokens of each expert since the counts were taken."""

    @torch.compiler.disable  # its backward pass changes `counts`, which a compiled graph may not
    def forward(self, out: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        """Return `out` unchanged.

        Args:
            indices: `(batch, seq, top_k)`, the experts of its tokens.
            scores: `(batch, seq, n_experts)`.
        """
        if not (torch.is_grad_enabled() and out.requires_grad):
            return out
        chosen = torch.zeros_like(scores).scatter_(-1, indices, 1.0).sum(1)
        loss = self._loss(chosen, scores) if self.cfg.aux_loss else scores.new_zeros(())
        return _Point.apply(out, loss, chosen.sum(0).to(torch.int64), self)

    def _loss(self, chosen: Tensor, scores: Tensor) -> Tensor:
        """Sum over sequences T · aux_loss · Σ_i f_i P_i, DeepSeek-V3's equations 17 to 20.

        With T tokens in the sequence: f_i = n_experts / (top_k T) · tokens of expert i, P_i = mean of its share of the
        scores. The factor T makes it, like the loss itself, a sum over tokens.
        """
        cfg = self.cfg
        shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        counts, sums = self.sequence_sum(chosen), self.sequence_sum(shares.sum(1))
        tokens = counts.sum(-1) / cfg.top_k
        loss = (counts * sums).sum(-1) * (cfg.n_experts / cfg.top_k) / tokens
        return cfg.aux_loss * loss.sum()


def as_it_is(x: Tensor) -> Tensor:
    """Return the sum over a full sequence, which it already is on one device."""
    return x


class _Point(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, out: Tensor, loss: Tensor, counts: Tensor, point: BalancePoint) -> Tensor:
        ctx.loss_dtype, ctx.counts, ctx.point = loss.dtype, counts, point
        return out.view_as(out)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        point, counts = ctx.point, ctx.counts
        point.counts = counts.clone() if point.counts is None else point.counts + counts
        return grads[0], torch.full((), point.scale, dtype=ctx.loss_dtype, device=counts.device), None, None
