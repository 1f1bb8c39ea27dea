"""Cross entropy that keeps one tensor of the logits' size for its backward pass: their gradient."""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from megatrain_kernels.backend import choose, preferred
from megatrain_kernels.cross_entropy.reference import cross_entropy_reference, reduce_loss
from megatrain_kernels.cross_entropy.registered import check_triton, cross_entropy_op


class _CrossEntropy(torch.autograd.Function):
    """Losses `(tokens,)` of logits `(tokens, vocab)`; the gradient is made while the softmax is at hand."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor, options: tuple[Any, ...], backend: str) -> Tensor:
        wanted = ctx.needs_input_grad[0]
        losses: Tensor
        losses, gradient = cross_entropy_op(logits, targets, *options, wanted, backend)
        if wanted:
            ctx.save_for_backward(gradient)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * grad.to(gradient.dtype).unsqueeze(-1), None, None, None


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    *,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float | None = None,
    reduction: str = "mean",
    tp_group: dist.ProcessGroup | None = None,
    backend: str = "auto",
) -> Tensor:
    """Cross entropy of logits `(..., vocab)` with targets `(...)`, float32 at least.

    The options are those of `linear_cross_entropy`; with `tp_group` logits are this rank's columns.

    Raises:
        ValueError: another reduction or backend; the reference of a sharded vocabulary; "triton" where it cannot run.
    """
    valid = targets != ignore_index
    backend = preferred(backend)
    chosen = choose(backend, ("torch", "triton", "reference"))
    if chosen == "triton":
        check_triton(logits)
    if chosen == "reference":
        if tp_group is not None:
            raise ValueError(
                "the reference takes whole rows of logits, not a vocabulary sharded over tp_group"
            )
        losses = cross_entropy_reference(
            logits, targets, ignore_index=ignore_index, z_loss=z_loss, softcap=softcap
        )
    else:
        options = (ignore_index, z_loss, softcap, None if tp_group is None else tp_group.group_name)
        flat = logits.reshape(-1, logits.shape[-1])
        losses = _CrossEntropy.apply(flat, targets.reshape(-1), options, backend).view(targets.shape)
    return reduce_loss(losses, valid, reduction)
