"""Linear layer and cross entropy in one: the logits of a few tokens at a time, never all of them.

The gradients are made in the forward pass, while a chunk's logits are at hand, and scaled in the backward pass
(the idea of Liger-Kernel, arXiv 2410.10989, section 3.2).
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from megatrain_kernels.backend import choose
from megatrain_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference, reduce_loss

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}  # logits held at once; on a CPU a chunk stays in its cache


class _Options(NamedTuple):
    ignore_index: int
    z_loss: float
    softcap: float | None


class _ChunkedLoss(torch.autograd.Function):
    """Sum of losses over the valid tokens of x `(tokens, hidden)` as a scalar."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, options: _Options) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        compute = torch.promote_types(x.dtype, torch.float32)
        grad_x = torch.empty_like(x) if wants_x else None
        # Chunks are added in float32: sums of many bf16 terms would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=compute) if wants_weight else None
        total = torch.zeros((), dtype=compute, device=x.device)
        rows = max(1, CHUNK_ELEMENTS.get(x.device.type, 1 << 28) // weight.shape[0])
        for start in range(0, x.shape[0], rows):
            part, wanted = x[start : start + rows], targets[start : start + rows]
            losses, grad_logits = _chunk(part @ weight.T, wanted, options, with_grad=wants_x or wants_weight)
            total += losses.sum()
            if grad_logits is None:
                continue
            grad_logits = grad_logits.to(x.dtype)
            if grad_x is not None:
                torch.mm(grad_logits, weight, out=grad_x[start : start + rows])
            if grad_weight is not None:
                grad_weight += grad_logits.T @ part
        ctx.gradients = grad_x, None if grad_weight is None else grad_weight.to(weight.dtype)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        scaled = (None if g is None else g.mul_(grads[0].to(g.dtype)) for g in ctx.gradients)
        ctx.gradients = None  # scaled in place: a second backward pass must not use them again
        return (*scaled, None, None)


def _chunk(
    logits: Tensor, targets: Tensor, options: _Options, *, with_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """Losses `(tokens,)` and d(sum of losses)/d(logits before the cap) `(tokens, vocab)` of one chunk."""
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    if options.softcap is not None:
        logits = torch.tanh(logits / options.softcap).mul_(options.softcap)
    valid = targets != options.ignore_index
    index = targets.where(valid, 0).unsqueeze(-1)
    log_p = torch.log_softmax(logits, dim=-1)
    picked = log_p.gather(-1, index).squeeze(-1)
    losses = -picked
    scale = valid.to(logits.dtype)
    if options.z_loss:
        lse = logits.gather(-1, index).squeeze(-1) - picked
        losses = losses + options.z_loss * lse.square()
    losses = losses * scale
    if not with_grad:
        return losses, None
    grad = log_p.exp_()
    if options.z_loss:
        grad.mul_((1 + 2 * options.z_loss * lse).unsqueeze(-1))
    grad.scatter_add_(-1, index, grad.new_full((1, 1), -1.0).expand_as(index))
    if not bool(valid.all()):
        grad.mul_(scale.unsqueeze(-1))
    if options.softcap is not None:  # d cap(l) / dl = 1 - tanh(l / c)² = 1 - (capped / c)²
        grad.mul_(1 - (logits / options.softcap).square())
    return losses, grad


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of logits x weightᵀ, float32 at least.

    Args:
        x: `(..., hidden)`. weight: `(vocab, hidden)`. targets: `(...)` token ids, or `ignore_index`.
        z_loss: factor on the squared log-sum-exp of the logits, added to each token's loss.
        softcap: c: logits become c·tanh(logits / c).
        reduction: "mean" and "sum" are over valid tokens; "none" gives each token's loss and holds all logits.

    Raises:
        ValueError: another reduction or backend.
    """
    valid = targets != ignore_index
    if choose(backend) == "reference" or reduction == "none":
        losses = linear_cross_entropy_reference(
            x, weight, targets, ignore_index=ignore_index, z_loss=z_loss, softcap=softcap
        )
        return reduce_loss(losses, valid, reduction)
    options = _Options(ignore_index, z_loss, softcap)
    total = _ChunkedLoss.apply(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), options)
    return reduce_loss(total, valid, reduction)
