"""act(gate) · up as Triton kernels, for act = silu (SwiGLU) and tanh GELU (GeGLU).

Nothing but the two inputs is kept; the backward pass computes the activation again.
"""

import math

import triton
import triton.language as tl
from torch import Tensor

from megatrain_kernels.backend import interpreting
from megatrain_kernels.jit_types import Number, Pointer, Tile, constexpr

SLOPE = 2 * math.sqrt(2 / math.pi)
CUBIC = 0.044715


@triton.jit
def sigmoid(x: Tile) -> Tile:
    """Return 1 / (1 + exp(-x)), without overflow."""
    shrunk = tl.exp(-tl.abs(x))
    return tl.where(x < 0.0, shrunk, 1.0) / (1.0 + shrunk)


@triton.jit
def activation(x: Tile, slope: Number, cubic: Number, GELU: constexpr) -> tuple[Tile, Tile]:
    """Return act(x) and its derivative. tanh GELU is x · sigmoid(slope · (x + cubic · x³)) (arXiv 1606.08415)."""
    if GELU:
        part = sigmoid(slope * (x + cubic * x * x * x))
        inner = slope * (1.0 + 3.0 * cubic * x * x)
    else:
        part = sigmoid(x)
        inner = 1.0
    return x * part, part + x * part * (1.0 - part) * inner


@triton.jit
def forward_kernel(
    gate: Pointer,  # (rows, size)
    up: Pointer,  # (rows, size)
    out: Pointer,  # (rows, size), dense
    gate_step: Number, up_step: Number,  # strides of rows
    size: Number, slope: Number, cubic: Number, GELU: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Compute one block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = columns < size
    a = tl.load(gate + row * gate_step + columns, mask=known, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_step + columns, mask=known, other=0.0).to(tl.float32)
    made, _ = activation(a, slope, cubic, GELU)
    tl.store(out + row * size + columns, (made * b).to(out.dtype.element_ty), mask=known)


@triton.jit
def backward_kernel(
    grad: Pointer,  # (rows, size)
    gate: Pointer,  # (rows, size)
    up: Pointer,  # (rows, size)
    grad_gate: Pointer,  # (rows, size), dense
    grad_up: Pointer,  # (rows, size), dense
    grad_step: Number, gate_step: Number, up_step: Number,  # strides of rows
    size: Number, slope: Number, cubic: Number, GELU: constexpr, BLOCK: constexpr,
) -> None:  # fmt: skip
    """Compute both gradients of one block of columns of one row."""
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    known = columns < size
    above = tl.load(grad + row * grad_step + columns, mask=known, other=0.0).to(tl.float32)
    a = tl.load(gate + row * gate_step + columns, mask=known, other=0.0).to(tl.float32)
    b = tl.load(up + row * up_step + columns, mask=known, other=0.0).to(tl.float32)
    made, derivative = activation(a, slope, cubic, GELU)
    place = row * size + columns
    tl.store(grad_gate + place, (above * b * derivative).to(grad_gate.dtype.element_ty), mask=known)
    tl.store(grad_up + place, (above * made).to(grad_up.dtype.element_ty), mask=known)


def gated_forward(gate: Tensor, up: Tensor, *, gelu: bool) -> Tensor:
    """Return act(gate) · up of gate and up `(rows, size)`."""
    gate, up = _rows(gate), _rows(up)
    out = gate.new_empty(gate.shape)
    if out.numel():
        grid, block = _grid(gate)
        steps = (gate.stride(0), up.stride(0), gate.shape[1])
        forward_kernel[grid](gate, up, out, *steps, SLOPE, CUBIC, GELU=gelu, **block)
    return out


def gated_backward(grad: Tensor, gate: Tensor, up: Tensor, *, gelu: bool) -> tuple[Tensor, Tensor]:
    """Return the gradients of gate and up."""
    grad, gate, up = _rows(grad), _rows(gate), _rows(up)
    made = gate.new_empty(gate.shape), up.new_empty(up.shape)
    if gate.numel():
        grid, block = _grid(gate)
        steps = (grad.stride(0), gate.stride(0), up.stride(0), gate.shape[1])
        backward_kernel[grid](grad, gate, up, *made, *steps, SLOPE, CUBIC, GELU=gelu, **block)
    return made


def _rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _grid(x: Tensor) -> tuple[tuple[int, int], dict[str, int]]:
    rows, size = x.shape
    block = 64 if interpreting() else min(4096, max(128, triton.next_power_of_2(size)))
    return (rows, triton.cdiv(size, block)), {"BLOCK": block, "num_warps": max(1, block // 512)}
