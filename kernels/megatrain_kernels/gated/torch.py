"""SwiGLU and GeGLU in PyTorch: they keep their two inputs only, and the backward pass computes the activation again."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

from megatrain_kernels.blocks import block_rows


def activate(gate: Tensor, *, gelu: bool) -> Tensor:
    """Return silu, or tanh GELU, of gate."""
    return F.gelu(gate, approximate="tanh") if gelu else F.silu(gate)


class SwiGLU(torch.autograd.Function):
    """silu(gate) · up of gate and up `(rows, size)`."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply, in blocks of rows on a CPU."""
        ctx.save_for_backward(gate, up)
        if not _in_blocks(gate):
            return F.silu(gate).mul_(up)
        out, rows = torch.empty_like(gate), block_rows(gate)
        for a, b, result in zip(gate.split(rows), up.split(rows), out.split(rows), strict=True):
            torch.mul(F.silu(a), b, out=result)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute silu(gate) again."""
        gate, up = ctx.saved_tensors
        if not _in_blocks(gate):
            return torch.ops.aten.silu_backward(grad * up, gate), F.silu(gate).mul_(grad)
        grad_gate, grad_up, rows = torch.empty_like(gate), torch.empty_like(up), block_rows(gate)
        pieces = (t.split(rows) for t in (gate, up, grad, grad_gate, grad_up))
        for a, b, part, for_gate, for_up in zip(*pieces, strict=True):
            torch.mul(F.silu(a), part, out=for_up)
            torch.ops.aten.silu_backward.grad_input(part * b, a, grad_input=for_gate)
        return grad_gate, grad_up


def _in_blocks(gate: Tensor) -> bool:
    """Decide for blocks: in float32 on a CPU they take two thirds of the time; bf16 is bound by arithmetic there."""
    return gate.device.type == "cpu" and gate.itemsize >= 4


class GeGLU(torch.autograd.Function):
    """gelu(gate) · up."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply."""
        ctx.save_for_backward(gate, up)
        return activate(gate, gelu=True).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Compute gelu(gate) again."""
        gate, up = ctx.saved_tensors
        for_gate = torch.ops.aten.gelu_backward(grad * up, gate, approximate="tanh")
        return for_gate, activate(gate, gelu=True).mul_(grad)
