"""Tokens to the order of their experts, and back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class Permutation(NamedTuple):
    """Rows sorted by expert. A row stands for a token and one of its experts; ties keep the order of tokens."""

    order: Tensor
    """`(rows,)` int64: sorted row i is entry `order[i]` of the flattened `(tokens, k)` choices."""
    place: Tensor
    """`(tokens, k)` int64: where each choice went; the inverse of `order`."""
    group_sizes: Tensor
    """`(n_experts,)` int64: rows of each expert."""


def sort_by_expert(indices: Tensor, n_experts: int) -> Permutation:
    """The stable order by expert of the choices `indices` `(tokens, k)`; nothing is copied to the host."""
    chosen, order = torch.sort(indices.reshape(-1), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    edges = torch.searchsorted(chosen, torch.arange(n_experts + 1, device=chosen.device))
    return Permutation(order, place.view(indices.shape), edges.diff())


class _Permute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(place)
        return tokens[order // place.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        # A token's rows are summed in the order of its choices: always the same bits, which adding up a gather's
        # gradient on a GPU would not give.
        (place,) = ctx.saved_tensors
        return grads[0][place].sum(1), None, None


class _Unpermute(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
        ctx.save_for_backward(rows, weights, order, place)
        wide = torch.promote_types(rows.dtype, weights.dtype)
        total = rows.new_zeros(place.shape[0], rows.shape[1], dtype=wide)
        for slot in range(place.shape[1]):  # one at a time: all together would hold k times the tokens, wide
            total.addcmul_(rows[place[:, slot]], weights[:, slot, None])
        return total.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        rows, weights, order, place = ctx.saved_tensors
        grad, k = grads[0], place.shape[1]
        for_rows = (grad[order // k] * weights.reshape(-1)[order, None]).to(rows.dtype)
        for_weights = torch.empty_like(weights)
        for slot in range(k):
            for_weights[:, slot] = torch.linalg.vecdot(
                rows[place[:, slot]].to(weights.dtype), grad.to(weights.dtype)
            )
        return for_rows, for_weights, None, None


def permute(tokens: Tensor, indices: Tensor, n_experts: int) -> tuple[Tensor, Permutation]:
    """Each token once for each of its experts, sorted by expert.

    Args:
        tokens: `(tokens, size)`. indices: `(tokens, k)` int64, the experts of each token, below `n_experts`.

    Returns:
        Rows `(tokens · k, size)`, and what `unpermute` and `grouped_gemm` need of the order.
    """
    permutation = sort_by_expert(indices, n_experts)
    return _Permute.apply(tokens, permutation.order, permutation.place), permutation


def unsort(rows: Tensor, permutation: Permutation) -> Tensor:
    """`rows` `(tokens · k, size)` in the order of `permute` back in that of the flattened choices."""
    place, order = permutation.place.view(-1), permutation.order.view(-1, 1)
    return _Permute.apply(rows, place, order)  # one permutation is the other's inverse


def unpermute(rows: Tensor, permutation: Permutation, weights: Tensor) -> Tensor:
    """The weighted sum of each token's rows; the sum is made in the wider of both types.

    Args:
        rows: `(tokens · k, size)` in the order of `permute`. weights: `(tokens, k)`.

    Returns:
        `(tokens, size)` in the rows' type.
    """
    return _Unpermute.apply(rows, weights, permutation.order, permutation.place)
