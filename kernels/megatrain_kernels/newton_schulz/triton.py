"""Triton kernel of α · X Xᵀ + β · X, which computes half of it since the result is symmetric.

Each program makes one block on or below the diagonal and stores it again, transposed, above. So the two products
of a Newton-Schulz iteration that give symmetric matrices, the Gram matrix and the polynomial of it, cost half of their
FLOPs.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatrain_kernels.backend import interpreting
from megatrain_kernels.jit_types import Number, Pointer, constexpr


@triton.jit
def symmetric_kernel(
    x: Pointer,  # (batch, rows, inner)
    out: Pointer,  # (batch, rows, rows), dense
    rows: Number, inner: Number,
    x_batch: Number, x_row: Number, x_column: Number,  # strides
    alpha: Number, beta: Number, ADDED: constexpr, BLOCK: constexpr, DEPTH: constexpr,
) -> None:  # fmt: skip
    """Compute the block (program 0, program 1) of matrix number program 2."""
    down, right = tl.program_id(0), tl.program_id(1)
    if right <= down:
        matrix = tl.program_id(2).to(tl.int64)
        base = x + matrix * x_batch
        i = down * BLOCK + tl.arange(0, BLOCK)
        j = right * BLOCK + tl.arange(0, BLOCK)
        total = tl.zeros((BLOCK, BLOCK), tl.float32)
        for start in range(0, inner, DEPTH):
            k = start + tl.arange(0, DEPTH)
            left = tl.load(
                base + i[:, None] * x_row + k[None, :] * x_column,
                mask=(i[:, None] < rows) & (k[None, :] < inner), other=0.0,
            )  # fmt: skip
            other = tl.load(
                base + k[:, None] * x_column + j[None, :] * x_row,
                mask=(k[:, None] < inner) & (j[None, :] < rows), other=0.0,
            )  # fmt: skip
            total = tl.dot(left, other, total, input_precision="ieee")
        total = total * alpha
        known = (i[:, None] < rows) & (j[None, :] < rows)
        if ADDED:
            own = tl.load(base + i[:, None] * x_row + j[None, :] * x_column, mask=known, other=0.0)
            total += beta * own.to(tl.float32)
        made = total.to(out.dtype.element_ty)
        square = out + matrix * rows * rows
        tl.store(square + i[:, None] * rows + j[None, :], made, mask=known)
        if right < down:
            mirrored = (j[:, None] < rows) & (i[None, :] < rows)
            tl.store(square + j[:, None] * rows + i[None, :], tl.trans(made), mask=mirrored)


def symmetric_product(x: Tensor, *, alpha: float = 1.0, beta: float = 0.0) -> Tensor:
    """Return α · x xᵀ + β · x of each matrix of x `(batch, rows, inner)`; with β, x is square and symmetric itself."""
    batch, rows, inner = x.shape
    out = x.new_empty(batch, rows, rows)
    block, depth = (16, 16) if interpreting() else (128 if rows > 64 else 64, 64)
    if out.numel():
        blocks = triton.cdiv(rows, block)
        symmetric_kernel[(blocks, blocks, batch)](
            x, out, rows, inner, *x.stride(), alpha, beta,
            ADDED=beta != 0.0, BLOCK=block, DEPTH=depth, num_warps=8 if block == 128 else 4,
        )  # fmt: skip
    return out


def iterate(x: Tensor, coefficients: tuple[float, float, float], steps: int) -> Tensor:
    """Iterate the polynomial `steps` times on x `(batch, rows, cols)` with rows <= cols."""
    a, b, c = coefficients
    for _ in range(steps):
        gram = symmetric_product(x)
        x = torch.baddbmm(x, symmetric_product(gram, alpha=c, beta=b), x, beta=a)
    return x
