"""GELU of a sum with a bias as Triton kernels: nothing but the two inputs is kept.

The gradient of the bias is summed over a program's rows in registers and over programs afterwards: one read of the
gradient less than a sum of its own, and the same bits every time.
"""

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from megatrain_kernels.backend import interpreting
from megatrain_kernels.gated.triton import CUBIC, SLOPE, activation
from megatrain_kernels.jit_types import Number, Pointer, Tile, constexpr

ROOT = math.sqrt(0.5)
DENSITY = 1 / math.sqrt(2 * math.pi)
PROGRAMS_A_PROCESSOR = 4


@triton.jit
def gelu(
    x: Tile, slope: Number, cubic: Number, root: Number, density: Number, TANH: constexpr
) -> tuple[Tile, Tile]:
    """Return gelu(x) and its derivative; with Φ and φ of the normal distribution x · Φ(x) and Φ(x) + x · φ(x)."""
    if TANH:
        made, derivative = activation(x, slope, cubic, True)
    else:
        part = 0.5 * (1.0 + tl.erf(x * root))
        made = x * part
        derivative = part + x * density * tl.exp(-0.5 * x * x)
    return made, derivative


@triton.jit
def forward_kernel(
    x: Pointer,  # (rows, size)
    bias: Pointer,  # (size,)
    out: Pointer,  # (rows, size), dense
    x_step: Number,  # stride of rows
    rows: Number, size: Number, slope: Number, cubic: Number, root: Number, density: Number,
    TANH: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Compute one block of columns of `ROWS` rows."""
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)[:, None]
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    known = (row < rows) & (columns < size)
    wide = tl.load(x + row * x_step + columns, mask=known, other=0.0).to(tl.float32)
    wide += tl.load(bias + columns, mask=columns < size, other=0.0).to(tl.float32)
    made, _ = gelu(wide, slope, cubic, root, density, TANH)
    tl.store(out + row * size + columns, made.to(out.dtype.element_ty), mask=known)


@triton.jit
def backward_kernel(
    grad: Pointer,  # (rows, size)
    x: Pointer,  # (rows, size)
    bias: Pointer,  # (size,)
    grad_x: Pointer,  # (rows, size), dense
    bias_parts: Pointer,  # (programs, size)
    grad_step: Number, x_step: Number,  # strides of rows
    rows: Number, size: Number,
    rows_each: Number,  # a multiple of ROWS
    slope: Number, cubic: Number, root: Number, density: Number,
    TANH: constexpr, ROWS: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Compute the gradient of `rows_each` rows of a block of columns, and these rows' part of the bias's gradient."""
    program = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)[None, :]
    shift = tl.load(bias + columns, mask=columns < size, other=0.0).to(tl.float32)
    total = tl.zeros((ROWS, BLOCK), tl.float32)
    for start in range(0, rows_each, ROWS):
        row = program * rows_each + start + tl.arange(0, ROWS)[:, None]
        known = (row < rows) & (columns < size)
        above = tl.load(grad + row * grad_step + columns, mask=known, other=0.0).to(tl.float32)
        wide = tl.load(x + row * x_step + columns, mask=known, other=0.0).to(tl.float32) + shift
        _, derivative = gelu(wide, slope, cubic, root, density, TANH)
        made = above * derivative
        tl.store(grad_x + row * size + columns, made.to(grad_x.dtype.element_ty), mask=known)
        total += made
    places = bias_parts + program * size + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    tl.store(places, tl.sum(total, 0), mask=tl.program_id(1) * BLOCK + tl.arange(0, BLOCK) < size)


def bias_gelu_forward(x: Tensor, bias: Tensor, *, tanh: bool) -> Tensor:
    """Return gelu(x + bias) of x `(rows, size)` and bias `(size,)`."""
    x, bias, (rows, size) = _rows(x), bias.contiguous(), x.shape
    out, blocks = x.new_empty(x.shape), _blocks(size)
    if out.numel():
        grid = (triton.cdiv(rows, blocks["ROWS"]), triton.cdiv(size, blocks["BLOCK"]))
        numbers = (x.stride(0), rows, size, SLOPE, CUBIC, ROOT, DENSITY)
        forward_kernel[grid](x, bias, out, *numbers, TANH=tanh, **blocks)
    return out


def bias_gelu_backward(grad: Tensor, x: Tensor, bias: Tensor, *, tanh: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of x and bias."""
    grad, x, bias, (rows, size) = _rows(grad), _rows(x), bias.contiguous(), x.shape
    grad_x, blocks = x.new_empty(x.shape), _blocks(size)
    if not grad_x.numel():
        return grad_x, torch.zeros_like(bias)
    tiles = triton.cdiv(rows, blocks["ROWS"])
    wide = triton.cdiv(size, blocks["BLOCK"])
    tiles_each = triton.cdiv(tiles * wide, _processors(x) * PROGRAMS_A_PROCESSOR)
    programs = triton.cdiv(tiles, tiles_each)
    parts = x.new_empty(programs, size, dtype=torch.float32)
    numbers = (
        grad.stride(0),
        x.stride(0),
        rows,
        size,
        tiles_each * blocks["ROWS"],
        SLOPE,
        CUBIC,
        ROOT,
        DENSITY,
    )
    backward_kernel[(programs, wide)](grad, x, bias, grad_x, parts, *numbers, TANH=tanh, **blocks)
    return grad_x, parts.sum(0).to(bias.dtype)


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _blocks(size: int) -> dict[str, int]:
    """Choose the sizes of blocks (not tuned): 16 elements a thread, of rows that share a piece of the bias."""
    if interpreting():
        return {"ROWS": 2, "BLOCK": 64}
    block = min(1024, max(128, triton.next_power_of_2(size)))
    return {"ROWS": 4, "BLOCK": block, "num_warps": max(1, block // 128)}


def _processors(x: Tensor) -> int:
    return 2 if interpreting() else torch.cuda.get_device_properties(x.device).multi_processor_count
