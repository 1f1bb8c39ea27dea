"""Triton kernels of grouped products: one program makes a tile, and finds its group from the sizes on the device."""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatrain_kernels.backend import interpreting
from megatrain_kernels.jit_types import Number, Pointer, constexpr


@triton.jit
def rows_kernel(
    x: Pointer,  # (tokens, in_size)
    w: Pointer,  # (n_groups, out_size, in_size)
    out: Pointer,  # (tokens, out_size), dense
    sizes: Pointer,  # (n_groups,)
    tokens: Number, n_groups: Number, in_size: Number, out_size: Number,
    x_row: Number, x_col: Number, w_group: Number, w_out: Number, w_in: Number,  # strides
    GROUPS: constexpr,  # a power of two, at least n_groups
    PRECISION: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
) -> None:  # fmt: skip
    """Compute a tile of out_g = x_g w_gᵀ; a tile past the last group does nothing."""
    col_tiles = tl.cdiv(out_size, BLOCK_N)
    tile, col_tile = tl.program_id(0) // col_tiles, tl.program_id(0) % col_tiles
    g = tl.arange(0, GROUPS)
    size = tl.load(sizes + g, mask=g < n_groups, other=0)
    tiles = (size + BLOCK_M - 1) // BLOCK_M
    last_tile, last_row = tl.cumsum(tiles, 0), tl.cumsum(size, 0)
    group = tl.sum((last_tile <= tile).to(tl.int64), 0)
    if group < n_groups:
        own = g == group
        end = tl.sum(tl.where(own, last_row, 0), 0)
        end = tl.minimum(end, tokens)  # never beyond x, whatever the sizes are
        first_tile = tl.sum(tl.where(own, last_tile - tiles, 0), 0)
        start = tl.sum(tl.where(own, last_row - size, 0), 0) + (tile - first_tile) * BLOCK_M
        rows = start + tl.arange(0, BLOCK_M)
        cols = col_tile * BLOCK_N + tl.arange(0, BLOCK_N)
        inner = tl.arange(0, BLOCK_K)
        x_at = x + rows[:, None] * x_row + inner[None, :] * x_col
        w_at = w + group * w_group + cols[None, :].to(tl.int64) * w_out + inner[:, None] * w_in
        here, there = rows < end, cols < out_size
        total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
        for k in range(0, in_size, BLOCK_K):
            known = inner < in_size - k
            a = tl.load(x_at, mask=here[:, None] & known[None, :], other=0.0)
            b = tl.load(w_at, mask=known[:, None] & there[None, :], other=0.0)
            total = tl.dot(a, b, total, input_precision=PRECISION)
            x_at += BLOCK_K * x_col
            w_at += BLOCK_K * w_in
        at = out + rows[:, None] * out_size + cols[None, :]
        tl.store(at, total.to(out.dtype.element_ty), mask=here[:, None] & there[None, :])


@triton.jit
def outer_kernel(
    a: Pointer,  # (tokens, m_size)
    b: Pointer,  # (tokens, n_size)
    out: Pointer,  # (n_groups, m_size, n_size), dense
    sizes: Pointer,  # (n_groups,)
    tokens: Number, n_groups: Number, m_size: Number, n_size: Number,
    a_row: Number, a_col: Number, b_row: Number, b_col: Number,  # strides
    GROUPS: constexpr,  # a power of two, at least n_groups
    PRECISION: constexpr, BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
) -> None:  # fmt: skip
    """Compute a tile of out_g = a_gᵀ b_g; the sum runs over the group's rows, BLOCK_K at a time, in order."""
    col_tiles = tl.cdiv(n_size, BLOCK_N)
    per_group = tl.cdiv(m_size, BLOCK_M) * col_tiles
    group, tile = (tl.program_id(0) // per_group).to(tl.int64), tl.program_id(0) % per_group
    g = tl.arange(0, GROUPS)
    size = tl.load(sizes + g, mask=g < n_groups, other=0)
    start = tl.sum(tl.where(g < group, size, 0), 0)
    count = tl.sum(tl.where(g == group, size, 0), 0)
    count = tl.minimum(count, tokens - start)  # never beyond a and b, whatever the sizes are
    m = tile // col_tiles * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tile % col_tiles * BLOCK_N + tl.arange(0, BLOCK_N)
    inner = tl.arange(0, BLOCK_K)
    a_at = a + (start + inner[None, :]) * a_row + m[:, None] * a_col
    b_at = b + (start + inner[:, None]) * b_row + n[None, :] * b_col
    here, there = m < m_size, n < n_size
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, count, BLOCK_K):
        known = inner < count - k
        left = tl.load(a_at, mask=here[:, None] & known[None, :], other=0.0)
        right = tl.load(b_at, mask=known[:, None] & there[None, :], other=0.0)
        total = tl.dot(left, right, total, input_precision=PRECISION)
        a_at += BLOCK_K * a_row
        b_at += BLOCK_K * b_row
    at = out + group * m_size * n_size + m[:, None].to(tl.int64) * n_size + n[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=here[:, None] & there[None, :])


def _constants(x: Tensor, n_groups: int) -> dict[str, Any]:
    """Choose the sizes of blocks (not tuned), and exact products in float32."""
    found: dict[str, Any] = {"GROUPS": triton.next_power_of_2(n_groups)}
    found["PRECISION"] = "ieee" if x.dtype == torch.float32 else "tf32"  # irrelevant in 16 bits
    if interpreting():
        return found | {"BLOCK_M": 16, "BLOCK_N": 32, "BLOCK_K": 16}
    if x.itemsize == 4:
        return found | {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "num_warps": 4, "num_stages": 2}
    return found | {"BLOCK_M": 128, "BLOCK_N": 128, "BLOCK_K": 64, "num_warps": 8, "num_stages": 3}


def rows_product(x: Tensor, weights: Tensor, group_sizes: Tensor) -> Tensor:
    """Return x_g weights_gᵀ: x `(tokens, in)`, weights `(groups, out, in)`, any strides; `(tokens, out)`."""
    (tokens, in_size), (n_groups, out_size, _) = x.shape, weights.shape
    out = x.new_empty(tokens, out_size)
    constants = _constants(x, n_groups)
    block_m = min(constants["BLOCK_M"], max(16, triton.next_power_of_2(tokens // n_groups)))
    constants["BLOCK_M"] = block_m
    row_tiles = tokens // block_m + n_groups  # each group may have one tile that is not full
    grid = (row_tiles * triton.cdiv(out_size, constants["BLOCK_N"]),)
    if tokens:
        numbers = (tokens, n_groups, in_size, out_size, *x.stride(), *weights.stride())
        rows_kernel[grid](x, weights, out, group_sizes, *numbers, **constants)
    return out


def outer_product(a: Tensor, b: Tensor, group_sizes: Tensor) -> Tensor:
    """Return a_gᵀ b_g: `(tokens, m)` and `(tokens, n)`, any strides; `(groups, m, n)`, 0 for an empty group."""
    n_groups, m_size, n_size = len(group_sizes), a.shape[1], b.shape[1]
    out = a.new_empty(n_groups, m_size, n_size)
    constants = _constants(a, n_groups)
    tiles = triton.cdiv(m_size, constants["BLOCK_M"]) * triton.cdiv(n_size, constants["BLOCK_N"])
    numbers = (a.shape[0], n_groups, m_size, n_size, *a.stride(), *b.stride())
    outer_kernel[(n_groups * tiles,)](a, b, out, group_sizes, *numbers, **constants)
    return out
