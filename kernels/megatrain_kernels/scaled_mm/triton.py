"""Triton kernel of the product of two scaled fp8 matrices."""

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatrain_kernels.backend import interpreting
from megatrain_kernels.jit_types import Number, Pointer, constexpr
from megatrain_kernels.scaled_mm.reference import tile_of


@triton.jit
def scaled_matmul_kernel(
    a: Pointer,  # (m_size, k_size)
    b: Pointer,  # (n_size, k_size)
    out: Pointer,  # (m_size, n_size), dense
    scale_a: Pointer,  # (), or (tiles down, tiles across) of a
    scale_b: Pointer,  # (), or (tiles down, tiles across) of b
    m_size: Number, n_size: Number, k_size: Number,
    a_row: Number, a_col: Number, b_row: Number, b_col: Number,  # strides
    scale_a_row: Number, scale_a_col: Number, scale_b_row: Number, scale_b_col: Number,
    A_ROWS: constexpr, B_ROWS: constexpr, GROUP: constexpr, UPCAST: constexpr,
    BLOCK_M: constexpr, BLOCK_N: constexpr, BLOCK_K: constexpr,
) -> None:  # fmt: skip
    """Compute a tile of out = (a · scale_a) (b · scale_b)ᵀ.

    A scale holds for GROUP columns, and for A_ROWS and B_ROWS rows.

    Tensor cores sum fp8 products in fewer bits than float32 has on some GPUs, so each BLOCK_K columns have a sum of
    their own, which is scaled and added in float32 (DeepSeek-V3, arXiv 2412.19437, section 3.3.2).
    """
    col_tiles = tl.cdiv(n_size, BLOCK_N)
    rows = ((tl.program_id(0) // col_tiles) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    cols = ((tl.program_id(0) % col_tiles) * BLOCK_N + tl.arange(0, BLOCK_N)).to(tl.int64)
    inner = tl.arange(0, BLOCK_K)
    here, there = rows < m_size, cols < n_size
    a_at = a + rows[:, None] * a_row + inner[None, :] * a_col
    b_at = b + cols[None, :] * b_row + inner[:, None] * b_col
    scale_a_at = scale_a + (rows // A_ROWS) * scale_a_row
    scale_b_at = scale_b + (cols // B_ROWS) * scale_b_row
    total = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k in range(0, k_size, BLOCK_K):
        known = inner < k_size - k
        left = tl.load(a_at, mask=here[:, None] & known[None, :], other=0.0)
        right = tl.load(b_at, mask=known[:, None] & there[None, :], other=0.0)
        if UPCAST:  # the interpreter's own products of fp8 round
            left, right = left.to(tl.float32), right.to(tl.float32)
        by_row = tl.load(scale_a_at + (k // GROUP) * scale_a_col, mask=here, other=0.0)
        by_col = tl.load(scale_b_at + (k // GROUP) * scale_b_col, mask=there, other=0.0)
        total += tl.dot(left, right, input_precision="ieee") * (by_row[:, None] * by_col[None, :])
        a_at += BLOCK_K * a_col
        b_at += BLOCK_K * b_col
    at = out + rows[:, None] * n_size + cols[None, :]
    tl.store(at, total.to(out.dtype.element_ty), mask=here[:, None] & there[None, :])


def block_k(group_size: int) -> int:
    """Return how many columns are taken at a time: the most, up to 128, of which a group has a whole number."""
    return math.gcd(group_size, 128)


def _constants() -> dict[str, Any]:
    """Choose the sizes of blocks (not tuned)."""
    if interpreting():
        return {"UPCAST": True, "BLOCK_M": 16, "BLOCK_N": 32}
    return {"UPCAST": False, "BLOCK_M": 128, "BLOCK_N": 128, "num_warps": 8, "num_stages": 3}


def scaled_matmul(
    a: Tensor, b: Tensor, scale_a: Tensor, scale_b: Tensor, out_dtype: torch.dtype, group_size: int
) -> Tensor:
    """Return what `reference.scaled_matmul_reference` returns, for operands of any strides."""
    if not interpreting():  # tensor cores read fp8 along k
        a, b = a.contiguous(), b.contiguous()
    (m, k), n = a.shape, b.shape[0]
    out = a.new_empty(m, n, dtype=out_dtype)
    constants, numbers = _constants(), [m, n, k, *a.stride(), *b.stride()]
    for name, x, scale in (("A_ROWS", a, scale_a), ("B_ROWS", b, scale_b)):
        rows, cols = tile_of(x.shape, scale.shape, group_size)
        strides = scale.stride() if scale.ndim else (0, 0)
        numbers += [strides[0], strides[1] if cols == group_size else 0]
        constants[name] = rows if rows in (1, group_size) else 1  # one scale for all has no strides
    grid = (triton.cdiv(m, constants["BLOCK_M"]) * triton.cdiv(n, constants["BLOCK_N"]),)
    constants |= {"GROUP": group_size, "BLOCK_K": block_k(group_size)}
    scaled_matmul_kernel[grid](a, b, out, scale_a, scale_b, *numbers, **constants)
    return out
