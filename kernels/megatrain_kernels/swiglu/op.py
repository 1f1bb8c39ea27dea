"""SwiGLU that keeps its two inputs only."""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import silu

from megatrain_kernels.backend import choose
from megatrain_kernels.swiglu.reference import swiglu_reference


class _SwiGLU(torch.autograd.Function):
    """silu(gate) is made again in the backward pass instead of being kept."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return silu(gate).mul_(up)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        (grad,) = grads
        return torch.ops.aten.silu_backward(grad * up, gate), silu(gate).mul_(grad)


def swiglu(gate: Tensor, up: Tensor, *, backend: str = "auto") -> Tensor:
    """silu(gate) · up, elementwise over equal shapes."""
    if choose(backend) == "reference":
        return swiglu_reference(gate, up)
    return _SwiGLU.apply(gate, up)
