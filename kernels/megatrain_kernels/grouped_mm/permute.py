"""Reordering of tokens by expert for `grouped_gemm`, and back, in PyTorch."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatrain_kernels.kernel import require, require_floating, require_one_device


class Permutation(NamedTuple):
    """Rows sorted by expert. A row stands for a token and one of its experts; ties keep the order of tokens."""

    order: Tensor
    """`(rows,)` int64: sorted row i is entry `order[i]` of the flattened `(tokens, k)` choices."""
    place: Tensor
    """`(tokens, k)` int64: where each choice went; the inverse of `order`."""
    group_sizes: Tensor
    """`(n_experts,)` int64: rows of each expert."""


def sort_by_expert(indices: Tensor, n_experts: int) -> Permutation:
    """Sort the choices `indices` `(tokens, k)` by expert, stably; nothing is copied to the host."""
    chosen, order = torch.sort(indices.reshape(-1), stable=True)
    place = torch.empty_like(order)
    place[order] = torch.arange(len(order), device=order.device)
    edges = torch.searchsorted(chosen, torch.arange(n_experts + 1, device=chosen.device))
    return Permutation(order, place.view(indices.shape), edges.diff())


class _Permute(torch.autograd.Function):
    """Gather of each token once for each of its choices, whose gradient is the same bits every time."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, place: Tensor) -> Tensor:
        """Gather the rows."""
        ctx.save_for_backward(place)
        return tokens[order // place.shape[1]]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        """Sum the gradients of a token's rows."""
        # A token's rows are summed in the order of its choices: always the same bits, which adding up a gather's
        # gradient on a GPU would not give.
        (place,) = ctx.saved_tensors
        return grads[0][place].sum(1), None, None


class _Unpermute(torch.autograd.Function):
    """Weighted sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, place: Tensor) -> Tensor:
        """Add up the rows, one choice of all tokens after the other."""
        ctx.save_for_backward(rows, weights, order, place)
        wide = torch.promote_types(rows.dtype, weights.dtype)
        total = rows.new_zeros(place.shape[0], rows.shape[1], dtype=wide)
        for slot in range(place.shape[1]):  # one at a time: all together would hold k times the tokens, wide
            total.addcmul_(rows[place[:, slot]], weights[:, slot, None])
        return total.to(rows.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None]:
        """Return the gradients of rows and weights."""
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
    """Repeat each token once for each of its experts, sorted by expert.

    Args:
        tokens: `(tokens, size)`. indices: `(tokens, k)` int64, the experts of each token, below `n_experts`.

    Returns:
        Rows `(tokens · k, size)`, and what `unpermute` and `grouped_gemm` need of the order.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    given = {"tokens": tokens, "indices": indices}
    fits = tokens.ndim == indices.ndim == 2 and tokens.shape[0] == indices.shape[0] and indices.shape[1] > 0
    require(fits, "tokens must be (tokens, size) and indices (tokens, k)", **given)
    require_floating(tokens=tokens)
    require(indices.dtype == torch.int64, "indices must be int64", indices=indices)
    require_one_device(**given)
    if n_experts < 1:
        raise ValueError(f"n_experts={n_experts}: must be 1 or more")
    permutation = sort_by_expert(indices, n_experts)
    return _Permute.apply(tokens, permutation.order, permutation.place), permutation


def unsort(rows: Tensor, permutation: Permutation) -> Tensor:
    """Put `rows` `(tokens · k, size)` from the order of `permute` back into that of the flattened choices.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    _check_rows(rows, permutation)
    place, order = permutation.place.view(-1), permutation.order.view(-1, 1)
    return _Permute.apply(rows, place, order)  # one permutation is the other's inverse


def unpermute(rows: Tensor, permutation: Permutation, weights: Tensor) -> Tensor:
    """Return the weighted sum of each token's rows, summed in the wider type of rows and weights.

    Args:
        rows: `(tokens · k, size)` in the order of `permute`. weights: `(tokens, k)`.

    Returns:
        `(tokens, size)` in the rows' type.

    Raises:
        ValueError: shapes, types or devices that do not fit.
    """
    _check_rows(rows, permutation)
    shape = tuple(permutation.place.shape)
    require(tuple(weights.shape) == shape, f"weights must be (tokens, k), here {shape}", weights=weights)
    require_floating(weights=weights)
    require_one_device(rows=rows, weights=weights)
    return _Unpermute.apply(rows, weights, permutation.order, permutation.place)


def _check_rows(rows: Tensor, permutation: Permutation) -> None:
    count = permutation.order.shape[0]
    fits = rows.ndim == 2 and rows.shape[0] == count
    require(fits, f"rows must be (tokens · k, size), here ({count}, size)", rows=rows)
    require_floating(rows=rows)
    require_one_device(rows=rows, order=permutation.order)
