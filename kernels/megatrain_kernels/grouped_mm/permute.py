"""Reordering of tokens by expert for `grouped_gemm`, and back."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatrain_kernels.grouped_mm.op import GROUPED_GEMM
from megatrain_kernels.kernel import require, require_floating, require_one_device, run_triton, select


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


@torch.library.custom_op("megatrain::spread_rows", mutates_args=())
def spread_rows_op(
    x: Tensor, order: Tensor, weights: Tensor | None, rows: Tensor | None, n_slots: int, path: str
) -> tuple[Tensor, Tensor]:
    """Return rows order // n_slots of x, times `weights`; with `rows` their products, as the gradient of weights."""
    options = {"weights": weights, "rows": rows}
    made: tuple[Tensor, Tensor] | None = run_triton(
        GROUPED_GEMM, path, "spread", x, order, n_slots, **options, kind=(x.dtype,)
    )
    if made is not None:
        return made
    out = x[order // n_slots]
    if weights is None:
        return out, x.new_empty(0)
    for_weights = weights.new_empty(0 if rows is None else weights.shape)
    if rows is not None:
        products = torch.linalg.vecdot(rows.to(weights.dtype), out.to(weights.dtype))
        for_weights.view(-1)[order] = products
    return (out * weights.reshape(-1)[order, None]).to(x.dtype), for_weights


@spread_rows_op.register_fake
def _fake_spread(
    x: Tensor, order: Tensor, weights: Tensor | None, rows: Tensor | None, *_: Any
) -> tuple[Tensor, Tensor]:
    given = x if weights is None else weights
    return x.new_empty(order.shape[0], x.shape[1]), given.new_empty(0 if rows is None else given.shape)


@torch.library.custom_op("megatrain::combine_rows", mutates_args=())
def combine_rows_op(rows: Tensor, place: Tensor, weights: Tensor | None, path: str) -> Tensor:
    """Return the sum of each token's rows, times `weights`, summed in the widest type."""
    made: Tensor | None = run_triton(
        GROUPED_GEMM, path, "combine", rows, place, weights=weights, kind=(rows.dtype,)
    )
    return _combined(rows, place, weights) if made is None else made


@combine_rows_op.register_fake
def _fake_combine(rows: Tensor, place: Tensor, *_: Any) -> Tensor:
    return rows.new_empty(place.shape[0], rows.shape[1])


def _combined(rows: Tensor, place: Tensor, weights: Tensor | None) -> Tensor:
    if weights is None:
        return rows[place].sum(1)
    wide = torch.promote_types(rows.dtype, weights.dtype)
    total = rows.new_zeros(place.shape[0], rows.shape[1], dtype=wide)
    for slot in range(place.shape[1]):  # one at a time: all together would hold k times the tokens, wide
        total.addcmul_(rows[place[:, slot]], weights[:, slot, None])
    return total.to(rows.dtype)


class _Permute(torch.autograd.Function):
    """Gather of each token once for each of its choices, whose gradient is the same bits every time."""

    @staticmethod
    def forward(ctx: Any, tokens: Tensor, order: Tensor, place: Tensor, path: str) -> Tensor:
        """Gather the rows."""
        ctx.save_for_backward(place)
        ctx.path = path
        if path == "torch":
            return tokens[order // place.shape[1]]
        rows: Tensor = spread_rows_op(tokens, order, None, None, place.shape[1], path)[0]
        return rows

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        """Sum the gradients of a token's rows."""
        # A token's rows are summed in the order of its choices: always the same bits, which adding up a gather's
        # gradient on a GPU would not give.
        (place,), (grad,) = ctx.saved_tensors, grads
        if ctx.path == "torch":
            return _combined(grad, place, None), None, None, None
        return combine_rows_op(grad, place, None, ctx.path), None, None, None


class _Unpermute(torch.autograd.Function):
    """Weighted sum of each token's rows."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, order: Tensor, place: Tensor, path: str) -> Tensor:
        """Add up the rows, one choice of all tokens after the other."""
        ctx.save_for_backward(rows, weights, order, place)
        ctx.path = path
        if path == "torch":
            return _combined(rows, place, weights)
        out: Tensor = combine_rows_op(rows, place, weights, path)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, None, None, None]:
        """Return the gradients of rows and weights."""
        (rows, weights, order, place), (grad,) = ctx.saved_tensors, grads
        k = place.shape[1]
        if ctx.path != "torch":
            for_rows, for_weights = spread_rows_op(grad, order, weights, rows, k, ctx.path)
            return for_rows, for_weights, None, None, None
        for_rows = (grad[order // k] * weights.reshape(-1)[order, None]).to(rows.dtype)
        for_weights = torch.empty_like(weights)
        for slot in range(k):
            for_weights[:, slot] = torch.linalg.vecdot(
                rows[place[:, slot]].to(weights.dtype), grad.to(weights.dtype)
            )
        return for_rows, for_weights, None, None, None


def permute(
    tokens: Tensor, indices: Tensor, n_experts: int, *, backend: str = "auto"
) -> tuple[Tensor, Permutation]:
    """Repeat each token once for each of its experts, sorted by expert.

    Args:
        tokens: `(tokens, size)`. indices: `(tokens, k)` int64, the experts of each token, below `n_experts`.

    Returns:
        Rows `(tokens · k, size)`, and what `unpermute` and `grouped_gemm` need of the order.

    Raises:
        ValueError: shapes, types or devices that do not fit, or no backend of that name.
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
    path = _path(backend, tokens)
    return _Permute.apply(tokens, permutation.order, permutation.place, path), permutation


def unsort(rows: Tensor, permutation: Permutation, *, backend: str = "auto") -> Tensor:
    """Put `rows` `(tokens · k, size)` from the order of `permute` back into that of the flattened choices.

    Raises:
        ValueError: shapes, types or devices that do not fit, or no backend of that name.
    """
    _check_rows(rows, permutation)
    place, order = permutation.place.view(-1), permutation.order.view(-1, 1)
    return _Permute.apply(rows, place, order, _path(backend, rows))  # one permutation is the other's inverse


def unpermute(rows: Tensor, permutation: Permutation, weights: Tensor, *, backend: str = "auto") -> Tensor:
    """Return the weighted sum of each token's rows, summed in the wider type of rows and weights.

    Args:
        rows: `(tokens · k, size)` in the order of `permute`. weights: `(tokens, k)`.

    Returns:
        `(tokens, size)` in the rows' type.

    Raises:
        ValueError: shapes, types or devices that do not fit, or no backend of that name.
    """
    _check_rows(rows, permutation)
    shape = tuple(permutation.place.shape)
    require(tuple(weights.shape) == shape, f"weights must be (tokens, k), here {shape}", weights=weights)
    require_floating(weights=weights)
    require_one_device(rows=rows, weights=weights)
    path = "torch" if weights.dtype == torch.float64 else _path(backend, rows)
    return _Unpermute.apply(rows, weights, permutation.order, permutation.place, path)


def _path(backend: str, rows: Tensor) -> str:
    """Return the path of a call, which is chosen as that of `grouped_gemm`."""
    path = select(GROUPED_GEMM, backend, rows)
    return "torch" if path == "reference" else path


def _check_rows(rows: Tensor, permutation: Permutation) -> None:
    count = permutation.order.shape[0]
    fits = rows.ndim == 2 and rows.shape[0] == count
    require(fits, f"rows must be (tokens · k, size), here ({count}, size)", rows=rows)
    require_floating(rows=rows)
    require_one_device(rows=rows, order=permutation.order)
