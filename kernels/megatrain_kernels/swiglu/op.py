"""SwiGLU that keeps its two inputs only."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import silu

from megatrain_kernels.backend import choose, wants_triton
from megatrain_kernels.blocks import block_rows
from megatrain_kernels.gated_operator import gated_op
from megatrain_kernels.swiglu.reference import swiglu_reference


class _SwiGLU(torch.autograd.Function):
    """silu(gate) is made again in the backward pass instead of being kept; gate and up `(rows, size)`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        if not _in_blocks(gate):
            return silu(gate).mul_(up)
        out, rows = torch.empty_like(gate), block_rows(gate)
        for a, b, result in zip(gate.split(rows), up.split(rows), out.split(rows), strict=True):
            torch.mul(silu(a), b, out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        if not _in_blocks(gate):
            return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)
        grad_gate, grad_up, rows = torch.empty_like(gate), torch.empty_like(up), block_rows(gate)
        pieces = (t.split(rows) for t in (gate, up, grad, grad_gate, grad_up))
        for a, b, part, for_gate, for_up in zip(*pieces, strict=True):
            torch.mul(silu(a), part, out=for_up)
            torch.ops.aten.silu_backward.grad_input(part * b, a, grad_input=for_gate)
        return grad_gate, grad_up


def _in_blocks(gate: Tensor) -> bool:
    """In float32 on a CPU blocks take two thirds of the time; in bf16 its arithmetic is the limit, not memory."""
    return gate.device.type == "cpu" and gate.itemsize >= 4


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) · up, elementwise over equal shapes `(..., size)`."""
    chosen = choose(backend, ("torch", "triton", "reference"))
    if chosen == "reference":
        return swiglu_reference(gate, up)
    flat = (t.reshape(-1, t.shape[-1]) for t in (gate, up))
    if wants_triton(gate, backend):
        made: Tensor = gated_op(*flat, False, backend)
        return made.view(gate.shape)
    if torch.compiler.is_compiling():
        return silu(gate) * up
    return _SwiGLU.apply(*flat).view(gate.shape)
