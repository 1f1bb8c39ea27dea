"""Triton kernels of grouped products, and of the order of tokens that they need.

Of a product one program makes a tile, and finds its group from the sizes on the device. Of rows one program moves or
sums a row, in float32 and in the order of a token's choices: the same bits every time.
"""

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


@triton.jit(do_not_specialize=["n_slots"])
def spread_kernel(
    x: Pointer,  # (tokens, size)
    weights: Pointer,  # (tokens, n_slots), dense, if WEIGHTED
    placed: Pointer,  # (tokens * n_slots, size), if GRADIENT
    order: Pointer,  # (tokens * n_slots,), dense
    out: Pointer,  # as placed, dense
    grad_weights: Pointer,  # as weights, dense, if GRADIENT
    x_step: Number, placed_step: Number,  # strides of rows
    size: Number, n_slots: Number,
    WEIGHTED: constexpr, GRADIENT: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Copy a token's row to one of its places, times its weight; GRADIENT: multiply it with the row there, summed."""
    index = tl.program_id(0).to(tl.int64)
    choice = tl.load(order + index)
    source = x + choice // n_slots * x_step
    factor = 1.0
    if WEIGHTED:
        factor = tl.load(weights + choice).to(tl.float32)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, size, BLOCK):
        columns = start + tl.arange(0, BLOCK)
        known = columns < size
        wide = tl.load(source + columns, mask=known, other=0.0).to(tl.float32)
        tl.store(out + index * size + columns, (wide * factor).to(out.dtype.element_ty), mask=known)
        if GRADIENT:
            total += wide * tl.load(placed + index * placed_step + columns, mask=known, other=0.0).to(
                tl.float32
            )
    if GRADIENT:
        tl.store(grad_weights + choice, tl.sum(total, 0).to(grad_weights.dtype.element_ty))


@triton.jit
def combine_kernel(
    placed: Pointer,  # (tokens * n_slots, size)
    weights: Pointer,  # (tokens, n_slots), dense, if WEIGHTED
    place: Pointer,  # (tokens, n_slots), dense
    out: Pointer,  # (tokens, size), dense
    placed_step: Number,  # stride of rows
    size: Number, n_slots: Number,
    WEIGHTED: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Sum a token's rows, each times its weight, in one block of columns."""
    token = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = columns < size
    total = tl.zeros((BLOCK,), tl.float32)
    for slot in range(0, n_slots):
        row = tl.load(place + token * n_slots + slot)
        part = tl.load(placed + row * placed_step + columns, mask=known, other=0.0).to(tl.float32)
        if WEIGHTED:
            part = part * tl.load(weights + token * n_slots + slot).to(tl.float32)
        total += part
    tl.store(out + token * size + columns, total.to(out.dtype.element_ty), mask=known)


def spread(
    x: Tensor, order: Tensor, n_slots: int, *, weights: Tensor | None = None, rows: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Return row order[i] // n_slots of x `(tokens, size)` for each i, times entry order[i] of `weights`.

    With `rows` `(tokens · n_slots, size)` also the products of x's rows with them, as `weights`; else no elements.
    """
    x, size = _dense_rows(x), x.shape[1]
    out = x.new_empty(len(order), size)
    given = x if weights is None else weights.contiguous()
    known = x if rows is None else _dense_rows(rows)
    grad_weights = given.new_empty(0 if rows is None else given.shape)
    if len(order):
        tensors = (x, given, known, order, out, grad_weights)
        flags = {"WEIGHTED": weights is not None, "GRADIENT": rows is not None, **_row_block(size)}
        spread_kernel[(len(order),)](*tensors, x.stride(0), known.stride(0), size, n_slots, **flags)
    return out, grad_weights


def combine(rows: Tensor, place: Tensor, *, weights: Tensor | None = None) -> Tensor:
    """Return the sum of the rows `place` `(tokens, n_slots)` of each token, times `weights`; `(tokens, size)`."""
    rows, (tokens, n_slots), size = _dense_rows(rows), place.shape, rows.shape[1]
    out = rows.new_empty(tokens, size)
    if out.numel():
        given = rows if weights is None else weights.contiguous()
        flags = {"WEIGHTED": weights is not None, **_row_block(size)}
        grid = (tokens, triton.cdiv(size, flags["BLOCK"]))
        combine_kernel[grid](rows, given, place, out, rows.stride(0), size, n_slots, **flags)
    return out


def _dense_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _row_block(size: int) -> dict[str, int]:
    """Choose 8 elements a thread: loads of 16 bytes in bf16."""
    block = 64 if interpreting() else min(2048, max(256, triton.next_power_of_2(size)))
    return {"BLOCK": block, "num_warps": max(1, block // 256)}
