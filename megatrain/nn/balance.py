"""Equal load of experts: a balance loss of each sequence, and a bias that follows the counted load.

The balance loss is of one sequence, so it does not depend on how a batch is cut. It enters the gradient where it
arises, in the layer: no value has to be carried to the end of the model, which may be in another process.
"""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from megatrain.nn.config import DecoderConfig, ExpertsConfig


class BalancePoint(nn.Module):
    """Counts tokens and adds the balance loss's gradient, in the backward pass of training only.

    What a backward pass does happens once for each micro-batch of training: not in evaluation, and not a second time
    where activations are recomputed.
    """

    def __init__(self, cfg: ExpertsConfig) -> None:
        super().__init__()
        self.cfg = cfg
        self.scale = 1.0
        """The loss of which gradients are taken is `scale` times the sum over tokens."""
        self.sequence_sum: Callable[[Tensor], Tensor] = _itself
        """Seam for a sequence that is cut: the sum over its parts, whose gradient goes to each part as it is."""
        self.counts: Tensor | None = None
        """`(n_experts,)` int64: tokens of each expert since the counts were taken."""

    def sum_further(self, over: Callable[[Tensor], Tensor]) -> None:
        """Let what is a sum over a sequence so far go `over` one more cut of it."""
        inner = self.sequence_sum
        self.sequence_sum = lambda part: over(inner(part))

    @torch.compiler.disable  # its backward pass changes `counts`, which a compiled graph may not
    def forward(self, out: Tensor, indices: Tensor, scores: Tensor) -> Tensor:
        """`out`, unchanged; indices `(batch, seq, top_k)` and scores `(batch, seq, n_experts)` of its tokens."""
        if not (torch.is_grad_enabled() and out.requires_grad):
            return out
        chosen = torch.zeros_like(scores).scatter_(-1, indices, 1.0).sum(1)
        loss = self._loss(chosen, scores) if self.cfg.aux_loss else scores.new_zeros(())
        return _Point.apply(out, loss, chosen.sum(0).to(torch.int64), self)

    def _loss(self, chosen: Tensor, scores: Tensor) -> Tensor:
        """Sum over sequences of T · aux_loss · Σ_i f_i P_i, DeepSeek-V3's equations 17 to 20.

        With T tokens in the sequence: f_i = n_experts / (top_k T) · tokens of expert i, P_i = mean of its share of the
        scores. The factor T makes it, like the loss itself, a sum over tokens.
        """
        cfg = self.cfg
        shares = scores / (scores.sum(-1, keepdim=True) + 1e-20)
        counts, sums = self.sequence_sum(chosen), self.sequence_sum(shares.sum(1))
        tokens = counts.sum(-1) / cfg.top_k
        loss = (counts * sums).sum(-1) * (cfg.n_experts / cfg.top_k) / tokens
        return cfg.aux_loss * loss.sum()


def _itself(x: Tensor) -> Tensor:
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


def _points(models: Iterable[nn.Module]) -> Iterator[tuple[int, Any]]:
    """Index in the whole model and MoE block (of `nn.moe`, which imports this module) of each layer that has one."""
    for model in models:
        for index, block in model.layers.items():  # type: ignore[union-attr, operator]
            if block.moe is not None:
                yield int(index), block.moe


def begin_balance(models: Iterable[nn.Module], scale: float) -> None:
    """Before a step: its loss is `scale` times the sum over tokens of all micro-batches."""
    for _, moe in _points(models):
        moe.balance.scale = scale


def take_expert_counts(models: Iterable[nn.Module], cfg: DecoderConfig, device: torch.device) -> Tensor:
    """Tokens of each expert since the last call, `(n_layers, n_experts)` int64; rows of other layers are 0.

    `models` are parts of one model. Sums over ranks that each count their own tokens are the global counts.
    """
    assert cfg.experts is not None
    found = torch.zeros(cfg.n_layers, cfg.experts.n_experts, dtype=torch.int64, device=device)
    for index, moe in _points(models):
        point: BalancePoint = moe.balance
        if point.counts is not None:
            found[index] += point.counts
        point.counts = None
    return found


@torch.no_grad()
def update_expert_bias(models: Iterable[nn.Module], counts: Tensor, rate: float) -> None:
    """Move each expert's bias by `rate`: up where its load is below the mean, down where above (arXiv 2408.15664).

    counts: `(n_layers, n_experts)` of the global batch; a common factor changes nothing.
    """
    for index, moe in _points(models):
        bias: Tensor = moe.expert_bias
        load = counts[index]
        bias += rate * torch.sign(load.sum() - load * len(load)).to(bias.dtype)


def balance_experts(
    models: Iterable[nn.Module], cfg: DecoderConfig, total: Callable[[Tensor], Tensor]
) -> None:
    """After a step: move the biases by its global counts; `total` sums over the ranks."""
    parts = list(models)
    if cfg.experts is None or cfg.experts.bias_rate is None:
        return
    device = next(p.device for part in parts for p in part.parameters())
    update_expert_bias(parts, total(take_expert_counts(parts, cfg, device)), cfg.experts.bias_rate)
