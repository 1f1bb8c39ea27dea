"""The loss head of distillation: the divergence from a teacher's probabilities beside the usual loss."""

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch import distributed as dist
from torch.autograd.function import once_differentiable

from megatrain.parallel.collectives import Group, gather, gather_shared

SEQ = 1  # dimension of activations `(batch, seq, hidden)`
CHUNK = 512
"""Tokens whose logits, of both models, are held at a time."""


class TeacherHead(nn.Module):
    """A loss head that returns the hidden states as they are, and keeps the head's weight, which does not change."""

    def __init__(self) -> None:
        super().__init__()
        self.weight: Tensor | None = None
        """`(vocab, hidden)`, or this rank's rows: a copy, since FSDP frees what it has gathered."""

    def forward(self, hidden: Tensor, weight: Tensor, *_: object, **__: object) -> Tensor:
        """Return `hidden`."""
        if self.weight is None:
            self.weight = weight.detach().clone()
        return hidden


class DistillHead(nn.Module):
    """A loss head that mixes (1 - alpha) times `inner`'s loss with alpha T² KL(teacher at T || model at T).

    Where no hidden states of the teacher come, as in validation, it is `inner`.
    """

    def __init__(
        self, inner: nn.Module, head: TeacherHead, *, alpha: float, temperature: float, group: Group | None
    ) -> None:
        """Take the usual head, and the teacher's.

        Args:
            group: the tensor-parallel ranks that share the rows; None: there is one.
        """
        super().__init__()
        self.inner, self.group = inner, group
        self.alpha, self.temperature = alpha, temperature
        self._heads = [head]  # in a list, since it is no part of this model

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
        teacher: Tensor | None = None,
    ) -> Tensor:
        """Return what `inner` does, or with `teacher` the mixed loss, summed over the valid tokens.

        Args:
            teacher: its hidden states, `(batch, seq, teacher's hidden)`, sharded as `hidden` is.
        """
        usual: Tensor = self.inner(
            hidden, weight, targets, z_loss, keep, factors=factors, per_token=per_token
        )
        if teacher is None or targets is None:
            return usual
        teacher_weight = self._heads[0].weight
        assert teacher_weight is not None, "the teacher computes first"
        if self.group is not None:
            hidden, teacher = gather_shared(hidden, SEQ, self.group), gather(teacher, SEQ, self.group)
        valid = targets.flatten() >= 0
        divergence: Tensor = _Divergence.apply(
            hidden.flatten(0, 1),
            weight,
            _Teacher(teacher.flatten(0, 1), teacher_weight, valid, self.temperature, self.group),
        )
        return (1 - self.alpha) * usual + self.alpha * divergence


class _Teacher(NamedTuple):
    """What the model is compared with."""

    states: Tensor
    """`(tokens, its hidden)`."""
    weight: Tensor
    valid: Tensor
    """`(tokens,)` bool: which have a loss."""
    temperature: float
    group: Group | None


class _Divergence(torch.autograd.Function):
    """T² KL(teacher || model) at temperature T, summed over valid tokens; gradients are made in the forward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, other: _Teacher) -> Tensor:
        """Compute the sum over x `(tokens, hidden)`, and keep the gradients."""
        group, temperature = other.group, other.temperature
        compute = torch.promote_types(x.dtype, torch.float32)
        total = x.new_zeros((), dtype=compute)
        grad_x, grad_weight = torch.empty_like(x), torch.zeros_like(weight, dtype=compute)
        for start in range(0, x.shape[0], CHUNK):
            part = slice(start, start + CHUNK)
            own = _log_softmax((x[part] @ weight.T).to(compute) / temperature, group)
            theirs = _log_softmax((other.states[part] @ other.weight.T).to(compute) / temperature, group)
            likely = theirs.exp()
            is_valid = other.valid[part, None]
            total += ((likely * (theirs - own)).sum(1, keepdim=True) * is_valid).sum() * temperature**2
            gradient = ((own.exp() - likely) * temperature * is_valid).to(x.dtype)
            grad_x[part] = gradient @ weight
            grad_weight += gradient.T @ x[part]
        if group is not None:
            dist.all_reduce(total, group=group)
            dist.all_reduce(grad_x, group=group)
        ctx.save_for_backward(grad_x, grad_weight.to(weight.dtype))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Scale the kept gradients."""
        grad_x, grad_weight = ctx.saved_tensors
        return grad_x * grad, grad_weight * grad, None


def _log_softmax(logits: Tensor, group: Group | None) -> Tensor:
    """Return the logarithms of the probabilities of this rank's columns."""
    if group is None:
        return logits.log_softmax(-1)
    largest = logits.amax(-1, keepdim=True)
    dist.all_reduce(largest, dist.ReduceOp.MAX, group)
    sums = (logits - largest).exp().sum(-1, keepdim=True)
    dist.all_reduce(sums, group=group)
    return logits - largest - sums.log()
