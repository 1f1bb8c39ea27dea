"""Linear layer and cross entropy in one: the logits of a few tokens at a time, never all of them.

The gradients are made in the forward pass, while a chunk's logits are at hand, and scaled in the backward pass
(the idea of Liger-Kernel, arXiv 2410.10989, section 3.2).
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from megatrain_kernels.backend import choose
from megatrain_kernels.cross_entropy.op import cross_entropy
from megatrain_kernels.cross_entropy.reference import reduce_loss
from megatrain_kernels.cross_entropy.rows import LossOptions, row_losses
from megatrain_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference

CHUNK_ELEMENTS = {"cpu": 1 << 21, "cuda": 1 << 28}  # logits held at once; on a CPU a chunk stays in its cache
MIN_CHUNK_ROWS = 512  # each chunk adds to the whole weight gradient, which fewer rows would not pay for


class _ChunkedLoss(torch.autograd.Function):
    """Sum of losses over the valid tokens of x `(tokens, hidden)` as a scalar."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, options: LossOptions) -> Tensor:
        wants_x, wants_weight = ctx.needs_input_grad[:2]
        compute = torch.promote_types(x.dtype, torch.float32)
        rows = max(MIN_CHUNK_ROWS, CHUNK_ELEMENTS.get(x.device.type, 1 << 28) // weight.shape[0])
        buffer = x.new_empty(min(rows, x.shape[0]), weight.shape[0])
        grad_x = torch.empty_like(x) if wants_x else None
        # Chunks are added in float32: sums of many bf16 terms would lose the small ones.
        grad_weight = torch.zeros_like(weight, dtype=compute) if wants_weight else None
        total = torch.zeros((), dtype=compute, device=x.device)
        for start in range(0, x.shape[0], rows):
            part, wanted = x[start : start + rows], targets[start : start + rows]
            logits = torch.mm(part, weight.T, out=buffer[: part.shape[0]])
            total += row_losses(
                logits, wanted, options, gradient=logits if wants_x or wants_weight else None
            ).sum()
            if grad_x is not None:
                torch.mm(logits, weight, out=grad_x[start : start + rows])
            if grad_weight is None:
                continue
            if compute == x.dtype:
                grad_weight.addmm_(logits.T, part)
            else:
                grad_weight += (logits.T @ part).to(compute)
        if grad_x is not None and options.group is not None:  # each rank has the part of its own columns
            dist.all_reduce(grad_x, group=options.group)
        ctx.save_for_backward(grad_x, None if grad_weight is None else grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The factor stays in float32: rounded to bf16 it would put all gradients of the model off by one part.
        return (*(None if g is None else g * grad for g in ctx.saved_tensors), None, None)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of logits x weightᵀ, float32 at least.

    Args:
        x: `(..., hidden)`. weight: `(vocab, hidden)`. targets: `(...)` token ids, or `ignore_index`.
        z_loss: factor on the squared log-sum-exp of the logits, added to each token's loss.
        softcap: c: logits become c·tanh(logits / c).
        reduction: "mean" and "sum" are over valid tokens; "none" gives each token's loss and holds all logits.
        tp_group: its rank r holds the r-th of equal slices of the vocabulary as `weight`; x and targets are the
            same on all of its ranks, and so are the loss and x's gradient (summed over the group here).

    Raises:
        ValueError: another reduction or backend; a sharded vocabulary with "none" or the reference.
    """
    valid = targets != ignore_index
    whole = choose(backend) == "reference"
    if tp_group is not None and (whole or reduction == "none"):
        raise ValueError(
            "a vocabulary sharded over tp_group needs reduction mean or sum, and not the reference"
        )
    if whole:
        losses = linear_cross_entropy_reference(
            x, weight, targets, ignore_index=ignore_index, z_loss=z_loss, softcap=softcap
        )
        return reduce_loss(losses, valid, reduction)
    if reduction == "none":
        return cross_entropy(
            x @ weight.T,
            targets,
            ignore_index=ignore_index,
            z_loss=z_loss,
            softcap=softcap,
            reduction=reduction,
        )
    options = LossOptions(ignore_index, z_loss, softcap, tp_group)
    total = _ChunkedLoss.apply(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), options)
    return reduce_loss(total, valid, reduction)
