"""Linear layer and cross entropy in one; the gradients are made in the forward pass and scaled in the backward pass."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from megatrain_kernels.backend import choose, preferred
from megatrain_kernels.cross_entropy.op import cross_entropy
from megatrain_kernels.cross_entropy.reference import reduce_loss
from megatrain_kernels.cross_entropy.registered import check_triton
from megatrain_kernels.linear_cross_entropy.reference import linear_cross_entropy_reference
from megatrain_kernels.linear_cross_entropy.registered import linear_cross_entropy_op


class _ChunkedLoss(torch.autograd.Function):
    """Sum of losses over the valid tokens of x `(tokens, hidden)` as a scalar."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, targets: Tensor, *options: Any) -> Tensor:
        *settings, backend = options
        wanted = ctx.needs_input_grad[:2]
        total: Tensor
        total, *grads = linear_cross_entropy_op(x, weight, targets, *settings, *wanted, backend)
        ctx.save_for_backward(*(grad if want else None for grad, want in zip(grads, wanted, strict=True)))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # The factor stays in float32: rounded to bf16 it would put all gradients of the model off by one part.
        scaled = (None if g is None else g * grad for g in ctx.saved_tensors)
        return *scaled, *(None for _ in ctx.needs_input_grad[2:])


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
        backend: "auto" takes Triton's kernel for the rows of logits on a GPU; the products are PyTorch's.

    Raises:
        ValueError: another reduction or backend; a sharded vocabulary with "none" or the reference; "triton" where it
            cannot run.
    """
    valid = targets != ignore_index
    backend = preferred(backend)
    chosen = choose(backend, ("torch", "triton", "reference"))
    if chosen == "triton":
        check_triton(x)
    whole = chosen == "reference"
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
            backend=backend,
        )
    options = (ignore_index, z_loss, softcap, None if tp_group is None else tp_group.group_name, backend)
    total = _ChunkedLoss.apply(x.reshape(-1, x.shape[-1]), weight, targets.reshape(-1), *options)
    return reduce_loss(total, valid, reduction)
