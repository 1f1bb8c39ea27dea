"""Differentiable collectives: each is the other's backward pass.

A rank's gradients are those of the loss that all ranks of the group share, so a sum in the forward pass is a copy in
the backward pass, and vice versa (Megatron-LM's f and g, arXiv 1909.08053, section 3; with sequence
parallelism gather and scatter, arXiv 2205.05198, section 4.2).
"""

from typing import Any

import torch
from torch import Tensor
from torch import distributed as dist

Group = dist.ProcessGroup
# torch 2.13 renamed both; the old names still work, with a warning.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


def gather(x: Tensor, dim: int, group: Group) -> Tensor:
    """Concatenate every rank's `x` along `dim`, in the order of ranks."""
    size = group.size()
    gathered = x.new_empty(size, *x.shape)
    _all_gather(gathered.view(size * x.shape[0], *x.shape[1:]), x.contiguous(), group=group)
    return torch.cat(gathered.unbind(0), dim) if dim else gathered.flatten(0, 1)


def reduce_scatter(x: Tensor, dim: int, group: Group) -> Tensor:
    """Sum all ranks' `x` and return this rank's part along `dim`."""
    size = group.size()
    stacked = torch.stack(x.chunk(size, dim)) if dim else x.contiguous().unflatten(0, (size, -1))
    part = torch.empty_like(stacked[0])
    _reduce_scatter(part, stacked.flatten(0, 1), group=group)
    return part


def own_part(x: Tensor, dim: int, group: Group) -> Tensor:
    """Return this rank's part of `x` along `dim`."""
    return x.chunk(group.size(), dim)[group.rank()].contiguous()


class _Gather(torch.autograd.Function):
    """All-gather in forward; in backward reduce-scatter, or a slice if the gradient is `shared` already."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group, shared: bool) -> Tensor:
        ctx.dim, ctx.group, ctx.shared = dim, group, shared
        return gather(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        take = own_part if ctx.shared else reduce_scatter
        return take(grads[0], ctx.dim, ctx.group), None, None, None


class _ReduceScatter(torch.autograd.Function):
    """Reduce-scatter in forward; all-gather of the gradient in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, dim: int, group: Group) -> Tensor:
        ctx.dim, ctx.group = dim, group
        return reduce_scatter(x, dim, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        return gather(grads[0], ctx.dim, ctx.group), None, None


class _Sum(torch.autograd.Function):
    """All-reduce in forward; identity in backward (Megatron-LM's g)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        total = x.contiguous().clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


class _Exchange(torch.autograd.Function):
    """All-to-all along a leading dimension of the group's size, in forward and in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        out = torch.empty_like(x, memory_format=torch.contiguous_format)
        dist.all_to_all_single(out, x.contiguous(), group=group)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        grad = torch.empty_like(grads[0], memory_format=torch.contiguous_format)
        dist.all_to_all_single(grad, grads[0].contiguous(), group=ctx.group)
        return grad, None


class _ExchangeRows(torch.autograd.Function):
    """All-to-all of uneven runs of rows; in backward the gradients of rows return to where they came from."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
        ctx.sent, ctx.received, ctx.group = sent, received, group
        return _send_rows(x, sent, received, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        return _send_rows(grads[0], ctx.received, ctx.sent, ctx.group), None, None, None


def _send_rows(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    out = x.new_empty(sum(received), *x.shape[1:])
    dist.all_to_all_single(out, x.contiguous(), received, sent, group=group)
    return out


class _Shift(torch.autograd.Function):
    """Send to the next rank of the ring and receive from the previous one; the reverse in backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return _send_around(x, 1, group)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return _send_around(grads[0], -1, ctx.group), None


def _send_around(x: Tensor, step: int, group: Group) -> Tensor:
    size, rank = group.size(), group.rank()
    out = torch.empty_like(x, memory_format=torch.contiguous_format)
    operations = [
        dist.P2POp(dist.isend, x.contiguous(), group=group, group_peer=(rank + step) % size),
        dist.P2POp(dist.irecv, out, group=group, group_peer=(rank - step) % size),
    ]
    for work in dist.batch_isend_irecv(operations):
        work.wait()
    return out


def gather_from(x: Tensor, dim: int, group: Group) -> Tensor:
    """All-gather `x` along `dim`; each rank's gradient of the result is its share, so they are reduce-scattered."""
    out: Tensor = _Gather.apply(x, dim, group, False)
    return out


def gather_shared(x: Tensor, dim: int, group: Group) -> Tensor:
    """All-gather `x` along `dim`, for a computation whose gradient is already summed over the group."""
    out: Tensor = _Gather.apply(x, dim, group, True)
    return out


def scatter_sum(x: Tensor, dim: int, group: Group) -> Tensor:
    """Reduce-scatter `x` along `dim`: return this rank's part of the sum of all ranks' `x`."""
    out: Tensor = _ReduceScatter.apply(x, dim, group)
    return out


def sum_over(x: Tensor, group: Group) -> Tensor:
    """All-reduce `x`; every rank computes the same from the sum, so the gradient passes through unchanged."""
    out: Tensor = _Sum.apply(x, group)
    return out


def exchange(x: Tensor, group: Group) -> Tensor:
    """Exchange the parts of `x` `(group size, ...)`: part i goes to rank i, and rank i's part comes back at i."""
    out: Tensor = _Exchange.apply(x, group)
    return out


def exchange_rows(x: Tensor, sent: list[int], received: list[int], group: Group) -> Tensor:
    """Exchange rows: the first `sent[0]` of `x` go to rank 0, the next `sent[1]` to rank 1, and so on.

    Returns `(sum(received), ...)`: the `received[0]` rows from rank 0 first. A rank's `received` is what others send.
    """
    out: Tensor = _ExchangeRows.apply(x, sent, received, group)
    return out


def shift(x: Tensor, group: Group) -> Tensor:
    """Return the `x` of the previous rank in the ring."""
    out: Tensor = _Shift.apply(x, group)
    return out
