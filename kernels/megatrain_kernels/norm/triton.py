"""RMSNorm and LayerNorm of rows as Triton kernels: one program a row forward, one for several rows backward.

A row is read once and stays in registers. Gradients of weight and bias are summed over a program's rows there and over
programs afterwards, so they are the same bits every time.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatrain_kernels.backend import interpreting
from megatrain_kernels.jit_types import Number, Pointer, constexpr

PROGRAMS_A_PROCESSOR = 4


class Normed(NamedTuple):
    """What the forward pass makes."""

    out: Tensor
    total: Tensor
    """x + residual (no elements without a residual)."""
    mean: Tensor
    """Mean of each row, float32 (no elements for RMSNorm)."""
    inverse: Tensor
    """1 / root mean square, or 1 / standard deviation, of each row; float32."""


@triton.jit
def forward_kernel(
    x: Pointer,  # (rows, size)
    residual: Pointer,  # (rows, size)
    weight: Pointer,  # (size,)
    bias: Pointer,  # (size,)
    out: Pointer,  # (rows, size), dense
    total: Pointer,  # (rows, size), dense
    mean: Pointer,  # (rows,)
    inverse: Pointer,  # (rows,)
    x_step: Number, residual_step: Number,  # strides of rows
    size: Number, eps: Number,
    CENTERED: constexpr, BIASED: constexpr, ADDED: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Normalize one row. Later layers see x + residual as it is stored, so the norm is taken of that."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    known = columns < size
    wide = tl.load(x + row * x_step + columns, mask=known, other=0.0).to(tl.float32)
    if ADDED:
        wide += tl.load(residual + row * residual_step + columns, mask=known, other=0.0).to(tl.float32)
        stored = wide.to(total.dtype.element_ty)
        tl.store(total + row * size + columns, stored, mask=known)
        wide = stored.to(tl.float32)
    if CENTERED:
        centre = tl.sum(wide, 0) / size
        tl.store(mean + row, centre)
        wide = tl.where(known, wide - centre, 0.0)
    scale = 1.0 / tl.sqrt(tl.sum(wide * wide, 0) / size + eps)
    tl.store(inverse + row, scale)
    made = wide * scale * tl.load(weight + columns, mask=known, other=0.0).to(tl.float32)
    if BIASED:
        made += tl.load(bias + columns, mask=known, other=0.0).to(tl.float32)
    tl.store(out + row * size + columns, made.to(out.dtype.element_ty), mask=known)


@triton.jit
def backward_kernel(
    grad: Pointer,  # (rows, size)
    grad_total: Pointer,  # (rows, size)
    x: Pointer,  # (rows, size), what was normalized
    weight: Pointer,  # (size,)
    mean: Pointer,  # (rows,)
    inverse: Pointer,  # (rows,)
    grad_x: Pointer,  # (rows, size), dense
    weight_parts: Pointer,  # (programs, size)
    bias_parts: Pointer,  # (programs, size)
    grad_step: Number, total_step: Number, x_step: Number,  # strides of rows
    rows: Number, size: Number, rows_each: Number,
    CENTERED: constexpr, BIASED: constexpr, ADDED: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Compute the gradients of `rows_each` rows, and these rows' parts of the gradients of weight and bias.

    With n the normalized row and g = grad · weight: dx = (g - n·mean(g·n) - mean(g)) · inverse, the last mean for
    LayerNorm only.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    known = columns < size
    factor = tl.load(weight + columns, mask=known, other=0.0).to(tl.float32)
    for_weight = tl.zeros((BLOCK,), tl.float32)
    for_bias = tl.zeros((BLOCK,), tl.float32)
    for number in range(0, rows_each):
        row = program * rows_each + number
        here = columns < tl.where(row < rows, size, 0)  # nothing past the last row
        above = tl.load(grad + row * grad_step + columns, mask=here, other=0.0).to(tl.float32)
        normed = tl.load(x + row * x_step + columns, mask=here, other=0.0).to(tl.float32)
        existing = tl.minimum(row, rows - 1)
        scale = tl.load(inverse + existing)
        if CENTERED:
            centre = tl.load(mean + existing)
            normed = tl.where(here, normed - centre, 0.0)
        normed = normed * scale
        inner = above * factor
        made = inner - normed * (tl.sum(inner * normed, 0) / size)
        if CENTERED:
            made -= tl.sum(inner, 0) / size
        made = made * scale
        if ADDED:
            made += tl.load(grad_total + row * total_step + columns, mask=here, other=0.0).to(tl.float32)
        tl.store(grad_x + row * size + columns, made.to(grad_x.dtype.element_ty), mask=here)
        for_weight += above * normed
        for_bias += above
    tl.store(weight_parts + program * size + columns, for_weight, mask=known)
    if BIASED:
        tl.store(bias_parts + program * size + columns, for_bias, mask=known)


def normalize(
    x: Tensor, residual: Tensor | None, weight: Tensor, bias: Tensor | None, eps: float, *, centered: bool
) -> Normed:
    """Normalize x + residual `(rows, size)` with weight and bias `(size,)`; `centered` means LayerNorm."""
    x, residual = _rows(x), None if residual is None else _rows(residual)
    rows, size = x.shape
    total = x.new_empty(x.shape if residual is not None else 0)
    mean = x.new_empty(rows if centered else 0, dtype=torch.float32)
    made = Normed(x.new_empty(x.shape), total, mean, x.new_empty(rows, dtype=torch.float32))
    if rows:
        optional = (x if residual is None else residual, weight, weight if bias is None else bias)
        steps = (x.stride(0), 0 if residual is None else residual.stride(0), size)
        flags = {"CENTERED": centered, "BIASED": bias is not None, "ADDED": residual is not None}
        forward_kernel[(rows,)](x, *optional, *made, *steps, eps, **flags, **_block(size))
    return made


def gradients(
    grad: Tensor,
    grad_total: Tensor | None,
    x: Tensor,
    weight: Tensor,
    mean: Tensor,
    inverse: Tensor,
    *,
    centered: bool,
    biased: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of x, weight and bias (no elements if there is no bias); x is what was normalized."""
    grad, x = _rows(grad), _rows(x)
    above = None if grad_total is None else _rows(grad_total)
    rows, size = x.shape
    programs = min(rows, _processors(x) * PROGRAMS_A_PROCESSOR)
    grad_x = x.new_empty(x.shape)
    parts = weight.new_empty(programs, size, dtype=torch.float32)
    bias_parts = parts.new_empty(parts.shape if biased else 0)
    if rows:
        rows_each = triton.cdiv(rows, programs)
        programs = triton.cdiv(rows, rows_each)
        parts, bias_parts = parts[:programs], bias_parts[:programs]
        tensors = (
            grad,
            grad if above is None else above,
            x,
            weight,
            mean,
            inverse,
            grad_x,
            parts,
            bias_parts,
        )
        steps = (grad.stride(0), 0 if above is None else above.stride(0), x.stride(0), rows, size, rows_each)
        flags = {"CENTERED": centered, "BIASED": biased, "ADDED": above is not None}
        backward_kernel[(programs,)](*tensors, *steps, **flags, **_block(size))
    for_bias = bias_parts.sum(0) if biased else bias_parts
    return grad_x, parts.sum(0).to(weight.dtype), for_bias.to(weight.dtype)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _block(size: int) -> dict[str, int]:
    """Choose 8 elements a thread up to 8 warps: loads of 16 bytes in bf16, and few steps between warps for sums."""
    block = triton.next_power_of_2(size)
    return {"BLOCK": block, "num_warps": min(16, max(1, block // 256))}


def _processors(x: Tensor) -> int:
    return 2 if interpreting() else torch.cuda.get_device_properties(x.device).multi_processor_count
